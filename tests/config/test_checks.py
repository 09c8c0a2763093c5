"""Settings from anywhere: `~` in every path, no number without sense, and any bytes as a recipe."""

import dataclasses
import inspect
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repcon import config
from repcon.config import base
from repcon.runtime.errors import UserError

KINDS = [kind for _, kind in inspect.getmembers(config, dataclasses.is_dataclass)]
NO_PATHS = {
    "name", "license", "schedule", "ray", "baseline", "student", "title", "temperatures", "loaders", "metrics",
    "datasets", "domains", "heads", "scale", "ratio", "init_weights", "repository",
    "revision", "trackers", "names", "image_column", "label_column",
}  # fmt: skip


def example(kind: Any, **values: Any) -> Any:
    required = [f for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    return kind(**{field.name: () if "tuple" in str(field.type) else "x" for field in required} | values)


def test_every_text_is_known_to_be_a_path_or_none():
    texts = {
        field.name for kind in KINDS for field in dataclasses.fields(kind)
        if "str" in str(field.type) or "tuple" in str(field.type)
    }  # fmt: skip
    assert texts - {"codec", "values"} <= base.PATHS | NO_PATHS
    assert not base.PATHS & NO_PATHS


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_home_folder_is_expanded_in_every_path(kind: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    for field in dataclasses.fields(kind):
        if field.name not in base.PATHS or (field.name == "teachers" and kind is config.PrecomputeConfig):
            continue
        several = "tuple" in str(field.type)
        for text, wanted in (
            ("~", "/home/me"), ("~/a", "/home/me/a"), ("n=~/a", "n=/home/me/a"),
            ("~/a + ~/b", "/home/me/a + /home/me/b"),
            ("a~/b", "a~/b"), ("local-dir:~/a", "local-dir:/home/me/a"), ("s3://b/~/a", "s3://b/~/a"),
        ):  # fmt: skip
            values = {field.name: (text, text) if several else text}
            assert getattr(example(kind, **values), field.name) == ((wanted, wanted) if several else wanted)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_number_is_without_bounds(kind: Any):
    for field in dataclasses.fields(kind):
        if not str(field.type).startswith(("<class 'int'>", "<class 'float'>")):
            continue
        for value in (math.nan, 10**20, -(10**20), 10**400, 1e300):
            with pytest.raises(UserError, match=field.name):
                example(kind, **{field.name: value})
                if math.isinf(base.MAXIMA.get(field.name, 0)) and value is not math.nan:
                    raise UserError(field.name)  # unbounded on purpose
        if not math.isinf(base.MAXIMA.get(field.name, 0)):
            with pytest.raises(UserError, match=field.name):
                example(kind, **{field.name: math.inf})


def test_numbers_in_lists_are_checked_too():
    for values in ({"scale": (0.5, math.nan)}, {"ratio": (1.0, math.inf)}, {"flip": math.nan}):
        with pytest.raises(UserError, match=next(iter(values))):
            config.CropConfig(**values)


def recipe(path: Path, data: bytes) -> dict[str, Any]:
    path.write_bytes(data)
    return config.read_toml(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_recipes_of_other_editors_are_read(encoding: str, tmp_path: Path):
    marks = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}
    data = marks.get(encoding, b"") + 'crops = 1\r\nout = "é 猫"\r\n'.encode(encoding)
    assert recipe(tmp_path / "r.toml", data) == {"crops": 1, "out": "é 猫"}


@pytest.mark.parametrize(
    "data",
    [b"a=" + b"[" * 5000 + b"]" * 5000, b"a=" + b"9" * 5000, b"a.b=" * 3, b"\xff\xfea", b"\xff", b"a" * (17 * 2**20),
     b"a = 0x" + b"f" * 10_000, b"a={" * 3000],
)  # fmt: skip
def test_what_is_no_recipe_is_one_line(data: bytes, tmp_path: Path):
    with pytest.raises(UserError, match=r"r\.toml: ") as told:
        recipe(tmp_path / "r.toml", data)
        config.parse(config.TrainConfig, config.read_toml(tmp_path / "r.toml"), str(tmp_path / "r.toml"))
    assert len(str(told.value)) < 1000


def test_a_recipe_that_is_not_there_or_has_no_name(tmp_path: Path):
    for name in (tmp_path / "none", tmp_path, "a\0b"):
        with pytest.raises(UserError, match="cannot read the recipe"):
            config.read_toml(name)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=80) | st.text(st.sampled_from("abc=[]{}\"'.\n 0159-:TZ#~"), max_size=80).map(str.encode))
def test_any_bytes_are_a_recipe_or_one_line(data: bytes, tmp_path: Path):
    try:
        values = recipe(tmp_path / "r.toml", data)
        config.parse(config.TrainConfig, values, "r.toml")
    except UserError as error:
        assert "r.toml: " in str(error)


VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_values_of_known_keys_are_settings_or_one_line(data: st.DataObject):
    kind = data.draw(st.sampled_from(KINDS))
    names = [field.name for field in dataclasses.fields(kind)]
    values = data.draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=6))
    try:
        made = config.parse(kind, values, "recipe")
    except UserError as error:
        assert str(error).startswith("recipe: ")
        return
    again = config.dump(made)
    assert config.parse(kind, tomllib.loads(again), "recipe") == made
    assert tomli_w.dumps(tomllib.loads(again)) == again
