"""Triton functions over the columns of a tile of rows: (R,) are rows, (R, BLOCK) rows by columns.

A row of at most BLOCK columns stays in registers between `statistics` and `write_rows`; a longer one is STREAMED, BLOCK
columns at a time, once for each of the two. `tile` is (pointers to the rows' first logit (R,), whether the row exists
(R,), classes, width, rate), see `kernel`.
"""
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's types describe its compiler; the language that it reads is another.)

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)
"""Stands for -inf where arithmetic has to stay finite."""


@triton.jit
def load_columns(tile, column):
    """(R, BLOCK) logits as they are stored; anything past the head's width."""
    rows, live, _, width, _ = tile
    return tl.load(rows[:, None] + column[None, :], mask=live[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def clean(raw, tile, column):
    """(R, BLOCK) float32 logits; LOWEST where they are -inf and past the head's classes. NaN stays NaN."""
    z = raw.to(tl.float32)
    return tl.where((column >= tile[2])[None, :] | (z < LOWEST), LOWEST, z)


@triton.jit
def statistics(z, tile, BLOCK: tl.constexpr, STREAMED: tl.constexpr, TOTAL: tl.constexpr):
    """Per row (R,): the largest logit, the sum of 2^((z - largest) x rate), and (where TOTAL) the sum of the logits.

    `z` (R, BLOCK) are the first columns.
    """
    _, live, classes, _, rate = tile
    total = tl.zeros(live.shape, tl.float32)
    if TOTAL:
        total += tl.sum(tl.where((tl.arange(0, BLOCK) < classes)[None, :], z, 0.0), axis=1)
    if STREAMED:
        tops = z
        masses = tl.full(z.shape, 1.0, tl.float32)
        ahead = load_columns(tile, BLOCK + tl.arange(0, BLOCK))
        for start in range(BLOCK, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = clean(ahead, tile, column)
            ahead = load_columns(tile, BLOCK + column)
            # One exponential brings either the old sum or the new term to the larger of both maxima.
            smaller = tl.exp2(-tl.abs(z - tops) * rate)
            masses = tl.where(z > tops, masses * smaller + 1.0, masses + smaller)
            tops = tl.maximum(tops, z)
            if TOTAL:
                total += tl.sum(tl.where((column < classes)[None, :], z, 0.0), axis=1)
        top = tl.max(tops, axis=1)
        mass = tl.sum(masses * tl.exp2((tops - top[:, None]) * rate), axis=1)
    else:
        top = tl.max(z, axis=1)
        mass = tl.sum(tl.exp2((z - top[:, None]) * rate), axis=1)
    return top, mass, total


@triton.jit
def finite_total(z, tile, BLOCK: tl.constexpr, STREAMED: tl.constexpr):
    """Per row (R,): the sum of the logits that are not -inf, and how many are. `z` (R, BLOCK) are the first columns."""
    classes = tile[2]
    total, lost = finite_sum(z, (tl.arange(0, BLOCK) < classes)[None, :])
    if STREAMED:
        for start in range(BLOCK, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            more, more_lost = finite_sum(clean(load_columns(tile, column), tile, column), (column < classes)[None, :])
            total += more
            lost += more_lost
    return total, lost


@triton.jit
def finite_sum(z, known):
    """Per row of `z` (R, N): the sum of what is known and not -inf (NaN stays NaN), and how many are -inf."""
    gone = known & (z <= LOWEST)
    return tl.sum(tl.where(known & ~gone, z, 0.0), axis=1), tl.sum(gone.to(tl.float32), axis=1)


@triton.jit
def outside(z, tile, id_rows, labelled, k, BLOCK: tl.constexpr, STREAMED: tl.constexpr):
    """`statistics` of the columns outside S alone, term by term: (largest logit, sum relative to it).

    The ids are read once more, one at a time, and each is looked for among the columns.
    """
    _, _, classes, _, rate = tile
    z = drop_labels(z, id_rows, labelled, tl.arange(0, BLOCK), k)
    top = tl.max(z, axis=1)
    mass = tl.sum(tl.exp2((z - top[:, None]) * rate), axis=1)
    if STREAMED:
        for start in range(BLOCK, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = drop_labels(clean(load_columns(tile, column), tile, column), id_rows, labelled, column, k)
            higher = tl.maximum(top, tl.max(z, axis=1))
            terms = tl.sum(tl.exp2((z - higher[:, None]) * rate), axis=1)
            mass = mass * tl.exp2((top - higher) * rate) + terms
            top = higher
    return top, tl.where(top <= LOWEST, 0.0, mass)


@triton.jit
def drop_labels(z, id_rows, labelled, column, k):
    """`z` (R, BLOCK) with LOWEST in the columns of S."""
    for j in range(0, k):
        label = tl.load(id_rows + j, mask=labelled, other=0).to(tl.int32)
        z = tl.where(column[None, :] == label[:, None], LOWEST, z)
    return z


@triton.jit
def write_rows(z, tile, g_rows, top, factor, shift, BLOCK: tl.constexpr, STREAMED: tl.constexpr):
    """Stores factor x (2^((z - top) x rate) - shift) in the head's columns, and 0 in the free ones after them."""
    if STREAMED:
        ahead = load_columns(tile, tl.arange(0, BLOCK))
        for start in range(0, tile[3], BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = clean(ahead, tile, column)
            ahead = load_columns(tile, BLOCK + column)
            _store(z, tile, g_rows, column, top, factor, shift)
    else:
        _store(z, tile, g_rows, tl.arange(0, BLOCK), top, factor, shift)


@triton.jit
def _store(z, tile, g_rows, column, top, factor, shift):
    _, live, classes, width, rate = tile
    value = factor[:, None] * (tl.exp2((z - top[:, None]) * rate) - shift[:, None])
    value = tl.where((column < classes)[None, :], value, 0.0)
    mask = live[:, None] & (column < width)[None, :]
    tl.store(g_rows[:, None] + column[None, :], value.to(g_rows.dtype.element_ty), mask=mask)
