"""Measure the costs of a benchmark's methods, each in a process of its own, by turns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ensembler.evaluation.measure import Load, machine
from ensembler.evaluation.methods import Method
from ensembler.evaluation.parts import TEST
from ensembler.evaluation.plan import Plan
from ensembler.evaluation.recipe import Speed
from ensembler.evaluation.store import Store
from ensembler.evaluation.study import Study, finished_runs
from ensembler.evaluation.summary import COST, chosen_alpha, cost_name
from ensembler.evaluation.text_answers import TextAnswerer

_LONGEST = 3600  # seconds of a measurement


@dataclass(frozen=True)
class Timed:
    """A method of a study at its α, and the plan that answers for it: of several seeds the first."""

    study: Study
    plan: Plan
    method: Method
    alpha: float

    @property
    def name(self) -> str:
        """The name of its notes."""
        return cost_name(self.study, self.method.key)


def measure_costs(studies: Sequence[Study], store: Store, advance: Callable[[int], None]) -> None:
    """Measure every method in a process of its own, round after round of all methods, and note what was found.

    What is noted already, at the same α on such a machine, is left out; a measurement that failed is made again.
    """
    here = machine()
    notes = [(name, content) for name, content in store.notes(COST) if here.items() <= content.items()]
    known = {(name, content["alpha"], content["round"]) for name, content in notes if "error" not in content}
    for number, timed in measurements(studies, store):
        speed = timed.study.experiment and timed.study.experiment.speed
        if (timed.name, timed.alpha, number) not in known and speed:
            found = _measure_apart(_load(timed, speed))
            store.note(COST, timed.name, {"round": number, "alpha": timed.alpha, **here, **found})
        advance(1)


def measurements(studies: Sequence[Study], store: Store) -> list[tuple[int, Timed]]:
    """Return round after round of all methods, so that drift hits all."""
    finished = finished_runs(studies, store)
    timed = []
    for study in studies:
        for key in study.method_keys if _rounds(study) else ():
            for plan in (study.plans_of(key, finished) or [])[:1]:
                timed.append(Timed(study, plan, plan.run.method(key), chosen_alpha(study, key, 0, store)))
    most = max(map(_rounds, studies), default=0)
    return [(number, one) for number in range(most) for one in timed if number < _rounds(one.study)]


def _rounds(study: Study) -> int:
    speed = None if study.experiment is None else study.experiment.speed
    return 0 if speed is None else speed.rounds


def _load(timed: Timed, speed: Speed) -> Load:
    """The work that is timed: the first test documents of the experiment's first task."""
    plan, method = timed.plan, timed.method
    answerer = plan.answerer
    assert isinstance(answerer, TextAnswerer)
    documents = plan.tasks[0].parts[TEST][: max(speed.num_examples, speed.num_prompts)]
    scored = [one for one in documents if one.requests[0].request_type != "generate_until"][: speed.num_examples]
    room = answerer.model.max_length - speed.new_tokens
    prompts = [answerer.model.tok_encode(one.prompt)[-room:] for one in documents[: speed.num_prompts]]
    members = {role: member.to_dict() for role, member in plan.checked.config.members.items()}
    config: dict[str, Any] = {"rule": method.rule, "members": members}
    if method.alone is not None:  # as its user would load it: without the others
        config = {"rule": "linear", "constant": {method.alone: 1.0}, "members": {method.alone: members[method.alone]}}
    assert isinstance(plan.options.batch_size, int)
    return Load(
        config=config,
        alpha=timed.alpha,
        alone=method.alone is not None,
        prompts=prompts,
        requests=[request.tokens for one in scored for request in answerer.encode(one)],
        num_examples=len(scored),
        new_tokens=speed.new_tokens,
        batch_size=plan.options.batch_size,
    )


def _measure_apart(load: Load) -> dict[str, Any]:
    """The cost of a method from a process of its own, or {"error": ...}."""
    command = [sys.executable, "-m", "ensembler.evaluation.measure"]
    work = json.dumps(asdict(load))
    try:
        done = subprocess.run(command, input=work, capture_output=True, text=True, check=False, timeout=_LONGEST)
    except subprocess.TimeoutExpired:
        return {"error": f"it took longer than {_LONGEST} seconds"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"the process ended with {done.returncode}: {last[:300]}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
