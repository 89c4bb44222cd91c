"""Write the most probable tokens of an ensemble at every position of given texts, to distil it into one model.

A folder of safetensors shards and an index.json; docs/scoring.md says what they hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ensembler.engine.grid import Grid, GridPoint
from ensembler.errors import ConfigError, PromptError
from ensembler.evaluation.backends import Advance, ignore
from ensembler.evaluation.offline import LogitsFolder
from ensembler.evaluation.request_batches import Batch, Logits, Pass, make_batches, run_passes
from ensembler.evaluation.requests import ScoringRequest
from ensembler.evaluation.scoring import no_log_prob
from ensembler.modeling import EnsembleForCausalLM

FORMAT = 1
_SHARD_BYTES = 64 * 2**20  # an interruption loses the work for so many at most


class TopKWriter:
    """Writes to `folder`, for each scored position, the `k` most probable of the `width` tokens of the vocabulary.

    A sequence is a line of the data, or one window of a long text; `lines` says of which line each is. `shards` has
    them by the names of files of bounded size. Raises ConfigError for a `k` beyond the vocabulary, PromptError for
    choices.
    """

    def __init__(self, requests: Sequence[ScoringRequest], k: int, width: int, folder: LogitsFolder) -> None:
        if k > width:
            raise ConfigError(f"--top-k-logits is {k:,}; the vocabulary has {width:,} tokens: give a number up to that")
        self.k, self.width, self.folder = k, width, folder
        self.shards: dict[str, list[ScoringRequest]] = {}
        self.lines: list[int] = []
        self._sizes: dict[str, int] = {}
        name = ""
        for request in requests:
            if request.has_choices:
                raise PromptError(f"{request.source} has choices, which are no text to learn from; give a continuation")
            for context, continuations in request.windows():
                num = len(continuations[0])
                size = 12 + 4 * (len(context) + num) + num * (6 * k + 8)
                if not name or self._sizes[name] + size > _SHARD_BYTES:
                    name = f"shard-{len(self.shards):05d}.safetensors"
                    self.shards[name], self._sizes[name] = [], 0
                sequence = replace(request, number=len(self.lines), context=context, continuations=continuations)
                self.shards[name].append(sequence)
                self._sizes[name] += size
                self.lines.append(request.number)

    @property
    def missing(self) -> dict[str, list[ScoringRequest]]:
        """The shards that are not there yet, by the names of their files."""
        return {name: shard for name, shard in self.shards.items() if not self.folder.has(name)}

    def check_space(self) -> int:
        """Return how many bytes the folder takes when it is full; raise OutputError where its disk lacks the room."""
        return self.folder.check_space(self._sizes)

    def write(
        self, model: EnsembleForCausalLM, point: GridPoint, *, batch_size: int, advance: Advance = ignore
    ) -> None:
        """Write the shards that are missing, each in one rename, and then the index. `advance` counts sequences.

        Raises RunError; finished shards stay for a run that goes on.
        """
        grid = Grid.of([point], model.rule, model.contract, model.config.outside).to(model.device)
        self.folder.open()
        for name, shard in self.missing.items():
            self.folder.write(name, self._run(shard, model, grid, batch_size, advance))
        index = {
            "format": FORMAT,
            "ensemble": {**model.config.to_dict(), "rule": point.rule, "alpha": point.alpha},
            "rule": point.rule,
            "alpha": point.alpha,
            "k": self.k,
            "vocab_size": self.width,
            "tokenizer": getattr(model.tokenizer, "name_or_path", None),
            "num_lines": len(set(self.lines)),
            "num_sequences": len(self.lines),
            "num_positions": sum(len(one.continuations[0]) for shard in self.shards.values() for one in shard),
            "shards": [
                {"file": name, "lines": [self.lines[one.number] for one in (shard[0], shard[-1])]}
                for name, shard in self.shards.items()
            ],
        }
        self.folder.write_bytes("index.json", json.dumps(index, indent=1, ensure_ascii=False).encode())

    @torch.inference_mode()
    def _run(
        self, shard: Sequence[ScoringRequest], model: EnsembleForCausalLM, grid: Grid, size: int, advance: Advance
    ) -> dict[str, Tensor]:
        ids = [torch.tensor(one.context + one.continuations[0], dtype=torch.int32) for one in shard]
        num_scored = [len(one.continuations[0]) for one in shard]
        num = sum(num_scored)
        tensors = {
            "lines": torch.tensor([self.lines[one.number] for one in shard], dtype=torch.int32),
            "lengths": torch.tensor(list(map(len, ids)), dtype=torch.int32),
            "num_scored": torch.tensor(num_scored, dtype=torch.int32),
            "input_ids": torch.cat(ids),
            "top_ids": torch.empty(num, self.k, dtype=torch.int32),
            "top_log_probs": torch.empty(num, self.k, dtype=torch.float16),
            "rest_log_probs": torch.empty(num),
            "token_log_probs": torch.empty(num),
        }
        own = dict(zip([one.number for one in shard], torch.split(torch.arange(num), num_scored), strict=True))
        for batch in make_batches(shard, size):
            positions = torch.cat([own[one.number] for one in batch.requests])
            for one, logits in run_passes(batch.passes, model.member_set):
                for key, values in _most_probable(batch, one, logits, grid, self.k).items():
                    tensors[key][positions[one.slots]] = values.to("cpu", tensors[key].dtype)
            advance(len(batch.requests))
        return tensors


def _most_probable(batch: Batch, one: Pass, logits: Logits, grid: Grid, k: int) -> dict[str, Tensor]:
    """Return for each token of a pass the k most probable ones in its place, the rest's log-prob, and its own."""
    device = grid.weights.table.device
    log_probs = grid.combine({role: values.to(device) for role, values in logits.items()})[0].log_softmax(-1)
    top, ids = log_probs.topk(k)
    if top[:, 0].isnan().any():
        raise no_log_prob(batch, logits, "all combined logits of a position are -inf")
    needed, tokens = one.needed.to(device), one.tokens.to(device)
    inside = tokens < log_probs.shape[-1]  # a token beyond that is impossible
    own = log_probs[needed, tokens.where(inside, 0)].where(inside, -math.inf)
    rest = log_probs.scatter_(-1, ids, -math.inf).logsumexp(-1)
    found = {"top_ids": ids, "top_log_probs": top, "rest_log_probs": rest}
    return {key: values[needed] for key, values in found.items()} | {"token_log_probs": own}
