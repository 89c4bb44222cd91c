"""The decode loop: plain decoding, grids and drafting, and any mixture of them.

A step reads the newest token of every row, and what was drafted behind it, with all members in one forward; chooses
for every text on every row the token that comes next, and the one behind each draft; and takes a draft where it *is*
the token that was chosen. The noise of a token is its own, so that neither drafts nor the batch, the grid or the number
of ranks change a text. It knows no files, tokenizers or tasks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ensembler.decoding.choosing import NAN, Chooser, TokenRequest
from ensembler.decoding.decode_stats import Meter, timed
from ensembler.decoding.drafting import Drafter, Round, look_up
from ensembler.decoding.rows import Row, Text, condense_rows, split_rows
from ensembler.decoding.samples import StopChecker
from ensembler.engine.model_runner import Step, check_nan
from ensembler.engine.prefill import Complete, Logits, Place, RunMembers, prefill, unread_to_the_right
from ensembler.engine.row_cache import RowCache
from ensembler.errors import LogitsError


class DecodeLoop:
    """Rows that are decoded together, on one cache.

    `chunk`: read prompts so many positions at a time. `keeps_rows`: a row whose texts have ended keeps its row of the
    cache, for a later call. `complete`: returns the logits with those of members that are asked for text.
    """

    def __init__(
        self,
        run_members: RunMembers,
        cache: RowCache,
        chooser: Chooser,
        stop_checker: StopChecker,
        *,
        drafter: Drafter | None = None,
        chunk: int | None = None,
        keeps_rows: bool = False,
        meter: Meter | None = None,
        complete: Complete | None = None,
    ) -> None:
        self.rows: list[Row] = []
        self.cache = cache
        self._run_members = run_members
        self._chooser = chooser
        self._stop_checker = stop_checker
        self.drafter = drafter
        self._chunk = chunk
        self._keeps_rows = keeps_rows
        self._meter = meter
        self._complete = complete
        self._has_nan = False

    @property
    def num_running(self) -> int:
        """The number of rows that have texts which go on."""
        return sum(bool(row.texts) for row in self.rows)

    @property
    def room(self) -> int:
        """The tokens that the row with most room may still get; 0 where no text is left that goes on."""
        return max((row.room for row in self.rows if row.texts), default=0)

    @torch.inference_mode()
    def add(self, rows: Sequence[Row]) -> list[Text]:
        """Read the prompts of new rows, as far as they are not in the cache; return the texts that ended at once."""
        first = len(self.rows)
        self.cache.reserve(first + len(rows), max(len(row.ids) for row in rows))
        self.cache.hold([row.ids for row in rows], [row.num_read for row in rows], first)
        with self._undone_if_it_fails():
            with timed(self._meter, "prefill"):
                logits = self._completed(
                    self._read_prompts(rows, first), rows, [(index, 0) for index in range(len(rows))]
                )
            requests = [TokenRequest(text, row, 0, index) for index, row in enumerate(rows) for text in row.texts]
            gained, ended = self._choose(logits, requests)
        self.rows += rows
        self._update_rows(gained, ended)
        return list(ended)

    @torch.inference_mode()
    def step(self, num: int = 1) -> tuple[list[Text], Round]:
        """Read up to `num` positions of every row, all but the first of them drafted.

        Returns the texts that have ended, and what the round came to.
        """
        start, rows = time.perf_counter(), [row for row in self.rows if row.texts]
        self.cache.reserve(len(self.rows), max(min(len(row.ids) + num, row.limit) for row in rows))
        with self._undone_if_it_fails():
            logits = self._read_drafting(num)
            num = next(iter(logits.values())).shape[1]
            guesses = self.drafter.peek(logits, self.rows) if self.drafter is not None and num == 1 else None
            wanted = [
                (index, offset)
                for index, row in enumerate(self.rows)
                if row.texts
                for offset in range(min(1 + len(row.drafts), self._num_readable(row)))
            ]
            with timed(self._meter, "step" if num == 1 else "verify"):
                logits = self._completed(logits, self.rows, wanted)
            requests = [
                TokenRequest(text, self.rows[index], offset, index * num + offset)
                for index, offset in wanted
                for text in self.rows[index].texts
            ]
            gained, ended = self._choose(logits, requests)
        grown = [(row, gained[row.texts[0]]) for row in rows]  # of texts that share a row, the first counts
        num_tokens = sum(len(tokens) for _, tokens in grown)
        drafted = [pair for row, tokens in grown for pair in zip(tokens, row.drafts, strict=False)]
        if guesses is not None:
            drafted = [(tokens[0], guess) for (_, tokens), guess in zip(grown, guesses, strict=True)]
        num_accepted = sum(token == draft for token, draft in drafted)
        self._update_rows(gained, ended)
        seconds = time.perf_counter() - start
        return list(ended), Round(num, len(rows), num_tokens, len(drafted), num_accepted, seconds)

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read_prompts(self, rows: Sequence[Row], first: int) -> Logits:
        """Return the logits (rows, 1, V) after the prompts; all end at the right, so that these are the last."""
        ids, positions = unread_to_the_right([row.ids for row in rows], [row.num_read for row in rows])
        return prefill(self._run_members, self.cache, ids, positions, self._chunk, first)

    def _read_drafting(self, num: int) -> Logits:
        """Draft, and return the logits (rows, n, V) after the newest token and the drafts behind it; n ≤ `num`."""
        drafter = self.drafter
        for row in self.rows:
            row.drafts = []
        if drafter is None or num == 1 or drafter.runner is None:
            if drafter is not None and num > 1:
                with timed(self._meter, "draft"):
                    for row in self.rows:
                        row.drafts = look_up(row.ids, min(num, self._num_readable(row)) - 1) if row.texts else []
            num = 1 + max(len(row.drafts) for row in self.rows)
            with timed(self._meter, "step" if num == 1 else "verify"):
                return self._run_members(self._newest(0, num), self.cache, None)
        steps: list[Logits] = []
        for offset in range(num):
            with timed(self._meter, "draft"):
                logits = self._run_members(self._newest(offset, 1), self.cache, [drafter.runner])
            steps.append({role: values.clone() for role, values in logits.items()})  # a graph writes over them
            if offset < num - 1:
                drafter.draft(steps[-1], self.rows)
        with timed(self._meter, "verify"):
            verified = self._run_members(self._newest(0, num), self.cache, drafter.others)
        return {role: torch.cat([step[role] for step in steps], dim=1) for role in steps[0]} | verified

    def _completed(self, logits: Logits, rows: Sequence[Row], wanted: Sequence[tuple[int, int]]) -> Logits:
        """Return the logits of all members where they are wanted: at a row's newest token, or so many drafts behind."""
        if self._complete is None:
            return logits
        found = ((rows[index], index, offset) for index, offset in wanted)
        places = [Place(at, offset, [*row.ids, *row.drafts[:offset]], row.num_prompt) for row, at, offset in found]
        return self._complete(logits, places)

    def _newest(self, offset: int, num: int) -> Step:
        """Return the input of `num` tokens from `offset` behind the newest one; what is not there is padding."""
        ids, positions = [], []
        for row in self.rows:
            tokens = [row.ids[-1], *row.drafts][offset : offset + num] if row.texts else []
            tokens = tokens[: max(self._num_readable(row) - offset, 0)]
            start = len(row.ids) - 1 + offset
            ids.append(tokens + [0] * (num - len(tokens)))
            positions.append([*range(start, start + len(tokens)), *[-1] * (num - len(tokens))])
        return Step(torch.tensor(ids), position_ids=torch.tensor(positions))

    def _num_readable(self, row: Row) -> int:
        """Return how many tokens of a row may be read at once, up to where a member reads it anew."""
        reread = self.cache.next_reread(len(row.ids) - 1)
        return row.room if reread is None else min(row.room, reread - len(row.ids) + 1)

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _choose(
        self, logits: Logits, requests: Sequence[TokenRequest]
    ) -> tuple[dict[Text, list[int]], dict[Text, None]]:
        """Return the tokens that each text gains, up to the first that was not drafted, and the texts that end."""
        with timed(self._meter, "choose"):
            tokens = self._chooser.choose(logits, requests)
        gained: dict[Text, list[int]] = {}
        chosen: dict[Text, list[int]] = {}
        for one, token in zip(requests, tokens, strict=True):
            chosen.setdefault(one.text, []).append(token)
            gained[one.text] = []
        going = [(one.text, one.row) for one in requests if one.offset == 0]
        ended: dict[Text, None] = {}
        offset = 0
        while going:
            for text, _ in going:
                gained[text].append(chosen[text][offset])
                if chosen[text][offset] == NAN:  # what stands behind a rejected draft says nothing
                    check_nan(logits)
                    raise LogitsError("the combined logits hold NaN, and no member computed any; try another alpha")
            are_ended = self._stop_checker.ended([(row, gained[text]) for text, row in going])
            ended |= {text: None for (text, _), is_end in zip(going, are_ended, strict=True) if is_end}
            going = [
                (text, row)
                for text, row in going
                if text not in ended and offset + 1 < len(chosen[text]) and gained[text][offset] == row.drafts[offset]
            ]
            offset += 1
        self._has_nan = NAN in tokens
        return gained, ended

    def _update_rows(self, gained: dict[Text, list[int]], ended: dict[Text, None]) -> None:
        """Give texts that differ rows of their own, and remove rows whose texts have ended."""
        self.rows, copies = condense_rows(split_rows(self.rows, gained, ended, keeps_rows=self._keeps_rows))
        if copies:
            self.cache.reserve(len(self.rows), self.cache.room)
            sources, targets = zip(*copies, strict=True)
            self.cache.copy_rows(sources, targets, max(self.rows[target].num_read for target in targets))
        self.cache.hold([row.ids for row in self.rows], [row.num_read for row in self.rows])
        if self._has_nan:  # behind a rejected draft: it must not stay where a mask hides it
            self.cache.forget_behind()

    @contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        """Clear what a forward that fails inside has written."""
        try:
            yield
        except BaseException:
            self.cache.forget_behind()
            raise
