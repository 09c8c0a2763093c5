"""The loss and its gradient as one Triton kernel over (tile of rows, head); `reference` defines what it computes.

A program computes ROWS rows of one head. Heads of equal shape form a group; a group's code is compiled once and selects
its head's pointers by a chain of selects, so that heads of any k, each with its own label tensors, need neither padding
nor a table of addresses in device memory (which a CUDA graph would have to copy).

Exponentials over columns are 2^((z - top) x rate) with rate = log2(e) / t: the subtraction comes first, where it is
exact for large logits too. Everything else is in nat and in float32.
"""
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's types describe its compiler; the language that it reads is another.)

import triton
import triton.language as tl

from repcon_kernels.kl_div.heads import LOG_TAIL_FLOOR, TAILS
from repcon_kernels.kl_div.triton_held import load_row, prefetch_row, row_statistics, write_row
from repcon_kernels.kl_div.triton_labels import compare_all, finite_labels, load_labels, scatter_all, teacher_mass
from repcon_kernels.kl_div.triton_rows import (
    LOG2_E,
    LOWEST,
    clean,
    finite_total,
    load_columns,
    outside,
    statistics,
    write_rows,
)

BUCKET = tl.constexpr(TAILS.index("bucket"))
RENORMALISE = tl.constexpr(TAILS.index("renormalise"))
UNIFORM = tl.constexpr(TAILS.index("uniform"))
TINY = tl.constexpr(1e-30)
FLOOR = tl.constexpr(LOG_TAIL_FLOOR)
TRUSTED = tl.constexpr(8.0)
"""The student's tail is computed as total - sum over S. Its error of about 2e-7 enters the loss times p_tail / q_tail;
where that ratio exceeds this bound, the row is read a second time and the tail summed term by term."""
REDUCE = tl.constexpr(1024)
"""Partial losses that the last program of a head adds in one step."""


@triton.jit(do_not_specialize=["batch", "label_rows"])
def multi_head_kl(
    logits,  # (batch, COLUMNS)
    gradient,  # (batch, COLUMNS); may be the logits
    losses,  # (H,) float32
    partials,  # (programs,) float32: each program's sum of row losses
    arrival_counters,  # (H,) int32, all 0: finished programs of a head; 0 again afterwards
    rows,  # (batch,) int64, read where HAS_ROWS
    weights,  # (H,) float32
    ids,  # H pointers to (label_rows, k)
    logp,  # H pointers to (label_rows, k + T)
    temperatures,  # H floats
    batch,
    label_rows,
    loss_scale,
    gradient_scale,
    HEADS: tl.constexpr,  # H tuples (number, start, classes, width, k, columns of logp, column of the tail)
    GROUPS: tl.constexpr,  # tuples (first head, head after the last, ROWS, BLOCK, K_BLOCK, STREAMED, CHUNKED, *HELD)
    COLUMNS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    GRADIENT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PERSISTENT: tl.constexpr = False,
    PREFETCH: tl.constexpr = False,
):
    """The losses of all heads and, where asked for, the gradient of their weighted sum; see the module.

    An item is a tile of rows of one head. Without PERSISTENT there is a program per item, and the last program of a
    head to finish sums its rows' losses. With it, a program computes many items, and the last program of all sums
    everything. HELD is CHUNKS, FULL and VECTOR of `triton_held`, or 0 chunks.
    """
    arguments = (logits, gradient, partials, rows, weights, ids, logp, temperatures, batch, label_rows)
    first = 0
    for g in tl.static_range(len(GROUPS)):
        tiles = tl.cdiv(batch, GROUPS[g][2])
        after = first + tiles * (GROUPS[g][1] - GROUPS[g][0])
        if PERSISTENT:
            step = tl.num_programs(0)
            for item in range(first + (tl.program_id(0) + step - first % step) % step, after, step):
                _item(
                    item, first, arguments, gradient_scale, HEADS, GROUPS, g, COLUMNS, HAS_ROWS, TAIL, GRADIENT,
                    IN_PLACE, PREFETCH,
                )  # fmt: skip
        else:
            item = tl.program_id(0)
            if (item >= first) & (item < after):
                head = _item(
                    item, first, arguments, gradient_scale, HEADS, GROUPS, g, COLUMNS, HAS_ROWS, TAIL, GRADIENT,
                    IN_PLACE, False,
                )  # fmt: skip
                number = _constant(HEADS, 0, head, GROUPS[g][0], GROUPS[g][1])
                tl.debug_barrier()
                if tl.atomic_add(arrival_counters + number, 1, sem="acq_rel") == tiles - 1:
                    mine = partials + first + (head - GROUPS[g][0]) * tiles
                    temperature = _pick(temperatures, head, GROUPS[g][0], GROUPS[g][1])
                    scale = tl.load(weights + number) * temperature * temperature * loss_scale
                    _sum_partials(losses + number, mine, tiles, scale)
                    tl.store(arrival_counters + number, 0)
        first = after
    if PERSISTENT:
        tl.debug_barrier()
        if tl.atomic_add(arrival_counters, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            first = 0
            for g in tl.static_range(len(GROUPS)):
                tiles = tl.cdiv(batch, GROUPS[g][2])
                for head in range(GROUPS[g][0], GROUPS[g][1]):
                    number = _constant(HEADS, 0, head, GROUPS[g][0], GROUPS[g][1])
                    temperature = _pick(temperatures, head, GROUPS[g][0], GROUPS[g][1])
                    scale = tl.load(weights + number) * temperature * temperature * loss_scale
                    _sum_partials(losses + number, partials + first + (head - GROUPS[g][0]) * tiles, tiles, scale)
                first += tiles * (GROUPS[g][1] - GROUPS[g][0])
            tl.store(arrival_counters, 0)


@triton.jit
def _item(
    item,
    first,  # the group's first item
    arguments,
    gradient_scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    g: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    GRADIENT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Store the gradient of a tile of rows of one head and the sum of their losses; gives the head's index in HEADS."""
    logits, gradient, partials, rows, weights, ids, logp, temperatures, batch, label_rows = arguments
    tiles = tl.cdiv(batch, GROUPS[g][2])
    head = GROUPS[g][0] + (item - first) // tiles
    number = _constant(HEADS, 0, head, GROUPS[g][0], GROUPS[g][1])
    start = _constant(HEADS, 1, head, GROUPS[g][0], GROUPS[g][1])
    classes = _constant(HEADS, 2, head, GROUPS[g][0], GROUPS[g][1])
    width = _constant(HEADS, 3, head, GROUPS[g][0], GROUPS[g][1])
    k = _constant(HEADS, 4, head, GROUPS[g][0], GROUPS[g][1])
    logp_columns = _constant(HEADS, 5, head, GROUPS[g][0], GROUPS[g][1])
    tail_column = _constant(HEADS, 6, head, GROUPS[g][0], GROUPS[g][1])
    temperature = _pick(temperatures, head, GROUPS[g][0], GROUPS[g][1])
    weight = tl.load(weights + number)

    first_row = (item - first) % tiles * GROUPS[g][2]
    row = first_row + tl.arange(0, GROUPS[g][2])
    live = row < batch
    label = row.to(tl.int64)
    if HAS_ROWS:
        label = tl.load(rows + row, mask=live, other=-1)
    labelled = live & (label >= 0) & (label < label_rows)
    offset = row.to(tl.int64) * COLUMNS + start
    id_rows = _pick(ids, head, GROUPS[g][0], GROUPS[g][1]) + label * k
    logp_rows = _pick(logp, head, GROUPS[g][0], GROUPS[g][1]) + label * logp_columns
    tile = (logits + offset, live, classes, width, 1.0 / temperature * LOG2_E)
    stored = (logits + offset, id_rows, logp_rows, labelled, classes, k, 1.0 / temperature)
    line = tl.cast(first_row, tl.int64) * COLUMNS + start
    if PREFETCH and GROUPS[g][7] > 0:  # noqa: SIM102 (one is known to the compiler, the other is not)
        if first_row + tl.num_programs(0) < batch:
            prefetch_row(logits + line + tl.cast(tl.num_programs(0), tl.int64) * COLUMNS, classes)
    # A label row out of range makes the loss NaN instead of crashing.
    row_scale = tl.where(labelled, weight * temperature * gradient_scale, float("nan"))
    loss = _tile(
        tile,
        stored,
        (logits + line, gradient + line),
        gradient + offset,
        tail_column,
        row_scale,
        GROUPS[g][3],
        GROUPS[g][4],
        GROUPS[g][5],
        GROUPS[g][6],
        GROUPS[g][7],
        GROUPS[g][8],
        GROUPS[g][9],
        TAIL,
        GRADIENT,
        IN_PLACE,
    )
    loss = tl.where(labelled, loss, float("nan"))
    tl.store(partials + item, tl.sum(tl.where(live, loss, 0.0), axis=0))
    return head


@triton.jit
def _pick(values, head, LOW: tl.constexpr, HIGH: tl.constexpr):
    """values[head] of a tuple of arguments, for LOW <= head < HIGH."""
    chosen = values[LOW]
    for h in tl.static_range(LOW + 1, HIGH):
        chosen = tl.where(head == h, values[h], chosen)
    return chosen


@triton.jit
def _constant(HEADS: tl.constexpr, field: tl.constexpr, head, LOW: tl.constexpr, HIGH: tl.constexpr):
    """HEADS[head][field], where the compiler knows the whole table."""
    chosen = tl.full((), HEADS[LOW][field], tl.int32)
    for h in tl.static_range(LOW + 1, HIGH):
        chosen = tl.where(head == h, HEADS[h][field], chosen)
    return chosen


@triton.jit
def _tile(
    tile,  # of `triton_rows`
    stored,  # of `triton_labels`
    lines,  # of `triton_held`: the row's first logit and gradient
    g_rows,
    tail_column,
    scale,
    BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    STREAMED: tl.constexpr,
    CHUNKED: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    VECTOR: tl.constexpr,
    TAIL: tl.constexpr,
    GRADIENT: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """KL by rows (R,); stores their gradient x scale."""
    # The labels are loaded first: the logits of S wait for them.
    labels = load_labels(stored, tl.arange(0, K_BLOCK))
    log_tail = _load_log_tail(stored, tail_column, scale, TAIL)
    kept, top, mass, total = _softmax_statistics(tile, lines[0], BLOCK, STREAMED, CHUNKS, FULL, VECTOR, TAIL == UNIFORM)
    student = (top, tl.log(mass))
    log_mass = teacher_mass(labels[1], log_tail, stored, K_BLOCK, CHUNKED)
    p, q, loss, share, label_total = compare_all(labels, stored, log_mass, student, K_BLOCK, CHUNKED)
    log_p_tail = log_tail - log_mass

    reference = top
    factor = 1.0 / mass
    matched = tl.full(scale.shape, 1.0, tl.float32)
    shift = tl.zeros(scale.shape, tl.float32)
    summed_again = False
    if TAIL == BUCKET:
        reference, rest, summed_again = _sum_outside_if_doubtful(
            kept, tile, stored, top, mass, mass - share, tl.exp(log_p_tail), BLOCK, STREAMED, CHUNKS
        )
        part, matched, factor = _bucket(log_p_tail, reference, rest, student, mass, stored[6])
        loss += part
    if TAIL == UNIFORM:
        total, label_total, infinite = _finite_sums(
            kept, tile, labels, stored, total, label_total, scale, BLOCK, K_BLOCK, STREAMED, CHUNKED, CHUNKS
        )
        part, even = _uniform(log_p_tail, total - label_total, infinite, student, stored)
        loss += part
        # Times `mass` here, by rows: inside a tile, `mass` would be moved there through shared memory.
        shift = even * mass
    if GRADIENT:
        if IN_PLACE:
            tl.debug_barrier()  # every logit of S has been read before any is overwritten
        _write_outside(
            kept, tile, lines, g_rows, reference, factor * scale, shift, summed_again, BLOCK, STREAMED, CHUNKS, FULL,
            VECTOR,
        )  # fmt: skip
        tl.debug_barrier()  # the columns of S are written twice, in this order
        scatter_all(labels, p, q, stored, log_mass, student, g_rows, matched, scale, K_BLOCK, CHUNKED)
    return loss


@triton.jit
def _load_log_tail(stored, tail_column, scale, TAIL: tl.constexpr):
    """The stored log-tail (R,); LOWEST where it is -inf, where there is none, and where TAIL leaves it out."""
    log_tail = tl.full(scale.shape, LOWEST, tl.float32)
    if TAIL != RENORMALISE:
        log_tail = tl.load(stored[2] + tail_column, mask=stored[3], other=0.0).to(tl.float32)
        log_tail = tl.where((log_tail < LOWEST) | (stored[5] == stored[4]), LOWEST, log_tail)
    return log_tail


@triton.jit
def _softmax_statistics(
    tile, line, BLOCK: tl.constexpr, STREAMED: tl.constexpr, CHUNKS: tl.constexpr, FULL: tl.constexpr,
    VECTOR: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """(kept, largest logit (R,), sum relative to it, sum of the logits where TOTAL).

    `kept` is what `_write_outside` continues with: a held row's powers, else the logits of the first columns.
    """
    if CHUNKS > 0:
        row = load_row(line, tile[2], BLOCK, CHUNKS, FULL, VECTOR)
        top, mass, total, powers = row_statistics(row, line, tile[2], tile[4], BLOCK, CHUNKS, FULL, VECTOR, TOTAL)
        return powers, tl.full([1], top, tl.float32), tl.full([1], mass, tl.float32), tl.full([1], total, tl.float32)
    else:
        z = clean(load_columns(tile, tl.arange(0, BLOCK)), tile, tl.arange(0, BLOCK))
        top, mass, total = statistics(z, tile, BLOCK, STREAMED, TOTAL)
        return z, top, mass, total


@triton.jit
def _first_logits(kept, tile, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """The logits of the first columns (R, BLOCK); of a held row they are loaded again."""
    if CHUNKS > 0:
        return clean(load_columns(tile, tl.arange(0, BLOCK)), tile, tl.arange(0, BLOCK))
    else:
        return kept


@triton.jit
def _sum_outside_if_doubtful(
    kept, tile, stored, top, mass, rest, p_tail, BLOCK: tl.constexpr, STREAMED: tl.constexpr, CHUNKS: tl.constexpr
):
    """(reference, the student's tail relative to it, whether it was summed term by term).

    `rest` is the tail as mass - sum over S, relative to `top`; it is replaced where its error could matter.
    """
    reference = top
    doubtful = (p_tail > 0.0) & (p_tail * mass > rest * TRUSTED)
    again = tl.max(doubtful.to(tl.int32), axis=0) > 0
    if again:
        z = _first_logits(kept, tile, BLOCK, CHUNKS)
        reference, rest = outside(z, tile, stored[1], stored[3], stored[5], BLOCK, STREAMED)
    return reference, rest, again


@triton.jit
def _finite_sums(
    kept, tile, labels, stored, total, label_total, scale, BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    STREAMED: tl.constexpr, CHUNKED: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """(sum of the logits, sum of those of S, how many outside S are -inf); the sums are of finite logits only."""
    infinite = tl.zeros(scale.shape, tl.float32)
    # Logits of -inf would drown the others in the sum: then the row is read a second time.
    if tl.max((total < 0.5 * LOWEST).to(tl.int32), axis=0) > 0:
        z = _first_logits(kept, tile, BLOCK, CHUNKS)
        total, infinite = finite_total(z, tile, BLOCK, STREAMED)
        label_total, label_infinite = finite_labels(labels, stored, K_BLOCK, CHUNKED)
        infinite -= label_infinite
    return total, label_total, infinite


@triton.jit
def _write_outside(
    kept, tile, lines, g_rows, reference, factor, shift, again, BLOCK: tl.constexpr, STREAMED: tl.constexpr,
    CHUNKS: tl.constexpr, FULL: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of all columns as if they were outside S; a held row whose tail was summed `again` anew."""
    if CHUNKS > 0:
        if again:
            write_rows(_first_logits(kept, tile, BLOCK, CHUNKS), tile, g_rows, reference, factor, shift, BLOCK, True)
        else:
            one = tl.sum(factor, axis=0)
            other = tl.sum(factor * shift, axis=0)
            write_row(kept, lines[1], lines[0], tile[2], tile[3], one, other, BLOCK, CHUNKS, FULL, VECTOR)
    else:
        write_rows(kept, tile, g_rows, reference, factor, shift, BLOCK, STREAMED)


@triton.jit
def _bucket(log_p_tail, reference, rest, student, mass, inverse_t):
    """The tail's part of the loss, and the factors of q in the gradient, in S and outside (relative to `reference`)."""
    top, log_total = student
    rest = tl.maximum(rest, TINY)
    log_q_tail = tl.maximum((reference - top) * inverse_t + tl.log(rest) - log_total, FLOOR)
    p_tail = tl.exp(log_p_tail)
    loss = tl.where(p_tail == 0.0, 0.0, p_tail * (log_p_tail - log_q_tail))
    pull = tl.where(log_q_tail <= FLOOR, 0.0, p_tail)
    matched = 1.0 - p_tail + pull
    return loss, matched, matched * tl.exp((reference - top) * inverse_t) / mass - pull / rest


@triton.jit
def _uniform(log_p_tail, z_sum, lost, student, stored):
    """The tail's part of the loss, and p_tail per class outside S. z_sum: the sum of the logits outside S.

    Where `lost` of these logits are -inf, that part is infinite, unless there is no tail.
    """
    top, log_total = student
    count = (stored[4] - stored[5]).to(tl.float32)
    count = tl.maximum(count, 1.0)
    p_tail = tl.exp(log_p_tail)
    log_q = (z_sum / count - top) * stored[6] - log_total
    loss = tl.where(lost > 0.0, float("inf"), p_tail * (log_p_tail - tl.log(count) - log_q))
    return tl.where(p_tail == 0.0, 0.0, loss), p_tail / count


@triton.jit
def _sum_partials(loss, partials, tiles, scale):
    """Store the sum of a head's partial losses; the order of the sum does not depend on which program finishes last."""
    total = tl.zeros([REDUCE], tl.float32)
    for start in range(0, tiles, REDUCE):
        index = start + tl.arange(0, REDUCE)
        # .cg: other multiprocessors' stores are in the L2 cache, not in this one's L1 cache.
        total += tl.load(partials + index, mask=index < tiles, other=0.0, cache_modifier=".cg")
    tl.store(loss, tl.sum(total, axis=0) * scale)
