"""config.json of strangers: a model that is what it says, or one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repcon.models.factory import create_model
from repcon.models.identity import class_names_of
from repcon.models.preprocessing import preprocessing_of
from repcon.models.saved_model import CONFIG, WEIGHTS, save_model, saved_class_names, saved_extra
from repcon.runtime.errors import UserError

KEYS = (
    "architecture", "num_classes", "num_features", "label_names", "label_descriptions", "pretrained_cfg", "model_args",
    "repcon", "global_pool", "input_size", "mean", "std", "crop_pct", "interpolation", "fixed_input_size", "classifier",
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just([3, 10**9, 10**9]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    import timm

    network = timm.create_model("test_byobnet", pretrained=False, num_classes=3)
    save_model(network, made, classes=["a", "b", "c"], preprocessing=preprocessing_of(network), extra={})
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changed=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2),
    inner=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2),
)
def test_any_config_is_a_model_or_one_line(
    changed: dict[str, Any], inner: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    held = json.loads((folder / CONFIG).read_text())
    held["pretrained_cfg"] = held["pretrained_cfg"] | inner
    (tmp_path / CONFIG).write_text(json.dumps(held | changed))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    try:
        network = create_model(str(tmp_path))
        preprocessing_of(network)
        class_names_of(network)
        saved_extra(tmp_path)
        saved_class_names(tmp_path)
    except UserError:
        return
    ours = {key: value for key, value in network.state_dict().items()}
    theirs = create_model(str(folder)).state_dict()
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=40) | st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"[]", b'"x"']))
def test_any_bytes_are_a_config_or_one_line(data: bytes, folder: Path, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes(data)
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    for read in (create_model, saved_extra, saved_class_names):
        with pytest.raises(UserError, match=str(tmp_path)):
            read(str(tmp_path))


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"label_names": ["a", "c", "b"], "pretrained_cfg": {"label_names": ["a", "b", "c"]}}, "are not the same"),
        ({"num_classes": 4}, "several numbers of classes"),
        ({"num_classes": 10**9}, "num_classes = 1,000,000,000 makes no sense"),
        ({"model_args": {"num_classes": 10**9}}, "model_args.num_classes = 1,000,000,000 makes no sense"),
        ({"model_args": {"stem_chs": 10**40}}, "model_args.stem_chs = so large a number makes no sense"),
        ({"model_args": {"drop_path_rate": -1e300}}, "model_args.drop_path_rate = so large a number makes no sense"),
        ({"model_args": {"x": [[[[[[[[[[[[1]]]]]]]]]]]]}}, "nested too deeply"),
        ({"model_args": {"x": [1] * 2000}}, "too many values"),
        ({"model_args": {"num_features": 4096, "num_classes": 4096}}, "is of [0-9,]* numbers and its weights hold"),
    ],
)
def test_a_config_that_asks_for_more_than_its_weights_is_refused(
    changed: dict[str, Any], says: str, folder: Path, tmp_path: Path
) -> None:
    """Before any memory is taken."""
    held = json.loads((folder / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(held | changed))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    with pytest.raises(UserError, match=says):
        create_model(str(tmp_path))


def test_arguments_that_fit_the_weights_build_the_model(tmp_path: Path) -> None:
    import timm

    network = timm.create_model("test_vit", pretrained=False, num_classes=3, img_size=64, depth=2)
    arguments = {"img_size": 64, "depth": 2}
    config = {"architecture": "test_vit", "num_classes": 3, "model_args": arguments, "pretrained_cfg": {}}
    save_model(network, tmp_path, classes=[], preprocessing=preprocessing_of(network, 64), extra={})
    (tmp_path / CONFIG).write_text(json.dumps(json.loads((tmp_path / CONFIG).read_text()) | config))
    assert len(create_model(str(tmp_path)).blocks) == 2
