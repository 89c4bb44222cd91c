"""Cases for the tests of transports: two bases and a LoRA of the old one, labelled examples, files of lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from helpers.patch_cases import save_lora, save_model
from helpers.tiny import make_tokenizer
from transformers import AutoModelForCausalLM

EXAMPLES = [
    {"prompt": "the cat is", "answer": "good"},
    {"prompt": "a dog:", "answer": " bad"},
    {"prompt": "q ", "answer": "r"},
]


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def save_pair(folder: Path, **settings: Any) -> tuple[Path, Path, Path]:
    """An old base, a new one that is not far from it, and a LoRA of the old one; both have a tokenizer."""
    old, new = save_model(folder / "old", **settings), folder / "new"
    model = AutoModelForCausalLM.from_pretrained(old, dtype="auto")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    model.save_pretrained(new)
    for base in (old, new):
        make_tokenizer().save_pretrained(base)
    return old, new, save_lora(folder / "lora", settings.get("family", "llama"), 2)
