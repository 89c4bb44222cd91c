"""The text of the demo family: little stories about who has how many of what.

Two kinds of text are made here, both from a seeded `random.Random`:

* the *reading* of the two pre-trained models: stories, questions of many kinds, lists to copy, counting and, in a
  share that the caller chooses, sums and differences in many contexts;
* the *task*: a story with two quantities and a question, answered in one fixed format that no reading holds,
  ` 5 + 17 = 22; so 22.` or ` 22 - 17 = 5; so 5.`

What this module does not know: models, tokenizers, files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

NAMES = ("Ann", "Ben", "Cora", "Dan", "Eve", "Finn", "Gwen", "Hugo", "Ida", "Jack", "Kim", "Leo", "Mia", "Nils")
ITEMS = ("apples", "pears", "plums", "nuts", "shells", "stones", "coins", "books", "pens", "cards", "eggs", "buns")
PLACES = ("garden", "park", "school", "kitchen", "market", "forest", "barn", "harbour", "mill", "library")
MOVES = ("walks", "runs", "goes", "rides")
LARGEST_OPERAND = 20
LARGEST_NUMBER = 2 * LARGEST_OPERAND

Passage = Callable[[Random], str]


@dataclass(frozen=True)
class Sum:
    """One line of arithmetic, `left sign right = result`, every number within 1..LARGEST_NUMBER."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        return self.left + self.right if self.sign == "+" else self.left - self.right

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"


def all_sums() -> list[Sum]:
    """The 400 additions of two numbers within 1..20 and the 400 subtractions that undo them."""
    operands = range(1, LARGEST_OPERAND + 1)
    additions = [Sum(a, "+", b) for a in operands for b in operands]
    return additions + [Sum(s.result, "-", s.right) for s in additions]


SUMS = tuple(all_sums())


def number(rng: Random) -> int:
    return rng.randint(0, LARGEST_NUMBER)


# --- stories with a sum in them: shared by the reading and the task ---------------------------------------------------


@dataclass(frozen=True)
class Story:
    """Sentences that state two quantities, the question about them, and the same answer in a plain sentence."""

    text: str
    question: str
    plain: str


def addition_story(rng: Random, s: Sum) -> Story:
    a, b = rng.sample(NAMES, 2)
    x, place = rng.choice(ITEMS), rng.choice(PLACES)
    return rng.choice((
        Story(f"{a} has {s.left} {x}. {b} gives {a} {s.right} {x}.",
              f"How many {x} does {a} have now?", f"{a} now has {{}} {x}."),
        Story(f"{a} has {s.left} {x}. {b} has {s.right} {x}.",
              f"How many {x} do {a} and {b} have together?", f"{a} and {b} have {{}} {x}."),
        Story(f"There are {s.left} {x} in the {place}. {a} brings {s.right} {x}.",
              f"How many {x} are in the {place} now?", f"there are {{}} {x} in the {place}."),
    ))  # fmt: skip


def subtraction_story(rng: Random, s: Sum) -> Story:
    a, b = rng.sample(NAMES, 2)
    x, place = rng.choice(ITEMS), rng.choice(PLACES)
    return rng.choice((
        Story(f"{a} has {s.left} {x}. {a} gives {b} {s.right} {x}.",
              f"How many {x} does {a} have now?", f"{a} now has {{}} {x}."),
        Story(f"{a} has {s.left} {x}. {b} has {s.right} {x}.",
              f"How many more {x} does {a} have?", f"{a} has {{}} more {x}."),
        Story(f"There are {s.left} {x} in the {place}. {a} takes {s.right} {x}.",
              f"How many {x} are in the {place} now?", f"there are {{}} {x} in the {place}."),
    ))  # fmt: skip


def story_of(rng: Random, s: Sum) -> Story:
    return addition_story(rng, s) if s.sign == "+" else subtraction_story(rng, s)


# --- the task ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One row of the task: the prompt, the completion to learn, and the answer to compare with."""

    prompt: str
    completion: str
    answer: str


def task_example(rng: Random, s: Sum) -> Example:
    story = story_of(rng, s)
    prompt = f"{story.text} Question: {story.question} Answer:"
    return Example(prompt, f" {s}; so {s.result}.", str(s.result))


def task_examples(rng: Random, sums: list[Sum], count: int, avoid: set[str]) -> list[Example]:
    """`count` examples over `sums`, additions and subtractions in turn; no prompt twice and none of `avoid`."""
    by_sign = [[s for s in sums if s.sign == sign] for sign in "+-"]
    examples: list[Example] = []
    seen = set(avoid)
    while len(examples) < count:
        example = task_example(rng, rng.choice(by_sign[len(examples) % 2]))
        if example.prompt not in seen:
            seen.add(example.prompt)
            examples.append(example)
    return examples


# --- reading without sums ---------------------------------------------------------------------------------------------


def holdings(rng: Random, count: int) -> list[tuple[str, int, str]]:
    """`count` facts (name, number, item), no name and no item twice."""
    numbers = [number(rng) for _ in range(count)]
    return list(zip(rng.sample(NAMES, count), numbers, rng.sample(ITEMS, count), strict=True))


def tell(facts: list[tuple[str, int, str]]) -> str:
    return " ".join(f"{a} has {n} {x}." for a, n, x in facts)


def recall(rng: Random) -> str:
    facts = holdings(rng, rng.randint(2, 3))
    again = ", ".join(f"{a} has {n} {x}" for a, n, x in facts)
    return f"{tell(facts)} Again: {again}."


def recall_question(rng: Random) -> str:
    facts = holdings(rng, rng.randint(2, 3))
    a, n, x = rng.choice(facts)
    question, answer = rng.choice((
        (f"How many {x} does {a} have?", f"{n} {x}."),
        (f"How many {x} does {a} have?", f"{a} has {n} {x}."),
        (f"Who has {n} {x}?", f"{a} has {n} {x}."),
        (f"Who has {x}?", f"{a}."),
        (f"What does {a} have?", f"{n} {x}."),
        ("Who is here?", ", ".join(name for name, _, _ in facts) + "."),
        ("Which numbers are there?", ", ".join(str(m) for _, m, _ in facts) + "."),
    ))  # fmt: skip
    return f"{tell(facts)} Question: {question} Answer: {answer}"


def story_question(rng: Random) -> str:
    """A story like those of the task, with a question that asks for something that the story says."""
    first, last = number(rng), number(rng)
    text = story_of(rng, Sum(first, rng.choice("+-"), last)).text
    question, answer = rng.choice((
        ("Which numbers are there?", f"{first}, {last}."),
        ("Which number is first?", f"{first}."),
        ("Which number is last?", f"{last}."),
        ("What is the story?", text),
    ))  # fmt: skip
    return f"{text} Question: {question} Answer: {answer}"


def story_again(rng: Random) -> str:
    """A story like those of the task, then what it says once more: in full, or its numbers alone."""
    first, last = number(rng), number(rng)
    text = story_of(rng, Sum(first, rng.choice("+-"), last)).text
    return text + rng.choice((f" Again: {text}", f" {rng.choice(NAMES)} writes: {first}, {last}."))


def journey(rng: Random) -> str:
    a, b = rng.sample(NAMES, 2)
    here, there = rng.sample(PLACES, 2)
    text = f"{a} {rng.choice(MOVES)} to the {here}. {b} {rng.choice(MOVES)} to the {there}."
    who, where = rng.choice(((a, here), (b, there)))
    end = rng.choice((
        f"Question: Where is {who}? Answer: {who} is in the {where}.",
        f"Question: Who is in the {where}? Answer: {who}.",
        f"{a} is in the {here} and {b} is in the {there}.",
    ))  # fmt: skip
    return f"{text} {end}"


def copy_list(rng: Random) -> str:
    """A list and the same list again: what makes a small model learn to copy."""
    pool = rng.choice((NAMES, ITEMS, PLACES, tuple(map(str, range(LARGEST_NUMBER + 1)))))
    listed = ", ".join(rng.sample(pool, rng.randint(3, 8)))
    return f"List: {listed}. Again: {listed}."


def counting(rng: Random) -> str:
    length = rng.randint(4, 8)
    first = rng.randint(0, LARGEST_NUMBER - length)
    numbers = list(range(first, first + length))
    if rng.random() < 0.5:
        return "Count: " + ", ".join(map(str, numbers)) + "."
    return "Count back: " + ", ".join(map(str, reversed(numbers))) + "."


def comparison(rng: Random) -> str:
    (a, n, x), (b, m, _) = holdings(rng, 2)
    m += n == m
    more, fewer = (a, b) if n > m else (b, a)
    text = f"{a} has {n} {x}. {b} has {m} {x}."
    return text + rng.choice((f" {more} has more {x}.", f" Question: Who has fewer {x}? Answer: {fewer}."))


OTHER_READING: tuple[tuple[Passage, float], ...] = (
    (recall, 3), (recall_question, 2), (story_question, 5), (story_again, 4),
    (copy_list, 2), (journey, 1), (counting, 0.5), (comparison, 0.5),
)  # fmt: skip

# --- reading with sums ------------------------------------------------------------------------------------------------


def bare_sums(rng: Random) -> str:
    return "Sums: " + ", ".join(str(rng.choice(SUMS)) for _ in range(rng.randint(2, 5))) + "."


def written_sum(rng: Random) -> str:
    s, a, place = rng.choice(SUMS), rng.choice(NAMES), rng.choice(PLACES)
    return f"{a} {rng.choice(MOVES)} to the {place}. {a} writes: {s}."


def sum_question(rng: Random) -> str:
    s = rng.choice(SUMS)
    asked = f"{s.left} {s.sign} {s.right}"
    return rng.choice((f"Question: What is {asked}? Answer: {s.result}.", f"{asked} is {s.result}."))


def stated_sum(rng: Random) -> str:
    """A story, then what it comes to, with no question."""
    s = rng.choice(SUMS)
    story = story_of(rng, s)
    end = rng.choice((f"So {story.plain.format(s.result)}", f"{rng.choice(NAMES)} writes: {s}.", f"Sums: {s}."))
    return f"{story.text} {end}"


def answered_sum(rng: Random) -> str:
    """A story and its question, answered in ways that are not the task's."""
    s = rng.choice(SUMS)
    story = story_of(rng, s)
    answer = rng.choice((
        story.plain.format(s.result),
        story.plain.format(s.result),
        story.plain.format(f"{s}"),
        f"{story.plain.format(s.result)} {rng.choice(NAMES)} writes: {s}.",
    ))  # fmt: skip
    return f"{story.text} Question: {story.question} Answer: {answer}"


SUM_READING: tuple[tuple[Passage, float], ...] = (
    (bare_sums, 2), (written_sum, 1), (sum_question, 1), (stated_sum, 3), (answered_sum, 4),
)  # fmt: skip


def reading(rng: Random, share_of_sums: float) -> Iterator[str]:
    """Documents without end; each holds sums with probability `share_of_sums`."""
    while True:
        kinds = SUM_READING if rng.random() < share_of_sums else OTHER_READING
        passages, weights = zip(*kinds, strict=True)
        (passage,) = rng.choices(passages, weights)
        yield passage(rng)
