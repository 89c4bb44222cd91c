"""Count where in the answer each model of the demo family is right: teacher-forced, position by position.

    python benchmarks/demo_family_positions.py [--alpha 0.5]

Reads the validation split and prints two Markdown tables: how often the right token is the likeliest one, and the mean
natural log-probability of the right token. The prompt and the right answer up to a position are given
(teacher-forcing), so a position is not hurt by errors in the positions before it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ensembler import EnsembleForCausalLM

ROOT = Path(__file__).resolve().parents[1]
FAMILY = ROOT / "ensembler" / "demo" / "family"
LABELS = {"source_ft": "source FT", "source_pt": "source PT", "target_pt": "target PT"}
POSITIONS = ("first operand", "sign", "second operand", "=", "result", ";", "so", "result again", ".", "end")


def right_answers(family: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of prompt, right answer and end-of-text, for each validation example."""
    examples = [json.loads(line) for line in (family / "data" / "validation.jsonl").read_text().splitlines()]
    return [[*tokenizer(e["prompt"] + e["completion"])["input_ids"], tokenizer.eos_token_id] for e in examples]


@torch.inference_mode()
def answer_logits(model: torch.nn.Module, rows: list[list[int]]) -> Tensor:
    """Logits that predict the ten tokens of the answer, `(examples, 10, vocabulary)`, fp32."""
    found = []
    for row in rows:
        ids = torch.tensor([row[:-1]])
        found.append(model(input_ids=ids).logits[0, -len(POSITIONS) :].float())
    return torch.stack(found)


def table(columns: dict[str, list[str]]) -> str:
    lines = ["| position | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for position, *cells in zip(POSITIONS, *columns.values(), strict=True):
        lines.append(f"| {position} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def top_one(logits: Tensor, right: Tensor) -> list[str]:
    return [f"{100 * share:.1f}" for share in (logits.argmax(-1) == right).float().mean(0).tolist()]


def mean_log_prob(logits: Tensor, right: Tensor) -> list[str]:
    chosen = logits.log_softmax(-1).gather(-1, right[..., None])[..., 0]
    return [f"{value:.2f}" for value in chosen.mean(0).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", type=Path, default=FAMILY)
    parser.add_argument("--alpha", type=float, default=0.5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = right_answers(options.family, AutoTokenizer.from_pretrained(options.family / "source_ft"))
    right = torch.tensor([row[-len(POSITIONS) :] for row in rows])
    models: dict[str, torch.nn.Module] = {}
    for role, label in LABELS.items():
        models[label] = AutoModelForCausalLM.from_pretrained(options.family / role).eval()
    members = {role: models[label] for role, label in LABELS.items()}
    for rule in ("base-change", "eft"):
        ensemble = EnsembleForCausalLM.from_members(rule=rule, alpha=options.alpha, members=members)
        models[f"{rule} {options.alpha:g}"] = ensemble
    named = {name: answer_logits(model, rows) for name, model in models.items()}
    print("Right token is the likeliest, %:\n")
    print(table({name: top_one(z, right) for name, z in named.items()}))
    print("\nMean log-probability of the right token:\n")
    print(table({name: mean_log_prob(z, right) for name, z in named.items()}))


if __name__ == "__main__":
    main()
