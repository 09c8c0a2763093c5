"""Triton functions that keep one row of a wide head in registers between its softmax and its gradient.

The row is cut into CHUNKS tensors of BLOCK columns, so that combining chunks is arithmetic within a thread and a row
costs one reduction over the threads for its maximum, one for its sum. Each logit is read once, in one exponential.
With VECTOR > 1 the chunks begin at the row's first address that is a multiple of 16 bytes, and are read and written
16 bytes at a time; the at most VECTOR - 1 columns before and after them are the `edge`. The first FULL chunks lie in
the row whatever its address and need no mask. No address outside the row is read.

`line` is the pointer to the row's first logit; LOWEST stands for what a masked slot holds.
"""
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's types describe its compiler; the language that it reads is another.)

import triton
import triton.language as tl

from repcon_kernels.kl_div.triton_rows import LOWEST

EDGE = tl.constexpr(16)
"""Slots for the columns before the first chunk and after the last: eight each."""


@triton.jit
def load_row(line, classes, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, FULL: tl.constexpr, VECTOR: tl.constexpr):
    """(edge (EDGE,) or (), CHUNKS tensors (BLOCK,)), as they are stored; LOWEST in slots that are not of the row."""
    lead = _lead(line, VECTOR)
    body = tl.multiple_of(line + lead, 16 if VECTOR > 1 else 1)
    slot = tl.arange(0, BLOCK)
    chunks = ()
    for i in tl.static_range(CHUNKS):
        if i < FULL:
            chunk = tl.load(body + i * BLOCK + slot)
        else:
            mask = slot < _limit(classes - lead - i * BLOCK, VECTOR)
            chunk = tl.load(body + i * BLOCK + slot, mask=mask, other=LOWEST)
        chunks = chunks + (chunk,)  # noqa: RUF005 (Triton's tuples know no star)
    column, known = _edge(lead, classes, VECTOR)
    edge = tl.load(line + column, mask=known, other=LOWEST)
    return edge, chunks


@triton.jit
def row_statistics(
    row, line, classes, rate, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, FULL: tl.constexpr, VECTOR: tl.constexpr,
    TOTAL: tl.constexpr,
):  # fmt: skip
    """(largest logit, sum of 2^((z - largest) x rate), sum of the logits where TOTAL), and these powers like `row`."""
    edge, chunks = row
    lead = _lead(line, VECTOR)
    slot = tl.arange(0, BLOCK)
    tops = chunks[0].to(tl.float32)
    for i in tl.static_range(1, CHUNKS):
        tops = tl.maximum(tops, chunks[i].to(tl.float32))
    top = tl.max(tops, axis=0)
    if VECTOR > 1:
        top = tl.maximum(top, tl.max(edge.to(tl.float32), axis=0))
    top = tl.maximum(top, LOWEST)  # a row of -inf alone: -inf - -inf would be NaN
    masses = tl.zeros([BLOCK], tl.float32)
    totals = tl.zeros([BLOCK], tl.float32)
    powers = ()
    for i in tl.static_range(CHUNKS):
        z = chunks[i].to(tl.float32)
        power = tl.exp2((z - top) * rate)
        masses += power
        powers = powers + (power,)  # noqa: RUF005
        if TOTAL:
            if i < FULL:
                totals += z
            else:
                totals += tl.where(slot < _limit(classes - lead - i * BLOCK, VECTOR), z, 0.0)
    mass = tl.sum(masses, axis=0)
    total = 0.0
    if TOTAL:
        total = tl.sum(totals, axis=0)
    z = edge.to(tl.float32)
    edge_power = tl.exp2((z - top) * rate)
    if VECTOR > 1:
        _, known = _edge(lead, classes, VECTOR)
        mass += tl.sum(edge_power, axis=0)
        if TOTAL:
            total += tl.sum(tl.where(known, z, 0.0), axis=0)
    return top, mass, total, (edge_power, powers)


@triton.jit
def write_row(
    powers, g_line, line, classes, width, factor, shift, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, FULL: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Stores factor x power - shift in the head's columns, and 0 in the free ones after them.

    The gradient's row lies as the logits' row does to a multiple of 16 bytes.
    """
    edge, chunks = powers
    lead = _lead(line, VECTOR)
    body = tl.multiple_of(g_line + lead, 16 if VECTOR > 1 else 1)
    dtype = g_line.dtype.element_ty
    slot = tl.arange(0, BLOCK)
    for i in tl.static_range(CHUNKS):
        value = (chunks[i] * factor - shift).to(dtype)
        if i < FULL:
            tl.store(body + i * BLOCK + slot, value)
        else:
            mask = slot < _limit(classes - lead - i * BLOCK, VECTOR)
            tl.store(body + i * BLOCK + slot, value, mask=mask)
    if VECTOR > 1:
        column, known = _edge(lead, classes, VECTOR)
        tl.store(g_line + column, (edge * factor - shift).to(dtype), mask=known)
    for start in range(classes, width, BLOCK):
        tl.store(g_line + start + slot, tl.zeros([BLOCK], dtype), mask=start + slot < width)


@triton.jit
def prefetch_row(line, classes):
    """Prefetch a row into the L2 cache, in units of 16 bytes: one instruction by one thread (sm_90)."""
    size: tl.constexpr = line.dtype.element_ty.primitive_bitwidth // 8
    address = line.to(tl.int64)
    first = (address + 15) // 16 * 16
    size_in_bytes = ((address + classes * size) // 16 * 16 - first).to(tl.int32)
    tl.inline_asm_elementwise(
        """{
            .reg .pred one;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 one, thread, 0;
            @one cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [first, size_in_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _lead(line, VECTOR: tl.constexpr):
    """Columns before the row's first multiple of 16 bytes; 0 where nothing is aligned."""
    if VECTOR > 1:
        size: tl.constexpr = 16 // VECTOR
        return ((16 - (line.to(tl.int64) & 15)) & 15).to(tl.int32) // size
    else:
        return 0


@triton.jit
def _limit(columns, VECTOR: tl.constexpr):
    """`columns` down to a multiple of VECTOR, known as such to the compiler."""
    if VECTOR > 1:
        return tl.multiple_of(columns // VECTOR * VECTOR, VECTOR)
    else:
        return columns


@triton.jit
def _edge(lead, classes, VECTOR: tl.constexpr):
    """(columns of the edge's slots, which of them there are): `lead` first ones, and what whole vectors leave over."""
    slot = tl.arange(0, EDGE)
    if VECTOR > 1:
        after = lead + (classes - lead) // VECTOR * VECTOR
        column = tl.where(slot < 8, slot, after + slot - 8)
        return column, tl.where(slot < 8, slot < lead, column < classes)
    else:
        return slot, slot < 0
