"""Measure the costs of a benchmark's methods, each in a process of its own, by turns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ensembler.evaluation.measure import Load
from ensembler.evaluation.parts import TEST
from ensembler.evaluation.plan import Plan
from ensembler.evaluation.recipe import Speed
from ensembler.evaluation.store import Store
from ensembler.evaluation.study import Method, Study, finished_runs
from ensembler.evaluation.summary import COST, chosen_alpha
from ensembler.evaluation.text_answers import TextAnswerer

_LONGEST = 3600  # seconds of a measurement


def measure_costs(studies: Sequence[Study], store: Store, advance: Callable[[int], None]) -> None:
    """Measure every method in a process of its own, round after round of all methods, and note what was found.

    What is noted already is left out; a measurement that failed is made again.
    """
    known = {(name, content["round"]) for name, content in store.notes(COST) if "error" not in content}
    for number, study, plan, method in measurements(studies, store):
        name = f"{study.name}/{method.key}"
        assert study.experiment is not None
        if (name, number) not in known and study.experiment.speed is not None:
            alpha = chosen_alpha(study, method.key, 0, store)
            found = _measure_apart(_load(study, plan, method, alpha, study.experiment.speed))
            store.note(COST, name, {"round": number, "alpha": alpha, **found})
        advance(1)


def measurements(studies: Sequence[Study], store: Store) -> Iterator[tuple[int, Study, Plan, Method]]:
    """Yield round after round of all methods, so that drift hits all; each by the first of the runs that answer it."""
    finished = finished_runs(studies, store)
    served = []
    for study in studies:
        for key in study.method_keys:
            for run, plan in (study.runs_of(key, finished) or [])[:1]:
                served += [(study, plan, method) for method in run.methods if method.key == key]
    for number in range(max(map(_rounds, studies), default=0)):
        for study, plan, method in served:
            if number < _rounds(study):
                yield number, study, plan, method


def _rounds(study: Study) -> int:
    speed = None if study.experiment is None else study.experiment.speed
    return 0 if speed is None else speed.rounds


def _load(study: Study, plan: Plan, method: Method, alpha: float, speed: Speed) -> Load:
    """The work that is timed for a method: the first test documents of its experiment's first task."""
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
    assert study.experiment is not None
    return Load(
        config=config,
        alpha=alpha,
        alone=method.alone is not None,
        prompts=prompts,
        requests=[pair for one in scored for pair in answerer.tokens(one)],
        num_examples=len(scored),
        new_tokens=speed.new_tokens,
        batch_size=study.experiment.batch_size,
    )


def _measure_apart(load: Load) -> dict[str, Any]:
    """The cost of a method from a process of its own, or {"error": ...}."""
    command = [sys.executable, "-m", "ensembler.evaluation.measure"]
    try:
        done = subprocess.run(
            command, input=json.dumps(asdict(load)), capture_output=True, text=True, check=False, timeout=_LONGEST
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it took longer than {_LONGEST} seconds"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"the process ended with {done.returncode}: {last[:300]}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
