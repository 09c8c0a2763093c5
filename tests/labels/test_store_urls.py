"""Stores by URL: an object store, also through zarr-python, and a plain web server."""

import numpy as np
import object_servers
import pytest
import zarr
from obstore.store import S3Store
from store_builder import create_and_fill, expected, spec, teacher_metadata, write
from zarr.storage import ObjectStore

from repcon.labels.integrity import hierarchy_problems
from repcon.labels.store import LabelStore
from repcon.runtime.errors import UserError

pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket():
    with object_servers.s3_server():
        object_servers.s3_client().create_bucket(Bucket="labels")
        yield "s3://labels"


def test_a_store_lives_in_a_bucket(bucket):
    url = f"{bucket}/a/labels.zarr"
    create_and_fill(url)
    store = LabelStore.open(url)
    assert store.completion.unfinished() == []
    for crop_labels in store.reader.iter_crop_labels(range(4)):
        for name, (ids, logp) in crop_labels.labels.items():
            np.testing.assert_array_equal(ids, expected(store, crop_labels.crops[0], name)[0])
            np.testing.assert_array_equal(logp, expected(store, crop_labels.crops[0], name)[1])
    objects = S3Store.from_url(url, client_options={"allow_http": True})
    group = zarr.open_group(ObjectStore(objects, read_only=True), mode="r")
    np.testing.assert_array_equal(group["heads/wide/ids"][1], store.reader.crop_labels(1).labels["wide"][0])


def test_a_run_in_a_bucket_is_resumed_and_extended(bucket):
    url = f"{bucket}/b"
    store = LabelStore.create(url, spec())
    write(store, store.units()[1])
    resumed = LabelStore.create(url, spec())
    assert [unit.rows.start for unit in resumed.completion.unfinished()] == [0, 80]
    create_and_fill(url)
    resumed.append_teachers([teacher_metadata("third", 9)])
    assert len(LabelStore.open(url).completion.unfinished()) == 3


def test_a_damaged_object_is_named(bucket):
    url = f"{bucket}/c"
    create_and_fill(url)
    client, place = object_servers.s3_client(), {"Bucket": "labels", "Key": "c/heads/wide/logp/c/0/1/0"}
    data = bytearray(client.get_object(**place)["Body"].read())
    data[50] ^= 1
    client.put_object(**place, Body=bytes(data))
    with pytest.raises(UserError, match="heads/wide/logp/c/0/1/0: the checksum"):
        LabelStore.open(url).reader.crop_labels(0)


def test_no_store_in_the_bucket(bucket):
    with pytest.raises(UserError, match="no label store here"):
        LabelStore.open(f"{bucket}/nothing")


def test_a_store_behind_a_web_server_is_read(tmp_path):
    create_and_fill(str(tmp_path / "a b" / "labels.zarr"))
    with object_servers.web_server(tmp_path) as url:
        store = LabelStore.open(f"{url}/a b/labels.zarr")
        assert store.completion.unfinished() == [] and hierarchy_problems(store) == []
        for crop_labels in store.reader.iter_crop_labels(range(4)):
            ids = expected(store, crop_labels.crops[0], "wide")[0]
            np.testing.assert_array_equal(crop_labels.labels["wide"][0], ids)
