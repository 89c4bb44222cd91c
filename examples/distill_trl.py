"""Train the student of examples/distill.py with TRL's `SFTTrainer`, for accelerate, PEFT, checkpoints and logging.

    python examples/distill_trl.py teacher STUDENT OUT

`pip install trl==1.16.0` first; written for transformers 5.23, and no test runs it.
`packing` and `padding_free` do not go with this collator.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset
from distill import collate, divergence, read
from trl import SFTConfig, SFTTrainer


class TopKTrainer(SFTTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean divergence over the labels of all ranks and accumulated steps (`num_items_in_batch`)."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        found = divergence(outputs.logits, inputs)
        loss = found.mean() if num_items_in_batch is None else found.sum() / num_items_in_batch
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over them
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    teacher, student, out = sys.argv[1:]
    TopKTrainer(
        student,
        args=SFTConfig(
            output_dir=out,
            learning_rate=1e-3,
            per_device_train_batch_size=10,
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            logging_steps=10,
            dataset_kwargs={"skip_prepare_dataset": True},  # they are tokens, with labels
            remove_unused_columns=False,  # the teacher's tensors are no arguments of the student
        ),
        train_dataset=Dataset.from_generator(read, gen_kwargs={"folder": teacher}).with_format("torch"),
        data_collator=collate,
    ).train()


if __name__ == "__main__":
    main()
