"""Patched targets of the methods that carry the patch by a transport: written once, beside the results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ensembler.config import MemberConfig
from ensembler.errors import ConfigError, RunError
from ensembler.evaluation.calibration import labelled_examples, plain_texts
from ensembler.evaluation.figures import TRANSPORTED
from ensembler.evaluation.recipe import Experiment, Recipe
from ensembler.files import digest, file_digest, find_folder, naming
from ensembler.launch import num_ranks
from ensembler.patch.formats import PATCH_FILES, Patch, read_patch
from ensembler.patch.patch_plan import plan_patches
from ensembler.patch.transports.transport import Calibration, Progress, Sources, carried, find_transport, silent
from ensembler.safetensors_files import read_model

PROCRUSTES = "patch:procrustes"  # makes a LoRA first


def check_transported(recipe: Recipe) -> None:
    """Check from headers alone that every transport of a recipe can carry its patch. Raises InputError."""
    for experiment in recipe.experiments:
        for one in experiment.by_seed:
            for method in _methods(experiment):
                with naming(f"experiment {experiment.name}, {method}"):
                    _check(one, method)


def add_transported(recipe: Recipe, folder: Path, progress: Progress = silent) -> Recipe:
    """Return the recipe with the patched target of each transport as a model under the name of its method.

    They are written to folders in `folder`, each named by a hash of all that it depends on, and used again where they
    are there. Raises InputError, RunError for a full disk, or where several processes would write them.
    """
    experiments = tuple(_add(experiment, folder, progress) for experiment in recipe.experiments)
    return recipe.model_copy(update={"experiments": experiments})


def _add(experiment: Experiment, folder: Path, progress: Progress) -> Experiment:
    models = dict(experiment.models)
    seeds = [dict(given) for given in experiment.seeds]
    for method in _methods(experiment):
        with naming(f"experiment {experiment.name}, {method}"):
            made = [_make(one, method, folder, progress) for one in experiment.by_seed]
        models[method] = made[0]
        if experiment.has_seeds(method):
            for given, model in zip(seeds, made, strict=True):
                given[method] = model
    return experiment.model_copy(update={"models": models, "seeds": tuple(seeds)})


def _methods(experiment: Experiment) -> Iterator[str]:
    for method in experiment.methods:
        if method in TRANSPORTED:
            yield method


def _make(experiment: Experiment, method: str, folder: Path, progress: Progress) -> MemberConfig:
    """Return the target with the patch carried by a method's transport; write it unless it is there."""
    patch, new, sources = _inputs(experiment, method)
    parts = [method, *(file_digest(patch / name) for name in PATCH_FILES if (patch / name).is_file())]
    parts += [read_model(model).fingerprint() for model in (new, sources.old) if model is not None]
    parts += [] if sources.data is None else [file_digest(sources.data.file)]
    out = folder / f"{method.replace(':', '-')}-{digest(parts)}"
    if not out.exists():
        if num_ranks() > 1:
            raise RunError(f"{out} is not there yet; run the same command once without a launcher, which writes it")
        _write(method, read_patch(patch), new, sources, out, progress)
    return replace(experiment.models["target_pt"], model=str(out), revision=None)


def _write(method: str, patch: Patch, new: Path, sources: Sources, out: Path, progress: Progress) -> None:
    from ensembler.patch.apply import apply_plan
    from ensembler.patch.transports.carry_lora import carry_lora

    out.parent.mkdir(parents=True, exist_ok=True)
    if method != PROCRUSTES:
        apply_plan(carried(plan_patches([patch], new), _transport(method), sources, progress), out)
        return
    assert sources.old is not None
    assert sources.data is not None
    lora = out.with_name(f"{out.name}.lora")
    if not lora.exists():
        carry_lora(patch, sources.old, new, sources.data, lora, progress=progress)
    apply_plan(plan_patches([read_patch(lora)], new), out)


def _check(experiment: Experiment, method: str) -> None:
    patch, new, sources = _inputs(experiment, method)
    if method != PROCRUSTES:
        find_transport(_transport(method), sources).check(plan_patches([read_patch(patch)], new), sources)
        return
    from ensembler.patch.transports.procrustes import Procrustes

    assert sources.old is not None
    Procrustes.check(plan_patches([read_patch(patch)], sources.old), sources)


def _transport(method: str) -> str:
    return method.partition(":")[2]


def _inputs(experiment: Experiment, method: str) -> tuple[Path, Path, Sources]:
    """Return the folders of the patch and the target, and what else a method's transport reads. Raises InputError."""
    folders = {}
    for role in TRANSPORTED[method]:
        member = experiment.models[role]
        if member.adapter is not None:
            raise ConfigError(f"{role} has an adapter, and {method} needs the model itself; add it to its files first")
        options = {} if member.revision is None else {"revision": member.revision}
        folders[role] = find_folder(member.model, **options)
    new = folders["target_pt"]
    return folders["patch"], new, Sources(folders.get("source_pt"), new, _data(experiment, method))


def _data(experiment: Experiment, method: str) -> Calibration | None:
    """Return the examples or texts that a method needs; raise ConfigError where the recipe has none."""
    readers = {"patch:sign-mask": ("transport_data", labelled_examples), PROCRUSTES: ("transport_texts", plain_texts)}
    if method not in readers:
        return None
    key, read = readers[method]
    given = getattr(experiment, key)
    if given is None:
        raise ConfigError(f"{method} needs {key}; give a file of JSON lines under that key, or leave the method out")
    return read(Path(given))
