"""The states of the members behind the texts of one decode loop: each is made from the one a token before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ensembler.engine.prefill import Place
from ensembler.engine.text_members import TextMembers
from ensembler.engine.text_question import States


class TextStates:
    """Knows the states by text, and by where its prompt ends: a prompt is read as one, whatever was decoded before.

    Kept are twice as many as were ever asked for at once: drafts that are rejected leave texts that go on from an
    earlier token, and new texts join those that run. What is not there is made again from the prompt on.
    """

    def __init__(self, members: TextMembers) -> None:
        self._members = members
        self._states: OrderedDict[tuple[int, tuple[int, ...]], States] = OrderedDict()
        self._most = 0

    def of(self, places: Sequence[Place]) -> list[States]:
        """Return the states behind the texts of places. Raises PromptError for a prompt that a member cannot read."""
        found = [self._behind(place.num_prompt, tuple(place.ids)) for place in places]
        self._most = max(self._most, 2 * len(places) + 2)
        while len(self._states) > self._most:
            self._states.popitem(last=False)
        return found

    def _behind(self, num_prompt: int, ids: tuple[int, ...]) -> States:
        found = self._states.pop((num_prompt, ids), None)
        if found is None:
            before = self._states.get((num_prompt, ids[:-1])) if len(ids) > num_prompt else None
            if before is None:
                found = self._members.along(ids, num_prompt)[-1]
            else:
                found = self._members.advance(before, ids[-1])
        self._states[num_prompt, ids] = found
        return found
