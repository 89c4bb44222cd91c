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
from helpers.adapter_cases import save_adapter, save_base
from helpers.tiny import make_model, random_ids, tables
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.decoding.decoder import Decoder
from ensembler.engine.grid import make_grid
from ensembler.errors import LogitsError

ROLES = ("source_ft", "source_pt", "target_pt")
IDS = random_ids(2, 9)
PADDED = torch.ones_like(IDS).index_fill(1, torch.tensor([0]), 0)
OPTIONS: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 3, "do_sample": False}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.2}
_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
_KERNELS_OF_CPUS = ("torch_blocks.py", "torch_gumbel.py")  # they look at the memory that they work on
_OF_HOSTS = {  # functions whose own reads no GPU makes, or waits for
    ("checks.py", "_check_range"),  # numbers are checked where nobody waits for them
    ("weights.py", "replace_table"),
    ("member_set.py", "_on_rows"),  # positions are on the host, whatever the members are on
    ("member_set.py", "_run_static"),
    ("row_cache.py", "of"),
}


def of_the_host() -> bool:
    """Whether a read would not be there, or would not wait, on a GPU (sm_80 and later)."""
    frame, callers = sys._getframe(2), []
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts:
            callers.append((path.name, frame.f_code.co_name))
        frame = frame.f_back
    return callers[0] in _OF_HOSTS or any(file in _KERNELS_OF_CPUS for file, _ in callers)


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for a device: values of tensors that are asked for from Python ..."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _READS and isinstance(args[0], Tensor) and not of_the_host():
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """... and from within torch (an index, a condition)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default and not of_the_host()
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
    "padded": {"attention_mask": PADDED},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 0},
    "processed": SAMPLING,
    "compiled": {"compiled": True, "attention_mask": PADDED, **SAMPLING},
    "streamed": {"streamer": Silent()},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["trio", "backbone"])
def test_the_host_waits_once_per_token(tmp_path: Path, kind: str, case: str) -> None:
    """For the tokens, and with them whether there was NaN and whether all texts have ended."""
    model = trio() if kind == "trio" else on_a_backbone(tmp_path)
    options = {**OPTIONS, **CASES[case]}
    if options.pop("compiled", False):
        model.compile_members("eager")
    rows = 1 if case == "streamed" else 2
    reads, scalars = waits(lambda count: model.generate(IDS[:rows], max_new_tokens=count, **options))
    assert reads == {"tolist": 3}
    assert scalars == 0


@pytest.mark.parametrize("kind", ["trio", "backbone"])
def test_in_the_loop_of_transformers_it_waits_once_too(tmp_path: Path, kind: str) -> None:
    """For whether all texts have ended: `bool(unfinished.max() == 0)`; and for NaN."""
    model = trio() if kind == "trio" else on_a_backbone(tmp_path)
    options = {**OPTIONS, "cache_implementation": "static"}
    reads, _ = waits(lambda count: model.generate(IDS, max_new_tokens=count, **options))
    assert reads == {"__bool__": 3 * 2}


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_points_of_a_grid_wait_together(sampling: dict[str, Any]) -> None:
    model, points = trio(), make_grid(["base-change", "eft"], [0.0, 0.5, 1.0])

    def run(count: int) -> None:
        options = {**OPTIONS, **sampling, "max_new_tokens": count}
        model.generate(IDS, **options, custom_generate=Decoder("none", points=points, seed=1))

    reads, _ = waits(run)
    assert reads == {"tolist": 3}


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_a_round_waits_once_for_each_draft_and_once_for_what_is_chosen(sampling: dict[str, Any]) -> None:
    """However many positions it has."""
    members = trio("llama", "qwen2", "gpt2").members
    model = EnsembleForCausalLM.from_members(alpha=0.0, members=members)
    rounds: list[int] = []

    def run(count: int) -> None:
        decoder = Decoder("source_ft", num_positions=4, is_fixed=True, seed=1)
        options = {**OPTIONS, **sampling, "max_new_tokens": count}
        model.generate(IDS[:1], **options, custom_generate=decoder)
        rounds.append(decoder.stats.num_rounds)

    reads, _ = waits(lambda count: run(1 + 4 * (count - 5)))  # the prompt's token, and rounds of four: all are accepted
    assert rounds[0] == 1
    assert rounds[-1] == 4
    assert reads == {"tolist": 3 * (3 + 1)}


def test_drafts_by_look_up_cost_no_wait() -> None:
    model = trio()
    rounds: list[int] = []

    def run(count: int) -> None:
        decoder = Decoder("ngram", num_positions=4, is_fixed=True)
        model.generate(IDS[:1].repeat(1, 3), **OPTIONS, max_new_tokens=count, custom_generate=decoder)
        rounds.append(decoder.stats.num_rounds + decoder.stats.num_plain_steps)

    reads, _ = waits(run, num_tokens=20)
    assert reads == Counter({"tolist": rounds[-1] - rounds[0]})


# -- NaN that is looked at with the token -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.7, "top_p": 0.5}, {"num_beams": 2}])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("at", [0, 1, 4, 6])
def test_nan_while_decoding_names_the_member_and_undoes_the_call(role: str, at: int, options: dict[str, Any]) -> None:
    """In the prefill, at the next token, in the middle, and in the last step, behind which nothing is run."""
    members = dict(zip(ROLES, tables(3), strict=True))
    model = EnsembleForCausalLM.from_members(rule="eft", alpha=0.5, members=members)
    num_forwards = 0

    def run(**more: Any) -> Any:
        torch.manual_seed(1)
        settings = {**OPTIONS, **options, "attention_mask": torch.ones(2, 9), "max_new_tokens": 7, **more}
        return model.generate(IDS, **settings)

    def fail(module: Any, *_: Any) -> None:
        nonlocal num_forwards
        if num_forwards == at:
            module.fault = math.nan
        num_forwards += 1

    expected = run().tolist()
    cache = {}
    if "num_beams" not in options:
        begun = run(max_new_tokens=1, return_dict_in_generate=True).past_key_values
        cache = {"past_key_values": begun}
    handle = members[role].register_forward_pre_hook(fail)
    with pytest.raises(LogitsError, match=f"^{role} computed NaN logits in torch.float32; try another dtype"):
        run(**cache)
    handle.remove()
    assert num_forwards == at + 1  # nothing was decoded behind it
    if cache:
        assert begun.lengths[:2] == [8] * 2  # as before the call; of a prompt the last token is read again
        assert all(not layer.keys[:, :2, :, 8:].any() for part in begun.caches.values() for layer in part.layers)
    assert run(**cache).tolist() == expected


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


def test_nan_in_compiled_members() -> None:
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


def test_samples_of_a_prompt_read_it_once() -> None:
    model = trio()
    seen = head_rows(model.members["target_pt"])
    model.generate(IDS, max_new_tokens=3, num_return_sequences=5, **{**OPTIONS, **SAMPLING})
    assert seen[0] == (2, 1)
    assert len(seen) == 3
    assert all(rows <= 10 for rows, _ in seen)


def test_a_shared_backbone_has_one_head_for_both(tmp_path: Path) -> None:
    model = on_a_backbone(tmp_path)
    seen = head_rows(model.members["source_pt"])
    model.generate(IDS, max_new_tokens=4, attention_mask=PADDED, **OPTIONS)
    assert seen == [(4, 1)] * 4


def test_one_mask_for_all_members() -> None:
    """Of those that see alike: it is made once for each step."""
    model = trio("llama", "qwen2", "gpt2")
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs["attention_mask"]
        seen.append(mask["full_attention"] if isinstance(mask, dict) else mask)

    for member in model.members.values():
        member.register_forward_pre_hook(note, with_kwargs=True)
    model.generate(IDS, max_new_tokens=3, attention_mask=PADDED, **OPTIONS)
    assert len(seen) == 3 * 3
    for step in range(3):
        first, *others = seen[3 * step : 3 * step + 3]
        assert all(other is first for other in others)


class Counting(LogitsProcessor):  # type: ignore[misc]
    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.shapes.append(tuple(scores.shape))
        return scores


def test_processors_are_applied_once_to_the_combination() -> None:
    model, counting = trio(), Counting()
    model.generate(IDS, max_new_tokens=5, logits_processor=LogitsProcessorList([counting]), **OPTIONS)
    assert counting.shapes == [(2, 64)] * 5


def test_processors_are_applied_once_to_samples_that_agree() -> None:
    """Three samples of each prompt are on one row until they differ."""
    model, counting = trio(), Counting()
    options = {**OPTIONS, "do_sample": True, "num_return_sequences": 3, "max_new_tokens": 2}
    processors = LogitsProcessorList([counting])
    model.generate(IDS, logits_processor=processors, custom_generate=Decoder("none"), **options)
    assert sum(rows for rows, _ in counting.shapes[:1]) == 2
