"""How heads are cut into tiles."""

from repcon_kernels import HeadSpec
from repcon_kernels.plan import plan


def heads(*shapes: tuple[int, int]) -> tuple[HeadSpec, ...]:
    specs: list[HeadSpec] = []
    for classes, k in shapes:
        specs.append(HeadSpec(start=specs[-1].stop if specs else 0, classes=classes, k=k))
    return tuple(specs)


def test_equal_shapes_share_their_code() -> None:
    layout = plan(heads((200, 16), (1000, 16), (200, 16), (150, 16)), 1550, (17, 17, 17, 17))
    assert [group[:4] for group in layout.groups] == [(0, 1, 1, 1024), (1, 4, 4, 256)]
    assert [number for number, *_ in layout.heads] == [1, 0, 2, 3]
    assert layout.programs(9) == 9 + 3 * 3
    assert not layout.chunked


def test_a_row_that_fits_is_read_once() -> None:
    for classes, streamed in ((4096, False), (4097, True)):
        layout = plan(heads((classes, 16)), classes, (17,))
        assert layout.groups[0][5] is streamed


def test_free_columns_belong_to_the_head_before_them() -> None:
    specs = (HeadSpec(start=0, classes=10, k=2), HeadSpec(start=16, classes=10, k=2))
    layout = plan(specs, 32, (3, 3))
    assert [row[2:4] for row in layout.heads] == [(10, 16), (10, 16)]


def test_labels_that_no_tile_holds() -> None:
    assert plan(heads((9000, 4500)), 9000, (4501,)).chunked
    assert not plan(heads((4096, 4096)), 4096, (4097,)).chunked
