"""How heads are cut into tiles."""

from repcon_kernels import HeadSpec
from repcon_kernels.kl_div.tiling import Plan, plan


def heads(*shapes: tuple[int, int]) -> tuple[HeadSpec, ...]:
    specs: list[HeadSpec] = []
    for classes, k in shapes:
        specs.append(HeadSpec(start=specs[-1].stop if specs else 0, classes=classes, k=k))
    return tuple(specs)


def laid_out(specs: tuple[HeadSpec, ...], columns: int = 0, types: str = "") -> Plan:
    """Each letter of `types` stands for what a head's labels are stored as."""
    types = types or "a" * len(specs)
    return plan(specs, columns or specs[-1].stop, tuple(head.k + 1 for head in specs), tuple(types))


def test_equal_shapes_share_their_code() -> None:
    layout = laid_out(heads((200, 16), (1000, 16), (200, 16), (150, 16)))
    assert [group[:4] for group in layout.groups] == [(0, 1, 1, 1024), (1, 4, 4, 256)]
    assert [number for number, *_ in layout.heads] == [1, 0, 2, 3]
    assert layout.items(9) == 9 + 3 * 3
    assert not layout.chunked


def test_a_row_that_fits_is_read_once() -> None:
    for classes, streamed in ((4096, False), (4097, True)):
        layout = laid_out(heads((classes, 16)))
        assert layout.groups[0][5] is streamed


def test_free_columns_belong_to_the_head_before_them() -> None:
    specs = (HeadSpec(start=0, classes=10, k=2), HeadSpec(start=16, classes=10, k=2))
    layout = laid_out(specs, 32)
    assert [row[2:4] for row in layout.heads] == [(10, 16), (10, 16)]


def test_labels_that_no_tile_holds() -> None:
    assert laid_out(heads((9000, 4500))).chunked
    assert not laid_out(heads((4096, 4096))).chunked


def test_a_group_has_labels_of_one_type() -> None:
    """The kernel picks a head's pointers from a group's, which all point to the same type."""
    layout = laid_out(heads((200, 16), (200, 16), (200, 16)), types="aba")
    assert [group[:2] for group in layout.groups] == [(0, 2), (2, 3)]
    assert [number for number, *_ in layout.heads] == [0, 2, 1]
