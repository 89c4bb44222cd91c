"""Conditions on the figures of a benchmark, for CI: "patch >= source_ft - 2"."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ensembler.errors import ConfigError
from ensembler.evaluation.figures import TaskFigures

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_CONDITION = re.compile(
    r"\s*(?P<left>[a-z_+-]*[a-z])\s*(?P<operator>[<>]=?)\s*"
    r"(?:(?P<right>[a-z_+-]*[a-z])\s*(?P<offset>[+-]\s*\d+\.?\d*)?|(?P<number>-?\d+\.?\d*))\s*"
)


@dataclass(frozen=True)
class Requirement:
    """`left` OPERATOR `right` + `offset`, of the metric in the unit of the table; without `right` a bare number."""

    text: str
    left: str
    operator: str
    right: str | None
    offset: float

    @classmethod
    def parse(cls, text: str, methods: Sequence[Sequence[str]]) -> Requirement:
        """Return what a condition says; raise ConfigError where it is none, or no experiment has its methods.

        `methods`: those of each experiment.
        """
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ConfigError(f'--require {text!r} is no condition; give one such as "patch >= source_ft - 2"')
        if not any({match["left"], match["right"]} <= {None, *known} for known in methods):
            given = "; ".join(dict.fromkeys(", ".join(known) for known in methods))
            raise ConfigError(f"--require {text!r} is of methods that no experiment has; they have {given}")
        number = "".join((match["number"] or match["offset"] or "0").split())
        return cls(text, match["left"], match["operator"], match["right"], float(number))

    def failures(self, tasks: Sequence[TaskFigures]) -> list[str]:
        """Return a sentence for each task with these methods on which the condition does not hold."""
        found = []
        for task in tasks:
            figures: dict[str | None, float] = {None: 0.0}
            for method in task.methods:
                estimate = math.nan if method.test is None else method.test.estimate
                figures[method.method] = estimate * (100 if task.is_percent else 1)
            if self.left in figures and self.right in figures:
                left, right = figures[self.left], figures[self.right] + self.offset
                if not _OPERATORS[self.operator](round(left, 9), round(right, 9)):  # NaN of a method that failed: never
                    found.append(f"{task.name}: {self.text} does not hold, {left:.4g} against {right:.4g}")
        return found
