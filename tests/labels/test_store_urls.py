"""Stores by URL: an object store through s3fs, and zarr-python on the same URL."""

import fsspec
import numpy as np
import pytest
import zarr
from store_builder import create_and_fill, expected, spec, teacher_metadata, write

from repcon.labels.store import LabelStore
from repcon.runtime.errors import UserError

moto_server = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def bucket():
    """A bucket on moto's own S3 server, reached as a user's would be: through fsspec's configuration."""
    server = moto_server.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}", "use_listings_cache": False}
    before = dict(fsspec.config.conf)
    fsspec.config.conf["s3"] = options
    fsspec.filesystem("s3").mkdir("labels")
    yield "s3://labels", options
    fsspec.config.conf.clear()
    fsspec.config.conf.update(before)
    server.stop()


def test_a_store_lives_in_a_bucket(bucket):
    root, options = bucket
    url = f"{root}/a/labels.zarr"
    create_and_fill(url)
    store = LabelStore.open(url)
    assert store.completion.unfinished() == []
    for crop_labels in store.reader.iter_crop_labels(range(4)):
        for name, (ids, logp) in crop_labels.labels.items():
            np.testing.assert_array_equal(ids, expected(store, crop_labels.crops[0], name)[0])
            np.testing.assert_array_equal(logp, expected(store, crop_labels.crops[0], name)[1])
    group = zarr.open_group(url, mode="r", storage_options=options)
    np.testing.assert_array_equal(group["heads/wide/ids"][1], store.reader.crop_labels(1).labels["wide"][0])


def test_a_run_in_a_bucket_is_resumed_and_extended(bucket):
    url = f"{bucket[0]}/b"
    store = LabelStore.create(url, spec())
    write(store, store.units()[1])
    resumed = LabelStore.create(url, spec())
    assert [unit.rows.start for unit in resumed.completion.unfinished()] == [0, 80]
    create_and_fill(url)
    resumed.append_teachers([teacher_metadata("third", 9)])
    assert len(LabelStore.open(url).completion.unfinished()) == 3


def test_a_damaged_object_is_named(bucket):
    url = f"{bucket[0]}/c"
    create_and_fill(url)
    files = fsspec.filesystem("s3")
    name = "labels/c/heads/wide/logp/c/0/1/0"
    data = bytearray(files.cat_file(name))
    data[50] ^= 1
    files.pipe_file(name, bytes(data))
    with pytest.raises(UserError, match="heads/wide/logp/c/0/1/0: the checksum"):
        LabelStore.open(url).reader.crop_labels(0)


def test_no_store_in_the_bucket(bucket):
    with pytest.raises(UserError, match="no label store here"):
        LabelStore.open(f"{bucket[0]}/nothing")
