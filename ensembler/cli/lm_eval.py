"""`ensembler lm-eval`: lm-evaluation-harness's own command line with the model `ensembler` registered."""

from __future__ import annotations

import sys

import click


@click.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm-eval's own command line, which then knows the model `ensembler`.

    One folder is one alpha there; a grid in one pass is `ensembler sweep`. `accelerate launch` splits the documents.

    \b
    ensembler lm-eval run --model ensembler --model_args pretrained=my-ensemble,alpha=0.5 --tasks winogrande
    accelerate launch -m ensembler lm-eval run --model ensembler --model_args pretrained=my-ensemble --tasks gsm8k
    """
    from ensembler.extras import require

    main = require("lm_eval.__main__", "eval").cli_evaluate
    import ensembler.evaluation.grid_lm  # noqa: F401  (registers the model)

    sys.argv = ["lm-eval", *arguments]
    main()
