"""The kernels behind `triton_ops`: one block of token ids of one row per program, and a merge of the partial results.

In all of them `members` holds one (pointer, row stride, position stride, constant, slope) per member, strides counted
in elements; row `r` of the grid is row r // positions, position r % positions. Bit i of IN_BASE and IN_RATIO says that
member i has a constant, a slope: a member with neither is not read.
"""

# Triton compiles these functions from their text; their arguments have no Python types, and Triton no type stubs.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

import triton
import triton.language as tl
from triton.language.random import philox_impl

from ensembler_kernels.triton_configs import AUTOTUNE_KEY, CONFIGS

INF = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)  # the largest finite float32


@triton.jit
def _load(member, row, positions, ids, limit, other):
    """Logits of one member at `ids` below `limit`, float32."""
    offset = (row // positions) * member[1] + (row % positions) * member[2]
    return tl.load(member[0] + offset + ids, mask=ids < limit, other=other).to(tl.float32)


@triton.jit
def _sums(
    members, normalisers, row, positions, ids, shared, held,
    IN_BASE: tl.constexpr, IN_RATIO: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """First sum, log-ratio and the anchor's logits at `ids`, float32, made such that `_combined` holds for every α.

    A NaN that a member gave is moved to the first sum, which makes the result NaN whatever α. The log-ratio is 0 where
    it is undefined, and outside the shared ids.
    """
    base = tl.zeros(ids.shape, tl.float32)
    ratio = tl.zeros(ids.shape, tl.float32)
    anchor = tl.zeros(ids.shape, tl.float32)
    given_nan = ids < 0
    for i in tl.static_range(len(members)):
        if (IN_BASE | IN_RATIO) & (1 << i) or i == 0:
            z = _load(members[i], row, positions, ids, held if (IN_BASE & (1 << i)) or i == 0 else shared, 0.0)
            if i == 0:
                anchor = z
            if IN_BASE & (1 << i):
                given_nan = given_nan | (z != z)
                term = z * members[i][3]
                base = base + term if IN_BASE & ((1 << i) - 1) else term
            if IN_RATIO & (1 << i):
                given_nan = given_nan | ((z != z) & (ids < shared))
                term = z * members[i][4]
                ratio = ratio + term if IN_RATIO & ((1 << i) - 1) else term
    if NORMALISED:
        ratio = ratio - tl.load(normalisers + row)
    base = tl.where((base == INF) | (base != base) | (ids >= held), -INF, base)
    base = tl.where(given_nan, float("nan"), base)
    ratio = tl.where((ratio != ratio) | given_nan | (ids >= shared), 0.0, ratio)
    return base, ratio, anchor


@triton.jit
def _combined(base, ratio, alpha):
    """base + α · ratio: an undefined or infinite term counts as 0, a finite ratio that overflows as the largest."""
    term = alpha * ratio
    term = tl.where(term == INF, tl.where(tl.abs(ratio) < INF, LARGEST, 0.0), term)
    return base + tl.where(term != term, 0.0, term)


@triton.jit
def _cut(z, anchor, threshold, alpha):
    """Forbid tokens whose anchor logit is below the threshold, where α ≠ 0."""
    return tl.where(anchor < tl.where(alpha != 0.0, threshold, -INF), -INF, z)


@triton.jit
def _gumbel(seed, row, start, BLOCK: tl.constexpr):
    """(BLOCK,) Gumbel draws for the ids from `start` on, by Philox-4x32-10 with one counter for four ids.

    Word j of counter (c, row, 0, 0) belongs to id 4c + j, so a draw depends on (seed, row, id) and not on BLOCK.
    """
    counter = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = counter * 0
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox_impl(counter, zero + row.to(tl.uint32), zero, zero, low, high)
    bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2⁻²³; exact, never 0 or 1
    return -tl.log(-tl.log(uniform))


@triton.jit
def _exp_sum(z, largest):
    """Σ exp(z − largest), where an infinite `largest` stands for 0."""
    return tl.sum(tl.exp(z - tl.where(tl.abs(largest) == INF, 0.0, largest)), axis=0)


@triton.jit
def _merge(largest, total):
    """Largest z of a row and log Σ exp(z − largest) from the partial results of its blocks; −inf, −inf without a z.

    Two numbers, because log-prob = (z − largest) − log Σ is exact where z − (largest + log Σ) loses the small sum.
    """
    top = tl.max(largest, axis=0)
    shift = tl.where(top == -INF, 0.0, top)
    return top, tl.log(tl.sum(total * tl.exp(largest - shift), axis=0))


@triton.jit
def normaliser_kernel(
    members, partial, positions, shared, num_splits,
    IN_NORMALISER: tl.constexpr, NUM_MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pre-pass for `neutral`: partial (rows, NUM_MEMBERS, num_splits), log Σ exp of one block of the shared logits."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(members)):
        log_sum = 0.0
        if IN_NORMALISER & (1 << i):
            z = _load(members[i], row, positions, ids, shared, -INF)
            largest = tl.max(z, axis=0)
            log_sum = tl.log(_exp_sum(z, largest)) + tl.where(tl.abs(largest) == INF, 0.0, largest)
        tl.store(partial + (row * NUM_MEMBERS + i) * num_splits + split, log_sum)


@triton.jit
def anchor_max_kernel(
    members, normalisers, alphas, alpha_step, row_step, partial, positions, shared, held, num_alphas, num_splits,
    IN_BASE: tl.constexpr, IN_RATIO: tl.constexpr, NORMALISED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pre-pass for `cutoff`: partial (num_alphas, rows, num_splits), a block's largest anchor logit of those allowed.

    +inf where the anchor gave NaN: then nothing is cut.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    base, ratio, anchor = _sums(
        members, normalisers, row, positions, ids, shared, held, IN_BASE, IN_RATIO, NORMALISED
    )  # fmt: skip
    for k in range(num_alphas):
        alpha = tl.load(alphas + k * alpha_step + (row // positions) * row_step)
        score = tl.where(_combined(base, ratio, alpha) == -INF, -INF, anchor)
        largest = tl.max(tl.where(score != score, INF, score), axis=0)
        tl.store(partial + (k * tl.num_programs(0) + row) * num_splits + split, largest)


@triton.autotune(CONFIGS, AUTOTUNE_KEY)
@triton.jit
def combine_kernel(
    members, normalisers, thresholds, alphas, out, width, row_bucket, positions, shared, held,
    IN_BASE: tl.constexpr, IN_RATIO: tl.constexpr, NORMALISED: tl.constexpr, CUT: tl.constexpr,
    NUM_MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (rows, width) float32."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    base, ratio, anchor = _sums(
        members, normalisers, row, positions, ids, shared, held, IN_BASE, IN_RATIO, NORMALISED
    )  # fmt: skip
    alpha = tl.load(alphas + row // positions)
    z = _combined(base, ratio, alpha)
    if CUT:
        z = _cut(z, anchor, tl.load(thresholds + row), alpha)
    tl.store(out + row * width + ids, z, mask=ids < width)


@triton.autotune(CONFIGS, AUTOTUNE_KEY)
@triton.jit
def sample_kernel(
    members, normalisers, thresholds, alphas, temperatures, seed, partial, partial_ids,
    width, row_bucket, shared, held, num_splits,
    IN_BASE: tl.constexpr, IN_RATIO: tl.constexpr, NORMALISED: tl.constexpr, CUT: tl.constexpr,
    NUM_MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial (rows, 4, num_splits): best score, its z / T, largest z / T, Σ exp; partial_ids: the id of the best."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    base, ratio, anchor = _sums(
        members, normalisers, row, 1, ids, shared, held, IN_BASE, IN_RATIO, NORMALISED
    )  # fmt: skip
    alpha = tl.load(alphas + row)
    z = _combined(base, ratio, alpha)
    if CUT:
        z = _cut(z, anchor, tl.load(thresholds + row), alpha)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        z = tl.div_rn(z, temperature)
        score = z + _gumbel(tl.load(seed), row, split * BLOCK, BLOCK)
    else:
        score = z
    best, place = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    largest = tl.max(z, axis=0)
    at = partial + row * 4 * num_splits + split
    tl.store(at, best)
    tl.store(at + num_splits, tl.max(tl.where(ids == split * BLOCK + place, z, -INF), axis=0))
    tl.store(at + 2 * num_splits, largest)
    tl.store(at + 3 * num_splits, _exp_sum(z, largest))
    tl.store(partial_ids + row * num_splits + split, split * BLOCK + place)


@triton.jit
def sample_merge_kernel(partial, partial_ids, tokens, logprobs, num_splits, used_splits, SPLITS: tl.constexpr):
    """tokens (rows,) int64, −1 where everything is forbidden; logprobs (rows,) float32, NaN where the row holds NaN."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    used = split < used_splits
    at = partial + row * 4 * num_splits + split
    score = tl.load(at, mask=used, other=-INF)
    at_best = tl.load(at + num_splits, mask=used, other=-INF)
    largest = tl.load(at + 2 * num_splits, mask=used, other=-INF)
    total = tl.load(at + 3 * num_splits, mask=used, other=0.0)
    ids = tl.load(partial_ids + row * num_splits + split, mask=used, other=0)
    top, log_sum = _merge(largest, total)
    _, place = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.sum(tl.where(split == place, ids, 0), axis=0).to(tl.int64)
    tl.store(tokens + row, tl.where(log_sum == -INF, -1, token))
    tl.store(logprobs + row, tl.max(tl.where(split == place, at_best, -INF), axis=0) - top - log_sum)


@triton.autotune(CONFIGS, AUTOTUNE_KEY)
@triton.jit
def logprob_kernel(
    members, normalisers, thresholds, alphas, targets, partial, partial_ids, at_target,
    width, row_bucket, shared, held, num_alphas, num_splits,
    IN_BASE: tl.constexpr, IN_RATIO: tl.constexpr, NORMALISED: tl.constexpr, CUT: tl.constexpr,
    NUM_MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial (num_alphas, rows, 2, num_splits): largest z, Σ exp, from one read; its id; at_target (num_alphas, rows).

    The target's z is stored by the block that holds it, so it is the very number that the block's sum has.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.num_programs(0)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    base, ratio, anchor = _sums(
        members, normalisers, row, 1, ids, shared, held, IN_BASE, IN_RATIO, NORMALISED
    )  # fmt: skip
    is_target = (ids == tl.load(targets + row)) & (ids < width)
    for k in range(num_alphas):
        at = k * rows + row
        alpha = tl.load(alphas + k)
        z = _combined(base, ratio, alpha)
        if CUT:
            z = _cut(z, anchor, tl.load(thresholds + at), alpha)
        largest, place = tl.max(z, axis=0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(partial + at * 2 * num_splits + split, largest)
        tl.store(partial + (at * 2 + 1) * num_splits + split, _exp_sum(z, largest))
        tl.store(partial_ids + at * num_splits + split, split * BLOCK + place)
        tl.store(at_target + at + tl.zeros((BLOCK,), tl.int64), z, mask=is_target)


@triton.jit
def logprob_merge_kernel(
    partial, partial_ids, at_target, targets, logprobs, greedy, num_splits, used_splits, SPLITS: tl.constexpr
):
    """logprobs, greedy (num_alphas, rows): NaN where the row holds NaN or everything is forbidden."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * tl.num_programs(0) + row
    split = tl.arange(0, SPLITS)
    used = split < used_splits
    largest = tl.load(partial + at * 2 * num_splits + split, mask=used, other=-INF)
    total = tl.load(partial + (at * 2 + 1) * num_splits + split, mask=used, other=0.0)
    ids = tl.load(partial_ids + at * num_splits + split, mask=used, other=0)
    top, log_sum = _merge(largest, total)
    _, place = tl.max(largest, axis=0, return_indices=True, return_indices_tie_break_left=True)
    best = tl.sum(tl.where(split == place, ids, 0), axis=0)
    tl.store(logprobs + at, tl.load(at_target + at) - top - log_sum)  # −inf − −inf: NaN where everything is forbidden
    tl.store(greedy + at, best == tl.load(targets + row))
