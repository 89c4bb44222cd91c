"""Measure the costs of a benchmark's methods, each in a process of its own, by turns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ensembler.config import VOCABULARY_SETTINGS
from ensembler.evaluation.backends import Advance
from ensembler.evaluation.documents import TEST
from ensembler.evaluation.ensemble_plan import Plan
from ensembler.evaluation.measure import Load, machine
from ensembler.evaluation.methods import Method, Study, finished_runs
from ensembler.evaluation.recipe import Speed
from ensembler.evaluation.store import Store
from ensembler.evaluation.summary import COST, chosen_alpha, cost_name
from ensembler.evaluation.text_answers import TextAnswerer

_LONGEST = 3600  # seconds of a measurement


@dataclass(frozen=True)
class Timed:
    """A method at its α, the plan that answers for it (of several seeds the first), and the `name` of its notes."""

    name: str
    plan: Plan
    method: Method
    alpha: float
    speed: Speed


def measure_costs(measurements: Sequence[tuple[int, Timed]], store: Store, advance: Advance) -> None:
    """Measure every method in a process of its own, in the order of `plan_measurements`, and note the costs.

    What is noted already, at the same α on such a machine, is left out; a measurement that failed is made again.
    """
    here = machine()
    notes = [(name, content) for name, content in store.notes(COST) if here.items() <= content.items()]
    known = {(name, content["alpha"], content["round"]) for name, content in notes if "error" not in content}
    for number, timed in measurements:
        if (timed.name, timed.alpha, number) not in known:
            found = _measure_apart(_load(timed))
            store.note(COST, timed.name, {"round": number, "alpha": timed.alpha, **here, **found})
        advance(1)


def plan_measurements(studies: Sequence[Study], store: Store) -> list[tuple[int, Timed]]:
    """Return the number of the round and the method of each measurement, by rounds of all methods: drift hits all."""
    finished = finished_runs(studies, store)
    timed = []
    for study in studies:
        speed = study.experiment and study.experiment.speed
        if not speed or not speed.rounds:
            continue
        for key in study.method_keys:
            for plan in (study.plans_of(key, finished) or [])[:1]:
                alpha = chosen_alpha(study, key, 0, store)
                timed.append(Timed(cost_name(study, key), plan, plan.run.method(key), alpha, speed))
    most = max((one.speed.rounds for one in timed), default=0)
    return [(number, one) for number in range(most) for one in timed if number < one.speed.rounds]


def _load(timed: Timed) -> Load:
    """Return the work to be timed: the first test documents of the experiment's first task."""
    plan, method, speed = timed.plan, timed.method, timed.speed
    answerer = plan.answerer
    assert isinstance(answerer, TextAnswerer)
    documents = plan.tasks[0].subsets[TEST][: max(speed.num_examples, speed.num_prompts)]
    scored = [one for one in documents if one.requests[0].request_type != "generate_until"][: speed.num_examples]
    room = answerer.model.max_length - speed.new_tokens
    texts = [one.prompt for one in documents[: speed.num_prompts]]
    prompts = [answerer.model.tok_encode(text)[-room:] for text in texts]
    requests = [request for one in scored for request in answerer.encode_requests(one)]
    chats = [(ids, answerer.model.chat_of(text)) for ids, text in zip(prompts, texts, strict=True)]
    chats += [(list(request.tokens[0]), dict(request.others)) for request in requests]
    members = {role: member.to_dict() for role, member in plan.checked.config.members.items()}
    settings = {name: getattr(plan.checked.config, name) for name in VOCABULARY_SETTINGS}
    config: dict[str, Any] = {"rule": method.rule, "members": members, **settings}
    if method.alone is not None:  # as its user would load it: without the others
        config = {"rule": "linear", "constant": {method.alone: 1.0}, "members": {method.alone: members[method.alone]}}
    assert isinstance(plan.options.batch_size, int)
    return Load(
        config=config,
        alpha=timed.alpha,
        alone=method.alone is not None,
        prompts=prompts,
        requests=[request.tokens for request in requests],
        chats=[(ids, others) for ids, others in chats if others],
        num_examples=len(scored),
        new_tokens=speed.new_tokens,
        batch_size=plan.options.batch_size,
    )


def _measure_apart(load: Load) -> dict[str, Any]:
    """Return the cost of a method from a process of its own, or {"error": ...}."""
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
