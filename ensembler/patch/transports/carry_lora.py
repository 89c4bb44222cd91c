"""Write the LoRA that procrustes makes for another base: a PEFT folder like any other."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ensembler import __version__
from ensembler.errors import PatchError
from ensembler.files import check_not_input
from ensembler.patch.addition import load_update
from ensembler.patch.apply import check_free, new_folder
from ensembler.patch.extract import write_lora_config
from ensembler.patch.formats import ADAPTER_WEIGHTS, PEFT_PREFIX, RECORD, Patch
from ensembler.patch.patch_plan import plan_patches
from ensembler.patch.transports.procrustes import Procrustes, left_out
from ensembler.patch.transports.transport import Calibration, Progress, Sources, silent
from ensembler.safetensors_files import listed, read_model


def carry_lora(
    patch: Patch,
    old: Path,
    new: Path,
    texts: Calibration,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Write the LoRA of the base `old` as one of the base `new` to the folder `out`; return notes, a line each.

    What is no LoRA of a linear layer inside the decoder's layers is left
    out, with a note. Raises InputError before anything is written, RunError when the disk is full.
    """
    check_not_input(out, old, new, patch.folder)
    check_free(out.expanduser().resolve(), overwrite=overwrite)
    if old.resolve() == new.resolve():
        raise PatchError(f"--from and --to are both {old}; give the patch's own base and another one")
    plan = plan_patches([patch], old)
    sources = Sources(old, new, texts)
    Procrustes.check(plan, sources)
    transport = Procrustes.prepare(plan, sources, progress)
    factors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, matched in transport.matched.items():
        left, right = transport.factors(name, load_update(plan.patches, matched))
        module = transport.maps[name].module
        factors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = right.contiguous()
        factors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = left.contiguous()
        ranks[module] = left.shape[1]
    base = read_model(new)
    notes = transport.notes
    if rest := left_out(plan.patches[0]):
        notes += (f"{listed(rest)}: left out, since procrustes carries LoRAs of the decoder's linear layers alone",)
    record = {
        "made_by": f"ensembler patch transport {__version__}",
        "base": base.name if "/" in base.name else str(new.resolve()),
        "base_fingerprint": base.fingerprint(),
        "carried_from": plan.model.name,
        "carried_from_fingerprint": plan.model.fingerprint(),
        "notes": list(notes),
    }
    with new_folder(out, sum(factor.nbytes for factor in factors.values()), overwrite=overwrite) as made:
        save_file(factors, made / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_lora_config(made, base, ranks, transposed=False)
        (made / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return notes
