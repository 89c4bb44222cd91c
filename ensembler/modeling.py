"""EnsembleForCausalLM: several causal language models, combined by a rule, as one `transformers` model.

It runs the members, combines their logits and hands the result to `transformers`, whose `generate` does the rest. It
does not know how members are loaded (`members`), what the arithmetic is (`ensembler_kernels`) or what a rule means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from ensembler_kernels import Combination, Weights, combine
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from ensembler import folder as folders
from ensembler.backbones import Backbone
from ensembler.cache import EnsembleCache, Roles
from ensembler.compiling import Backend, CompiledMembers
from ensembler.config import EnsembleConfig, MemberConfig, check_known, check_roles
from ensembler.distributed import World, combine_over_ranks, gather_over_ranks
from ensembler.errors import ConfigError, InputError
from ensembler.members import LoadedGroup, MemberFiles, check_places, group_members, load_group, shortest_context
from ensembler.preflight import CheckedEnsemble, check_ensemble
from ensembler.rules import Rule
from ensembler.runners import Group, Runner, SerialRunner, Step, check_nan, choose_runner, plan_forwards
from ensembler.vocab import VocabularyContract
from ensembler.watching import NanWatch


class EnsembleForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc,unused-ignore]
    """Members combined by a rule, as one causal language model.

    Make one with `from_members` or `from_pretrained`. `members` is a ModuleDict by role, the anchor first; `contract`
    says what their vocabularies share, `combination` what the operations of `ensembler_kernels` take; `tokenizer` is
    the anchor's, where it is known. `alpha` may be set between calls: a number, or a tensor (rows,) with one per row.
    `runner` runs the members: those on different devices at the same time, unless another one is set. With a `world`
    of several processes, `members` has those of this one.
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
        self.rule = rule
        self.contract = contract
        self.world = world
        self.members = nn.ModuleDict({role: members[role] for role in rule.roles if role in members})
        self.combination = make_combination(rule, contract, config.outside)
        self.tokenizer: Any | None = None
        self._files: dict[str, MemberFiles] = {}
        self._backbones = tuple(backbones)
        self._watch: NanWatch | None = None
        self._compiled: CompiledMembers | None = None
        self._planned: tuple[list[PreTrainedModel], list[Group]] = ([], [])
        self.runner: Runner = choose_runner(self.groups)
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
        named = {role: _named(member) for role, member in members.items()}
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
        """Load the members of a checked ensemble, one after another, those that share a backbone together.

        With a `world` of several processes each loads its part of them.
        """
        groups = group_members(checked.files)
        if world is not None:
            groups = [groups[index] for index in world.divide([[files.role for files in group] for group in groups])]

        def load() -> list[LoadedGroup]:
            check_places(files for group in groups for files in group)
            return [load_group(group, attn_implementation=attn_implementation) for group in groups]

        loaded = load() if world is None else world.together(load)
        models = {role: model for group in loaded for role, model in group.models.items()} | checked.loaded
        backbones = [group.backbone for group in loaded if group.backbone is not None]
        model = cls(checked.config, models, checked.contract, backbones, world)
        model.tokenizer = checked.tokenizer
        model._files = checked.files
        if checked.generation_config is not None:
            model.generation_config = checked.generation_config
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override,unused-ignore]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: EnsembleConfig | None = None,
        alpha: float | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | torch.device | Mapping[str, str | torch.device] | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        world: World | None = None,
        **options: Any,
    ) -> EnsembleForCausalLM:
        """Return the ensemble of a folder (or hub id of one) that `save_pretrained` or `ensembler create` wrote.

        `alpha`, `dtype` and `device_map` override the folder's, as does `config` its config.json. `device_map`: a
        device as in torch, a strategy of accelerate ('auto' ...) for each member by itself, or a mapping from role to
        these. `world`: the processes that share the members. The hub's options (`revision`, `token` ...) say which
        folder; any other is refused.
        """
        dtype = options.pop("torch_dtype", None) if dtype is None else dtype
        hub_options = {name: options.pop(name) for name in folders.HUB_OPTIONS if options.get(name) is not None}
        unknown = [name for name, value in options.items() if value is not None and name not in _OPTIONS_OF_AUTO]
        if unknown:
            raise ConfigError(f"from_pretrained of an ensemble takes no {unknown[0]!r}; set it for each member instead")
        folder = folders.find(pretrained_model_name_or_path, **hub_options)
        config = folders.read(folder) if config is None else folders.located(config, folder)
        if alpha is not None:
            config = config.replaced(alpha=alpha)
        if dtype not in (None, "auto"):
            config.change_members(dtype=str(dtype).removeprefix("torch."))
        if device_map is not None:
            places = device_map if isinstance(device_map, Mapping) else dict.fromkeys(config.members, device_map)
            check_known(places, config.members)
            config.members |= {role: config.members[role].placed(str(place)) for role, place in places.items()}
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
            role: folders.Copy(partial(self._whole, role), self._files[role].tokenizer if role in self._files else None)
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
        """The member as one model with its adapter merged: read again where weights are shared, quantised or spread."""
        model = getattr(self.members[role], "_orig_mod", self.members[role])  # of a compiled one the model itself
        member = self._files[role].config if role in self._files else self.config.members[role]
        shared = any(backbone.views.get(role) is model for backbone in self._backbones)
        if not shared and member.quantization is None and member.device_map is None:
            return model
        plain = replace(member.placed("cpu"), quantization=None)
        return load_group([replace(self._files[role], config=plain)]).models[role]

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def alpha(self) -> float | Tensor:
        """The strength of the log-ratio: a number, or a tensor (rows,) with one value per row."""
        return float(self.config.alpha) if self._row_alpha is None else self._row_alpha

    @alpha.setter
    def alpha(self, value: float | Tensor) -> None:
        if not isinstance(value, Tensor) or value.dim() == 0:
            self.config.alpha = self.rule.check_alpha(value.item() if isinstance(value, Tensor) else value)
            self._row_alpha = None
            return
        if value.dim() > 1 or not value.numel():
            raise ConfigError(f"alpha has shape {tuple(value.shape)}; expected a number or one value per row")
        for number in value.tolist():
            self.rule.check_alpha(number)
        self._row_alpha = value

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
        """Where inputs are expected and combined logits are made: the anchor's device."""
        forwards = [forward for group in self.groups for forward in group]
        return next((forward.device for forward in forwards if self.rule.anchor in forward.roles), forwards[0].device)

    @property
    def dtype(self) -> torch.dtype:
        """The anchor's dtype; combined logits are float32 whatever it is."""
        dtype: torch.dtype = self.anchor.dtype
        return dtype

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
        _refuse(unused)
        if input_ids is None:
            raise InputError("an ensemble's forward needs input_ids; its members embed tokens by themselves")
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache()
        step = Step(input_ids, attention_mask, position_ids, logits_to_keep if labels is None else 0)
        with self._advancing(past_key_values) as marks:
            if self.world is None:
                logits = self._own_logits(step, past_key_values)
                combined = self.combine(logits)
                if self._watch is not None:
                    self._watch.note(logits, combined, past_key_values, marks)
            else:
                run = partial(self._own_logits, step, past_key_values)
                combined = combine_over_ranks(
                    self.world, run, step, self.combination, self.contract, self.alpha_of_rows(input_ids.shape[0])
                )
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                combined[:, :-1].flatten(0, 1), labels[:, 1:].to(combined.device).flatten(), ignore_index=-100
            )
        output = CausalLMOutputWithPast(loss=loss, logits=combined, past_key_values=past_key_values)
        return output if return_dict is not False else output.to_tuple()

    def member_logits(self, step: Step, cache: EnsembleCache | None = None) -> dict[str, Tensor]:
        """Return every member's own logits (rows, kept positions, V_member) by role; all caches advance, or none."""
        with self._advancing(cache):
            if self.world is None:
                return self._own_logits(step, cache)
            return gather_over_ranks(self.world, partial(self._own_logits, step, cache), step, self.contract)

    @contextmanager
    def _advancing(self, cache: EnsembleCache | None) -> Iterator[dict[Roles, int | Tensor] | None]:
        """All caches advance inside, or none: where it fails they are as they were before, at the marks yielded."""
        if cache is None:
            yield None
            return
        self._check_cache(cache)
        marks = cache.marks()
        try:
            yield marks
        except BaseException:
            cache.restore(marks)
            raise

    def _own_logits(self, step: Step, cache: EnsembleCache | None) -> dict[str, Tensor]:
        """The logits of this process's members."""
        if self._compiled is not None:
            self._compiled.begin_step()
        logits = self.runner.run(self.groups, step, None if cache is None else cache.parts)
        if self._watch is None:
            check_nan(logits)
        return logits

    def _sample(self, input_ids: Tensor, *, stopping_criteria: StoppingCriteriaList, **others: Any) -> Any:
        """Decode greedily or by sampling, as `transformers` does; NaN of members is looked at with the tokens.

        Ranks tell each other about failures at every step, and `mps` goes on for a step behind the end: both look at
        once.
        """
        if self.world is not None or self.device.type == "mps":
            return super()._sample(input_ids, stopping_criteria=stopping_criteria, **others)
        before, self._watch = self._watch, NanWatch()
        try:
            watched = StoppingCriteriaList([*stopping_criteria, self._watch])
            output = super()._sample(input_ids, stopping_criteria=watched, **others)
            self._watch.check()
        finally:
            self._watch = before
        return output

    def combine(self, logits: Mapping[str, Tensor], alpha: float | Tensor | None = None) -> Tensor:
        """Return the combination of member logits (rows, positions, V_member) by the rule, (rows, positions, V) fp32.

        `alpha` defaults to the ensemble's; one value per row is repeated for beams and for several returned sequences.
        """
        device = self.device  # looked up once: it walks through the modules
        ordered = [logits[role].to(device) for role in self.rule.roles]
        return combine(
            ordered, weights_for(self.combination, self.alpha_of_rows(ordered[0].shape[0], alpha), ordered[0])
        )

    def alpha_of_rows(self, num_rows: int, alpha: float | Tensor | None = None) -> float | Tensor:
        """`alpha`, or the ensemble's, as a number or one value for each of `num_rows` rows."""
        alpha = self.alpha if alpha is None else alpha
        return _spread(alpha, num_rows) if isinstance(alpha, Tensor) else alpha

    @property
    def groups(self) -> list[Group]:
        """The forwards of a step; planned anew when something was replaced in `members` (by a compiled one, say)."""
        models = list(self.members.values())
        known = self._planned[0]
        if len(known) != len(models) or any(one is not other for one, other in zip(known, models, strict=True)):
            planned = plan_forwards(dict(self.members.items()), self._backbones, self.contract)
            compiled = self._compiled
            self._planned = models, planned if compiled is None else compiled.plan(planned, self._backbones)
        return self._planned[1]

    def compile_members(self, backend: Backend = "inductor") -> None:
        """Let greedy decoding and sampling run each member's steps as a graph of its own, on a static cache.

        Compiling happens at the second token of a text, once for each number of rows and each power of two of its
        length. `backend`: of torch.compile. What a call returns under `past_key_values` the next one overwrites.
        Raises ConfigError where there is no C++ compiler.
        """
        self._compiled = CompiledMembers(backend)
        self._planned = ([], [])
        self.runner = SerialRunner()  # CUDA graphs belong to a thread; launching one takes next to no time

    def new_cache(self) -> EnsembleCache:
        """Return an empty growing cache for the members."""
        return EnsembleCache.dynamic({forward.roles: forward.model for group in self.groups for forward in group})

    def decoding_cache(self, num_rows: int, num_positions: int) -> EnsembleCache:
        """Return an empty cache for texts of at most `num_positions`: static where members are compiled."""
        if self._compiled is None:
            return self.new_cache()
        return self._compiled.cache(self.groups, num_rows, num_positions)

    def _check_cache(self, cache: object) -> None:
        if not isinstance(cache, EnsembleCache):
            raise InputError(f"past_key_values is a {type(cache).__name__}; an ensemble takes an EnsembleCache")
        expected = {forward.roles for group in self.groups for forward in group}
        if cache.parts.keys() != expected:
            found, wanted = (", ".join("+".join(roles) for roles in sorted(parts)) for parts in (cache.parts, expected))
            raise InputError(f"the cache is for {found}; the members run as {wanted}: make one with new_cache()")

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Let every member prepare the cache it would prepare alone (dynamic, static, quantised) and join them."""
        given = model_kwargs.get("past_key_values")
        if given is not None:
            self._check_cache(given)
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        if generation_config.use_cache is False:
            return
        one_by_one = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        if self._compiled is not None and generation_config.cache_implementation is None and one_by_one:
            num_rows = batch_size * generation_config.num_return_sequences
            model_kwargs["past_key_values"] = self.decoding_cache(num_rows, max_cache_length)
            return
        caches: dict[tuple[str, ...], Cache] = {}
        for forward in (forward for group in self.groups for forward in group):
            model: Any = forward.model
            own = {**model_kwargs, "past_key_values": None}
            model._prepare_cache_for_generation(
                generation_config, own, generation_mode, batch_size * len(forward.roles), max_cache_length
            )
            if own["past_key_values"] is None:
                kind = type(model).__name__
                roles = " and ".join(forward.roles)
                raise InputError(f"{roles} ({kind}) keeps no key-value cache; call generate with use_cache=False")
            caches[forward.roles] = own["past_key_values"]
        model_kwargs["past_key_values"] = EnsembleCache(caches)


def make_combination(
    rule: Rule, contract: VocabularyContract, outside: str, roles: Sequence[str] | None = None
) -> Combination:
    """Return the numbers of a rule for `ensembler_kernels`, with members in the order of `roles` (None: the rule's)."""
    roles = rule.roles if roles is None else roles
    return Combination(
        constant=tuple(rule.constant.get(role, 0.0) for role in roles),
        slope=tuple(rule.slope.get(role, 0.0) for role in roles),
        shared=contract.shared,
        neutral=outside == "neutral",
        raw=tuple(role in rule.raw_roles for role in roles),
        cutoff=rule.cutoff,
        anchor=roles.index(rule.anchor),
    )


def weights_for(how: Combination, alpha: float | Tensor, logits: Tensor) -> Weights:
    """Return the weights for `logits` (rows, V) or (rows, positions, V) at `alpha`, a number or one for each row."""
    if not isinstance(alpha, Tensor):
        return _weights_of_number(how, float(alpha), logits.device)
    if alpha.dim() and logits.dim() == 3:
        alpha = alpha.repeat_interleave(logits.shape[1])
    return Weights.of((how, alpha), device=logits.device)


@lru_cache(maxsize=64)
def _weights_of_number(how: Combination, alpha: float, device: torch.device) -> Weights:
    """The same at every step of a text."""
    with torch.inference_mode(mode=False):  # kept for calls that differentiate, too
        return Weights.of((how, alpha), device=device)


_LEFT_BY_GENERATE = {"tokenizer", "assistant_tokenizer"}  # generate hands its own arguments on to forward
_OPTIONS_OF_AUTO = {"_from_auto", "_commit_hash", "adapter_kwargs", "low_cpu_mem_usage", *folders.HUB_OPTIONS}


def _named(member: object) -> Any:
    """What config.json holds for a member that was given as a path, a MemberConfig, a mapping or a model."""
    if isinstance(member, PreTrainedModel):
        return MemberConfig(folders.IN_MEMORY)
    if isinstance(member, nn.Module):
        kind = type(member).__name__
        raise ConfigError(f"a member is a {kind}; expected a PreTrainedModel (of a PeftModel: merge_and_unload())")
    return str(member) if isinstance(member, Path) else member


def _spread(alpha: Tensor, num_rows: int) -> Tensor:
    """One α per row of the batch; beams and returned sequences of a row stand next to each other."""
    repeats, rest = divmod(num_rows, alpha.shape[0])
    if rest:
        raise InputError(f"alpha has {alpha.shape[0]} values for {num_rows} rows; expected one per row of the batch")
    return alpha.repeat_interleave(repeats)


def _refuse(unused: Mapping[str, Any]) -> None:
    """Raise for arguments that an ensemble cannot honour; None and False ask for nothing."""
    for name, value in unused.items():
        if value is not None and value is not False and name not in _LEFT_BY_GENERATE:
            raise InputError(f"an ensemble's forward takes no {name!r}; its members differ in hidden size and layers")


AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM, exist_ok=True)
