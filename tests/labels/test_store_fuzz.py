"""What a stranger may hand us as a store: any manifest, completion record, zarr.json or shard, with right seals.

Property: a UserError or the labels that were written, within bounds of memory and time, and never another exception.
"""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from store_builder import expected, fill, spec, teacher_metadata

from repcon.commands import inspect, verify
from repcon.config import InspectConfig, VerifyConfig
from repcon.labels.manifest import seal, unseal
from repcon.labels.store import LabelStore
from repcon.runtime.errors import UserError

SECONDS, BYTES = 20, 2**30
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
OTHER_ZARR = ["zarr.json", "heads/wide/zarr.json", "crops/box/zarr.json", "heads/small/logp/zarr.json"]
MARKER, SHARD, ZARR = "done/part-0-crop-0-row-6.json", "heads/wide/ids/c/0/1/0", "heads/wide/ids/zarr.json"

NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 1, 2**16, 2**31, 2**32 - 1, 2**63, 2**64, 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
)
WORDS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "..", "\ud800", "\udcff", "a\x1b[31m", "big", "fp8", "x" * 9999])
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("honest") / "labels.zarr"
    teachers = (teacher_metadata("wide", 30), teacher_metadata("small", 4))
    fill(LabelStore.create(str(url), spec(images=10, crops=2, rows_per_shard=6, teachers=teachers)))
    inspect.run(InspectConfig(store=str(url)))  # which imports what it needs, outside of the bounds
    verify.run(VerifyConfig(store=str(url)))
    return url


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Within `SECONDS` of computing, and with at most `BYTES` of address space more than is taken now."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, lambda *given: pytest.fail(f"took more than {SECONDS} s"))
    resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Errors that the command line shows in one line: ours, and the system's where they name their file."""
    try:
        yield
    except UserError as error:
        assert str(error).encode(errors="strict")
    except OSError as error:
        if not error.errno or not error.filename:
            raise


def use(url: Path, honest: Path) -> bool:
    """Reads, inspects and verifies the store; True where `verify` calls it sound.

    Labels that are served must be those that were written.
    """
    truth = LabelStore.open(str(honest))
    try:
        with bounded(), told():
            store = LabelStore.open(str(url))
            for crop in range(min(store.crops, 2)):
                crop_labels = store.reader.crop_labels(crop)
                for name in set(store.heads) & set(truth.heads):
                    np.testing.assert_array_equal(crop_labels.labels[name][0], expected(truth, crop, name)[0])
        with bounded(), told():
            inspect.run(InspectConfig(store=str(url)))
        with bounded():
            verify.run(VerifyConfig(store=str(url)))
        return True
    except UserError:
        return False


def copy(honest: Path, tmp_path: Path) -> Path:
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    return Path(shutil.copytree(honest, tmp_path / "s"))


def paths_of(value: Any, place: tuple = ()) -> list[tuple]:
    """Every place in a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(path for key, held in children for path in paths_of(held, (*place, key)))]


def put(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = put(value[path[0]], path[1:], new)
    return changed


def forged(url: Path, name: str, path: tuple, new: Any) -> bool:
    """Puts `new` at a place of a sealed file, and seals it again; False where that changes nothing."""
    held = unseal((url / name).read_bytes(), name)
    changed = put(held, path, new)
    if not isinstance(changed, dict) or json.dumps(changed, sort_keys=True) == json.dumps(held, sort_keys=True):
        return False
    (url / name).write_bytes(seal(changed))
    return True


FREE = ("licence", "versions", "model", "source", "reasons")
"""What decides nothing about the labels as they lie there; an empty `source` is that of older stores."""


@FUZZ
@given(st.data())
def test_any_manifest(honest: Path, tmp_path: Path, data: st.DataObject) -> None:
    url = copy(honest, tmp_path)
    path = data.draw(st.sampled_from(paths_of(unseal((honest / "manifest.json").read_bytes(), "m"))))
    if forged(url, "manifest.json", path, data.draw(VALUES)) and not set(path) & set(FREE):
        assert not use(url, honest)
    else:
        use(url, honest)


@FUZZ
@given(st.data())
def test_any_completion_record(honest: Path, tmp_path: Path, data: st.DataObject) -> None:
    url = copy(honest, tmp_path)
    path = data.draw(st.sampled_from(paths_of(unseal((honest / MARKER).read_bytes(), "m"))))
    if forged(url, MARKER, path, data.draw(VALUES)) and not set(path) & set(FREE):
        assert not use(url, honest)
    else:
        use(url, honest)


def pinned(url: Path, name: str, data: bytes) -> None:
    """Puts the bytes in the place of a `zarr.json`, with the hash that the manifest then has."""
    (url / name).write_bytes(data)
    held = unseal((url / "manifest.json").read_bytes(), "m")
    held["metadata"][name] = hashlib.sha256(data).hexdigest()
    (url / "manifest.json").write_bytes(seal(held))


@FUZZ
@given(
    st.sampled_from([ZARR, "zarr.json", "heads/wide/zarr.json", "crops/box/zarr.json", "heads/small/logp/zarr.json"]),
    st.data(),
)
def test_any_zarr_json_is_unsound_unless_it_means_the_same(
    honest: Path, tmp_path: Path, name: str, data: st.DataObject
) -> None:
    url = copy(honest, tmp_path)
    held = json.loads((honest / name).read_bytes())
    changed = put(held, data.draw(st.sampled_from(paths_of(held))), data.draw(VALUES))
    try:
        content = json.dumps(changed).encode()
    except ValueError:
        return
    pinned(url, name, content)
    sound = use(url, honest)
    same = json.dumps(changed, sort_keys=True) == json.dumps(held, sort_keys=True)
    optional = isinstance(changed, dict) and {
        key for key in {*held, *changed} if changed.get(key) != held.get(key)
    } <= {"attributes", "storage_transformers", "consolidated_metadata"}
    assert sound == same or (sound and optional)


@FUZZ
@given(st.binary(max_size=200), st.sampled_from([SHARD, "crops/flip/c/0/1", "heads/small/logp/c/0/1/0"]))
@example(b"", SHARD)
@example(bytes(8) + b"\x8c\x28\xb2\x8a", SHARD)
@example(bytes(16), SHARD)
def test_any_shard_with_a_record_that_agrees(honest: Path, tmp_path: Path, content: bytes, name: str) -> None:
    url = copy(honest, tmp_path)
    (url / name).write_bytes(content)
    held = unseal((url / MARKER).read_bytes(), "m")
    held["files"][name] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (url / MARKER).write_bytes(seal(held))
    assert not use(url, honest)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.next.json", MARKER, SHARD, ZARR, "zarr.json", "done"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to itself", "a terabyte", "nothing", "not JSON", "deep"])
def test_anything_in_the_place_of_a_file(honest: Path, tmp_path: Path, name: str, kind: str) -> None:
    url = copy(honest, tmp_path)
    path = url / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        path.write_bytes({"not JSON": b"\xff{", "deep": b"[" * 10**5}.get(kind, b""))
        if kind == "a terabyte":
            os.truncate(path, 2**40)
    assert not use(url, honest)


@pytest.mark.parametrize("depth", [100, 300, 900])
def test_deep_values_in_a_sealed_file(honest: Path, tmp_path: Path, depth: int) -> None:
    deep: Any = 1
    for _ in range(depth):
        deep = [deep]
    for name, path in (
        ("manifest.json", ("crop_recipe",)),
        ("manifest.json", ("teachers", 0, "preprocessing")),
        (MARKER, ("files",)),
    ):
        url = copy(honest, tmp_path)
        with contextlib.suppress(RecursionError):
            forged(url, name, path, {"deep": deep})
            assert not use(url, honest)


def test_as_many_teachers_parts_and_units_as_a_manifest_can_hold(honest: Path, tmp_path: Path) -> None:
    held = unseal((honest / "manifest.json").read_bytes(), "m")
    one = held["teachers"][0]
    many = [one | {"name": f"t{number}"} for number in range(1200)]
    parts = [{"heads": [teacher["name"]], "crops": [0, 2], "boxes": not number} for number, teacher in enumerate(many)]
    for changes in (
        {"teachers": many, "parts": parts},
        {"parts": held["parts"] * 3000},
        {"images": 2**36, "rows_per_shard": 2**20, "crops": 2**16, "parts": [held["parts"][0] | {"crops": [0, 2**16]}]},
        {"images": 2**18, "rows_per_shard": 1, "crops": 2, "crops_per_shard": 2},
    ):
        url = copy(honest, tmp_path)
        (url / "manifest.json").write_bytes(seal(held | changes))
        assert not use(url, honest)
