"""`ensembler generate`: texts from prompts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensembler.cli.command_class import Command, log, section
from ensembler.cli.ensemble_options import EnsembleOptions
from ensembler.cli.evaluation_options import backend_options
from ensembler.cli.option_groups import (
    PATH,
    TEMPLATE_KWARGS,
    decoding_options,
    ensemble_options,
    output_option,
    overwrite_option,
    prompt_option,
    strict_option,
    verify_option,
)
from ensembler.cli.ranks import launched, on_each, on_first
from ensembler.errors import ConfigError, PromptError
from ensembler.launch import RANK_TIMEOUT

if TYPE_CHECKING:
    from ensembler.cli.printing import Printer
    from ensembler.decoding.decoding_options import DecodingOptions
    from ensembler.decoding.output_file import OutputFile
    from ensembler.decoding.prompts import EncodedPrompt, Prompt
    from ensembler.decoding.texts import Completion, GridCompletion
    from ensembler.engine.grid import GridPoint
    from ensembler.preflight import CheckedEnsemble
    from ensembler.serving.choice import BackendChoice


_speed = section("Speed")


@click.command(cls=Command, is_resumable=True)
@ensemble_options(several=True)
@prompt_option("--prompt", multiple=True, metavar="TEXT", help="A prompt; repeat it. Without any, stdin is one.")
@prompt_option("--data", type=PATH, metavar="FILE", help='JSON lines: {"prompt": "...", ...}; rows keep all fields.')
@prompt_option("--chat", is_flag=True, help="Put the prompt into the anchor's chat template.")
@prompt_option("--system", metavar="TEXT", help="The system message for --chat.")
@prompt_option("--chat-template-kwargs", **TEMPLATE_KWARGS)
@decoding_options
@output_option("--output", type=PATH, metavar="FILE", help="Write JSON lines in input order; goes on where it stopped.")
@overwrite_option
@verify_option
@strict_option
@output_option("--json", "as_json", is_flag=True, help="Print a JSON line for each new row, in input order.")
@output_option("--stream/--no-stream", default=None, help="Print tokens as they come.  [default: on a terminal]")
@output_option("--explain", is_flag=True, help="Mark the tokens that are not the anchor's own choice.")
@output_option("--stats", is_flag=True, help="Say on standard error where the time went; one JSON line with --json.")
@_speed("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Prompts decoded together.")
@_speed("--compile", "compiled", is_flag=True, help="Compile decode steps: slow to start.")
@_speed("--no-cuda-graphs", is_flag=True, help="Launch every step piece by piece on GPUs, to look for a fault.")
@_speed(
    "--rank-timeout",
    type=click.FloatRange(1),
    default=RANK_TIMEOUT,
    show_default=True,
    help="Under torchrun: seconds of silence after which a process counts as lost.",
)
@backend_options
def generate(
    given: EnsembleOptions,
    rules: tuple[str, ...],
    alphas: tuple[float, ...],
    prompt: tuple[str, ...],
    data: Path | None,
    chat: bool,
    system: str | None,
    chat_template_kwargs: dict[str, Any] | None,
    decoding: DecodingOptions,
    output: Path | None,
    overwrite: bool,
    verify_weights: bool,
    strict: bool,
    as_json: bool,
    stream: bool | None,
    explain: bool,
    stats: bool,
    batch_size: int,
    compiled: bool,
    no_cuda_graphs: bool,
    rank_timeout: float,
    backend: BackendChoice,
) -> None:
    """Decode texts with ENSEMBLE; several rules or alphas share the forwards of the members.

    Started by torchrun or accelerate launch, each process runs some of the members; the first prints and writes. With
    --backend vllm, vLLM's engine runs them and decides what is decoded together.

    \b
    ensembler generate demo --prompt "Tom has 5 pears ..." --explain
    ensembler generate math --data questions.jsonl --output answers.jsonl --batch-size 16
    ensembler generate math --data questions.jsonl --alpha 0,0.5,1 --json
    torchrun --nproc-per-node 3 -m ensembler generate math --device cuda --data questions.jsonl
    ensembler generate math --backend vllm --engine-arg tensor_parallel_size=2 --data questions.jsonl
    """
    for option, value in (("--system", system), ("--chat-template-kwargs", chat_template_kwargs)):
        if value is not None and not chat:
            raise ConfigError(f"{option} was given without --chat; add --chat")
    for option, is_given in (("--overwrite", overwrite), ("--verify-weights", verify_weights)):
        if is_given and output is None:
            raise ConfigError(f"{option} was given without --output; name the file")
    if compiled and decoding.num_beams > 1:
        raise ConfigError("--compile is for greedy decoding and sampling: beams move caches; leave one of them out")
    from ensembler.cli.printing import Printer, print_stats, say_why_plain
    from ensembler.decoding.decode_stats import DecodingStats, Meter
    from ensembler.decoding.drafting import check_draft
    from ensembler.decoding.output_file import OutputFile, check_output
    from ensembler.decoding.prompts import encode_prompts
    from ensembler.decoding.texts import complete_grid, complete_prompts, decoder_of, run_settings
    from ensembler.engine.cuda_graphs import check_compiler
    from ensembler.engine.grid import make_grid
    from ensembler.evaluation.provenance import describe_ensemble
    from ensembler.files import check_not_input, digest
    from ensembler.modeling import EnsembleForCausalLM
    from ensembler.preflight import check_ensemble

    on_vllm = backend.name == "vllm"
    has_grid = len(rules) > 1 or len(alphas) > 1
    if on_vllm:
        options = {"--compile": compiled, "--explain": explain, "--stream": bool(stream), "--stats": stats}
        options["--no-cuda-graphs"] = no_cuda_graphs
        _check_vllm(decoding, options)
    if has_grid and (explain or stream):
        raise ConfigError(
            f"--{'explain' if explain else 'stream'} was given with several points; it takes one --rule and one --alpha"
        )
    skip = None if strict else (lambda message: log.warning("skipped: %s", message))

    def read() -> list[Prompt]:
        all_prompts = _read(prompt, data, skip)
        if output is not None:
            check_output(output)
            if data is not None:
                check_not_input(output, data)
        return all_prompts

    if compiled:
        check_compiler()
    with launched(rank_timeout) as world:
        all_prompts = on_first(world, read)
        checked = on_each(world, lambda: check_ensemble(given.load_config()))
        backend.check(checked)
        rule = checked.config.get_rule()
        check_draft(rule, decoding.draft)
        points = make_grid(rules or (rule.name,), alphas or (checked.config.alpha,)) if has_grid else []
        tokenizer = checked.require_tokenizer()
        encoded = encode_prompts(
            all_prompts,
            tokenizer,
            chat=chat,
            system=system,
            template_kwargs=chat_template_kwargs,
            context=backend.shortest_context(checked),
            skip=skip,
            plan=checked.text,
        )
        if not encoded:
            raise PromptError("no prompt is left to decode; mend the skipped lines")
        plain = not as_json and not explain and output is None and not has_grid
        streamer = _streamer(stream, plain and len(encoded) == 1 and not on_vllm, decoding, tokenizer, chat=chat)
        fields = {one.number: one.fields for one in all_prompts}
        results: OutputFile | None = None

        def open_output() -> frozenset[int]:
            nonlocal results
            if output is None:
                return frozenset()
            settings = run_settings(checked, encoded, decoding, points=points, backend=backend.describe(checked))
            described = describe_ensemble(checked, verify_weights=verify_weights)
            settings |= {key: described[key] for key in ("vocabulary", "verify_weights", "members")}
            settings["explain"] = explain
            settings["fields"] = digest([fields[one.number] for one in encoded])
            if chat_template_kwargs is not None:
                settings["chat template kwargs"] = chat_template_kwargs
            results = OutputFile(output, settings, overwrite=overwrite)
            return results.done

        done = on_first(world, open_output)
        left = [one.number for one in encoded if one.number not in done]
        if not left:
            with results or nullcontext():  # which puts rows in order, where the end of a run did not come to it
                pass
            log.info("nothing to do: all %d prompts have their rows already", len(encoded))
            return
        is_shown = as_json or (output is None and streamer is None)
        printer = Printer(tokenizer, left, fields, checked.contract.kind, as_json=as_json, is_shown=is_shown)
        if on_vllm:
            _decode_on_vllm(checked, backend, encoded, points, decoding, done, results, printer)
            return
        model = EnsembleForCausalLM.from_checked(checked, world=world)
        if no_cuda_graphs:
            model.member_set.graphs = None
        if compiled:
            log.info("compiling: the first step of each shape takes a minute or so")
            model.compile_members()
        if explain:
            printer.explain_with(model)
        meter = Meter(DecodingStats()) if stats else None
        decoder = decoder_of(decoding, streamer=streamer, meter=meter, **({"points": points} if points else {}))
        completions: Iterable[Completion | GridCompletion]
        if has_grid:
            completions = complete_grid(
                model, tokenizer, encoded, points, decoding, batch_size=batch_size, done=done, decoder=decoder
            )
        else:
            completions = complete_prompts(
                model, tokenizer, encoded, decoding, batch_size=batch_size, done=done, decoder=decoder
            )
        _write(completions, len(encoded), len(done), results, printer)
        say_why_plain(decoding.draft, decoder.stats)
        if stats:
            print_stats(decoder.stats, as_json=as_json)


def _check_vllm(decoding: DecodingOptions, given: dict[str, bool]) -> None:
    """Raise ConfigError for what only the transformers backend does."""
    from ensembler.serving.vllm_engine import check_options

    check_options(decoding)
    for option, is_given in given.items():
        if is_given:
            raise ConfigError(f"{option} was given with --backend vllm, which does not do that; leave one of them out")


def _decode_on_vllm(
    checked: CheckedEnsemble,
    backend: BackendChoice,
    prompts: list[EncodedPrompt],
    points: list[GridPoint],
    decoding: DecodingOptions,
    done: frozenset[int],
    results: OutputFile | None,
    printer: Printer,
) -> None:
    """All prompts are in the engine at once, at all `points` (none: the ensemble's), which returns what is finished."""
    from ensembler.decoding.texts import Completion
    from ensembler.serving.vllm_engine import Engine, complete_in_engine

    left = [prompt for prompt in prompts if prompt.number not in done]
    with Engine(checked, backend.arguments) as engine:
        grid = complete_in_engine(engine, checked.require_tokenizer(), left, points or [engine.point], decoding)
        plain = (Completion(one.number, one.prompt_ids, one.all_samples, one.seconds) for one in grid)
        _write(grid if points else plain, len(prompts), len(done), results, printer)


def _write(
    completions: Iterable[Completion | GridCompletion],
    num_prompts: int,
    num_done: int,
    results: OutputFile | None,
    printer: Printer,
) -> None:
    """Hand on each row at once, and say at the end how fast it went."""
    from ensembler.cli.tables import progress

    start, num_texts, num_tokens = time.perf_counter(), 0, 0
    with results or nullcontext(), progress(num_prompts, label="prompts", num_done=num_done) as advance, printer:
        for completion in completions:
            row = printer.print(completion)
            if results is not None:
                results.append(row)
            num_texts += len(completion.all_samples)
            num_tokens += sum(sample.num_tokens for sample in completion.all_samples)
            advance(1)
    seconds = time.perf_counter() - start
    rate = num_tokens / seconds
    log.info("texts: %d, tokens: %d, seconds: %.1f, tokens/s: %.1f", num_texts, num_tokens, seconds, rate)


def _read(texts: tuple[str, ...], path: Path | None, skip: Callable[[str], None] | None) -> list[Prompt]:
    """Return the prompts from where they were given: --prompt, --data or standard input."""
    from ensembler.decoding.prompts import Prompt, read_prompts

    if texts and path is not None:
        raise ConfigError("--prompt and --data were both given; give one of them")
    if path is not None:
        return read_prompts(path, skip=skip)
    if texts:
        return [Prompt(number, text, "--prompt", {"prompt": text}) for number, text in enumerate(texts)]
    if sys.stdin.isatty():
        raise PromptError("no prompt was given; use --prompt TEXT, --data FILE or standard input")
    text = sys.stdin.read().rstrip("\n")
    return [Prompt(0, text, "standard input", {"prompt": text})]


def _streamer(
    stream: bool | None, possible: bool, decoding: DecodingOptions, tokenizer: Any, *, chat: bool
) -> Any | None:
    """Return a streamer to standard output where one text is printed plainly and streaming was not refused."""
    possible = possible and decoding.num_beams == 1 and decoding.num_return_sequences == 1 and not decoding.stop
    if stream and not possible:
        raise ConfigError(
            "--stream prints one text as it comes: it takes one prompt, one sequence, and no --json, --explain, "
            "--output, --stop or beams; leave --stream out"
        )
    if not possible or stream is False or (stream is None and not sys.stdout.isatty()):
        return None
    from ensembler.decoding.samples import TextPrinter

    return TextPrinter(tokenizer, is_chat=chat)
