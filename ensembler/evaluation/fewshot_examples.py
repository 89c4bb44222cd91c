"""Draw the solved examples of a prompt as lm-eval does, and see to it that the question itself is not among them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Self


@dataclass
class Examples:
    """A sampler of few-shot examples, as lm-eval calls it, that draws what lm-eval's draws and looks for `doc` there.

    Another document that asks and answers the same is `doc`, too. `asked`: what is known of the task's documents, since
    examples are drawn many times. `replaces`: another takes its place. `num_found`: how often it was drawn.
    """

    task: Any
    doc: Any
    sampler: Any
    seed: int
    asked: dict[str, str]
    replaces: bool
    num_found: int = 0

    @classmethod
    def of(cls, task: Any, doc: Any, index: int, asked: dict[str, str], *, evaluated: str | None) -> Self:
        """Return the sampler for the document `doc` of lm-eval's `task`, the `index`-th of its split.

        `evaluated`: the split, "test" or "validation", where it is the one that lm-eval evaluates. Its prompts are
        those of lm-eval where examples come from another split, though they may hold the question.
        """
        is_foreign = evaluated is not None and _split_of_examples(task) != getattr(task.config, f"{evaluated}_split")
        return cls(task, doc, task.sampler, index, asked, replaces=not is_foreign)

    def sample(self, n: int, eval_doc: Any = None) -> list[Any]:
        """Return `n` documents. Raises ValueError where there are too few."""
        drawn = self.sampler.sample(n=n, eval_doc=eval_doc)
        own = self._asked(self.doc)
        found = [one for one in drawn if self._asked(one) != own]
        self.num_found += len(drawn) - len(found)
        if len(found) == n or not self.replaces:
            return list(drawn)
        rest = [one for one in self.sampler.fewshot_docs() if one not in found and self._asked(one) != own]
        return found + random.Random(self.seed).sample(rest, n - len(found))

    def _asked(self, doc: Any) -> str:
        """Return question, choices and answer as one text; the document itself where it is made of other fields."""
        whole = repr(doc)
        if whole not in self.asked:
            try:
                choices = self.task.doc_to_choice(doc) if self.task.config.doc_to_choice is not None else None
                self.asked[whole] = repr((self.task.doc_to_text(doc), choices, self.task.doc_to_target(doc)))
            except Exception:  # templates and functions are programs of the task's authors
                self.asked[whole] = whole
        return self.asked[whole]


def _split_of_examples(task: Any) -> str | None:
    """Return the split of the data that examples are drawn from; None where the task writes them itself."""
    config, examples = task.config, task.fewshot_cfg
    if examples.split is None and config.fewshot_config is not None and examples.samples is not None:
        return None
    split = examples.split or config.training_split or config.validation_split or config.test_split
    return None if split is None else str(split)
