"""Measure a patch, and how it lies to the model it is carried to (Table 1 of PortLLM); show the figures."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ensembler.errors import ConfigError, PatchError
from ensembler.extras import require
from ensembler.files import write_whole
from ensembler.patch.addition import DTYPES, load_factors, load_pieces, read_finite
from ensembler.patch.boxes import Shape, stack_shape
from ensembler.patch.formats import Patch
from ensembler.patch.low_rank import Pieces
from ensembler.patch.patch_plan import PatchPlan, plan_patches
from ensembler.safetensors_files import StoredModel, StoredTensor, listed

_DENSE_SIZE = 128  # below it a full decomposition is quicker than an iteration


@dataclass(frozen=True)
class Size:
    """‖·‖_F, σ_max, and the effective rank: exp of the entropy of σ / Σσ (Roy and Vetterli 2007); None: not taken."""

    frobenius: float
    sigma_max: float
    effective_rank: float | None = None


@dataclass(frozen=True)
class Delta:
    """Δ in fp32: left (rows, r) @ right (r, columns), or the matrix `right` (rows, columns) where `left` is None."""

    left: Tensor | None
    right: Tensor

    @property
    def rank(self) -> int | None:
        return None if self.left is None else self.right.shape[0]

    def added_to(self, weight: Tensor) -> Tensor:
        """Add Δ to an fp32 matrix in place and return it."""
        return weight.add_(self.right) if self.left is None else weight.addmm_(self.left, self.right)

    def minus(self, other: Delta) -> Delta:
        """Return the difference: of two LoRAs as factors side by side, never as their product."""
        if self.left is not None and other.left is not None:
            return Delta(torch.cat([self.left, -other.left], 1), torch.cat([self.right, other.right]))
        zeros = torch.zeros_like(self.right if self.left is None else other.right)
        return Delta(None, self.added_to(zeros.clone()) - other.added_to(zeros))

    def inner(self, matrix: Tensor) -> float:
        """Return ⟨Δ, matrix⟩, the sum of the products of their elements."""
        projected = matrix if self.left is None else self.left.T @ matrix
        return float((projected.double() * self.right.double()).sum())

    def size(self) -> Size:
        """Measure Δ; of factors from an r × r problem.

        With left = Q₁R₁ and rightᵀ = Q₂R₂, Δ has the singular values of R₁R₂ᵀ.
        """
        if self.left is None:
            return size_of_matrix(self.right)
        first, second = (torch.linalg.qr(factor.double(), mode="r").R for factor in (self.left, self.right.T))
        values = torch.linalg.svdvals(first @ second.T)
        total = values.sum()
        if total == 0:
            return Size(0.0, 0.0, 0.0)
        entropy = torch.special.entr(values / total).sum()
        return Size(float(values.norm()), float(values[0]), float(entropy.exp()))


def size_of_matrix(matrix: Tensor) -> Size:
    """Return ‖·‖_F and σ_max of a matrix (rows, columns), the latter by Lanczos iteration where it is large."""
    frobenius = float(matrix.double().norm())
    if not matrix.any():
        return Size(frobenius, 0.0)  # an iteration would have nowhere to start
    if min(matrix.shape) <= _DENSE_SIZE:
        return Size(frobenius, float(torch.linalg.svdvals(matrix.double())[0]))
    linalg = require("scipy.sparse.linalg", "eval")
    start = torch.ones(min(matrix.shape)).numpy()  # a fixed start, so that a run repeats
    values = linalg.svds(matrix.numpy(), k=1, tol=1e-6, v0=start, return_singular_vectors=False)
    return Size(frobenius, float(values[0]))


@dataclass(frozen=True)
class ModuleReport:
    """Norms of one tensor. `patch` is Δθ_i; with a model, `patched` θ′ + Δθ_i; with another patch, `residual`
    Δθ′_i - Δθ_i; with a base, `update` ‖θ′ - θ‖_F and `inner` ⟨Δθ_i, θ′ - θ⟩. `rounding` is the norm of what is lost
    when θ′ + Δθ_i is rounded to the dtype of θ′. None: not asked for, or not a matrix.
    """

    name: str
    shape: tuple[int, ...]
    rank: int | None
    patch: Size
    patched: Size | None = None
    residual: Size | None = None
    update: float | None = None
    inner: float | None = None
    rounding: float | None = None

    @property
    def cosine(self) -> float | None:
        """Of Δθ_i with θ′ - θ."""
        if self.inner is None or not self.update or not self.patch.frobenius:
            return None
        return self.inner / (self.update * self.patch.frobenius)

    @property
    def rounding_share(self) -> float | None:
        """‖rounding error‖_F over ‖Δθ_i‖_F."""
        return None if self.rounding is None or not self.patch.frobenius else self.rounding / self.patch.frobenius

    def to_dict(self) -> dict[str, Any]:
        """Return a row for JSON."""
        return {**asdict(self), "cosine": self.cosine, "rounding_share": self.rounding_share}


def inspect_patch(
    patch: Patch,
    *,
    model: Path | None = None,
    base: Path | None = None,
    other: Patch | None = None,
    advance: Callable[[int], None] | None = None,
) -> PatchReport:
    """Measure a patch Δθ_i: alone, on a `model` θ′, against θ′ - θ of a `base` θ, and against `other`, Δθ′_i.

    PortLLM, section 3.3 and Table 1. Norms of LoRAs come from their factors; of a model, one tensor at a time is read.
    Raises PatchError or MemberError where the files do not fit each other, ConfigError for a base without a model.
    """
    if base is not None and model is None:
        raise ConfigError("a base needs a model: θ′ - θ is taken between the two; give the model with --to")
    updated = old = None
    warnings: tuple[str, ...] = ()
    old_names: dict[str, str] = {}
    if base is not None:
        plan = _plain_plan(patch, base)
        old, warnings = plan.model, plan.warnings
        old_names = {_source(plan.patches[0], name): name for name in _measured(plan.patches[0])}
    if model is not None:
        plan = _plain_plan(patch, model)
        updated, patch = plan.model, plan.patches[0]
        other = None if other is None else plan_patches([other], model).patches[0]
    names = _measured(patch)
    if not names:
        raise PatchError(f"{patch.folder} only replaces {listed(patch.replaced)}; there is no delta to measure")
    if other is not None:
        alone = sorted(set(names) ^ {*other.low_rank, *other.pieces, *other.full})
        if alone:
            raise PatchError(
                f"{patch.folder} and {other.folder} change different tensors: {listed(alone)}; give two of one kind"
            )
    modules = []
    for name in names:
        weight = None if updated is None else updated.tensors[name]
        before = None if old is None else _before(patch, name, old, old_names)
        modules.append(_measure(name, patch, other, weight, before))
        if advance is not None:
            advance(1)
    return PatchReport(tuple(modules), patch.notes, warnings)


def _plain_plan(patch: Patch, model: Path) -> PatchPlan:
    """Return the plan of a patch for a model; raise PatchError where the weights that it changes are quantised."""
    plan = plan_patches([patch], model)
    quantized = [name for name in _measured(plan.patches[0]) if name in plan.quantized]
    if quantized:
        raise PatchError(
            f"{model} is quantised ({listed(quantized)}), and norms are those of plain weights; give the model before "
            "that"
        )
    return plan


def _measured(patch: Patch) -> list[str]:
    return [name for name in [*patch.low_rank, *patch.pieces, *patch.full] if name not in patch.replaced]


def _source(patch: Patch, name: str) -> str:
    """Return the tensor in the patch's own files that changes `name`: the two models may call that otherwise."""
    if name in patch.pieces:
        first = patch.pieces[name].pieces[0]
        return f"{first.factors.a.name} {first.source}"
    return patch.low_rank[name].a.name if name in patch.low_rank else patch.full[name].name


def _before(patch: Patch, name: str, old: StoredModel, old_names: Mapping[str, str]) -> StoredTensor:
    """Return the tensor of the older base for that of the model; raise PatchError where it keeps it otherwise."""
    source = _source(patch, name)
    before = old.tensors[old_names[source]] if source in old_names else None
    if before is None or before.shape != _shape(patch, name):
        raise PatchError(
            f"{old.folder} does not keep {name} in one tensor as the model does; give two whose files are alike"
        )
    return before


def _measure(
    name: str, patch: Patch, other: Patch | None, updated: StoredTensor | None, old: StoredTensor | None
) -> ModuleReport:
    delta = _load_delta(patch, name)
    values: dict[str, Any] = {}
    if other is not None:
        values["residual"] = _load_delta(other, name).minus(delta).size()
    if updated is not None:
        weight = read_finite(updated)
        if old is not None:
            update = weight - read_finite(old)
            values["update"] = float(update.double().norm())
            values["inner"] = delta.inner(update)
            del update  # as large as the weight
        total = delta.added_to(weight)
        values["patched"] = size_of_matrix(total)
        values["rounding"] = float((total.to(DTYPES[updated.dtype]).float() - total).double().norm())
    return ModuleReport(name, _shape(patch, name), delta.rank, delta.size(), **values)


def _shape(patch: Patch, name: str) -> Shape:
    found = patch.low_rank.get(name) or patch.pieces.get(name) or patch.full[name]
    return found.shape


def _load_delta(patch: Patch, name: str) -> Delta:
    """Read Δ of a tensor. That of a stack of matrices, or of rows alone, is no product of two factors."""
    factors, pieces = patch.low_rank.get(name), patch.pieces.get(name)
    if factors is not None and factors.num_matrices > 1:
        pieces = Pieces.whole(factors)
    if pieces is not None:
        stack, rows, columns = stack_shape(pieces.shape)
        delta = torch.zeros(stack * rows, columns)
        for part in load_pieces(pieces, patch.stacks):
            delta[part.start : part.stop].addmm_(part.left, part.right)
        return Delta(None, delta)
    if factors is not None:
        return Delta(*load_factors(factors))
    return Delta(None, read_finite(patch.full[name]))


@dataclass(frozen=True)
class PatchReport:
    """Reports of all tensors with a delta, notes about what is left out, warnings about what it was made for."""

    modules: tuple[ModuleReport, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def overall(self) -> dict[str, Any]:
        """Measure all tensors as one: ‖·‖_F of all together, the largest σ_max, and their means over the tensors.

        The paper does not say how its Table 1 sums over matrices; both ways are given.
        """
        result: dict[str, Any] = {"num_tensors": len(self.modules)}
        for key in ("patch", "patched", "residual"):
            sizes: list[Size] = [size for module in self.modules if (size := getattr(module, key)) is not None]
            if sizes:
                result[f"{key}_frobenius"] = _norm_of_norms(size.frobenius for size in sizes)
                result[f"{key}_sigma_max"] = max(size.sigma_max for size in sizes)
                result[f"{key}_frobenius_mean"] = fmean(size.frobenius for size in sizes)
                result[f"{key}_sigma_max_mean"] = fmean(size.sigma_max for size in sizes)
        ranks = [module.patch.effective_rank for module in self.modules if module.patch.effective_rank is not None]
        if ranks:
            result["effective_rank_mean"] = fmean(ranks)
        for kind in ("frobenius", "sigma_max", "frobenius_mean", "sigma_max_mean"):
            if result.get(f"residual_{kind}") and f"patched_{kind}" in result:
                result[f"ratio_{kind}"] = result[f"patched_{kind}"] / result[f"residual_{kind}"]
        if all(module.update is not None for module in self.modules):
            result["update_frobenius"] = _norm_of_norms(module.update or 0.0 for module in self.modules)
            product = result["update_frobenius"] * result["patch_frobenius"]
            result["cosine"] = sum(module.inner or 0.0 for module in self.modules) / product if product else None
        if all(module.rounding is not None for module in self.modules) and result["patch_frobenius"]:
            lost = _norm_of_norms(module.rounding or 0.0 for module in self.modules)
            result["rounding_share"] = lost / result["patch_frobenius"]
        return result

    def advice(self) -> str:
        """Return one line: how large things are against each other, beside what the paper saw. No promise."""
        overall = self.overall()
        findings = []
        if "ratio_frobenius" in overall:
            findings.append(
                f"θ′ + Δ is {overall['ratio_frobenius_mean']:.0f} times the residual in ‖·‖_F and "
                f"{overall['ratio_sigma_max_mean']:.0f} times in σ_max, means over matrices (PortLLM, Table 1, "
                "Mistral-7B: 79 to 194 and 39 to 96, whose ported patches came within "
                "1.1 points of fine-tuning θ′ itself)"
            )
        if overall.get("update_frobenius") is not None and overall["patch_frobenius"]:
            ratio = overall["update_frobenius"] / overall["patch_frobenius"]
            findings.append(f"the update θ′ - θ is {ratio:.2g} times the patch in ‖·‖_F")
        share = overall.get("rounding_share", 0)
        if share > 0.1:
            findings.append(f"rounding loses {share:.0%} of the patch: keep more digits with --dtype")
        if not findings and "patched_frobenius" in overall:
            share = overall["patch_frobenius"] / overall["patched_frobenius"]
            findings.append(f"the patch is {share:.2%} of the model in ‖·‖_F")
        return "; ".join([*findings, "only a test on your own data tells whether the ported model is good"])

    def to_dict(self) -> dict[str, Any]:
        """Return the content of --json."""
        return {
            "overall": self.overall(),
            "advice": self.advice(),
            "notes": [*self.notes, *self.warnings],
            "modules": [module.to_dict() for module in self.modules],
        }


def _norm_of_norms(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))


def save_heatmap(report: PatchReport, path: Path) -> None:
    """Write a PNG of ‖Δ‖_F over ‖θ′ + Δ‖_F, or of ‖Δ‖_F where no model was given: layers down, module types across.

    Tensors outside the layers have a row of their own. Raises OutputError where it cannot be written.
    """
    figure_class = require("matplotlib.figure", "eval").Figure
    cells: dict[tuple[int, str], float] = {}
    for module in report.modules:
        whole = module.patched.frobenius if module.patched is not None else 1.0
        cells[_layer_and_kind(module.name)] = module.patch.frobenius / whole if whole else 0.0
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    layers = sorted({layer for layer, _ in cells})
    values = [[cells.get((layer, kind), float("nan")) for kind in kinds] for layer in layers]
    figure = figure_class(figsize=(2 + 0.7 * len(kinds), 2 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), ["-" if layer < 0 else str(layer) for layer in layers])
    axes.set_ylabel("layer")
    has_model = any(module.patched is not None for module in report.modules)
    figure.colorbar(image, label="‖Δ‖ / ‖θ′ + Δ‖" if has_model else "‖Δ‖")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())


def _layer_and_kind(name: str) -> tuple[int, str]:
    """Return the layer of a tensor by the first number in its name (-1: none), and its module's name there."""
    module = name.removesuffix(".weight")
    match = re.search(r"\.(\d+)\.", module)
    if match is None:
        return -1, module.rpartition(".")[2]
    return int(match.group(1)), module[match.end() :].removeprefix("self_attn.").removeprefix("mlp.")
