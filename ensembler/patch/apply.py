"""Add patches to a model: its files copied block by block to a new folder, the patched rows changed on the way.

A block is a few rows of one tensor that stay in a core's cache; several tensors are on their way at once. Memory is a
few blocks and LoRA factors, whatever the size of the model. On a GPU a block has 32 MiB in fp32. Each thread has a
stream, a pinned block that it reads into and one that it writes from, so that one thread's copies and sums run while
others read and write.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensembler.errors import OutputError, RunError
from ensembler.files import check_not_input, read_json, reading, scratch_beside
from ensembler.patch.addition import DTYPES, SumCheck, WeightUpdate, block_rows, fill, patched, planned_update
from ensembler.patch.card import CARD, MADE_BY, Applied, write_card
from ensembler.patch.formats import ADAPTER_CONFIG, RECORD, Patch
from ensembler.patch.patch_device import (
    BLOCK_ELEMENTS,
    CPU,
    block_elements,
    host_memory,
    memory_of,
    num_workers,
    on_device,
    on_host,
    use_own_stream,
)
from ensembler.patch.patch_plan import PatchPlan, plan_patches
from ensembler.patch.requantize import Loss, kept_weights, plain_rows, requantized
from ensembler.patch.schemes.quantization_settings import is_scale, leave_alone, scales_of, settings_in
from ensembler.patch.schemes.scheme import QuantizedWeight
from ensembler.safetensors_files import (
    FLOATS,
    ITEM_BYTES,
    StoredTensor,
    header_bytes,
    index_file,
)

_KEPT_BYTES = 2**24
# Weights in other formats would still be those without the patch.
_WEIGHT_ENDINGS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot"),
    *(".tflite", ".bin.index.json", ".safetensors.index.json"),
)


def apply_patches(patches: Sequence[Patch], model: Path, out: Path, **options: Any) -> Applied:
    """Write `model` with the patches added to `out`, as `apply_plan` does; raises what `plan_patches` raises, too."""
    return apply_plan(plan_patches(patches, model), out, **options)


def apply_plan(
    plan: PatchPlan,
    out: Path,
    *,
    dtype: str | None = None,
    keep_bf16: Sequence[str] = (),
    overwrite: bool = False,
    device: torch.device = CPU,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Applied:
    """Write θ′ + Σ scale · Δθ to the new folder `out` (PortLLM, eq. 6), with all other files of the plan's model.

    Quantised weights are quantised again by their own scheme. `dtype`: float32, bfloat16 or float16 for all other
    tensors in one of the three (default: each keeps its own). `keep_bf16`: patterns of quantised modules that become
    plain ones, as `kept_weights` reads them. `overwrite` replaces an earlier result. `device`: computes the sums.
    `advance` is called with the bytes of each tensor that is written, from several threads. Raises InputError (NaN in a
    patch, a file that cannot be read) and RunError (a full disk, a sum out of range); neither leaves anything behind.
    """
    model = plan.model.folder
    check_output(plan, out, overwrite=overwrite)
    kept = kept_weights(plan, keep_bf16)
    targets = _targets(plan, kept, dtype)
    num_bytes = sum(target.num_bytes for target in targets)
    with new_folder(out, num_bytes, overwrite=overwrite) as made:
        _copy_other_files(model, made)  # first: a file that cannot be read shows before the long work
        with memory_of(device):
            losses = _write_weights(plan, targets, kept, made, device, advance)
        applied = Applied(num_bytes, losses, tuple(name.removesuffix(".weight") for name in kept))
        write_card(plan, made, out.name, applied)
        _write_config(plan, targets, made, applied, dtype)
    return applied


def check_output(plan: PatchPlan, out: Path, *, overwrite: bool = False) -> None:
    """Raise OutputError where a patched model may not be written to `out`."""
    check_not_input(out, plan.model.folder, *(patch.folder for patch in plan.patches))
    check_free(out.expanduser().resolve(), overwrite=overwrite)


@contextmanager
def new_folder(out: Path, num_bytes: int, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder beside `out` that takes its name when the block ends well, and vanishes when it does not.

    `overwrite` lets it replace a patch or a model that `ensembler patch` made, and nothing else. Raises OutputError
    where `out` is taken or its disk has no `num_bytes` left, RunError where writing fails.
    """
    out = out.expanduser().resolve()
    is_taken = check_free(out, overwrite=overwrite)
    try:
        with scratch_beside(out) as scratch:
            free = shutil.disk_usage(out.parent).free
            if free < num_bytes:
                raise OutputError(
                    f"{out.parent} has {free:,} bytes free, and {num_bytes:,} are needed; choose another disk"
                )
            made = scratch / "made"
            made.mkdir()
            yield made
            if is_taken:
                out.rename(scratch / "old")
            try:
                made.rename(out)
            except OSError:
                if is_taken:
                    (scratch / "old").rename(out)
                raise
    except OSError as error:
        reason = error.strerror or "not all files could be copied"
        raise RunError(f"{out} could not be written: {reason}; nothing was left") from error


def check_free(out: Path, *, overwrite: bool = False) -> bool:
    """Return whether a result lies at `out` that is to be replaced; raise OutputError where it may not be."""
    is_taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if is_taken and not overwrite:
        raise OutputError(f"{out} exists already; choose another name for the output, or add --overwrite")
    if is_taken and not _is_result(out):
        raise OutputError(f"{out} holds something else than a result of `ensembler patch`; choose another name")
    if out.is_mount():
        raise OutputError(f"{out} is a disk's own folder, which no other can replace; name a new folder in it")
    return is_taken


def _is_result(folder: Path) -> bool:
    card = folder / CARD
    return (folder / RECORD).is_file() or (card.is_file() and MADE_BY in card.read_text("utf-8", errors="replace"))


def _targets(plan: PatchPlan, kept: Sequence[str], dtype: str | None) -> list[StoredTensor]:
    """Return the tensors of the new files, with the file of the old ones and their dtypes and bytes in the new."""
    parts = {part.name: weight for weight in plan.quantized.values() for part in weight.parts.values()}
    config = plan.model.config
    is_quantized = bool(settings_in(config))
    own = str(dtype or config.get("dtype") or config.get("torch_dtype"))  # the rest of the model is loaded in that
    unused = scales_of({name.removesuffix(".weight") for name in kept}, plan.model.tensors) - parts.keys()
    targets = []
    for name, tensor in plan.model.tensors.items():
        weight = parts.get(name)
        if name in unused:
            continue
        if weight is None:
            is_cast = tensor.dtype in FLOATS.values() and not (is_quantized and is_scale(name))
            targets.append(_as(tensor, FLOATS[dtype]) if dtype is not None and is_cast else tensor)
        elif weight.name not in kept:
            targets.append(tensor)
        elif name == next(iter(weight.parts.values())).name:  # what becomes plain stands where its codes were
            targets.append(_as(replace(tensor, name=weight.name, shape=weight.shape), FLOATS.get(own, "BF16")))
    return targets


def _as(tensor: StoredTensor, word: str) -> StoredTensor:
    return replace(tensor, dtype=word, num_bytes=tensor.num_elements * ITEM_BYTES[word])


def make_header(entries: dict[str, object], *, length: int = 0) -> bytes:
    """Return the first bytes of a safetensors file: the length, and JSON padded to 8 bytes or to `length`."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(max(-(-len(text) // 8) * 8, length - 8))
    return struct.pack("<Q", len(text)) + text


def _copy_other_files(model: Path, made: Path) -> None:
    """Copy everything of the model but its weights, its card, config.json, and an adapter's configuration.

    transformers would load a model with the latter in its folder as that adapter on the adapter's own base. Of indices
    the one that is read is copied.
    """
    index = index_file(model)

    def left_out(folder: str, names: list[str]) -> set[str]:
        top = ("config.json", CARD, ADAPTER_CONFIG) if Path(folder) == model else ()
        weights = {name for name in names if name.endswith(_WEIGHT_ENDINGS) and Path(folder, name) != index}
        return weights | {name for name in names if name.startswith(".") or name in top}

    mode = made.stat().st_mode  # a model that may only be read is no reason for a result that cannot be finished
    shutil.copytree(model, made, ignore=left_out, dirs_exist_ok=True, copy_function=_copy)
    made.chmod(mode)


def _copy(source: str | Path, target: str | Path) -> None:
    """Copy a file. Raises MemberError where it cannot be read."""
    with Path(target).open("wb") as file:
        file.writelines(_chunks(Path(source)))


def _chunks(file: Path) -> Iterator[bytes]:
    with reading(file), file.open("rb") as content:
        while chunk := content.read(BLOCK_ELEMENTS):
            yield chunk


def _write_config(
    plan: PatchPlan, targets: Sequence[StoredTensor], made: Path, applied: Applied, dtype: str | None
) -> None:
    """Write config.json and the index with what changed in them; the last step, since it makes the folder a model."""
    model = plan.model.folder
    if dtype is None and not applied.kept:
        _copy(model / "config.json", made / "config.json")
        return
    index = index_file(model)
    if index is not None:
        content = read_json(index)
        content["metadata"] = {**content.get("metadata", {}), "total_size": applied.num_bytes}
        content["weight_map"] = {target.name: target.file.name for target in targets}
        (made / index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    config = read_json(model / "config.json")
    for settings in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and key in settings:
                settings[key] = dtype
    if applied.kept:
        parts = {part.name for weight in plan.quantized.values() for part in weight.parts.values()}
        plain = [name for name, tensor in plan.model.tensors.items() if name not in parts and len(tensor.shape) == 2]
        modules = [name.removesuffix(".weight") for name in plain if name.endswith(".weight")]
        leave_alone(settings_in(config), applied.kept, [*modules, "lm_head"])
    (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    plan: PatchPlan,
    targets: Sequence[StoredTensor],
    kept: Sequence[str],
    made: Path,
    device: torch.device,
    advance: Callable[[int], None],
) -> dict[str, float]:
    """Fill the weights files, the largest tensors first, so that all cores end together; return what was lost."""
    by_file: dict[Path, list[StoredTensor]] = {}
    for target in targets:
        by_file.setdefault(target.file, []).append(target)
    placed = {new.name: new for file, inside in by_file.items() for new in _begin_file(file, made, inside)}
    changed = set(plan.names)
    again = [weight for name, weight in plan.quantized.items() if name in changed and name not in kept]
    apart = {*kept, *(part.name for weight in again for part in weight.parts.values())}
    tensors = [(plan.model.tensors[name], target) for name, target in placed.items() if name not in apart]
    losses: dict[str, float] = {}
    stopped = threading.Event()
    own = threading.local()  # one buffer for each thread: fresh memory for every tensor would cost page faults

    def prepare() -> None:
        torch.set_num_threads(1)
        use_own_stream(device)
        longest = max([block_rows(*source.matrix, device) * _row_bytes(source) for source, _ in tensors], default=0)
        own.buffer = host_memory(max(longest, 2 * block_elements(device)), device)

    def write(source: StoredTensor, target: StoredTensor) -> int:
        update = planned_update(plan, source.name) if source.name in changed else None
        with target.file.open("r+b", buffering=0) as new:
            new.seek(target.start)
            for block in _blocks(source, target, update, own.buffer, device):
                put(new, block)
        return target.num_bytes

    def write_again(weight: QuantizedWeight) -> int:
        update, loss = planned_update(plan, weight.name), Loss()
        with ExitStack() as stack:
            files = {placed[part.name].file for part in weight.parts.values()}
            opened = {file: stack.enter_context(file.open("r+b", buffering=0)) for file in files}
            for part, start, rows in requantized(weight, update, loss, device=device):
                target = placed[weight.parts[part].name]
                new = opened[target.file]
                new.seek(target.start + start * _row_bytes(weight.parts[part]))
                put(new, _as_bytes(on_host(rows)))
        losses[weight.name.removesuffix(".weight")] = loss.share
        return sum(part.num_bytes for part in weight.parts.values())

    def write_plain(weight: QuantizedWeight) -> int:
        target = placed[weight.name]
        update = planned_update(plan, weight.name) if weight.name in changed else WeightUpdate()
        with target.file.open("r+b", buffering=0) as new:
            for start, rows in plain_rows(weight, update, DTYPES[target.dtype], device=device):
                new.seek(target.start + start * _row_bytes(target))
                put(new, _as_bytes(on_host(rows)))
        return target.num_bytes

    def put(new: FileIO, data: memoryview) -> None:
        while data and not stopped.is_set():  # a write may take less, on a disk that is nearly full
            data = data[new.write(data) :]

    jobs: list[tuple[int, Callable[[], int]]] = [
        *((target.num_bytes, partial(write, source, target)) for source, target in tensors),
        *((weight.num_elements, partial(write_again, weight)) for weight in again),
        *((plan.quantized[name].num_elements, partial(write_plain, plan.quantized[name])) for name in kept),
    ]
    jobs.sort(key=lambda job: job[0], reverse=True)
    num_threads = torch.get_num_threads()
    # Freed at once, and glibc then keeps freed memory up to twice this size: new pages for every block would cost a
    # quarter of the time of quantised weights.
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)
    with ThreadPoolExecutor(num_workers(device), initializer=prepare) as pool:
        try:
            for done in as_completed([pool.submit(job) for _, job in jobs]):
                advance(done.result())
        except BaseException:  # Ctrl-C too: the others need not finish what is thrown away
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(num_threads)
    return {name: losses[name] for name in sorted(losses)}


def _begin_file(old: Path, made: Path, targets: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Write the header of a new file, take its space on disk, and return the tensors with their positions in it.

    They lie as in the old file, unless another dtype changes their sizes.
    """
    before = json.loads(header_bytes(old)[8:])
    names = {target.name for target in targets}
    header = {name: entry for name, entry in before.items() if name in names or name == "__metadata__"}
    end = 0
    for target in targets:
        offsets = [end, end + target.num_bytes]
        header[target.name] = {"dtype": target.dtype, "shape": target.shape, "data_offsets": offsets}
        end += target.num_bytes
    head = make_header(header)
    new = made / old.name
    with new.open("wb") as file:
        _reserve(file.fileno(), len(head) + end)
        file.write(head)
    return [replace(target, file=new, start=len(head) + header[target.name]["data_offsets"][0]) for target in targets]


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Take the whole file's space on disk: a full disk shows at once, and writing into it is twice as quick on ext4."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except (AttributeError, OSError) as error:  # macOS has no such call, and some file systems refuse it
        if getattr(error, "errno", errno.EOPNOTSUPP) not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.truncate(descriptor, num_bytes)


def _blocks(
    source: StoredTensor, target: StoredTensor, update: WeightUpdate | None, buffer: Tensor, device: torch.device
) -> Iterator[memoryview]:
    """Yield the bytes of one tensor block by block, changed and cast on the way; sums are checked at the end.

    Raises MemberError, and what `patched` raises.
    """
    with reading(source.file), source.file.open("rb", buffering=0) as file:
        file.seek(source.start)
        if update is None and target.dtype == source.dtype:
            for start in range(0, source.num_bytes, len(buffer)):
                data = _as_bytes(buffer[: source.num_bytes - start])
                fill(data, file, source)
                yield data
            return
        rows, columns = source.matrix
        dtype = DTYPES[target.dtype]
        update = update or WeightUpdate()
        check, update = SumCheck(update, dtype), update.to(device)
        step = max(1, block_rows(rows, columns, device))
        for start in range(0, rows if columns else 0, step):
            block = buffer[: min(step, rows - start) * _row_bytes(source)]
            fill(_as_bytes(block), file, source)
            weight = on_device(block.view(DTYPES[source.dtype]).view(-1, columns), device)
            yield _as_bytes(on_host(patched(weight, update, dtype=dtype, start=start, check=check)))
        check.close()


def _row_bytes(stored: StoredTensor) -> int:
    return stored.num_bytes // max(1, stored.matrix[0])


def _as_bytes(values: Tensor) -> memoryview:
    array: Any = values.reshape(-1).view(torch.uint8).numpy()  # a view of values in a row: nothing is copied
    return memoryview(array).cast("B")
