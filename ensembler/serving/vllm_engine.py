"""Texts from prompts by vLLM's engine without a server: many requests at once, the options of `decoding`."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from transformers import GenerationConfig

from ensembler.decoding.batching import room_for
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.drafting import AUTO, NONE
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import AnswerDecoder, make_sample
from ensembler.decoding.texts import Completion
from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError, RunError
from ensembler.files import one_line
from ensembler.folder import write
from ensembler.preflight import CheckedEnsemble
from ensembler.serving.choice import VLLM, BackendChoice, common_dtype
from ensembler.serving.vllm_serve import LOAD_FORMAT
from ensembler.vocab import end_ids

_EXTENSION = "ensembler.serving.vllm_model.PointSetter"


class Engine:
    """An ensemble in vLLM's engine, which runs in processes of its own from entering to leaving a `with` block.

    `arguments`: any of `vllm.LLM`, such as tensor_parallel_size or max_model_len. Raises MissingExtraError, ConfigError
    or MemberError for what cannot be run, and RunError where the engine does not start or dies.
    """

    def __init__(self, checked: CheckedEnsemble, arguments: Mapping[str, Any] | None = None) -> None:
        choice = BackendChoice(VLLM, arguments or {})
        choice.check(checked)
        self._arguments = {**choice.arguments, "dtype": common_dtype(checked, choice.arguments.get("dtype"))}
        self._checked = checked
        self._num_runs = 0
        self.config: Any = checked.config
        self.generation_config = checked.generation_config or GenerationConfig(eos_token_id=checked.config.eos_token_id)
        self.shortest_context = choice.shortest_context(checked)

    def __enter__(self) -> Self:
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for results
        from vllm import LLM

        with ExitStack() as stack:
            # members that were put together on a command line have no folder
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ensembler-"))) / "ensemble"
            checked = self._checked
            write(checked.config, folder, checked.tokenizer, checked.generation_config)
            with _engine_errors("did not start"):
                self._llm: Any = LLM(
                    str(folder), load_format=LOAD_FORMAT, worker_extension_cls=_EXTENSION, **self._arguments
                )
            stack.callback(self._llm.llm_engine.engine_core.shutdown)
            self._running = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        del self._llm
        self._running.close()

    def set_point(self, point: GridPoint) -> None:
        """Run what is asked from now on by this rule at this α; no request may be running."""
        with _engine_errors("failed"):
            self._llm.collective_rpc("set_point", args=(point.rule, point.alpha))

    def run(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (index, vLLM's RequestOutput) of prompts as token ids, each as soon as it is finished.

        `params`: vLLM's SamplingParams for each. What is left is aborted when the iterator is closed. Raises RunError.
        """
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        self._num_runs += 1
        waiting: dict[str, int] = {}
        try:
            with _engine_errors("failed"):
                for index, (ids, sampling) in enumerate(zip(prompts, params, strict=True)):
                    sampling.output_kind = RequestOutputKind.FINAL_ONLY  # else of n samples only the last one to end
                    engine.add_request(f"{self._num_runs}-{index}", tokens_input(list(ids)), sampling)
                    waiting[f"{self._num_runs}-{index}"] = index
            while waiting:
                with _engine_errors("failed"):
                    outputs = engine.step()
                for output in outputs:
                    if output.finished and output.request_id in waiting:
                        yield waiting.pop(output.request_id), output
        finally:
            if waiting:
                engine.abort_request(sorted(waiting))


@contextmanager
def _engine_errors(failure: str) -> Iterator[None]:
    """Raise any error of vLLM as a RunError; a process that died left its reason in the log."""
    try:
        yield
    except Exception as error:
        raise RunError(f"vLLM's engine {failure}: {one_line(error)} (its log is on standard error)") from error


_COLDEST, _HOTTEST = 0.01, 2  # vLLM raises what is below, and refuses what is above
_SEED_STEP = 1_000_003  # prompts get seeds far apart: the samples of one have neighbouring ones


def check_options(options: DecodingOptions) -> None:
    """Raise ConfigError for ways to decode that vLLM does not have, or has by itself."""
    if options.temperature > _HOTTEST or 0 < options.temperature < _COLDEST:
        raise ConfigError(
            f"temperature is {options.temperature:g}; vLLM samples at {_COLDEST:g} to {_HOTTEST:g}: one there, or 0"
        )
    if options.num_beams > 1:
        raise ConfigError(f"num_beams is {options.num_beams}; vLLM decodes an ensemble without beams: leave it at 1")
    if options.draft not in (AUTO, NONE):
        raise ConfigError(f"draft is {options.draft!r}; in vLLM no member drafts: leave it out")
    if options.prefill_chunk is not None:
        raise ConfigError("prefill_chunk was given; vLLM parts long prompts by itself (max_num_batched_tokens)")


def complete_in_engine(
    engine: Engine, tokenizer: Any, prompts: Sequence[EncodedPrompt], options: DecodingOptions
) -> Iterator[Completion]:
    """Yield the completion of each prompt as soon as it is finished, in any order.

    Greedy texts are those of `complete_prompts`, but for rounding. What is sampled depends on (seed, prompt's number,
    sample), and is not what the other backend draws: vLLM has noise of its own. Raises ConfigError.
    """
    check_options(options)
    seed = secrets.randbits(62) if options.seed is None else options.seed
    ends = end_ids(engine.generation_config)
    start = time.perf_counter()
    params = [_params(engine, prompt, options, ends, seed) for prompt in prompts]
    for index, output in engine.run([prompt.ids for prompt in prompts], params):
        prompt = prompts[index]
        rows = [list(one.token_ids) for one in sorted(output.outputs, key=lambda one: one.index)]
        decoder = AnswerDecoder(tokenizer, prompt.ids, is_chat=prompt.is_chat)
        samples = [make_sample(ids, decoder, ends, options.stop) for ids in rows]
        yield Completion(prompt.number, prompt.ids, samples, time.perf_counter() - start)


def _params(engine: Engine, prompt: EncodedPrompt, options: DecodingOptions, ends: Sequence[int], seed: int) -> Any:
    from vllm import SamplingParams

    sampling = options.temperature > 0
    return SamplingParams(
        n=options.num_return_sequences,
        temperature=options.temperature,
        top_k=options.top_k or 0,
        top_p=options.top_p if options.top_p is not None else 1.0,
        min_p=options.min_p or 0.0,
        repetition_penalty=options.repetition_penalty if options.repetition_penalty is not None else 1.0,
        seed=(seed + prompt.number * _SEED_STEP) % 2**62 if sampling else None,
        stop=list(options.stop),
        skip_special_tokens=False,  # a stop text may be one
        stop_token_ids=sorted(ends),
        ignore_eos=True,  # the ends are those of the folder, no others
        max_tokens=room_for(engine, len(prompt.ids), options.max_new_tokens),
    )
