"""A member as a distribution over texts: R(x + s) / R(x), R(x) being its probability that the text begins with x.

Whatever tokenizer it has. x is a trunk of tokens that stay whatever follows, and a tail of bytes behind them; from the
trunk on, nodes of a tree of tokens are evaluated as they are asked for. `text_cover` has the sum over the tree. Where
s is a token of another tokenizer, R counts the texts that this one cuts behind it: the same event for all members.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ensembler.engine.path_rows import PathRows
from ensembler.engine.text_cover import Bounds, NextTokens, Path, ceiling, cover
from ensembler.tokenization.stable_tokens import stable_tokens
from ensembler.tokenization.token_cut import TokenCut
from ensembler.tokenization.token_writer import TokenWriter, num_unfinished

_MOST_TEXTS_AHEAD = 4  # that are read in one forward where the logits of many tokens are kept
MOST_AHEAD = 16  # tokens: the distributions behind them are kept, each as large as the vocabulary


@dataclass(frozen=True, eq=False)
class Continuation:
    """Bytes behind a text, or with `ends` its end right behind them.

    `cut`: the bytes as a token of another tokenizer. `longer`: what the texts go on with that the token is told apart
    from, of those that begin with it; None for all that there are. `is_impossible`: the other tokenizer cuts no text
    so.
    """

    text: bytes
    ends: bool = False
    cut: TokenCut | None = None
    longer: tuple[bytes, ...] | None = None
    is_impossible: bool = False


@dataclass(frozen=True, eq=False)
class TextState:
    """The state of a member that has read a text.

    `trunk`: ids of the tokens that stay. `recent`: the last bytes of the text, from where a piece begins; the trunk's
    last `num_recent` tokens stand in it, and behind them the `tail`. `nodes`: the distributions behind the trunk and
    behind paths of tokens from there. `dropped`: by how much log R(x) would be larger with the other ways to write
    the text that the trunk has left out, added up; `num_bytes`: of the whole text. `cut`: the token of the other
    tokenizer with which the text ends, where R(x) counts the texts that are cut so.
    """

    trunk: list[int]
    recent: bytes
    num_recent: int
    tail: bytes
    nodes: dict[Path, NextTokens] = field(default_factory=dict)
    dropped: float = 0.0
    num_bytes: int = 0
    cut: TokenCut | None = None


class TextMember:
    """One member with a tokenizer of its own. `num_evaluated` counts the nodes that it has evaluated."""

    def __init__(self, rows: PathRows, writer: TokenWriter, ends: Collection[int]) -> None:
        """`ends`: the ids that end a text."""
        self._rows = rows
        self.role = rows.role
        self._writer = writer
        self._order = torch.from_numpy(writer.tokens.order)
        self._num_ids = 1 + int(self._order.max())  # of tokens that spell text: the model may have fewer
        self._ends = sorted(ends)
        self.num_evaluated = 0

    def forget(self) -> None:
        """Let go of the keys and values of earlier texts."""
        self._rows.forget()

    def begin(self, ids: Sequence[int]) -> TextState:
        """Return the state behind a prompt, as ids of this member: special tokens, and the text behind the last."""
        spelled = [self._writer.tokens.texts.get(token) for token in ids]
        first = next((at for at in range(len(ids), 0, -1) if spelled[at - 1] is None), 0)
        recent = b"".join(one for one in spelled[first:] if one is not None)
        state = self._with_longer_trunk(TextState(list(ids[:first]), recent, 0, recent, num_bytes=len(recent)))
        return state if state.trunk else self._begun_somewhere(state)

    def _begun_somewhere(self, state: TextState) -> TextState:
        """Return a state with a trunk, which a member without a begin token needs: the first token of the text, taken
        as certain and as no part of what follows, or an end token before a text of nothing.
        """
        tokens = self._writer.encode(state.recent) or []
        if not tokens:
            return replace(state, trunk=self._ends[:1])
        tail = state.tail[len(self._writer.tokens.texts[tokens[0]]) :]
        return self._with_longer_trunk(replace(state, trunk=tokens[:1], recent=tail, tail=tail))

    def advance(self, state: TextState, text: bytes, cut: TokenCut | None = None) -> TextState:
        """Return the state behind more text; the trunk grows by the tokens that are certain now, and evaluated.

        `cut`: as in the state.
        """
        state = replace(
            state, recent=state.recent + text, tail=state.tail + text, num_bytes=state.num_bytes + len(text), cut=cut
        )
        return self._with_longer_trunk(state)

    def _with_longer_trunk(self, state: TextState) -> TextState:
        if num_unfinished(state.recent):
            return state
        stable = tuple(stable_tokens(self._writer, state.recent))
        new = stable[state.num_recent :]
        if tuple(state.trunk[len(state.trunk) - state.num_recent :]) != stable[: state.num_recent]:
            return state
        if state.nodes:  # only as far as the tree goes: the rest follows when it was evaluated
            while new and new not in state.nodes:
                new = new[:-1]
        if not new:
            return state
        texts = self._writer.tokens.texts
        num = sum(len(texts[token]) for token in new)
        dropped = state.dropped
        if state.nodes:
            nodes = {path[len(new) :]: node for path, node in state.nodes.items() if path[: len(new)] == new}
            dropped += self._dropped(state, new, nodes, num)
        else:
            nodes = {}
        trunk = state.trunk + list(new)
        begun = self._restart(state.recent, len(state.recent) - len(state.tail) + num)
        kept = state.recent[begun:]
        tail = state.tail[num:]
        num_recent, left = 0, len(kept) - len(tail)
        while left > 0:
            num_recent += 1
            left -= len(texts[trunk[-num_recent]])
        return replace(state, trunk=trunk, recent=kept, num_recent=num_recent, tail=tail, nodes=nodes, dropped=dropped)

    def _dropped(self, state: TextState, new: Path, nodes: dict[Path, NextTokens], num: int) -> float:
        """Return by how much the log-prob falls without the ways to write the tail that do not begin with `new`."""
        whole = self._cover(state.nodes, state.tail).middle
        mass = 1.0
        for at, token in enumerate(new):
            place = self._writer.tokens.places[self._writer.tokens.texts[token]]
            mass *= state.nodes[new[:at]].within(place, place + 1)
        kept = mass * self._cover(nodes, state.tail[num:]).middle
        return max(0.0, math.log(whole / kept)) if kept > 0 else 0.0

    def _restart(self, text: bytes, end: int) -> int:
        """Return the last place up to `end` at which a piece of the text begins that is no part of a token before."""
        return max(at for at in self._writer.boundaries(text) if at <= end)

    def _cover(self, nodes: dict[Path, NextTokens], text: bytes) -> Bounds:
        return cover(nodes, self._writer.tokens, self._writer, text)

    def begun(self, state: TextState) -> Bounds:
        """Return the bounds of R(x) for the text of a state, counted from its trunk."""
        return cover(state.nodes, self._writer.tokens, self._writer, state.tail, cut=state.cut)

    def bounds(self, state: TextState, one: Continuation) -> Bounds:
        """Return the bounds of R(x + s), or of the probability that the text ends there, counted from its trunk."""
        return cover(
            state.nodes,
            self._writer.tokens,
            self._writer,
            state.tail + one.text,
            ends=one.ends,
            cut=one.cut,
            longer=one.longer,
        )

    def ceiling(self, state: TextState, one: Continuation) -> Bounds:
        """Return wide bounds of the same, which cost little."""
        return ceiling(state.nodes, self._writer.tokens, state.tail + one.text, ends=one.ends)

    def evaluate(self, wanted: Sequence[tuple[TextState, Path]]) -> None:
        """Evaluate nodes, by path from the trunks of their states, together. Raises LogitsError for NaN."""
        num_rows = self._rows.reserve(len({id(state.nodes) for state, _ in wanted}))
        for start in range(0, len(wanted), num_rows):
            part = wanted[start : start + num_rows]
            logits = self._rows.logits([state.trunk + list(path) for state, path in part])
            for (state, path), node in zip(part, self._next_tokens(logits[:, -1]), strict=True):
                state.nodes[path] = node

    def read_ahead(self, wanted: Sequence[tuple[TextState, bytes]]) -> None:
        """Evaluate together the nodes that the tokenizer's own writing of more text will pass."""
        self._rows.reserve(len(wanted))
        for start in range(0, len(wanted), _MOST_TEXTS_AHEAD):
            part = [(state, self._ahead(state, text)) for state, text in wanted[start : start + _MOST_TEXTS_AHEAD]]
            known = [_num_known(state.nodes, path) for state, path in part]
            num = max(len(path) + 1 - first for (_, path), first in zip(part, known, strict=True))
            if num == 0:
                continue
            logits = self._rows.logits([state.trunk + path for state, path in part], num)
            for (state, path), first, of_text in zip(part, known, logits, strict=True):
                nodes = self._next_tokens(of_text[num - (len(path) + 1 - first) :])
                for at, node in enumerate(nodes, start=first):
                    state.nodes.setdefault(tuple(path[:at]), node)

    def _ahead(self, state: TextState, text: bytes) -> list[int]:
        """Return the tokens behind the trunk for more text, as far as it can be written."""
        tokens = self._writer.encode(state.recent + text)
        own = state.trunk[len(state.trunk) - state.num_recent :]
        return [] if tokens is None or tokens[: len(own)] != own else tokens[len(own) : len(own) + MOST_AHEAD]

    def _next_tokens(self, logits: Tensor) -> list[NextTokens]:
        """Return the distributions of logits (n, V)."""
        self.num_evaluated += len(logits)
        found = []
        self._order = self._order.to(logits.device)
        for row in logits.float():
            log_probs = row.log_softmax(-1)
            if len(log_probs) < self._num_ids:
                log_probs = torch.nn.functional.pad(log_probs, (0, self._num_ids - len(log_probs)), value=-math.inf)
            ordered = log_probs[self._order].cpu().numpy()  # summed there: a GPU's sums differ from run to run
            sums = np.concatenate([[0.0], np.exp(ordered).cumsum(dtype=np.float64)])
            found.append(NextTokens(ordered, sums, float(log_probs[self._ends].double().exp().sum())))
        return found


def _num_known(nodes: Mapping[Path, NextTokens], path: Sequence[int]) -> int:
    """Return how many nodes along a path are there, from the trunk on without a gap."""
    return next((at for at in range(len(path) + 1) if tuple(path[:at]) not in nodes), len(path) + 1)
