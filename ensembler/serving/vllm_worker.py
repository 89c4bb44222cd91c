"""Extend vLLM's workers: change the point of the ensemble that they hold."""

from __future__ import annotations

from typing import Any

from ensembler.engine.grid import GridPoint


class PointSetter:
    """Mixed into each worker's class by vLLM (`worker_extension_cls`)."""

    def set_point(self: Any, rule: str, alpha: float) -> None:
        """Combine by this rule and α from the next step on; raises ConfigError."""
        self.get_model().set_point(GridPoint(rule, alpha))
