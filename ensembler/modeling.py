"""EnsembleForCausalLM: several causal language models, combined by a rule, as one `transformers` model.

The face of a member set and a rule: config, forward, save, load, `generate`. Members are found, loaded and run in
`engine`, the arithmetic is in `ensembler_kernels`, texts are decoded in `decoding`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from ensembler.config import EnsembleConfig, MemberConfig, check_roles
from ensembler.engine.backbone import Backbone
from ensembler.engine.distributed import RankedMembers, World
from ensembler.engine.ensemble_cache import EnsembleCache
from ensembler.engine.grid import make_combination
from ensembler.engine.member_set import MemberSet
from ensembler.engine.members import MemberFiles, load_members, load_whole, shortest_context
from ensembler.engine.model_runner import Step
from ensembler.engine.row_cache import RowCache
from ensembler.errors import ConfigError, InputError
from ensembler.generation import EnsembleGeneration, check_arguments
from ensembler.preflight import CheckedEnsemble, check_ensemble
from ensembler.vocab import VocabularyContract

_logger = logging.get_logger(__name__)


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
    _is_stateful: ClassVar[bool] = False
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
        make = MemberSet if world is None else partial(RankedMembers, world)
        self.member_set: MemberSet = make(self.members, backbones, contract)
        self._row_alpha: Tensor | None = None
        if rule.anchor in self.members:
            self.generation_config = deepcopy(self.anchor.generation_config)
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
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> EnsembleForCausalLM:
        """Return an ensemble of `members` by role: paths, hub ids, MemberConfigs, or models that are loaded already.

        `constant` and `slope` are the numbers of the rule 'linear'; `cutoff` belongs to 'contrastive'; `outside` says
        what becomes of tokens that not every member holds. Raises ConfigError, MemberError or VocabularyError before
        any weight is loaded.
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
        trust_remote_code: bool = False,
        world: World | None = None,
    ) -> EnsembleForCausalLM:
        """Return the ensemble that `config` describes; paths in it are absolute or relative to the working directory.

        `loaded` holds members that need no loading. Everything is checked before the first weight is read.
        """
        checked = check_ensemble(config.replaced(), loaded, trust_remote_code=trust_remote_code)
        return cls.from_checked(checked, attn_implementation=attn_implementation, world=world)

    @classmethod
    def from_checked(
        cls, checked: CheckedEnsemble, *, attn_implementation: str | None = None, world: World | None = None
    ) -> EnsembleForCausalLM:
        """Load the members of a checked ensemble; with a `world` of several processes each loads its part of them."""
        models, backbones = load_members(checked.files, world, attn_implementation=attn_implementation)
        model = cls(checked.config, models | checked.loaded, checked.contract, backbones, world)
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
        dtype: str | torch.dtype | None = None,
        device_map: str | torch.device | Mapping[str, str | torch.device] | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        world: World | None = None,
        **options: Any,
    ) -> EnsembleForCausalLM:
        """Return the ensemble of a folder (or hub id of one) that `save_pretrained` or `ensembler create` wrote.

        What is given overrides the folder's: the arguments of `from_members` (the numbers of the folder's rule do not
        go over to another one), `dtype` and `device_map` of all members, `config` all of config.json. `device_map`: a
        device as in torch, a strategy of accelerate ('auto' ...) for each member by itself, or a mapping from role to
        these. `world`: the processes that share the members. The hub's options (`revision`, `token` ...) say which
        folder; any other is refused.
        """
        options |= {"rule": rule, "alpha": alpha, "constant": constant, "slope": slope}
        options |= {"cutoff": cutoff, "outside": outside}
        config = folders.load(
            pretrained_model_name_or_path, config, dtype=dtype, device_map=device_map, options=options
        )
        attn_implementation = attn_implementation or config._attn_implementation_internal
        return cls.from_config(
            config, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code, world=world
        )

    def save_pretrained(  # type: ignore[override,unused-ignore]
        self, save_directory: str | Path, *, copy_members: bool = False, overwrite: bool = False
    ) -> None:
        """Write the folder: config.json, generation_config.json, the anchor's tokenizer; members are referenced.

        `copy_members` copies them too, for a folder that stands alone; members that were passed in as objects have no
        path and are always copied. Raises OutputError if the folder is not empty, unless `overwrite`.
        """
        if self._row_alpha is not None:
            raise ConfigError("alpha is a tensor with one value per row; set it to a number before saving")
        config = self.config
        copies = {
            role: folders.Copy(partial(self._whole, role), self._tokenizers(role))
            for role in self.members
            if copy_members or config.members[role].model == folders.IN_MEMORY
        }
        folders.write(
            config,
            Path(save_directory),
            tokenizer=self.tokenizer,
            generation_config=self.generation_config,
            copies=copies,
            overwrite=overwrite,
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
    def shortest_context(self) -> tuple[str, int] | None:
        """The role with the shortest context and its length in tokens, or None where no member sets a limit."""
        known = {role: files.model_config for role, files in self._files.items()}
        return shortest_context({**known, **{role: member.config for role, member in self.members.items()}})

    @property
    def device(self) -> torch.device:
        """The device of inputs and of combined logits: the anchor's."""
        runners = self.member_set.runners
        return next((runner.device for runner in runners if self.rule.anchor in runner.roles), runners[0].device)

    @property
    def dtype(self) -> torch.dtype:
        """The anchor's dtype; combined logits are float32 whatever it is."""
        return self.anchor.dtype  # type: ignore[no-any-return]

    def get_input_embeddings(self) -> nn.Module:
        """The anchor's: `transformers` asks for it; members embed tokens by themselves."""
        embeddings: nn.Module = self.anchor.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        """None: there is no single head."""
        return None

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
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Run all members on `input_ids` (rows, positions) and return combined logits (rows, kept positions, V), fp32.

        V is the anchor's width. `logits_to_keep`: as in `transformers`, the last positions that are wanted (0: all).
        `labels` (rows, positions; −100 is ignored) adds the loss. Raises LogitsError where a member computed NaN; the
        cache then is as it was before.
        """
        check_arguments(unused)
        if input_ids is None:
            raise InputError("an ensemble's forward needs input_ids; its members embed tokens by themselves")
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache()
        step = Step(input_ids, attention_mask, position_ids, logits_to_keep if labels is None else 0)
        alpha = self.alpha_of_rows(input_ids.shape[0])
        combined = self.member_set.combined(step, past_key_values, self.combination, alpha)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                combined[:, :-1].flatten(0, 1), labels[:, 1:].to(combined.device).flatten(), ignore_index=-100
            )
        output = CausalLMOutputWithPast(loss=loss, logits=combined, past_key_values=past_key_values)
        return output if return_dict is not False else output.to_tuple()

    def member_logits(self, step: Step, cache: EnsembleCache | RowCache | None = None) -> dict[str, Tensor]:
        """Return every member's own logits (rows, kept positions, V_member) by role, as `MemberSet.logits` does."""
        return self.member_set.logits(step, cache)

    def new_cache(self) -> EnsembleCache:
        """Return an empty growing cache for the members."""
        return self.member_set.new_cache()

    def compile_members(self, backend: Any = "inductor") -> None:
        """Compile each member's decode steps; members that cannot be compiled run as they are, with a warning.

        Compiling happens at the first step of its shape: rows and positions count in powers of two. `backend`: of
        torch.compile. Raises ConfigError where there is no C++ compiler.
        """
        for line in self.member_set.compile(backend):
            _logger.warning(line)


AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM, exist_ok=True)
