"""Make the demo family: three small Llama models, a LoRA patch and the data of one task, from a seed.

    python examples/make_demo_family.py [FOLDER] [--seed 0]

| in FOLDER | what |
|---|---|
| `source_pt/` | the old pre-trained model: less reading, few sums in it |
| `patch/` | a PEFT LoRA folder, trained on `source_pt` with a few hundred rows of the task |
| `source_ft/` | `source_pt` with `patch` merged into the weights |
| `target_pt/` | the new pre-trained model: larger, more reading, many sums in it, none in the task's format |
| `config.json` ... | the ensemble of the three, base-change at the alpha that validation chose |
| `updated_pt/`, `direct_updated/`, `direct_target/` | see make_demo_update.py |
| `data/` | `validation.jsonl`, `test.jsonl`, `examples.jsonl`, and `task.json` that says how an answer is read |

The source side and the target side are made by two processes of one thread each. Text, tokenizer and data are
bit-reproducible from the seed on any machine. The weights are so only with the same torch and the same kind of CPU:
elsewhere sums of floats round differently.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random

import torch
from demo_text import SUMS, Example, Sum, task_examples
from demo_training import (
    FineTuningConfig,
    PretrainingConfig,
    make_tokenizer,
    pad_rows,
    pre_train,
    say,
    task_row,
    train_patch,
)
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ensembler.config import EnsembleConfig
from ensembler.preflight import check_ensemble

DEFAULT_FOLDER = Path(__file__).resolve().parents[1] / "ensembler" / "demo" / "family"
TASK = {"answer_pattern": r"so (\d+)\.", "max_new_tokens": 16}
ALPHA = 0.8  # chosen on the validation rows by benchmarks/demo_family.py
CHAT_TEMPLATE = "{{ messages[-1]['content'] }}"  # no conversation: each message is a prompt of its own
HELD_OUT = {"validation": 400, "test": 1000, "examples": 8}

SOURCE = PretrainingConfig("source_pt", hidden=128, layers=4, share_of_sums=0.15, steps=2000)
TARGET = PretrainingConfig("target_pt", hidden=192, layers=4, share_of_sums=0.5, steps=2400)
FINE_TUNING = FineTuningConfig()


# --- the task's rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskData:
    """The rows of the task; no prompt is in two of them, and held-out rows hold only sums that `training` lacks."""

    training: list[Example]
    validation: list[Example]
    test: list[Example]
    examples: list[Example]


def split_sums(seed: int, share: float) -> tuple[list[Sum], list[Sum]]:
    """The sums that fine-tuning rows may hold, and the others."""
    shuffled = list(SUMS)
    Random(f"{seed} sums").shuffle(shuffled)
    cut = round(share * len(shuffled))
    return shuffled[:cut], shuffled[cut:]


def make_task_data(seed: int, settings: FineTuningConfig) -> TaskData:
    taught, held_out = split_sums(seed, settings.share_of_sums)
    training = task_examples(Random(f"{seed} training"), taught, settings.rows, set())
    seen = {e.prompt for e in training}
    splits = {}
    for name, count in HELD_OUT.items():
        splits[name] = task_examples(Random(f"{seed} {name}"), held_out, count, seen)
        seen |= {e.prompt for e in splits[name]}
    return TaskData(training, **splits)


# --- files ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def report_rounding(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> None:
    """Say how many of the likeliest next tokens, over the validation rows, differ when the weights are rounded."""
    rows = [task_row(e, tokenizer)[0] for e in examples]
    ids, labels = pad_rows(rows, rows, tokenizer.pad_token_id)
    exact = {k: v.clone() for k, v in model.state_dict().items()}
    before = model(input_ids=ids).logits.argmax(-1)[labels >= 0]
    for dtype in (torch.float16, torch.bfloat16):
        model.load_state_dict({k: v.to(dtype).float() for k, v in exact.items()})
        changed = int((model(input_ids=ids).logits.argmax(-1)[labels >= 0] != before).sum())
        say(f"{dtype} weights change {changed:,} of {before.numel():,} likeliest next tokens")
    model.load_state_dict(exact)


def save_member(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a member as float16. The model keeps the rounded weights, as float32: what follows builds on the files."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()
    # float16 saves room on disk, but CPUs compute in it several times slower: load as float32 unless told otherwise.
    config = LlamaConfig.from_pretrained(folder)
    config.dtype = torch.float32
    config.save_pretrained(folder)


def save_patch(patched: PeftModel, folder: Path, base: str = "source_pt") -> None:
    """Write the LoRA folder without what PEFT adds from this machine: a path, a set's order, an empty model card."""
    patched.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = f"../{base}"
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_data(data: TaskData, folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in HELD_OUT:
        rows = "".join(json.dumps(asdict(e)) + "\n" for e in getattr(data, name))
        (folder / f"{name}.jsonl").write_text(rows)
    (folder / "task.json").write_text(json.dumps({**TASK, "seed": seed}, indent=2) + "\n")


# --- the two sides ----------------------------------------------------------------------------------------------------


def make_source(folder: Path, seed: int) -> None:
    """`source_pt`, then `patch` trained on it as it was written, then `source_ft` with the patch merged."""
    torch.set_num_threads(1)
    tokenizer, data = make_tokenizer(seed), make_task_data(seed, FINE_TUNING)
    source = pre_train(SOURCE, tokenizer, seed)
    report_rounding(source, tokenizer, data.validation)
    save_member(source, tokenizer, folder / "source_pt")
    patched = train_patch(source, data.training, FINE_TUNING, tokenizer, seed)
    save_patch(patched, folder / "patch")
    merged = patched.merge_and_unload()
    report_rounding(merged, tokenizer, data.validation)
    save_member(merged, tokenizer, folder / "source_ft")


def make_target(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    tokenizer, data = make_tokenizer(seed), make_task_data(seed, FINE_TUNING)
    model = pre_train(TARGET, tokenizer, seed)
    report_rounding(model, tokenizer, data.validation)
    save_member(model, tokenizer, folder / "target_pt")


def write_ensemble(folder: Path) -> None:
    """Make the folder itself an ensemble of the members in it, as `ensembler create` would beside them."""
    members = {role: str(folder / role) for role in ("source_ft", "source_pt", "target_pt")}
    checked = check_ensemble(EnsembleConfig(rule="base-change", alpha=ALPHA, members=members))
    content = {**checked.config.to_dict(), "members": {role: {"model": f"./{role}"} for role in members}}
    tokenizer = checked.require_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    checked.generation_config.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def make_family(folder: Path, seed: int) -> None:
    from make_demo_update import make_update  # it builds on this module

    save_data(make_task_data(seed, FINE_TUNING), folder / "data", seed)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        for side in [processes.submit(make, folder, seed) for make in (make_source, make_target)]:
            side.result()
    write_ensemble(folder)
    make_update(folder, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    make_family(options.folder, options.seed)
    say(f"made {options.folder} in {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
