"""Show an inspected patch: a row per tensor, all of them as one, and a line of advice. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensembler.patch.norms import Size


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
        """A row for JSON."""
        return {**asdict(self), "cosine": self.cosine, "rounding_share": self.rounding_share}


@dataclass(frozen=True)
class PatchReport:
    """Reports of all tensors with a delta, notes about what is left out, warnings about what it was made for."""

    modules: tuple[ModuleReport, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def overall(self) -> dict[str, Any]:
        """All tensors as one: ‖·‖_F of all together, the largest σ_max, and their means over the tensors.

        The paper does not say how its Table 1 sums over matrices; both ways are given.
        """
        result: dict[str, Any] = {"num_tensors": len(self.modules)}
        for key in ("patch", "patched", "residual"):
            sizes = [size for module in self.modules if (size := getattr(module, key)) is not None]
            if sizes:
                result[f"{key}_frobenius"] = _together(size.frobenius for size in sizes)
                result[f"{key}_sigma_max"] = max(size.sigma_max for size in sizes)
                result[f"{key}_frobenius_mean"] = sum(size.frobenius for size in sizes) / len(sizes)
                result[f"{key}_sigma_max_mean"] = sum(size.sigma_max for size in sizes) / len(sizes)
        ranks = [module.patch.effective_rank for module in self.modules if module.patch.effective_rank is not None]
        if ranks:
            result["effective_rank_mean"] = sum(ranks) / len(ranks)
        for kind in ("frobenius", "sigma_max", "frobenius_mean", "sigma_max_mean"):
            if result.get(f"residual_{kind}") and f"patched_{kind}" in result:
                result[f"ratio_{kind}"] = result[f"patched_{kind}"] / result[f"residual_{kind}"]
        updates = [(module.update, module.inner) for module in self.modules]
        if all(update is not None for update, _ in updates):
            result["update_frobenius"] = _together(update or 0.0 for update, _ in updates)
            product = result["update_frobenius"] * result["patch_frobenius"]
            result["cosine"] = sum(inner or 0.0 for _, inner in updates) / product if product else None
        if all(module.rounding is not None for module in self.modules) and result["patch_frobenius"]:
            lost = _together(module.rounding or 0.0 for module in self.modules)
            result["rounding_share"] = lost / result["patch_frobenius"]
        return result

    def advice(self) -> str:
        """One line: how large things are against each other, beside what the paper saw. No promise."""
        overall = self.overall()
        said = []
        if "ratio_frobenius" in overall:
            said.append(
                f"θ′ + Δ is {overall['ratio_frobenius_mean']:.0f} times the residual in ‖·‖_F and "
                f"{overall['ratio_sigma_max_mean']:.0f} times in σ_max, means over matrices (PortLLM, Table 1, "
                "Mistral-7B: 79 to 194 and 39 to 96, whose ported patches came within "
                "1.1 points of fine-tuning θ′ itself)"
            )
        if overall.get("update_frobenius") is not None and overall["patch_frobenius"]:
            ratio = overall["update_frobenius"] / overall["patch_frobenius"]
            said.append(f"the update θ′ - θ is {ratio:.2g} times the patch in ‖·‖_F")
        if overall.get("rounding_share", 0) > 0.1:
            said.append(f"rounding loses {overall['rounding_share']:.0%} of the patch: keep more digits with --dtype")
        if not said and "patched_frobenius" in overall:
            said.append(
                f"the patch is {overall['patch_frobenius'] / overall['patched_frobenius']:.2%} of the model in ‖·‖_F"
            )
        said.append("only a test on your own data tells whether the ported model is good")
        return "; ".join(said)

    def to_dict(self) -> dict[str, Any]:
        """The content of --json."""
        modules = [module.to_dict() for module in self.modules]
        return {
            "overall": self.overall(),
            "advice": self.advice(),
            "notes": [*self.notes, *self.warnings],
            "modules": modules,
        }


def _together(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))
