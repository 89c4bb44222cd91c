"""An ensemble as a model of lm-eval: HFLM asks, encodes, cuts and post-processes, and one pass answers all points.

`_loglikelihood_tokens` and `generate_until` of `HFLM` are overridden. Windows of long texts, chat templates, begin
tokens, stop strings and the length of answers are those of `HFLM`, called or inherited.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ensembler import folder
from ensembler.config import EnsembleConfig
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt, chats_of
from ensembler.decoding.samples import Sample
from ensembler.demo import demo_folder
from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError, PromptError
from ensembler.evaluation.backends import Backend, TransformersBackend
from ensembler.evaluation.encoded_request import EncodedRequest
from ensembler.evaluation.request_batches import can_share_contexts, make_batches
from ensembler.evaluation.requests import group_by_context
from ensembler.extras import require
from ensembler.modeling import EnsembleForCausalLM
from ensembler.preflight import CheckedEnsemble, check_ensemble

HFLM: Any = require("lm_eval.models.huggingface", "eval").HFLM
utils: Any = require("lm_eval.models.utils", "eval")
tqdm: Any = require("tqdm", "eval").tqdm
registry: Any = require("lm_eval.api.registry", "eval")

_OF_CHATS = ("enable_thinking", "think_end_token", "chat_template_args")
_OF_HFLM = ("max_batch_size", "add_bos_token", "prefix_token_id", *_OF_CHATS)
_OWN = ("pretrained", "alpha", "rule", "device", "dtype", "max_length", "batch_size", "seed")
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
_MAX_LENGTH = HFLM._DEFAULT_MAX_LENGTH


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
    argument that is not known, or that a checked ensemble has already.
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
        self._given = {"alpha": alpha, "rule": rule, "device": device, "dtype": dtype}
        self._members: Backend | None = None
        self._noted: list[EncodedRequest] | None = None
        self._names: dict[tuple[str, str], str] = {}
        self._chats: dict[str, tuple[list[dict[str, str]], bool]] = {}
        self.seed = seed
        if not isinstance(pretrained, str):
            self.checked = pretrained
            for name in (name for name, value in self._given.items() if value is not None):
                raise ConfigError(f"{name} was given beside a checked ensemble; set it before the check")
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
        """Find and check the ensemble. HFLM has chosen a device by now, which members with none or the CPU get."""
        config: EnsembleConfig = folder.read(demo_folder() if pretrained == "demo" else folder.find(pretrained))
        given = {name: value for name, value in self._given.items() if value is not None}
        config = config.replaced(**{name: given[name] for name in ("alpha", "rule") if name in given})
        for role, member in config.members.items():
            if "device" in given or (member.device == "cpu" and member.device_map is None):
                config.members[role] = member.placed(str(self._device))
        if "dtype" in given:
            config.change_members(dtype=given["dtype"])
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

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return what `HFLM` returns; where tokenizers differ, keep the chat for the templates of other members."""
        text = str(super().apply_chat_template(chat_history, add_generation_prompt))
        if self.checked.text is not None:
            self._chats[text] = chat_history, add_generation_prompt
        return text

    def chat_of(self, text: str) -> dict[str, list[int]]:
        """Return by role the ids of a chat, given as text, for members with other tokenizers; {} of another text.

        Raises PromptError where a template refuses the messages.
        """
        if self.checked.text is None or text not in self._chats:
            return {}
        messages, asks = self._chats[text]
        settings = {"add_generation_prompt": asks, "continue_final_message": not asks}
        return chats_of(self.checked.text, messages, {**self.chat_template_args, **settings}, as_text=text)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return what `HFLM` returns, which moves white space at the end of a context into the continuation.

        Not that of a chat where tokenizers differ: other members' templates end in their own.
        """
        if context not in self._chats:
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        ids = self.tok_encode(context)
        return ids, self.tok_encode(context + continuation)[len(ids) :]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Return what `HFLM` returns; errors name the documents."""
        self._names = {one.args: f"document {one.doc_id} of {one.task_name}" for one in requests if one.task_name}
        found: list[Any] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Any]:
        """Return (log-prob, is greedy) of each continuation at each point; those of one context are scored together.

        A request is what `HFLM` makes of it: its texts (None of a window), and the ids of context and continuation.
        """
        if self.checked.contract.is_text and any(texts is None for texts, *_ in requests):
            raise ConfigError(
                "perplexity was asked for, and scores of members with different tokenizers are not normalised; choose "
                "a task that compares answers, and select alpha by its metric"
            )
        contexts = {texts[0] for texts, *_ in requests if texts is not None}
        chats = {text: self.chat_of(text) for text in contexts & self._chats.keys()}
        encoded = [self._fitted(chats, *one) for one in requests]
        if self._noted is not None:
            self._noted += encoded
            return [(0.0, False)] * len(requests)
        if self.checked.text is not None:
            self.model.member_set.text.prompts = {one.tokens[0]: one.others for one in encoded if one.others}
        pairs = [one.tokens for one in encoded]
        named = [(pair[0], self._names.get(texts)) for (texts, *_), pair in zip(requests, pairs, strict=True)]
        grouped = group_by_context(pairs, self.tokenizer, {context: name for context, name in named if name})
        share = can_share_contexts(self.checked.model_configs.values())
        size = override_bs or self._size(max((one.length for one in encoded), default=1))
        batches = make_batches(grouped, size, share_contexts=share)
        found: dict[tuple[tuple[int, ...], ...], tuple[Any, Any]] = {}
        with self._progress(len(grouped), "loglikelihood", disable_tqdm) as bar:
            for one in chain.from_iterable(self.members.score(batches, self.points, advance=bar.update)):
                for continuation, score in zip(one.request.continuations, one.scores, strict=True):
                    greedy = list(map(bool, score.is_greedy))  # not known where tokenizers differ: then it is not
                    over_points = np.array(score.log_probs), np.array(greedy)
                    at_point = score.log_probs[0], greedy[0]
                    found[one.request.context, continuation] = at_point if self._answers_one_point else over_points
        for (texts, *_), pair in zip(requests, pairs, strict=True):
            if texts is not None:  # not a window of a long text
                self.cache_hook.add_partial("loglikelihood", texts, found[pair])
        return [found[pair] for pair in pairs]

    def _progress(self, total: int, kind: str, disable: bool) -> Any:
        """The progress bar of HFLM; the command that asks for a grid shows its own."""
        hidden = disable or self.rank != 0 or not self._answers_one_point
        return tqdm(total=total, disable=hidden, desc=f"Running {kind} requests")

    def _fitted(
        self,
        chats: Mapping[str, Mapping[str, list[int]]],
        texts: Any,
        context: Sequence[int],
        continuation: Sequence[int],
    ) -> EncodedRequest:
        """Cut the context on the left to fit into the members' shortest one. Raises PromptError.

        In a window of a text, a begin token that the tokenizer adds is not scored behind the begin token. `chats`:
        what `chat_of` returns, by the texts of contexts.
        """
        if texts is None and list(continuation[:1]) == list(context) == [self.prefix_token_id]:
            continuation = continuation[1:]
        if not context:
            raise PromptError("the prompt is no token of its own; give it some text")
        if not continuation:
            name = "the text" if texts is None else f"the answer {texts[1]!r}"
            raise PromptError(f"{name} is no token of its own; give it more text")
        if len(continuation) > self.max_length:
            raise PromptError(
                f"the answer has {len(continuation):,} tokens; the context ends at {self.max_length:,}: shorten it"
            )
        room = self.max_length + 1 - len(continuation)
        others = {} if texts is None else chats.get(texts[0], {})
        return EncodedRequest.fitted((tuple(context), tuple(continuation)), room, others)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval's results say of a model, and the level of the vocabulary contract."""
        return {**super().get_model_info(), "vocabulary": self.checked.contract.kind}

    def take(self, members: Backend | None) -> None:
        """Answer with these members from now on, or with none."""
        self._members = members
        self._model = members.model if isinstance(members, TransformersBackend) else self._stand_in("cpu")
        self._device = self._model.device

    @property
    def members(self) -> Backend:
        """The members that answer. Raises ConfigError where there are none."""
        if self._members is None:
            raise ConfigError("the model was asked without members; load some and give them to take()")
        return self._members

    @contextmanager
    def noting(self) -> Iterator[list[EncodedRequest]]:
        """Within a `with` block, requests are encoded into the list that it gets, and not answered."""
        self._noted = []
        try:
            yield self._noted
        finally:
            self._noted = None

    def largest_batch(self, num_tokens: int, num_rows: int = 1) -> int:
        """Return how many requests, each of `num_rows` sequences of this length, fit into memory at once.

        Sequences that fit are found as for lm-eval's batch size 'auto': by a forward of `max_batch_size`, or of fewer.
        """
        found = self._detect_batch_size([(None, [0] * num_tokens, [0])], 0)
        return max(1, int(found) // num_rows)

    def _size(self, num_tokens: int, num_rows: int = 1) -> int:
        return self.largest_batch(num_tokens, num_rows) if self.batch_size == "auto" else int(self.batch_size)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Return the text after each request's context at each point, cut before its first stop string.

        A request that is there several times in a row, as lm-eval repeats it, gets as many samples.
        """
        groups = self._grouped(requests)
        if self._noted is not None:
            self._noted += [one for prompts in groups.values() for _, _, one in prompts]
            return [""] * len(requests)
        answers: list[Any] = [None] * len(requests)
        num_rows = len(self.points) * max((count for _, count, *_ in groups), default=1)
        size = self._size(self.max_length, num_rows)  # as HFLM measures it, once: processes do that together
        with self._progress(len(requests), "generate_until", disable_tqdm) as bar:
            for (options, count, *_), prompts in groups.items():
                for position, texts in self._generate(prompts, options, count, size):
                    answers[position : position + len(texts)] = texts
                    for text in texts:
                        self.cache_hook.add_partial("generate_until", requests[position].args, text)
                    bar.update(len(texts))
        return answers

    def _grouped(self, requests: list[Any]) -> dict[tuple[Any, ...], list[tuple[int, int, EncodedRequest]]]:
        """Return the prompts, the longest first, by their options, the number of repeats, and their task.

        With each prompt come its position among the requests and the number of its document.
        """
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        groups: dict[tuple[Any, ...], list[tuple[int, int, EncodedRequest]]] = {}
        for _, repeated in groupby(enumerate(requests), key=lambda one: id(one[1])):
            (position, request), *others = repeated
            settings = utils.normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            stop = utils.handle_stop_sequences(settings.pop("until", None), eos=eos)
            options = _options(settings, stop, 1 + len(others), self.seed)
            prompt = (position, request.doc_id, self._prompt(request, options.max_new_tokens))
            groups.setdefault((options, 1 + len(others), request.task_name, request.idx), []).append(prompt)
        for prompts in groups.values():
            prompts.sort(key=lambda one: (-one[2].length, one[1]))
        return groups

    def _generate(
        self, prompts: list[tuple[int, int, EncodedRequest]], options: DecodingOptions, count: int, size: int
    ) -> Iterator[tuple[int, list[Any]]]:
        """Yield the `count` texts of each prompt by its position; `size` prompts are decoded together."""
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            positions = {number: position for position, number, _ in chunk}
            encoded = [EncodedPrompt(number, list(one.tokens[0]), others=one.others) for _, number, one in chunk]
            for one in self.members.complete(encoded, self.points, options):
                texts = [[self._cut(each, options.stop) for each in one.samples[point]] for point in self.points]
                by_sample = list(zip(*texts, strict=True)) * (count // options.num_return_sequences)
                yield positions[one.number], [each[0] for each in by_sample] if self._answers_one_point else by_sample

    def _prompt(self, request: Any, max_new_tokens: int) -> EncodedRequest:
        room = self.max_length - max_new_tokens
        if room <= 0:
            context = f"the context ends at {self.max_length:,}"
            raise PromptError(f"{max_new_tokens:,} new tokens are asked for and {context}: lower its max_gen_toks")
        ids = self.tok_batch_encode([request.args[0]])[0][0].tolist() if request.args[0] else []
        if not ids:
            raise PromptError("the prompt is empty; give it some text")
        return EncodedRequest.fitted((tuple(ids),), room, self.chat_of(request.args[0]), max_new_tokens)

    def _cut(self, sample: Sample, stop: Sequence[str]) -> str:
        text, think_end = self.tok_decode(sample.ids), self.think_end_token  # by itself, as in HFLM
        if isinstance(think_end, int):
            if think_end in sample.ids:
                text = self.tok_decode(sample.ids[len(sample.ids) - sample.ids[::-1].index(think_end) :])
            text, think_end = text.lstrip(), None
        return str(utils.postprocess_generated_text(text, list(stop), think_end))


def _refuse_unknown(given: dict[str, Any]) -> None:
    if "alphas" in given:
        raise ConfigError(
            "alphas were given to lm-eval's command line, where one folder is one alpha; give alpha=NUMBER, or run the "
            f"grid in one pass: ensembler sweep FOLDER --alpha {given['alphas']} --task TASK"
        )
    unknown = [name for name in given if name not in _OF_HFLM]
    if unknown:
        known = ", ".join((*_OWN, *_OF_HFLM))
        raise ConfigError(f"unknown model argument {unknown[0]!r}; expected {known}")


def _options(settings: dict[str, Any], stop: Sequence[str], count: int, seed: int) -> DecodingOptions:
    do_sample, temperature = settings.pop("do_sample"), float(settings.pop("temperature", 0.0))
    max_new_tokens = int(settings.pop("max_gen_toks"))
    for name in (name for name in settings if name not in _SAMPLING):
        raise ConfigError(
            f"the task generates with {name}={settings[name]!r}, which an ensemble does not know; "
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
