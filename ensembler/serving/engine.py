"""vLLM's engine without a server: many requests at once, each returned when it is finished."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import GenerationConfig

from ensembler.engine.grid import GridPoint
from ensembler.errors import RunError
from ensembler.folder import write_checked
from ensembler.preflight import CheckedEnsemble
from ensembler.serving.checks import common_dtype
from ensembler.serving.choice import VLLM, BackendChoice
from ensembler.serving.command import LOAD_FORMAT
from ensembler.sources import one_line

_EXTENSION = "ensembler.serving.vllm_worker.PointSetter"


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

        self._folder = tempfile.TemporaryDirectory(prefix="ensembler-")
        folder = Path(self._folder.name) / "ensemble"  # members that were put together on a command line have none
        try:
            write_checked(self._checked, folder)
            with _told("did not start"):
                self._llm: Any = LLM(
                    str(folder), load_format=LOAD_FORMAT, worker_extension_cls=_EXTENSION, **self._arguments
                )
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._llm.llm_engine.engine_core.shutdown()
        finally:
            del self._llm
            self._folder.cleanup()

    def set_point(self, point: GridPoint) -> None:
        """Run what is asked from now on by this rule at this α; no request may be running."""
        with _told("failed"):
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
            with _told("failed"):
                for index, (ids, of_request) in enumerate(zip(prompts, params, strict=True)):
                    of_request.output_kind = RequestOutputKind.FINAL_ONLY  # else of n samples only the last one to end
                    engine.add_request(f"{self._num_runs}-{index}", tokens_input(list(ids)), of_request)
                    waiting[f"{self._num_runs}-{index}"] = index
            while waiting:
                with _told("failed"):
                    outputs = engine.step()
                for output in outputs:
                    if output.finished and output.request_id in waiting:
                        yield waiting.pop(output.request_id), output
        finally:
            if waiting:
                engine.abort_request(sorted(waiting))


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of vLLM, which may be of any kind, as one of ours; a process that died left its reason in the log."""
    try:
        yield
    except Exception as error:
        raise RunError(f"vLLM's engine {what}: {one_line(error)} (its log is on standard error)") from error
