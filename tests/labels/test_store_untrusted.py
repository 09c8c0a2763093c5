"""A store from a stranger is safe to open: it cannot ask for impossible memory, leave its folder, or serve poison."""

import os
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from store_builder import fill, spec, write

from repcon.labels.manifest import seal, unseal
from repcon.labels.store import LabelStore
from repcon.runtime.errors import UserError


@pytest.fixture
def store(tmp_path) -> LabelStore:
    return fill(LabelStore.create(str(tmp_path / "labels.zarr"), spec()))


def test_a_strangers_store_cannot_ask_for_impossible_sizes(store):
    path = Path(store.url) / "manifest.json"
    values = unseal(path.read_bytes(), "m")
    for changes in ({"images": 10**18}, {"crops": 10**9}, {"k": 10**9}, {"rows_per_shard": 2**40}):
        path.write_bytes(seal(values | changes))
        with pytest.raises(UserError, match=next(iter(changes))):
            LabelStore.open(store.url)
    path.write_bytes(seal(values | {"images": 2**33, "rows_per_shard": 2**20}))
    with pytest.raises(UserError):  # the markers of all those units are not there, and nothing was allocated
        LabelStore.open(store.url).reader.crop_labels(0)


def test_a_manifest_of_a_terabyte_is_not_read(store):
    os.truncate(Path(store.url) / "manifest.json", 2**40)
    with pytest.raises(UserError, match="too many for a manifest"):
        LabelStore.open(store.url)


def test_a_strangers_store_cannot_lead_out_of_its_folder(store, tmp_path):
    outside = tmp_path / "outside"
    target = Path(store.url) / "heads/wide/ids/c/0/0/0"
    target.rename(outside)
    target.symlink_to(outside)
    with pytest.raises(UserError, match="leads out"):
        LabelStore.open(store.url).reader.crop_labels(0)
    path = Path(store.url) / "manifest.json"
    values = unseal(path.read_bytes(), "m")
    path.write_bytes(seal(values | {"metadata": values["metadata"] | {"../../etc/passwd": "0" * 64}}))
    with pytest.raises(UserError, match="not one that a store may use"):
        LabelStore.open(store.url)


def test_a_chunk_that_claims_another_size_is_refused_before_it_is_decoded(store):
    """A forged shard with right checksums everywhere, whose compressed data claim to be larger than a chunk."""
    name = "heads/small/ids/c/0/0/0"
    path, marker = Path(store.url) / name, Path(store.url) / "done/part-0-crop-0-row-0.json"
    shard = bytearray(path.read_bytes())
    offset, length = np.frombuffer(shard[-68:-52], "<u8")
    chunk = shard[int(offset) : int(offset + length)]
    for field, value in ((4, 2**31), (12, 2**20)):  # the length it unpacks to; the length it has
        forged = bytearray(chunk)
        forged[field : field + 4] = value.to_bytes(4, "little")
        crc = google_crc32c.value(bytes(forged[:-4]))
        forged[-4:] = crc.to_bytes(4, "little")
        path.write_bytes(bytes(shard[: int(offset)] + forged + shard[int(offset + length) :]))
        values = unseal(marker.read_bytes(), "m")
        values["files"][name]["crc32c"][0] = crc
        marker.write_bytes(seal(values))
        with pytest.raises(UserError, match="do not have the length of a chunk"):
            LabelStore.open(store.url).reader.crop_labels(0)


def test_fill_values_in_a_finished_unit_are_not_served(store):
    """A whole unit of fill values with right checksums, as a tool other than repcon might leave it."""
    unit = store.units()[1]
    write(store, unit, list(unit.rows))
    path = Path(store.url) / f"done/{unit.name}.json"
    path.write_bytes(seal(unseal(path.read_bytes(), "m") | {"missing": []}))
    with pytest.raises(UserError, match="never written"):
        LabelStore.open(store.url).reader.crop_labels(0)
