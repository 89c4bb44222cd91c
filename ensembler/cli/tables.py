"""Tables and marked texts for the terminal."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from ensembler.cli.command_class import is_quiet, log
from ensembler.launch import this_rank
from ensembler.planning.sizes import show_digits, show_size
from ensembler.vocab import TEXT

if TYPE_CHECKING:
    from ensembler.decoding.texts import Candidate, Choice
    from ensembler.engine.grid import GridPoint
    from ensembler.evaluation.scoring import ScoredRequest
    from ensembler.inspection import EnsembleSummary
    from ensembler.patch.card import Applied
    from ensembler.patch.extract import Extracted
    from ensembler.patch.geometry import PatchReport
    from ensembler.planning.placement import Proposal
    from ensembler.planning.vllm_plan import ServingPlan

_SECONDS_BETWEEN_LINES = 30
_PLAIN_WIDTH = 160  # of a file or a pipe, which have no width of their own


def console(*, stderr: bool = False, plain_width: int = _PLAIN_WIDTH) -> Console:
    """Return a console that wraps at the terminal's width, in a file or a pipe at `plain_width` characters or more."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made.width = max(made.width, plain_width)
    return made


def plain_table(names: Iterable[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table of texts without lines."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def print_summary(summary: EnsembleSummary) -> None:
    """Print rule, vocabulary contract and members."""
    out = console()
    out.print(f"rule        {summary.rule} at alpha {summary.alpha:g}", markup=False)
    out.print(f"            {summary.formula}", markup=False)
    out.print(f"            {summary.paper}", markup=False)
    outside = "forbidden" if summary.outside == "mask" else "log-ratio 0"
    widest = max(member.width for member in summary.members)
    rest = f"; ids from there on: {outside}" if widest > summary.shared else ""
    shared = f"{summary.shared:,} shared ids{rest}"
    if summary.vocabulary == TEXT:
        shared = f"the {summary.shared:,} ids of {summary.anchor}; different tokenizers, compared by what tokens spell"
    out.print(f"vocabulary  {summary.vocabulary}, {shared}", markup=False)
    for note in summary.notes:
        out.print(f"            {note}", markup=False)
    ends = ", ".join(f"{end.token!r} ({end.id})" if end.token else str(end.id) for end in summary.ends)
    out.print(f"ends        {ends or 'none: texts run to their limit'}", markup=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("role", "weight", "family", "parameters", "dtype", "device", "context"):
        table.add_column(name, justify="right" if name in ("weight", "parameters", "context") else "left")
    for member in summary.members:
        table.add_row(
            f"{member.role} (anchor)" if member.role == summary.anchor else member.role,
            f"{member.weight:+g}",
            member.family,
            "?" if member.parameters is None else f"{member.parameters:,}",
            member.dtype,
            member.device,
            "-" if member.context is None else f"{member.context:,}",
        )
    out.print(table)
    out.print()
    for member in summary.members:
        adapter = "" if member.adapter is None else f" + {member.adapter}"
        out.print(f"model       {member.role}: {member.model}{adapter}", markup=False, soft_wrap=True)
    for copy in summary.copies:
        known = copy.predicted_bytes is not None
        predicted = f"{show_size(copy.predicted_bytes or 0)} predicted" if known else "cannot be predicted"
        actual = "" if copy.actual_bytes is None else f", {show_size(copy.actual_bytes)} in use"
        method = "" if copy.quantization is None else f" ({copy.quantization})"
        out.print(f"memory      {' + '.join(copy.roles)}{method}: {predicted}{actual}", markup=False)
    if len(summary.copies) > 1 and all(copy.predicted_bytes is not None for copy in summary.copies):
        out.print(f"            all: {_all_bytes(summary)}", markup=False)


def _all_bytes(summary: EnsembleSummary) -> str:
    predicted = sum(copy.predicted_bytes or 0 for copy in summary.copies)
    loaded = all(copy.actual_bytes is not None for copy in summary.copies)
    actual = f", {show_size(sum(copy.actual_bytes or 0 for copy in summary.copies))} in use" if loaded else ""
    return f"{show_size(predicted)} predicted{actual}"


def print_proposal(proposal: Proposal) -> None:
    """Print what each copy of weights takes and where it goes, and what the devices have room for."""
    out = console()
    texts = "a text" if proposal.batch_size == 1 else f"{proposal.batch_size:,} texts"
    out.print(f"plan for {texts} of {proposal.context:,} tokens, answer included (1 GiB = 1,024 MiB)", markup=False)
    for group in proposal.groups:
        place = "no room" if group.device is None else f"on {', '.join(group.max_memory or [group.device])}"
        out.print(f"\n{' and '.join(group.roles)}: {place}", style="bold", markup=False)
        num = len(group.roles)
        covered = "this member" if num == 1 else "both members" if num == 2 else f"all {num} members"
        copy = "" if num == 1 else f"one copy for {covered}, "
        stored = f"in {group.dtype}"
        if group.quantization is not None:
            by_plan = " by the plan" if group.chosen else ""
            stored += f", quantised to {group.quantization.removeprefix('bnb-')}{by_plan}"
        _print_figures(
            ("weights", show_size(group.weight_bytes), f"{copy}{group.parameters:,} parameters {stored}"),
            ("KV per token", show_size(group.cache_per_token * num), covered),
            ("KV cache", show_size(group.cache_bytes), f"{covered}, {texts} of {proposal.context:,} tokens"),
        )
    out.print("\na tenth of each budget stays free; used are weights, KV cache and logits\n", markup=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("device", "budget", "usable", "used", "by"):
        table.add_column(name, justify="right" if name in ("budget", "usable", "used") else "left")
    for device in proposal.devices:
        sizes = (show_size(number) for number in (device.budget, device.usable, device.used))
        table.add_row(device.device, *sizes, ", ".join(device.roles) or "-")
    out.print(table)
    for line in proposal.advice():
        out.print(f"\n{line}", markup=False)


def _print_figures(*rows: tuple[str, str, str]) -> None:
    """Print a line for each figure: its name, its size with the unit, and what it covers."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for number in range(3):
        table.add_column(min_width=14, justify="right" if number == 1 else "left", no_wrap=number < 2)
    for name, size, covered in rows:
        table.add_row(f"  {name}", size, Text(covered))
    console().print(table)


def print_serving(serving: ServingPlan, command: str) -> None:
    """Print what one of vLLM's servers has room for, and the `command` that starts it."""
    out = console()
    gpus = "1 GPU" if serving.num_gpus == 1 else f"{serving.num_gpus} GPUs"
    many = f"{serving.num_servers} servers, each on" if serving.num_servers > 1 else "a server on"
    out.print(f"vLLM, {many} {gpus}", style="bold", markup=False)
    _print_figures(
        ("weights", show_size(serving.weight_bytes), "all members of a server, a copy for each backbone"),
        ("KV per token", show_size(serving.cache_per_token), "all members of a server, a cache for each"),
        (
            "room for",
            f"{serving.num_tokens:,} tokens",
            f"in a server, that is {serving.num_requests:,} texts of {serving.context:,} tokens",
        ),
    )
    out.print(f"run it with: {command}", markup=False, soft_wrap=True)


def print_next_tokens(
    candidates: Mapping[str, Sequence[Candidate]], tokenizer: Any, *, anchor: str, alpha: float
) -> None:
    """Print the top tokens of every member beside the ensemble's, and say whether α moved the choice."""
    out = console()
    table = Table(box=None, header_style="bold", pad_edge=False, title=None)
    for role in candidates:
        table.add_column(role)
    for row in zip(*candidates.values(), strict=True):
        table.add_row(*[Text(f"{c.probability:6.1%}  {show_token(tokenizer, c.token)}") for c in row])
    out.print()
    out.print(table)
    chosen, alone = candidates["ensemble"][0].token, candidates[anchor][0].token
    if chosen == alone:
        line = f"alpha {alpha:g} keeps the anchor's choice: {show_token(tokenizer, alone)}"
    else:
        line = f"alpha {alpha:g} moves the choice: {show_token(tokenizer, alone)} -> {show_token(tokenizer, chosen)}"
    out.print(f"\n{line}", markup=False)


def print_scores(scored: Sequence[ScoredRequest], points: Sequence[GridPoint]) -> None:
    """Print a line for each continuation and point, then the means over lines.

    Of lines with choices, the means are those of the choices with one number. The mean per token is over all tokens,
    and the perplexity is that of all tokens.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    rules = len({point.rule for point in points}) > 1
    for name in (
        "number",
        "choice",
        *(["rule"] if rules else []),
        "alpha",
        "log_prob",
        "per token",
        "perplexity",
        "num_tokens",
        "greedy",
    ):
        table.add_column(name, justify="right")

    def at(point: GridPoint) -> list[str]:
        return [*([point.rule] if rules else []), f"{point.alpha:g}"]

    together: dict[tuple[str, int], list[tuple[float, int, bool | None]]] = {}
    for one in scored:
        for number, score in enumerate(one.scores):
            choice = str(number) if one.request.has_choices else "-"
            for index, (log_prob, is_greedy) in enumerate(zip(score.log_probs, score.is_greedy, strict=True)):
                together.setdefault((choice, index), []).append((log_prob, score.num_tokens, is_greedy))
                shown = "?" if is_greedy is None else "yes" if is_greedy else "no"
                cells = (*_score_cells(log_prob, score.num_tokens, shown), str(score.num_tokens), shown)
                table.add_row(str(one.request.number), choice, *at(points[index]), show_digits(log_prob), *cells)
    for (choice, index), found in together.items():
        if len(found) > 1:
            log_probs, counts, greedy = zip(*found, strict=True)
            mean, tokens = (show_digits(sum(one) / len(found)) for one in (log_probs, counts))
            share = "?" if None in greedy else show_digits(sum(map(bool, greedy)) / len(found))
            cells = (*_score_cells(sum(log_probs), sum(counts), share), tokens, share)
            table.add_row("mean", choice, *at(points[index]), mean, *cells)
    console().print(table)


def _score_cells(log_prob: float, num_tokens: int, greedy: str) -> tuple[str, str]:
    """The log-prob per token, and the perplexity, which scores that are not normalised ("?" for greedy) have not."""
    per_token = log_prob / num_tokens
    if greedy == "?":
        return show_digits(per_token), "?"
    return show_digits(per_token), show_digits(math.exp(-per_token) if per_token > -700 else math.inf)


@contextmanager
def progress(total: int, *, label: str, num_done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a progress bar on standard error, from `num_done` of `total`.

    Where that is a file or a pipe, a line is written every 30 seconds. The first of several processes alone says it.
    """
    is_shown = this_rank() == 0 and not is_quiet()
    if is_shown and not sys.stderr.isatty():
        yield _advance_by_lines(total, label, num_done, "{:,}".format)
        return
    with Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not is_shown,
    ) as bar:
        task = bar.add_task(label, total=total, completed=num_done)
        yield lambda steps: bar.advance(task, steps)


def _advance_by_lines(total: int, label: str, num_done: int, show: Callable[[int], str]) -> Callable[[int], None]:
    begun = said = time.monotonic()
    first, done = num_done, num_done

    def advance(steps: int) -> None:
        nonlocal done, said
        done += steps
        now = time.monotonic()
        if now - said < _SECONDS_BETWEEN_LINES:
            return
        said = now
        per_second = (done - first) / (now - begun)
        left = "?" if per_second == 0 else show_digits((total - done) / per_second / 60)
        rate = show(round(per_second)) if per_second >= 100 else show_digits(per_second)
        log.info("%s: %s/%s, %s per second, %s minutes left", label, show(done), show(total), rate, left)

    return advance


@contextmanager
def byte_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a progress bar of bytes on standard error, or lines as `progress` does."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    if not sys.stderr.isatty() and not is_quiet():
        yield _advance_by_lines(total, what, 0, show_size)
        return
    shown = not is_quiet()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def show_token(tokenizer: Any, token: int) -> str:
    """Return a token's text in quotes, so that spaces show."""
    return repr(tokenizer.decode([token]))


def print_explained(choices: Sequence[Choice], tokenizer: Any) -> None:
    """Print a text with brackets round the tokens that are not the anchor's choice, and then a line for each."""
    from ensembler.decoding.texts import token_texts

    out = console()
    text = Text()
    for choice, shown in zip(choices, token_texts(tokenizer, [choice.token for choice in choices]), strict=True):
        text.append(f"[{shown}]" if choice.moved else shown, style="bold reverse" if choice.moved else "")
    out.print(text, soft_wrap=True)
    moved = [(position, choice) for position, choice in enumerate(choices) if choice.moved]
    out.print(f"{len(moved)} of {len(choices)} tokens are not the anchor's choice", markup=False)
    for position, choice in moved:
        out.print(
            f"  token {position}: {show_token(tokenizer, choice.token)} at {choice.probability:.1%} "
            f"(anchor {choice.anchor_probability:.1%}); the anchor would say "
            f"{show_token(tokenizer, choice.anchor_token)}",
            markup=False,
        )


def print_extracted(extracted: Extracted) -> None:
    """Print what was kept of every tensor's delta, and of all."""
    out = console()
    table = _plain_table(("tensor", "kept as", "energy kept", "‖Δ‖"))
    for kept in extracted.kept:
        kept_as = "in full" if kept.rank is None else f"rank {kept.rank}"
        table.add_row(kept.name, kept_as, f"{kept.energy:.2%}", f"{kept.norm:.4g}")
    out.print(table)
    bounds = [kept.bound for kept in extracted.kept if kept.bound is not None]
    if bounds:
        out.print(
            f"\n{len(bounds)} large deltas were decomposed at random: the energy kept is measured, and σ_max of the "
            f"rest is expected to be at most {max(bounds):.1f} times the least at that rank (Halko et al. 2011)",
            markup=False,
        )
    in_full = sum(kept.rank is None for kept in extracted.kept)
    out.print(
        f"\n{extracted.out}: {len(extracted.kept) - in_full} tensors as low rank, {in_full} in full beside them, "
        f"{extracted.num_equal} equal; {extracted.energy:.2%} of all energy kept",
        markup=False,
    )
    if in_full:
        out.print("PEFT alone would drop what is in full; `ensembler patch apply` adds it", markup=False)


def print_losses(applied: Applied, most: float) -> None:
    """Count the modules kept plain, print the loss of each other one, and warn of losses above `most`."""
    out = console()
    if applied.kept:
        counts = Counter(name.rpartition(".")[2] for name in applied.kept)
        out.print("not quantised any more:", ", ".join(f"{num:,} {kind}" for kind, num in counts.items()), markup=False)
    if not applied.losses:
        return
    table = _plain_table(("quantised module", "of the patch lost"))
    for name, share in applied.losses.items():
        table.add_row(name, f"{share:.3f}")
    out.print(table)
    worst = sorted((name for name, share in applied.losses.items() if share > most), key=applied.losses.__getitem__)
    if worst:
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in reversed(worst))
        patterns = " ".join(f"--keep-bf16 {kind}" for kind in kinds)
        log.warning(
            "Warning: %d of %d quantised modules lost more than %g of the patch (‖requantised - exact‖ / ‖Δ‖), the "
            "most %s (%.2f); to keep them in bfloat16: %s",
            *(len(worst), len(applied.losses), most, worst[-1], applied.losses[worst[-1]], patterns),
        )


def print_patch(report: PatchReport) -> None:
    """Print the norms of a patch, tensor by tensor and together, and the line of advice."""
    out = console()
    first = report.modules[0]
    columns = ["tensor", "rank", "‖Δ‖", "σ_max", "effective rank"]
    columns += ["‖θ′+Δ‖", "σ_max", "lost in rounding"] if first.patched is not None else []
    columns += ["‖residual‖", "σ_max"] if first.residual is not None else []
    columns += ["‖θ′-θ‖", "cosine"] if first.update is not None else []
    table = _plain_table(columns)
    for module in report.modules:
        cells = [_number(module.patch.frobenius), _number(module.patch.sigma_max), _number(module.patch.effective_rank)]
        if module.patched is not None:
            cells += [_number(module.patched.frobenius), _number(module.patched.sigma_max)]
            cells.append("-" if module.rounding_share is None else f"{module.rounding_share:.1%}")
        if module.residual is not None:
            cells += [_number(module.residual.frobenius), _number(module.residual.sigma_max)]
        if module.update is not None:
            cells += [_number(module.update), _number(module.cosine)]
        table.add_row(module.name, "full" if module.rank is None else str(module.rank), *cells)
    out.print(table)
    out.print()
    for key, value in report.overall().items():
        out.print(f"{key.replace('_', ' '):24}{_number(value)}", markup=False)
    out.print(f"\n{report.advice()}", markup=False, soft_wrap=True)


def _plain_table(columns: Sequence[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
