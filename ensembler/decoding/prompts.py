"""Prompts: read them from a file, turn them into token ids, refuse those that cannot be decoded."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ensembler.errors import ConfigError, PromptError
from ensembler.tokenization.reading import prompt_ids

if TYPE_CHECKING:
    from ensembler.engine.text_plan import TextPlan

_OF_CONVERSATION = ("messages", "add_generation_prompt")  # variables that a chat template always gets
Report = Callable[[str], None]
Line = TypeVar("Line")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its number in the input (from 0), its text, where it came from (for messages), all its `fields`."""

    number: int
    text: str
    source: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids. `is_chat`: they are of a conversation in a chat template.

    `others`: by role, the ids of members with other tokenizers where these do not follow from the text.
    """

    number: int
    ids: list[int]
    is_chat: bool = False
    others: Mapping[str, list[int]] = field(default_factory=dict)


def read_prompts(path: Path, *, skip: Report | None = None) -> list[Prompt]:
    """Return the prompts of a JSON Lines file; each line is ``{"prompt": "..."}`` or a JSON string.

    A broken line raises PromptError with file and line number; with `skip`, it is called with the message instead.
    """
    return read_lines(path, _prompt, holds='prompts; expected lines such as {"prompt": "..."}', skip=skip)


def _prompt(value: Any, number: int, source: str) -> Prompt:
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise PromptError(f'{source} has no text under \'prompt\'; expected {{"prompt": "..."}}')
    return Prompt(number, text, source, value if isinstance(value, dict) else {"prompt": text})


def read_lines(
    path: Path, parse: Callable[[Any, int, str], Line], *, holds: str, skip: Report | None = None
) -> list[Line]:
    """Return `parse(value, number, source)` of every JSON line of a file; lines count from 0, empty ones too.

    `holds` says in an error what the file should hold. A line that is no JSON, or for which `parse` raises PromptError,
    raises it; with `skip`, it is called with the message instead.
    """
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}; give a file of JSON lines") from error
    found = []
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else []):
        source = f"{path}:{number + 1}"
        if not line.strip():
            continue
        try:
            found.append(parse(_value(line, source), number, source))
        except PromptError as error:
            if skip is None:
                raise PromptError(f"{error}; mend the line or add --skip-bad") from error
            skip(str(error))
    if not found:
        raise PromptError(f"{path} holds no {holds}")
    return found


def _value(line: bytes, source: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise PromptError(f"{source} is no JSON in UTF-8 ({error}); expected one object per line") from error


def check_text(text: str, source: str) -> None:
    """Raise PromptError unless `text` says something and is text: half of a surrogate pair is not."""
    if not text.strip():
        raise PromptError(f"{source} is an empty prompt; give it some text")
    check_utf8(text, source)


def check_utf8(text: str, source: str) -> None:
    """Raise PromptError where `text` holds half of a surrogate pair, which no tokenizer takes."""
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError(f"{source} is not UTF-8 text (it holds half of a surrogate pair); convert it")


def encode_prompts(
    prompts: list[Prompt],
    tokenizer: Any,
    *,
    chat: bool = False,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    context: tuple[str, int] | None = None,
    skip: Report | None = None,
    plan: TextPlan | None = None,
) -> list[EncodedPrompt]:
    """Return the prompts as token ids, by the tokenizer's chat template with `chat`, with these variables.

    `plan`: of members with other tokenizers, each of which gets a chat in its own template. `context` is the role with
    the shortest context and that length in tokens. An empty or too long prompt raises PromptError; with `skip`, it is
    called with the message instead.
    """
    start = [] if system is None else [{"role": "system", "content": system}]
    encoded = []
    for prompt in prompts:
        try:
            check_text(prompt.text, prompt.source)
            messages = [*start, {"role": "user", "content": prompt.text}]
            if chat:
                ids = chat_ids(tokenizer, messages, template_kwargs, prompt.source)
            else:
                ids = text_ids(tokenizer, prompt.text)
            check_length(len(ids), prompt.source, context)
            others = {} if plan is None or not chat else chats_of(plan, messages, template_kwargs, prompt.source)
        except PromptError as error:
            if skip is None:
                raise
            skip(str(error))
        else:
            encoded.append(EncodedPrompt(prompt.number, ids, chat, others))
    return encoded


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a plain text, with the special tokens that the tokenizer puts before it.

    A text that begins with the begin token gets no second one. Special tokens that the tokenizer puts behind a text are
    left out: the text goes on.
    """
    has_begin = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    encoded = tokenizer(text, add_special_tokens=not has_begin, return_special_tokens_mask=True)
    ids: list[int] = list(encoded["input_ids"])
    while ids and encoded["special_tokens_mask"][len(ids) - 1]:
        ids.pop()
    return ids


def chat_ids(
    tokenizer: Any,
    messages: list[dict[str, str]],
    template_kwargs: Mapping[str, Any] | None = None,
    source: str = "",
) -> list[int]:
    """Return the ids of a conversation in the tokenizer's chat template, ready for the assistant's turn.

    `template_kwargs`: variables of the template. Raises ConfigError where there is none, or a variable that it does not
    have; PromptError where it refuses the messages, which are from `source`.
    """
    if not tokenizer.chat_template:
        raise ConfigError("the anchor's tokenizer has no chat template; add one, or choose a rule with another anchor")
    if template_kwargs:
        check_template_kwargs(tokenizer.get_chat_template(), template_kwargs)
    text = _chat_text(tokenizer, messages, template_kwargs, source)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _chat_text(
    tokenizer: Any, messages: list[dict[str, str]], template_kwargs: Mapping[str, Any] | None, source: str
) -> str:
    try:
        settings = {"add_generation_prompt": True, **(template_kwargs or {})}
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    except Exception as error:  # templates are programs of the models' authors and raise what they like
        raise PromptError(f"{source}{': ' * bool(source)}the chat template refuses these messages: {error}") from error
    return text


def chats_of(
    plan: TextPlan,
    messages: list[dict[str, str]],
    template_kwargs: Mapping[str, Any] | None = None,
    source: str = "",
    as_text: str | None = None,
) -> dict[str, list[int]]:
    """Return by role the ids of a conversation for members with other tokenizers, each in its own chat template.

    A member without a template, or with the plan's `anchor_chats`, reads the text of the anchor's, special tokens and
    all, as plain text: `as_text`, or that of the template that its tokenizer has. Variables that a template does not
    have are left out. Raises PromptError where one refuses the messages.
    """
    if as_text is None:
        as_text = _chat_text(plan.anchor.tokenizer, messages, template_kwargs, source)
    found = {}
    for role, reader in plan.readers.items():
        tokenizer = reader.tokenizer
        if tokenizer.chat_template and not plan.settings.anchor_chats:
            text = _chat_text(tokenizer, messages, template_kwargs, f"{source}{' ' * bool(source)}for {role}")
            found[role] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        else:
            found[role] = prompt_ids(tokenizer, as_text)
    return found


def check_template_kwargs(template: str, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a variable that a chat template does not read, or that it gets from each conversation."""
    from jinja2 import TemplateError, meta
    from transformers.utils.chat_template_utils import _compile_jinja_template  # no public name has its extensions

    try:
        read = meta.find_undeclared_variables(_compile_jinja_template(template).environment.parse(template))
    except TemplateError as error:
        raise ConfigError(f"the chat template cannot be read ({error}); mend it") from error
    for name in given:
        if name in _OF_CONVERSATION:
            raise ConfigError(f"the chat template gets {name!r} from the conversation; leave it out of its variables")
        if name not in read:
            raise ConfigError(f"the chat template has no variable {name!r}; leave it out, or mend its name")


def check_length(num_tokens: int, source: str, context: tuple[str, int] | None) -> None:
    """Raise PromptError unless a prompt of `num_tokens` leaves room for one more in the shortest context."""
    if not num_tokens:
        raise PromptError(f"{source} is an empty prompt; give it some text")
    if context is not None and num_tokens >= context[1]:
        role, length = context
        raise PromptError(
            f"{source} has {num_tokens:,} tokens; the context of {role} ends at {length:,}: shorten the prompt"
        )
