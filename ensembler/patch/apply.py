"""Add patches to a model: its files copied block by block to a new folder, the patched rows changed on the way.

A block is a few rows of one tensor that stay in a core's cache; several tensors are on their way at once. Memory is a
few blocks and LoRA factors, whatever the size of the model.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from ensembler.errors import OutputError, RunError
from ensembler.files import check_not_input, file_digest, model_name, read_json, reading, scratch_beside
from ensembler.patch.addition import BLOCK_ELEMENTS, DTYPES, WeightUpdate, block_rows, fill, load_update, patched
from ensembler.patch.formats import ADAPTER_CONFIG, RECORD, Patch
from ensembler.patch.patch_plan import PatchPlan, plan_patches
from ensembler.safetensors_files import (
    FLOATS,
    ITEM_BYTES,
    StoredTensor,
    fingerprint,
    header_bytes,
    index_file,
    stored_tensors,
    weight_files,
)

_CARD = "README.md"
_KEPT_IN_CARD = ("license", "license_name", "license_link", "language")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_MADE_BY = "`ensembler patch apply`"
_CARD_TEXT = """
# {title}

Made by addition, without training: a model and {count} (PortLLM, [arXiv 2410.10870](https://arxiv.org/abs/2410.10870),
eq. 6), with {made_by}.

| | what | made for | strength | hash |
|---|---|---|---|---|
| model | {model} | | | {before} |
{rows}
| result | {num_changed} of {num_tensors} tensors changed | | | {after} |

The hash of a patch is the SHA-256 of its weights file. That of a model is a fingerprint: the SHA-256 over name, dtype,
shape and the first 4 KiB of every tensor in the order of names.
{notes}
"""
# Weights in other formats would still be those without the patch.
_WEIGHT_ENDINGS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot"),
    *(".tflite", ".bin.index.json", ".safetensors.index.json"),
)


def apply_patches(patches: Sequence[Patch], model: Path, out: Path, **options: Any) -> int:
    """Write `model` with the patches added to `out`, as `apply_plan` does; raises what `plan_patches` raises, too."""
    return apply_plan(plan_patches(patches, model), out, **options)


def apply_plan(
    plan: PatchPlan,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> int:
    """Write θ′ + Σ scale · Δθ to the new folder `out` (PortLLM, eq. 6), with all other files of the plan's model.

    `dtype`: float32, bfloat16 or float16 for all tensors in one of the three (default: each keeps its own).
    `overwrite` replaces an earlier result. `advance` is called with the bytes of each tensor that is written, from
    several threads. Returns the bytes of the weights. Raises InputError (NaN in a patch, a file that cannot be read)
    and RunError (a full disk, a sum out of range); neither leaves anything behind.
    """
    model = plan.model.folder
    check_not_input(out, model, *(patch.folder for patch in plan.patches))
    targets = [_converted(tensor, dtype) for tensor in plan.model.tensors.values()]
    num_bytes = sum(target.num_bytes for target in targets)
    with new_folder(out, num_bytes, overwrite=overwrite) as made:
        _copy_other_files(model, made)  # first: a file that cannot be read shows before the long work
        _write_weights(plan, targets, made, advance)
        _write_card(plan, made, out.name)
        _write_config(model, made, num_bytes, dtype)
    return num_bytes


@contextmanager
def new_folder(out: Path, num_bytes: int, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder beside `out` that takes its name when the block ends well, and vanishes when it does not.

    `overwrite` lets it replace a patch or a model that `ensembler patch` made, and nothing else. Raises OutputError
    where `out` is taken or its disk has no `num_bytes` left, RunError where writing fails.
    """
    out = out.expanduser().resolve()
    is_taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if is_taken and not overwrite:
        raise OutputError(f"{out} exists already; choose another name for the output, or add --overwrite")
    if is_taken and not _is_result(out):
        raise OutputError(f"{out} holds something else than a result of `ensembler patch`; choose another name")
    if out.is_mount():
        raise OutputError(f"{out} is a disk's own folder, which no other can replace; name a new folder in it")
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


def _is_result(folder: Path) -> bool:
    card = folder / _CARD
    return (folder / RECORD).is_file() or (card.is_file() and _MADE_BY in card.read_text("utf-8", errors="replace"))


def _converted(source: StoredTensor, dtype: str | None) -> StoredTensor:
    """Return the tensor with its dtype and bytes in the new file."""
    if dtype is None or source.dtype not in FLOATS.values():
        return source
    word = FLOATS[dtype]
    return replace(source, dtype=word, num_bytes=source.num_elements * ITEM_BYTES[word])


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
        top = ("config.json", _CARD, ADAPTER_CONFIG) if Path(folder) == model else ()
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


def _write_config(model: Path, made: Path, num_bytes: int, dtype: str | None) -> None:
    """Write config.json, which makes the folder a model, so the last of all; `dtype` in it and the index's total."""
    if dtype is None:
        _copy(model / "config.json", made / "config.json")
        return
    index = index_file(model)
    if index is not None:
        content = read_json(index)
        content["metadata"] = {**content.get("metadata", {}), "total_size": num_bytes}
        (made / index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    config = read_json(model / "config.json")
    for settings in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in ("dtype", "torch_dtype"):
            if key in settings:
                settings[key] = dtype
    (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    plan: PatchPlan, targets: Sequence[StoredTensor], made: Path, advance: Callable[[int], None]
) -> None:
    """Fill the weights files; the largest tensors first, so that all cores end together."""
    placed = [
        target
        for file in weight_files(plan.model.folder)
        for target in _begin_file(file, made, [target for target in targets if target.file == file])
    ]
    tensors = [(plan.model.tensors[target.name], target) for target in placed]
    tensors.sort(key=lambda pair: pair[1].num_bytes, reverse=True)
    changed = set(plan.names)
    stopped = threading.Event()
    own = threading.local()  # one buffer for each thread: fresh memory for every tensor would cost page faults

    def prepare() -> None:
        torch.set_num_threads(1)
        longest = max(block_rows(*source.matrix) * _row_bytes(source) for source, _ in tensors)
        own.buffer = torch.empty(max(longest, 2 * BLOCK_ELEMENTS), dtype=torch.uint8)

    def write(source: StoredTensor, target: StoredTensor) -> int:
        update = load_update(plan.patches, source.name) if source.name in changed else None
        with target.file.open("r+b", buffering=0) as new:
            new.seek(target.start)
            for block in _blocks(source, target, update, own.buffer):
                data = block
                while data and not stopped.is_set():  # a write may take less, on a disk that is nearly full
                    data = data[new.write(data) :]
        return target.num_bytes

    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, initializer=prepare) as pool:
        try:
            for done in as_completed([pool.submit(write, *pair) for pair in tensors]):
                advance(done.result())
        except BaseException:  # Ctrl-C too: the others need not finish what is thrown away
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(num_threads)


def _begin_file(old: Path, made: Path, targets: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Write the header of a new file, take its space on disk, and return the tensors with their positions in it.

    They lie as in the old file, unless another dtype changes their sizes.
    """
    header = json.loads(header_bytes(old)[8:])
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
    source: StoredTensor, target: StoredTensor, update: WeightUpdate | None, buffer: Tensor
) -> Iterator[memoryview]:
    """Yield the bytes of one tensor block by block, changed and cast on the way. Raises MemberError."""
    with reading(source.file), source.file.open("rb", buffering=0) as file:
        file.seek(source.start)
        if update is None and target.dtype == source.dtype:
            for start in range(0, source.num_bytes, len(buffer)):
                data = _as_bytes(buffer[: source.num_bytes - start])
                fill(data, file, source)
                yield data
            return
        rows, columns = source.matrix
        step = max(1, block_rows(rows, columns))
        for start in range(0, rows if columns else 0, step):
            block = buffer[: min(step, rows - start) * _row_bytes(source)]
            fill(_as_bytes(block), file, source)
            weight = block.view(DTYPES[source.dtype]).view(-1, columns)
            yield _as_bytes(patched(weight, update or WeightUpdate(), dtype=DTYPES[target.dtype], start=start))


def _row_bytes(stored: StoredTensor) -> int:
    return stored.num_bytes // max(1, stored.matrix[0])


def _as_bytes(values: Tensor) -> memoryview:
    array: Any = values.view(torch.uint8).numpy()  # a view: nothing is copied
    return memoryview(array).cast("B")


def _write_card(plan: PatchPlan, made: Path, title: str) -> None:
    """Write the card of the patched model in `made`, with the licence and languages that the model's own card says."""
    model = plan.model
    kept: dict[str, Any] = {}
    if (model.folder / _CARD).is_file():
        try:
            old = ModelCard.load(model.folder / _CARD).data
            kept = {key: value for key in _KEPT_IN_CARD if (value := old.get(key)) is not None}
        except Exception:  # a card is prose: one that cannot be read is no reason to refuse the weights
            kept = {}
    written = [tensor for file in made.glob("*.safetensors") for tensor in stored_tensors(file).values()]
    data = ModelCardData(base_model=model.name, tags=["ensembler", "model-patch"], **kept)
    text = _CARD_TEXT.format(
        title=title,
        count="a patch" if len(plan.patches) == 1 else f"{len(plan.patches)} patches",
        made_by=_MADE_BY,
        model=model.name,
        before=f"fingerprint {model.fingerprint()}",
        rows="\n".join(_card_row(patch) for patch in plan.patches),
        num_changed=len(plan.names),
        num_tensors=len(model.tensors),
        after=f"fingerprint {fingerprint(written)}",
        notes="".join(f"\n- {note}" for note in plan.notes),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text.rstrip()}\n").save(made / _CARD)


def _card_row(patch: Patch) -> str:
    hashes = ", ".join(f"{path.name} {file_digest(path)}" for path in patch.files)
    base = (patch.base if _HUB_ID.fullmatch(patch.base) else Path(patch.base).name) if patch.base else "not said"
    return f"| patch | {model_name(patch.folder)} | {base} | {patch.scale:g} | {hashes} |"
