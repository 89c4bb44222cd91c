"""An ensemble as a model of lm-eval: HFLM asks, encodes, cuts and post-processes, and one pass answers all points.

Two methods of `HFLM` are overridden, `_loglikelihood_tokens` and `generate_until`. Windows of long texts, chat
templates, begin tokens, stop strings and the length of answers are those of `HFLM`, called or inherited.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ensembler import folder
from ensembler.config import EnsembleConfig
from ensembler.decoding.options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import Sample
from ensembler.demo import demo_folder
from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError, PromptError
from ensembler.evaluation.backends import Backend, TransformersBackend
from ensembler.evaluation.batches import can_share_contexts, make_batches
from ensembler.evaluation.requests import ScoringRequest
from ensembler.evaluation.scoring import Score
from ensembler.extras import require
from ensembler.modeling import EnsembleForCausalLM
from ensembler.preflight import CheckedEnsemble, check_ensemble

HFLM: Any = require("lm_eval.models.huggingface", "eval").HFLM
utils: Any = require("lm_eval.models.utils", "eval")
tqdm: Any = require("tqdm", "eval").tqdm
registry: Any = require("lm_eval.api.registry", "eval")

_OF_CHATS = ("enable_thinking", "think_end_token", "chat_template_args")
_OF_HFLM = ("max_batch_size", "add_bos_token", "prefix_token_id", *_OF_CHATS)
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
_MAX_LENGTH = HFLM._DEFAULT_MAX_LENGTH

TokenPair = tuple[Any, list[int], list[int]]
"""A request as HFLM encodes it: its texts (None of a window), the context's tokens, the continuation's."""


class _Unloaded(SimpleNamespace):
    """Stands for the model until it is loaded; HFLM would move it to one device, and members stay where they are."""

    def to(self, device: object) -> None:
        """Refuse to be moved, in the way that HFLM takes for a model that is placed already."""
        raise ValueError("the members are placed by the ensemble")


@registry.register_model("ensembler")
class GridLM(HFLM):  # type: ignore[misc]  # HFLM is Any: it is imported where lm-eval is installed
    """An ensemble that answers lm-eval's requests, at one point or at all points of a grid.

    In lm-eval's own command line (`--model ensembler --model_args pretrained=FOLDER,alpha=0.5`) `pretrained` is a
    folder of an ensemble, or `demo`; there is one point, and answers are what lm-eval expects. In a sweep `pretrained`
    is a checked ensemble of which nothing is loaded until `take`, and `points` are those of the grid: a
    log-prob is then an array over the points, (num_points,) float64 in nats, and a text a tuple over them.

    `alpha`, `rule`: in place of the folder's. `device`, `dtype`: of all members, as on the command line. `seed`: of
    sampled texts. The others (`of_hflm`: those of `_OF_HFLM`) mean what they mean in `HFLM`. Raises ConfigError for an
    argument that is not known.
    """

    _device: torch.device  # HFLM's

    def __init__(
        self,
        pretrained: str | CheckedEnsemble | None = None,
        *,
        points: Sequence[GridPoint] | None = None,
        alpha: float | None = None,
        rule: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        seed: int = 0,
        **of_hflm: Any,
    ) -> None:
        _refuse_unknown(of_hflm)
        if pretrained is None:
            raise ConfigError("no ensemble was given; name a folder, or demo: --model_args pretrained=FOLDER,alpha=0.5")
        self._changes = {"alpha": alpha, "rule": rule}
        self._given = (device, dtype)
        self.backend_of_members: Backend | None = None
        self.seed = seed
        self.encoded: list[tuple[tuple[int, ...], ...]] = []
        self.num_cut = 0
        if not isinstance(pretrained, str):
            self.checked = pretrained
        stand_in = pretrained if isinstance(pretrained, str) else self._stand_in("cpu")
        device = device or "cuda:0"  # where there is none, HFLM takes the CPU
        super().__init__(stand_in, backend="causal", device=device, batch_size=batch_size, **of_hflm)
        config = self.checked.config
        self.points = tuple(points) if points is not None else (GridPoint(config.get_rule().name, config.alpha),)
        self._answers_one_point = points is None
        limit = self.checked.shortest_context
        self._max_length = max_length or (_MAX_LENGTH if limit is None else limit[1])
        if isinstance(pretrained, str):
            self._load()

    def _stand_in(self, device: Any) -> _Unloaded:
        return _Unloaded(device=torch.device(device), config=self.checked.config)

    def _get_config(self, pretrained: str, **_: Any) -> None:
        """Find and check the ensemble. HFLM has chosen a device by now; members that name none of their own get it."""
        config: EnsembleConfig = folder.read(demo_folder() if pretrained == "demo" else folder.find(pretrained))
        config = config.replaced(**{name: value for name, value in self._changes.items() if value is not None})
        device, dtype = self._given
        for role, member in config.members.items():
            if device is not None or (member.device == "cpu" and member.device_map is None):
                config.members[role] = member.placed(str(self._device))
        if dtype is not None:
            config.change_members(dtype=dtype)
        self.checked = check_ensemble(config)
        self._config = self.checked.config

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **settings: Any) -> None:
        super()._create_tokenizer(pretrained, copy.deepcopy(self.checked.require_tokenizer()), **settings)

    def _create_model(self, pretrained: str, **_: Any) -> None:
        self._model = self._stand_in(self._device)

    @property
    def model(self) -> Any:
        """The loaded ensemble or what stands for it; accelerate, which HFLM would ask, has not wrapped it."""
        return self._model

    def _load(self) -> None:
        self.take(TransformersBackend(EnsembleForCausalLM.from_checked(self.checked), self.tokenizer))
        if hasattr(self, "accelerator"):  # HFLM splits the documents among GPUs alone
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def _loglikelihood_tokens(
        self, requests: list[TokenPair], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Any]:
        """Return (log-prob, is greedy) of each continuation at each point; before members are loaded, take note only.

        Continuations of one context are scored together.
        """
        pairs = [self._fitted(*one) for one in requests]
        if self.backend_of_members is None:
            self.encoded += pairs
            return [(0.0, False)] * len(requests)
        together: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for context, continuation in pairs:
            together.setdefault(context, {})[continuation] = None
        asked = [
            ScoringRequest(number, context, tuple(of_context), "a document")
            for number, (context, of_context) in enumerate(together.items())
        ]
        share = can_share_contexts(self.checked.model_configs.values())
        batches = make_batches(asked, override_bs or self._size(requests), share_contexts=share)
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Any, Any]] = {}
        with self._progress(len(asked), "loglikelihood", disable_tqdm) as bar:
            for one in chain.from_iterable(self.backend_of_members.score(batches, self.points, advance=bar.update)):
                for continuation, score in zip(one.request.continuations, one.scores, strict=True):
                    found[one.request.context, continuation] = self._answer(score)
        for (texts, *_), pair in zip(requests, pairs, strict=True):
            if texts is not None:  # not a window of a long text
                self.cache_hook.add_partial("loglikelihood", texts, found[pair])
        return [found[pair] for pair in pairs]

    def _progress(self, total: int, kind: str, disable: bool) -> Any:
        """The progress bar of HFLM; the command that asks for a grid shows its own."""
        hidden = disable or self.rank != 0 or not self._answers_one_point
        return tqdm(total=total, disable=hidden, desc=f"Running {kind} requests")

    def _fitted(
        self, texts: Any, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The context, cut on the left to fit into the members' shortest one, and its continuation."""
        if not context:
            raise PromptError("the prompt is no token of its own; give it some text")
        if not continuation:
            raise PromptError(f"the answer {texts[1]!r} is no token of its own; give it more text")
        if len(continuation) > self.max_length:
            raise PromptError(
                f"the answer has {len(continuation):,} tokens; the context ends at {self.max_length:,}: shorten it"
            )
        room = self.max_length + 1 - len(continuation)
        self.num_cut += len(context) > room
        return tuple(context[-room:]), tuple(continuation)

    def take(self, members: Backend | None) -> None:
        """Answer with loaded members from now on; with None, take note of requests in `encoded` only."""
        self.backend_of_members = members
        self._model = members.model if isinstance(members, TransformersBackend) else self._stand_in("cpu")
        self._device = self._model.device

    def largest_batch(self, num_tokens: int) -> int:
        """Return how many sequences of this length fit into memory at once, as lm-eval's batch size 'auto' finds it."""
        return int(self._detect_batch_size([(None, [0] * num_tokens, [0])], 0))

    def _answer(self, score: Score) -> tuple[Any, Any]:
        if self._answers_one_point:
            return score.log_probs[0], score.is_greedy[0]
        return np.array(score.log_probs), np.array(score.is_greedy)

    def _size(self, requests: Sequence[TokenPair] | None = None) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        longest = sorted(requests or (), key=lambda one: -len(one[1]) - len(one[2]))
        return int(self._detect_batch_size(longest, 0))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Return the text after each request's context at each point, cut before its first stop string.

        A request that is there several times in a row, as lm-eval repeats it, gets as many samples. Before members are
        loaded, take note of the prompts only.
        """
        alike: dict[str, list[tuple[int, Any, int]]] = {}
        for _, repeated in groupby(enumerate(requests), key=lambda one: id(one[1])):
            (position, request), *others = repeated
            key = repr((request.task_name, request.idx, request.args[1], len(others)))
            alike.setdefault(key, []).append((position, request, 1 + len(others)))
        answers: list[Any] = [None] * len(requests)
        size = 1 if self.backend_of_members is None else self._size()
        with self._progress(len(requests), "generate_until", disable_tqdm) as bar:
            for same in alike.values():
                for position, texts in self._generate([(one, request) for one, request, _ in same], same[0][2], size):
                    answers[position : position + len(texts)] = texts
                    bar.update(len(texts))
        return answers

    def _generate(self, requests: list[tuple[int, Any]], count: int, size: int) -> Iterator[tuple[int, list[Any]]]:
        """Yield the texts of requests with the same settings by their position, `count` for each."""
        settings = utils.normalize_gen_kwargs(requests[0][1].args[1], self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stop = utils.handle_stop_sequences(settings.pop("until", None), eos=eos)
        options = _options(settings, stop, count, self.seed)
        encoded = [(position, self._prompt(request, options.max_new_tokens)) for position, request in requests]
        encoded.sort(key=lambda one: (-len(one[1].ids), one[1].number))
        if self.backend_of_members is None:
            self.encoded += [(tuple(prompt.ids),) for _, prompt in encoded]
            yield from ((position, [""] * count) for position, _ in encoded)
            return
        for start in range(0, len(encoded), size):
            chunk = encoded[start : start + size]
            positions = {prompt.number: position for position, prompt in chunk}
            for one in self.backend_of_members.complete([prompt for _, prompt in chunk], self.points, options):
                texts = [[self._cut(each, stop) for each in one.samples[point]] for point in self.points]
                by_sample = list(zip(*texts, strict=True)) * (count // options.num_return_sequences)
                yield positions[one.number], [each[0] for each in by_sample] if self._answers_one_point else by_sample

    def _prompt(self, request: Any, max_new_tokens: int) -> EncodedPrompt:
        room = self.max_length - max_new_tokens
        if room <= 0:
            raise PromptError(
                f"{max_new_tokens:,} new tokens are asked for and the context ends at {self.max_length:,}: lower the "
                "task's max_gen_toks"
            )
        ids = self.tok_batch_encode([request.args[0]])[0][0].tolist() if request.args[0] else []
        if not ids:
            raise PromptError("the prompt is empty; give it some text")
        self.num_cut += len(ids) > room
        return EncodedPrompt(request.doc_id, ids[-room:])

    def _cut(self, sample: Sample, stop: list[str]) -> str:
        text, think_end = sample.text, self.think_end_token
        if isinstance(think_end, int):
            if think_end in sample.ids:
                text = self.tok_decode(sample.ids[len(sample.ids) - sample.ids[::-1].index(think_end) :])
            text, think_end = text.lstrip(), None
        return str(utils.postprocess_generated_text(text, stop, think_end))


def _refuse_unknown(given: dict[str, Any]) -> None:
    if "alphas" in given:
        raise ConfigError(
            "alphas were given to lm-eval's command line, where one folder is one alpha; give alpha=NUMBER, or run the "
            f"grid in one pass: ensembler sweep FOLDER --alphas {given['alphas']} --task TASK"
        )
    unknown = [name for name in given if name not in _OF_HFLM]
    if unknown:
        raise ConfigError(
            f"unknown model argument {unknown[0]!r}; expected pretrained, alpha, rule, device, dtype, max_length, "
            f"batch_size, seed, {', '.join(_OF_HFLM)}"
        )


def _options(settings: dict[str, Any], stop: Sequence[str], count: int, seed: int) -> DecodingOptions:
    do_sample, temperature = settings.pop("do_sample"), float(settings.pop("temperature", 0.0))
    max_new_tokens = int(settings.pop("max_gen_toks"))
    others = [name for name in settings if name not in _SAMPLING]
    if others:
        raise ConfigError(
            f"the task generates with {others[0]}={settings[others[0]]!r}, which an ensemble does not know; "
            f"expected settings are {', '.join(_SAMPLING)}, do_sample, temperature and max_gen_toks"
        )
    if not do_sample:
        penalty = settings.get("repetition_penalty")
        return DecodingOptions(max_new_tokens, repetition_penalty=penalty, stop=tuple(stop), seed=seed)
    if temperature <= 0:
        raise ConfigError(f"the task samples at temperature {temperature:g}; set one above 0 in it")
    return DecodingOptions(
        max_new_tokens, temperature, **settings, num_return_sequences=count, stop=tuple(stop), seed=seed
    )
