"""The loaders' contract, on real JPEGs: the same crops in the same order, near the reference; errors, never hangs."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from loader_case import SIDES, make_pack, request
from numba.core import caching

from repcon.commands import pack as packing
from repcon.config import PackConfig
from repcon.decode import factory, libraries
from repcon.decode import resize as compiled_resize
from repcon.decode.base import CropBatch, CropRequest, Loader
from repcon.decode.buffer_pool import BufferPool, image_buffer
from repcon.decode.factory import open_loader
from repcon.decode.libraries import installed
from repcon.decode.reference import crop, crop_float
from repcon.distill.sampler import CropBatchSampler, EpochGroup, box_lookup
from repcon.images.pack import ImagePack
from repcon.runtime.errors import UserError

MEAN_DIFFERENCE = 0.05
"""Of 255, to the reference rounded to uint8: rounding alone lies 0.25 from the unrounded one."""


def needs(kind: str) -> object:
    return pytest.param(kind, marks=pytest.mark.skipif(not installed(kind), reason=f"loader {kind} is not installed"))


FAST = [needs(kind) for kind in ("torch", "dali", "ffcv")]
ALL = [needs("reference"), *FAST]


@pytest.fixture(scope="module")
def pack_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("loaders"))


@pytest.fixture
def pack(pack_path: Path) -> ImagePack:
    return ImagePack.open(pack_path)


@pytest.fixture
def loader(pack: ImagePack, kind: str) -> Iterator[Loader]:
    opened = open_loader(kind, pack, SIDES, num_workers=2)
    yield opened
    opened.close()


def all_crops(pack: ImagePack) -> list[CropRequest]:
    rows = list(range(len(pack)))
    return [request(pack, rows[:5], 8, seed=1), request(pack, rows[5:][::-1], 8, seed=2), request(pack, rows[2:3], 8)]


def difference(one: CropBatch, other: CropBatch, side: int) -> torch.Tensor:
    return (one.pixels[side].float() - other.pixels[side].float()).abs()


@pytest.mark.parametrize("kind", FAST)
def test_near_the_reference_whatever_the_jpeg_and_the_box(kind: str, pack: ImagePack, loader: Loader) -> None:
    requests = all_crops(pack)
    expected = list(open_loader("reference", pack, SIDES).batches(requests))
    found = list(loader.batches(requests))
    assert loader.kind == kind
    for side in SIDES:
        gaps = torch.cat([difference(a, b, side).flatten() for a, b in zip(expected, found, strict=True)])
        assert gaps.mean() <= MEAN_DIFFERENCE
        assert gaps.max() <= 1


@pytest.mark.parametrize("kind", ALL)
def test_a_batch_for_each_request_in_order(kind: str, pack: ImagePack, loader: Loader) -> None:
    requests = all_crops(pack)
    batches = list(loader.batches(iter(requests)))
    assert len(batches) == len(requests)
    for wanted, batch in zip(requests, batches, strict=True):
        n, c = wanted.crops.shape
        assert batch.images.tolist() == np.repeat(wanted.images, c).tolist()
        assert batch.crops.tolist() == wanted.crops.reshape(-1).tolist()
        assert batch.images.dtype == batch.crops.dtype == torch.int64
        for side in SIDES:
            assert batch.pixels[side].shape == (n * c, 3, side, side)
            assert batch.pixels[side].dtype == torch.uint8
            assert batch.pixels[side].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ALL)
def test_a_request_without_crops_decodes_and_gives_none(kind: str, pack: ImagePack, loader: Loader) -> None:
    (batch,) = loader.batches([request(pack, range(3), 0)])
    assert batch.images.tolist() == batch.crops.tolist() == []
    assert all(batch.pixels[side].shape == (0, 3, side, side) for side in SIDES)


@pytest.mark.parametrize("kind", FAST)
def test_very_long_images(kind: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for width, height in ((20_000, 10), (10, 20_000)):
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        (tmp_path / f"source/{width}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
    packing.run(
        PackConfig(source=str(tmp_path / "source"), out=str(tmp_path / "pack"), max_side=0, ffcv=kind == "ffcv")
    )
    pack = ImagePack.open(tmp_path / "pack")
    requests = [request(pack, [0, 1], 6)]
    (expected,), opened = open_loader("reference", pack, SIDES).batches(requests), open_loader(kind, pack, SIDES)
    (found,) = opened.batches(requests)
    opened.close()
    assert sorted(pack.sizes.tolist()) == [[10, 20_000], [20_000, 10]]
    for side in SIDES:
        assert difference(expected, found, side).mean() <= MEAN_DIFFERENCE


def of_the_order(pack: ImagePack, loader: Loader, start: int = 0, window: int = 0, rank: int = 0, world: int = 1):
    """The order, and the batches that the loader makes of it from `start` on; the last one is smaller than the rest."""
    part, boxes = EpochGroup(epoch=3, crops=(0, 1)), request(pack, range(len(pack)), 6, seed=9)
    order = CropBatchSampler(
        np.arange(len(pack)), part, seed=5, batch_size=8, mix_window=window, rank=rank, world_size=world
    )
    stored = [boxes.boxes[:, j] for j in (2, 5)], [boxes.flips[:, j] for j in (2, 5)]
    return order, list(order.batches(loader.batches(order.requests(box_lookup(*stored), start)), start))


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("kind", ALL)
def test_the_order_of_training_is_the_same_in_all(kind: str, window: int, pack: ImagePack, loader: Loader) -> None:
    """The same for a seed and an epoch, shared by any number of processes, and from any batch on."""
    order, whole = of_the_order(pack, loader, window=window)
    assert [len(batch.images) for batch in whole] == {0: [8, 8, 6], 4: [7, 8, 7]}[window]
    for step, batch in enumerate(whole):
        wanted = order.samples(step)
        assert batch.images.tolist() == wanted[0].tolist() and batch.crops.tolist() == wanted[1].tolist()
    for start in range(1, 4):
        rest = of_the_order(pack, loader, start, window)[1]
        assert len(rest) == 3 - start
        for one, other in zip(rest, whole[start:], strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.crops, other.crops)
            assert torch.equal(one.pixels[SIDES[0]], other.pixels[SIDES[0]])
    shares = [of_the_order(pack, loader, window=window, rank=rank, world=2)[1] for rank in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert pixels_by_crop([batch]) == pixels_by_crop(parts)


def pixels_by_crop(batches: list[CropBatch]) -> dict[tuple[int, int], bytes]:
    rows = [
        ((image, number), pixels.numpy().tobytes())
        for batch in batches
        for image, number, pixels in zip(
            batch.images.tolist(), batch.crops.tolist(), batch.pixels[SIDES[0]], strict=True
        )
    ]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


@pytest.mark.parametrize("kind", FAST)
def test_pixels_depend_on_neither_the_batch_nor_the_threads(kind: str, pack: ImagePack, loader: Loader) -> None:
    whole = request(pack, range(len(pack)), 3)
    singles = [
        CropRequest(images=whole.images[i], crops=whole.crops[i], boxes=whole.boxes[i], flips=whole.flips[i])
        for i in ([k] for k in range(len(pack)))
    ]
    (together,) = loader.batches([whole])
    one_thread = open_loader(kind, pack, SIDES, num_workers=1)
    apart = torch.cat([batch.pixels[SIDES[0]] for batch in one_thread.batches(singles)])
    one_thread.close()
    assert torch.equal(together.pixels[SIDES[0]], apart)


@pytest.mark.parametrize("kind", ALL)
def test_held_batches_stay_as_they_were(kind: str, pack: ImagePack, loader: Loader) -> None:
    requests = [request(pack, [row % len(pack)], 6, seed=row) for row in range(12)]
    held, copies = [], []
    for batch in loader.batches(requests):
        held.append(batch.pixels[SIDES[0]][2:])  # a view keeps the memory just as well
        copies.append(held[-1].clone())
    assert all(torch.equal(one, other) for one, other in zip(held, copies, strict=True))


@pytest.mark.parametrize("kind", ALL)
def test_requests_are_taken_a_few_ahead_only(kind: str, pack: ImagePack, loader: Loader) -> None:
    taken = 0

    def endless() -> Iterator[CropRequest]:
        nonlocal taken
        while True:
            taken += 1
            yield request(pack, [0, 1], 2, seed=taken)

    batches = loader.batches(endless())
    for _ in range(3):
        next(batches)
    assert taken <= 3 + 4
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("kind", ALL)
def test_two_iterations_at_once(kind: str, pack: ImagePack, loader: Loader) -> None:
    requests = all_crops(pack)
    pairs = list(zip(loader.batches(requests), loader.batches(requests), strict=True))
    assert len(pairs) == len(requests)
    assert all(torch.equal(a.pixels[SIDES[1]], b.pixels[SIDES[1]]) for a, b in pairs)


@pytest.mark.parametrize("kind", ALL)
def test_a_box_outside_its_image_names_the_image(kind: str, pack: ImagePack, loader: Loader) -> None:
    wrong = request(pack, [1, 0], 2)
    wrong.boxes[1, 1] = (5, 5, *pack.sizes[0])
    with pytest.raises(UserError, match="not inside its") as caught:
        list(loader.batches([wrong]))
    assert pack.keys[0] in str(caught.value)


@pytest.mark.parametrize("kind", ALL)
def test_an_image_that_vanished_names_itself(kind: str, tmp_path: Path) -> None:
    if kind == "ffcv":
        pytest.skip("its images lie in the .beton; tests/decode/test_ffcv.py")
    pack = ImagePack.open(make_pack(tmp_path))
    loader = open_loader(kind, pack, SIDES, num_workers=2)
    requests = [request(pack, range(len(pack)), 2, seed=seed) for seed in range(4)]
    assert len(list(loader.batches(requests))) == 4
    (tmp_path / "pack" / "shard-00000.tar").write_bytes(b"short")
    fresh = ImagePack.open(tmp_path / "pack")
    loader.close()
    loader = open_loader(kind, fresh, SIDES, num_workers=2)
    with pytest.raises(UserError, match=r"image .* in shard-00000.tar"):
        list(loader.batches(requests))
    loader.close()


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind.values != ("ffcv",)])
def test_bytes_that_cannot_be_decoded_name_the_image(
    kind: str, pack: ImagePack, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ImagePack.read
    # The pack's own check would find this first; with check=False nothing does.
    monkeypatch.setattr(ImagePack, "read", lambda self, row: real(self, row) if row != 3 else real(self, row)[:300])
    with pytest.raises(UserError, match="cannot be decoded") as caught:
        list(loader.batches([request(pack, range(len(pack)), 2)]))
    assert pack.keys[3] in str(caught.value)
    monkeypatch.undo()
    assert len(list(loader.batches(all_crops(pack)))) == 3  # the loader is still good


@pytest.mark.parametrize("kind", ALL)
def test_an_error_of_the_requests_reaches_the_consumer(kind: str, pack: ImagePack, loader: Loader) -> None:
    def broken() -> Iterator[CropRequest]:
        yield request(pack, [0], 1)
        raise LookupError("no more labels")

    with pytest.raises(LookupError, match="no more labels"):
        list(loader.batches(broken()))


@pytest.mark.parametrize("kind", FAST)
def test_closing_ends_the_threads_even_in_the_middle(kind: str, pack: ImagePack) -> None:
    before = set(threading.enumerate())
    opened = open_loader(kind, pack, SIDES, num_workers=3)
    batches = opened.batches(request(pack, range(len(pack)), 4, seed=seed) for seed in range(50))
    next(batches)
    opened.close()
    opened.close()
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_memory_is_taken_again_only_when_nothing_looks_at_it() -> None:
    buffers = BufferPool()
    first = buffers.crops(4, 16)
    place, view = first.data_ptr(), first[1:2]
    del first
    assert buffers.crops(4, 16).data_ptr() != place
    del view
    places = {tensor.data_ptr() for tensor in [buffers.crops(4, 16), buffers.crops(4, 16)]}
    assert place in places


def test_the_reference_is_the_triangle_filter() -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    for box, side in [((4, 3, 40, 30), 16), ((0, 0, 53, 37), 9), ((10, 20, 5, 3), 24), ((52, 36, 1, 1), 7)]:
        x, y, width, height = box
        pixels = image[y : y + height, x : x + width].astype(np.float64)
        expected = np.einsum("ih,hwc,jw->cij", triangle(height, side), pixels, triangle(width, side))
        assert np.abs(crop_float(image, box, side, False).numpy() - expected).max() < 1e-3
        assert torch.equal(crop(image, box, side, True), crop(image, box, side, False).flip(-1))


def test_the_resize_compiles_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    compiled = compiled_resize._compiled()(lambda value: 2 * value)
    assert compiled(3) == 6


def triangle(length: int, side: int) -> np.ndarray:
    """(side, length) weights, written from the definition."""
    scale = length / side
    centres = scale * (np.arange(side)[:, None] + 0.5)
    distance = np.abs(np.arange(length) + 0.5 - centres) / max(scale, 1)
    weights = np.maximum(0, 1 - distance)
    return weights / weights.sum(axis=1, keepdims=True)


def test_a_missing_or_unknown_loader_says_what_to_do(pack: ImagePack, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="choose auto, reference, torch, dali, ffcv"):
        open_loader("tape", pack, [32])
    with pytest.raises(UserError, match="at least 1"):
        open_loader("torch", pack, [0])
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'repcon\[dali\]'"):
        open_loader("dali", pack, [32])
    with pytest.raises(UserError, match="make ffcv"):
        open_loader("ffcv", pack, [32])


def test_auto_says_what_it_chose(
    pack_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = ImagePack.open(pack_path)
    monkeypatch.setattr(factory, "installed", lambda kind: kind == "torch")
    factory._announce.cache_clear()
    for _ in range(2):
        chosen = open_loader("auto", pack, [32])
        assert chosen.kind == "torch"
        chosen.close()
    assert capsys.readouterr().out.count("loader: torch") == 1
    monkeypatch.setattr(factory, "installed", lambda kind: kind != "ffcv")
    assert factory._choose(pack, on_gpu=True)[0] == "dali"
    assert factory._choose(pack, on_gpu=False)[0] == "torch"


def test_beside_a_gpu_some_cores_are_left_to_the_training_step(
    pack: ImagePack, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(factory, "_open", lambda kind, pack, sides, num_workers, device: opened.append(num_workers))
    monkeypatch.setattr(factory, "own_cores", lambda: 16)
    for device, num_workers in (("cuda:0", 0), ("cuda:0", 3), ("cpu", 0)):
        open_loader("torch", pack, SIDES, num_workers=num_workers, device=device)
    assert opened == [12, 3, 0]


def test_images_are_decoded_to_an_odd_address(pack: ImagePack) -> None:
    """Where no row of an even width is one that libjpeg-turbo writes past the processor's cache."""
    memory = image_buffer(pack)
    assert memory.ctypes.data % 2 == 1 and memory.size == 3 * int(pack.sizes.prod(axis=1).max())
