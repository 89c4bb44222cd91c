"""Texts from prompts by vLLM's engine without a server: many requests at once, the options of `decoding`."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from transformers import GenerationConfig

from ensembler.decoding.batching import room_for
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.drafting import AUTO, NONE
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import AnswerDecoder, Sample, make_sample
from ensembler.decoding.texts import GridCompletion
from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError, RunError
from ensembler.files import one_line
from ensembler.folder import write
from ensembler.preflight import CheckedEnsemble
from ensembler.serving.choice import LOAD_FORMAT, VLLM, BackendChoice, common_dtype
from ensembler.serving.request_points import ALPHA, RULE, ServedRules
from ensembler.vocab import end_ids


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
        self.rules = ServedRules(checked)
        self._num_runs = 0
        self.config: Any = checked.config
        self.point = self.rules.default
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
                self._llm: Any = LLM(str(folder), load_format=LOAD_FORMAT, **self._arguments)
            stack.callback(self._llm.llm_engine.engine_core.shutdown)
            self._running = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        del self._llm
        self._running.close()

    def run(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (index, vLLM's RequestOutput) of prompts as token ids, each as soon as it is finished.

        `params`: vLLM's SamplingParams for each, of which a copy is taken. What is left is aborted when the iterator is
        closed. Raises RunError, and LogitsError where a member computed NaN.
        """
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        self._num_runs += 1
        waiting: dict[str, int] = {}
        try:
            with _engine_errors("failed"):
                for index, (ids, given) in enumerate(zip(prompts, params, strict=True)):
                    sampling = given.clone()
                    sampling.stop_token_ids = [*(given.stop_token_ids or ()), *self.rules.failures]
                    sampling.output_kind = RequestOutputKind.FINAL_ONLY  # else of n samples only the last one to end
                    engine.add_request(f"{self._num_runs}-{index}", tokens_input(list(ids)), sampling)
                    waiting[f"{self._num_runs}-{index}"] = index
            while waiting:
                with _engine_errors("failed"):
                    outputs = engine.step()
                for output in outputs:
                    if output.finished and output.request_id in waiting:
                        self.rules.check_stops([one.stop_reason for one in output.outputs])
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
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    points: Sequence[GridPoint],
    options: DecodingOptions,
) -> Iterator[GridCompletion]:
    """Yield the completions of each prompt at all points as soon as they are finished, in any order.

    Every (prompt, point) is a request, and all of them are in the engine at once. Greedy texts are those of
    `complete_grid`, but for rounding. What is sampled depends on (seed, prompt's number, sample), and is not what the
    other backend draws: vLLM has noise of its own. Raises ConfigError.
    """
    check_options(options)
    seed = secrets.randbits(62) if options.seed is None else options.seed
    ends = end_ids(engine.generation_config)
    start = time.perf_counter()
    asked = [(prompt, point) for prompt in prompts for point in points]
    params = [_params(engine, prompt, point, options, ends, seed) for prompt, point in asked]
    found: dict[int, dict[GridPoint, list[Sample]]] = defaultdict(dict)
    for index, output in engine.run([prompt.ids for prompt, _ in asked], params):
        prompt, point = asked[index]
        rows = [list(one.token_ids) for one in sorted(output.outputs, key=lambda one: one.index)]
        decoder = AnswerDecoder(tokenizer, prompt.ids, is_chat=prompt.is_chat)
        found[prompt.number][point] = [make_sample(ids, decoder, ends, options.stop) for ids in rows]
        if len(found[prompt.number]) == len(points):
            samples = found.pop(prompt.number)
            in_order = {point: samples[point] for point in points}
            yield GridCompletion(prompt.number, prompt.ids, in_order, time.perf_counter() - start)


def arguments_of(point: GridPoint) -> dict[str, Any]:
    """Return what a request for this point says in `SamplingParams.extra_args`."""
    return {RULE: point.rule, ALPHA: point.alpha}


def _params(
    engine: Engine,
    prompt: EncodedPrompt,
    point: GridPoint,
    options: DecodingOptions,
    ends: Sequence[int],
    seed: int,
) -> Any:
    from vllm import SamplingParams

    sampling = options.temperature > 0
    return SamplingParams(
        extra_args=arguments_of(point),
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
