"""Ask several members what their texts go on with, for the candidates of an anchor that writes in other tokens.

For each of the anchor's most probable next tokens, and for the end of the text, every member gives the log-prob that
its text goes on so, as the anchor would cut it. Rounds of evaluation go on until little of the candidates'
probabilities is open.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import takewhile
from operator import methodcaller
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensembler.engine.text_cover import Path
from ensembler.engine.text_member import MOST_AHEAD, Continuation, TextMember, TextState
from ensembler.engine.text_plan import TextPlan
from ensembler.engine.text_prompts import read_prompt, spell
from ensembler.engine.text_question import Question, Scores, States
from ensembler.errors import RunError
from ensembler.tokenization.token_cut import TokenCut

_MOST_ROUNDS = 8
_NEARLY_0 = -1e-7  # the log-prob of a candidate that is certain: 0 is that of no candidate
_END = Continuation(b"", ends=True)


@dataclass
class TextStats:
    """Counts: texts of which the next token was asked for, those of them where the best was enough, and where it was
    certain; rounds, and the shares that stayed open.
    """

    num_asked: int = 0
    num_rounds: int = 0
    num_greedy: int = 0
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


class TextMembers:
    """The members that are asked for text, by role. `prompts`: ids by role, for prompts of the anchor as ids."""

    def __init__(self, plan: TextPlan, members: Mapping[str, TextMember]) -> None:
        self.plan = plan
        self.members = dict(members)
        self.stats = TextStats()
        self.prompts: dict[tuple[int, ...], Mapping[str, Sequence[int]]] = {}
        self._texts = plan.anchor.writer.tokens.texts
        self._ends = sorted(plan.anchor.ends)
        width = plan.contract.widths[plan.anchor_role]
        never = [token for token in range(width) if token not in self._texts and token not in plan.anchor.ends]
        self._never = torch.tensor(never, dtype=torch.int64)
        self._forbidding = plan.raised & self.members.keys()
        writers = {id(reader.writer): reader.writer for reader in plan.readers.values()}
        self._groups = [
            [role for role in self.members if plan.readers[role].writer is writer] for writer in writers.values()
        ]
        self._cut = cache(partial(TokenCut, plan.anchor.writer))

    def describe(self) -> dict[str, Any]:
        """Return the evaluations by role and rounds for each text that was asked about, and what stayed open."""
        num = max(1, self.stats.num_asked)
        return {
            "evaluations": {role: member.num_evaluated / num for role, member in self.members.items()},
            "rounds": self.stats.num_rounds / num,
            "largest_open": self.stats.largest_open,
            "mean_open": self.stats.sum_open / num,
            "certain": self.stats.num_certain / self.stats.num_greedy if self.stats.num_greedy else None,
        }

    def begin(self, ids: Sequence[int]) -> States:
        """Return the states behind a prompt, as ids of the anchor: each member reads its text by itself.

        Where a prompt ends, no member is held to the anchor's cut: it may end inside of a word. Raises PromptError for
        a prompt that a member cannot read.
        """
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
            found.append(self.advance(found[-1], token))
        return found

    def advance(self, states: States, token: int) -> States:
        """Return the states behind one more token of the anchor."""
        one = self._given(token, states)
        return {role: self.members[role].advance(state, one.text, one.cut) for role, state in states.items()}

    def log_probs(
        self,
        states: Sequence[States],
        logits: Mapping[str, Tensor],
        points: Sequence[Mapping[str, float]] = (),
        *,
        is_greedy: bool = False,
    ) -> dict[str, Tensor]:
        """Return, for all roles but the anchor, the log-probs (texts, V) fp32 of the anchor's tokens behind texts.

        `logits` (texts, V_member): of the anchor, and of the members that share its tokenizer; the result is on the
        anchor's device. Of tokens that are no candidates all roles have 0, so that their ratio is 1, but a token that
        spells no text and ends none is forbidden. `points`: the weights of all roles for which they are wanted (none:
        the anchor alone counts); `is_greedy`: the best token alone is wanted, else rounds go on until all are known to
        the tolerance. Raises RunError for a text that a member cannot spell.
        """
        of_anchor = logits[self.plan.anchor_role]
        scores = of_anchor.float().cpu()
        own = {role: self.own_log_probs(values) for role, values in logits.items() if role != self.plan.anchor_role}
        num = min(self.plan.settings.num_candidates, scores.shape[-1])
        ids = [self._candidates(tokens) for tokens in scores.topk(num).indices.tolist()]
        is_asked = not points or any(one.get(role) for one in points for role in self.members)
        questions = [
            Question(
                state,
                self._told_apart([self._continuation(token, state) for token in tokens]),
                self._scores(row, tokens, {role: values[at] for role, values in own.items()}, points),
                is_greedy,
            )
            for at, (state, tokens, row) in enumerate(zip(states, ids, scores, strict=True))
            if is_asked
        ]
        self.refine(questions)
        found = {role: torch.zeros(scores.shape) for role in (*own, *self.members)}
        for role in self._forbidding:
            found[role][:, self._never] = -math.inf
        for at, tokens in enumerate(ids):
            for role, values in own.items():
                found[role][at, tokens] = values[at, tokens].clamp(max=_NEARLY_0)
        for at, (tokens, question) in enumerate(zip(ids, questions, strict=False)):  # nobody is asked where none counts
            for role in self.members:
                found[role][at, tokens] = self._log_probs(role, question).clamp(max=_NEARLY_0)
        return {role: values.to(of_anchor.device) for role, values in found.items()}

    def own_log_probs(self, logits: Tensor) -> Tensor:
        """Return the log-probs (texts, V of the anchor) fp32 of a member by ids; all end tokens have that of any."""
        log_probs = logits.float().cpu().log_softmax(-1)
        width = self.plan.contract.widths[self.plan.anchor_role]
        log_probs = torch.nn.functional.pad(log_probs, (0, width - log_probs.shape[-1]), value=-math.inf)
        log_probs[:, self._ends] = log_probs[:, self._ends].logsumexp(-1, keepdim=True)
        return log_probs

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
            questions = [Question(states[index], [self._given(texts[index][1][at], states[index])]) for index in asked]
            self.refine(questions)
            for index, question in zip(asked, questions, strict=True):
                before, states[index] = states[index], self.advance(states[index], texts[index][1][at])
                for role, score in found[index].items():
                    score.log_probs.append(float(self._log_probs(role, question)))
                    score.bound += question.bounds[role][0].log_error + question.begun[role].log_error
                    score.bound += states[index][role].dropped - before[role].dropped
        return found

    def _text_of(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self._texts.get(token, b"") for token in tokens)

    def _scores(
        self, anchor: Tensor, tokens: Sequence[int], own: Mapping[str, Tensor], points: Sequence[Mapping[str, float]]
    ) -> Scores:
        """Return the scores of `tokens` from the anchor's logits (V,) and the log-probs (V,) of others by ids."""
        points = points or [{self.plan.anchor_role: 1.0}]
        others = anchor.index_fill(0, torch.tensor(tokens), -math.inf)
        rest, allowed = (float(values.max()) for values in (others, others.index_fill(0, self._never, -math.inf)))
        rests = [allowed if any(one.get(role, 0.0) > 0 for role in self._forbidding) else rest for one in points]
        known = {self.plan.anchor_role: anchor, **own}
        base = np.zeros((len(points), len(tokens)))
        for at, weights in enumerate(points):
            for role, values in known.items():
                if weights.get(role):
                    base[at] += weights[role] * values[tokens].double().numpy()
        return Scores(
            base,
            np.array([weights[self.plan.anchor_role] * rest for weights, rest in zip(points, rests, strict=True)]),
            {role: np.array([weights.get(role, 0.0) for weights in points]) for role in self.members},
            self._groups,
        )

    def _candidates(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens that are compared: those that spell text, and all that end one."""
        both = dict.fromkeys((*tokens, *self._ends))
        known = (token for token in both if token in self._ends or token in self._texts)
        return [token for token in known if token < self.plan.contract.shared]

    def _continuation(self, token: int, states: States | None = None) -> Continuation:
        """Return what a token of the anchor is for others. With `states`, behind which the anchor may not write it."""
        if token in self._ends:
            return _END
        if token not in self._texts:
            return Continuation(b"")
        cut = self._cut(token)
        before = None if states is None else next(iter(states.values())).cut
        return Continuation(cut.text, cut=cut, is_impossible=before is not None and not before.allows(token))

    def _given(self, token: int, states: States) -> Continuation:
        """Return the same of a token that a text has: where the anchor would cut it otherwise, no cut is asked for."""
        one = self._continuation(token, states)
        return replace(one, cut=None, is_impossible=False) if one.is_impossible else one

    def _told_apart(self, candidates: Sequence[Continuation]) -> list[Continuation]:
        """Return candidates with what those of their texts go on with that begin with each."""
        texts = sorted(one.text for one in candidates if one.cut is not None)
        found = []
        for one in candidates:
            first = bisect_right(texts, one.text)
            begun = takewhile(methodcaller("startswith", one.text), texts[first:])
            longer = tuple(text[len(one.text) :] for text in begun)
            found.append(one if one.cut is None else replace(one, longer=longer))
        return found

    def refine(self, questions: Sequence[Question]) -> None:
        """Evaluate nodes, most open mass first, until all questions are answered, or rounds enough were run."""
        waiting = list(questions)
        for one in waiting:
            one.update(self.members, self.members)
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
                one.update(self.members, [role for role, of_role in paths.items() if of_role])
            waiting = [one for one, _ in going]
        for one in questions:
            one.narrow(self.members, is_last=True)
            weights = one.weights()
            share = max(sum(one.open_paths(role, weights).values()) for role in self.members)
            self.stats.num_asked += 1
            self.stats.num_greedy += one.is_greedy
            self.stats.num_certain += one.is_greedy and one.is_certain
            self.stats.sum_open += share
            self.stats.largest_open = max(self.stats.largest_open, share)

    def _next_paths(self, question: Question) -> dict[str, list[Path]]:
        """Return the paths that are evaluated next, by role: those with much of the open mass, where it matters."""
        is_certain = question.is_greedy and question.is_certain
        tolerance = 0.0 if question.is_greedy and not is_certain else self.plan.settings.tolerance
        weights = question.weights()
        found: dict[str, list[Path]] = {}
        for group in self._groups:
            shares: dict[Path, float] = {}
            for role in group if not is_certain or len(group) > 1 else ():  # of a ratio the best one is to be known
                for path, share in question.open_paths(role, weights, tolerance).items():
                    shares[path] = max(share, shares.get(path, 0.0))
            most = max(shares.values(), default=0.0)
            paths = [path for path, share in shares.items() if share >= most / 2]
            found |= {role: [path for path in paths if path not in question.states[role].nodes] for role in group}
        return found

    def _log_probs(self, role: str, question: Question) -> Tensor:
        """Return the log-probs (candidates,) fp32 of a role."""
        begun = question.begun[role]
        if begun.high <= 0:
            raise RunError(
                f"{role} cannot write the text up to byte {question.states[role].num_bytes}: its probability is 0; "
                "choose a model whose tokens can write any byte"
            )
        return torch.from_numpy(question.log_probs(role)).float()
