"""How heads are cut into tiles and groups: plain Python, apart from the kernel."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from repcon_kernels.kl_div.heads import HeadSpec, widths

TILES = ((1024, 1024, 4), (2048, 2048, 8), (4096, 4096, 8), (65536, 2048, 8))
"""(widest head up to, elements of a tile, warps). A head wider than its tile is streamed: several programs share a
multiprocessor, and one loads while another computes."""
REGISTERS = 64
"""Per thread, at most: the second look, which few rows need, would otherwise halve the programs that run at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The kernel's compile-time arguments; one compilation for each."""

    heads: tuple[tuple[int, ...], ...]
    """In the order of the groups: (number, start, classes, width, k, columns of logp, column of the tail)."""
    groups: tuple[tuple[int, ...], ...]
    """(first head, head after the last, ROWS, BLOCK, K_BLOCK, STREAMED, CHUNKED), widest first."""
    warps: int

    @property
    def chunked(self) -> bool:
        """Whether some head's k does not fit in a tile; its gradient cannot be written over the logits."""
        return any(group[6] for group in self.groups)

    def programs(self, batch: int) -> int:
        """How many programs a launch has."""
        return sum((high - low) * -(-batch // rows) for low, high, rows, *_ in self.groups)


@lru_cache(maxsize=64)
def plan(
    heads: tuple[HeadSpec, ...], columns: int, logp_columns: tuple[int, ...], label_types: tuple[Hashable, ...]
) -> Plan:
    """Groups heads by their padded shapes; a tile holds as many rows as fill it.

    label_types: per head, what its labels are stored as; a group picks its pointers among those of one type.
    """
    spans = widths(heads, columns)
    _, tile, warps = next((row for row in TILES if max(spans) <= row[0]), TILES[-1])
    shapes = [_shape(span, head.k, tile, warps) for head, span in zip(heads, spans, strict=True)]
    kinds = [(*shape, label_types.index(label_types[number])) for number, shape in enumerate(shapes)]
    order = sorted(range(len(heads)), key=lambda number: (-shapes[number][1], not shapes[number][3], kinds[number]))
    table = tuple(
        (
            number,
            heads[number].start,
            heads[number].classes,
            spans[number],
            heads[number].k,
            logp_columns[number],
            heads[number].k + heads[number].tail_column,
        )
        for number in order
    )
    return Plan(heads=table, groups=_groups([kinds[number] for number in order]), warps=warps)


def _shape(width: int, k: int, tile: int, warps: int) -> tuple[int, int, int, bool, bool]:
    """(ROWS, BLOCK, K_BLOCK, STREAMED, CHUNKED) of a head."""
    block = min(_power_of_two(max(width, 16)), tile)
    k_block = min(_power_of_two(k), block)
    return min(tile // block, warps), block, k_block, width > block, k > k_block


def _groups(kinds: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Runs of equal kinds: a shape, then the number of the labels' type."""
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    return tuple((low, high, *kinds[low][:-1]) for low, high in zip(starts, [*starts[1:], len(kinds)], strict=True))


def _power_of_two(number: int) -> int:
    """The smallest that is at least `number`."""
    return 1 << (number - 1).bit_length()
