"""EnsembleForCausalLM: several causal language models, combined by a rule, as one `transformers` model.

The face of a member set and a rule: config, forward, save, load, `generate`. Members are found, loaded and run in
`engine`, the arithmetic is in `ensembler_kernels`, texts are decoded in `decoding`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from ensembler import folder as folders
from ensembler.auto_classes import register_name
from ensembler.config import EnsembleConfig, MemberConfig, check_roles
from ensembler.engine.backbone import Backbone
from ensembler.engine.distributed import RankedMembers, World
from ensembler.engine.ensemble_cache import EnsembleCache
from ensembler.engine.grid import make_combination
from ensembler.engine.member_set import MemberSet
from ensembler.engine.members import MemberFiles, is_whole, load_members, load_whole, shortest_context
from ensembler.engine.model_runner import Step
from ensembler.engine.row_cache import RowCache
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.engine.text_plan import TextPlan
from ensembler.errors import ConfigError, InputError, OutputError
from ensembler.generation import EnsembleGeneration, check_arguments
from ensembler.preflight import CheckedEnsemble, check_ensemble
from ensembler.vocab import VocabularyContract

_logger = logging.get_logger(__name__)

_OF_LOSS = ("shift_labels", "num_items_in_batch", "ignore_index")
_COLLECTED = ("_no_split_modules", "_skip_keys_device_placement")


class EnsembleForCausalLM(folders.PushedFolder, PreTrainedModel, EnsembleGeneration, GenerationMixin):  # type: ignore[misc,unused-ignore]
    """Members combined by a rule, as one causal language model.

    Make one with `from_members` or `from_pretrained`. `members` is a ModuleDict by role, the anchor first; `contract`
    says what their vocabularies share, `combination` what the operations of `ensembler_kernels` take; `tokenizer` is
    the anchor's, where it is known. `alpha` may be set between calls: a number, or a tensor (rows,) with one per row.
    `member_set` runs the members. With a `world` of several processes, `members` has those of this one.
    """

    config_class = EnsembleConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa: ClassVar[bool] = True
    _supports_flash_attn: ClassVar[bool] = True
    _supports_flex_attn: ClassVar[bool] = True

    def __init__(
        self,
        config: EnsembleConfig,
        members: Mapping[str, PreTrainedModel],
        contract: VocabularyContract,
        backbones: Sequence[Backbone] = (),
        world: World | None = None,
        text: TextPlan | None = None,
    ) -> None:
        rule = config.get_rule()
        if world is None:
            check_roles(rule, members)
        super().__init__(config)
        self._rule = rule
        self.contract = contract
        self.world = world
        self.members = nn.ModuleDict({role: members[role] for role in rule.roles if role in members})
        self.combination = make_combination(rule, contract, config.outside, tuple(contract.widths))
        self.tokenizer: Any | None = None
        self._files: dict[str, MemberFiles] = {}
        self.member_set: MemberSet
        if text is not None:
            self.member_set = TextMemberSet(text, self.members, backbones, world)
        elif world is not None:
            self.member_set = RankedMembers(world, self.members, backbones, contract)
        else:
            self.member_set = MemberSet(self.members, backbones, contract)
        self._row_alpha: Tensor | None = None
        if rule.anchor in self.members:
            self.generation_config = deepcopy(self.anchor.generation_config)
        self._was_trained = False
        self.post_init()
        self.eval()

    # -- making one ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_members(
        cls,
        *,
        rule: str = "base-change",
        alpha: float = 1.0,
        members: Mapping[str, str | Path | MemberConfig | Mapping[str, Any] | PreTrainedModel],
        constant: Mapping[str, float] | None = None,
        slope: Mapping[str, float] | None = None,
        cutoff: float | None = None,
        outside: str = "mask",
        allow_renamed_special: bool = False,
        attn_implementation: str | None = None,
        trust_remote_code: bool | Collection[str] = False,
    ) -> EnsembleForCausalLM:
        """Return an ensemble of `members` by role: paths, hub ids, MemberConfigs, or models that are loaded already.

        `constant` and `slope` are the numbers of the rule 'linear'; `cutoff` belongs to 'contrastive'; `outside` says
        what becomes of tokens that not every member holds, `allow_renamed_special` that added tokens may have other
        names. `trust_remote_code`: the roles whose models may run code of their own (True: all). Raises ConfigError,
        MemberError or VocabularyError before any weight is loaded.
        """
        loaded = {role: member for role, member in members.items() if isinstance(member, PreTrainedModel)}
        named = {role: folders.named(member) for role, member in members.items()}
        config = EnsembleConfig(
            rule=rule,
            alpha=alpha,
            members=named,
            constant=None if constant is None else dict(constant),
            slope=None if slope is None else dict(slope),
            cutoff=cutoff,
            outside=outside,
            allow_renamed_special=allow_renamed_special,
        )
        return cls.from_config(
            config, loaded=loaded, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        )

    @classmethod
    def from_config(
        cls,
        config: EnsembleConfig,
        *,
        loaded: Mapping[str, PreTrainedModel] | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool | Collection[str] = False,
        world: World | None = None,
    ) -> EnsembleForCausalLM:
        """Return the ensemble that `config` describes; paths in it are absolute or relative to the working directory.

        `loaded` holds members that need no loading. Everything is checked before the first weight is read.
        """
        config = config.replaced()
        config.trust_code(trust_remote_code)
        checked = check_ensemble(config, loaded)
        return cls.from_checked(checked, attn_implementation=attn_implementation, world=world)

    @classmethod
    def from_checked(
        cls, checked: CheckedEnsemble, *, attn_implementation: str | None = None, world: World | None = None
    ) -> EnsembleForCausalLM:
        """Load the members of a checked ensemble; with a `world` of several processes each loads its part of them."""
        models, backbones = load_members(checked.files, world, attn_implementation=attn_implementation)
        if attn_implementation is not None:
            checked.config._attn_implementation = attn_implementation
        model = cls(checked.config, models | checked.loaded, checked.contract, backbones, world, checked.text)
        model.tokenizer = checked.tokenizer
        model._files = dict(checked.files)
        if checked.generation_config is not None:
            model.generation_config = checked.generation_config
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override,unused-ignore]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: EnsembleConfig | None = None,
        rule: str | None = None,
        alpha: float | None = None,
        constant: Mapping[str, float] | None = None,
        slope: Mapping[str, float] | None = None,
        cutoff: float | None = None,
        outside: str | None = None,
        allow_renamed_special: bool | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: int | str | torch.device | Mapping[str, int | str | torch.device] | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool | Collection[str] = False,
        world: World | None = None,
        **options: Any,
    ) -> EnsembleForCausalLM:
        """Return the ensemble of a folder (or hub id of one) that `save_pretrained` or `ensembler create` wrote.

        What is given overrides the folder's: the arguments of `from_members` (the numbers of the folder's rule do not
        go over to another one), `dtype` and `device_map` of all members, `config` all of config.json. `device_map`: a
        device as in torch, a strategy of accelerate ('auto' ...) for each member by itself, or a mapping from role to
        these, where "" stands for all other roles. `world`: the processes that share the members. The hub's options
        (`revision`, `token` ...) say which folder; any other is refused.
        """
        options |= {"rule": rule, "alpha": alpha, "constant": constant, "slope": slope}
        options |= {"cutoff": cutoff, "outside": outside, "allow_renamed_special": allow_renamed_special}
        config = folders.load(
            pretrained_model_name_or_path, config, dtype=dtype, device_map=device_map, options=options
        )
        attn_implementation = attn_implementation or config._attn_implementation_internal
        return cls.from_config(
            config, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code, world=world
        )

    def save_pretrained(  # type: ignore[override,unused-ignore]
        self,
        save_directory: str | Path,
        *,
        copy_members: bool = False,
        overwrite: bool = False,
        max_shard_size: int | str | None = None,
        is_main_process: bool = True,
        **options: Any,
    ) -> None:
        """Write the folder: config.json, generation_config.json, the anchor's tokenizer; members are referenced.

        `copy_members` copies them too, for a folder that stands alone. Members that were passed in as objects have no
        path and are always copied, and so are all where the ensemble was in training mode. `max_shard_size`: of their
        weights files, as in `transformers`, whose other options are refused unless they ask for nothing. Other files
        of the folder stay. Raises OutputError if it holds a model; an ensemble is replaced with `overwrite`, or where
        this one was in training mode: a Trainer saves to the same folder again and again.
        """
        folders.check_save_options(options)
        if not is_main_process:
            return
        if hasattr(self, "peft_config"):
            raise OutputError(
                "the members have an adapter in their layers (get_peft_model, add_adapter); save the PeftModel, or "
                "merge the adapter and save with copy_members=True"
            )
        if self._row_alpha is not None:
            raise ConfigError("alpha is a tensor with one value per row; set it to a number before saving")
        config = self.config
        copies = {
            role: folders.Copy(partial(self._whole, role), self._tokenizers(role), max_shard_size)
            for role in self.members
            if copy_members or self._was_trained or config.members[role].model == folders.IN_MEMORY
        }
        folders.write(
            config,
            Path(save_directory),
            tokenizer=self.tokenizer,
            generation_config=self.generation_config,
            copies=copies,
            overwrite=overwrite or (self._was_trained and folders.is_begun(Path(save_directory))),
        )

    def _whole(self, role: str) -> PreTrainedModel:
        """The member as one model with its adapter merged."""
        return load_whole(self.members[role], self._files.get(role), self.member_set.backbones)

    def _tokenizers(self, role: str) -> tuple[Any, ...]:
        """The member's own tokenizer, if it has one."""
        tokenizer = self._files[role].tokenizer if role in self._files else None
        return () if tokenizer is None else (tokenizer,)

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def anchor(self) -> PreTrainedModel:
        """The member that the ensemble equals at α = 0 (where another process has it: the first of this one's)."""
        role = self.rule.anchor if self.rule.anchor in self.members else next(iter(self.members))
        member: PreTrainedModel = self.members[role]
        return member

    @property
    def _is_stateful(self) -> bool:
        """Return whether a member keeps a state that cannot be taken back: `transformers` asks before it drafts."""
        return any(member._is_stateful for member in self.members.values())

    @property
    def shortest_context(self) -> tuple[str, int] | None:
        """The role with the shortest context and its length in tokens, or None where no member sets a limit."""
        known = {role: files.model_config for role, files in self._files.items()}
        return shortest_context({**known, **{role: member.config for role, member in self.members.items()}})

    @property
    def device(self) -> torch.device:
        """The device of inputs and of combined logits: the anchor's, or another member's where it runs elsewhere."""
        runners = self.member_set.runners
        found = [one for one in runners if self.rule.anchor in one.roles] or runners
        return found[0].device if found else next(self.anchor.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The anchor's dtype; combined logits are float32 whatever it is."""
        return self.anchor.dtype  # type: ignore[no-any-return]

    def get_input_embeddings(self) -> nn.Module:
        """The anchor's: `transformers` asks for it; members embed tokens by themselves."""
        embeddings: nn.Module = self.anchor.get_input_embeddings()
        return embeddings

    def init_weights(self) -> None:
        """Leave the weights as they are: members come with theirs."""

    def post_init(self) -> None:
        """Collect from the members what others ask of a model: its tied weights, its modules that stay in one piece."""
        super().post_init()
        for role, member in self.members.items():
            tied = getattr(member, "all_tied_weights_keys", {})
            self.all_tied_weights_keys |= {f"members.{role}.{k}": f"members.{role}.{v}" for k, v in tied.items()}
            for name in _COLLECTED:
                getattr(self, name).update(getattr(member, name, None) or ())

    def train(self, mode: bool = True) -> EnsembleForCausalLM:
        """Set training mode; from then on `save_pretrained` copies all members, since their weights may change.

        Raises InputError for a member whose weights could not be saved: shared, quantised or spread over devices.
        """
        if mode:
            for role, member in self.members.items():
                if not is_whole(member, self._files.get(role), self.member_set.backbones):
                    raise InputError(
                        f"{role} cannot be trained: its weights are shared with another member, quantised or spread "
                        "over devices; load it without that, or train it alone"
                    )
            self._was_trained = True
        super().train(mode)
        return self

    def get_output_embeddings(self) -> nn.Module | None:
        """None: there is no single head."""
        return None

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: each member embeds tokens by itself."""
        raise InputError("the embeddings of an ensemble cannot be replaced; replace those of a member")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: the vocabulary contract is between the members as they were loaded."""
        raise InputError("the embeddings of an ensemble cannot be resized; resize the members and combine them then")

    # -- running it ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EnsembleCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Run all members on `input_ids` (rows, positions) and return combined logits (rows, kept positions, V), fp32.

        V is the anchor's width. `logits_to_keep`: as in `transformers`, the last positions that are wanted (0: all).
        `past_key_values`: of the forward before; one is made unless `use_cache` is False or tokenizers differ. `labels`
        (rows, positions; −100 is ignored) adds the loss; `shift_labels` and `num_items_in_batch` belong to it. Raises
        LogitsError where a member computed NaN; the cache then is as it was before.
        """
        for_loss = {name: options.pop(name) for name in _OF_LOSS if name in options}
        check_arguments(options, self.member_set.runners)
        if input_ids is None:
            raise InputError("an ensemble's forward needs input_ids; its members embed tokens by themselves")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.contract.is_text
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache()
        step = Step(input_ids, attention_mask, position_ids, logits_to_keep if labels is None else 0)
        alpha = self.alpha_of_rows(input_ids.shape[0])
        combined = self.member_set.combined(step, past_key_values, self.combination, alpha)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=combined, labels=labels, vocab_size=combined.shape[-1], **for_loss)
        output = CausalLMOutputWithPast(loss=loss, logits=combined, past_key_values=past_key_values)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def member_logits(self, step: Step, cache: EnsembleCache | RowCache | None = None) -> dict[str, Tensor]:
        """Return every member's own logits (rows, kept positions, V_member) by role, as `MemberSet.logits` does."""
        return self.member_set.logits(step, cache)

    def new_cache(self) -> EnsembleCache | None:
        """Return an empty growing cache for the members, or None where one of them takes none."""
        return self.member_set.new_cache()

    def compile_members(self, backend: Any = "inductor") -> None:
        """Compile each member's decode steps; members that cannot be compiled run as they are, with a warning.

        Compiling happens at the first step of its shape: rows and positions count in powers of two. `backend`: of
        torch.compile. Raises ConfigError where there is no C++ compiler.
        """
        for line in self.member_set.compile(backend):
            _logger.warning(line)


AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM, exist_ok=True)
register_name(EnsembleForCausalLM)
