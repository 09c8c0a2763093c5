"""Tile sizes and groups of heads for the Triton kernel."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from repcon_kernels.kl_div.heads import HeadSpec, widths

TILES = ((1024, 1024, 4), (2048, 2048, 8), (4096, 4096, 8), (65536, 2048, 8))
"""(widest head up to, elements of a tile, warps). A head wider than its tile is streamed; several programs share a
multiprocessor, so that one loads while another computes."""
REGISTERS = 64
"""Limit per thread: the second read of a row, which few rows need, would otherwise halve the concurrent programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """An alternative to streaming for heads that are wider than a tile."""

    warps: int
    registers: int
    """Per thread, at most."""
    block: int
    """Columns of a tensor of `triton_held`."""
    programs_per_processor: int = 0
    """Persistent programs per multiprocessor, each of which computes many tiles; 0: one program per tile."""
    prefetch: bool = False
    """Whether a program prefetches its next row into the L2 cache before it computes this one."""
    aligned: bool = True
    """Whether rows are read and written 16 bytes at a time."""


VARIANTS = {
    "held": Variant(warps=8, registers=128, block=2048),
    "held_persistent": Variant(warps=8, registers=128, block=2048, programs_per_processor=2),
    "held_prefetch": Variant(warps=8, registers=128, block=2048, programs_per_processor=2, prefetch=True),
    "held_unaligned": Variant(warps=8, registers=128, block=2048, programs_per_processor=2, aligned=False),
}
"""Variants that keep a wide row in registers: one read and one exponential per logit, instead of two of each. None has
run on a GPU yet, so `WIDE_ROWS` is "streamed"."""
WIDE_ROWS = "streamed"
"""The variant for heads wider than a tile: "streamed", or one of VARIANTS."""
WIDEST_HELD = 11 * 2048
"""Columns: 88 registers of 256 threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The kernel's compile-time arguments; each plan is compiled once."""

    heads: tuple[tuple[int, ...], ...]
    """In the order of the groups: (number, start, classes, width, k, columns of logp, column of the tail)."""
    groups: tuple[tuple[int, ...], ...]
    """(first head, head after the last, ROWS, BLOCK, K_BLOCK, STREAMED, CHUNKED, CHUNKS, FULL, VECTOR), widest."""
    warps: int
    registers: int
    programs_per_processor: int = 0
    """As in `Variant`."""
    prefetch: bool = False

    @property
    def chunked(self) -> bool:
        """Whether some head's k does not fit in a tile; its gradient cannot be written over the logits."""
        return any(group[6] for group in self.groups)

    def items(self, batch: int) -> int:
        """Tiles of rows over all heads: the programs of a launch that is not persistent."""
        return sum((high - low) * -(-batch // rows) for low, high, rows, *_ in self.groups)


@lru_cache(maxsize=64)
def plan(
    heads: tuple[HeadSpec, ...],
    columns: int,
    logp_columns: tuple[int, ...],
    label_types: tuple[Hashable, ...],
    wide_rows: str = "streamed",
    vector: int = 1,
) -> Plan:
    """Group heads by their padded shapes; a tile has as many rows as fit.

    label_types: per head, the dtypes of its labels; a group selects its pointers among those of one type.
    wide_rows: "streamed" or a name of VARIANTS; matters only if a head is wider than a tile and fits into registers.
    vector: logits per 16 bytes where rows may be read so, else 1.
    """
    spans = widths(heads, columns)
    shapes, options = _shapes(heads, spans, wide_rows, vector)
    kinds = [(*shape, label_types.index(label_types[number])) for number, shape in enumerate(shapes)]
    order = sorted(range(len(heads)), key=lambda number: (-shapes[number][1], not shapes[number][3], kinds[number]))
    rows = [
        (number, head.start, head.classes, spans[number], head.k, logp_columns[number], head.k + head.tail_column)
        for number, head in enumerate(heads)
    ]
    table = tuple(rows[number] for number in order)
    return Plan(heads=table, groups=_groups([kinds[number] for number in order]), **options)


def _shapes(
    heads: Sequence[HeadSpec], spans: Sequence[int], wide_rows: str, vector: int
) -> tuple[list[tuple], dict[str, Any]]:
    """Each head's shape as in `Plan.groups`, and the plan's options."""
    _, tile, warps = next((row for row in TILES if max(spans) <= row[0]), TILES[-1])
    shapes = [_shape(head, span, tile, warps) for head, span in zip(heads, spans, strict=True)]
    held = [shape[3] and head.classes <= WIDEST_HELD for head, shape in zip(heads, shapes, strict=True)]
    if wide_rows == "streamed" or not any(held):
        return shapes, {"warps": warps, "registers": REGISTERS}
    variant = VARIANTS[wide_rows]
    shapes = [
        _held_shape(head, variant.block, vector if variant.aligned else 1)
        if hold
        else _shape(head, span, 256 * variant.warps, variant.warps)
        for head, span, hold in zip(heads, spans, held, strict=True)
    ]
    return shapes, {
        "warps": variant.warps,
        "registers": variant.registers,
        "programs_per_processor": variant.programs_per_processor,
        "prefetch": variant.prefetch,
    }


def _shape(head: HeadSpec, width: int, tile: int, warps: int) -> tuple:
    """(ROWS, BLOCK, K_BLOCK, STREAMED, CHUNKED, CHUNKS, FULL, VECTOR) of a head that is not held in registers."""
    block = min(_power_of_two(max(width, 16)), tile)
    k_block = min(_power_of_two(head.k), block)
    return min(tile // block, warps), block, k_block, width > block, head.k > k_block, 0, 0, 1


def _held_shape(head: HeadSpec, block: int, vector: int) -> tuple:
    """`_shape` of a head that is: FULL chunks are inside the row whatever its address."""
    k_block = min(_power_of_two(head.k), block)
    chunks, full = -(-head.classes // block), (head.classes - vector + 1) // block
    return 1, block, k_block, True, head.k > k_block, chunks, full, vector


def _groups(kinds: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Runs of equal kinds, each a shape and the index of the labels' type."""
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    return tuple((low, high, *kinds[low][:-1]) for low, high in zip(starts, [*starts[1:], len(kinds)], strict=True))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
