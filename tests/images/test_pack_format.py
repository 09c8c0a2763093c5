"""The index and manifest of a pack from a stranger: bounded, checked, and never code."""

import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest

from repcon.images import format as pack_format
from repcon.images.format import COLUMNS, KEY_TEXT, Keys, Manifest
from repcon.runtime.errors import UserError


def columns_of(count: int = 3) -> dict[str, np.ndarray]:
    keys = [f"Klasse ä/{number}".encode() for number in range(count)]
    generator = np.random.default_rng(0)
    return {
        "shard": np.zeros(count, "<i4"),
        "offset": np.arange(count, dtype="<i8") * 1000 + 512,
        "length": np.full(count, 400, "<i4"),
        "size": np.full((count, 2), 20, "<i4"),
        "hash": generator.integers(0, 256, (count, 16), dtype=np.uint8),
        "label": np.arange(count, dtype="<i4") - 1,
        "key_end": np.cumsum([len(key) for key in keys]).astype("<i8"),
        KEY_TEXT: np.frombuffer(b"".join(keys), np.uint8),
    }


def manifest_of(columns: dict[str, np.ndarray], **changes: object) -> Manifest:
    values = {
        "images": len(columns["shard"]),
        "classes": ("a", "b"),
        "shard_bytes": (10_000,),
        "index_sha256": "",
        "fingerprint": pack_format.fingerprint(columns["hash"], columns["size"]),
        "settings": {},
        "summary": {},
    }
    return Manifest(**{**values, **changes})


def test_columns_are_read_only_also_without_images() -> None:
    for count in (0, 3):
        back = pack_format.load_index(pack_format.dump_index(columns_of(count)), "pack")
        assert len(back["shard"]) == count and not any(column.flags.writeable for column in back.values())


def test_index_and_manifest_come_back_equal() -> None:
    columns = columns_of()
    data = pack_format.dump_index(columns)
    back = pack_format.load_index(data, "pack")
    assert all((back[name] == columns[name]).all() and back[name].dtype == columns[name].dtype for name in columns)
    assert pack_format.dump_index(back) == data
    assert np.load(io.BytesIO(data), allow_pickle=False)["size"].shape == (3, 2)
    manifest = manifest_of(columns)
    assert pack_format.load_manifest(manifest.dump().encode(), "pack") == manifest
    pack_format.validate(back, manifest, "pack")
    keys = Keys(back)
    assert list(keys) == ["Klasse ä/0", "Klasse ä/1", "Klasse ä/2"] and keys[-1] == keys[2] == keys[1:][1]
    with pytest.raises(IndexError):
        keys[3]


def test_the_fingerprint_is_frozen() -> None:
    columns = columns_of()
    frozen = "b82ea910f3f65b3cb8b3fe1ea0b904c4d7b8adc7de1055ba3b9f3678be284003"
    assert pack_format.fingerprint(columns["hash"], columns["size"]) == frozen


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("shard", -1),
        ("shard", 1),
        ("offset", -1),
        ("offset", 9_700),
        ("offset", 2**63 - 1),
        ("length", 0),
        ("length", -5),
        ("length", 2**31 - 1),
        ("size", 0),
        ("size", 65_536),
        ("size", 60_000),
        ("label", -2),
        ("label", 2),
        ("key_end", 2**62),
        ("key_end", -1),
    ],
)
def test_numbers_out_of_bounds_are_found(column: str, value: int) -> None:
    columns = columns_of()
    columns[column] = columns[column].copy()
    columns[column][1] = value
    with pytest.raises(UserError, match=f"{column}.* out of bounds"):
        pack_format.validate(columns, manifest_of(columns), "pack")


@pytest.mark.parametrize(
    "changes", [{"shard_bytes": (10**400,)}, {"shard_bytes": (-1,)}, {"shard_bytes": ()}, {"images": 4}]
)
def test_a_manifest_that_does_not_fit_is_found(changes: dict[str, object]) -> None:
    columns = columns_of()
    with pytest.raises(UserError, match="damaged"):
        pack_format.validate(columns, manifest_of(columns, **changes), "pack")


def test_another_index_is_found() -> None:
    columns, manifest = columns_of(), manifest_of(columns_of())
    columns["hash"] = columns["hash"][::-1]
    with pytest.raises(UserError, match="fingerprint"):
        pack_format.validate(columns, manifest, "pack")


def crafted(name: str, header: dict[str, object], body: bytes = b"", kind: int = zipfile.ZIP_STORED) -> bytes:
    """An index whose column `name` has this header."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for column, values in columns_of().items():
            array = io.BytesIO()
            np.lib.format.write_array(array, values, version=(1, 0))
            if column == name:
                array = io.BytesIO()
                np.lib.format.write_array_header_1_0(array, header)
                array.write(body)
            archive.writestr(f"{column}.npy", array.getvalue(), kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "header",
    [
        {"descr": "<i8", "fortran_order": False, "shape": (10**18,)},
        {"descr": "<i8", "fortran_order": False, "shape": (10**18, 10**18)},
        {"descr": "<i8", "fortran_order": False, "shape": (-1,)},
        {"descr": "<i8", "fortran_order": False, "shape": (4,)},
        {"descr": "<i8", "fortran_order": True, "shape": (3,)},
        {"descr": "<f8", "fortran_order": False, "shape": (3,)},
        {"descr": "|O", "fortran_order": False, "shape": (3,)},
        {"descr": ">i8", "fortran_order": False, "shape": (3,)},
    ],
)
def test_claims_of_size_allocate_nothing(header: dict[str, object]) -> None:
    data = crafted("offset", header, bytes(24))
    tracemalloc.start()
    with pytest.raises(UserError, match="offset claims"):
        pack_format.load_index(data, "pack")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_compressed_missing_and_damaged_indices_are_refused() -> None:
    fine = {"descr": "<i8", "fortran_order": False, "shape": (3,)}
    data = pack_format.dump_index(columns_of())
    assert pack_format.load_index(crafted("offset", fine, bytes(24)), "pack")["offset"].tolist() == [0, 0, 0]
    flipped = bytearray(data)
    flipped[170] ^= 1
    for bad in (crafted("offset", fine, bytes(24), zipfile.ZIP_DEFLATED), data[:-100], b"", b"PK", bytes(flipped)):
        with pytest.raises(UserError, match="damaged"):
            pack_format.load_index(bad, "pack")
    only = io.BytesIO()
    np.savez(only, shard=np.zeros(3, "<i4"))
    with pytest.raises(UserError, match="damaged"):
        pack_format.load_index(only.getvalue(), "pack")
    uneven = columns_of() | {"label": np.zeros(2, "<i4")}
    with pytest.raises(UserError, match="column label"):
        pack_format.load_index(pack_format.dump_index(uneven), "pack")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[]", "is not that of a pack"),
        (b'{"kind": "repcon store"}', "is not that of a pack"),
        (b'{"kind": "repcon pack", "format": 2}', "a pack of format 2, this version reads 1"),
        (b'{"kind": "repcon pack", "format": 1, "images": "3"}', "expected int, not '3' @ images;"),
        (b'{"kind": "repcon pack", "format": 1, "images": 3, "classes": [1]}', r"expected str, not 1 @ classes\[0\]"),
    ],
)
def test_manifests_of_something_else_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack_format.load_manifest(data, "pack")


def test_every_field_of_the_manifest_is_needed() -> None:
    values = json.loads(manifest_of(columns_of()).dump())
    for name in set(values) - {"kind", "format"}:
        with pytest.raises(UserError, match=name):
            pack_format.load_manifest(json.dumps({**values, name: None}).encode(), "pack")
    assert set(COLUMNS) < set(columns_of())


def test_short_memory_is_no_damage_and_a_long_header_no_short_memory(monkeypatch):
    """Python's parser answers a header of 9,000 signs with a MemoryError."""
    index = io.BytesIO()
    with zipfile.ZipFile(index, "w") as archive:
        header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (" + b"-" * 9_000 + b"1,)}\n"
        archive.writestr("shard.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(UserError, match="damaged"):
        pack_format.load_index(index.getvalue(), "here")

    def short(*_: object) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(pack_format, "_column", short)
    with pytest.raises(MemoryError):
        pack_format.load_index(pack_format.dump_index(columns_of()), "here")
