"""The command in processes of its own that start at once: forks of a server that has loaded all packages."""

from __future__ import annotations

import multiprocessing
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")  # which has no threads, as this process may have
_SERVER.set_forkserver_preload(
    [
        "ensembler.cli.main",
        "ensembler.evaluation.runner",
        "ensembler.evaluation.report",
        "ensembler.evaluation.summary",
        "ensembler.evaluation.task_loading",
        "ensembler.modeling",
        "lm_eval.models.huggingface",
        "matplotlib.pyplot",
        "statsmodels.regression.linear_model",
        "transformers.models.auto.modeling_auto",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen2.modeling_qwen2",
    ]
)


def fork(arguments: list[str], said: str = "said", **environment: str) -> BaseProcess:
    """Begin to run the command; the file `said` gets its output."""
    process = _SERVER.Process(target=_run, args=(arguments, said, environment))
    process.start()
    return process


def _run(arguments: list[str], said: str, environment: dict[str, str]) -> None:
    import torch

    from ensembler.cli.main import main

    torch.set_num_threads(1)
    os.environ.update(environment)
    with open(said, "w") as log, redirect_stdout(log), redirect_stderr(log):
        main(arguments)


def torchrun(arguments: list[str], num_ranks: int) -> BaseProcess:
    """Begin to run the command as torchrun does, in forks; the files `printed` and `errors` get its output."""
    process = _SERVER.Process(target=_run_ranks, args=(arguments, num_ranks))
    process.start()
    return process


def _run_ranks(arguments: list[str], num_ranks: int) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    for descriptor, name in ((1, "printed"), (2, "errors")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    own_port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    config, _, _ = config_from_args(parse_args(["--nproc-per-node", str(num_ranks), *own_port, "ensembler"]))
    config.start_method = "fork"
    try:
        elastic_launch(config, _run_rank)(arguments)
    except ChildFailedError:
        sys.exit(1)  # as torchrun


def _run_rank(arguments: list[str]) -> None:
    import torch

    from ensembler.cli.main import main

    torch.set_num_threads(1)
    try:
        main(arguments)
    except SystemExit as ended:
        if ended.code:
            raise


def launch(arguments: list[str], num_ranks: int, ranks: list[int]) -> dict[int, str]:
    """Run some of the processes that a launcher would start, one after the other; return what each said."""
    said = {}
    for rank in ranks:
        given = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        process = fork(arguments, f"said{rank}", **given)
        process.join()
        said[rank] = Path(f"said{rank}").read_text()
        assert process.exitcode == 0, said[rank]
    return said
