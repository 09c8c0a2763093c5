import dataclasses
import json

import pytest
from store_builder import spec, teacher_metadata

from repcon.labels import manifest as store_manifest
from repcon.labels.manifest import Part, manifest_of, read_manifest, seal, unseal, write_manifest
from repcon.runtime.errors import UserError


def test_what_is_written_reads_back_equal():
    manifest = dataclasses.replace(manifest_of(spec(), "store"), metadata={"zarr.json": "0" * 64})
    assert write_manifest(read_manifest(write_manifest(manifest), "m")) == write_manifest(manifest)


def test_any_changed_byte_of_a_sealed_file_is_found():
    data = seal({"name": 'é "quoted"', "numbers": [1, 2.5, None]})
    assert unseal(data, "x")["numbers"] == [1, 2.5, None]
    for place in range(len(data)):
        for changed in (data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], data[:place] + data[place + 1 :]):
            with pytest.raises(UserError, match="x: damaged"):
                unseal(changed, "x")
    with pytest.raises(UserError, match="damaged"):
        unseal(data + b"\n", "x")


def test_another_format_version_is_refused_by_name():
    data = write_manifest(dataclasses.replace(manifest_of(spec(), "store"), version=2))
    with pytest.raises(UserError, match=r"m: made in format version 2; this repcon reads version 1"):
        read_manifest(data, "m")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"images": ' + b"9" * 9999 + b"}"])
def test_what_is_no_manifest_is_one_clear_error(data):
    with pytest.raises(UserError, match=r"^m: "):
        read_manifest(data, "m")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": 10**18}, "images"),
        ({"images": 0}, "images"),
        ({"images": 2**36, "rows_per_shard": 1}, "shards per array"),
        ({"crops": 10**9}, "crops"),
        ({"k": 0}, "k is 0"),
        ({"temperatures": ()}, "temperatures"),
        ({"temperatures": (1.0, 1.0)}, "temperatures"),
        ({"temperatures": (0.0,)}, "temperatures"),
        ({"teachers": ()}, "teachers"),
        ({"teachers": (teacher_metadata("a", 3), teacher_metadata("A", 3))}, "case"),
        ({"teachers": (teacher_metadata("../a", 3),)}, "teacher name"),
        ({"teachers": (teacher_metadata("a", 1),)}, "num_classes"),
        ({"teachers": (teacher_metadata("a", 3, classes=("x", "y")),)}, "2 class names for 3 classes"),
    ],
)
def test_impossible_values_are_refused_in_a_spec_and_in_a_manifest(changes, named):
    with pytest.raises(UserError, match=named):
        manifest_of(spec(**changes), "store")
    honest = manifest_of(spec(), "store")
    with pytest.raises(UserError, match=named):
        read_manifest(write_manifest(dataclasses.replace(honest, **changes)), "m")


def test_unknown_and_missing_keys_are_named():
    values = json.loads(write_manifest(manifest_of(spec(), "store")))
    with pytest.raises(UserError, match="unknown key colour"):
        read_manifest(seal(values | {"colour": 1}), "m")
    del values["codec"]
    with pytest.raises(UserError, match="codec"):
        read_manifest(seal(values), "m")


BOTH = ("wide", "small")


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (Part(heads=("wide",), crops=(0, 4), boxes=True),),
        (Part(heads=BOTH, crops=(0, 4), boxes=False),),
        (Part(heads=BOTH, crops=(0, 8), boxes=True),),
        (
            Part(heads=BOTH, crops=(0, 2), boxes=True),
            Part(heads=BOTH, crops=(2, 4), boxes=True),
        ),
        (Part(heads=("wide", "small", "more"), crops=(0, 4), boxes=True),),
    ],
)
def test_parts_must_cover_every_crop_once(parts):
    with pytest.raises(UserError, match="parts"):
        store_manifest.check(dataclasses.replace(manifest_of(spec(), "store"), parts=parts), "m")


@pytest.mark.parametrize(("crops", "depth"), [(1, 1), (4, 4), (8, 8), (16, 8), (50, 5), (12, 6), (7, 7), (11, 1)])
def test_every_shard_is_full_of_crops(crops, depth):
    assert manifest_of(spec(crops=crops), "store").crops_per_shard == depth


@pytest.mark.parametrize(
    ("images", "rows"), [(10, 10), (500, 128), (8192, 128), (8193, 256), (20_000, 384), (1_281_167, 16_384)]
)
def test_rows_per_shard_follow_the_number_of_images(images, rows):
    assert manifest_of(spec(images=images, rows_per_shard=0), "store").rows_per_shard == rows


def test_many_wide_heads_get_smaller_units():
    teachers = tuple(teacher_metadata(f"t{number}", 1000) for number in range(10))
    manifest = manifest_of(spec(images=10**6, rows_per_shard=0, k=1000, teachers=teachers), "store")
    assert manifest.rows_per_shard == 492  # 10 heads of 1,002 values, 8 crops: 158 MB
    with pytest.raises(UserError, match="rows_per_shard 1048576 is too many for a k of 1000"):
        manifest_of(spec(images=10**7, rows_per_shard=2**20, k=1000, teachers=teachers), "store")


def test_differences_are_named_by_their_path():
    left = {"a": {"b": [1, {"c": 2}]}, "d": None}
    assert store_manifest.difference(left, {"a": {"b": [1, {"c": 2}]}, "d": None}) is None
    found = store_manifest.difference(left, {"a": {"b": [1, {"c": 3}]}, "d": None})
    assert found == "a.b.1.c: the store has 2, this run has 3"
    assert (store_manifest.difference({}, {"e": 1}) or "").startswith("e: the store has None")
