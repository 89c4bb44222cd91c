"""Several processes on loopback: they decode what one process decodes, and stop together when one of them fails."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import SaveMember
from helpers.rank_cases import IDS, OPTIONS, ROLES, run_ranks, spread
from helpers.tiny import TableModel, make_model, make_tokenizer, random_ids
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import PreTrainedModel

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.config import EnsembleConfig
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import complete_grid, complete_prompts
from ensembler.engine.distributed import RankedMembers, World
from ensembler.engine.grid import GridPoint
from ensembler.engine.model_runner import Step

POINTS = [GridPoint(rule, alpha) for rule in ("base-change", "eft") for alpha in (0.0, 0.5, 1.0, 1.4)]


def digests() -> list[int]:
    """A list that grows by one checksum of the combined logits with each forward of this process from now on."""
    seen: list[int] = []
    combined = RankedMembers.combined

    def noting(self: RankedMembers, *inputs: Any) -> Any:
        logits = combined(self, *inputs)
        seen.append(zlib.crc32(logits.numpy().tobytes()))
        return logits

    RankedMembers.combined = noting  # type: ignore[method-assign]  # the process ends with its test
    return seen


MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": 11},
    "sequences": {"do_sample": True, "num_return_sequences": 2, "seed": 4},
    "beams": {"num_beams": 3, "do_sample": False},
    "padding": {"attention_mask": MASK},
    "processors": {"no_repeat_ngram_size": 1, "repetition_penalty": 1.4, "do_sample": True, "seed": 5},
    "static": {"cache_implementation": "static", "max_new_tokens": 5},
    "uncached": {"use_cache": False},
}


def decode_all(model: EnsembleForCausalLM) -> dict[str, list[list[int]]]:
    texts = {}
    for name, options in DECODING.items():
        seed = options.get("seed")
        if seed is not None:
            torch.manual_seed(seed)
        more = {key: value for key, value in options.items() if key != "seed"}
        texts[name] = model.generate(IDS, **{**OPTIONS, **more}).tolist()
    return texts


def decode_prompts(model: EnsembleForCausalLM, draft: str = "auto") -> dict[str, list[list[int]]]:
    """The texts of prompts that take each other's places, plain and at the points of a grid, greedy and sampled."""
    tokenizer = make_tokenizer()
    prompts = [EncodedPrompt(i, random_ids(1, 1 + 3 * i % 8, seed=i)[0].tolist()) for i in range(9)]
    texts = {}
    for temperature in (0.0, 0.9):
        options = DecodingOptions(max_new_tokens=9, temperature=temperature, seed=3, draft=draft)
        for one in complete_prompts(model, tokenizer, prompts, options, batch_size=4):
            texts[f"plain {temperature} {one.number}"] = [sample.ids for sample in one.samples]
        for at in complete_grid(model, tokenizer, prompts, POINTS, options, batch_size=4):
            texts[f"grid {temperature} {at.number}"] = [sample.ids for one in at.samples.values() for sample in one]
    return texts


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("rule", ["base-change", "eft"])
def test_ranks_decode_what_one_process_decodes(trio: dict[str, PreTrainedModel], size: int, rule: str) -> None:
    """Tokens of every way to decode; logits to 1e-5; and the same bits on every rank at every step."""
    whole = EnsembleForCausalLM.from_members(rule=rule, alpha=0.7, members=trio)
    expected = decode_all(whole)
    with torch.no_grad():
        logits = whole(IDS, attention_mask=MASK).logits

    def task(world: World) -> Any:
        model = spread(world, trio, whole)
        seen = digests()
        texts = decode_all(model)
        with torch.no_grad():
            own = model(IDS, attention_mask=MASK).logits
        return texts, own, seen, sorted(model.members)

    results = run_ranks(size, task)
    for texts, own, seen, _ in results:
        assert texts == expected
        assert_close(own, logits, atol=1e-5, rtol=0)
        assert len(seen) > 40
        assert seen == results[0][2]
    assert sorted(role for _, _, _, roles in results for role in roles) == sorted(ROLES)


@pytest.mark.parametrize("size", [2, 3])
def test_prompts_over_ranks(trio: dict[str, PreTrainedModel], size: int) -> None:
    """One process drafts and several do not: the same texts."""
    whole = EnsembleForCausalLM.from_members(alpha=0.7, members=trio)
    expected = decode_prompts(whole)
    assert decode_prompts(whole, "source_pt") == expected
    assert len(expected) == 4 * 9
    assert expected["plain 0.9 3"] != expected["plain 0.0 3"]
    assert len({tuple(ids) for ids in expected["grid 0.9 3"]}) > 1
    assert run_ranks(size, lambda world: decode_prompts(spread(world, trio, whole))) == [expected] * size


def test_what_a_sum_cannot_say_is_gathered(trio: dict[str, PreTrainedModel]) -> None:
    """A cut-off, ratios over the shared ids, −inf in a member, α per row: bit for bit as one process."""
    wide = {**trio, "target_pt": make_model("llama", 8, vocab_size=72)}
    tables = torch.randn(4, 64, 64)
    tables[1:][torch.rand(3, 64, 64) < 0.2] = -torch.inf
    forbidding = {role: TableModel(table) for role, table in zip(ROLES, tables[1:], strict=True)}
    cases = {
        "cutoff": ({"rule": "contrastive", "alpha": 0.5}, {"expert": trio["source_ft"], "amateur": trio["source_pt"]}),
        "neutral": ({"rule": "eft", "alpha": 1.3, "outside": "neutral"}, wide),
        "masked": ({"rule": "eft", "alpha": 1.3}, wide),
        "forbidding": ({"rule": "base-change", "alpha": 0.8}, forbidding),
        "rows": ({"rule": "base-change", "alpha": 0.8}, trio),
        "anchor": ({"rule": "base-change", "alpha": 0.0}, trio),
    }
    wholes = {name: EnsembleForCausalLM.from_members(members=members, **how) for name, (how, members) in cases.items()}
    per_row = torch.tensor([0.0, 0.4, 1.7])
    wholes["rows"].alpha = per_row
    with torch.no_grad():
        expected = {name: whole(IDS).logits for name, whole in wholes.items()}

    def task(world: World) -> Any:
        found = {}
        for name, whole in wholes.items():
            model = spread(world, cases[name][1], whole)
            if name == "rows":
                model.alpha = per_row
            with torch.no_grad():
                found[name] = model(IDS).logits
        with torch.no_grad():
            return found, spread(world, trio, wholes["anchor"]).member_set.logits(Step(IDS))

    with torch.no_grad():
        alone = wholes["anchor"].member_set.logits(Step(IDS))
    for found, members in run_ranks(2, task):
        for name, logits in found.items():
            tolerance = 1e-5 if name in ("rows", "masked") else 0
            assert_close(logits, expected[name], atol=tolerance, rtol=0)
        assert list(members) == list(ROLES)
        assert all(torch.equal(members[role], alone[role]) for role in ROLES)


def test_a_shared_backbone_is_one_group(save_member: SaveMember, tmp_path: Path) -> None:
    base, target = save_member("base"), save_member("target", "qwen2", 5)
    patched = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    patched.save_pretrained(tmp_path / "adapter")
    members = {
        "source_pt": MemberConfig(str(base)),
        "source_ft": MemberConfig(str(base), adapter=str(tmp_path / "adapter")),
        "target_pt": MemberConfig(str(target)),
    }
    config = EnsembleConfig(rule="base-change", alpha=0.6, members=members)
    expected = decode_all(EnsembleForCausalLM.from_config(config))

    def task(world: World) -> Any:
        model = EnsembleForCausalLM.from_config(config, world=world)
        return decode_all(model), sorted(model.members), model.shortest_context

    for rank, (texts, roles, shortest) in enumerate(run_ranks(2, task)):
        assert texts == expected
        assert roles == [["source_ft", "source_pt"], ["target_pt"]][rank]
        assert shortest is not None
    with_three = run_ranks(3, task)
    assert all("start 2 with --nproc-per-node" in message for message in with_three)
