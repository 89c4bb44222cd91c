"""`ensembler plan`, `create --auto-place` and the memory lines of `inspect`, as people type them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from helpers.commands import Run
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ensembler.demo import demo_folder

ROLES = ("source_ft", "source_pt", "target_pt")


def test_plan_prints_members_devices_and_flags(run: Run, members: list[str]) -> None:
    result = run("plan", *members, "--budget", "150kB", "--budget", "150kB", "--context", 64, "--batch-size", 2)
    assert result.code == 0, result.err
    assert result.out.startswith("plan for 2 texts of 64 tokens")
    assert "source_ft: on cuda:" in result.out
    assert result.out.count("this member, 2 texts of 64 tokens") == 3
    assert "--device source_ft=cuda:" in command_in(result.out)


def command_in(printed: str) -> str:
    (line,) = (line for line in printed.splitlines() if line.startswith("run it with: ensembler generate"))
    return line.removeprefix("run it with: ensembler ")


def test_the_command_keeps_what_the_user_said_and_runs(run: Run, members: list[str], tmp_path: Path) -> None:
    said = ["--alpha", "0.4", "--rule", "eft", "--dtype", "source_pt=bfloat16"]
    said += ["--offload-folder", str(tmp_path / "with space")]
    result = run("plan", *members, *said, "--quantize", "none", "--device", "auto", "--batch-size", 3)
    words = shlex.split(command_in(result.out))
    pairs = list(zip(words[1::2], words[2::2], strict=True))
    assert set(zip(members[::2], members[1::2], strict=True)) <= set(pairs)
    assert set(zip(said[::2], said[1::2], strict=True)) <= set(pairs)
    assert [value for option, value in pairs if option == "--device"] == ["cpu"]
    assert [value for option, value in pairs if option == "--quantize"] == [
        f"{role}=none" for role in ("target_pt", "source_ft", "source_pt")
    ]
    assert pairs[-1] == ("--batch-size", "3")
    done = run(*words, "--prompt", "hello", "--max-new-tokens", 4)
    assert done.code == 0, done.err
    ours = [part for pair in pairs if pair[0] not in ("--device", "--quantize", "--batch-size") for part in pair]
    assert done.out == run("generate", *ours, "--prompt", "hello", "--max-new-tokens", 4).out


def test_what_was_said_of_quantisation_stays_unless_the_plan_changes_it(
    run: Run, members: list[str], tmp_path: Path
) -> None:
    assert run("create", tmp_path / "ens", *members, "--quantize", "nf4").code == 0
    kept = run("plan", tmp_path / "ens", "--budget", "1GiB", "--quantize", "target_pt=none")
    words = shlex.split(command_in(kept.out))
    assert words[:2] == ["generate", str(tmp_path / "ens")]
    assert [words[i + 1] for i, word in enumerate(words) if word == "--quantize"] == [
        *("target_pt=none", "source_ft=nf4", "source_pt=nf4"),
    ]
    changed = run("plan", "demo", "--budget", "18MB", "--batch-size", 2, "--quantize", "target_pt=none")
    assert command_in(changed.out).endswith(" demo --device cuda:0 --quantize target_pt=8bit --batch-size 2")


@pytest.mark.parametrize(("budget", "rows", "fits"), [("18MB", 2, True), ("16MB", 4, False)])
def test_it_says_which_context_needs_no_quantisation(run: Run, budget: str, rows: int, fits: bool) -> None:
    asked = ("plan", "demo", "--batch-size", rows, "--budget", budget)
    content = json.loads(run(*asked, "--json").out)
    longest = content["plain_context"]
    assert content["fits"] == fits
    assert 1 <= longest < 256
    for context, is_plain in ((longest, True), (longest + 1, False)):
        found = json.loads(run(*asked, "--context", context, "--json").out)
        assert (found["fits"] and not any(group["chosen"] for group in found["groups"])) == is_plain
    printed = run(*asked)
    if fits:
        assert f"\nnothing has to be quantised with --context {longest} or less\n" in printed.out
        assert "quantised to 8bit by the plan" in printed.out
    else:
        assert f"--batch-size (--context {longest} fits without quantisation), or leave" in printed.err
    assert json.loads(run(*asked, "--context", longest, "--json").out)["plain_context"] is None


def test_create_says_it_too(run: Run, tmp_path: Path) -> None:
    family = demo_folder()
    members = [part for role in ROLES for part in (f"--{role.replace('_', '-')}", family / role)]
    made = run("create", tmp_path / "ens", *members, "--auto-place", "--budget", "18MB", "--batch-size", 2)
    assert made.code == 0, made.err
    assert "placed as by: --device cuda:0 --quantize target_pt=8bit\n" in made.err
    assert "nothing has to be quantised with --context 98 or less" in made.err


def test_plan_in_json_has_exact_bytes(run: Run, members: list[str], folders: dict[str, Path]) -> None:
    content = json.loads(run("plan", *members, "--budget", "1GiB", "--json").out)
    assert content["fits"]
    assert content["context"] == 128
    assert content["devices"][0]["budget"] == 2**30
    for group in content["groups"]:
        loaded = AutoModelForCausalLM.from_pretrained(folders[group["roles"][0]])
        assert group["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
        assert group["weight_bytes"] == sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert content["devices"][0]["used"] == sum(
        group["weight_bytes"] + group["cache_bytes"] + group["logits_bytes"] for group in content["groups"]
    )


def test_plan_without_budgets_takes_this_machine(run: Run, members: list[str]) -> None:
    content = json.loads(run("plan", *members, "--json").out)
    assert content["fits"]
    assert content["devices"][0]["budget"] > 10**6


def test_plan_says_what_is_missing(run: Run, members: list[str]) -> None:
    result = run("plan", *members, "--budget", "20kB")
    assert result.code == 1
    assert result.out.count(": no room\n") == 3
    (line,) = result.err.splitlines()
    assert line.startswith("Error: these members do not fit, not even in 4 bits: the device lacks ")
    as_json = run("plan", *members, "--budget", "20kB", "--json")
    assert as_json.code == 1
    assert json.loads(as_json.out)["missing_bytes"] > 0


def test_a_shared_backbone_is_one_row(run: Run, members: list[str], folders: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders["source_pt"])
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    given = ["--source-ft-adapter", tmp_path / "adapter", *members[2:]]
    printed = run("plan", *given, "--budget", "1GiB").out
    assert "source_ft and source_pt: on cuda:0" in printed
    assert any(line.split() == ["KV", "per", "token", "512", "B", "both", "members"] for line in printed.splitlines())
    content = json.loads(run("plan", *given, "--budget", "1GiB", "--json").out)
    assert [group["roles"] for group in content["groups"]] == [["source_ft", "source_pt"], ["target_pt"]]
    inspected = json.loads(run("inspect", *given, "--prompt", "hello", "--json").out)
    assert [copy["roles"] for copy in inspected["copies"]] == [["source_ft", "source_pt"], ["target_pt"]]
    for copy, group in zip(inspected["copies"], content["groups"], strict=True):
        assert copy["predicted_bytes"] == copy["actual_bytes"] == group["weight_bytes"]


@pytest.mark.parametrize("method", [[], ["--quantize", "8bit"], ["--quantize", "target_pt=8bit"]])
def test_inspect_shows_predicted_beside_actual(run: Run, members: list[str], method: list[str]) -> None:
    predicted = json.loads(run("inspect", *members, *method, "--json").out)["copies"]
    assert all(copy["actual_bytes"] is None for copy in predicted)
    result = run("inspect", *members, *method, "--prompt", "hello", "--json")
    assert result.code == 0, result.err
    loaded = json.loads(result.out)["copies"]
    assert [copy["actual_bytes"] for copy in loaded] == [copy["predicted_bytes"] for copy in predicted]
    printed = run("inspect", *members, *method, "--prompt", "hello").out
    assert printed.count(" predicted, ") == 4  # three copies and all
    assert "in use" in printed
    assert "in use" not in run("inspect", *members, *method).out


def test_create_auto_place_writes_the_placement(run: Run, members: list[str], tmp_path: Path) -> None:
    sizes = ["--budget", "70kB", "--budget", "150kB", "--context", 64]
    planned = json.loads(run("plan", *members, *sizes, "--json").out)
    result = run("create", tmp_path / "ens", *members, "--auto-place", *sizes)
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "ens" / "config.json").read_text())["members"]
    for group in planned["groups"]:
        (role,) = group["roles"]
        assert written[role].get("device") == group["device"]
        assert written[role].get("quantization") == group["quantization"]
    assert {member["device"] for member in written.values()} == {"cuda:0", "cuda:1"}


MISTAKES = {
    "size": (["plan", "MEMBERS", "--budget", "12"], "'12' is not a size; expected a number above 0 and a unit"),
    "context": (["plan", "MEMBERS", "--context", "500"], "a context of 500 tokens was asked for"),
    "no ensemble": (["plan"], "no ensemble was given"),
    "budget alone": (["create", "OUT", "MEMBERS", "--budget", "1GiB"], "belong to --auto-place"),
    "copies": (["create", "OUT", "MEMBERS", "--auto-place", "--copy-members"], "copy them first"),
    "size in create": (["create", "OUT", "MEMBERS", "--auto-place", "--budget", "x"], "'x' is not a size"),
    "spread by hand": (
        ["plan", "MEMBERS", "--device", "source_pt=auto", "--max-memory", "source_pt=cpu=1GiB"],
        "source_pt is spread by hand already",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(run: Run, members: list[str], tmp_path: Path, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    replaced = {"MEMBERS": members, "OUT": [str(tmp_path / "out")]}
    result = run(*[part for argument in arguments for part in replaced.get(argument, [argument])])
    assert message in result.error
    assert result.code == 2
    assert not (tmp_path / "out").exists()


def test_create_writes_nothing_where_nothing_fits(run: Run, members: list[str], tmp_path: Path) -> None:
    result = run("create", tmp_path / "ens", *members, "--auto-place", "--budget", "10kB")
    assert result.code == 1
    assert "these members do not fit" in result.error
    assert not (tmp_path / "ens").exists()
