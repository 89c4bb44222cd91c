"""Measure the cost of adding a patch: time over `cp` of the same files, peak memory, and PEFT's own merge.

    python benchmarks/patch_apply.py MODEL          a model folder (the committed row: SmolLM2-135M-Instruct in fp32)
    python benchmarks/patch_apply.py --layers 9     a synthetic sharded Llama of 4 GB in bf16, made and removed
    python benchmarks/patch_apply.py --fp8 ...      the same model in FP8 with a scale for each 128 x 128 values

The patch is a LoRA of r = 8 on all attention and MLP matrices with random factors, made by PEFT. Each repeat is a fresh
process for the patch and one `cp -r`, by turns, on the same disk, the files in the page cache; the start of the process
(imports) is counted apart. Peak memory is the largest resident size of such a process. PEFT loads the model, merges and
saves, its imports counted apart too; it has no merge into FP8. One JSON row is appended to
benchmarks/results/patch_apply.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "patch_apply.jsonl"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Row:
    """One run: medians, with the smallest and the largest of the repeats. Ratios are over the `cp` of the same turn."""

    model: str
    num_bytes: int
    num_files: int
    dtype: str
    largest_tensor_mb: float
    repeats: int
    cp_seconds: float
    cp_spread: tuple[float, float]
    apply_seconds: float
    apply_spread: tuple[float, float]
    ratio: float
    ratio_spread: tuple[float, float]
    start_seconds: float
    apply_peak_mb: float
    allowed_peak_mb: float
    peft_seconds: float | None
    peft_peak_mb: float | None
    check_seconds: float
    threads: int
    machine: str
    versions: dict[str, str]
    date: str


def make_llama(folder: Path, num_layers: int) -> None:
    """A Llama of the 7B's width with random bf16 weights, one shard for every two layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(num_hidden_layers=num_layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    config.save_pretrained(folder)
    shards: dict[int, list[str]] = {}
    for name in shapes:
        layer = int(name.split(".")[2]) if ".layers." in name else num_layers
        shards.setdefault(layer // 2, []).append(name)
    weight_map, total = {}, 0
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_fp8(model: Path, folder: Path) -> None:
    """Write a model with its attention and MLP matrices in FP8, in the files of the model."""
    import torch
    from safetensors.torch import load_file, save_file

    from ensembler.patch.schemes.fp8 import FP8, SCALE, WEIGHT

    folder.mkdir()
    weight_map, total = {}, 0
    for file in sorted(model.glob("*.safetensors")):
        tensors = {}
        for name, weight in load_file(file).items():
            tensors[name] = weight
            if name.removesuffix(".weight").endswith(tuple(LINEAR)):
                rows, columns = weight.shape
                empty = {SCALE: torch.zeros(-(-rows // 128), -(-columns // 128))}
                parts = FP8((rows, columns), (128, 128)).quantize(weight.float(), empty)
                tensors |= {name: parts[WEIGHT], f"{name}_scale_inv": parts[SCALE]}
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((model / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def make_lora(model: Path, out: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
    patched = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype="auto"), settings)
    for name, parameter in patched.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    patched.save_pretrained(out)


def work(kind: str, model: Path, lora: Path, out: Path) -> dict[str, float]:
    """Return the seconds of a fresh process without imports, and its peak resident size."""
    if kind == "apply":
        from ensembler.patch.apply import apply_patches
        from ensembler.patch.formats import read_patch

        start = time.perf_counter()
        apply_patches([read_patch(lora)], model, out)
    else:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        start = time.perf_counter()
        base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        PeftModel.from_pretrained(base, lora).merge_and_unload().save_pretrained(out)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """The largest resident size of this process in MB; not ru_maxrss, which counts the process that started it too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def fresh(kind: str, model: Path, lora: Path, out: Path) -> dict[str, float]:
    """Run `work` in a fresh process; add the seconds of its start, and remove what it wrote."""
    command = [sys.executable, __file__, "--work", kind, str(model), str(lora), str(out)]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    found["start"] = time.perf_counter() - start - found["seconds"]
    settle(out)
    return found


def copied(model: Path, out: Path) -> float:
    """Seconds of `cp -r`."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", model, out], check=True)
    seconds = time.perf_counter() - start
    settle(out)
    return seconds


def settle(out: Path) -> None:
    """Remove a result and let the disk come to rest, so that the next is not charged for it."""
    shutil.rmtree(out)
    os.sync()


def checked(model: Path, lora: Path) -> float:
    """Seconds of `ensembler patch apply --check`, start of the process included."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "ensembler", "patch", "apply", str(lora), "--to", str(model), "--check"]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def measure(model: Path, lora: Path, out: Path, repeats: int, peft_repeats: int) -> Row:
    from ensembler import __version__
    from ensembler.safetensors_files import read_model

    tensors = read_model(model).tensors.values()
    copies, patches = [], []
    for repeat in range(repeats + 1):
        pair = {}
        for kind in ("cp", "apply") if repeat % 2 else ("apply", "cp"):
            pair[kind] = copied(model, out) if kind == "cp" else fresh("apply", model, lora, out)
        if repeat:  # the first fills the page cache
            copies.append(pair["cp"])
            patches.append(pair["apply"])
            print(f"cp {pair['cp']:.3f} s, patch {pair['apply']['seconds']:.3f} s", file=sys.stderr)
    merges = [fresh("peft", model, lora, out) for _ in range(peft_repeats)]
    seconds = [found["seconds"] for found in patches]
    ratios = [patch / copy for patch, copy in zip(seconds, copies, strict=True)]
    largest = max(tensor.num_bytes for tensor in tensors) / 1e6
    import torch
    import transformers

    return Row(
        model=model.name,
        num_bytes=sum(path.stat().st_size for path in model.iterdir()),
        num_files=len({tensor.file for tensor in tensors}),
        dtype="/".join(sorted({tensor.dtype for tensor in tensors})),
        largest_tensor_mb=round(largest, 1),
        repeats=repeats,
        cp_seconds=round(statistics.median(copies), 4),
        cp_spread=spread(copies),
        apply_seconds=round(statistics.median(seconds), 4),
        apply_spread=spread(seconds),
        ratio=round(statistics.median(ratios), 3),
        ratio_spread=spread(ratios),
        start_seconds=round(statistics.median(found["start"] for found in patches), 3),
        apply_peak_mb=round(max(found["peak_mb"] for found in patches), 1),
        allowed_peak_mb=round(300 + 4 * largest, 1),
        peft_seconds=round(statistics.median(found["seconds"] for found in merges), 3) if merges else None,
        peft_peak_mb=round(max(found["peak_mb"] for found in merges), 1) if merges else None,
        check_seconds=round(statistics.median(checked(model, lora) for _ in range(3)), 3),
        threads=len(os.sched_getaffinity(0)),
        machine=f"{platform.machine()} CPU",
        versions={"ensembler": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        date=time.strftime("%Y-%m-%d"),
    )


def spread(values: list[float]) -> tuple[float, float]:
    return round(min(values), 4), round(max(values), 4)


def print_table(rows: list[dict[str, Any]]) -> None:
    """The table of docs/results-speed.md and more, a column for every row."""
    print("| | " + " | ".join(row["model"] for row in rows) + " |")
    print("|---" * (len(rows) + 1) + "|")
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "weights": lambda row: f"{row['num_bytes'] / 1e9:.2f} GB {row['dtype']}, {row['num_files']} files",
        "`cp -r`": lambda row: f"{row['cp_seconds']:.2f} s ({row['cp_spread'][0]:.2f} to {row['cp_spread'][1]:.2f})",
        "patch apply": lambda row: (
            f"{row['apply_seconds']:.2f} s ({row['apply_spread'][0]:.2f} to {row['apply_spread'][1]:.2f})"
        ),
        "apply over cp": lambda row: (
            f"{row['ratio']:.2f} ({row['ratio_spread'][0]:.2f} to {row['ratio_spread'][1]:.2f})"
        ),
        "start of the process": lambda row: f"{row['start_seconds']:.1f} s",
        "peak memory": lambda row: f"{row['apply_peak_mb']:.0f} MB",
        "300 MB + 4 largest tensors": lambda row: f"{row['allowed_peak_mb']:.0f} MB",
        "PEFT: load, merge, save": lambda row: "" if row["peft_seconds"] is None else f"{row['peft_seconds']:.1f} s",
        "PEFT: peak memory": lambda row: "" if row["peft_peak_mb"] is None else f"{row['peft_peak_mb']:.0f} MB",
        "`--check`, with its start": lambda row: f"{row['check_seconds']:.1f} s",
    }
    for name, show in lines.items():
        print(f"| {name} | " + " | ".join(map(show, rows)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=9, help="of the synthetic Llama, 405 MB each")
    parser.add_argument("--fp8", action="store_true", help="turn the model into FP8 first, and leave out PEFT's merge")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peft-repeats", type=int, default=3)
    parser.add_argument("--disk", type=Path, help="where results are written (default: the temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the rows as a table")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print_table([json.loads(line) for line in args.results.read_text("utf-8").splitlines()])
        return
    if args.work:
        kind, model, lora, out = args.work[0], *map(Path, args.work[1:])
        if kind == "lora":
            make_lora(model, lora)
        else:
            print(json.dumps(work(kind, model, lora, out)))
        return
    with tempfile.TemporaryDirectory(dir=args.disk) as place:
        model = args.model
        if model is None:
            model = Path(place) / f"llama-{args.layers}-layers"
            make_llama(model, args.layers)
        command = [sys.executable, __file__, "--work", "lora", str(model), str(Path(place) / "lora"), ""]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        if args.fp8:
            plain, model = model, Path(place) / f"{model.name}-fp8"
            make_fp8(plain, model)
        os.sync()
        peft_repeats = 0 if args.fp8 else args.peft_repeats
        row = measure(model, Path(place) / "lora", Path(place) / "out", args.repeats, peft_repeats)
    with args.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")
    print(json.dumps(asdict(row), indent=2))


if __name__ == "__main__":
    main()
