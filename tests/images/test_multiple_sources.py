"""Several sources in one pack, and a limit on how many images are taken."""

from pathlib import Path

import pytest
import simplejpeg
from pictures import photograph

from repcon import cli
from repcon.commands import pack as packing
from repcon.config import PackConfig
from repcon.images.pack import ImagePack
from repcon.images.sources import list_sources, split_limit
from repcon.runtime.errors import UserError


def folder_of(root: Path, classes: dict[str, int], seed: int) -> Path:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            seed += 1
            pixels = photograph(seed, 32, 24)
            (root / name / f"{number}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, quality=90))
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ten images of cats and dogs, three of dogs and owls; both folders end in `set.v1`."""
    root = tmp_path_factory.mktemp("several")
    first = folder_of(root / "a" / "set.v1", {"cat": 5, "dog": 5}, 100)
    return first, folder_of(root / "b" / "set.v1", {"dog": 2, "owl": 1}, 200)


def test_classes_of_one_name_are_one_and_keys_tell_the_sources_apart(two: tuple[Path, Path], tmp_path: Path) -> None:
    packing.run(PackConfig(source=tuple(map(str, two)), out=str(tmp_path / "pack")))
    pack = ImagePack.open(tmp_path / "pack")
    assert pack.classes == ("cat", "dog", "owl")
    assert [pack.classes[label] for label in pack.labels] == ["cat"] * 5 + ["dog"] * 5 + ["dog"] * 2 + ["owl"]
    keys = list(pack.keys)
    assert keys[0] == "set_v1/cat/0" and keys[-1] == "set_v1~2/owl/0" and len(set(keys)) == 13


def test_classes_that_may_not_be_one_and_names_that_may_be_are_said(tmp_path: Path) -> None:
    numbered = [folder_of(tmp_path / name, {"0": 1, "1": 1}, 300 + 10 * len(name)) for name in ("a", "bb")]
    assert "classes are numbers in several sources" in list_sources(tuple(map(str, numbered))).warnings[0]
    spelt = [folder_of(tmp_path / name, {name: 1, "owl": 1}, 400 + ord(name[0])) for name in ("Cat", "cat")]
    assert "case, spaces, encoding or zeros: 'Cat', 'cat'" in list_sources(tuple(map(str, spelt))).warnings[0]


def test_a_limit_takes_equal_shares_spread_over_each_source(two: tuple[Path, Path]) -> None:
    listing = list_sources(tuple(map(str, two)), 7)
    taken = [listing.classes[item.label] for item in listing.items]
    assert taken == ["cat", "cat", "dog", "dog", "dog", "dog", "owl"]
    alone = list_sources(str(two[0]), 4)
    assert [alone.classes[item.label] for item in alone.items] == ["cat", "cat", "dog", "dog"]


def test_shares() -> None:
    assert split_limit([10, 3], 0) == [10, 3] and split_limit([10, 3], 13) == [10, 3]
    assert split_limit([10, 3], 4) == [2, 2] and split_limit([3, 10, 10], 12) == [3, 4, 5]
    assert sum(split_limit([1, 100, 7], 50)) == 50


def test_another_limit_is_another_pack(two: tuple[Path, Path], tmp_path: Path) -> None:
    packing.run(PackConfig(source=str(two[0]), out=str(tmp_path / "pack"), limit=4))
    assert packing.run(PackConfig(source=str(two[0]), out=str(tmp_path / "pack"), limit=4))["images"] == 4
    for limit in (0, 5):
        with pytest.raises(UserError, match="other files"):
            packing.run(PackConfig(source=str(two[0]), out=str(tmp_path / "pack"), limit=limit))


def test_a_source_named_twice_or_missing_is_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="named twice"):
        list_sources((str(two[0]), f"{two[0]}/../set.v1"))
    with pytest.raises(UserError, match="no such folder"):
        packing.run(PackConfig(source=(str(two[0]), str(tmp_path / "gone")), out=str(tmp_path / "pack")))
    with pytest.raises(UserError, match="lies inside"):
        packing.run(PackConfig(source=tuple(map(str, two)), out=str(two[1] / "pack")))
    assert not (tmp_path / "pack").exists()


def test_the_command_line_takes_several_with_flags_anywhere(two: tuple[Path, Path], tmp_path: Path) -> None:
    kind = PackConfig
    wanted = PackConfig(source=("a", "b", "c"), out="out", limit=3, ffcv=True)
    for words in ("a b c out --limit 3 --ffcv", "--limit 3 a b --ffcv c out", "--ffcv a --limit=3 b c out"):
        assert cli._settings("pack", kind, words.split(), None) == wanted
    assert cli._settings("pack", kind, ["a", "out"], None) == PackConfig(source="a", out="out")
    assert cli.main(["pack", *map(str, two), str(tmp_path / "pack"), "--limit", "6", "--num-workers", "1"]) == 0
    assert len(ImagePack.open(tmp_path / "pack")) == 6
