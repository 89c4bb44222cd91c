"""The embedded family: three small language models that share a tokenizer, made by examples/make_demo_family.py."""

from pathlib import Path


def demo_folder() -> Path:
    """Return the folder of the embedded ensemble; it is an ordinary one, with its members inside."""
    return Path(__file__).parent / "family"


def demo_task() -> Path:
    """Return the YAML file of the family's task, sums in words, as lm-evaluation-harness reads it."""
    return demo_folder() / "data" / "sums.yaml"


def demo_recipe() -> Path:
    """Return the recipe of the family's benchmark, for `ensembler bench`."""
    return demo_folder() / "bench.yaml"
