"""Make what the demo family needs to compare an ensemble with a ported patch: an update of the old base, and LoRAs.

    python examples/make_demo_update.py [FOLDER] [--seed 0]

| in FOLDER | what |
|---|---|
| `updated_pt/` | `source_pt` after more reading, many sums in it: the new base of the old size, which `patch` fits |
| `direct_updated/` | a LoRA of `updated_pt`, trained as `patch` was: what training again would give |
| `direct_target/` | the same of `target_pt` |

FOLDER has what make_demo_family.py makes, which calls this.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from demo_training import PretrainingConfig, make_tokenizer, reading_batches, say, train, train_patch
from make_demo_family import DEFAULT_FOLDER, FINE_TUNING, make_task_data, save_member, save_patch
from transformers import LlamaForCausalLM

UPDATE = PretrainingConfig("updated_pt", hidden=128, layers=4, share_of_sums=0.5, steps=800, peak_rate=5e-4)


def make_update(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    tokenizer, data = make_tokenizer(seed), make_task_data(seed, FINE_TUNING)
    updated = LlamaForCausalLM.from_pretrained(folder / "source_pt", dtype=torch.float32)
    torch.manual_seed(seed)
    train(updated, reading_batches(UPDATE, tokenizer, seed), UPDATE.steps, UPDATE.peak_rate, UPDATE.name)
    save_member(updated, tokenizer, folder / UPDATE.name)
    for base, name in (("updated_pt", "direct_updated"), ("target_pt", "direct_target")):
        model = LlamaForCausalLM.from_pretrained(folder / base, dtype=torch.float32)
        save_patch(train_patch(model, data.training, FINE_TUNING, tokenizer, seed), folder / name, base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_update(options.folder, options.seed)
    say(f"made the update in {options.folder}")


if __name__ == "__main__":
    main()
