"""Train the models of the demo family: tokenizer, batches, the loop, the LoRA.

What this module does not know: what the text says (`demo_text`), sizes and counts (`make_demo_family`), files.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from demo_text import LARGEST_NUMBER, Example, reading
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IGNORED = -100
POOLED_BATCHES = 20
LINEAR_MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Batch = tuple[Tensor, Tensor]  # token ids and labels, both (rows, length), right padded


@dataclass(frozen=True)
class PretrainingConfig:
    """A pre-trained model to make: its size and its reading."""

    name: str
    hidden: int
    layers: int
    share_of_sums: float
    steps: int
    rows_per_step: int = 64
    peak_rate: float = 1e-3


@dataclass(frozen=True)
class FineTuningConfig:
    """Settings of the patch: the share of all sums that its rows may hold, how many rows, how often each is seen."""

    share_of_sums: float = 0.25
    rows: int = 800
    epochs: int = 8
    rows_per_step: int = 32
    rank: int = 8
    peak_rate: float = 3e-3


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- tokenizer --------------------------------------------------------------------------------------------------------


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """One token per word and per number 0..40; the space before a word belongs to the token, so decoding is exact."""
    splitter = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        pre_tokenizers.Split(Regex("[.,;:?]"), "isolated"),
    ])  # fmt: skip
    words = {f"▁{n}" for n in range(LARGEST_NUMBER + 1)} | {";", "▁so"}
    for text in islice(reading(Random(f"{seed} words"), share_of_sums=0.5), 20_000):
        words.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *sorted(words)]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = splitter, decoders.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False, model_max_length=256,
    )  # fmt: skip


# --- batches ----------------------------------------------------------------------------------------------------------


def pad_rows(rows: list[list[int]], labels: list[list[int]], pad_id: int) -> Batch:
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    return ids, torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels])


def reading_batches(settings: PretrainingConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """One document `<s> ... </s>` a row; a batch holds documents of like length, so little of it is padding."""
    rng = Random(f"{seed} {settings.name}")
    documents = reading(rng, settings.share_of_sums)
    for _ in range(0, settings.steps, POOLED_BATCHES):
        pool = tokenizer(list(islice(documents, POOLED_BATCHES * settings.rows_per_step)))["input_ids"]
        rows = sorted(([*ids, tokenizer.eos_token_id] for ids in pool), key=len)
        batches = [rows[i : i + settings.rows_per_step] for i in range(0, len(rows), settings.rows_per_step)]
        rng.shuffle(batches)
        for batch in batches:
            yield pad_rows(batch, batch, tokenizer.pad_token_id)


def task_row(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids of prompt + completion + `</s>`; labels that leave the prompt out."""
    num_prompt = len(tokenizer(example.prompt)["input_ids"])
    ids = [*tokenizer(example.prompt + example.completion)["input_ids"], tokenizer.eos_token_id]
    return ids, [IGNORED] * num_prompt + ids[num_prompt:]


def task_batches(
    examples: list[Example], settings: FineTuningConfig, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[Batch]:
    rng = Random(f"{seed} order")
    for _ in range(settings.epochs):
        rng.shuffle(examples)
        for start in range(0, len(examples), settings.rows_per_step):
            batch = [task_row(e, tokenizer) for e in examples[start : start + settings.rows_per_step]]
            yield pad_rows([row for row, _ in batch], [labels for _, labels in batch], tokenizer.pad_token_id)


# --- training ---------------------------------------------------------------------------------------------------------


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to zero."""
    warmup = max(1, steps // 20)
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def batch_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def train(model: nn.Module, batches: Iterator[Batch], steps: int, peak: float, name: str) -> None:
    """Train in place, in fp32, and say how it goes: smoothed loss, tokens learnt from, minutes."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    model.train()
    started, num_tokens, smooth = time.monotonic(), 0, float("nan")
    for step, (ids, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, peak)
        loss = batch_loss(model, ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_tokens += int((labels[:, 1:] != IGNORED).sum())
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            minutes = (time.monotonic() - started) / 60
            say(f"{name}: step {step + 1}/{steps}, loss {smooth:.3f}, {num_tokens:,} tokens, {minutes:.1f} min")
    model.eval()


def new_model(settings: PretrainingConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    heads = settings.hidden // 32
    ids = {k: getattr(tokenizer, k) for k in ("pad_token_id", "bos_token_id", "eos_token_id")}
    # Llama's 0.02 is meant for widths in the thousands; at this width it leaves attention flat, and copying, which
    # everything else here needs, starts to be learnt after about twice as many steps.
    initializer_range = 0.6 / settings.hidden**0.5
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.hidden, intermediate_size=settings.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=settings.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=initializer_range, **ids,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def pre_train(settings: PretrainingConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = new_model(settings, tokenizer)
    say(f"{settings.name}: {model.num_parameters():,} parameters")
    train(model, reading_batches(settings, tokenizer, seed), settings.steps, settings.peak_rate, settings.name)
    return model


def train_patch(
    source: LlamaForCausalLM,
    examples: list[Example],
    settings: FineTuningConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> PeftModel:
    """A LoRA on every linear map of `source`, trained on the task's completions."""
    torch.manual_seed(seed)
    rank, modules = settings.rank, sorted(LINEAR_MAPS)
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=modules)
    model = get_peft_model(source, lora)
    steps = settings.epochs * math.ceil(len(examples) / settings.rows_per_step)
    train(model, task_batches(list(examples), settings, tokenizer, seed), steps, settings.peak_rate, "patch")
    return model
