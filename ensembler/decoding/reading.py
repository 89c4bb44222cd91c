"""At which points a call decodes, and what reads with the members for it: all of their logits, or the ranks' sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ensembler.decoding.loop import Read
from ensembler.engine.forward import Forward, Step
from ensembler.engine.grid import Grid, GridPoint, make_combination
from ensembler.modeling import EnsembleForCausalLM


def reader(model: EnsembleForCausalLM, grid: Grid) -> tuple[Read, Grid]:
    """Return what reads with the members of `model`, and the grid that combines what it returns.

    Of several processes each has some of the members: at one point the ranks' weighted sums are enough.
    """
    if model.world is None or len(grid) > 1:
        return model.member_set.logits, grid.on(model.device)
    ((rule, alphas),) = grid.runs
    combination = make_combination(rule, model.contract, model.config.outside, tuple(model.contract.widths))

    def read(step: Step, cache: Any, forwards: Sequence[Forward] | None) -> dict[str, Tensor]:
        return {rule.anchor: model.member_set.combined(step, cache, combination, alphas[0])}

    return read, grid.of_scores(rule.anchor).on(model.device)


def grid_of(model: EnsembleForCausalLM, points: Sequence[GridPoint] | None, num_rows: int) -> Grid:
    """Return the grid of `points`, or of the model's own α: one, or one for each of `num_rows` rows."""
    if points is not None:
        return Grid.of(points, model.rule, model.contract, model.config.outside)
    alpha = model.alpha_of_rows(num_rows)
    alphas = alpha.tolist() if isinstance(alpha, Tensor) else [alpha]
    return Grid.of_alphas(model.rule, tuple(model.contract.widths), model.combination, alphas)
