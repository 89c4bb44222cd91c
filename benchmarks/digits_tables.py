"""Print the tables of the digits in docs/results.md from the committed rows.

    python benchmarks/digits_tables.py [FOLDER]

FOLDER: in place of the committed results those that `ensembler bench examples/recipes/digits.yaml` wrote there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markdown_tables import table
from rows_to_figures import read_figures

TASKS = ("noisy", "rotated", "inverted", "occluded")
TARGETS = {
    "same_size": "small ViT, 600 images",
    "larger_few": "larger ViT, 150 images",
    "larger": "larger ViT, 600 images",
}
METHODS = {"target_pt": "Target PT", "eft": "EFT / proxy-tuning", "base-change": "Base-change"}
Found = Mapping[str, Mapping[str, Any]]


def main() -> None:
    found = read_figures("bench/digits", Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    for title, lines in (
        ("Accuracy on the test images, % (α)", table_2(found)),
        ("95 % intervals", intervals(found)),
        ("Compared on the same images: points (95 % interval); p by exact McNemar, Holm", compared(found)),
    ):
        print(f"\n{title}\n")
        print("\n".join(lines))


def table_2(found: Found) -> Iterator[str]:
    """The form of base-change's table 2: ↑ and ↓ are above and below source FT, bold is the best of a pair."""
    rows = [["source PT → target PT", "method", *TASKS]]
    for role, name in (("source_pt", "Source PT"), ("source_ft", "Source FT")):
        rows.append(["small ViT, 150 images", name, *(cell(found, "same_size", task, role) for task in TASKS)])
    for target, title in TARGETS.items():
        rows += [
            [f"→ {title}", name, *(cell(found, target, task, role) for task in TASKS)] for role, name in METHODS.items()
        ]
    return table(rows[0], rows[1:])


def cell(found: Found, target: str, task: str, role: str) -> str:
    methods = {one["method"]: one for one in found[f"{target}.{task}"]["methods"]}
    accuracies = {name: one["test"]["estimate"] for name, one in methods.items()}
    here, tuned = accuracies[role], accuracies["source_ft"]
    text = f"{100 * here:.1f}"
    if methods[role]["alpha"] is not None:
        text += f" ({methods[role]['alpha']:g})"
    if role in METHODS:
        arrow = "↑ " if here > tuned else "↓ " if here < tuned else ""
        best = max(accuracies[name] for name in ("source_ft", *METHODS))
        text = arrow + (f"**{text}**" if here == best else text)
    return text


def intervals(found: Found) -> Iterator[str]:
    rows = []
    for role, name in (("source_pt", "Source PT"), ("source_ft", "Source FT")):
        rows.append(["small ViT, 150 images", name, *(interval(found, "same_size", task, role) for task in TASKS)])
    for target, title in TARGETS.items():
        rows += [
            [f"→ {title}", name, *(interval(found, target, task, role) for task in TASKS)]
            for role, name in METHODS.items()
        ]
    return table(["source PT → target PT", "method", *TASKS], rows)


def interval(found: Found, target: str, task: str, role: str) -> str:
    test = next(one["test"] for one in found[f"{target}.{task}"]["methods"] if one["method"] == role)
    return f"{100 * test['low']:.1f} to {100 * test['high']:.1f}"


def compared(found: Found) -> Iterator[str]:
    pairs = [("base-change", "source_ft"), ("eft", "source_ft"), ("base-change", "eft")]
    names = {"source_ft": "source FT", "eft": "EFT", "base-change": "base-change"}
    rows = [
        [f"→ {title}", f"{names[a]} − {names[b]}", *(difference(found[f"{target}.{task}"], a, b) for task in TASKS)]
        for target, title in TARGETS.items()
        for a, b in pairs
    ]
    return table(["source PT → target PT", "compared", *TASKS], rows)


def difference(task: Mapping[str, Any], method: str, against: str) -> str:
    each = next(one for one in task["differences"] if (one["method"], one["against"]) == (method, against))
    test = each["comparison"]["difference"]
    p_value = each["p_holm"]
    p = f"{p_value:.1g}" if p_value < 0.001 else f"{p_value:.3f}"
    return f"{100 * test['estimate']:+.1f} ({100 * test['low']:.1f} to {100 * test['high']:.1f}); {p}"


if __name__ == "__main__":
    main()
