"""Conditions on the figures of a benchmark, for CI: "patch >= source_ft - 2"."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ensembler.errors import ConfigError
from ensembler.evaluation.figures import TaskFigures
from ensembler.evaluation.recipe import nearest

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_CONDITION = re.compile(r"\s*(?P<left>[a-z_+-]*[a-z])\s*(?P<operator>[<>]=?)\s*(?P<right>[^<>=]*?)\s*")
_NUMBER = r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
_RIGHT = re.compile(rf"(?P<right>[a-z_+-]*[a-z])\s*(?P<offset>[+-]\s*{_NUMBER})?|(?P<number>-?{_NUMBER})")


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
        side = _RIGHT.fullmatch(match["right"])
        if side is None:
            raise ConfigError(
                f"--require {text!r} has {match['right']!r} on the right; expected a method, a method and + or - a "
                "number, or a number"
            )
        left, right = match["left"], side["right"]
        all_methods = list(dict.fromkeys(method for known in methods for method in known))
        for method in (left, right):
            if method not in (None, *all_methods):
                hint = nearest(method, all_methods)
                raise ConfigError(f"--require {text!r}: no experiment has the method {method!r}{hint}")
        if not any({left, right} <= {None, *known} for known in methods):
            given = "; ".join(dict.fromkeys(", ".join(known) for known in methods))
            raise ConfigError(f"--require {text!r} is of methods of different experiments; they have {given}")
        number = "".join((side["number"] or side["offset"] or "0").split())
        return cls(text, left, match["operator"], right, float(number))

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
