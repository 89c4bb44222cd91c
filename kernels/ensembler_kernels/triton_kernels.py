"""The kernels behind `triton_ops`: programs read blocks of token ids of one output; the last one merges their results.

In all of them `members` holds one (pointer, row stride, position stride, limit) per member, strides counted in
elements; row r is row r // positions, position r % positions, and ids from `limit` on are not read. `table`
(outputs, 2 · members + 2) holds the weights: constants, slopes, α, log of the cut-off.
"""

# A number that changes from step to step is not specialised: a value of 1, or a multiple of 16, would be another kernel
# to compile while a text is made.
#
# Triton compiles these functions from their text; their arguments have no Python types, and Triton no type stubs.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

import triton
import triton.language as tl
from triton.language.random import philox_impl

INF = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)  # the largest finite float32
NO_ID = tl.constexpr(2147483647)
SAFE_SIZE = tl.constexpr(1e30)  # of logits: far from overflow between both ends of a run
SAFE_SPREAD = tl.constexpr(60.0)  # nats: exp(-60 / 2) is far above the smallest float32


@triton.jit
def _row_of(rows, output, num_rows, HAS_ROWS: tl.constexpr):
    """The row that an output reads, and whether there is such a row; one that is not there is replaced by row 0."""
    row = output
    if HAS_ROWS:
        row = tl.load(rows + output).to(tl.int64)
    exists = (row >= 0) & (row < num_rows)
    return tl.where(exists, row, 0), exists


@triton.jit
def _load(member, row, positions, ids, is_read, other):
    """Logits of one member at `ids`, float32; `is_read` is one truth for all of them."""
    offset = (row // positions) * member[1] + (row % positions) * member[2]
    return tl.load(member[0] + offset + ids, mask=ids < tl.where(is_read, member[3], 0), other=other).to(tl.float32)


@triton.jit
def _sums(
    members, weights, log_sums, row, exists, positions, ids, shared, held,
    RAW: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """First sum and log-ratio at `ids`, float32, made such that `_combined` holds for every α.

    A NaN that a member gave is moved to the first sum, which makes the result NaN whatever α; so is a row that does not
    exist. The log-ratio is 0 where it is undefined, and outside the shared ids. A member without weight is not read.
    """
    base = tl.zeros(ids.shape, tl.float32)
    ratio = tl.zeros(ids.shape, tl.float32)
    given_nan = ids < tl.where(exists, 0, NO_ID)
    absent = ids >= held
    for i in tl.static_range(len(members)):
        constant, slope = tl.load(weights + i), tl.load(weights + len(members) + i)
        in_base, in_ratio = constant != 0, slope != 0
        z = _load(members[i], row, positions, ids, exists & (in_base | in_ratio), 0.0)
        base += tl.where(in_base, z * constant, 0.0)
        ratio += tl.where(in_ratio, z * slope, 0.0)
        given_nan |= (z != z) & (ids < tl.where(in_base, NO_ID, shared))
        absent |= ids >= tl.where(in_base, members[i][3], NO_ID)
    if NORMALISED:
        for i in tl.static_range(len(members)):
            if not RAW & (1 << i):
                slope = tl.load(weights + len(members) + i)
                ratio -= tl.where(slope != 0, slope * tl.load(log_sums + row * len(members) + i), 0.0)
    base = tl.where((base == INF) | (base != base) | absent, -INF, base)
    base = tl.where(given_nan, float("nan"), base)
    ratio = tl.where((ratio != ratio) | given_nan | (ids >= shared), 0.0, ratio)
    return base, ratio


@triton.jit
def _combined(base, ratio, alpha):
    """base + α · ratio: an undefined or infinite term counts as 0, a finite ratio that overflows as the largest."""
    term = alpha * ratio
    term = tl.where(term == INF, tl.where(tl.abs(ratio) < INF, LARGEST, 0.0), term)
    return base + tl.where(term != term, 0.0, term)


@triton.jit
def _cut(z, base, threshold, alpha):
    """Forbid tokens whose first sum is below the threshold, where α ≠ 0."""
    return tl.where(base < tl.where(alpha != 0.0, threshold, -INF), -INF, z)


@triton.jit
def _exponential(noise, start, BLOCK: tl.constexpr):
    """(BLOCK,) numbers −log u for the ids from `start` on, by Philox-4x32-10 with one counter for four ids.

    Word j of counter (c, position, sample, prompt) belongs to id 4c + j: a draw does not depend on BLOCK.
    """
    counter = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = counter * 0
    seed = tl.load(noise)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    prompt, sample, position = tl.load(noise + 1), tl.load(noise + 2), tl.load(noise + 3)
    w0, w1, w2, w3 = philox_impl(
        counter, zero + position.to(tl.uint32), zero + sample.to(tl.uint32), zero + prompt.to(tl.uint32), low, high
    )
    bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2⁻²³; exact, never 0 or 1
    return -tl.log(uniform)


@triton.jit
def _is_last(counter, num):
    """Count this program; true for the last of `num`, which sees what the others have stored, and resets the count."""
    tl.debug_barrier()  # every thread has stored before one of them counts
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _merge_sample(partial, tokens, logprobs, output, inverse, num_splits, SPLITS: tl.constexpr):
    """Token and log-prob of an output from the partial results of its programs."""
    splits = tl.arange(0, SPLITS)
    used = splits < num_splits
    at = partial + output * 5 * num_splits + splits
    tops = tl.load(at, mask=used, other=-LARGEST, cache_modifier=".cg")
    sums = tl.load(at + num_splits, mask=used, other=0.0, cache_modifier=".cg")
    scores = tl.load(at + 2 * num_splits, mask=used, other=-INF, cache_modifier=".cg")
    best_z = tl.load(at + 3 * num_splits, mask=used, other=-INF, cache_modifier=".cg")
    bits = tl.load(at + 4 * num_splits, mask=used, other=0.0, cache_modifier=".cg")
    best_id = tl.where(used, bits.to(tl.int32, bitcast=True), NO_ID)
    top = tl.max(tops, axis=0)
    relative = (tops - top) * inverse
    total = tl.sum(sums * tl.exp(relative), axis=0)
    scores += relative
    best = tl.max(scores, axis=0)
    token = tl.min(tl.where(scores == best, best_id, NO_ID), axis=0)
    at_token = tl.max(tl.where((scores == best) & (best_id == token), best_z, -INF), axis=0)
    logprob = (at_token - top) * inverse - tl.log(total)
    tl.store(tokens + output, tl.where(total == 0, -1, token).to(tl.int64))
    tl.store(logprobs + output, tl.where(total == 0, float("nan"), logprob))


@triton.jit
def _merge_logprob(partial, masks, outputs, is_point, num_splits, SPLITS: tl.constexpr):
    """Largest pivot of each point, log Σ exp(z − pivot), and the points at which the target is beaten, as bits.

    Two numbers, because log-prob = (z − pivot) − log Σ is exact where z − (pivot + log Σ) loses the small sum.
    """
    splits = tl.arange(0, SPLITS)
    used = splits < num_splits
    at = partial + outputs[:, None] * 2 * num_splits + splits[None, :]
    is_there = tl.where(is_point[:, None], splits[None, :], num_splits) < num_splits
    pivots = tl.load(at, mask=is_there, other=-INF, cache_modifier=".cg")
    sums = tl.load(at + num_splits, mask=is_there, other=0.0, cache_modifier=".cg")
    bits = tl.load(masks + splits, mask=used, other=0.0, cache_modifier=".cg").to(tl.int32, bitcast=True)
    beaten = tl.reduce(bits, 0, _or)
    top = tl.max(pivots, axis=1)
    shift = tl.where(top == -INF, 0.0, top)
    return top, tl.log(tl.sum(sums * tl.exp(pivots - shift[:, None]), axis=1)), beaten


@triton.jit(do_not_specialize=["table_stride", "num_rows"])
def combine_kernel(
    members, table, rows, log_sums, thresholds, out,
    table_stride, num_rows, positions, width, shared, held,
    HAS_ROWS: tl.constexpr, RAW: tl.constexpr, NORMALISED: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (outputs, width) float32."""
    output, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, exists = _row_of(rows, output, num_rows, HAS_ROWS)
    weights = table + output * table_stride
    ids = split * BLOCK + tl.arange(0, BLOCK)
    base, ratio = _sums(members, weights, log_sums, row, exists, positions, ids, shared, held, RAW, NORMALISED)
    alpha = tl.load(weights + 2 * len(members))
    z = _combined(base, ratio, alpha)
    if CUT:
        z = _cut(z, base, tl.load(thresholds + output), alpha)
    tl.store(out + output * width + ids, z, mask=ids < width)


@triton.jit(do_not_specialize=["table_stride", "temperature_stride", "num_rows", "num_splits", "blocks_each"])
def sample_kernel(
    members, table, rows, log_sums, thresholds, temperatures, noise, partial, counters, tokens, logprobs,
    table_stride, temperature_stride, num_rows, positions, width, shared, held, num_splits, blocks_each,
    HAS_ROWS: tl.constexpr, RAW: tl.constexpr, NORMALISED: tl.constexpr, CUT: tl.constexpr, DRAWS: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """tokens (outputs,) int64, −1 where everything is forbidden; logprobs (outputs,) float32, NaN for NaN.

    argmax of z / T + gumbel is argmax of p / e, with p = exp((z − largest) / T), which the log-sum-exp needs anyway,
    and e = −log u: an exponential race. Each thread keeps the best of its own ids, relative to their largest z, and
    whose it is; threads and then programs are compared by log(p / e) once. partial (outputs, 5, num_splits): largest
    z, Σ p, log of the best p / e, z of the best, its id (as bits).
    """
    output, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, exists = _row_of(rows, output, num_rows, HAS_ROWS)
    weights = table + output * table_stride
    alpha = tl.load(weights + 2 * len(members))
    temperature = 0.0
    if DRAWS:
        temperature = tl.load(temperatures + output * temperature_stride)
    inverse = tl.where(temperature > 0, tl.div_rn(1.0, tl.where(temperature > 0, temperature, 1.0)), 1.0)

    largest = tl.full((BLOCK,), -LARGEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    best = tl.zeros((BLOCK,), tl.float32)
    best_z = tl.full((BLOCK,), -INF, tl.float32)
    best_id = tl.full((BLOCK,), 0, tl.int32)
    for block in range(split * blocks_each, min((split + 1) * blocks_each, tl.cdiv(width, BLOCK))):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        base, ratio = _sums(members, weights, log_sums, row, exists, positions, ids, shared, held, RAW, NORMALISED)
        z = _combined(base, ratio, alpha)
        if CUT:
            z = _cut(z, base, tl.load(thresholds + output), alpha)
        higher = tl.maximum(largest, z)
        shrink = tl.exp((largest - higher) * inverse)
        p = tl.exp((z - higher) * inverse)
        total = total * shrink + p
        is_better = z > largest
        if DRAWS:  # noqa: SIM102, known when compiled: what is inside is then left out
            if temperature > 0:
                race = p / tl.maximum(_exponential(noise + output * 4, block * BLOCK, BLOCK), 5.9e-08)
                best = best * shrink
                is_better = race > best
                best = tl.where(is_better, race, best)
        best_z = tl.where(is_better, z, best_z)
        best_id = tl.where(is_better, ids, best_id)
        largest = higher

    top = tl.max(largest, axis=0)
    relative = (largest - top) * inverse
    sum_p = tl.sum(total * tl.exp(relative), axis=0)
    score = relative
    if DRAWS:  # noqa: SIM102
        if temperature > 0:
            score = relative + tl.log(best)
    score = tl.where(best_z > -INF, score, -INF)
    best_score = tl.max(score, axis=0)
    token = tl.min(tl.where(score == best_score, best_id, NO_ID), axis=0)
    at_token = tl.max(tl.where((score == best_score) & (best_id == token), best_z, -INF), axis=0)
    at = partial + output * 5 * num_splits + split
    tl.store(at, top)
    tl.store(at + num_splits, sum_p)
    tl.store(at + 2 * num_splits, best_score)
    tl.store(at + 3 * num_splits, at_token)
    tl.store(at + 4 * num_splits, token.to(tl.float32, bitcast=True))

    if _is_last(counters + output, num_splits):
        _merge_sample(partial, tokens, logprobs, output, inverse, num_splits, SPLITS)


@triton.jit(do_not_specialize=["num_targets", "num_points", "num_rows", "num_splits"])
def logprob_kernel(
    members, table, rows, log_sums, thresholds, targets, runs, steps, partial, counters,
    logprobs, greedy, totals,
    num_targets, num_points, num_rows, positions, width, shared, held, num_splits,
    HAS_ROWS: tl.constexpr, RAW: tl.constexpr, NORMALISED: tl.constexpr, CUT: tl.constexpr, TOTALS: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """logprobs, greedy and totals (log Σ exp z) (K, targets), for one run of points per program: see `Run`.

    With equal steps exp z of the next α is that of the last times exp(step · ratio): one multiplication per id and
    point. The largest z is convex in α, so that relative to the chord of a block's largest at both ends no term is
    above 1. Where a term that matters could underflow, the block takes an exponential per point. partial
    (K, targets, 2, num_splits): pivot, Σ exp(z − pivot); behind them (runs, targets, num_splits): bit k is set where an
    id beats the target.
    """
    target_index, split, run = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row, exists = _row_of(rows, target_index, num_rows, HAS_ROWS)
    first, count = tl.load(runs + 2 * run).to(tl.int64), tl.load(runs + 2 * run + 1)
    stride: tl.constexpr = 2 * len(members) + 2
    weights = table + first * stride
    alphas = weights + 2 * len(members)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    base, ratio = _sums(members, weights, log_sums, row, exists, positions, ids, shared, held, RAW, NORMALISED)

    target = tl.load(targets + target_index)
    is_id = (target >= 0) & (target < width)
    one = tl.where(is_id, target, 0).to(tl.int32) + tl.arange(0, 1)
    base_at, ratio_at = _sums(members, weights, log_sums, row, exists, positions, one, shared, held, RAW, NORMALISED)
    base_at, ratio_at = tl.sum(base_at, axis=0), tl.sum(ratio_at, axis=0)

    first_alpha, last_alpha = tl.load(alphas), tl.load(alphas + (count - 1) * stride)
    z, z_last = _combined(base, ratio, first_alpha), _combined(base, ratio, last_alpha)
    top, top_last = tl.max(z, axis=0), tl.max(z_last, axis=0)
    bend = tl.abs((z_last - top_last) - (z - top))
    spread = tl.max(tl.where(bend == bend, bend, 0.0), axis=0)
    size = tl.maximum(tl.abs(top), tl.abs(top_last))
    is_even = (tl.load(steps + run) != 0) & (spread <= SAFE_SPREAD) & (size < SAFE_SIZE)
    if CUT:
        is_even = is_even & False

    hop = num_targets.to(tl.int64) * 2 * num_splits  # from a point's partial result to the next point's
    at = partial + first * hop + target_index * 2 * num_splits + split
    beaten = split * 0  # bits, a tensor from the start
    compares = True
    if is_even:
        rise, last = (top_last - top) / (count - 1), count - 1
        factor = tl.exp((z_last - z) / last - rise)
        factor = tl.where(factor == factor, factor, 0.0)
        term = tl.exp(z - top)
        for k in range(count):
            tl.store(at + k * hop, top + k * rise)
            tl.store(at + k * hop + num_splits, tl.sum(term, axis=0))
            term = term * factor
        # an id is above the target somewhere only if it is at one end, and everywhere if it is at both
        z_at, z_at_last = _combined(base_at, ratio_at, first_alpha), _combined(base_at, ratio_at, last_alpha)
        slack, slack_last = 1e-3 + 1e-5 * tl.abs(z_at), 1e-3 + 1e-5 * tl.abs(z_at_last)
        may = ((z >= z_at - slack) | (z_last >= z_at_last - slack_last)) & (ids != target)
        always = (z > z_at + slack) & (z_last > z_at_last + slack_last)
        compares = tl.max(may.to(tl.int32), axis=0) != 0
        if tl.max(always.to(tl.int32), axis=0) != 0:
            beaten = -1
            compares = False
    if compares:
        for k in range(count):
            alpha = tl.load(alphas + k * stride)
            z = _combined(base, ratio, alpha)
            z_at = _combined(base_at, ratio_at, alpha)
            if CUT:
                threshold = tl.load(thresholds + (first + k) * num_targets + target_index)
                z, z_at = _cut(z, base, threshold, alpha), _cut(z_at, base_at, threshold, alpha)
            beats = (z > z_at) | ((z == z_at) & (ids < target))
            beaten = beaten | (tl.max(beats.to(tl.int32), axis=0) << k)
            if not is_even:
                top = tl.max(z, axis=0)
                shift = tl.where(top == -INF, 0.0, top)
                tl.store(at + k * hop, top)
                tl.store(at + k * hop + num_splits, tl.sum(tl.exp(z - shift), axis=0))
    masks = partial + ((num_points * 2 + run) * num_targets + target_index) * num_splits
    tl.store(masks + split, beaten.to(tl.float32, bitcast=True))

    if _is_last(counters + run * num_targets + target_index, num_splits):
        points = tl.arange(0, POINTS)
        is_point = points < count
        outputs = (first + points) * num_targets + target_index
        every_alpha = tl.load(alphas + points * stride, mask=is_point, other=0.0)
        every_z = _combined(base_at, ratio_at, every_alpha)
        if CUT:
            every_threshold = tl.load(thresholds + outputs, mask=is_point, other=-INF)
            every_z = _cut(every_z, base_at, every_threshold, every_alpha)
        tops, log_sum, bits = _merge_logprob(partial, masks, outputs, is_point, num_splits, SPLITS)
        logprob = tl.where(is_id, every_z - tops - log_sum, float("nan"))  # −inf − −inf: NaN where all is forbidden
        tl.store(logprobs + outputs, logprob, mask=is_point)
        tl.store(greedy + outputs, (((bits >> points) & 1) == 0) & (logprob == logprob), mask=is_point)
        if TOTALS:
            tl.store(totals + outputs, tops + log_sum, mask=is_point)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def normaliser_kernel(members, partial, num_rows, positions, num_splits, BLOCK: tl.constexpr):
    """Pre-pass for `neutral` and log Z: partial (rows, members, num_splits), log Σ exp of the ids of one block."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = split * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(members)):
        z = _load(members[i], row, positions, ids, row < num_rows, -INF)
        largest = tl.max(z, axis=0)
        shift = tl.where(tl.abs(largest) == INF, 0.0, largest)
        total = tl.sum(tl.exp(z - shift), axis=0)
        tl.store(partial + (row * len(members) + i) * num_splits + split, tl.log(total) + shift)


@triton.jit(do_not_specialize=["table_stride", "num_rows", "num_splits"])
def threshold_kernel(
    members, table, rows, log_sums, partial, table_stride, num_rows, positions, shared, held, num_splits,
    HAS_ROWS: tl.constexpr, RAW: tl.constexpr, NORMALISED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pre-pass for a cut-off: partial (outputs, num_splits), the largest first sum of a block's allowed ids.

    +inf where the first sum is NaN: then nothing is cut.
    """
    output, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, exists = _row_of(rows, output, num_rows, HAS_ROWS)
    weights = table + output * table_stride
    ids = split * BLOCK + tl.arange(0, BLOCK)
    base, ratio = _sums(members, weights, log_sums, row, exists, positions, ids, shared, held, RAW, NORMALISED)
    z = _combined(base, ratio, tl.load(weights + 2 * len(members)))
    score = tl.where(base != base, INF, tl.where(z == -INF, -INF, base))
    tl.store(partial + output * num_splits + split, tl.max(score, axis=0))
