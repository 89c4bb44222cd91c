"""Orthogonal maps between two bases: a known rotation is found, other widths and depths, and mistakes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from helpers.commands import Run
from helpers.patch_cases import save_lora, save_lora_of, save_model, weights
from helpers.tiny import make_model, make_tokenizer, random_ids
from helpers.transport_cases import save_pair, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ensembler.evaluation.calibration import plain_texts
from ensembler.patch.apply import apply_plan
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import plan_patches
from ensembler.patch.transports.carry_lora import carry_lora
from ensembler.patch.transports.procrustes import matched_layer, orthogonal_map


@pytest.fixture
def run(run: Run) -> Run:
    """Run `ensembler patch` with these arguments."""
    return functools.partial(run, "patch")


def random_rotation(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix with orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64, generator=generator))[0][:, :columns]


def turned_model(model: PreTrainedModel, turn: Tensor, *, width: int, num_neurons: int) -> PreTrainedModel:
    """The same function with hidden states `turn` times those of `model`, in a model of other widths."""
    old_width, old_neurons = model.config.hidden_size, model.config.intermediate_size
    shapes = {"hidden_size": width, "intermediate_size": num_neurons, "head_dim": 8}
    shrink = old_width / width  # of the mean square, which a norm divides by
    other = make_model(**shapes, rms_norm_eps=model.config.rms_norm_eps * shrink)
    state = {name: weight.double() for name, weight in model.state_dict().items()}
    turned = {}
    for name, weight in state.items():
        if name.endswith("norm.weight"):
            turned[name] = torch.full((width,), shrink**0.5)
            continue
        if any(part in name for part in ("gate_proj", "up_proj")):
            weight = torch.cat([weight, weight.new_zeros(num_neurons - old_neurons, weight.shape[1])])
        if "down_proj" in name:
            weight = torch.cat([weight, weight.new_zeros(weight.shape[0], num_neurons - old_neurons)], 1)
        turned[name] = turn @ weight if "o_proj" in name or "down_proj" in name else weight @ turn.T
    other.load_state_dict({name: weight.float() for name, weight in turned.items()})
    return other


@pytest.mark.parametrize(
    ("width", "num_neurons", "most_bytes"),
    [(16, 32, 2**30), (24, 40, 2**30), (24, 40, 1)],
    ids=["same-widths", "wider", "one-by-one"],
)
def test_procrustes_finds_a_rotation_of_the_old_base(
    width: int, num_neurons: int, most_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_model(seed=1)
    new = turned_model(old, random_rotation(width, 16), width=width, num_neurons=num_neurons)
    for model, name in ((old, "old"), (new, "new")):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert (old(ids).logits - new(ids).logits).abs().max() < 1e-4
    lora = save_lora_of(make_model(seed=1), tmp_path / "lora", 3)
    generator = torch.Generator().manual_seed(5)
    letters = "abcdefghijklmnopqrstuvwxyz 0123456789"
    rows = [
        {"text": "".join(letters[int(i)] for i in torch.randint(36, (20,), generator=generator))} for _ in range(12)
    ]
    texts = write_lines(tmp_path / "texts", rows)
    monkeypatch.setattr("ensembler.patch.transports.procrustes.MOST_BYTES", most_bytes)
    notes = carry_lora(read_patch(lora), tmp_path / "old", tmp_path / "new", plain_texts(texts), tmp_path / "carried")
    assert len(notes) == 1  # the texts are enough
    assert "14 modules mapped by 240 tokens of texts" in notes[0]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(make_model(seed=1), lora).eval()(ids).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
        found = PeftModel.from_pretrained(base, tmp_path / "carried").eval()(ids).logits
    assert (expected - old(ids).logits).abs().max() > 1
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    apply_plan(plan_patches([read_patch(tmp_path / "carried")], tmp_path / "new"), tmp_path / "out")
    with torch.no_grad():
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert (written - expected).abs().max() < 1e-4 * expected.abs().max()


@settings(max_examples=40, deadline=None)
@given(old=st.integers(1, 12), new=st.integers(1, 12), tokens=st.integers(1, 30), seed=st.integers(0, 10_000))
def test_a_map_is_semi_orthogonal_and_no_other_is_nearer(old: int, new: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(tokens, width, generator=generator) for width in (old, new))
    found = orthogonal_map(first, second)
    gram = found.T @ found if new >= old else found @ found.T
    assert (gram - torch.eye(min(old, new), dtype=torch.float64)).abs().max() < 1e-9
    agreement = (second.double() * (first.double() @ found.T)).sum()
    for other in range(5):
        turn = random_rotation(max(old, new), min(old, new), seed + other)
        turn = turn if new >= old else turn.T
        assert (second.double() * (first.double() @ turn.T)).sum() <= agreement + 1e-9


def test_a_map_is_the_identity_where_no_text_reaches() -> None:
    rows = torch.zeros(5, 4)
    rows[:, 0] = torch.arange(5.0)
    assert (orthogonal_map(rows, rows) - torch.eye(4, dtype=torch.float64)).abs().max() < 1e-9
    wider = torch.cat([rows, torch.zeros(5, 2)], 1)
    assert (orthogonal_map(rows, wider) - torch.eye(6, 4, dtype=torch.float64)).abs().max() < 1e-9


def test_layers_are_matched_by_relative_depth() -> None:
    assert [matched_layer(layer, 4, 2) for layer in range(4)] == [0, 0, 1, 1]
    assert [matched_layer(layer, 3, 6) for layer in range(3)] == [0, 2, 5]
    assert [matched_layer(layer, 5, 5) for layer in range(5)] == [*range(5)]
    assert matched_layer(0, 1, 7) == 0


def test_procrustes_goes_to_another_depth_and_leaves_norms_out(run: Run, tmp_path: Path) -> None:
    old, _, lora = save_pair(tmp_path)
    deep = save_model(tmp_path / "deep", num_layers=3, hidden_size=24)
    make_tokenizer().save_pretrained(deep)
    texts = write_lines(tmp_path / "texts", [{"text": "the cat sat on the mat"}, {"text": "one and two"}])
    save_lora(lora, seed=2, target_modules=["q_proj", "down_proj", "lm_head"])
    result = run("transport", lora, "--from", old, "--to", deep, "--texts", texts, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert "lm_head.weight: left out" in result.err
    assert "cannot reach" not in result.err
    few = write_lines(tmp_path / "few", [{"text": "one and two"}])
    command = ["transport", lora, "--from", old, "--to", deep, "--texts", few, "--output", tmp_path / "out_of_few"]
    assert "11 tokens cannot reach all directions of the widest layer (32)" in " ".join(run(*command).err.split())
    carried_factors = weights(tmp_path / "out")
    assert len(carried_factors) == 2 * 2 * 3
    key = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"
    norm = 1.5 * weights(lora)["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].norm()
    assert carried_factors[key].shape == (24, 4)
    assert carried_factors[key].norm() == pytest.approx(float(norm), rel=1e-5)
    assert run("apply", tmp_path / "out", "--to", deep, "--check").out.startswith(f"{deep}: 6 of ")


def test_procrustes_mistakes_are_one_sentence(run: Run, tmp_path: Path) -> None:
    old, new, lora = save_pair(tmp_path)
    other = save_model(tmp_path / "other", "gpt_neox")
    swapped = save_model(tmp_path / "swapped")
    make_tokenizer().save_pretrained(other)
    make_tokenizer(swapped=True).save_pretrained(swapped)
    texts = write_lines(tmp_path / "texts", ["abc f"])
    cases: list[tuple[Path, Path, str]] = [
        (other, texts, "procrustes needs two bases of one architecture"),
        (swapped, texts, "into different tokens"),
        (new, write_lines(tmp_path / "none", [{"prompt": "a"}]), "has no text under 'text'"),
        (old, texts, "--from and --to are both"),
    ]
    for to, lines, said in cases:
        result = run("transport", lora, "--from", old, "--to", to, "--texts", lines, "--output", tmp_path / "out")
        assert (result.code, said in result.error) == (2, True), (to, result.err)
    assert not (tmp_path / "out").exists()
