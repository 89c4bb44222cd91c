"""`benchmarks/gpu.py` runs small on the CPU, and times a GPU that is a stub: whoever has a real one runs it once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
WHERE = {"case", "device", "python", "torch", "triton", "cuda", "commit", "time"}


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script as a machine without our packages would: `ensembler` and what it brings cannot be imported."""
    blocked = "ensembler", "transformers", "rich", "bitsandbytes"
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); sys.argv = sys.argv[1:]; import runpy; "
    code += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, BENCHMARKS / "gpu.py", "--device", "cpu", "--small", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env={**os.environ})


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    done = bench("--out", folder, "--sections", "kernels,table,tune")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (folder / "stdout").write_text(done.stdout, encoding="utf-8")
    return folder


def test_the_cases_are_counted(out: Path) -> None:
    rows = rows_of(out / "kernels.jsonl")
    assert all(row.keys() >= WHERE for row in rows)
    assert not any(row["failed"] for row in rows), rows
    triton = next(row for row in rows if row["impl"] == "triton")
    assert triton["passed"] > 0 < triton["seconds"], rows


def test_the_table_has_every_operation(out: Path) -> None:
    rows = rows_of(out / "table.jsonl")
    timed = [row for row in rows if "device_us" in row]
    first = [row for row in rows if "first_call_ms" in row]
    assert all(row.keys() >= WHERE for row in rows)
    assert len({(row["operation"], row["rows"], row["impl"]) for row in timed}) == 4 * 2 * 3
    assert len(first) == 4 * 2 * 2
    assert all(row["first_call_ms"] > 0 for row in first)
    for row in timed:
        assert [*row["device_us"], *row["host_us"]] == [*sorted(row["device_us"]), *sorted(row["host_us"])]
        assert min(*row["device_us"], *row["host_us"], row["floor_us"], row["times_floor"], row["bytes"]) > 0
        assert row["small"]
        assert "goal" not in row  # of shapes that say nothing
    printed = (out / "stdout").read_text(encoding="utf-8")
    assert printed.count("\n| log-probs of 16 α, 8 rows, torch ") == 1


def test_tuning_names_the_fastest(out: Path) -> None:
    rows = rows_of(out / "tune.jsonl")
    assert len(rows) == 4
    for row in rows:
        assert row.keys() >= WHERE
        assert not row["failed"], row
        assert len(row["all_us"]) > 1
        assert 0 < row["fastest_us"] == min(row["all_us"].values()) <= row["in_table_us"]


def test_the_engine_is_timed_with_what_it_is_measured_against(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--small", "--sections", "engine"]
    done = subprocess.run([*map(str, command), "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = rows_of(tmp_path / "engine.jsonl")
    assert all(row.keys() >= WHERE and not row.get("goals") for row in rows)  # no goal is met by tiny shapes
    ways = {row["way"] for row in rows if "way" in row}
    assert ways == {"eager", "loop", "target alone", "compiled"}  # graphs need a GPU
    assert {row["of"] for row in rows if "of" in row} == {"generation", "log-probs of choices", "log-probs of texts"}
    drafted = [row for row in rows if "acceptance" in row]
    assert len(drafted) == 2
    assert all(0 < row["acceptance"] <= 1 for row in drafted)
    for row in rows:
        assert all(numbers == sorted(numbers) for numbers in row.values() if isinstance(numbers, list))


def test_another_tokenizer_is_timed_against_the_same(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--small", "--sections", "text"]
    done = subprocess.run([*map(str, command), "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = rows_of(tmp_path / "text.jsonl")
    assert [row["rows"] for row in rows] == [1, 2]
    for row in rows:
        assert row.keys() >= WHERE
        assert row["ratio"] > 0 < row["evaluations"]
        assert 0 < row["host_share"] < 1
        assert row["other_tokenizer"] == sorted(row["other_tokenizer"])


def test_patches_are_timed_against_a_copy(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--small"]
    command += ["--sections", "patch_apply,patch_extract", "--out", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [row for name in ("patch_apply", "patch_extract") for row in rows_of(tmp_path / f"{name}.jsonl")]
    assert all(row.keys() >= WHERE for row in rows)
    assert [(row["case"], row["way"]) for row in rows] == [
        (case, way)
        for case in ("patch apply, bf16", "patch apply, fp8", "patch extract, rank 16")
        for way in ("copy", "cpu")
    ]
    for row in rows:
        assert row["seconds"] == sorted(row["seconds"])
        assert row["seconds"][1] > 0 < row["num_bytes"]
        assert row["times_copy"] == 1 or row["way"] != "copy"
    assert 0.9 < rows[-1]["energy"] <= 1  # all that is of rank 8, but for its rounding to bf16


@pytest.mark.skipif(find_spec("vllm") is not None, reason="tests/docs/test_vllm_benchmarks.py runs it")
def test_vllm_is_left_out_with_a_sentence_where_it_is_not_installed(tmp_path: Path) -> None:
    done = bench("--out", tmp_path, "--sections", "vllm")
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(tmp_path / "vllm.jsonl")
    assert row.keys() >= WHERE
    assert row["left_out"].startswith("vLLM is not installed, so nothing was measured in it; install it with: pip ")
    assert f"| {row['left_out']} |" in done.stdout


def test_without_time_everything_is_left_out_and_said(tmp_path: Path) -> None:
    done = bench("--out", tmp_path, "--minutes", 0, "--sections", "table,kernels")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("Left out, as the 0 minutes were used:")[1].split("\n")[1:-1] == [
        "  table: 1 row", "  table: 8 rows", "  kernels",
    ]  # fmt: skip
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"table.jsonl": "", "kernels.jsonl": ""}


def test_a_section_that_is_not_there_and_a_gpu_that_is_not(tmp_path: Path) -> None:
    done = bench("--out", tmp_path, "--sections", "tables")
    assert done.returncode == 2
    assert (
        "expected some of kernels, table, tune, engine, text, patch_apply, patch_extract, vllm, got tables"
        in done.stderr
    )
    if not torch.cuda.is_available():
        assert "torch finds no GPU here" in bench("--device", "cuda").stderr


# -- a GPU that is a stub ----------------------------------------------------------------------------------------------


class Stub:
    """Stands for torch.cuda: an event is reached when the device waits for the host, and a graph keeps its calls."""

    def __init__(self) -> None:
        self.reached: list[bool] = []
        self.replayed = 0

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        reached = self.reached.pop(0) if self.reached else False
        return SimpleNamespace(
            record=lambda: None, synchronize=lambda: None, query=lambda: reached, elapsed_time=lambda _: 3.0
        )

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=self._replay)

    @contextmanager
    def graph(self, _: object) -> Iterator[None]:
        yield

    def _replay(self) -> None:
        self.replayed += 1


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    for name in ("Event", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(stub, name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.syspath_prepend(BENCHMARKS)
    return stub


def test_a_loop_is_shortened_until_its_launches_are_queued(stub: Stub) -> None:
    import kernel_timing

    clock, turns = kernel_timing.CudaClock(torch.device("cpu"), copied=2**12), []
    loop = kernel_timing.Loop(turns.append, num_sets=3, num_calls=60)
    stub.reached = [True, False, True, False, False, False]  # start and end of three tries
    clock.settle(loop)
    assert (loop.num_calls, loop.is_host_bound) == (15, False)
    assert turns[:4] == [0, 1, 2, 0]
    assert clock.device(loop) == pytest.approx(3e-3 / 15)
    stub.reached = [True] * 100
    clock.settle(loop)
    assert (loop.num_calls, loop.is_host_bound) == (3, True)


def test_one_operation_on_a_gpu(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_options
    import gpu_table
    import kernel_timing

    shape = gpu_table.Shape(8, gpu_options.Options(torch.device("cpu"), True, float("inf"), ["table"]))
    clock = kernel_timing.CudaClock(torch.device("cpu"), copied=2**12)

    def call(self: Any, impl: str) -> Any:
        if impl == "broken":
            raise RuntimeError("no compiler")
        return lambda at: self.launched("torch", self.made(), at)

    monkeypatch.setattr(gpu_table.Operation, "call", call)
    rows = list(gpu_table._measured(shape.operations()[1], shape, ["triton", "cuda", "broken"], clock, repeats=2))
    by_way = {row.fields["impl"]: row.fields for row in rows if "first_call_ms" not in row.fields}
    assert by_way.keys() == {"chain", "triton", "cuda", "broken"}
    assert "no compiler" in by_way["broken"]["error"]
    assert (by_way["cuda"]["times_triton"], by_way["cuda"]["is_within_15_percent"]) == (1, True)
    assert by_way["triton"]["device_us"] == [1000] * 3  # the stub takes 3 ms for any loop, here of 3 calls
    assert by_way["triton"]["graph_us"] == [1500] * 3  # and for a replay, which is a call on each of 2 sets
    assert "error" not in by_way["triton"]
    assert stub.replayed
