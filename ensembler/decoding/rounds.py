"""Rounds of speculative decoding: read k positions, settle their tokens, take back what was not accepted.

It does not know how many positions pay, nor when to draft.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from ensembler.decoding.acceptance import Chooser
from ensembler.decoding.choosing import Processors
from ensembler.decoding.drafted_texts import DraftedTexts
from ensembler.decoding.drafting import DraftForward, look_up
from ensembler.decoding.pacing import Round
from ensembler.decoding.slots import Slots
from ensembler.decoding.stats import Meter, TimedRunner, timed
from ensembler.modeling import EnsembleForCausalLM
from ensembler.runners import Runner, SerialRunner, Step, check_nan

Logits = dict[str, Tensor]
_LOOK_EVERY = 8  # plain greedy steps that ask the draft once, to learn whether it would be right


class Rounds:
    """The rounds of one call. `drafting` is the forward that drafts; None: the texts' own repetitions do.

    Between two rounds the members have read every running text but for its last token.
    """

    def __init__(
        self,
        model: EnsembleForCausalLM,
        drafting: DraftForward | None,
        texts: DraftedTexts,
        slots: Slots,
        processors: Processors,
        criteria: StoppingCriteriaList,
        chooser: Chooser,
        meter: Meter | None,
    ) -> None:
        self.texts = texts
        self._model = model
        self._drafting = drafting
        self._slots = slots
        self._processors = processors
        self._criteria = criteria
        self._chooser = chooser
        self._meter = meter
        one = SerialRunner()  # one forward needs no threads
        self._runner: Runner = one if meter is None else TimedRunner(one, meter)
        self._q: list[Tensor] = []
        self._num_looked_up = [0] * len(texts.running)
        self._width = 0
        self._num_plain = 0
        self._alpha = model.alpha_of_rows(len(texts.running))

    def prefill(self, ids: Tensor, mask: Tensor | None, positions: Tensor, chunk: int | None) -> Round:
        """Read the prompts but for what the cache holds, `chunk` positions at a time, and give each its first token."""
        start = time.perf_counter()
        cache = self._slots.cache
        with self._undone_if_it_fails(), timed(self._meter, "prefill"):
            first = cache.get_seq_length()
            for begin in range(first, ids.shape[1], chunk or ids.shape[1]):
                here = slice(begin, min(ids.shape[1], begin + (chunk or ids.shape[1])))
                seen = None if mask is None else mask[:, : here.stop]
                step = Step(ids[:, here], seen, positions[:, here], logits_to_keep=1)
                logits = self._model.member_logits(step, cache)
        combined = self._combine(logits)
        self._width = combined.shape[-1]
        if self._drafting is not None:
            self._draft(logits, 0)
        return self._settle(combined, 0, start)

    def run(self, num: int) -> Round:
        """Run a round of up to `num` positions."""
        start = time.perf_counter()
        with self._undone_if_it_fails():
            if self._drafting is None:
                num = min(num, 1 + self._look_up(num))
            logits = self._read(num) if self._drafting is None or num == 1 else self._draft_and_verify(num)
        combined = self._combine(logits)
        if self._drafting is not None and num == 1 and self._looks_at_draft():
            self._draft(logits, 0)
        return self._settle(combined, num, start)

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read(self, num: int) -> Logits:
        """The logits of all members after the newest `num` tokens, (rows, num, V_member)."""
        with timed(self._meter, "step" if num == 1 else "verify"):
            return self._model.member_logits(self._slots.step(self.texts.newest(num)), self._slots.cache)

    def _draft_and_verify(self, num: int) -> Logits:
        """The same for the newest token and those that are drafted meanwhile, one forward at a time."""
        drafting, parts = self._drafting, self._slots.cache.parts
        assert drafting is not None
        steps: list[Logits] = []
        for offset in range(num):
            newest = self.texts.drafted(self.texts.running, offset - 1)[:, None]
            with timed(self._meter, "draft"):
                step = self._slots.step(newest, offset, logits_to_keep=1)
                steps.append(self._runner.run([(drafting.forward,)], step, parts))
            self._draft(steps[-1], offset)
        with timed(self._meter, "verify"):
            verified = self._model.runner.run(drafting.others, self._slots.step(self.texts.newest(num)), parts)
        drafted = {role: torch.cat([step[role] for step in steps], dim=1) for role in steps[0]}
        check_nan(drafted | verified)
        return drafted | verified

    def _draft(self, logits: Logits, offset: int) -> None:
        """Put the draft's token after its members' logits (rows, 1, V_member) at `offset` behind each text's end."""
        texts, rows, drafting = self.texts, self.texts.running, self._drafting
        assert drafting is not None
        with timed(self._meter, "combine"):
            last = {role: logits[role][:, -1] for role in drafting.roles}
            scores = drafting.combine(last, self._alphas(), self._model.device, self._width)
        with timed(self._meter, "sample"):
            q = self._chooser.weigh(texts.process(self._processors, scores, rows, offset))
            self._q.append(q)
            texts.write(rows, offset, self._chooser.draft(q, rows, texts.positions(rows, offset)))

    def _looks_at_draft(self) -> bool:
        """Whether a plain step asks what the draft would have been: if the token depends on it, else for its pace."""
        self._num_plain += 1
        return self._chooser.needs_draft or self._num_plain % _LOOK_EVERY == 1

    def _look_up(self, num: int) -> int:
        """Put up to `num` tokens behind each text's end that it goes on with elsewhere; return the most of them."""
        with timed(self._meter, "draft"):
            for place, row in enumerate(self.texts.running):
                found = look_up(self.texts.text(row), min(num, self.texts.room))
                self._num_looked_up[place] = found.shape[0]
                for offset in range(found.shape[0]):
                    self.texts.write([row], offset, found[offset : offset + 1])
        return max(self._num_looked_up[: len(self.texts.running)])

    # -- settling -----------------------------------------------------------------------------------------------------

    def _combine(self, logits: Logits) -> Tensor:
        with timed(self._meter, "combine"):
            return self._model.combine(logits, self._alphas())

    def _alphas(self) -> float | Tensor:
        """α of the running rows."""
        if not isinstance(self._alpha, Tensor):
            return self._alpha
        return self._alpha[torch.tensor(self.texts.running, device=self._alpha.device)]

    def _settle(self, combined: Tensor, num_fed: int, start: float) -> Round:
        """Settle the tokens after `combined` (rows, positions, V) one by one, up to the first that was not drafted."""
        with timed(self._meter, "sample"):
            num_rows = len(self.texts.running)
            gained, is_open = [0] * num_rows, [True] * num_rows
            going, num_drafted, num_accepted = list(range(num_rows)), 0, 0
            for offset in range(combined.shape[1]):
                is_hit, is_end = self._settle_at(combined[:, offset], going, offset)
                judged = [hit for place, hit in zip(going, is_hit, strict=True) if self._was_drafted(place, offset)]
                num_drafted, num_accepted = num_drafted + len(judged), num_accepted + sum(judged)
                for place, end in zip(going, is_end, strict=True):
                    gained[place], is_open[place] = offset + 1, not end
                fates = zip(going, is_hit, is_end, strict=True)
                going = [place for place, hit, end in fates if hit and not end]
                if not going:
                    break
            self._q.clear()
        goes_on = [place for place in range(num_rows) if is_open[place]]
        self._slots.keep(num_fed, gained if num_fed else [0] * num_rows, goes_on)
        self.texts.grow(gained, goes_on)
        seconds = time.perf_counter() - start
        return Round(max(num_fed, 1), num_rows, sum(gained), num_drafted, num_accepted, seconds)

    def _settle_at(self, combined: Tensor, going: list[int], offset: int) -> tuple[list[bool], list[bool]]:
        """Write the tokens at `offset` of the rows at the places `going`; return which were drafted, and which end."""
        texts, chooser = self.texts, self._chooser
        rows = [texts.running[place] for place in going]
        here = slice(None) if len(going) == combined.shape[0] else torch.tensor(going, device=combined.device)
        p = chooser.weigh(texts.process(self._processors, combined[here], rows, offset))
        q = self._q[offset][here] if self._q else None
        drafted = texts.drafted(rows, offset)
        tokens = chooser.settle(p, q, drafted, rows, texts.positions(rows, offset))
        texts.write(rows, offset, tokens)
        is_hit = tokens == drafted.to(tokens.device)
        found = torch.stack([is_hit, texts.ended(self._criteria, rows, offset).to(is_hit.device)])
        hits, ends = found.tolist()  # the host waits for both at once
        return hits, ends

    def _was_drafted(self, place: int, offset: int) -> bool:
        return bool(self._q) if self._drafting is not None else offset < self._num_looked_up[place]

    @contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        """All members advance inside, or none."""
        lengths = self._slots.cache.lengths()
        try:
            yield
        except BaseException:
            self._slots.cache.restore(lengths)
            raise
