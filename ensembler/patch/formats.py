"""Read a patch folder by its headers: a PEFT LoRA, deltas written by `extract` beside or instead of it. No torch.

adapter_config.json, adapter_model.safetensors   a LoRA as PEFT writes it
deltas.safetensors                               full deltas under the tensor names of the model
patch.json                                       what `extract` made this of
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ensembler.errors import PatchError
from ensembler.patch.headers import FLOATS, StoredTensor, listed, read_json, stored_tensors
from ensembler.patch.settings import ADAPTER_CONFIG, AdapterSettings

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
DELTAS = "deltas.safetensors"
RECORD = "patch.json"
PEFT_PREFIX = "base_model.model."

_FACTORS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
}


@dataclass(frozen=True)
class LowRank:
    """Δ = scale · B A, with A (r, in) and B (out, r) on disk; `transposed`: the weight lies as (in, out).

    An embedding's weight (tokens, width) is the transposed case too, with A (r, tokens) and B (width, r).
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool

    @property
    def is_embedding(self) -> bool:
        return "lora_embedding" in self.a.name

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that this is added to."""
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class Patch:
    """Δθ by tensor name: LoRA factors, full deltas, and `replaced`: values that stand instead of the model's.

    PEFT saves modules_to_save and trained biases as values, not as deltas. `targets` are the modules that the
    adapter's configuration says it changes (None: it does not say), `base` the model it was made for.
    """

    folder: Path
    low_rank: Mapping[str, LowRank]
    full: Mapping[str, StoredTensor]
    replaced: Mapping[str, StoredTensor]
    base: str | None
    base_fingerprint: str | None
    targets: tuple[str, ...] | str | None
    notes: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        return {*self.low_rank, *self.full, *self.replaced}

    @property
    def files(self) -> list[Path]:
        """The weights files of the patch."""
        return [path for name in (ADAPTER_WEIGHTS, ADAPTER_PICKLE, DELTAS) if (path := self.folder / name).is_file()]


def read_patch(folder: Path, *, allow_pickle: bool = False) -> Patch:
    """Return the patch in `folder`, from headers alone (a pickle is loaded, and only where it is allowed).

    Raises PatchError for what is no patch or of a kind that cannot be added to weights, MemberError for a weights file
    that is not whole.
    """
    if not folder.is_dir():
        raise PatchError(f"there is no folder {folder}; give a PEFT LoRA folder, or one that `patch extract` made")
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    base, fingerprint = record.get("base"), record.get("base_fingerprint")
    low_rank: dict[str, LowRank] = {}
    replaced: dict[str, StoredTensor] = {}
    targets: tuple[str, ...] | str | None = None
    notes: tuple[str, ...] = ()
    if (folder / ADAPTER_CONFIG).is_file():
        config = AdapterSettings(folder, read_json(folder / ADAPTER_CONFIG))
        low_rank, replaced, notes = _read_adapter(config, _adapter_tensors(folder, allow_pickle=allow_pickle))
        targets = config.targets
        base = base or config.values.get("base_model_name_or_path")
    full = stored_tensors(folder / DELTAS) if (folder / DELTAS).is_file() else {}
    if not low_rank and not replaced and not full:
        below = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        hint = f"; its folders {listed(below)} hold one, name one of them" if below else ""
        raise PatchError(
            f"{folder} holds no patch; expected {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} (a PEFT LoRA), or {DELTAS} "
            f"(made by `patch extract`){hint}"
        )
    both = sorted(full.keys() & {*low_rank, *replaced})
    if both:
        raise PatchError(f"{folder}: {both[0]} is in the LoRA and in {DELTAS}; keep one")
    for name, tensor in {**full, **replaced}.items():
        _check_float(folder, name, tensor)
    return Patch(folder, low_rank, full, replaced, _text(base), _text(fingerprint), targets, notes)


def _adapter_tensors(folder: Path, *, allow_pickle: bool) -> dict[str, StoredTensor]:
    if (folder / ADAPTER_WEIGHTS).is_file():
        return stored_tensors(folder / ADAPTER_WEIGHTS)
    pickle = folder / ADAPTER_PICKLE
    if not pickle.is_file():
        raise PatchError(f"{folder} has {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}; fetch it again")
    if not allow_pickle:
        raise PatchError(f"{pickle} is a pickle, which can run code when it is read; convert it, or add --allow-pickle")
    return _unpickled(pickle)


def _unpickled(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a pickle, held in memory; torch's restricted reader still refuses code."""
    import torch

    words = {getattr(torch, name): word for name, word in FLOATS.items()}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {
            name: StoredTensor(
                name, path, words.get(t.dtype, str(t.dtype)), tuple(t.shape), 0, t.nbytes, held=t.contiguous()
            )
            for name, t in state.items()
        }
    except Exception as error:  # pickle and torch raise what they like for a file they cannot or will not read
        raise PatchError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _read_adapter(
    config: AdapterSettings, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, LowRank], dict[str, StoredTensor], tuple[str, ...]]:
    factors: dict[str, dict[str, StoredTensor]] = {}
    replaced, carried = {}, []
    for name, tensor in tensors.items():
        path = name.removeprefix(PEFT_PREFIX)
        ending = next((ending for ending in _FACTORS if path.endswith(ending)), None)
        if ending is not None:
            factors.setdefault(path.removesuffix(ending), {})[_FACTORS[ending]] = tensor
        elif "lora_" in path or "token_adapter" in path:
            raise PatchError(f"{config.folder} holds {name}, which is not understood here; give a plain LoRA")
        elif path.endswith(".base_layer.weight"):
            carried.append(path.removesuffix(".base_layer.weight"))
        else:
            replaced[path.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    low_rank = {f"{module}.weight": _low_rank(config, module, pair) for module, pair in factors.items()}
    notes = []
    if carried:
        notes.append(f"the base's own {listed(carried)}, which the patch carries along, is left out")
    if replaced:
        notes.append(
            f"{listed(replaced)}: trained as a whole (modules_to_save, bias), so it replaces the model's own value"
        )
    return low_rank, replaced, tuple(notes)


def _low_rank(config: AdapterSettings, module: str, factors: Mapping[str, StoredTensor]) -> LowRank:
    embedding = "embedding_A" in factors or "embedding_B" in factors
    first, second = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    absent = [name for name in (first, second) if name not in factors]
    if absent:
        raise PatchError(f"{config.folder}: {module} has no lora_{absent[0]}; fetch the patch again")
    a, b = factors[first], factors[second]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise PatchError(
            f"{config.folder}: {module} has lora_{first} of shape {a.shape} and lora_{second} of shape {b.shape}; "
            "expected (r, in) and (out, r) of a linear layer or an embedding"
        )
    for tensor in (a, b):
        _check_float(config.folder, module, tensor)
    return LowRank(a, b, config.scale(module, a.shape[0]), transposed=embedding or config.transposed)


def _check_float(folder: Path, name: str, tensor: StoredTensor) -> None:
    if tensor.dtype not in FLOATS.values():
        raise PatchError(f"{folder}: {name} is stored as {tensor.dtype}; expected one of {', '.join(FLOATS)}")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
