"""Several processes, one ensemble: each rank runs some of the members and all decode the same tokens.

Started by torchrun or `accelerate launch`. A forward has three parts: every rank runs its own members; the ranks tell
each other that they succeeded and read the same tokens (over gloo, on the host, with a timeout: nobody enters a
collective on GPUs that another rank will not enter); the weighted logits are summed by one all-reduce, so that every
rank has the same combination, samples the same token from the same seed, and goes on without further talk.
"""

from __future__ import annotations

import pickle
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from ensembler_kernels import Combination
from torch import Tensor

from ensembler.engine.backbone import Backbone
from ensembler.engine.ensemble_cache import EnsembleCache
from ensembler.engine.grid import combine_members
from ensembler.engine.member_set import MemberSet
from ensembler.engine.model_runner import ModelRunner, Step, check_nan
from ensembler.engine.path_rows import PathRows
from ensembler.engine.row_cache import RowCache
from ensembler.errors import ConfigError, EnsemblerError, RankError, RunError
from ensembler.files import one_line
from ensembler.launch import RANK_TIMEOUT, local_rank, num_ranks, this_rank
from ensembler.vocab import VocabularyContract

Result = TypeVar("Result")

LOADING_TIMEOUT = 3600.0  # members differ in size, and disks in speed
_ROLL_CALL = 5.0  # seconds in which a rank that is alive answers
_PAUSE = 5e-5  # seconds between two looks at a collective: a step takes hundreds of times as long
_STORE_PAUSE = 0.05  # between two questions to the store, which one process answers for all
_FINE, _GATHER, _FAILED = range(3)
_LARGE = 1e37  # a sum of terms below it is finite in fp32


class World:
    """The ranks of a run, and what they say to each other.

    `owners` says which roles each rank runs, once `divide` has been called. Every method is called by all ranks alike.
    A rank that is lost, or silent for `timeout` seconds, raises RankError in the others, with its number and roles.
    """

    def __init__(self, timeout: float = RANK_TIMEOUT) -> None:
        """Meet the other ranks, as the launcher's environment says. Raises RankError where they do not come."""
        self.rank, self.size = this_rank(), num_ranks()
        self.owners: list[tuple[str, ...]] = [()] * self.size
        self._timeout = timeout
        self._step = 0
        self._num_firsts = 0
        self._closing = False
        has_gpu = torch.cuda.is_available()
        if local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=timedelta(seconds=LOADING_TIMEOUT)
            )
        except (RuntimeError, ValueError) as error:
            raise RankError(f"rank {self.rank} did not meet the others: {one_line(error)}", reporter=0) from error
        self._store: Any = dist.distributed_c10d._get_default_store()
        torch.manual_seed(self.first(torch.initial_seed))

    # -- who does what ------------------------------------------------------------------------------------------------

    def divide(self, groups: Sequence[Sequence[str]], sizes: Sequence[int]) -> list[int]:
        """Give each rank some of the groups of members, so that their bytes are as even as may be.

        `groups` are named by their roles, `sizes` are in bytes. Returns the indices of this rank's.
        """
        if len(groups) < self.size:
            names = ", ".join("+".join(group) for group in groups)
            raise ConfigError(
                f"{self.size} processes were started for {len(groups)} groups of members ({names}); "
                f"start {len(groups)} with --nproc-per-node (members that share their weights are one group)"
            )
        owned: list[list[int]] = [[] for _ in range(self.size)]
        # The largest first, each to the rank that has least; a group without a size counts, too.
        for index in sorted(range(len(groups)), key=lambda index: -sizes[index]):
            min(owned, key=lambda mine: sum(max(sizes[one], 1) for one in mine)).append(index)
        owned = [sorted(mine) for mine in owned]
        self.owners = [tuple(role for index in indices for role in groups[index]) for indices in owned]
        return owned[self.rank]

    def first(self, function: Callable[[], Result]) -> Result:
        """Let rank 0 alone call `function`, and return its result, or raise its EnsemblerError, on every rank."""
        self._num_firsts += 1
        key = f"ensembler/first/{self._num_firsts}"
        if self.rank == 0:
            try:
                result = function()
            except EnsemblerError as error:
                self._store.set(key, pickle.dumps((None, (type(error), str(error)))))
                raise
            self._store.set(key, pickle.dumps((result, None)))
            return result
        self._wait(lambda: self._store.check([key]), LOADING_TIMEOUT, _STORE_PAUSE)
        result, refused = pickle.loads(self._store.get(key))
        if refused is not None:
            kind, message = refused
            same = kind.__new__(kind)  # as rank 0 raised it, whatever its __init__ takes
            same.args = (message,)
            raise same
        return result

    def together(self, function: Callable[[], Result]) -> Result:
        """Call `function` on every rank (it may take long: loading); raise on all of them where it fails on one.

        Machines differ in their files, devices and memory: what one of them lacks the first rank has to say.
        """
        try:
            result = function()
        except EnsemblerError as error:
            self._exchange([_FAILED, 0], error, LOADING_TIMEOUT)  # raises it
            raise
        self._exchange([_FINE, 0], None, LOADING_TIMEOUT)
        return result

    # -- one step -----------------------------------------------------------------------------------------------------

    def agree(self, step: Step, failure: Exception | None, *, is_plain: bool) -> bool:
        """Tell the others how this rank's members fared; return whether on every rank a weighted sum is enough.

        Raises `failure` on this rank, and a RunError with its text on the others; RunError where ranks read different
        tokens.
        """
        self._step += 1
        code = _FAILED if failure is not None else _FINE if is_plain else _GATHER
        digest = zlib.crc32(step.input_ids.cpu().numpy().tobytes())
        statuses = self._exchange([code, digest], failure, self._timeout)
        for rank, (_, other) in enumerate(statuses):
            if other != statuses[0][1]:
                raise RunError(
                    f"{self._name(rank)} decodes other tokens than {self._name(0)} (at step {self._step}); give all "
                    "ranks the same inputs and seed, and the same kind of device"
                )
        return all(code == _FINE for code, _ in statuses)

    def sum(self, term: Tensor) -> Tensor:
        """Return the sum of the ranks' terms, fp32 of one shape: the same bits on every rank."""
        self._wait_for(dist.all_reduce(term, async_op=True), self._timeout)
        return term

    def logits(self, step: Step, roles: Iterable[str], run: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the logits of some roles in fp32 on every rank, in their order; `run` gives those of this rank's.

        Raises what `run` raises on one of them on all.
        """
        logits, failure = caught(run)
        self.agree(step, failure, is_plain=False)
        gathered = {}
        for role in roles:  # a rank that runs none of them knows no shape
            values = logits.get(role)
            shape = torch.tensor([0] * 4 if values is None else [*values.shape, values.is_cuda])
            self._wait_for(dist.broadcast(shape, src=self._owner(role), async_op=True), self._timeout)
            *sizes, is_cuda = shape.tolist()
            gathered[role] = self._share(role, values, sizes, torch.device("cuda" if is_cuda else "cpu"))
        return gathered

    def gather(self, logits: Mapping[str, Tensor], contract: VocabularyContract) -> dict[str, Tensor]:
        """Return the logits (rows, kept positions, V_member) of all members in fp32; every rank has some of them."""
        like = next(iter(logits.values()))
        return {
            role: self._share(role, logits.get(role), [*like.shape[:-1], width], like.device)
            for role, width in contract.widths.items()
        }

    def _owner(self, role: str) -> int:
        return next(rank for rank, roles in enumerate(self.owners) if role in roles)

    def _share(self, role: str, values: Tensor | None, sizes: Sequence[int], device: torch.device) -> Tensor:
        """Return the logits that the rank of a role has."""
        whole = torch.empty(*sizes, device=device)
        if values is not None:
            whole.copy_(values)
        self._wait_for(dist.broadcast(whole, src=self._owner(role), async_op=True), self._timeout)
        return whole

    # -- when it fails ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the others: at the end of a run that succeeded."""
        self._closing = True
        dist.destroy_process_group()

    def _exchange(self, status: Sequence[int], failure: Exception | None, timeout: float) -> list[list[int]]:
        """Return every rank's status; raise the failure of the first that has one."""
        key = f"ensembler/failure/{self._step}"
        if failure is not None:
            self._store.set(f"{key}/{self.rank}", f"{type(failure).__name__}: {failure}")
        mine = torch.tensor(status)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        self._wait_for(dist.all_gather(gathered, mine, async_op=True), timeout)
        statuses = [values.tolist() for values in gathered]
        if failure is not None:
            raise failure
        for rank, values in enumerate(statuses):
            if values[0] == _FAILED:
                message = self._store.get(f"{key}/{rank}").decode()
                raise RunError(f"{self._name(rank)}: {message}")
        return statuses

    def _wait_for(self, work: Any, timeout: float) -> None:
        """Wait for a collective on the host, also for one between GPUs: a rank may be lost inside of it."""
        self._wait(work.is_completed, timeout)
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(one_line(error)) from error

    def _wait(self, is_done: Callable[[], bool], timeout: float, pause: float = _PAUSE) -> None:
        """Ask again and again: a wait inside torch would hold back the launcher's signal that a rank is gone."""
        end = time.monotonic() + timeout
        while not is_done():
            if time.monotonic() > end:
                raise self._lost(f"no answer in {timeout:g} seconds")
            time.sleep(pause)

    def terminated(self, number: int, frame: object) -> None:
        """Handle a signal by which the launcher stops everybody when one rank is gone: raise RankError saying which.

        A program that wants this installs it with `signal.signal(signal.SIGTERM, world.terminated)`.
        """
        if not self._closing:
            raise self._lost("the launcher stopped the run")

    def _lost(self, reason: str) -> RankError:
        """Return an error that names the ranks which do not answer within some seconds."""
        self._closing = True
        self._store.set(f"ensembler/alive/{self.rank}", "")
        end = time.monotonic() + _ROLL_CALL
        answered: list[int] = []
        while len(answered) < self.size and time.monotonic() < end:
            time.sleep(_STORE_PAUSE)
            answered = [rank for rank in range(self.size) if self._store.check([f"ensembler/alive/{rank}"])]
        silent = [rank for rank in range(self.size) if rank not in answered]
        if not silent:
            return RankError(f"the run stopped at step {self._step}: {reason}", reporter=0)
        names = " and ".join(self._name(rank) for rank in silent)
        return RankError(
            f"lost {names} at step {self._step}: {reason}; see what it wrote before, and start the run again (an "
            "--output goes on by the same command)",
            reporter=min(answered),
        )

    def _name(self, rank: int) -> str:
        roles = " and ".join(self.owners[rank])
        return f"rank {rank} ({roles})" if roles else f"rank {rank}"


class RankedMembers(MemberSet):
    """The members of this rank, which give the logits of all of them: each method is called by all ranks alike."""

    def __init__(self, world: World, models: Any, backbones: Sequence[Backbone], contract: VocabularyContract) -> None:
        super().__init__(models, backbones, contract)
        self._world = world

    def logits(
        self,
        step: Step,
        cache: EnsembleCache | RowCache | None = None,
        runners: Sequence[ModelRunner] | None = None,
    ) -> dict[str, Tensor]:
        """Return the logits of all members by role, fp32, on every rank."""
        with self._advancing(cache):
            return self._world.logits(step, self.contract.widths, partial(super().logits, step, cache))

    def combined(
        self, step: Step, cache: EnsembleCache | RowCache | None, combination: Combination, alpha: float | Tensor
    ) -> Tensor:
        """Return the combination (rows, kept positions, V) fp32 on every rank.

        Where all logits are finite it is the all-reduce of the ranks' weighted sums. What no sum expresses (a member
        that forbids tokens by −inf, a cut-off, ratios normalised over the shared ids) is combined from all logits.
        """
        contract = self.contract
        roles = tuple(contract.widths)
        width = contract.widths[roles[0]]
        sum_is_enough = combination.cutoff is None and not (combination.neutral and contract.shared < width)
        with self._advancing(cache):
            logits, failure = caught(partial(super().logits, step, cache))
            term = None if failure is not None else _weighted(logits, roles, combination, contract.shared, alpha)
            is_plain = sum_is_enough and term is not None and bool(term.abs().amax() < _LARGE)
            if self._world.agree(step, failure, is_plain=is_plain) and term is not None:
                return torch.nn.functional.pad(self._world.sum(term), (0, width - contract.shared), value=-torch.inf)
            return combine_members(self._world.gather(logits, contract), combination, alpha, roles)


class RankedRows(PathRows):
    """The rows of a member with another tokenizer on the rank that runs it; the other ranks get its logits.

    Each method is called by all ranks alike.
    """

    def __init__(self, world: World, members: MemberSet, role: str) -> None:
        super().__init__(members, role)
        self._world = world

    def logits(self, texts: Sequence[Sequence[int]], num_last: int = 1) -> Tensor:
        """Return the same logits on every rank, fp32. Raises what the member raises on its rank."""

        def run() -> dict[str, Tensor]:
            is_here = self.role in self._world.owners[self._world.rank]
            return {self.role: logits(texts, num_last)} if is_here else {}

        logits = super().logits
        asked = [num_last, *map(len, texts), *self.role.encode()]  # which ranks have to agree on, too
        read = Step(torch.tensor([[*asked, *(token for text in texts for token in text)]]))
        return self._world.logits(read, [self.role], run)[self.role]


def caught(run: Callable[[], Mapping[str, Tensor]]) -> tuple[Mapping[str, Tensor], EnsemblerError | None]:
    """Return the logits of this rank's members, or their error, which the others learn before it is raised."""
    try:
        logits = run()
        check_nan(logits)
    except RankError:
        raise
    except EnsemblerError as error:
        return {}, error
    return logits, None


def _weighted(
    logits: Mapping[str, Tensor], roles: Sequence[str], combination: Combination, shared: int, alpha: float | Tensor
) -> Tensor:
    """Σ (constant + α · slope) · z over this rank's members, on the shared ids."""
    device = next(iter(logits.values())).device
    alphas = alpha.to(device, torch.float32).view(-1, 1, 1) if isinstance(alpha, Tensor) else alpha
    weights = {
        role: combination.constant[index] + alphas * combination.slope[index] for index, role in enumerate(roles)
    }
    terms = [values[..., :shared].to(device, torch.float32) * weights[role] for role, values in logits.items()]
    return torch.stack(terms).sum(0)
