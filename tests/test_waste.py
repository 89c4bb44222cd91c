"""What a token must not cost: waits of the host, heads over prompt positions, masks and processors for each member."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import save_adapter, save_base
from tiny import make_model, random_ids, tables
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.decoding.speculative import SpeculativeDecoder
from ensembler.errors import LogitsError

ROLES = ("source_ft", "source_pt", "target_pt")
IDS = random_ids(2, 9)
PADDED = torch.ones_like(IDS).index_fill(1, torch.tensor([0]), 0)
OPTIONS: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 3, "do_sample": False}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.2}
_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


def in_cpu_kernel() -> bool:
    """The kernel for CPUs looks at values of the memory that it works on; those for GPUs (sm_80 and later) do not."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        if frame.f_code.co_filename.endswith("torch_blocks.py"):
            return True
        frame = frame.f_back
    return False


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for a device: values of tensors that are asked for from Python ..."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _READS and isinstance(args[0], Tensor) and not in_cpu_kernel():
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """... and from within torch (an index, a condition)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default and not in_cpu_kernel()
        return function(*args, **(kwargs or {}))


def waits(run: Callable[[int], Any], num_tokens: int = 6) -> tuple[Counter[str], int]:
    """What three more tokens cost: reads by name, and scalars; both count the same `bool(tensor)` once."""
    found = []
    run(num_tokens)
    for count in (num_tokens, num_tokens + 3):
        with Reads() as reads:
            run(count)
        with Scalars() as scalars:
            run(count)
        found.append((reads.names, scalars.count))
    (few, few_scalars), (many, many_scalars) = found
    return many - few, many_scalars - few_scalars


def trio(*families: str) -> EnsembleForCausalLM:
    names = families or ("llama", "mistral", "qwen2")
    members = {role: make_model(name, i, num_layers=1) for i, (role, name) in enumerate(zip(ROLES, names, strict=True))}
    return EnsembleForCausalLM.from_members(alpha=0.7, members=members)


def on_a_backbone(tmp_path: Path) -> EnsembleForCausalLM:
    base = save_base(tmp_path / "base", num_layers=1)
    adapter = save_adapter(base, tmp_path / "adapter")
    members = {"source_ft": MemberConfig(str(base), adapter=str(adapter)), "source_pt": str(base)}
    return EnsembleForCausalLM.from_members(
        alpha=0.7, members={**members, "target_pt": make_model("qwen2", 3, num_layers=1)}
    )


class Silent(BaseStreamer):
    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": SAMPLING,
    "static": {"cache_implementation": "static"},
    "compiled": {"compiled": True, "attention_mask": PADDED, **SAMPLING},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["trio", "backbone"])
def test_the_host_waits_once_per_token(tmp_path: Path, kind: str, case: str) -> None:
    """For whether all texts have ended: `bool(unfinished.max() == 0)` in generate."""
    model = trio() if kind == "trio" else on_a_backbone(tmp_path)
    options = {**OPTIONS, **CASES[case]}
    if options.pop("compiled", False):
        model.compile_members("eager")
    reads, scalars = waits(lambda count: model.generate(IDS, max_new_tokens=count, **options))
    assert reads == {"__bool__": 3}
    assert scalars == 3


@pytest.mark.parametrize(("options", "on_cpus"), [({}, 0), (SAMPLING, 1)])
def test_a_plain_step_of_a_decoder_waits_for_nan_and_for_its_token(options: dict[str, Any], on_cpus: int) -> None:
    model = trio("llama", "qwen2", "gpt2")

    def run(count: int) -> None:
        decoder = SpeculativeDecoder("source_ft", num_positions=1, is_fixed=True, seed=1)
        model.generate(IDS, **{**OPTIONS, **options}, max_new_tokens=count, custom_generate=decoder)
        assert decoder.stats.num_plain_steps == count - 1

    reads, scalars = waits(run)
    # One read is of NaN, one of hits and ends at once; on CPUs alone sampling asks whether all drafted tokens stay.
    assert reads == Counter({"tolist": 2 * 3, "__bool__": 3 * on_cpus}) + Counter()
    assert scalars <= sum(reads.values())  # those are the same


def test_a_round_waits_once_for_nan_and_once_for_each_position_that_is_settled() -> None:
    model = EnsembleForCausalLM.from_members(alpha=0.0, members=trio("llama", "qwen2", "gpt2").members)
    rounds: list[int] = []

    def run(count: int) -> None:
        decoder = SpeculativeDecoder("source_ft", num_positions=4, is_fixed=True)
        model.generate(IDS[:1], **OPTIONS, max_new_tokens=count, custom_generate=decoder)
        rounds.append(decoder.stats.num_rounds)

    reads, _ = waits(lambda count: run(1 + 4 * (count - 5)))  # the prompt's token, and rounds of four: all are accepted
    assert rounds[:2] == [1, 1]
    assert rounds[-1] == 4
    assert reads == Counter({"tolist": 3 * (1 + 4)})


def test_a_streamer_reads_the_tokens_too() -> None:
    model = trio()
    reads, _ = waits(lambda count: model.generate(IDS[:1], max_new_tokens=count, streamer=Silent(), **OPTIONS))
    assert reads == {"__bool__": 3, "cpu": 3}


def test_what_models_of_transformers_read_by_themselves() -> None:
    """Not ours: with growing caches each model looks whether a mask is all ones, and GPT-2 for padding without one."""
    model = trio("llama", "qwen2", "opt")
    _, scalars = waits(lambda count: model.generate(IDS, max_new_tokens=count, attention_mask=PADDED, **OPTIONS))
    assert scalars == 3 * (1 + 3)
    model = trio("llama", "qwen2", "gpt2")
    _, scalars = waits(lambda count: model.generate(IDS, max_new_tokens=count, **OPTIONS))
    assert scalars == 3 * (1 + 1)


# -- NaN that is looked at with the token -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.7, "top_p": 0.5}, {"num_beams": 2}])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("at", [0, 1, 4, 6])
def test_nan_while_decoding_names_the_member_and_undoes_the_step(role: str, at: int, options: dict[str, Any]) -> None:
    """In the prefill, at the next token, in the middle, and in the last step, behind which nothing is run."""
    members = dict(zip(ROLES, tables(3), strict=True))
    model = EnsembleForCausalLM.from_members(rule="eft", alpha=0.5, members=members)
    cache = model.new_cache()
    num_forwards = 0

    def fail(module: Any, *_: Any) -> None:
        nonlocal num_forwards
        if num_forwards == at:
            module.fault = math.nan
        num_forwards += 1

    handle = members[role].register_forward_pre_hook(fail)
    ids = IDS.repeat_interleave(2, 0)[:2] if "num_beams" in options else IDS
    given = {} if "num_beams" in options else {"past_key_values": cache}
    with pytest.raises(LogitsError, match=f"^{role} computed NaN logits in torch.float32; try another dtype"):
        model.generate(ids, max_new_tokens=7, **{**OPTIONS, **options}, **given)
    handle.remove()
    assert num_forwards == at + 1  # nothing was decoded behind it
    if given:
        assert set(cache.lengths().values()) == {9 + at - 1 if at else 0}
        logits = model(IDS[:, :1], past_key_values=cache, use_cache=True).logits
        assert logits.isfinite().all()


def test_after_nan_a_forward_is_checked_at_once_again() -> None:
    members = dict(zip(ROLES, tables(3), strict=True))
    model = EnsembleForCausalLM.from_members(rule="eft", alpha=0.5, members=members)
    for _ in range(2):
        members["source_pt"].fault = math.nan
        with pytest.raises(LogitsError, match="source_pt"):
            model.generate(IDS, max_new_tokens=3, **OPTIONS)
        members["source_ft"].fault = math.nan
        with pytest.raises(LogitsError, match="source_ft"):
            model(IDS)


def test_nan_in_static_caches() -> None:
    model = trio("llama", "llama", "llama")
    model.compile_members("eager")
    expected = model.generate(IDS, max_new_tokens=4, **OPTIONS).tolist()
    weight = model.members["target_pt"].get_input_embeddings().weight
    with torch.no_grad():
        before = weight.clone()
        weight.fill_(math.nan)
    with pytest.raises(LogitsError, match="target_pt computed NaN"):
        model.generate(IDS, max_new_tokens=4, **OPTIONS)
    with torch.no_grad():
        weight.copy_(before)
    assert model.generate(IDS, max_new_tokens=4, **OPTIONS).tolist() == expected


# -- heads, masks, processors -----------------------------------------------------------------------------------------


def head_rows(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(rows, positions) of what goes through a head, filled as it runs."""
    seen: list[tuple[int, int]] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    return seen


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}, SAMPLING, {"num_beams": 2}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "opt", "gpt_neox"])
def test_no_head_over_prompt_positions(family: str, options: dict[str, Any]) -> None:
    model = trio(family, family, family)
    seen = {role: head_rows(member) for role, member in model.members.items()}
    model.generate(IDS, max_new_tokens=3, **{**OPTIONS, **options})
    rows = 2 * options.get("num_beams", 1)
    pieces = 3 if "prefill_chunk_size" in options else 1
    for shapes in seen.values():
        assert shapes == [(rows, 1)] * (pieces + 2)


def test_a_shared_backbone_has_one_head_and_one_mask_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2

    made: list[str] = []
    for module in (modeling_qwen2, modeling_llama):
        name, make = module.__name__.rpartition(".")[2], module.create_causal_mask
        counted = lambda *args, name=name, make=make, **kwargs: (made.append(name), make(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(module, "create_causal_mask", counted)
    model = on_a_backbone(tmp_path)
    seen = head_rows(model.members["source_pt"])
    model.generate(IDS, max_new_tokens=4, attention_mask=PADDED, **OPTIONS)
    assert seen == [(4, 1)] * 4
    assert Counter(made) == {"modeling_llama": 4, "modeling_qwen2": 4}


class Counting(LogitsProcessor):  # type: ignore[misc]
    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.shapes.append(tuple(scores.shape))
        return scores


def test_processors_are_applied_once_to_the_combination() -> None:
    model, counting = trio(), Counting()
    combined: list[Tensor] = []
    model.combine, combine = lambda logits: combined.append(combine(logits)) or combined[-1], model.combine
    model.generate(IDS, max_new_tokens=5, logits_processor=LogitsProcessorList([counting]), **OPTIONS)
    assert counting.shapes == [(2, 64)] * 5
    assert [tuple(logits.shape) for logits in combined] == [(2, 1, 64)] * 5
