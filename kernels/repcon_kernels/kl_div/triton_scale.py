"""The Triton kernel that multiplies a gradient head by head by factors that are read on the device."""
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's types describe its compiler; the language that it reads is another.)

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch"])
def scale_heads(
    gradient,  # (batch, COLUMNS)
    factors,  # H floats, `factor_stride` apart
    batch,
    factor_stride,
    factor_scale,
    SPANS: tl.constexpr,  # H tuples (first column, columns)
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gradient[:, head] *= factors[head] x factor_scale, in place. A factor of exactly 1 costs no traffic."""
    for h in tl.static_range(len(SPANS)):
        factor = tl.load(factors + h * factor_stride).to(tl.float32) * factor_scale
        if factor != 1.0:
            for row in range(tl.program_id(0), batch, tl.num_programs(0)):
                first = gradient + tl.cast(row, tl.int64) * COLUMNS + SPANS[h][0]
                for start in range(0, SPANS[h][1], BLOCK):
                    column = start + tl.arange(0, BLOCK)
                    mask = column < SPANS[h][1]
                    value = tl.load(first + column, mask=mask, other=0.0).to(tl.float32) * factor
                    tl.store(first + column, value.to(gradient.dtype.element_ty), mask=mask)
