"""Parquet files as sources: columns, labels, damage, memory, and the hub's datasets from its local cache."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import running_hub
from pictures import photograph
from simplejpeg import encode_jpeg

from repcon import cli
from repcon.commands import pack as packing
from repcon.config import PackConfig
from repcon.images import sources
from repcon.images.pack import ImagePack
from repcon.images.packing import is_pack, open_or_pack
from repcon.images.parquet import RowReader
from repcon.runtime import extras
from repcon.runtime.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def pictures(count: int, seed: int = 0) -> list[bytes]:
    return [encode_jpeg(photograph(seed + number, 32, 24), quality=90) for number in range(count)]


def features(**columns: Any) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


IMAGE = {"_type": "Image"}


def class_label(*names: str) -> dict[str, Any]:
    return {"_type": "ClassLabel", "names": list(names)}


def write(path: Path, columns: dict[str, Any], metadata: dict[bytes, bytes] | None = None, **options: Any) -> Path:
    """A Parquet file; a column `image` of bytes becomes the struct that `datasets` writes."""
    if isinstance(columns.get("image"), list):
        columns = {**columns, "image": [{"bytes": data, "path": None} for data in columns["image"]]}
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, **options)
    return path


def packed(source: Path | Sequence[Path], out: Path, **settings: Any) -> tuple[ImagePack, dict[str, Any]]:
    names = str(source) if isinstance(source, Path) else tuple(map(str, source))
    figures = packing.run(PackConfig(source=names, out=str(out), **settings))
    return ImagePack.open(out), figures


def labels_of(source: Path) -> list[str | None]:
    listing = sources.list_source(str(source))
    return [listing.classes[item.label] if item.label >= 0 else None for item in listing.items]


def test_classes_keep_the_order_of_their_ids(tmp_path: Path) -> None:
    data, ids = pictures(5), [2, 0, -1, None, 2]
    known = features(image=IMAGE, label=class_label("zebra", "none of these", "ape"))
    for number, rows in enumerate((slice(0, 3), slice(3, 5))):
        name = f"data/train-{number:05d}-of-00002.parquet"
        write(tmp_path / "set" / name, {"image": data[rows], "label": ids[rows]}, known, row_group_size=2)
    pack, figures = packed(tmp_path / "set", tmp_path / "pack")
    assert pack.classes == ("zebra", "ape") and pack.labels.tolist() == [1, 0, -1, -1, 1]
    assert [pack.read(row) for row in range(5)] == data and figures["kept"] == 5
    assert list(pack.keys)[:4:3] == ["data/train-00000-of-00002.parquet/0", "data/train-00001-of-00002.parquet/0"]
    assert figures["warnings"] == []


def test_the_same_images_have_the_same_fingerprint_whatever_holds_them(tmp_path: Path) -> None:
    data = pictures(4)
    for number, image in enumerate(data):
        (tmp_path / "folder" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / "ab"[number % 2] / f"{number}.jpg").write_bytes(image)
    order = [0, 2, 1, 3]
    columns = {"jpg": [data[place] for place in order], "cls": ["a", "a", "b", "b"]}
    write(tmp_path / "set.parquet", columns)
    rows, _ = packed(tmp_path / "set.parquet", tmp_path / "rows")
    files, _ = packed(tmp_path / "folder", tmp_path / "files")
    assert rows.fingerprint == files.fingerprint and rows.classes == files.classes
    assert rows.labels.tolist() == files.labels.tolist()


def test_texts_and_plain_numbers_are_labels_sorted_as_elsewhere(tmp_path: Path) -> None:
    data = pictures(3)
    assert labels_of(write(tmp_path / "a.parquet", {"image": data, "label": ["dog", "", "cat"]})) == [
        "dog",
        None,
        "cat",
    ]
    numbers = write(tmp_path / "b.parquet", {"image": data, "label": [10, 9, -1]})
    assert sources.list_source(str(numbers)).classes == ("9", "10") and labels_of(numbers) == ["10", "9", None]
    words = pyarrow.array(["x", "y", "x"]).dictionary_encode()
    assert labels_of(write(tmp_path / "c.parquet", {"image": data, "label": words})) == ["x", "y", "x"]


def test_a_label_that_is_no_utf8_or_too_long_or_unknown(tmp_path: Path) -> None:
    raw = pyarrow.array([b"caf\xe9", b"tea", b"x" * 5000]).view(pyarrow.string())
    listing = sources.list_source(str(write(tmp_path / "a.parquet", {"image": pictures(3), "label": raw})))
    assert listing.classes == ("caf\\xe9", "tea")
    assert listing.left_out == [("a.parquet/2", "its label has 5000 bytes, of which at most 4096 are read")]
    known = features(image=IMAGE, label=class_label("a", "b"))
    listing = sources.list_source(str(write(tmp_path / "b.parquet", {"image": pictures(2), "label": [1, 2]}, known)))
    assert listing.left_out == [("b.parquet/1", "its label is 2, and the file names 2 classes")]


def test_one_other_column_is_taken_and_said_several_are_refused(tmp_path: Path) -> None:
    data = pictures(2)
    one = features(image=IMAGE, breed=class_label("pug", "cat"))
    listing = sources.list_source(str(write(tmp_path / "one.parquet", {"image": data, "breed": [1, 0]}, one)))
    assert listing.classes == ("pug", "cat")
    assert listing.warnings == ("Parquet: labels are column breed: there is no column label",)
    two = features(image=IMAGE, coarse=class_label("a"), fine=class_label("b"))
    columns = {"image": data, "coarse": [0, 0], "fine": [0, 0]}
    with pytest.raises(UserError, match=r"several columns may be the label \(coarse, fine\) and none is called label"):
        sources.list_source(str(write(tmp_path / "two.parquet", columns, two)))
    known = features(image=IMAGE, coarse=class_label("a"), label=class_label("b"))
    columns = {"image": data, "coarse": [0, 0], "label": [0, 0]}
    assert labels_of(write(tmp_path / "both.parquet", columns, known)) == ["b", "b"]
    with pytest.raises(UserError, match=r"several columns may be the image \(left, right\)"):
        sources.list_source(str(write(tmp_path / "eyes.parquet", {"left": data, "right": data})))
    twice = features(image=IMAGE, label=class_label("a", "a"))
    with pytest.raises(UserError, match="column label: 'a' names two classes"):
        sources.list_source(str(write(tmp_path / "twice.parquet", {"image": data, "label": [0, 1]}, twice)))


def test_columns_of_other_names_are_named(tmp_path: Path) -> None:
    data = pictures(3)
    wanted = {"pixels": data, "thumb": data[::-1], "species": ["ape", "bee", "ape"], "label": [7, 7, 7]}
    source = write(tmp_path / "own" / "rows.parquet", wanted)
    (tmp_path / "folder" / "bee").mkdir(parents=True)
    (tmp_path / "folder" / "bee" / "1.jpg").write_bytes(pictures(1, 50)[0])
    with pytest.raises(UserError, match=r"several columns may be the image \(pixels, thumb\).*with --image-column"):
        packed(source, tmp_path / "pack")
    pack, figures = packed(source, tmp_path / "pack", image_column="pixels", label_column="species")
    assert pack.classes == ("ape", "bee") and pack.labels.tolist() == [0, 1, 0] and figures["warnings"] == []
    assert [pack.read(row) for row in range(3)] == data
    with pytest.raises(UserError, match="holds a pack made of other files"):
        packed(source, tmp_path / "pack", image_column="thumb", label_column="species")
    both = [tmp_path / "own", tmp_path / "folder"]
    mixed, _ = packed(both, tmp_path / "mixed", image_column="pixels", label_column="species")
    assert mixed.classes == ("ape", "bee") and mixed.labels.tolist() == [0, 1, 0, 1]


def test_a_class_label_that_is_named_keeps_its_order(tmp_path: Path) -> None:
    known = features(image=IMAGE, coarse=class_label("b", "a"), fine=class_label("z", "y"))
    columns = {"image": pictures(2), "coarse": [0, 1], "fine": [1, 0]}
    source = write(tmp_path / "two.parquet", columns, known)
    pack, _ = packed(source, tmp_path / "pack", label_column="fine")
    assert pack.classes == ("z", "y") and pack.labels.tolist() == [1, 0]


def test_a_wrong_column_is_one_line_that_names_file_columns_and_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = {"image": pictures(2), "species": ["a", "b"], "score": [0.5, 1.0]}
    source = write(tmp_path / "rows.parquet", data)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "1.jpg").write_bytes(pictures(1)[0])

    def refused(place: Path, *words: str) -> str:
        assert cli.main(["pack", str(place), str(tmp_path / "pack"), *words]) == 1
        [line] = capsys.readouterr().err.splitlines()
        return line.removeprefix("error ")

    one_of = "one of image, species, score"
    absent = f"{source}: there is no column 'specie'; give --label-column {one_of}"
    assert refused(source, "--label-column", "specie") == absent
    absent = f"{source}: there is no column 'img'; give --image-column {one_of}"
    assert refused(source, "--image-column", "img") == absent
    other = f"{source}: column 'score' holds double, no labels; give --label-column species"
    assert refused(source, "--label-column=score") == other
    other = f"{source}: column 'species' holds string, no images; give --image-column image"
    assert refused(source, "--image-column=species") == other
    assert "label_column" in refused(tmp_path / "plain", "--label-column", "species")
    assert not (tmp_path / "pack").exists()


def test_without_a_label_column_rows_are_unlabelled_and_folders_beside_them_are_classes(tmp_path: Path) -> None:
    write(tmp_path / "set" / "more" / "rows.parquet", {"image": pictures(2, 10), "caption": ["a", "b"]})
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "set" / name).mkdir()
        (tmp_path / "set" / name / "0.jpg").write_bytes(pictures(1, number)[0])
    assert labels_of(tmp_path / "set") == ["cat", "dog", None, None]
    assert "Parquet: no labels: no ClassLabel column" in sources.list_source(str(tmp_path / "set")).warnings


def test_rows_without_an_image_are_left_out_with_the_reason(tmp_path: Path) -> None:
    data = pictures(2)
    rows = [
        {"bytes": data[0], "path": None},
        {"bytes": None, "path": "photos/1.jpg"},
        None,
        {"bytes": b"", "path": None},
        {"bytes": b"no image", "path": None},
        {"bytes": data[1], "path": "1.jpg"},
    ]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    path = write(tmp_path / "a.parquet", {"image": pyarrow.array(rows, kind)})
    pack, figures = packed(path, tmp_path / "pack")
    assert len(pack) == 2 and sum(figures["left_out"].values()) == 4
    lines = [json.loads(line) for line in (tmp_path / "pack" / "left_out.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"a.parquet/{row}" for row in (1, 2, 3, 4)]
    assert lines[0]["reason"] == "only the image's path is stored, not its bytes"
    assert lines[1]["reason"] == lines[2]["reason"] == "an empty row"


def test_a_damaged_row_group_is_left_out_row_by_row(tmp_path: Path) -> None:
    data = pictures(9)
    path = write(
        tmp_path / "a.parquet", {"image": data}, row_group_size=3, compression="none", write_page_checksum=True
    )
    whole = bytearray(path.read_bytes())
    whole[whole.find(data[4]) + 50] ^= 0xFF
    path.write_bytes(whole)
    pack, figures = packed(path, tmp_path / "pack")
    assert list(pack.keys) == [f"a.parquet/{row}" for row in (0, 1, 2, 6, 7, 8)]
    assert figures["left_out"] == {"a damaged row group": 3}


def test_files_that_are_damaged_or_hold_no_images(tmp_path: Path) -> None:
    whole = write(tmp_path / "set" / "a.parquet", {"image": pictures(1)}).read_bytes()
    (tmp_path / "set" / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "set" / "metadata.parquet", {"file_name": ["a.jpg"], "label": ["a"]})
    listing = sources.list_source(str(tmp_path / "set"))
    assert [item.name for item in listing.items] == ["a.parquet/0"]
    (cut, damage), (other, reason) = listing.left_out
    assert cut == "cut.parquet" and damage.startswith("a damaged Parquet file: ")
    assert other == "metadata.parquet" and reason.startswith("a Parquet file without an image column")


def test_a_limit_and_a_killed_run_read_the_rows_that_they_need(tmp_path: Path) -> None:
    data = pictures(20)
    path = write(tmp_path / "a.parquet", {"image": data}, row_group_size=6)
    pack, _ = packed(path, tmp_path / "pack", limit=5)
    assert list(pack.keys) == [f"a.parquet/{row}" for row in (0, 4, 8, 12, 16)]
    assert [pack.read(row) for row in range(5)] == data[::4]
    reader = RowReader()
    assert [reader.read(str(path), "image", row) for row in (3, 19, 2)] == [data[3], data[19], data[2]]


def test_memory_is_bounded_by_rows_and_not_by_row_groups(tmp_path: Path) -> None:
    """160 MB in one row group of small pages."""
    noise = np.random.default_rng(0)
    rows = [noise.bytes(500_000) for _ in range(320)]
    path = write(
        tmp_path / "big.parquet", {"image": rows}, row_group_size=len(rows), use_dictionary=False, write_batch_size=8
    )
    sizes = [len(rows[0]) for _ in rows]
    del rows
    pool, reader = pyarrow.default_memory_pool(), RowReader()
    before, most = pool.bytes_allocated(), 0
    for row, size in enumerate(sizes):
        assert len(reader.read(str(path), "image", row)) == size
        most = max(most, pool.bytes_allocated() - before)
    assert most < 40e6


def hub_cache(root: Path, names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of huggingface_hub with a dataset's converted files, to be used without network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = root / "datasets--org--birds"
    (repo / "refs" / "refs" / "convert").mkdir(parents=True)
    (repo / "refs" / "refs" / "convert" / "parquet").write_text("0123abc")
    for number, name in enumerate(names):
        write(repo / "snapshots" / "0123abc" / name, {"image": pictures(2, 10 * number), "label": ["a", "b"]})
    return repo


def test_a_dataset_of_the_hub_is_its_converted_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"]
    hub_cache(tmp_path / "cache", [*names, "small/train/0000.parquet"], monkeypatch)
    counts = {"": 4, ":test": 2, "/small": 2, "/default:train": 4}
    found = {end: sources.list_source(f"hf://datasets/org/birds{end}") for end in counts}
    assert {end: len(listing.items) for end, listing in found.items()} == counts
    assert found[""].identity == found["/default:train"].identity != found[":test"].identity
    with pytest.raises(UserError, match="there is no split dev; name one of test, train"):
        sources.list_source("hf://datasets/org/birds:dev")
    with pytest.raises(UserError, match="there is no config large; name one of default, small"):
        sources.list_source("hf://datasets/org/birds/large")
    with pytest.raises(UserError, match="must be hf://datasets/OWNER/NAME"):
        sources.list_source("hf://datasets/birds")
    with pytest.raises(UserError, match="cannot be had from the Hugging Face hub"):
        sources.list_source("hf://datasets/org/bees")


def test_only_the_split_that_is_asked_for_is_downloaded_and_found_again_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    data = write(tmp_path / "rows.parquet", {"image": pictures(2), "label": ["a", "b"]}).read_bytes()
    with running_hub() as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        hub.create("org/birds", "dataset")
        files = {f"default/{split}/0000.parquet": data for split in ("train", "test")}
        hub.commit("dataset", "org/birds", "refs/convert/parquet", files)
        first = sources.list_source("hf://datasets/org/birds:test")
        assert [name for name, _ in hub.downloads] == ["default/test/0000.parquet"]
        with pytest.raises(UserError, match="cannot be had from the Hugging Face hub as Parquet"):
            sources.list_source("hf://datasets/org/bees")
    again = sources.list_source("hf://datasets/org/birds:test")
    assert again.identity == first.identity and [item.label for item in again.items] == [0, 1]


def test_several_sources_of_the_hub_and_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path / "cache", ["default/train/0000.parquet"], monkeypatch)
    local = write(tmp_path / "more.parquet", {"image": pictures(1, 50), "label": ["c"]})
    figures = packing.run(PackConfig(source=("hf://datasets/org/birds:train", str(local)), out=str(tmp_path / "pack")))
    pack = ImagePack.open(tmp_path / "pack")
    assert figures["images"] == 3 and pack.classes == ("a", "b", "c")
    assert list(pack.keys)[::2] == ["birds-train/0000.parquet/0", "more_parquet/more.parquet/0"]


def test_commands_that_take_images_or_packs_pack_them_once(tmp_path: Path) -> None:
    path = write(tmp_path / "set.parquet", {"image": pictures(3), "label": ["a", "b", "a"]})
    first, again = (open_or_pack(str(path), tmp_path / "cache") for _ in range(2))
    assert first.url == again.url and first.classes == ("a", "b") and len(list((tmp_path / "cache").iterdir())) == 1
    assert is_pack("s3://bucket/pack") and is_pack(first.url) and not is_pack("hf://datasets/org/birds")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"image": pictures(1)})
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a\.parquet needs pyarrow: pip install 'repcon\[hf\]'"):
        sources.list_source(str(path))
