"""Triton functions over the stored classes S of a tile of rows: (R,) are rows, (R, K_BLOCK) rows by slots of S.

Up to K_BLOCK classes stay in registers; more are CHUNKED: the first K_BLOCK stay, the others are read again for each
pass. `stored` is (pointers to the rows' first logit, first id, first log-probability (R,), whether the row has labels
(R,), classes, k, 1 / t); `student` is (largest logit, log of the sum relative to it) (R,).
"""
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's types describe its compiler; the language that it reads is another.)

import triton
import triton.language as tl

from repcon_kernels.kl_div.triton_rows import LOG2_E, LOWEST, finite_sum


@triton.jit
def load_labels(stored, slot):
    """Of each slot: its column, the tempered log-probability, the logit, whether it exists, whether its id is in range.

    A slot past k has no mass; an id out of range has a NaN logit, which makes the loss NaN instead of crashing.
    """
    z_rows, id_rows, logp_rows, labelled, classes, k, inverse_t = stored
    present = labelled[:, None] & (slot < k)[None, :]
    column = tl.load(id_rows[:, None] + slot[None, :], mask=present, other=0).to(tl.int64)
    log_u = tl.load(logp_rows[:, None] + slot[None, :], mask=present, other=0.0).to(tl.float32) * inverse_t
    log_u = tl.where(present & ~(log_u < LOWEST), log_u, LOWEST)
    known = present & (column >= 0) & (column < classes)
    z = tl.load(z_rows[:, None] + column, mask=known, other=0.0).to(tl.float32)
    return column, log_u, tl.where(present & ~known, float("nan"), z), present, known


@triton.jit
def teacher_mass(log_u, log_tail, stored, K_BLOCK: tl.constexpr, CHUNKED: tl.constexpr):
    """log of sum_S exp(log_u) + exp(log_tail), by rows (R,); `log_u` are the first slots'."""
    top = tl.maximum(log_tail, tl.max(log_u, axis=1))
    mass = tl.exp(log_tail - top) + tl.sum(tl.exp(log_u - top[:, None]), axis=1)
    if CHUNKED:
        for start in range(K_BLOCK, stored[5], K_BLOCK):
            _, log_u, _, _, _ = load_labels(stored, start + tl.arange(0, K_BLOCK))
            higher = tl.maximum(top, tl.max(log_u, axis=1))
            mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(log_u - higher[:, None]), axis=1)
            top = higher
    return top + tl.log(mass)


@triton.jit
def compare(labels, log_mass, student, inverse_t):
    """p, q (R, K_BLOCK); by rows the divergence, the student's sum relative to its largest logit, the sum of logits."""
    _, log_u, z, present, known = labels
    top, log_total = student
    log_p = log_u - log_mass[:, None]
    p = tl.exp(log_p)
    below = z - top[:, None]
    log_q = below * inverse_t - log_total[:, None]
    # A slot without mass counts for nothing; but for one whose id is out of range: its NaN goes through.
    nothing = (p == 0.0) & (known | ~present)
    divergence = tl.sum(tl.where(nothing, 0.0, p * (log_p - log_q)), axis=1)
    # The same operations on the same numbers as in `statistics`, so that these terms leave no residue in its sum.
    share = tl.sum(tl.where(present, tl.exp2(below * (inverse_t * LOG2_E)), 0.0), axis=1)
    return p, tl.exp(log_q), divergence, share, tl.sum(tl.where(present, z, 0.0), axis=1)


@triton.jit
def compare_all(labels, stored, log_mass, student, K_BLOCK: tl.constexpr, CHUNKED: tl.constexpr):
    """`compare`, with sums over all slots; p and q of the first slots, whose `labels` are given."""
    p, q, divergence, share, total = compare(labels, log_mass, student, stored[6])
    if CHUNKED:
        for start in range(K_BLOCK, stored[5], K_BLOCK):
            more = load_labels(stored, start + tl.arange(0, K_BLOCK))
            _, _, more_divergence, more_share, more_total = compare(more, log_mass, student, stored[6])
            divergence += more_divergence
            share += more_share
            total += more_total
    return p, q, divergence, share, total


@triton.jit
def finite_labels(labels, stored, K_BLOCK: tl.constexpr, CHUNKED: tl.constexpr):
    """`rows.finite_total` of the logits of S."""
    total, lost = finite_sum(labels[2], labels[3])
    if CHUNKED:
        for start in range(K_BLOCK, stored[5], K_BLOCK):
            _, _, z, present, _ = load_labels(stored, start + tl.arange(0, K_BLOCK))
            more, more_lost = finite_sum(z, present)
            total += more
            lost += more_lost
    return total, lost


@triton.jit
def scatter_all(
    labels, p, q, stored, log_mass, student, g_rows, matched, scale, K_BLOCK: tl.constexpr, CHUNKED: tl.constexpr
):
    """Stores (matched x q - p) x scale at the columns of S. CHUNKED, the gradient must not lie over the logits."""
    _scatter(labels, p, q, g_rows, matched, scale)
    if CHUNKED:
        for start in range(K_BLOCK, stored[5], K_BLOCK):
            more = load_labels(stored, start + tl.arange(0, K_BLOCK))
            more_p, more_q, _, _, _ = compare(more, log_mass, student, stored[6])
            _scatter(more, more_p, more_q, g_rows, matched, scale)


@triton.jit
def _scatter(labels, p, q, g_rows, matched, scale):
    column, _, _, _, known = labels
    value = (matched[:, None] * q - p) * scale[:, None]
    tl.store(g_rows[:, None] + column, value.to(g_rows.dtype.element_ty), mask=known)
