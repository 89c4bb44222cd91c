"""Make page, summary and pictures of the committed benchmarks and sweeps from their rows, without a model.

    make results
    python benchmarks/make_results.py [--output build/results] [NAME ...]

NAME: a folder below benchmarks/results, such as bench/demo; all are made by default. The committed report.html of each
is a copy of the one that is made here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rows_to_figures import RECIPES, SWEEPS, replay

from ensembler.evaluation.figures import TaskFigures
from ensembler.evaluation.report import changed_in, write_report
from ensembler.evaluation.summary import summarise


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=[*RECIPES, *SWEEPS])
    parser.add_argument("--output", type=Path, default=Path("build", "results"))
    given = parser.parse_args()
    for name in given.names:
        print(*(given.output / name / file for file in write_files(name, given.output / name)), sep="\n")


def write_files(name: str, out: Path) -> list[str]:
    """Write the files of one benchmark or sweep into the folder `out` and return their names."""
    results, studies, title, description = replay(name)
    out.mkdir(parents=True, exist_ok=True)

    def changed(task: TaskFigures) -> list[dict[str, Any]]:
        """Examples of what α changed, where the rows have the prompts."""
        has_prompts = any(prompt for run in results.runs() for _, _, _, prompt, *_ in results.documents(run))
        return changed_in(studies, results, task) if has_prompts else []

    with results:
        return write_report(
            out,
            title,
            description,
            summarise(studies, results),
            command=results.command,
            settings=results.settings,
            changed=changed,
        )


if __name__ == "__main__":
    main()
