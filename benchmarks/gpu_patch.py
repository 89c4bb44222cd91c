"""Sections `patch_apply` and `patch_extract` of `gpu.py`: patches on the device, on the CPU, and a plain copy.

The model is a random Llama, 1B of Llama 3.2, in bf16 and with its matrices in FP8 (blocks of 128 x 128); the patch is a
LoRA of r = 8 on all attention and MLP matrices. `patch_apply` adds it on both devices and copies the folder, by turns,
with the files in the page cache, and verifies both results. `patch_extract` takes a LoRA of rank 16 from 4 layers of
the model and the same with the patch: large matrices (above 1,024) are decomposed at random, others in batches.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gpu_engine
import patch_apply as files
import torch
from gpu_options import Options, Row
from kernel_timing import Spread, interleaved, seconds_of

COPY, RANK = "copy", 16


def patch_apply(options: Options) -> Iterator[Row]:
    """Time the addition of a LoRA to a plain and to an FP8 model."""
    from ensembler.patch.apply import apply_plan
    from ensembler.patch.formats import read_patch
    from ensembler.patch.patch_plan import plan_patches
    from ensembler.patch.verify import verify_applied

    if not options.has_time("patch_apply"):
        return
    with tempfile.TemporaryDirectory() as folder:
        model, lora = _save_model(Path(folder), options)
        for kind in ("bf16", "fp8"):
            if not options.has_time(f"patch_apply: {kind}"):
                continue
            if kind == "fp8":
                files.make_fp8(model, Path(folder) / kind)
                model = Path(folder) / kind
            plan, out = plan_patches([read_patch(lora)], model), Path(folder) / "out"
            for device in _devices(options).values():
                apply_plan(plan, out, device=device, overwrite=True)
                verify_applied(plan, out, device=device)  # a wrong result fails the section

            def applied(device: torch.device, plan: Any = plan, out: Path = out) -> None:
                apply_plan(plan, out, device=device)

            yield from _rows(f"patch apply, {kind}", _seconds(model, out, applied, options), model, options)


def patch_extract(options: Options) -> Iterator[Row]:
    """Time the extraction of a LoRA from two models."""
    from ensembler.patch.apply import apply_patches
    from ensembler.patch.extract import extract_patch
    from ensembler.patch.formats import read_patch

    if not options.has_time("patch_extract"):
        return
    with tempfile.TemporaryDirectory() as folder:
        model, lora = _save_model(Path(folder), options, num_layers=4)
        tuned, out = Path(folder) / "tuned", Path(folder) / "out"
        apply_patches([read_patch(lora)], model, tuned)
        energy: dict[str, float] = {}

        def extracted(device: torch.device) -> None:
            energy[device.type] = extract_patch(model, tuned, out, rank=RANK, device=device).energy

        times = _seconds(tuned, out, extracted, options)
        for row in _rows(f"patch extract, rank {RANK}", times, tuned, options):
            if row.fields["way"] in energy:
                row.fields["energy"] = round(energy[row.fields["way"]], 6)
            yield row


def _save_model(folder: Path, options: Options, num_layers: int | None = None) -> tuple[Path, Path]:
    """Save a random model and a LoRA on it; return their folders."""
    shape = gpu_engine.SMALL if options.small else gpu_engine.ONE_B
    if num_layers is not None and not options.small:
        shape = {**shape, "num_hidden_layers": num_layers}
    model, lora = folder / "model", folder / "lora"
    with torch.inference_mode(mode=False):
        gpu_engine.llama(shape, 0, options.device).to(torch.bfloat16).save_pretrained(model)
        files.make_lora(model, lora)
    return model, lora


def _devices(options: Options) -> dict[str, torch.device]:
    return {device.type: device for device in (torch.device("cpu"), options.device)}


def _seconds(
    model: Path, out: Path, work: Callable[[torch.device], None], options: Options
) -> dict[str, tuple[Spread, int]]:
    """Return the seconds of a copy of the model and of the work on each device, by turns, and the device's peak bytes.

    What lies at `out` is removed before each turn, and that is not timed.
    """
    peaks = dict.fromkeys([COPY, *_devices(options)], 0)

    def timed(call: Callable[[], object], way: str) -> Callable[[], float]:
        def measure() -> float:
            shutil.rmtree(out, ignore_errors=True)
            on_gpu = way == "cuda"
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(options.device)
            seconds = seconds_of(call)
            peaks[way] = max(peaks[way], torch.cuda.max_memory_allocated(options.device) if on_gpu else 0)
            return seconds

        return measure

    ways = {COPY: timed(lambda: shutil.copytree(model, out), COPY)}
    for name, device in _devices(options).items():
        ways[name] = timed(partial(work, device), name)
    times = interleaved(ways, 2 if options.small else 4)
    return {way: (spread, peaks[way]) for way, spread in times.items()}


def _rows(case: str, times: dict[str, tuple[Spread, int]], model: Path, options: Options) -> Iterator[Row]:
    num_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    copy, _ = times[COPY]
    for way, (spread, peak) in times.items():
        fields: dict[str, Any] = {
            "way": way,
            "num_bytes": num_bytes,
            "threads": torch.get_num_threads(),
            "seconds": [round(seconds, 4) for seconds in (spread.lower, spread.median, spread.upper)],
            "times_copy": round(spread.median / copy.median, 3),
        }
        cell = f"{spread.median:.2f} s"
        if way != COPY:
            fields["times_cpu"] = round(spread.median / times["cpu"][0].median, 3)
            cell += f", {fields['times_copy']:.2f} x copy"
        if peak:
            fields["device_peak_mb"] = round(peak / 1e6)
            cell += f", {fields['device_peak_mb']} MB on the device"
        yield Row(case, fields, {way: cell})
