"""Transports beside addition: numbers against float64, files that they write, and a sentence for a mistake."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.commands import Run
from helpers.patch_cases import save_model, weights
from helpers.tiny import make_tokenizer
from helpers.transport_cases import EXAMPLES, save_pair, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ensembler.errors import ConfigError, EnsemblerError
from ensembler.evaluation.calibration import labelled_examples
from ensembler.patch.addition import WeightUpdate
from ensembler.patch.apply import apply_plan
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import plan_patches
from ensembler.patch.transports.orthogonal import Orthogonal
from ensembler.patch.transports.sign_mask import count_votes
from ensembler.patch.transports.transport import Example, Sources, carried, delta_rows
from ensembler.patch.verify import verify_applied
from ensembler.safetensors_files import StoredModel, StoredTensor


@pytest.fixture
def run(run: Run) -> Run:
    """Run `ensembler patch` with these arguments."""
    return functools.partial(run, "patch")


def stored(values: Tensor) -> StoredTensor:
    return StoredTensor("w", Path("w"), "F32", tuple(values.shape), 0, values.nbytes, values)


def orthogonal(new: Tensor, old: Tensor) -> Orthogonal:
    return Orthogonal({"w": stored(new)}, StoredModel(Path("old"), {"w": stored(old)}))


def whole(update: WeightUpdate, shape: Sequence[int]) -> Tensor:
    return torch.cat([rows for _, rows in delta_rows(update, *shape)]).double()


def apply(new: Path, lora: Path, out: Path, name: str, **sources: Any) -> dict[str, Tensor]:
    plan = carried(plan_patches([read_patch(lora)], new), name, Sources(**sources))
    apply_plan(plan, out)
    verify_applied(plan, out)
    return weights(out)


# orthogonal


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 4),
    shift=st.floats(1e-3, 10),
    block=st.integers(1, 200),
    seed=st.integers(0, 10_000),
)
def test_what_is_left_is_orthogonal_to_the_bases_own_change(
    rows: int, columns: int, rank: int, shift: float, block: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(rows, columns, generator=generator)
    new = old + shift * torch.randn(rows, columns, generator=generator)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    update = WeightUpdate(left, right)
    delta, change = left.double() @ right.double(), new.double() - old.double()
    share = (delta * change).sum() / change.square().sum()
    transport = orthogonal(new, old)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ensembler.patch.patch_device.BLOCK_ELEMENTS", block)  # in many blocks as in one
        assert transport.share("w", update) == pytest.approx(float(share), rel=1e-5, abs=1e-6)
        found = transport.apply("w", update)
        result = whole(found, (rows, columns))
        again = transport.share("w", found)
    rounding = 1e-6 * (delta.abs() + abs(share) * (new.abs() + old.abs()) + left.abs() @ right.abs())
    assert ((result - (delta - share * change)).abs() <= rounding + 1e-7).all()
    limit = 1e-6 * (delta.norm() + abs(share) * (new.norm() + old.norm())) * change.norm() * (rank + 1)
    assert abs((result * change).sum()) <= limit + 1e-9
    assert abs(again) * change.norm() ** 2 <= limit + 1e-9  # taken twice, it takes nothing more


def test_a_delta_along_the_change_of_the_base_vanishes() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(12, 2, generator=generator), torch.randn(2, 9, generator=generator)
    old = torch.randn(12, 9, generator=generator)
    transport = orthogonal(old + left @ right, old)
    update = WeightUpdate(-3 * left, right)
    assert transport.share("w", update) == pytest.approx(-3, abs=1e-5)
    assert whole(transport.apply("w", update), (12, 9)).abs().max() <= 1e-5 * (left @ right).abs().max() * 3


def test_a_base_that_did_not_change_leaves_the_update_as_it_is() -> None:
    same = torch.ones(4, 3)
    update = WeightUpdate(torch.ones(4, 1), torch.ones(1, 3))
    assert orthogonal(same, same.clone()).apply("w", update) is update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_orthogonal_files_are_one_rounding_from_float64(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    old, new, lora = save_pair(tmp_path, family=family, dtype=dtype)
    found = apply(new, lora, tmp_path / "out", "orthogonal", old=old)
    plan = plan_patches([read_patch(lora)], new)
    before, after = weights(old), weights(new)
    added = weights(Path(apply_plan_to(tmp_path / "added", new, lora)))
    for name, weight in found.items():
        if name not in plan.names:
            assert torch.equal(weight, after[name])
            continue
        base = after[name].double()
        change = base - before[name].double()
        delta = fp64_delta(lora, name, base.shape)
        expected = base + delta - (delta * change).sum() / change.square().sum() * change
        assert (weight.double() - expected).abs().max() <= expected.abs().max() * torch.finfo(dtype).eps * 2, name
        assert not torch.equal(weight, added[name]), name
    assert "transport orthogonal" in (tmp_path / "out" / "README.md").read_text("utf-8")


def apply_plan_to(out: Path, new: Path, lora: Path) -> Path:
    apply_plan(plan_patches([read_patch(lora)], new), out)
    return out


def fp64_delta(lora: Path, name: str, shape: Sequence[int]) -> Tensor:
    """1.5 · B A of a weight, as it lies on disk."""
    key = "base_model.model." + name.removesuffix(".weight")
    factors = weights(lora)
    delta = 1.5 * factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
    is_transposed = json.loads((lora / "adapter_config.json").read_text())["fan_in_fan_out"]
    return delta.T if is_transposed else delta


def test_the_command_carries_and_verifies(run: Run, tmp_path: Path) -> None:
    old, new, lora = save_pair(tmp_path)
    out, options = tmp_path / "out", ("--transport", "orthogonal", "--from", old)
    checked = run("apply", lora, "--to", new, *options, "--check")
    assert checked.out == f"{new}: 14 of 21 tensors change; everything fits\n"
    result = run("apply", lora, "--to", new, "--output", out, *options)
    assert result.code == 0, result.err
    assert "Note: transport orthogonal: of each update its part along the base's own change is left out" in result.err
    assert run("verify", new, lora, out, *options).code == 0
    assert run("verify", new, lora, out).code == 1


# sign-mask


def signs_by_hand(model: PreTrainedModel, rows: Sequence[dict[str, str]]) -> dict[str, Tensor]:
    """The sign that most examples want each weight to move in, from the log-probs of the answers."""
    tokenizer = make_tokenizer()
    votes = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for row in rows:
        gap = "" if row["prompt"].endswith(" ") or row["answer"].startswith(" ") else " "
        ids = tokenizer(row["prompt"] + gap + row["answer"], return_tensors="pt")["input_ids"]
        start = len(tokenizer(row["prompt"].rstrip())["input_ids"])
        model.zero_grad()
        log_probs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        log_probs.gather(1, ids[0, start:, None]).sum().backward()
        for name, weight in model.named_parameters():
            votes[name] += weight.grad.sign()
    return {name: vote.sign() for name, vote in votes.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sign_mask_keeps_what_most_examples_agree_with(family: str, tmp_path: Path) -> None:
    _, new, lora = save_pair(tmp_path, family=family)
    found = apply(
        new, lora, tmp_path / "out", "sign-mask", data=labelled_examples(write_lines(tmp_path / "data", EXAMPLES))
    )
    before = weights(new)
    signs = signs_by_hand(AutoModelForCausalLM.from_pretrained(new), EXAMPLES)
    num_kept = num_values = 0
    for name in plan_patches([read_patch(lora)], new).names:
        delta = fp64_delta(lora, name, before[name].shape)
        kept = delta.sign() == signs[name]
        expected = before[name].double() + torch.where(kept, delta, 0)
        wrong = ((found[name].double() - expected).abs() > 1e-5).float().mean()
        assert wrong <= 0.005, (name, wrong)  # a gradient that is 0 but for rounding has any sign
        num_kept, num_values = num_kept + int(kept.sum()), num_values + kept.numel()
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    (line,) = [line for line in card.splitlines() if "transport sign-mask" in line]
    assert abs(float(line.split("sign-mask: ")[1].split(" %")[0]) - 100 * num_kept / num_values) < 0.2
    assert "by 3 examples of data" in line


def test_a_masked_update_lowers_the_loss_to_first_order(tmp_path: Path) -> None:
    _, new, lora = save_pair(tmp_path)
    found = apply(
        new, lora, tmp_path / "out", "sign-mask", data=labelled_examples(write_lines(tmp_path / "data", EXAMPLES[:1]))
    )
    model, before = AutoModelForCausalLM.from_pretrained(new), weights(new)
    ids = make_tokenizer()("the cat is good", return_tensors="pt")["input_ids"]
    model(ids).logits[0, 9:-1].log_softmax(-1).gather(1, ids[0, 10:, None]).sum().neg().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    products = [(gradients[name] * (found[name] - before[name])).sum() for name in found]
    assert max(products) <= 1e-6
    assert sum(products) < -0.01


def test_votes_of_many_examples_are_counted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, **inputs: Any) -> Any:
            return SimpleNamespace(loss=self.weight[1] - self.weight[0])

    model = Model()
    for num in (127, 128, 2**15):
        votes = count_votes(model, {"w": model.weight}, [Example((1,), (2,), "")] * num, lambda steps: None)
        assert votes["w"].tolist() == [num, -num]


# mistakes


def test_mistakes_are_one_sentence(run: Run, tmp_path: Path) -> None:
    old, new, lora = save_pair(tmp_path)
    small = save_model(tmp_path / "small", hidden_size=24)
    shallow = save_model(tmp_path / "shallow", num_layers=1)
    unlabelled = write_lines(tmp_path / "unlabelled", [{"prompt": "the cat"}])
    labelled = write_lines(tmp_path / "labelled", EXAMPLES)
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("--transport", "ortogonal"), "unknown transport 'ortogonal'; did you mean orthogonal?"),
        (("--transport", "procrustes"), "use: ensembler patch transport"),
        (
            ("--transport", "orthogonal"),
            "--transport orthogonal needs the base that the patch was made for; give --from",
        ),
        (("--from", old), "--from was given, which --transport add does not use"),
        (("--transport", "sign-mask"), "needs a file of JSON lines; give --data"),
        (("--transport", "sign-mask", "--data", unlabelled), f"{unlabelled}:1 has no text under 'answer'"),
        (("--transport", "orthogonal", "--data", labelled, "--from", old), "--data was given, which"),
        (
            ("--transport", "orthogonal", "--from", small),
            "there is no difference to take, give two versions of one architecture",
        ),
        (("--transport", "orthogonal", "--from", shallow), "give another version of the same architecture as --from"),
        (("--transport", "orthogonal", "--from", new), "--from and --to are both"),
    ]
    for arguments, said in cases:
        for end in (("--check",), ("--output", tmp_path / "out")):
            result = run("apply", lora, "--to", new, *arguments, *end)
            assert (result.code, said in result.error) == (2, True), (arguments, result.err)
            assert "skip-bad" not in result.err
    assert not (tmp_path / "out").exists()


def test_sources_are_checked_in_python_too(tmp_path: Path) -> None:
    _, new, lora = save_pair(tmp_path)
    plan = plan_patches([read_patch(lora)], new)
    with pytest.raises(ConfigError, match="give --from"):
        carried(plan, "orthogonal", Sources())
    with pytest.raises(EnsemblerError, match="cannot be read"):
        labelled_examples(tmp_path / "nothing")
