"""vLLM's engine without a server: many requests at once, each returned when it is finished."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import GenerationConfig

from ensembler.decoding.points import GridPoint
from ensembler.errors import ConfigError, RunError
from ensembler.folder import write_checked
from ensembler.preflight import CheckedEnsemble
from ensembler.serving.checks import check_servable, common_dtype, require_vllm
from ensembler.serving.command import LOAD_FORMAT
from ensembler.sources import one_line

_OWN = ("model", "load_format", "worker_extension_cls", "hf_overrides")
EXTENSION = "ensembler.serving.vllm_worker.PointSetter"


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for arguments of vLLM's engine that are ours to give."""
    for name in _OWN:
        if name in arguments:
            raise ConfigError(f"{name} is given to vLLM's engine by ensembler itself; leave it out")


def shortest_context(checked: CheckedEnsemble, arguments: Mapping[str, Any]) -> tuple[str, int] | None:
    """What limits a text with its answer, and to how many tokens: a member's context, or the engine's own argument."""
    limits = [] if checked.shortest_context is None else [checked.shortest_context]
    if arguments.get("max_model_len") is not None:
        limits.append(("vLLM's engine (max_model_len)", int(arguments["max_model_len"])))
    return min(limits, key=lambda limit: limit[1], default=None)


class Engine:
    """An ensemble in vLLM's engine, which runs in processes of its own from entering to leaving a `with` block.

    `arguments`: any of `vllm.LLM`, such as tensor_parallel_size or max_model_len. Raises MissingExtraError, ConfigError
    or MemberError for what cannot be run, and RunError where the engine does not start.
    """

    def __init__(self, checked: CheckedEnsemble, arguments: Mapping[str, Any] | None = None) -> None:
        self._arguments = dict(arguments or {})
        check_arguments(self._arguments)
        require_vllm()
        check_servable(checked)
        if "dtype" not in self._arguments:
            self._arguments["dtype"] = common_dtype(checked)
        self.config: Any = checked.config
        self.generation_config = checked.generation_config or GenerationConfig(eos_token_id=checked.config.eos_token_id)
        self.shortest_context = shortest_context(checked, self._arguments)
        self._checked = checked

    def __enter__(self) -> Self:
        from vllm import LLM

        self._folder = tempfile.TemporaryDirectory(prefix="ensembler-")
        folder = Path(self._folder.name) / "ensemble"  # members that were put together on a command line have none
        write_checked(self._checked, folder)
        try:
            self._llm: Any = LLM(
                str(folder), load_format=LOAD_FORMAT, worker_extension_cls=EXTENSION, **self._arguments
            )
        except Exception as error:  # of configurations, memory, a process that died
            self._folder.cleanup()
            raise RunError(f"vLLM's engine did not start: {one_line(error)}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        self._folder.cleanup()

    def set_point(self, point: GridPoint) -> None:
        """Run what is asked from now on by this rule at this α; no request may be running."""
        self._llm.collective_rpc("set_point", args=(point.rule, point.alpha))

    def run(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (index, vLLM's RequestOutput) of prompts as token ids, each as soon as it is finished.

        `params`: vLLM's SamplingParams for each. What is left is aborted when the iterator is closed.
        """
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        for index, (ids, of_request) in enumerate(zip(prompts, params, strict=True)):
            of_request.output_kind = RequestOutputKind.FINAL_ONLY  # else of n samples only the last one to end
            engine.add_request(str(index), {"prompt_token_ids": list(ids)}, of_request)
        waiting = {str(index) for index in range(len(prompts))}
        try:
            while waiting:
                for output in engine.step():
                    if output.finished:
                        waiting.discard(output.request_id)
                        yield int(output.request_id), output
        finally:
            if waiting:
                engine.abort_request(sorted(waiting))
