import numpy as np
import pytest
import zarr
from store_builder import fill, spec

from repcon.labels.store import LabelStore
from repcon.runtime.errors import UserError


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("values", ["float16", "quantized8"])
@pytest.mark.parametrize(("images", "rows_per_shard", "crops"), [(100, 40, 6), (64, 64, 1), (65, 64, 16), (9, 1024, 2)])
def test_every_codec_reads_as_zarr_python_reads_it(tmp_path, codec, values, images, rows_per_shard, crops):
    facts = spec(codec=codec, values=values, images=images, rows_per_shard=rows_per_shard, crops=crops)
    store = fill(LabelStore.create(str(tmp_path / "s"), facts))
    group = zarr.open_group(store.url, mode="r")
    for crop in range(crops):
        crop_labels = store.reader.crop_labels(crop)
        np.testing.assert_array_equal(group["crops/box"][crop], crop_labels.boxes)
        np.testing.assert_array_equal(group["crops/flip"][crop], crop_labels.flips)
        for name, (ids, logp) in crop_labels.labels.items():
            np.testing.assert_array_equal(group[f"heads/{name}/ids"][crop], ids)
            if values == "float16":
                np.testing.assert_array_equal(group[f"heads/{name}/logp"][crop], logp)
            else:
                from repcon.labels import quantize

                head, decoded = store.heads[name], np.empty_like(logp)
                quantize.decode(group[f"heads/{name}/gaps"][crop], head.k, head.classes, head.temperatures, decoded)
                np.testing.assert_array_equal(decoded, logp)


def test_arrays_are_what_the_format_promises(tmp_path):
    store = fill(LabelStore.create(str(tmp_path / "s"), spec()))
    group = zarr.open_group(store.url, mode="r")
    ids, logp = group["heads/wide/ids"], group["heads/wide/logp"]
    assert (ids.shape, ids.dtype, ids.fill_value) == ((4, 100, 5), np.uint16, 65_535)
    assert (logp.shape, logp.dtype) == ((4, 100, 7), np.float16) and np.isnan(logp.fill_value)
    assert (ids.chunks, ids.shards) == ((1, 40, 5), (4, 40, 5))
    codecs = [codec["name"] for codec in ids.metadata.to_dict()["codecs"][0]["configuration"]["codecs"]]
    assert codecs == ["bytes", "blosc", "crc32c"]


def test_ids_of_a_very_wide_head_are_uint32(tmp_path):
    from store_builder import teacher_metadata

    facts = spec(teachers=(teacher_metadata("huge", 70_000),), images=6, crops=1)
    store = fill(LabelStore.create(str(tmp_path / "s"), facts))
    assert store.reader.crop_labels(0).labels["huge"][0].dtype == np.uint32
    assert zarr.open_group(store.url, mode="r")["heads/huge/ids"].fill_value == 2**32 - 1


def test_a_slab_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    store = fill(LabelStore.create(str(tmp_path / "s"), spec()))
    monkeypatch.setattr("repcon.labels.reader.memory_total", lambda: 1000)
    with pytest.raises(UserError, match="more than this machine's memory"):
        store.reader.crop_labels(0)
