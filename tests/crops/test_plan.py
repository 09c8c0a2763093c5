"""The crop plan: golden vectors, a reference written apart from it, torchvision's distribution, odd sizes."""

import hashlib
import importlib
import math
import struct
import time

import numpy as np
import pytest

from repcon.config import CropConfig
from repcon.crops.plan import philox, plan_crops
from repcon.runtime.errors import UserError

SIZES = [(1, 1), (20_000, 10), (10, 20_000), (1, 65_535), (65_535, 65_535), (400, 300), (333, 517), (7, 5), (2, 3)]


def hashes_of(count: int) -> np.ndarray:
    digests = [hashlib.sha256(f"image {number}".encode()).digest()[:16] for number in range(count)]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(count, 16)


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper gives it, on Python's integers."""
    for round_number in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 1 << 32)
        k0 = (key[0] + round_number * 0x9E3779B9) % (1 << 32)
        k1 = (key[1] + round_number * 0xBB67AE85) % (1 << 32)
        counter = [high1 ^ counter[1] ^ k0, low1, high0 ^ counter[3] ^ k1, low0]
    return counter


def scalar_crop(recipe: CropConfig, digest: bytes, width: int, height: int, crop: int) -> tuple[list[int], int]:
    """One box and flip, after torchvision's RandomResizedCrop.get_params."""
    h0, h1, h2, h3 = struct.unpack("<4I", digest)
    key = [(recipe.seed & 0xFFFFFFFF) ^ h2, (recipe.seed >> 32) ^ h3]
    flip = scalar_philox([h0, h1, crop, 10], key)[0] / 2**32 < recipe.flip
    narrow, wide = recipe.ratio
    for attempt in range(10):
        words = scalar_philox([h0, h1, crop, attempt], key)
        area = width * height * (recipe.scale[0] + (recipe.scale[1] - recipe.scale[0]) * words[0] / 2**32)
        shape = math.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * words[1] / 2**32)
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            y, x = words[2] * (height - h + 1) >> 32, words[3] * (width - w + 1) >> 32
            return [x, y, w, h], int(flip)
    w, h = width, height
    if width / height < narrow:
        h = max(1, round(width / narrow))
    elif width / height > wide:
        w = max(1, round(height * wide))
    return [(width - w) // 2, (height - h) // 2, w, h], int(flip)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter: list[int], key: list[int], expected: list[int]) -> None:
    arrays = [np.array([word], np.uint64) for word in counter]
    words = philox(arrays, [np.array([word], np.uint64) for word in key])
    assert [int(word[0]) for word in words] == expected == scalar_philox(counter, key)


def test_golden_boxes() -> None:
    """These never change: stores keep their boxes, but a recipe must give them again."""
    sizes = np.array([[400, 300], [300, 400], [20_000, 10]])
    drawn = plan_crops(CropConfig(seed=2**40 + 7), hashes_of(3), sizes, [0, 5])
    assert drawn.boxes[0].tolist() == [[112, 0, 284, 248], [27, 48, 261, 346], [9993, 0, 13, 10]]
    assert drawn.boxes[1].tolist() == [[92, 84, 268, 210], [45, 44, 236, 183], [9993, 0, 13, 10]]
    assert drawn.flips.tolist() == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    "recipe",
    [
        CropConfig(),
        CropConfig(seed=2**64 - 1, scale=(0.08, 1.0), flip=0.0),
        CropConfig(seed=3, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=1.0),
        CropConfig(seed=4, scale=(0.9, 1.0), ratio=(2.0, 4.0)),
        CropConfig(seed=5, scale=(0.001, 0.01), ratio=(0.1, 0.2)),
    ],
)
def test_agrees_with_the_scalar_reference(recipe: CropConfig) -> None:
    sizes = SIZES * 12
    hashes, crops = hashes_of(len(sizes)), [0, 1, 17, 2**32 - 1]
    drawn = plan_crops(recipe, hashes, np.array(sizes), crops)
    for row, crop in enumerate(crops):
        for image, (width, height) in enumerate(sizes):
            box, flip = scalar_crop(recipe, hashes[image].tobytes(), width, height, crop)
            assert drawn.boxes[row, image].tolist() == box, (recipe, width, height)
            assert drawn.flips[row, image] == flip


@pytest.mark.parametrize("ratio", [(0.75, 4 / 3), (0.01, 0.02), (50.0, 90.0)])
def test_every_box_lies_in_its_image(ratio: tuple[float, float]) -> None:
    sizes = np.array(SIZES * 100)
    drawn = plan_crops(CropConfig(scale=(0.01, 1.0), ratio=ratio), hashes_of(len(sizes)), sizes, range(4))
    assert drawn.boxes.dtype == np.uint16
    x, y, w, h = np.moveaxis(drawn.boxes.astype(np.int64), -1, 0)
    assert (w >= 1).all() and (h >= 1).all()
    assert (x + w <= sizes[:, 0]).all() and (y + h <= sizes[:, 1]).all()


def test_a_crop_depends_on_nothing_but_seed_content_and_number() -> None:
    count = 40_000  # more than one chunk
    generator = np.random.default_rng(0)
    hashes, sizes = hashes_of(count), generator.integers(200, 250, (count, 2))
    whole = plan_crops(CropConfig(), hashes, sizes, range(3))
    order = generator.permutation(count)
    shuffled = plan_crops(CropConfig(), hashes[order], sizes[order], [2, 0])
    assert (shuffled.boxes == whole.boxes[[2, 0]][:, order]).all()
    assert (shuffled.flips == whole.flips[[2, 0]][:, order]).all()
    one = plan_crops(CropConfig(), hashes[35_000:35_001], sizes[35_000:35_001], [1])
    assert (one.boxes[0, 0] == whole.boxes[1, 35_000]).all()
    other = plan_crops(CropConfig(seed=1), hashes, sizes, [0])
    assert (other.boxes[0] == whole.boxes[0]).all(-1).mean() < 0.001
    assert (whole.boxes[1] == whole.boxes[0]).all(-1).mean() < 0.001


def test_distribution_is_that_of_torchvision() -> None:
    """Two-sample Kolmogorov-Smirnov on area, shape and place, for a wide image that needs the fallback at times."""
    import torch
    from scipy.stats import ks_2samp

    importlib.import_module("repcon.models.timm_import")  # completes a torchvision that was built for another torch
    crop = importlib.import_module("torchvision.transforms").RandomResizedCrop

    width, height, count = 500, 260, 4000
    torch.manual_seed(0)
    picture = torch.empty(1, height, width)
    recipe = CropConfig(scale=(0.08, 1.0))
    theirs = [crop.get_params(picture, list(recipe.scale), list(recipe.ratio)) for _ in range(count)]
    y, x, h, w = np.array(theirs).T
    ours = plan_crops(recipe, hashes_of(count), np.tile([width, height], (count, 1)), range(4))
    ox, oy, ow, oh = ours.boxes.reshape(-1, 4).astype(np.int64).T
    for name, a, b in [
        ("area", w * h, ow * oh),
        ("shape", w / h, ow / oh),
        ("x", x, ox),
        ("y", y, oy),
        ("room", (x + w / 2), (ox + ow / 2)),
    ]:
        assert ks_2samp(a, b).pvalue > 1e-4, name
    assert abs(ours.flips.mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    "recipe",
    [
        CropConfig(scale=(0.0, 1.0)),
        CropConfig(scale=(0.5, 0.25)),
        CropConfig(scale=(0.5, 1.5)),
        CropConfig(ratio=(0.0, 1.0)),
        CropConfig(ratio=(2.0, 1.0)),
        CropConfig(flip=1.5),
        CropConfig(seed=-1),
    ],
)
def test_a_senseless_recipe_is_refused_by_name(recipe: CropConfig) -> None:
    with pytest.raises(UserError, match=r"crop\.(scale|ratio|flip|seed) = "):
        plan_crops(recipe, hashes_of(1), np.array([[10, 10]]), [0])


def test_a_seed_of_more_than_64_bits_is_refused() -> None:
    with pytest.raises(UserError, match=r"seed: 18446744073709551616 makes no sense"):
        CropConfig(seed=2**64)


def test_wrong_shapes_and_sizes_are_refused() -> None:
    for hashes, sizes in [
        (hashes_of(2), np.ones((3, 2))),
        (hashes_of(2)[:, :8], np.ones((2, 2))),
        (hashes_of(1), np.array([[0, 5]])),
        (hashes_of(1), np.array([[65_536, 5]])),
    ]:
        with pytest.raises(ValueError):
            plan_crops(CropConfig(), hashes, sizes, [0])


def test_no_images_and_no_crops_are_fine() -> None:
    assert plan_crops(CropConfig(), hashes_of(0), np.empty((0, 2)), [0, 1]).boxes.shape == (2, 0, 4)
    assert plan_crops(CropConfig(), hashes_of(2), np.ones((2, 2)), []).boxes.shape == (0, 2, 4)


def test_a_million_boxes_take_seconds() -> None:
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 256, (125_000, 16), dtype=np.uint8)
    sizes = generator.integers(100, 500, (125_000, 2))
    started = time.process_time()
    plan_crops(CropConfig(), hashes, sizes, range(8))
    assert time.process_time() - started < 10  # about 1 on an idle machine
