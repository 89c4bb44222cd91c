"""Train one model to write as an ensemble does, from the probabilities that `ensembler score --top-k-logits` wrote.

    ensembler score demo --data texts.jsonl --alpha 0.8 --top-k-logits 8 --output teacher
    python examples/distill.py teacher STUDENT OUT

STUDENT is the folder or hub id of a model with the ensemble's tokenizer; its vocabulary may be wider. docs/scoring.md
describes the folder `teacher`. examples/distill_trl.py takes the functions below to TRL.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

SCORED = ("top_ids", "top_log_probs", "rest_log_probs")


def read(folder: str | Path) -> Iterator[dict[str, Tensor]]:
    """Yield `input_ids` and `labels` (length,) of each sequence, and the teacher's tensors for its last tokens."""
    for shard in json.loads((Path(folder) / "index.json").read_text("utf-8"))["shards"]:
        tensors = load_file(Path(folder) / shard["file"])
        num_scored = tensors["num_scored"].tolist()
        scored = {key: tensors[key].split(num_scored) for key in SCORED}
        for number, ids in enumerate(tensors["input_ids"].long().split(tensors["lengths"].tolist())):
            labels = ids.clone()
            labels[: -num_scored[number]] = -100
            yield {"input_ids": ids, "labels": labels, **{key: scored[key][number] for key in SCORED}}


def collate(sequences: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors (rows, longest, ...), padded on the right; the teacher's stand where the labels stand."""
    batch: dict[str, list[Tensor]] = {key: [] for key in ("input_ids", "attention_mask", "labels", *SCORED)}
    for one in sequences:
        batch["input_ids"].append(one["input_ids"])
        batch["attention_mask"].append(torch.ones_like(one["input_ids"]))
        batch["labels"].append(one["labels"])
        for key in SCORED:
            unscored = one[key].new_zeros(len(one["labels"]) - len(one[key]), *one[key].shape[1:])
            batch[key].append(torch.cat([unscored, one[key]]))
    return {
        key: pad_sequence(rows, batch_first=True, padding_value=-100 if key == "labels" else 0)
        for key, rows in batch.items()
    }


def divergence(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return KL(teacher || student) in nats at each label, over k + 1 events: the k tokens, and any other.

    It is at most the divergence over the whole vocabulary. Without the last event, nothing would say how much the k
    tokens have together. `logits` has shape (rows, longest, V).
    """
    is_label = batch["labels"][:, 1:] != -100
    top_ids, top_log_probs, rest = (batch[key][:, 1:][is_label] for key in SCORED)
    student = logits[:, :-1][is_label].float().log_softmax(-1).gather(-1, top_ids.long())
    others = (1 - student.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()  # rounding may leave nothing, or less
    teacher = torch.cat([top_log_probs.float(), rest[:, None]], dim=-1).exp()
    return F.kl_div(torch.cat([student, others], dim=-1), teacher, reduction="none").sum(-1)


def main() -> None:
    """Train the student and print the divergence of the first and the last batch of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("out")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    given = parser.parse_args()

    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_pretrained(given.student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=given.learning_rate)
    batches = DataLoader(list(read(given.teacher)), given.batch_size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    for epoch in range(given.epochs):
        losses = []
        for batch in batches:
            logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = divergence(logits, batch).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch}: {losses[0]:.2f} to {losses[-1]:.2f} nats per position")
    student.save_pretrained(given.out)


if __name__ == "__main__":
    main()
