"""`ensembler generate`: texts from prompts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensembler.cli.backend_options import backend_options
from ensembler.cli.options import EnsembleOptions, decoding_options, ensemble_options
from ensembler.cli.ranks import launched, on_each, on_first
from ensembler.errors import ConfigError, PromptError
from ensembler.launch import RANK_TIMEOUT

if TYPE_CHECKING:
    from ensembler.cli.printing import Printer
    from ensembler.decoding.batches import TextLimits
    from ensembler.decoding.options import DecodingOptions
    from ensembler.decoding.prompts import EncodedPrompt, Prompt
    from ensembler.decoding.results import ResultsFile
    from ensembler.decoding.texts import Completion
    from ensembler.preflight import CheckedEnsemble
    from ensembler.serving.choice import BackendChoice


@click.command()
@ensemble_options()
@click.option(
    "--prompt", multiple=True, metavar="TEXT", help="A prompt; repeat it. Without any, standard input is one."
)
@click.option("--prompts", type=click.Path(path_type=Path), help='JSON lines: {"prompt": "..."}.')
@click.option("--skip-bad", is_flag=True, help="Go on over lines of --prompts that cannot be decoded.")
@decoding_options
@click.option("--chat", is_flag=True, help="Put the prompt into the anchor's chat template.")
@click.option("--system", metavar="TEXT", help="The system message for --chat.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Prompts decoded together.")
@click.option("--stream/--no-stream", default=None, help="Print tokens as they come.  [default: on a terminal]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each prompt, as it ends.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the JSON lines to a file, in input order.")
@click.option("--resume", is_flag=True, help="Go on with an --output file that was interrupted.")
@click.option("--overwrite", is_flag=True, help="Replace the --output file if it exists.")
@click.option("--compile", "compiled", is_flag=True, help="Compile decode steps: slow to start.")
@click.option("--no-cuda-graphs", is_flag=True, help="Launch every step piece by piece on GPUs, to look for a fault.")
@click.option("--explain", is_flag=True, help="Mark the tokens that are not the anchor's own choice.")
@click.option("--stats", is_flag=True, help="Say on standard error where the time went; one JSON line with --json.")
@click.option(
    "--rank-timeout",
    type=click.FloatRange(1),
    default=RANK_TIMEOUT,
    show_default=True,
    help="Under torchrun: seconds of silence after which a process counts as lost.",
)
@backend_options
def generate(
    given: EnsembleOptions,
    prompt: tuple[str, ...],
    prompts: Path | None,
    skip_bad: bool,
    decoding: DecodingOptions,
    chat: bool,
    system: str | None,
    batch_size: int,
    stream: bool | None,
    as_json: bool,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    compiled: bool,
    no_cuda_graphs: bool,
    explain: bool,
    stats: bool,
    rank_timeout: float,
    backend: BackendChoice,
) -> None:
    """Decode texts with ENSEMBLE.

    Started by torchrun or accelerate launch, each process runs some of the members; the first prints and writes. With
    --backend vllm, vLLM's engine runs them and decides what is decoded together.

    \b
    ensembler generate demo --prompt "Tom has 5 pears ..." --explain
    ensembler generate math --prompts questions.jsonl --output answers.jsonl --batch-size 16
    torchrun --nproc-per-node 3 -m ensembler generate math --device cuda --prompts questions.jsonl
    ensembler generate math --backend vllm --engine-arg tensor_parallel_size=2 --prompts questions.jsonl
    """
    if system is not None and not chat:
        raise ConfigError("--system was given without --chat; add --chat")
    if output is None and (resume or overwrite):
        raise ConfigError(f"--{'resume' if resume else 'overwrite'} was given without --output; name the file")
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite were both given; keep the rows that are there, or replace them")
    if compiled and decoding.num_beams > 1:
        raise ConfigError("--compile is for greedy decoding and sampling: beams move caches; leave one of them out")
    from ensembler.cli.printing import Printer
    from ensembler.cli.stats import print_stats, say_why_plain
    from ensembler.decoding.drafting import check_draft
    from ensembler.decoding.prompts import encode_prompts
    from ensembler.decoding.results import ResultsFile, check_output
    from ensembler.decoding.stats import DecodingStats, Meter
    from ensembler.decoding.texts import complete_prompts, decoder_of, fingerprint
    from ensembler.engine.compiled import check_compiler
    from ensembler.modeling import EnsembleForCausalLM
    from ensembler.preflight import check_ensemble

    on_vllm = backend.name == "vllm"
    if on_vllm:
        _check_vllm(decoding, {"--compile": compiled, "--explain": explain, "--stream": bool(stream), "--stats": stats})
    skip = (lambda message: click.echo(f"skipped: {message}", err=True)) if skip_bad else None

    def read() -> list[Prompt]:
        all_prompts = _read(prompt, prompts, skip)
        if output is not None:
            check_output(output, resume=resume, overwrite=overwrite)
            if prompts is not None and output.exists() and output.samefile(prompts):
                raise ConfigError(f"--output is the file of the prompts, {prompts}; choose another name")
        return all_prompts

    if compiled:
        check_compiler()
    with launched(rank_timeout) as world:
        all_prompts = on_first(world, read)
        checked = on_each(world, lambda: check_ensemble(given.load_config()))
        backend.check(checked)
        check_draft(checked.config.get_rule(), decoding.draft)
        tokenizer = checked.require_tokenizer()
        encoded = encode_prompts(
            all_prompts, tokenizer, chat=chat, system=system, context=backend.shortest_context(checked), skip=skip
        )
        if not encoded:
            raise PromptError("no prompt is left to decode; mend the skipped lines")
        plain = not as_json and not explain and output is None
        streamer = _streamer(stream, plain and len(encoded) == 1 and not on_vllm, decoding, tokenizer)
        printer = Printer(
            tokenizer, as_json=as_json, quiet=output is not None or streamer is not None, many=len(all_prompts) > 1
        )

        def open_results(model: TextLimits) -> ResultsFile | None:
            if output is None:
                return None
            run = fingerprint(model, encoded, decoding, backend=backend.describe(checked))
            return ResultsFile(output, run, resume=resume, overwrite=overwrite)

        if on_vllm:
            _decode_on_vllm(checked, backend, encoded, decoding, open_results, printer, shown=prompts is not None)
            return
        model = EnsembleForCausalLM.from_checked(checked, world=world)
        if no_cuda_graphs:
            model.member_set.graphs = None
        if compiled:
            click.echo("compiling: the first step of each shape takes a minute or so", err=True)
            model.compile_members()
        if explain:
            printer.explain_with(model)
        results: ResultsFile | None = None

        def open_on_first() -> frozenset[int]:
            nonlocal results
            results = open_results(model)
            return frozenset() if results is None else results.done

        done = on_first(world, open_on_first)
        decoder = decoder_of(decoding, streamer=streamer, meter=Meter(DecodingStats()) if stats else None)
        completions = complete_prompts(
            model, tokenizer, encoded, decoding, batch_size=batch_size, done=done, decoder=decoder
        )
        _write(completions, len(encoded), len(done), results, printer, shown=prompts is not None)
        say_why_plain(decoding.draft, decoder.stats)
        if stats:
            print_stats(decoder.stats, as_json=as_json)


def _check_vllm(decoding: DecodingOptions, given: dict[str, bool]) -> None:
    """Raise ConfigError for what only the transformers backend does."""
    from ensembler.serving.texts import check_options

    check_options(decoding)
    for option, is_given in given.items():
        if is_given:
            raise ConfigError(f"{option} was given with --backend vllm, which does not do that; leave one of them out")


def _decode_on_vllm(
    checked: CheckedEnsemble,
    backend: BackendChoice,
    prompts: list[EncodedPrompt],
    decoding: DecodingOptions,
    open_results: Callable[[TextLimits], ResultsFile | None],
    printer: Printer,
    *,
    shown: bool,
) -> None:
    """All prompts are in the engine at once, which returns each when it is finished."""
    from ensembler.serving.engine import Engine
    from ensembler.serving.texts import complete_in_engine

    engine = Engine(checked, backend.arguments)
    results = open_results(engine)
    done: frozenset[int] = frozenset() if results is None else results.done
    left = [prompt for prompt in prompts if prompt.number not in done]
    with engine if left else nullcontext():
        completions = complete_in_engine(engine, checked.require_tokenizer(), left, decoding)
        _write(completions, len(prompts), len(done), results, printer, shown=shown)


def _write(
    completions: Iterable[Completion],
    num_prompts: int,
    num_done: int,
    results: ResultsFile | None,
    printer: Printer,
    *,
    shown: bool,
) -> None:
    """Hand on each row at once, and say at the end how fast it went."""
    from ensembler.cli.tables import progress

    start, num_texts, num_tokens = time.perf_counter(), 0, 0
    with results or nullcontext(), printer, progress(num_prompts, shown=shown) as advance:
        advance(num_done)
        for completion in completions:
            row = printer.add(completion)
            if results is not None:
                results.append(row)
            num_texts += len(completion.samples)
            num_tokens += sum(sample.num_tokens for sample in completion.samples)
            advance(1)
    if num_done == num_prompts:
        click.echo(f"nothing to do: all {num_prompts} prompts have their rows already", err=True)
        return
    seconds = time.perf_counter() - start
    rate = num_tokens / seconds
    click.echo(f"texts: {num_texts}, tokens: {num_tokens}, seconds: {seconds:.1f}, tokens/s: {rate:.1f}", err=True)


def _read(texts: tuple[str, ...], path: Path | None, skip: Callable[[str], None] | None) -> list[Prompt]:
    """The prompts from where they were given: --prompt, --prompts or standard input."""
    from ensembler.decoding.prompts import Prompt, read_prompts

    if texts and path is not None:
        raise ConfigError("--prompt and --prompts were both given; give one of them")
    if path is not None:
        return read_prompts(path, skip=skip)
    if texts:
        return [Prompt(number, text, "--prompt") for number, text in enumerate(texts)]
    if sys.stdin.isatty():
        raise PromptError("no prompt was given; use --prompt TEXT, --prompts FILE or standard input")
    return [Prompt(0, sys.stdin.read().rstrip("\n"), "standard input")]


def _streamer(stream: bool | None, possible: bool, decoding: DecodingOptions, tokenizer: Any) -> Any | None:
    """A streamer to standard output where one text is printed plainly and streaming was not refused."""
    possible = possible and decoding.num_beams == 1 and decoding.num_return_sequences == 1 and not decoding.stop
    if stream and not possible:
        raise ConfigError(
            "--stream prints one text as it comes: it takes one prompt, one sequence, and no --json, --explain, "
            "--output, --stop or beams; leave --stream out"
        )
    if not possible or stream is False or (stream is None and not sys.stdout.isatty()):
        return None
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
