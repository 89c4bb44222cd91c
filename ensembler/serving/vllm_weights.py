"""Keep the weights of every request in vLLM's batch, and say which belong to each token of a step.

vLLM has two model runners. V1 tells a logits processor which requests were added and moved; V2 asks the model for a
class of states. One class serves both as the logits processor, since vLLM takes an entry point for all models of an
environment: for a model that is no ensemble it does nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import get_forward_context
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as ProcessorV1
from vllm.v1.sample.logits_processor.interface import MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2

from ensembler.config import EnsembleConfig
from ensembler.errors import ConfigError, RunError
from ensembler.serving.choice import READER
from ensembler.serving.request_points import ServedRules
from ensembler.serving.token_counts import NUM_COLUMNS, TokenCounts
from ensembler.serving.vllm_config import all_served_rules

_made: WeakValueDictionary[int, WeightSlots] = WeakValueDictionary()  # by id of the configuration of an engine
_WARM_UP = ("_warmup_", "_v2_mixed_warmup_")  # names of the V2 runner's own requests on a GPU


class WeightSlots:
    """The weights of the request in each slot of a batch, (slots, 2 · members + 2) fp32 on the device of the model.

    `table` and `of_tokens` stay where they are in memory: CUDA graphs read them there. `counts`: of tokens, where the
    worker is extended by `AuditReader`, else None; then rows have the columns behind the weights that `number_tokens`
    reads.
    """

    def __init__(self, vllm_config: Any, rules: ServedRules) -> None:
        scheduler, device = vllm_config.scheduler_config, vllm_config.device_config.device
        self.config, self.rules = vllm_config, rules  # the configuration lives as long, so its id is no other's
        self.is_followed = False  # whether anybody tells which requests come and go
        self.failures: Tensor | None = None  # (outputs, members): the last columns of this step's logits
        is_counted = vllm_config.parallel_config.worker_extension_cls == READER
        at_anchor = replace(rules.default, alpha=0.0)  # this and the default have counts whatever comes first
        self.counts = TokenCounts(device, [rules.default, at_anchor]) if is_counted else None
        uncounted = [0.0] * (0 if self.counts is None else NUM_COLUMNS)
        default = torch.tensor([*rules.weights_of(rules.default), *uncounted], dtype=torch.float32)
        self._host = default.repeat(scheduler.max_num_seqs, 1)
        self._is_flushed = True
        self.table = self._host.to(device, copy=True)
        self.of_tokens = default.to(device).repeat(scheduler.max_num_batched_tokens + scheduler.max_num_seqs, 1)
        self._numbers = torch.arange(len(self.of_tokens), dtype=torch.int32, device=device)

    def put(self, slot: int, sampling_params: Any, num_known: int, *, is_counted: bool = True) -> None:
        """Set the weights that a new request asks for; `flush` hands them to the device.

        `num_known`: its tokens so far, also those before it was preempted; whatever is behind them is to be sampled.
        """
        arguments = None if sampling_params is None else sampling_params.extra_args
        point = self.rules.point_of(arguments)
        row = self.rules.weights_of(point)
        if self.counts is not None:
            row = (*row, self.counts.number_of(point) if is_counted else 0, num_known - 1)
        self._host[slot] = torch.tensor(row)
        self._is_flushed = False

    def begin_step(self) -> None:
        """Count the tokens of the next logits, where tokens are counted."""
        if self.counts is not None:
            self.counts.begin_step()

    def move(self, slot: int, to: int, *, swap: bool) -> None:
        """Move the weights of a slot to another one, or swap the two."""
        self._is_flushed = False
        before = self._host[to].clone()
        self._host[to] = self._host[slot]
        if swap:
            self._host[slot] = before

    def flush(self) -> None:
        """Copy the weights of all slots to the device, for the next step, if any changed; wait for nothing."""
        if not self._is_flushed:
            host = self._host.pin_memory() if self.table.is_cuda else self._host  # a copy: the next step changes _host
            self.table.copy_(host, non_blocking=True)
            self._is_flushed = True

    def of_step(self, num: int) -> Tensor:
        """Return the weights of each token of a step of the V1 runner; in a trial run the default ones.

        Raises RunError where nobody tells which requests come and go: all would get the default, unseen.
        """
        starts = starts_of_step()
        if starts is None:
            return self.of_tokens[:num]
        if not self.is_followed:
            raise RunError(
                "vLLM did not load ensembler's entry point in vllm.logits_processors, so requests could not choose "
                "their alpha; install ensembler again (pip install -e .)"
            )
        return self.of_each_token(num, starts)

    def of_each_token(self, num: int, starts: Tensor, slots: Tensor | None = None) -> Tensor:
        """Return the weights (num, 2 · members + 2) of each token of a step.

        `starts` (requests + 1,): where the tokens of each request begin; `slots` (requests,): the slot of each (None:
        slots in their order). Tokens behind the last request are padding and get anybody's.
        """
        last = len(starts) - 2
        requests = torch.searchsorted(starts[1:], self._numbers[:num], right=True).clamp_(max=last)
        return self.table[requests if slots is None else slots.long()[requests]]


def slots_of(vllm_config: Any) -> WeightSlots:
    """Return the slots of an engine: its runner, model and logits processor share one configuration."""
    found = _made.get(id(vllm_config))
    if found is None:
        found = _made[id(vllm_config)] = WeightSlots(vllm_config, vllm_config.model_config.hf_config.rules)
    return found


def starts_of_step() -> Tensor | None:
    """Return where the tokens of each request of this step begin, (requests + 1,) int32; None in a trial run.

    Raises RunError for attention that does not say so.
    """
    metadata = get_forward_context().attn_metadata
    if metadata is None:
        return None
    found: list[Tensor] = []
    for one in {id(one): one for one in metadata.values()}.values():
        if getattr(one, "query_start_loc", None) is None:
            raise RunError(
                f"vLLM's attention does not say which request a token is of ({type(one).__name__}); give another "
                "--attention-backend, such as FLASH_ATTN"
            )
        found.append(one.query_start_loc)
    return min(found, key=len)  # attention in chunks splits requests into pieces of its own


class PointsOfRequests(ProcessorV1, ProcessorV2):  # type: ignore[misc,unused-ignore]
    """Keep the slots of an ensemble up to date on the V1 runner; on both, check requests and permit members' ids.

    Grammars, lists of permitted ids and `min_tokens` forbid the id of a member that computed NaN: such a row would
    permit none, and the text go on with the id 0.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise VLLMValidationError, the server's 400, for a rule or α that no ensemble of this process can serve."""
        reason = None
        for rules in all_served_rules():
            try:
                rules.point_of(sampling_params.extra_args)
            except ConfigError as error:
                reason = error
            else:
                return
        if reason is not None:
            raise VLLMValidationError(str(reason)) from reason

    def __init__(self, vllm_config: Any, *given: Any) -> None:
        """`given`: on the V1 runner (device, is_pin_memory), on the V2 runner the states of its requests."""
        is_ours = isinstance(vllm_config.model_config.hf_config, EnsembleConfig)
        self._slots = slots_of(vllm_config) if is_ours else None
        if self._slots is not None and len(given) == 2:
            self._slots.is_followed = True

    def is_argmax_invariant(self) -> bool:
        """Return whether `apply` changes nothing, as for a model that is no ensemble."""
        return self._slots is None

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """Return the logits (n, V + members), the ids of members as the model gave them; vLLM calls this last."""
        failures = None if self._slots is None else self._slots.failures
        if failures is not None and len(failures) == len(logits):  # else the logits are not this step's
            logits[:, -failures.shape[1] :] = failures
        return logits

    def add_request(self, slot: int, sampling_params: Any) -> bool:
        """Return whether the V2 runner calls `apply` for this request's sake; what else forbids ids has it called."""
        return self._slots is not None and sampling_params.structured_outputs is not None

    def update_state(self, update: Any) -> None:
        """Follow the requests of the V1 runner, which come, go and move before the forward of a step."""
        if self._slots is None:
            return
        self._slots.begin_step()
        if update is None:
            return
        for slot, params, prompt, texts in update.added:
            self._slots.put(slot, params, len(prompt or ()) + len(texts))
        for one, other, direction in update.moved:
            self._slots.move(one, other, swap=direction == MoveDirectionality.SWAP)
        self._slots.flush()


def state_class(slots: WeightSlots) -> type:
    """Return the class of states that the V2 runner makes for the model: it keeps the slots."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState  # not in processes without a model

    class EnsembleState(DefaultModelState):  # type: ignore[misc,unused-ignore]
        supports_prompt_embeds = False

        def add_request(self, slot: int, request: Any) -> None:
            super().add_request(slot, request)
            is_counted = not request.req_id.startswith(_WARM_UP)
            slots.put(slot, request.sampling_params, len(request.prefill_token_ids), is_counted=is_counted)

        def apply_staged_writes(self) -> None:
            super().apply_staged_writes()
            slots.flush()

        def prepare_inputs(self, batch: Any, states: Any) -> dict[str, Any]:
            """Return the keywords of the model's forward: the weights of all tokens, padding's among them."""
            slots.begin_step()
            num = batch.num_tokens_after_padding
            starts = batch.query_start_loc[: batch.num_reqs + 1]
            slots.of_tokens[:num] = slots.of_each_token(num, starts, batch.idx_mapping)
            return {**super().prepare_inputs(batch, states), "weights": slots.of_tokens[:num]}

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
            return {**super().prepare_dummy_inputs(num_reqs, num_tokens), "weights": slots.of_tokens[:num_tokens]}

    return EnsembleState
