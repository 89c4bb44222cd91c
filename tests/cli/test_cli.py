"""The command line through click's runner: what is printed, what is written, and one line for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.adapter_cases import save_adapter, save_base
from helpers.commands import Run, SaveMember
from helpers.process_cases import fork
from helpers.tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from ensembler import EnsembleForCausalLM, __version__


@pytest.fixture
def ensemble(run: Run, members: list[str], tmp_path: Path) -> Path:
    result = run("create", tmp_path / "ens", *members, "--alpha", 0.5)
    assert result.code == 0, result.err
    return tmp_path / "ens"


def greedy(folder: Path, text: str, num: int) -> str:
    model = EnsembleForCausalLM.from_pretrained(folder)
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=num, do_sample=False)[0, ids.shape[1] :]
    return str(model.tokenizer.decode(new, skip_special_tokens=True))


def test_version_and_help(run: Run) -> None:
    assert run("--version").out == f"ensembler, version {__version__}\n"
    for command in ("create", "inspect", "plan", "generate", "score", "chat"):
        result = run(command, "--help")
        assert result.code == 0
        assert "--source-ft" in result.out


def test_create_writes_a_folder_that_loads_as_it_says(run: Run, ensemble: Path, folders: dict[str, Path]) -> None:
    config = json.loads((ensemble / "config.json").read_text())
    assert config["model_type"] == "ensembler"
    assert config["alpha"] == 0.5
    assert config["members"]["source_ft"] == {"model": f"../{folders['source_ft'].name}"}
    result = run("generate", ensemble, "--prompt", "hello", "--max-new-tokens", 9)
    assert result.out == greedy(ensemble, "hello", 9) + "\n"
    assert "tokens/s" in result.err


def test_create_copy_members_stands_alone(run: Run, members: list[str], tmp_path: Path) -> None:
    assert run("create", tmp_path / "alone", *members, "--copy-members").code == 0
    assert all(path.startswith("./") for path in _models(tmp_path / "alone"))
    assert (tmp_path / "alone" / "target_pt" / "model.safetensors").is_file()


def test_create_says_how_tokenizers_differ(run: Run, folders: dict[str, Path], save_member: SaveMember) -> None:
    """The same differences that `inspect` shows."""
    other = make_tokenizer()
    other.eos_token = "<pad>"
    members = {"source_ft": folders["source_ft"], "source_pt": save_member("ended", tokenizer=other)}
    members["target_pt"] = save_member("bare", "llama", 5, tokenizer=None)
    given = [part for role, path in members.items() for part in (f"--{role.replace('_', '-')}", str(path))]
    notes = json.loads(run("inspect", *given, "--json").out)["notes"]
    assert any("eos of source_pt is '<pad>'; the anchor's, '</s>', is used" in note for note in notes)
    assert any("target_pt came without a tokenizer" in note for note in notes)
    for copied in ([], ["--copy-members"]):
        created = run("create", folders["source_ft"].parent / f"ens{len(copied)}", *given, *copied)
        assert created.err.splitlines()[:-1] == [f"Note: {note}" for note in notes]
        assert created.out == ""


def test_roles_that_look_swapped_are_said(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    base, target = folders["source_pt"], folders["target_pt"]
    lora = save_adapter(base, tmp_path / "lora")
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    warnings = {  # by source FT and source PT
        (folders["source_ft"], base): "",
        (lora, base): "",
        (base, lora): f"source_pt has an adapter ({lora}) and source_ft has none",
        (base, base): "have the same weights, so no fine-tuning is carried over",
        (base, copy): f"({copy}) have the same weights",
        (lora, lora): "have the same weights",
        (folders["source_ft"], target): "have the same weights, so there is no change of base",
    }
    for number, ((source_ft, source_pt), warning) in enumerate(warnings.items()):
        given = ("--source-ft", source_ft, "--source-pt", source_pt, "--target-pt", target)
        created, shown = run("create", tmp_path / f"e{number}", *given), run("inspect", *given, "--json")
        assert created.code == shown.code == 0, created.err
        assert created.err.splitlines()[:-1] == shown.err.splitlines()
        assert json.loads(shown.out)["warnings"] == [line.removeprefix("Warning: ") for line in shown.err.splitlines()]
        assert (shown.err == "") == (warning == "")
        assert warning in shown.err


def _models(folder: Path) -> list[str]:
    return [member["model"] for member in json.loads((folder / "config.json").read_text())["members"].values()]


def test_linear_with_two_pairs(run: Run, folders: dict[str, Path]) -> None:
    numbers = {"a": 1.0, "b": 0.5, "c": -0.5}
    args = [part for role, path in zip("abc", folders.values(), strict=True) for part in ("--member", f"{role}={path}")]
    for role, number in numbers.items():
        args += ["--constant" if role == "a" else "--slope", f"{role}={number}"]
    result = run("inspect", *args, "--rule", "linear", "--alpha", -2, "--json")
    found = {member["role"]: member["weight"] for member in json.loads(result.out)["members"]}
    assert found == {"a": 1.0, "b": -1.0, "c": 1.0}


def test_inspect_counts_parameters_and_bytes_from_headers(run: Run, ensemble: Path, folders: dict[str, Path]) -> None:
    summary = json.loads(run("inspect", ensemble, "--json").out)
    assert summary["vocabulary"] == "identical"
    for member in summary["members"]:
        loaded = AutoModelForCausalLM.from_pretrained(folders[member["role"]])
        assert member["parameters"] == sum(p.numel() for p in loaded.parameters())
        assert member["num_bytes"] == 4 * member["parameters"]
    printed = run("inspect", ensemble, "--prompt", "hello").out
    assert "source_ft (anchor)" in printed
    assert "alpha 0.5" in printed


def test_inspect_prompt_shows_the_next_token(run: Run, ensemble: Path) -> None:
    content = json.loads(run("inspect", ensemble, "--prompt", "hello", "--json").out)
    assert content["next_tokens"]["ensemble"][0]["token"] == greedy(ensemble, "hello", 1)


def test_generate_reads_standard_input(run: Run, ensemble: Path) -> None:
    assert run("generate", ensemble, "--max-new-tokens", 5, stdin="hello\n").out == greedy(ensemble, "hello", 5) + "\n"


def test_generate_streams_what_it_would_print(run: Run, ensemble: Path) -> None:
    arguments = ("generate", ensemble, "--prompt", "hello", "--max-new-tokens", 9)
    assert run(*arguments, "--stream").out == run(*arguments, "--no-stream").out


def test_generate_explain_brackets_moved_tokens(run: Run, ensemble: Path) -> None:
    arguments = ("generate", ensemble, "--prompt", "hello", "--max-new-tokens", 9)
    row = json.loads(run(*arguments, "--explain", "--json").out)
    printed = run(*arguments, "--explain").out.splitlines()
    assert f"{len(row['moved'])} of {row['num_tokens']} tokens are not the anchor's choice" in printed
    assert len(printed[-1:]) == 1
    assert printed[0].count("[") - row["text"].count("[") == len(row["moved"]) > 0
    for sampling in ([], ["--temperature", 1.5, "--seed", 0]):
        unmoved = json.loads(run(*arguments, "--explain", "--json", "--alpha", 0, *sampling).out)
        assert unmoved["moved"] == []


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "hello there", "abc", "x")))
    return path


def rows(path: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for row in found:
        assert row.pop("seconds") >= 0
    return found


def test_generate_output_is_in_input_order_and_resumes(run: Run, ensemble: Path, prompts: Path, tmp_path: Path) -> None:
    arguments = ("generate", ensemble, "--data", prompts, "--max-new-tokens", 6, "--batch-size", 2)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert run(*arguments, "--output", whole).code == 0
    assert [row["number"] for row in rows(whole)] == [0, 1, 2, 3]
    assert rows(whole)[1]["text"] == greedy(ensemble, "hello there", 6)
    cut.write_text("".join(whole.read_text().splitlines(keepends=True)[1:3]))
    assert run(*arguments, "--output", cut).code == 0
    assert rows(cut) == rows(whole)
    again = run(*arguments, "--output", cut)
    assert (again.code, again.err.splitlines()[-1]) == (0, "nothing to do: all 4 prompts have their rows already")
    assert rows(cut) == rows(whole)
    cut.write_text("".join(reversed(cut.read_text().splitlines(keepends=True))))  # killed before it was put in order
    assert run(*arguments, "--output", cut).code == 0
    assert rows(cut) == rows(whole)
    changed = run(*arguments, "--output", cut, "--alpha", 2)
    assert changed.code == 2
    assert "was begun with other settings: ensemble alpha was 0.5, now 2.0; choose another --output" in changed.error
    assert rows(cut) == rows(whole)


def test_what_changed_beneath_an_output_is_named(run: Run, ensemble: Path, prompts: Path, tmp_path: Path) -> None:
    """Weights of a member, --explain, and other fields of the rows; nothing is loaded to find out."""
    out = tmp_path / "out.jsonl"
    arguments = ("generate", ensemble, "--data", prompts, "--max-new-tokens", 3, "--output", out)
    assert run(*arguments).code == 0
    assert "explain was false, now true" in run(*arguments, "--explain").error
    without = "other settings: without --verify-weights (leave it out); choose"
    assert without in run(*arguments, "--verify-weights").error
    before = prompts.read_text()
    prompts.write_text(before.replace('{"prompt": "a"}', '{"prompt": "a", "id": 7}'))
    assert "the fields are others" in run(*arguments).error
    prompts.write_text(before)
    weights = tmp_path / "m_target_pt" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "other settings: the weights of target_pt changed" in run(*arguments).error
    rows_before = out.read_text()
    resumed = run(*arguments, "--overwrite")
    assert resumed.code == 0
    assert len(out.read_text().splitlines()) == len(rows_before.splitlines()) == 4


def test_generate_takes_several_prompts_and_guards_their_file(run: Run, ensemble: Path, prompts: Path) -> None:
    result = run("generate", ensemble, "--prompt", "a", "--prompt", "hello", "--max-new-tokens", 3)
    assert result.out.splitlines()[1::2] == [greedy(ensemble, "a", 3), greedy(ensemble, "hello", 3)]
    before = prompts.read_text()
    guarded = run("generate", ensemble, "--data", prompts, "--output", prompts, "--overwrite")
    assert f"{prompts} is {prompts}, which this command reads" in guarded.error
    assert prompts.read_text() == before


def test_no_command_prints_the_help(run: Run) -> None:
    result = run()
    assert (result.code, result.err) == (0, "")
    assert "Commands:" in result.out


def test_generate_refuses_an_existing_output(run: Run, ensemble: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    result = run("generate", ensemble, "--data", prompts, "--output", out)
    assert result.code == 2
    assert "is no row of a run; choose another --output, or add --overwrite" in result.error
    assert out.read_text() == "precious\n"


def test_skip_bad_goes_on(run: Run, ensemble: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('"a"\n{broken\n""\n"b"\n\n')
    assert f"{path}:2" in run("generate", ensemble, "--data", path).error
    result = run("generate", ensemble, "--data", path, "--skip-bad", "--json", "--max-new-tokens", 2)
    assert [json.loads(line)["number"] for line in result.out.splitlines()] == [0, 3]
    assert result.err.count("skipped: ") == 2


MISTAKES = {
    "no ensemble": (["generate", "--prompt", "a"], "no ensemble was given"),
    "not a folder": (["generate", "nowhere", "--prompt", "a"], "there is no folder nowhere"),
    "unknown rule": (["generate", "MEMBERS", "--rule", "mean", "--prompt", "a"], "unknown rule 'mean'"),
    "unknown role": (["inspect", "MEMBERS", "--member", "judge=x"], "unknown role 'judge'"),
    "missing role": (["inspect", "--source-ft", "x", "--source-pt", "y"], "needs a member 'target_pt'"),
    "alpha nan": (["inspect", "ENSEMBLE", "--alpha", "nan"], "alpha is 'nan'; expected a number"),
    "alpha below 0": (["inspect", "ENSEMBLE", "--alpha", "-1"], "not negative"),
    "dtype": (["inspect", "ENSEMBLE", "--dtype", "int3"], "unknown dtype 'int3'"),
    "device": (["generate", "ENSEMBLE", "--prompt", "a", "--device", "cuda:7"], "device 'cuda:7' is not there"),
    "empty prompt": (["generate", "ENSEMBLE", "--prompt", " "], "is an empty prompt"),
    "long prompt": (["generate", "ENSEMBLE", "--prompt", "a" * 200], "the context of source_ft ends at 128"),
    "option": (["generate", "ENSEMBLE", "--alhpa", "1"], "No such option"),
    "two prompts": (["generate", "ENSEMBLE", "--prompt", "a", "--data", "b"], "give one of them"),
    "no such file": (["generate", "ENSEMBLE", "--data", "b.jsonl"], "b.jsonl cannot be read"),
    "system": (["generate", "ENSEMBLE", "--prompt", "a", "--system", "s"], "add --chat"),
    "overwrite": (["generate", "ENSEMBLE", "--prompt", "a", "--overwrite"], "without --output"),
    "twice": (["generate", "ENSEMBLE", "--alpha", "1", "--alpha", "2"], "--alpha was given 2 times; give it once"),
    "both of two": (["generate", "ENSEMBLE", "--strict", "--skip-bad"], "was given 2 times"),
    "a grid for one": (["chat", "ENSEMBLE", "--alpha", "0,1"], "--alpha 0,1 is a grid of 2; chat takes one number"),
    "two rules for one": (["inspect", "ENSEMBLE", "--rule", "eft,base-change"], "names 2 rules; inspect takes one"),
    "one rule twice": (["score", "ENSEMBLE", "--data", "x", "--rule", "eft,eft"], "names a rule twice"),
    "explain a grid": (["generate", "ENSEMBLE", "--alpha", "0,1", "--explain"], "it takes one --rule and one --alpha"),
    "beams of a grid": (
        ["generate", "ENSEMBLE", "--prompt", "a", "--alpha", "0,1", "--num-beams", "2"],
        "a grid is decoded without beams",
    ),
    "loud and quiet": (["inspect", "ENSEMBLE", "-q", "-v"], "--quiet and --verbose were both given"),
    "top-p": (["generate", "ENSEMBLE", "--prompt", "a", "--top-p", "0.5"], "top_p needs sampling"),
    "stream": (["generate", "ENSEMBLE", "--prompt", "a", "--stream", "--json"], "--stream prints one text"),
    "existing": (["create", "ENSEMBLE", "MEMBERS"], "exists already and has config.json, "),
    "folder and member": (["inspect", "ENSEMBLE", "--source-ft", "x"], "give the folder, or the members alone"),
    "a member as ensemble": (["inspect", "MEMBER"], "not an ensemble"),
    "an ensemble as member": (["inspect", "--source-ft", "ENSEMBLE", "REST"], "a member has to be one model"),
    "an ensemble in create": (["create", "o", "--source-ft", "ENSEMBLE", "REST"], "source_ft: "),
    "dtype of a role": (["inspect", "ENSEMBLE", "--dtype", "source_pt=int3"], "unknown dtype 'int3'"),
    "dtype of nobody": (["inspect", "ENSEMBLE", "--dtype", "source=float16"], "--dtype 'source=float16'"),
    "dtype twice": (["inspect", "ENSEMBLE", "--dtype", "float16", "--dtype", "auto"], "twice for all members"),
    "device of a role": (
        ["generate", "ENSEMBLE", "--prompt", "a", "--device", "target_pt=cuda:7"],
        "target_pt: device 'cuda:7' is not",
    ),
    "device of nobody": (["inspect", "ENSEMBLE", "--device", "nobody=cpu"], "one of source_ft, target_pt, source_pt"),
    "device empty": (["inspect", "ENSEMBLE", "--device", "target_pt="], "--device 'target_pt='"),
    "device twice": (["inspect", "ENSEMBLE", "--device", "source_pt=cpu", "--device", "source_pt=cpu"], "given twice"),
    "quantize": (["inspect", "ENSEMBLE", "--quantize", "int3"], "int3"),
    "quantize a role": (["inspect", "ENSEMBLE", "--quantize", "source_ft=nf4:int8"], "compute dtype 'int8'"),
    "quantize without role": (["inspect", "ENSEMBLE", "--quantize", "=nf4"], "--quantize '=nf4'"),
    "memory without auto": (["inspect", "ENSEMBLE", "--max-memory", "cpu=1GiB"], "add --device source_ft=auto"),
    "memory": (["inspect", "ENSEMBLE", "--device", "auto", "--max-memory", "cpu=lots"], "'lots' is not a size"),
    "memory without unit": (
        ["inspect", "ENSEMBLE", "--device", "auto", "--max-memory", "target_pt=cpu=20"],
        "--max-memory target_pt=cpu=20: '20' is not a size",
    ),
    "memory no pair": (["inspect", "ENSEMBLE", "--device", "auto", "--max-memory", "1GiB"], "DEVICE=SIZE"),
    "memory of nobody": (
        ["inspect", "ENSEMBLE", "--device", "auto", "--max-memory", "nobody=cpu=1GiB"],
        "--max-memory nobody=cpu=1GiB: ",
    ),
    "memory twice": (
        ["inspect", "ENSEMBLE", "--device", "auto", "--max-memory", "cpu=1GiB,cpu=2GiB"],
        "twice for 'cpu'",
    ),
    "adapter alone": (["inspect", "--source-ft-adapter", "x"], "--source-ft-adapter makes source_ft from --source-pt"),
    "adapter and ft": (["inspect", "MEMBERS", "--source-ft-adapter", "x"], "and no --source-ft"),
    "adapter nowhere": (["inspect", "REST", "--source-ft-adapter", "/nowhere"], "there is no folder /nowhere"),
    "adapter of another base": (["inspect", "REST", "--source-ft-adapter", "ADAPTER"], "made for another base"),
    "adapter and folder": (
        ["inspect", "ENSEMBLE", "--source-ft-adapter", "x"],
        "a member was given beside the ensemble",
    ),
    "member twice": (["inspect", "--rule", "eft", "--member", "source_ft=x", "--member", "source_ft=y"], "given twice"),
    "offline": (["inspect", "--rule", "eft", "--member", "source_ft=org/name", "REST"], "cannot be reached (offline)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    run: Run, ensemble: Path, members: list[str], tmp_path: Path, mistake: str
) -> None:
    arguments, message = MISTAKES[mistake]
    if "ADAPTER" in arguments:
        save_adapter(save_base(tmp_path / "wide", hidden_size=32), tmp_path / "lora")
    replaced = {
        "ADAPTER": [str(tmp_path / "lora")],
        "ENSEMBLE": [str(ensemble)],
        "MEMBERS": members,
        "MEMBER": [members[1]],
        "REST": members[2:],
    }
    before = _tree(tmp_path)
    result = run(*[part for argument in arguments for part in replaced.get(argument, [argument])])
    assert message in result.error
    assert result.code == 2
    assert _tree(tmp_path) == before


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_source_ft_adapter_is_source_ft(run: Run, members: list[str], folders: dict[str, Path], tmp_path: Path) -> None:
    """The same text as the LoRA folder as a model of its own gives, on one copy of the weights."""
    adapter = save_adapter(folders["source_pt"], tmp_path / "lora")
    asked = ("--prompt", "hello", "--max-new-tokens", 9)
    apart = run("generate", "--source-ft", adapter, *members[2:], *asked)
    shared = run("generate", "--source-ft-adapter", adapter, *members[2:], *asked)
    assert shared.code == 0, shared.err
    assert shared.out == apart.out != run("generate", *members, *asked).out
    assert run("create", tmp_path / "ens", "--source-ft-adapter", adapter, *members[2:]).code == 0
    content = json.loads((tmp_path / "ens" / "config.json").read_text())["members"]
    assert content["source_ft"] == {"model": "../m_source_pt", "adapter": "../lora"}
    assert run("generate", tmp_path / "ens", *asked).out == shared.out


def test_values_for_one_role_and_for_all(run: Run, ensemble: Path, tmp_path: Path) -> None:
    """A role's own value comes before the one for all, in any order."""
    arguments = ["--dtype", "source_pt=float16", "--dtype", "bfloat16", "--quantize", "target_pt=nf4:double"]
    arguments += ["--device", "auto", "--device", "source_ft=cpu", "--max-memory", "target_pt=cpu=1GiB,disk=2GB"]
    members = [part for role, name in TRIO.items() for part in ("--member", f"{role}={tmp_path / name}")]
    result = run("create", tmp_path / "other", *members, *arguments, "--offload-folder", tmp_path / "off")
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "other" / "config.json").read_text())["members"]
    assert {role: member["dtype"] for role, member in content.items()} == {
        "source_ft": "bfloat16",
        "source_pt": "float16",
        "target_pt": "bfloat16",
    }
    assert content["target_pt"]["quantization"] == {"method": "bnb-nf4", "double_quant": True}
    assert content["target_pt"]["max_memory"] == {"cpu": "1GiB", "disk": "2GB"}
    assert {role: member.get("device_map") for role, member in content.items()} == {
        "source_ft": None,
        "source_pt": "auto",
        "target_pt": "auto",
    }
    back = ("--device", "cpu", "--quantize", "none", "--dtype", "auto", "--prompt", "hello", "--max-new-tokens", 5)
    assert run("generate", tmp_path / "other", "--alpha", 0.5, *back).out == greedy(ensemble, "hello", 5) + "\n"


TRIO = {"source_ft": "m_source_ft", "source_pt": "m_source_pt", "target_pt": "m_target_pt"}


def test_nan_names_the_member_and_exits_with_1(run: Run, folders: dict[str, Path], members: list[str]) -> None:
    model = make_model("llama", 2)
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = float("nan")
    model.save_pretrained(folders["source_pt"])
    result = run("generate", *members, "--prompt", "abc")
    assert result.code == 1
    assert "source_pt computed NaN logits" in result.error


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_keeps_finished_rows_and_exits_130(
    ensemble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts, out = tmp_path / "many.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('"abc"\n' * 3000)
    command = ["generate", str(ensemble), "--data", str(prompts), "--batch-size", "1", "--output", str(out)]
    process = fork(command)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(30)
    if process.is_alive():  # Python drops an interrupt that comes while an object is finalised: press again
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(60)
    err = Path("said").read_text()
    assert process.exitcode == 130, err
    assert err.strip().splitlines()[-1].startswith("Error: interrupted; finished rows")
    assert len(rows(out)) >= 1
