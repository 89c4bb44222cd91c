"""Section `engine` of `gpu.py`: what a token takes with random members of real shapes, beside loops and the floor.

Members are random Llamas in bf16: 1B/1B/3B (the shapes of Llama 3.2), and 7B/7B with a LoRA/13B (of Llama 2). A token's
time is the difference of two lengths of `generate`, over their tokens: prompts and first calls fall out. The floor is
what a token has to read, weights once and the cache's keys and values, at the bandwidth of a large copy.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_options import Options, Row
from kernel_timing import CpuClock, CudaClock, Spread, interleaved, seconds_of
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package, where it is not installed

ROLES = ("source_ft", "source_pt", "target_pt")
ALPHA, ALPHAS = 0.5, tuple(round(0.1 * index, 1) for index in range(16))
_LLAMA_3 = {"vocab_size": 128_256, "intermediate_size": 8192, "num_key_value_heads": 8}
ONE_B = {**_LLAMA_3, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64}
THREE_B = {**_LLAMA_3, "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128}
SEVEN_B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
THIRTEEN_B = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
GOALS = {  # stated for an H100, batch 1
    ("1B/1B/3B", "graph", "times_floor"): 2.0,
    ("1B/1B/3B", "graph, compiled", "times_floor"): 1.5,
    ("1B/1B/3B", "graph", "times_loop"): 0.25,
    ("7B/7B-LoRA/13B", "graph", "times_floor"): 1.3,
}
RANK = 16


@dataclass
class Family:
    """An ensemble, and the target alone."""

    name: str
    ensemble: Any

    @property
    def target(self) -> Any:
        return self.ensemble.members["target_pt"]

    def bytes_of_token(self, rows: int, length: int) -> int:
        """Return the bytes that a token of `rows` texts of `length` reads: weights but embeddings, and the cache."""
        total = 0
        for runner in self.ensemble.member_set.runners:
            config = runner.model.config
            head = runner.model.get_input_embeddings().weight
            tied = config.tie_word_embeddings
            total += sum(weight.nbytes for weight in runner.model.parameters()) - (0 if tied else head.nbytes)
            of_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * head.element_size()
            total += rows * len(runner.roles) * length * of_token
        return total


def engine(options: Options) -> Iterator[Row]:
    """Time plain decoding, a long text, grids and drafting, family by family."""
    clock = CudaClock(options.device) if options.device.type == "cuda" else CpuClock()
    copy, moved = clock.copy_loop()
    clock.settle(copy)
    bandwidth = moved / clock.device(copy)
    for make in (_small_trio,) if options.small else (_one_b, _seven_b):
        if not options.has_time(f"engine: {make.__name__}"):
            continue
        family = make(options.device)
        for rows in (1, 2) if options.small else (1, 8, 32):
            if options.has_time(f"engine: {family.name}, {rows} rows"):
                yield from _plain(family, rows, 8, bandwidth, options)
        if make is not _seven_b and options.has_time(f"engine: {family.name}, a long text"):
            yield from _plain(family, 1, 40 if options.small else 4096, bandwidth, options)
        if make is not _seven_b and options.has_time(f"engine: {family.name}, grids"):
            yield from _grids(family, options)
        if make is not _seven_b and options.has_time(f"engine: {family.name}, compiled"):
            yield from _plain(family, 1, 8, bandwidth, options, compiled=True)
        del family
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    if options.has_time("engine: drafting"):
        yield from _drafting(options)


def _plain(
    family: Family, rows: int, length: int, bandwidth: float, options: Options, *, compiled: bool = False
) -> Iterator[Row]:
    """Milliseconds per token of `generate` in its ways, of the loop that people write, and of the target alone."""
    model = family.ensemble
    ids = torch.randint(5, 90, (rows, length), device=options.device)
    graphs = model.member_set.graphs

    def generate(**options_of: Any) -> Callable[[int], object]:
        def run(num: int) -> None:
            model.member_set.graphs = options_of.get("graphs")
            model.generate(ids, max_new_tokens=num, do_sample=False)
            model.member_set.graphs = graphs

        return run

    ways: dict[str, Callable[[int], object]] = {"eager": generate(), "loop": lambda num: _loop(model, ids, num)}
    ways["target alone"] = lambda num: family.target.generate(ids, max_new_tokens=num, do_sample=False)
    if graphs is not None:
        ways["graph"] = generate(graphs=graphs)
    if compiled:
        model.compile_members()
        ways = {"graph, compiled" if graphs is not None else "compiled": generate(graphs=graphs)}
    times = per_token(ways, options)
    floor = family.bytes_of_token(rows, length) / bandwidth
    case = f"{family.name}, {rows} rows, {length} tokens"
    for way, spread in times.items():
        numbers = {"times_floor": spread.median / floor}
        if "loop" in times:
            numbers["times_loop"] = spread.median / times["loop"].median
            numbers["times_target"] = spread.median / times["target alone"].median
        fields = {"way": way, "rows": rows, "length": length, "ms": milliseconds(spread), "floor_ms": 1e3 * floor}
        goals = {name: GOALS.get((family.name, way, name)) for name in numbers} if rows == 1 and length == 8 else {}
        met = {name: goal for name, goal in goals.items() if goal is not None and not options.small}
        cell = f"{1e3 * spread.median:.2f} ms, {numbers['times_floor']:.2f} x"
        cell += "".join(
            f", goal {name} {goal} {'met' if numbers[name] <= goal else 'missed'}" for name, goal in met.items()
        )
        yield Row(case, {**fields, **numbers, "goals": met}, {way: cell})


def _grids(family: Family, options: Options) -> Iterator[Row]:
    """16 α over one: generation, the log-probs of choices, and those of texts."""
    from ensembler.decoding.decoder import Decoder
    from ensembler.engine.grid import make_grid
    from ensembler.evaluation.backends import TransformersBackend
    from ensembler.evaluation.request_batches import make_batches
    from ensembler.evaluation.requests import ScoringRequest

    model, small = family.ensemble, options.small
    ids = torch.randint(5, 90, (2 if small else 8, 8), device=options.device)
    one, many = (make_grid(["base-change"], alphas) for alphas in ((ALPHA,), ALPHAS))

    def decode(points: Sequence[Any]) -> Callable[[int], object]:
        def run(num: int) -> None:
            model.generate(ids, max_new_tokens=num, do_sample=False, custom_generate=Decoder("none", points=points))

        return run

    times = per_token({"1": decode(one), "16": decode(many)}, options)
    yield _ratio(family, "generation", times, 2.5, small)
    num, length = (2, 20) if small else (32, 512)
    choices = [
        ScoringRequest(i, tuple(range(5, 5 + length // 4)), ((7, 8), (9, 8), (6,), (5, 6, 7)), "") for i in range(num)
    ]
    texts = [
        ScoringRequest(i, (5,), (tuple(range(6, 6 + length)) if not small else (6, 7, 8),), "") for i in range(num)
    ]
    for name, requests in (("log-probs of choices", choices), ("log-probs of texts", texts)):
        batches = make_batches(requests, 8, share_contexts=True)

        def score(points: Sequence[Any], batches: Sequence[Any] = batches) -> Callable[[], float]:
            return lambda: seconds_of(lambda: list(TransformersBackend(model).score(batches, points)))

        yield _ratio(family, name, interleaved({"1": score(one), "16": score(many)}, 2 if small else 5), 1.1, small)


def _ratio(family: Family, name: str, times: Mapping[str, Spread], goal: float, small: bool) -> Row:
    ratio = times["16"].median / times["1"].median
    fields = {"of": name, "ratio": ratio, "one": milliseconds(times["1"]), "sixteen": milliseconds(times["16"])}
    said = "" if small else f", goal {goal} {'met' if ratio <= goal else 'missed'}"
    return Row(
        f"{family.name}, 16 alphas over one", {**fields, "goal": None if small else goal}, {name: f"{ratio:.2f}{said}"}
    )


def _drafting(options: Options) -> Iterator[Row]:
    """A source pair that drafts for a target of five times its layers, whose distribution is near the source's."""
    from ensembler.decoding.decoder import Decoder

    config = SMALL if options.small else {**ONE_B, "num_hidden_layers": 8}
    members = _deepened(config, 5, options.device)
    family = Family("drafting", _ensemble(members))
    ids = torch.randint(5, 90, (1, 8), device=options.device)
    for name, settings in {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 0.8}}.items():
        decoder = Decoder("source_ft", num_positions=4, seed=1)

        def run(num: int, draft: Any = None, settings: Mapping[str, Any] = settings) -> None:
            torch.manual_seed(1)
            family.ensemble.generate(ids, max_new_tokens=num, custom_generate=draft, top_k=0, **settings)

        ways: dict[str, Callable[[int], object]] = {
            "drafted": lambda num, run=run, decoder=decoder: run(num, decoder),
            "plain": run,
            "target alone": lambda num, settings=settings: family.target.generate(
                ids, max_new_tokens=num, top_k=0, **settings
            ),
        }
        times = per_token(ways, options, longer=4)
        row = decoder.stats.to_row()
        over = {way: times["drafted"].median / times[way].median for way in ("plain", "target alone")}
        fields = {"acceptance": row["acceptance"], "tokens_per_round": row["tokens_per_round"], "over": over}
        fields |= {way.replace(" ", "_"): milliseconds(spread) for way, spread in times.items()}
        cells = {f"over {way}": f"{value:.2f}" for way, value in over.items()} | {"acceptance": str(row["acceptance"])}
        yield Row(f"drafted, target of 5 x the layers, {name}", fields, cells)


def per_token(ways: Mapping[str, Callable[[int], object]], options: Options, longer: int = 1) -> dict[str, Spread]:
    """Seconds per token of each way by turns: the difference of a long and a short text."""
    short, long = (2, 2 + 4 * longer) if options.small else (8, 8 + 32 * longer)

    def timed(way: Callable[[int], object]) -> Callable[[], float]:
        def measure() -> float:
            return max(_seconds(way, long, options) - _seconds(way, short, options), 1e-9) / (long - short)

        return measure

    for way in ways.values():
        way(long)  # captures, compiles and loads
    return interleaved({name: timed(way) for name, way in ways.items()}, 2 if options.small else 5)


def _seconds(way: Callable[[int], object], num: int, options: Options) -> float:
    def run() -> None:
        way(num)
        if options.device.type == "cuda":
            torch.cuda.synchronize()

    return seconds_of(run)


def milliseconds(spread: Spread) -> list[float]:
    return [round(1e3 * seconds, 4) for seconds in (spread.lower, spread.median, spread.upper)]


@torch.inference_mode()
def _loop(model: Any, ids: Tensor, num: int) -> None:
    """Decode as people write it: three models with their own caches, the combination in torch, argmax."""
    from transformers import DynamicCache

    members = [model.members[role] for role in ("source_ft", "target_pt", "source_pt")]
    caches, new = [DynamicCache(config=member.config) for member in members], ids
    for _ in range(num):
        ft, target, pt = (
            member(new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
            for member, cache in zip(members, caches, strict=True)
        )
        scores = ft.log_softmax(-1) + ALPHA * (target.log_softmax(-1) - pt.log_softmax(-1))
        new = scores.argmax(-1, keepdim=True)


# -- members ----------------------------------------------------------------------------------------------------------


def _small_trio(device: torch.device) -> Family:
    return Family("small", _ensemble({role: llama(SMALL, seed, device) for seed, role in enumerate(ROLES)}))


def _one_b(device: torch.device) -> Family:
    shapes = dict(zip(ROLES, (ONE_B, ONE_B, THREE_B), strict=True))
    members = {role: llama(shape, seed, device) for seed, (role, shape) in enumerate(shapes.items())}
    return Family("1B/1B/3B", _ensemble(members))


def _seven_b(device: torch.device) -> Family:
    """The source pair on one backbone, with a LoRA on the attention's projections."""
    from safetensors.torch import save_file

    from ensembler.adapters import CheckedAdapter
    from ensembler.engine.backbone import Backbone
    from ensembler.patch.formats import read_patch

    base, target = llama(SEVEN_B, 0, device), llama(THIRTEEN_B, 1, device)
    names = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in ("q_proj", "v_proj")]
    tensors = {}
    for name in names:
        out, into = base.get_submodule(name).weight.shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, into) / into**0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, RANK) / RANK**0.5
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
        (Path(folder) / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK})
        )
        patch = read_patch(Path(folder))
        adapter = CheckedAdapter(Path(folder), "LORA", sum(map(torch.numel, tensors.values())), patch)
        backbone = Backbone(base, {"source_ft": adapter, "source_pt": None})
    return Family("7B/7B-LoRA/13B", _ensemble({**backbone.views, "target_pt": target}, [backbone]))


def _deepened(config: Mapping[str, Any], factor: int, device: torch.device) -> dict[str, Any]:
    """Two equal sources, and a target of `factor` times their layers: those that are inserted add nothing.

    Its head is a little off, so that drafts are not always right.
    """
    source = llama(config, 0, device)
    target = llama({**config, "num_hidden_layers": factor * config["num_hidden_layers"]}, 1, device)
    with torch.no_grad():
        for index, layer in enumerate(target.model.layers):
            layer.load_state_dict(source.model.layers[index // factor].state_dict())
            if index % factor:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        target.model.embed_tokens.load_state_dict(source.model.embed_tokens.state_dict())
        head = source.lm_head.weight
        target.lm_head.weight.copy_(head + 0.3 * head.std() * torch.randn_like(head))
    other = llama(config, 0, device)
    return {"source_ft": source, "source_pt": other, "target_pt": target}


def llama(shape: Mapping[str, Any], seed: int, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = {"max_position_embeddings": 8192, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode(mode=False), torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(
                LlamaConfig(**{"num_key_value_heads": shape["num_attention_heads"], **shape, **settings})
            ).eval()
        finally:
            torch.set_default_dtype(before)


def _ensemble(members: Mapping[str, Any], backbones: Sequence[Any] = ()) -> Any:
    from ensembler import EnsembleForCausalLM

    model = EnsembleForCausalLM.from_members(alpha=ALPHA, members=dict(members))
    if backbones:  # as a folder with an adapter is loaded
        model = EnsembleForCausalLM(model.config, dict(members), model.contract, backbones)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model
