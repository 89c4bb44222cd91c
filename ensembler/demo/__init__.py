"""The embedded family: three small language models that share a tokenizer, made by examples/make_demo_family.py."""

from pathlib import Path


def demo_folder() -> Path:
    """Return the folder of the embedded ensemble; it is an ordinary one, with its members inside."""
    return Path(__file__).parent / "family"
