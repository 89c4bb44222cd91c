"""What a method costs: what is to be measured of it, and the process that measures it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from ensembler.evaluation.bench.bench import PlannedRun
from ensembler.evaluation.bench.measure import Load
from ensembler.evaluation.bench.methods import Method
from ensembler.evaluation.bench.recipe import Speed
from ensembler.evaluation.encoding import encode_examples, encode_generation
from ensembler.evaluation.examples import Generation, Rolling

_MAX_LENGTH = 2048  # where no member sets a limit


def cost_id(planned: PlannedRun, method: Method, number: int) -> str:
    """The id of the row of one measurement of a method."""
    return f"cost/{planned.experiment.name}/{method.name}/{number}"


def make_load(planned: PlannedRun, method: Method, alpha: float, speed: Speed) -> Load:
    """Return what is measured of a method: the first test examples of its experiment's first task."""
    task = planned.sweep.tasks[0]
    examples = task.parts.test[: max(speed.num_examples, speed.num_prompts)]
    tokenizer = planned.checked.require_tokenizer()
    shortest = planned.checked.shortest_context
    max_length = _MAX_LENGTH if shortest is None else shortest[1]
    scored = [one for one in examples if not any(isinstance(request, Generation) for request in one.requests)]
    requests = [
        {"context": request.context, "continuations": request.continuations, "window": request.window}
        for encoded in encode_examples(scored[: speed.num_examples], tokenizer, max_length)
        for request in encoded.requests
    ]
    prompts = []
    for example in examples[: speed.num_prompts]:
        request = example.requests[0]
        text = request.text if isinstance(request, Rolling) else request.context
        ids, _ = encode_generation(Generation(text, speed.new_tokens, ()), tokenizer, max_length, example.id)
        prompts.append(ids)
    members = {role: member.to_dict() for role, member in planned.checked.config.members.items()}
    config: dict[str, Any] = {"rule": method.rule, "members": members}
    if method.alone is not None:  # as its user would load it: without the others
        config = {"rule": "linear", "constant": {method.alone: 1.0}, "members": {method.alone: members[method.alone]}}
    return Load(
        config=config,
        rule=config["rule"],
        alpha=alpha,
        alone=method.alone is not None,
        prompts=prompts,
        requests=requests,
        new_tokens=speed.new_tokens,
        batch_size=planned.experiment.batch_size,
    )


def measure_apart(load: Load) -> dict[str, Any]:
    """Return the cost of a method from a process of its own, or {"error": ...}."""
    command = [sys.executable, "-m", "ensembler.evaluation.bench.measure"]
    done = subprocess.run(command, input=json.dumps(asdict(load)), capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"the process ended with {done.returncode}: {last[:300]}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
