"""Ask several members what their texts go on with, for the candidates of an anchor that writes in other tokens.

For each of the anchor's most probable next tokens, and for the end of the text, every member gives the log-prob that
its text goes on with those bytes. Rounds of evaluation go on until little of the candidates' probabilities is open.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ensembler.engine.text_cover import Bounds, Path
from ensembler.engine.text_member import MOST_AHEAD, Continuation, TextMember, TextState
from ensembler.engine.text_plan import TextPlan
from ensembler.engine.text_prompts import read_prompt, spell
from ensembler.errors import RunError

States = dict[str, TextState]
"""The state of each member, by role, behind one text."""
_MOST_ROUNDS = 8
_END = Continuation(b"", ends=True)


@dataclass
class TextStats:
    """Counts: texts of which the next token was asked for, rounds, and the shares that stayed open."""

    num_asked: int = 0
    num_rounds: int = 0
    num_certain: int = 0
    sum_open: float = 0.0
    largest_open: float = 0.0


@dataclass
class TextScore:
    """The log-probs of the pieces of a text under one member, in nats; they add up to that of the text.

    `bound`: by how much their sum may differ from it.
    """

    log_probs: list[float] = field(default_factory=list)
    bound: float = 0.0


@dataclass
class Question:
    """The continuations of one text that are compared, with the weight of each, and what is known of them by role.

    `weights`: their probabilities under the anchor. `decision`: for whom the best one is enough, else None.
    """

    states: States
    candidates: Sequence[Continuation]
    weights: Sequence[float]
    decision: Decision | None = None
    bounds: dict[str, list[Bounds]] = field(default_factory=dict)
    begun: dict[str, Bounds] = field(default_factory=dict)

    def update(self, role: str, member: TextMember) -> None:
        """Compute the bounds of a role from the nodes that are evaluated."""
        state = self.states[role]
        self.bounds[role] = [member.bounds(state, one) for one in self.candidates]
        self.begun[role] = member.begun(state)

    def open_paths(self, role: str, tolerance: float = 0.0, kept: Sequence[bool] | None = None) -> dict[Path, float]:
        """Return the share that is open, by path of a role: of the candidates, in their mean by weight, and of R(x).

        Either counts where it is more than `tolerance`; R(x) does not where the best candidate alone is wanted. `kept`:
        the candidates that count (None: all).
        """
        weights = [weight if kept is None or kept[at] else 0.0 for at, weight in enumerate(self.weights)]
        total = sum(weights) or 1.0
        found: dict[Path, float] = {}
        for weight, bounds in zip(weights, self.bounds[role], strict=True):
            if bounds.open and weight > 0:
                share = weight / total / bounds.high
                for path, mass in bounds.open.items():
                    found[path] = found.get(path, 0.0) + share * mass
        if sum(found.values()) <= tolerance:
            found = {}
        begun = self.begun[role]
        if self.decision is None and begun.num_open > tolerance * begun.high:
            for path, mass in begun.open.items():
                found[path] = found.get(path, 0.0) + mass / begun.high
        return found

    def contenders(self) -> list[bool]:
        """Return which candidates may still be the best: one of them where that is certain."""
        assert self.decision is not None
        logs = {
            role: ([_log(one.low / begun) for one in bounds], [_log(one.high / begun) for one in bounds])
            for role, bounds in self.bounds.items()
            if (begun := self.begun[role].middle) > 0
        }
        return self.decision.contenders(logs) if len(logs) == len(self.bounds) else [True] * len(self.candidates)


@dataclass(frozen=True)
class Decision:
    """The scores of candidates at some points, where the best alone is wanted.

    `anchor`: of each point, the scores of the candidates under the anchor; `rest`: the best of all other tokens.
    `slopes`: of each point the weight of each role's log-probs.
    """

    anchor: Sequence[Sequence[float]]
    rest: Sequence[float]
    slopes: Sequence[Mapping[str, float]]

    def contenders(self, logs: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> list[bool]:
        """Return which candidates may be the best at some point. `logs`: lower and upper log-probs by role."""
        may_win = [False] * len(self.anchor[0])
        for anchor, rest, slopes in zip(self.anchor, self.rest, self.slopes, strict=True):
            low, high = list(anchor), list(anchor)
            for role, slope in slopes.items():
                for at, (least, most) in enumerate(zip(*logs[role], strict=True)):
                    worst, best = (least, most) if slope > 0 else (most, least)
                    low[at] += slope * worst if math.isfinite(worst) else -math.inf
                    high[at] += slope * best
            most_certain = max([rest, *low])
            may_win = [so_far or not top < most_certain for so_far, top in zip(may_win, high, strict=True)]
        return may_win


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


class TextMembers:
    """The members that are asked for text, by role. `prompts`: ids by role, for prompts of the anchor as ids."""

    def __init__(self, plan: TextPlan, members: Mapping[str, TextMember]) -> None:
        self.plan = plan
        self.members = dict(members)
        self.stats = TextStats()
        self.prompts: dict[tuple[int, ...], Mapping[str, Sequence[int]]] = {}
        self._texts = plan.anchor.writer.tokens.texts
        self._ends = frozenset(plan.anchor.ends)
        self._states: OrderedDict[tuple[int, ...], States] = OrderedDict()

    def describe(self) -> dict[str, Any]:
        """Return the evaluations by role and rounds for each text that was asked about, and what stayed open."""
        num = max(1, self.stats.num_asked)
        return {
            "evaluations": {role: member.num_evaluated / num for role, member in self.members.items()},
            "rounds": self.stats.num_rounds / num,
            "largest_open": self.stats.largest_open,
            "mean_open": self.stats.sum_open / num,
            "certain": self.stats.num_certain / num,
        }

    def states_of(self, ids: Sequence[int], most: int) -> States:
        """Return the states behind a text, as ids of the anchor; the last `most` that were asked for are kept.

        Raises PromptError for a prompt that a member cannot read.
        """
        key = tuple(ids)
        found = self._states.pop(key, None)
        if found is None:
            before = self._states.get(key[:-1])
            found = self.begin(key) if before is None else self.advance(before, self._texts.get(key[-1], b""))
        self._states[key] = found
        while len(self._states) > most:
            self._states.popitem(last=False)
        return found

    def begin(self, ids: Sequence[int]) -> States:
        """Return the states behind a prompt, as ids of the anchor: each member reads its text by itself."""
        given = self.prompts.get(tuple(ids))
        if given is not None:
            return {role: member.begin(given[role]) for role, member in self.members.items()}
        text = spell(self.plan, ids)
        found = {}
        for role, member in self.members.items():
            own, rest = read_prompt(role, self.plan.readers[role], text)
            found[role] = member.advance(member.begin(own), rest)
        return found

    def along(self, ids: Sequence[int], first: int) -> list[States]:
        """Return the states behind each beginning of a text, as ids of the anchor, from `first` ids on.

        What the members' tokenizers write by themselves is read in forwards of many tokens.
        """
        found = [self.begin(tuple(ids[:first]))]
        for at, token in enumerate(ids[first:]):
            if at % MOST_AHEAD == 0:
                for role, member in self.members.items():
                    member.read_ahead([(found[-1][role], self._text_of(ids[first + at :]))])
            found.append(self.advance(found[-1], self._texts.get(token, b"")))
        return found

    def advance(self, states: States, text: bytes) -> States:
        """Return the states behind more text."""
        return {role: self.members[role].advance(state, text) for role, state in states.items()}

    def log_probs(
        self, states: Sequence[States], logits: Tensor, points: Sequence[Mapping[str, float]] | None = None
    ) -> dict[str, Tensor]:
        """Return by role the log-probs (texts, V) fp32 of the anchor's tokens behind texts, on its device.

        `logits` (texts, V): the anchor's. Of tokens that are no candidates all roles have 0, so that their ratio is 1.
        `points`: the weights of all roles at the points where the best token alone is wanted; else (None) rounds go on
        until all are known to the tolerance. Raises RunError for a text that a member cannot spell.
        """
        scores = logits.float().cpu()
        num = min(self.plan.settings.num_candidates, logits.shape[-1])
        ids = [self._candidates(tokens) for tokens in scores.topk(num).indices.tolist()]
        questions = []
        for state, tokens, row in zip(states, ids, scores, strict=True):
            weights = row.softmax(-1)[tokens].tolist()
            decision = None if points is None else self._decision(row, tokens, points)
            questions.append(Question(state, [self._spelled(token) for token in tokens], weights, decision))
        self.refine(questions)
        filled = {role: torch.zeros(logits.shape) for role in self.members}
        for row, (tokens, question) in enumerate(zip(ids, questions, strict=True)):
            for role in self.members:
                filled[role][row, tokens] = self._log_probs(role, question)
        return {role: values.to(logits.device) for role, values in filled.items()}

    def score(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[dict[str, TextScore]]:
        """Return by role, for each context and its continuation, the log-probs of what its tokens spell, one by one.

        Contexts and continuations are ids of the anchor.
        """
        begun = {key: self.begin(key) for key in {tuple(context): None for context, _ in texts}}
        states = [begun[tuple(context)] for context, _ in texts]
        found = [{role: TextScore() for role in self.members} for _ in texts]
        for at in range(max(len(tokens) for _, tokens in texts)):
            asked = [index for index, (_, tokens) in enumerate(texts) if at < len(tokens)]
            if at % MOST_AHEAD == 0:
                for role, member in self.members.items():
                    member.read_ahead([(states[index][role], self._text_of(texts[index][1][at:])) for index in asked])
            questions = [Question(states[index], [self._spelled(texts[index][1][at])], [1.0]) for index in asked]
            self.refine(questions)
            for index, question in zip(asked, questions, strict=True):
                before, states[index] = states[index], self.advance(states[index], question.candidates[0].text)
                for role, score in found[index].items():
                    score.log_probs.append(float(self._log_probs(role, question)))
                    score.bound += question.bounds[role][0].log_error + question.begun[role].log_error
                    score.bound += states[index][role].dropped - before[role].dropped
        return found

    def _text_of(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self._texts.get(token, b"") for token in tokens)

    def _decision(self, scores: Tensor, tokens: Sequence[int], points: Sequence[Mapping[str, float]]) -> Decision:
        """Return what decides between `tokens`, whose scores under the anchor are those of `scores` (V,)."""
        anchor = self.plan.anchor_role
        others = scores.index_fill(0, torch.tensor(tokens), -math.inf).max()
        return Decision(
            [(weights[anchor] * scores[tokens]).tolist() for weights in points],
            [float(weights[anchor] * others) for weights in points],
            [{role: weight for role, weight in weights.items() if role != anchor and weight} for weights in points],
        )

    def _candidates(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens that are compared: those that spell text, and all that end one."""
        both = dict.fromkeys((*tokens, *sorted(self._ends)))
        return [token for token in both if token in self._ends or token in self._texts]

    def _spelled(self, token: int) -> Continuation:
        return _END if token in self._ends else Continuation(self._texts.get(token, b""))

    def refine(self, questions: Sequence[Question]) -> None:
        """Evaluate nodes, most open mass first, until all questions are answered, or rounds enough were run."""
        waiting = list(questions)
        for one in waiting:
            for role, member in self.members.items():
                one.update(role, member)
        for _ in range(_MOST_ROUNDS):
            wanted: dict[str, dict[tuple[int, Path], tuple[TextState, Path]]] = {role: {} for role in self.members}
            going = []
            for one in waiting:
                paths = self._next_paths(one)
                for role, of_role in paths.items():
                    state = one.states[role]
                    wanted[role] |= {(id(state.nodes), path): (state, path) for path in of_role}
                if any(paths.values()):
                    going.append((one, paths))
            if not going:
                break
            self.stats.num_rounds += 1
            for role, nodes in wanted.items():
                if nodes:
                    self.members[role].evaluate(list(nodes.values()))
            for one, paths in going:
                for role in (role for role, of_role in paths.items() if of_role):
                    one.update(role, self.members[role])
            waiting = [one for one, _ in going]
        for one in questions:
            share = max(sum(one.open_paths(role).values()) for role in self.members)
            self.stats.num_asked += 1
            self.stats.num_certain += one.decision is not None and sum(one.contenders()) <= 1
            self.stats.sum_open += share
            self.stats.largest_open = max(self.stats.largest_open, share)

    def _next_paths(self, question: Question) -> dict[str, list[Path]]:
        """Return the paths that are evaluated next, by role: those with much of the open mass, where it matters."""
        kept, tolerance = None, self.plan.settings.tolerance
        if question.decision is not None:
            kept, tolerance = question.contenders(), 0.0
            if sum(kept) <= 1:
                return {role: [] for role in self.members}
        found = {}
        for role in self.members:
            shares = question.open_paths(role, tolerance, kept)
            most = max(shares.values(), default=0.0)
            found[role] = [path for path, share in shares.items() if share >= most / 2]
        return found

    def _log_probs(self, role: str, question: Question) -> Tensor:
        """Return the log-probs (candidates,) fp32 of a role."""
        begun = question.begun[role]
        if begun.high <= 0:
            raise RunError(
                f"{role} cannot write the text up to byte {question.states[role].num_bytes}: its probability is 0; "
                "choose a model whose tokens can write any byte"
            )
        values = torch.tensor([one.middle for one in question.bounds[role]], dtype=torch.float64)
        return (values / begun.middle).log().float()
