"""Which member of a sample is its label, which folder is a class, and what is refused or said where that is unclear."""

import os
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from test_archives import PICTURE, tar_of
from test_sources import folder_of

from repcon.images import sources
from repcon.images.sources import SourceListing
from repcon.runtime.errors import UserError


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(pixels)


def listed(path: Path, members: dict[str, bytes]) -> SourceListing:
    return sources.list_source(str(tar_of(path, members)))


def named(listing: SourceListing) -> dict[str, str | None]:
    """File name -> class."""
    return {item.name: listing.classes[item.label] if item.label >= 0 else None for item in listing.items}


def joined(path: Path, *parts: dict[str, bytes]) -> SourceListing:
    """A tar in which names may be there twice: the parts' members one after the other."""
    import io
    import tarfile

    with tarfile.open(path, "w") as tar:
        for part in parts:
            for name, data in part.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return sources.list_source(str(path))


def test_folders_that_are_no_utf8_are_classes_of_their_own(tmp_path: Path) -> None:
    names = [b"m\xe8re", b"m\xe9re", "m\ufffdre".encode(), b"plain"]
    for name in names:
        try:
            os.mkdir(os.path.join(os.fsencode(tmp_path), name))
        except OSError:
            pytest.skip("the file system takes UTF-8 names only")
        with open(os.path.join(os.fsencode(tmp_path), name, b"1.jpg"), "wb") as file:
            file.write(PICTURE)
    listing = sources.list_source(str(tmp_path))
    assert listing.classes == ("m\\xe8re", "m\\xe9re", "m\ufffdre", "plain")
    assert sorted(item.label for item in listing.items) == [0, 1, 2, 3]
    os.mkdir(os.path.join(os.fsencode(tmp_path), b"m\\xe8re"))
    (tmp_path / "m\\xe8re" / "1.jpg").write_bytes(PICTURE)
    with pytest.raises(UserError, match=r"two classes would be called m\\xe8re: b'm\\\\xe8re' and b'm\\xe8re'"):
        sources.list_source(str(tmp_path))


def test_label_texts_that_are_no_utf8_or_long_are_classes_of_their_own(tmp_path: Path) -> None:
    long = b"x" * 1000
    texts = [b"m\xe8re", b"m\xe9re", long + b"1", long + b"2", b"\xef\xbb\xbfplain\r\n", b"plain", b" "]
    members = {}
    for number, text in enumerate(texts):
        members |= {f"{number}.jpg": PICTURE, f"{number}.cls": text}
    listing = listed(tmp_path / "a.tar", members)
    assert listing.classes == ("m\\xe8re", "m\\xe9re", "plain", "x" * 1000 + "1", "x" * 1000 + "2")
    assert [item.label for item in listing.items] == [0, 1, 3, 4, 2, 2, -1]


def test_a_label_that_is_too_long_to_be_a_name_is_never_cut(tmp_path: Path) -> None:
    listing = listed(
        tmp_path / "a.tar", {"0.jpg": PICTURE, "0.cls": b"y" * 5000, "1.jpg": PICTURE, "1.cls": b"y" * 4096}
    )
    assert named(listing) == {"1.jpg": "y" * 4096}
    assert listing.left_out == [("a.tar: 0.jpg", "its label has 5000 bytes, of which at most 4096 are read")]


def test_numbers_of_any_length_are_sorted_by_value(tmp_path: Path) -> None:
    members = {}
    for number, text in enumerate([b"9" * 4000, b"10", b"9", b"09", b"1" + b"0" * 4000]):
        members |= {f"{number}.jpg": PICTURE, f"{number}.cls": text}
    classes = listed(tmp_path / "a.tar", members).classes
    assert classes == ("09", "9", "10", "9" * 4000, "1" + "0" * 4000)


def test_the_labels_field_is_that_of_the_samples_own_name(tmp_path: Path) -> None:
    """Whatever the order of the members."""
    for order in ("before", "after"):
        others = {"0.coarse.cls": b"animal", "0.fine.cls": b"wren"}
        own = {"0.cls": b"bird"}
        members = {"0.jpg": PICTURE, **(others if order == "before" else {}), **own, **others}
        listing = listed(tmp_path / f"{order}.tar", members)
        assert named(listing) == {"0.jpg": "bird"}
        assert listing.warnings == ("labels are KEY.cls; not used: KEY.coarse.cls, KEY.fine.cls",)


def test_one_other_field_is_taken_and_said_several_are_refused(tmp_path: Path) -> None:
    listing = listed(tmp_path / "one.tar", {"0.jpg": PICTURE, "0.fine.cls": b"wren", "0.json": b"{}"})
    assert named(listing) == {"0.jpg": "wren"}
    assert listing.warnings == ("labels are KEY.fine.cls: there is no KEY.cls",)
    with pytest.raises(UserError, match=r"several members may be the label \(KEY.coarse.cls, KEY.fine.cls\)"):
        listed(tmp_path / "two.tar", {"0.jpg": PICTURE, "0.fine.cls": b"wren", "0.coarse.cls": b"bird"})


def test_the_field_is_one_for_all_tars_of_a_source(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", {"0.jpg": PICTURE, "0.fine.cls": b"wren"})
    tar_of(tmp_path / "b.tar", {"1.jpg": PICTURE, "1.cls": b"bird"})
    tar_of(tmp_path / "c.tar", {"images/2.jpg": PICTURE, "pictures/3.jpg": PICTURE})
    listing = sources.list_source(str(tmp_path))
    assert named(listing) == {"0.jpg": None, "1.jpg": "bird", "images/2.jpg": None, "pictures/3.jpg": None}
    assert listing.classes == ("bird",)
    assert listing.warnings[0] == "labels are KEY.cls; not used: KEY.fine.cls"
    assert "2 images of tars or folders without any are unlabelled" in listing.warnings[1]


def test_joined_tars_keep_each_samples_own_label(tmp_path: Path) -> None:
    first, second = {"0.jpg": picture(1), "0.cls": b"a"}, {"0.jpg": picture(2), "0.cls": b"b"}
    between = {"1.jpg": picture(3), "1.cls": b"c"}
    listing = joined(tmp_path / "a.tar", first, between, second)
    assert [(item.name, listing.classes[item.label]) for item in listing.items] == [
        ("0.jpg", "a"),
        ("1.jpg", "c"),
        ("0.jpg", "b"),
    ]
    assert not listing.left_out


@pytest.mark.parametrize("same", [True, False])
def test_two_labels_of_one_sample_are_no_label(same: bool, tmp_path: Path) -> None:
    """A label that was added later, or twice at once: only where all say the same does the image have a class."""
    later = b"a" if same else b"b"
    first, between = {"0.jpg": picture(1), "0.cls": b"a"}, {"1.jpg": picture(3), "1.cls": b"c"}
    for listing in (
        joined(tmp_path / "late.tar", first, between, {"0.cls": later}),
        joined(tmp_path / "twice.tar", first, {"0.cls": later}, between),
    ):
        if same:
            assert named(listing) == {"0.jpg": "a", "1.jpg": "c"} and not listing.left_out
        else:
            assert named(listing) == {"1.jpg": "c"}
            ((name, reason),) = listing.left_out
            assert name.endswith(".tar: 0.jpg") and reason == "its sample has several labels: 'a', 'b'"


def test_labels_may_stand_apart_from_their_images(tmp_path: Path) -> None:
    images = {f"{number}.jpg": picture(number) for number in range(3)}
    labels = {f"{number}.cls": b"%d" % number for number in range(3)}
    for parts in ((images, labels), (labels, images)):
        assert named(joined(tmp_path / "a.tar", *parts)) == {"0.jpg": "0", "1.jpg": "1", "2.jpg": "2"}


def test_dots_in_the_names_of_samples(tmp_path: Path) -> None:
    members = {}
    for number in range(3):
        members |= {f"v1.2_{number}.jpg": picture(number), f"v1.2_{number}.cls": b"%d" % (number % 2)}
    members |= {"v1.2_9.jpg": picture(9), "v1.2.3/a.b/0.jpg": picture(10), "v1.2.3/a.b/0.cls": b"1"}
    listing = listed(tmp_path / "a.tar", members)
    assert named(listing) == {
        "v1.2_0.jpg": "0",
        "v1.2_1.jpg": "1",
        "v1.2_2.jpg": "0",
        "v1.2_9.jpg": None,
        "v1.2.3/a.b/0.jpg": "1",
    }
    assert not listing.left_out and listing.items[0].key == "v1_2_0"


def test_the_only_image_of_a_sample_is_taken_one_of_several_is_not_guessed(tmp_path: Path) -> None:
    listing = listed(tmp_path / "one.tar", {"0.left.jpg": PICTURE, "0.cls": b"a", "0.json": b"{}"})
    assert named(listing) == {"0.left.jpg": "a"} and not listing.left_out
    with pytest.raises(UserError, match=r"two.tar: 0: one label for several images \(0.left.jpg, 0.right.jpg\)"):
        listed(tmp_path / "two.tar", {"0.left.jpg": PICTURE, "0.right.jpg": PICTURE, "0.cls": b"a"})


def test_a_mask_of_the_same_name_is_no_second_image(tmp_path: Path) -> None:
    listing = listed(tmp_path / "a.tar", {"0.png": PICTURE, "0.jpg": PICTURE, "0.cls": b"a", "1.png": PICTURE})
    assert named(listing) == {"0.jpg": "a", "1.png": None}
    assert listing.left_out == [("a.tar: 0.png", "a further file of its sample")]


def test_labels_of_no_image_are_said(tmp_path: Path) -> None:
    listing = listed(tmp_path / "a.tar", {"0.jpg": PICTURE, "x0.cls": b"a"})
    assert named(listing) == {"0.jpg": None} and "nothing is labelled" in listing.warnings[0]


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    assert named(listed(tmp_path / "a.tar", {"0.JPG": PICTURE, "0.CLS": b"a"})) == {"0.JPG": "a"}


def test_hidden_doubles_are_no_labels(tmp_path: Path) -> None:
    members = {"._0.jpg": PICTURE, "0.jpg": PICTURE, "._0.cls": b"\0\5\x16\7", "0.cls": b"a"}
    listing = listed(tmp_path / "a.tar", members)
    assert named(listing) == {"0.jpg": "a"} and listing.left_out == [("a.tar: ._0.jpg", "a hidden file")]


def test_folders_of_a_nas_are_no_classes(tmp_path: Path) -> None:
    names = ["cat/1.jpg", "dog/1.jpg", "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "@eaDir/x/y.jpg", "#recycle/y.jpg"]
    names += ["$RECYCLE.BIN/S-1-5/y.jpg", "System Volume Information/y.jpg", "lost+found/#123.jpg", "@Recycle/z.jpg"]
    listing = sources.list_source(str(folder_of(tmp_path / "folder", names)))
    assert listing.classes == ("cat", "dog") and len(listing.items) == 2
    assert {reason for _, reason in listing.left_out} == {"a hidden file"} and len(listing.left_out) == 7
    inside = listed(tmp_path / "a.tar", {name: PICTURE for name in names})
    assert inside.classes == ("cat", "dog") and len(inside.items) == 2


@pytest.mark.parametrize(
    ("names", "caution"),
    [
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg"], "train/, val/, which look like splits"),
        (["train/a/1.jpg", "train/b/1.jpg", "test/1.jpg"], "test/, train/, which look like splits"),
        (["x/a/1.jpg", "x/b/1.jpg", "y/a/1.jpg", "y/b/1.jpg"], "with folders below them (a, b)"),
        (["data/a/1.jpg", "data/b/1.jpg", "preview.jpg"], "data/, with folders below them (a, b)"),
        (["a/1.jpg", "b/1.jpg", "loose.jpg"], ""),
        (["a/images/1.jpg", "b/images/1.jpg"], ""),
        (["test/1.jpg", "a/1.jpg"], ""),
        (["1.jpg", "2.jpg"], ""),
        (
            ["Cat/1.jpg", "cat/1.jpg", "dog/1.jpg"],
            "differ in nothing but case, spaces, encoding or zeros: 'Cat', 'cat'",
        ),
        (["1/1.jpg", "01/1.jpg", "2/1.jpg"], "differ in nothing but case, spaces, encoding or zeros: '01', '1'"),
        (["cat /1.jpg", "cat/1.jpg"], "differ in nothing but case, spaces, encoding or zeros: 'cat', 'cat '"),
        (["a\u200bb/1.jpg", "ab/1.jpg"], "spaces, encoding or zeros: 'ab', 'a\\u200bb'"),
        (["-1/1.jpg", "0/1.jpg"], "one class is called -1; an image without a class has no label at all"),
        (["caf\u00e9/1.jpg", "cafe\u0301/1.jpg"], "case, spaces, encoding"),
    ],
)
def test_folders_that_may_not_be_the_classes_meant(names: list[str], caution: str, tmp_path: Path) -> None:
    warnings = sources.list_source(str(folder_of(tmp_path, names))).warnings
    assert (caution in warnings[0] and len(warnings) == 1) if caution else not warnings


def test_imagenets_own_tars(tmp_path: Path) -> None:
    for number in range(3):
        tar_of(tmp_path / "wordnet" / f"n0144076{number}.tar", {f"n0144076{number}_{n}.JPEG": PICTURE for n in "12"})
        tar_of(tmp_path / "other" / f"shard-{number}.tar", {f"{number}{n}.jpg": PICTURE for n in "12"})
    listing = sources.list_source(str(tmp_path / "wordnet"))
    assert listing.classes == ("n01440760", "n01440761", "n01440762")
    assert [item.label for item in listing.items] == [0, 0, 1, 1, 2, 2]
    assert listing.warnings == ("each tar is a class, named by it as ImageNet's are: 3",)
    listing = sources.list_source(str(tmp_path / "other"))
    assert not listing.classes and "if each tar is a class, unpack each into a folder" in listing.warnings[0]
    outer = {path.name: path.read_bytes() for path in sorted((tmp_path / "wordnet").iterdir())}
    with pytest.raises(
        UserError, match=r"holds no images but archives \(all.tar: n01440760.tar, .*unpack the outer one"
    ):
        listed(tmp_path / "all.tar", outer)


@pytest.mark.parametrize("suffix", ["json", "txt", "cls.txt", "cls.json"])
def test_labels_in_other_members_are_not_read_and_that_is_said(suffix: str, tmp_path: Path) -> None:
    members = {
        f"{number}.{end}": picture(number) if end == "jpg" else b"1" for number in (0, 1) for end in ("jpg", suffix)
    }
    listing = listed(tmp_path / "a.tar", members)
    assert listing.classes == () and f"beside the images are KEY.{suffix}, which are not read" in listing.warnings[0]
    foldered = {f"{'ab'[int(name[0])]}/{name}": data for name, data in members.items()}
    assert not listed(tmp_path / "b.tar", foldered).warnings  # captions, for example


@pytest.mark.parametrize("data", [(1).to_bytes(8, "little"), "wren".encode("utf-16")])
def test_a_label_that_is_no_text_is_none(data: bytes, tmp_path: Path) -> None:
    listing = listed(tmp_path / "a.tar", {"0.jpg": picture(0), "0.cls": data, "1.jpg": picture(1), "1.cls": b"wren"})
    assert named(listing) == {"1.jpg": "wren"}
    assert listing.left_out == [("a.tar: 0.jpg", "its label is no text in UTF-8: it holds zero bytes")]
