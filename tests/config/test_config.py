import tomllib
from pathlib import Path

import pytest

from repcon.config import (
    CropConfig,
    EvaluateConfig,
    HeadConfig,
    PrecomputeConfig,
    TeacherConfig,
    TrainConfig,
    dump,
    parse,
    read_toml,
    to_plain,
)
from repcon.runtime.errors import UserError
from repcon.runtime.untrusted import UnreadableError, parse_toml

COMPLETE = 'pack = "p"\nstore = "s"\nout = "o"\n'


def recipe(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def load(kind, path):
    return parse(kind, read_toml(path), str(path))


def test_what_is_written_reads_back_equal(tmp_path):
    config = TrainConfig(pack="p", store="s", out="o", heads=(HeadConfig(name="birds", weight=0.25),), size=96)
    assert load(TrainConfig, recipe(tmp_path, dump(config))) == config


def test_whole_numbers_serve_as_floats(tmp_path):
    config = load(TrainConfig, recipe(tmp_path, COMPLETE + "[optim]\nlr = 1\n"))
    assert config.optim.lr == 1.0


def test_tuples_keep_their_length(tmp_path):
    with pytest.raises(UserError, match="scale"):
        load(CropConfig, recipe(tmp_path, "scale = [0.1]\n"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epoch = 3\n", "unknown key epoch"),
        ('epochs = "3"\n', "epochs"),
        ("epochs = true\n", "epochs"),
        ("epochs = 3.5\n", "epochs"),
        ('tail = "buckets"\n', "tail"),
        ('[[heads]]\nname = "a"\nweigth = 2\n', "heads[0]"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path, text, named):
    path = recipe(tmp_path, COMPLETE + text)
    with pytest.raises(UserError) as caught:
        load(TrainConfig, path)
    assert named in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        (EvaluateConfig, 'backbones = "a=b"\n', "expected a list, not 'a=b' @ backbones"),
        (PrecomputeConfig, "temperatures = 2.0\n", "expected a list, not 2.0 @ temperatures"),
        (PrecomputeConfig, '[teachers]\nname = "a"\n', "double brackets, as in [[teachers]]"),
        (PrecomputeConfig, 'codec = "zip"\n', "expected one of auto, zstd, lz4 @ codec"),
    ],
)
def test_what_would_have_been_right_is_told(tmp_path, kind, text, told):
    with pytest.raises(UserError) as caught:
        load(kind, recipe(tmp_path, text))
    assert told in str(caught.value)


def test_every_mistake_is_told_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        load(TrainConfig, recipe(tmp_path, 'pack = "p"\nout = "o"\nepoch = 3\nsize = "x"\n'))
    assert all(word in str(caught.value) for word in ("epoch", "size", "store"))


def test_of_very_many_mistakes_the_first_are_told():
    with pytest.raises(UserError, match=r"heads\[19\]\.name; and 980 more$"):
        parse(TrainConfig, {"pack": "p", "store": "s", "out": "o", "heads": [{"name": 1}] * 1000}, "recipe")


def test_of_very_long_names_the_beginning_is_told():
    values = {"pack": "p", "store": "s", "out": "o"} | {f"unknown {number}": 1 for number in range(10_000)}
    with pytest.raises(UserError, match=r"unknown key unknown 0, unknown 1, .*…$") as caught:
        parse(TrainConfig, values, "recipe")
    assert len(str(caught.value)) < 2_100


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text", ["a" + ".a" * 40_000 + " = 1", "[a" + " . 'a'" * 200_000 + "]", "a = [1]  #" + " " * 2**24]
)
def test_a_recipe_that_would_take_minutes_to_parse_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"nested too deeply|larger than 16 MiB"):
        load(TrainConfig, recipe(tmp_path, text))
    with pytest.raises(UnreadableError, match=r"nested too deeply|larger than 16 MiB"):
        parse_toml(text)


DOTTED = ".".join(["k"] * 40)


@pytest.mark.parametrize(
    "text", [f"# {DOTTED}", f'a = "{DOTTED}"', f"a = ['{DOTTED}']", f'a = """\n{DOTTED}"""', f'"{DOTTED}" = 1']
)
def test_dots_outside_of_keys_do_not_nest(text):
    assert parse_toml(text) == tomllib.loads(text)


@pytest.mark.parametrize(
    "before",
    ["", "# don't\n", "a = '#'\n", 'a = "\\""\n', 'a = """x""""\n', 'a = """\\\\"""\n', "a = '''x\\'''\n", "a = ''\n"],
)
def test_keys_after_texts_nest(before):
    tomllib.loads(before)
    for key in (DOTTED, " . ".join(["'#'"] * 40), ".".join(['""'] * 40)):
        with pytest.raises(UnreadableError, match="nested too deeply"):
            parse_toml(f"{before}{key} = 1")


def test_settings_given_as_dataclasses_may_hold_paths():
    teacher = TeacherConfig(name="a", model=Path("folder"))  # pyright: ignore[reportArgumentType]
    values = to_plain({"pack": Path("p"), "out": "o", "teachers": [teacher], "k": 3})
    assert parse(PrecomputeConfig, values, "recipe").teachers == (TeacherConfig(name="a", model="folder"),)


def test_a_file_that_is_no_toml(tmp_path):
    with pytest.raises(UserError, match="not valid TOML"):
        load(TrainConfig, recipe(tmp_path, "pack = \n"))
    with pytest.raises(UserError, match="cannot read"):
        load(TrainConfig, tmp_path / "absent.toml")
