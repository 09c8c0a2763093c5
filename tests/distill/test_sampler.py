"""Every (image, crop) once, whoever takes part and wherever a run goes on."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from repcon.decode.base import CropBatch, CropRequest
from repcon.distill.sampler import CropBatchSampler, EpochGroup, box_lookup, epoch_groups, split_train_validation
from repcon.runtime.errors import UserError

BOXES = np.random.default_rng(0).integers(0, 99, (4, 500, 4)).astype(np.uint16)
FLIPS = np.random.default_rng(1).integers(0, 2, (4, 500)).astype(np.uint8)


def decoded(request: CropRequest) -> CropBatch:
    """What a loader would give, each pixel telling image and crop."""
    images = np.repeat(request.images, request.crops.shape[1])
    crops = request.crops.ravel()
    values = torch.from_numpy((images * 7 + crops).astype(np.uint8))
    pixels = values[:, None, None, None].expand(-1, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    return CropBatch(pixels={2: pixels}, images=torch.from_numpy(images), crops=torch.from_numpy(crops))


def shown(order: CropBatchSampler, start: int = 0) -> list[list[tuple[int, int]]]:
    """(image, crop) of every batch, as the pixels tell it; checks that pixels and numbers travel together."""
    count = len(order.group.crops)
    result = []
    for batch in order.batches(map(decoded, order.requests(box_lookup(BOXES[:count], FLIPS[:count]), start)), start):
        told = (batch.images * 7 + batch.crops).to(torch.uint8)
        assert torch.equal(batch.pixels[2][:, 0, 0, 0], told)
        assert batch.pixels[2].is_contiguous(memory_format=torch.channels_last)
        result.append(list(zip(batch.images.tolist(), batch.crops.tolist(), strict=True)))
    return result


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(40, 200),
    crops=st.integers(1, 4),
    batch_size=st.integers(24, 60),
    window=st.sampled_from([0, 4, 7]),
    world=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_every_crop_once_whatever_the_team(
    images: int, crops: int, batch_size: int, window: int, world: int, epoch: int
) -> None:
    assume(not window or -(-images // (batch_size // crops)) >= crops)  # A shorter epoch is refused, see below.
    rows = np.arange(images) * 2
    part = EpochGroup(epoch=epoch, crops=tuple(range(crops)))
    orders = [
        CropBatchSampler(rows, part, seed=3, batch_size=batch_size, mix_window=window, rank=r, world_size=world)
        for r in range(world)
    ]
    together = [list(chain(*batches)) for batches in zip(*map(shown, orders), strict=True)]
    assert Counter(chain(*together)) == Counter((int(row), crop) for row in rows for crop in range(crops))
    alone = shown(CropBatchSampler(rows, part, seed=3, batch_size=batch_size, mix_window=window))
    assert [sorted(batch) for batch in together] == [sorted(batch) for batch in alone]
    assert [len(batch) for batch in alone] == [orders[0].size(step) for step in range(orders[0].steps)]


@pytest.mark.parametrize(("crops", "window"), [(1, 0), (4, 0), (4, 4), (4, 9), (3, 7)])
def test_resume_at_any_batch_gives_the_same_batches(crops: int, window: int) -> None:
    order = CropBatchSampler(
        np.arange(90),
        EpochGroup(epoch=0, crops=tuple(range(crops))),
        seed=0,
        batch_size=12,
        mix_window=window,
        rank=1,
        world_size=2,
    )
    whole = shown(order)
    for start in range(order.steps + 1):
        assert shown(order, start) == whole[start:]


@pytest.mark.parametrize("window", [0, 8])
def test_samples_tells_the_batches_without_decoding(window: int) -> None:
    order = CropBatchSampler(
        np.arange(64), EpochGroup(epoch=0, crops=(2, 3, 0, 1)), seed=0, batch_size=16, mix_window=window
    )
    for step, batch in enumerate(shown_numbers(order)):
        images, crops = order.samples(step)
        assert list(zip(images.tolist(), crops.tolist(), strict=True)) == batch


def shown_numbers(order: CropBatchSampler) -> list[list[tuple[int, int]]]:
    batches = order.batches(map(decoded, order.requests(box_lookup(BOXES, FLIPS))))
    return [list(zip(b.images.tolist(), b.crops.tolist(), strict=True)) for b in batches]


def test_mixing_decodes_each_image_once_and_separates_its_crops() -> None:
    order = CropBatchSampler(
        np.arange(400), EpochGroup(epoch=0, crops=(0, 1, 2, 3)), seed=0, batch_size=16, mix_window=12
    )
    requests = list(order.requests(box_lookup(BOXES, FLIPS)))
    assert sorted(np.concatenate([r.images for r in requests]).tolist()) == list(range(400))
    for batch in shown(order):
        assert max(Counter(image for image, _ in batch).values()) == 1
    steps = {}
    for step, batch in enumerate(shown(order)):
        for image, _ in batch:
            steps.setdefault(image, []).append(step)
    spans = [(max(s) - min(s)) for s in steps.values()]
    # Images at the end of the pass give their late crops to its beginning; all others stay in the window.
    assert sum(span < 12 for span in spans) >= 400 - 9 * 4
    assert max(len(r.images) for r in requests[9:]) == 4


def test_requests_carry_the_stored_boxes() -> None:
    order = CropBatchSampler(np.arange(30), EpochGroup(epoch=2, crops=(2, 3)), seed=0, batch_size=8)
    for request in order.requests(box_lookup(BOXES[2:], FLIPS[2:])):
        for place, crop in enumerate((2, 3)):
            assert (request.crops[:, place] == crop).all()
            np.testing.assert_array_equal(request.boxes[:, place], BOXES[crop][request.images])
            np.testing.assert_array_equal(request.flips[:, place], FLIPS[crop][request.images])


def test_epochs_differ_and_the_order_is_frozen() -> None:
    """The numbers are the contract: other software versions and machines must shuffle alike."""
    first = CropBatchSampler(np.arange(10), EpochGroup(epoch=0, crops=(0,)), seed=0, batch_size=4).samples(0)[0]
    second = CropBatchSampler(np.arange(10), EpochGroup(epoch=1, crops=(1,)), seed=0, batch_size=4).samples(0)[0]
    assert (first.tolist(), second.tolist()) == GOLDEN


def test_no_batch_is_tiny() -> None:
    order = CropBatchSampler(np.arange(65), EpochGroup(epoch=0, crops=(0,)), seed=0, batch_size=32)
    assert [order.size(step) for step in range(order.steps)] == [32, 17, 16]


def test_one_image_that_is_left_over_joins_a_batch_of_two() -> None:
    order = CropBatchSampler(np.arange(7), EpochGroup(epoch=0, crops=(0,)), seed=0, batch_size=2)
    assert [order.size(step) for step in range(order.steps)] == [2, 2, 3]


def test_passes_stand_for_epochs() -> None:
    assert epoch_groups(5, 2, 4) == [
        EpochGroup(epoch=0, crops=(0, 1)),
        EpochGroup(epoch=2, crops=(2, 3)),
        EpochGroup(epoch=4, crops=(0,)),
    ]


def test_split_follows_content_not_place() -> None:
    hashes = np.random.default_rng(0).integers(0, 256, (200, 16)).astype(np.uint8)
    hashes[7] = hashes[150]
    train, held = split_train_validation(hashes, 0.1, seed=0)
    assert 20 <= len(held) <= 21 and sorted([*train, *held]) == list(range(200))
    assert (7 in held) == (150 in held)
    turned = split_train_validation(hashes[::-1], 0.1, seed=0)[1]
    assert sorted(199 - turned) == held.tolist()
    assert split_train_validation(hashes, 0.1, seed=1)[1].tolist() != held.tolist()
    assert len(split_train_validation(hashes, 0, seed=0)[1]) == 0


@pytest.mark.parametrize(
    ("images", "settings_", "word"),
    [
        (10, {"batch_size": 1}, "crops_per_decode"),
        (0, {"batch_size": 4}, "val_fraction"),
        (10, {"batch_size": 4, "mix_window": 1}, "mix_window"),
        (4, {"batch_size": 4, "mix_window": 0, "world_size": 3}, "processes"),
    ],
)
def test_impossible_sizes_are_named(images: int, settings_: dict[str, int], word: str) -> None:
    with pytest.raises(UserError, match=word):
        CropBatchSampler(np.arange(images), EpochGroup(epoch=0, crops=(0, 1)), seed=0, **settings_)


def test_more_crops_than_stored_are_refused() -> None:
    with pytest.raises(UserError, match="crops_per_decode 5"):
        epoch_groups(5, 5, 4)


GOLDEN = ([0, 2, 9, 1], [5, 3, 7, 8])
