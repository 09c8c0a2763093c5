"""Reports: read from real run folders, a real pack and a real store; every name in them carries markup."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from report_case import (
    CLASSES,
    EVIL,
    Page,
    make,
    write_evaluate,
    write_evaluate_sets,
    write_record,
    write_store,
    write_teach,
    write_train,
)

from repcon.commands import pack as packing
from repcon.config import PackConfig
from repcon.images.pack import ImagePack
from repcon.labels.statistics import figures
from repcon.labels.store import LabelStore
from repcon.reports import crop_sheet, sources, tables
from repcon.reports.figure_names import record_figure, record_figures, run_figures
from repcon.reports.figures import Interval
from repcon.reports.tables import Cell
from repcon.runtime.errors import UserError
from repcon.runtime.run_dir import RunDir


@pytest.fixture(scope="module")
def world(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a report may be made of."""
    root = tmp_path_factory.mktemp("world")
    packing.run(PackConfig(source=str(picture_folder), out=str(root / "pack"), num_workers=1))
    write_store(root / "labels.zarr", ImagePack.open(str(root / "pack")), name="teacher")
    for seed, name in enumerate(["student", f"student {EVIL.replace('/', '')}"]):
        write_train(root / name, str(root / "pack"), str(root / "labels.zarr"), ["generalist", EVIL], seed=seed)
    write_evaluate(root / "transfer", ["generalist", "teacher", f"student {EVIL}"])
    write_teach(root / "teacher")
    ratios = {"slab_over_memmap_zstd": 0.74, "slab_over_memmap_zstd_20": 0.7, "slab_over_memmap_zstd_80": 0.79}
    write_record(
        root / "records" / "2026-01-01-store", **ratios, npz_batch_over_gather=0.004, bytes_per_crop_zstd=116.0
    )
    write_record(root / "records" / "2026-02-02-store", **{**ratios, EVIL: EVIL}, bytes_per_crop_zstd=112.0)
    return root


@pytest.fixture(scope="module")
def pages(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    out = tmp_path_factory.mktemp("report") / "out"
    return *make(out, *(path for path in world.iterdir() if path.is_dir())), out


def test_no_markup_from_data_becomes_markup(pages: tuple[str, str, Path]) -> None:
    page = Page(pages[0])
    assert "script" not in page.tags
    assert page.text.count("alert(1)") > 20
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.tags <= {
        "html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section", "article", "figure", "h1",
        "h2", "h3", "p", "a", "ul", "ol", "li", "div", "span", "img", "wbr", "table", "thead", "tbody", "tr", "th",
        "td", "details", "summary", "svg", "g", "path", "defs", "use", "text", "tspan", "clippath", "rect",
    }  # fmt: skip
    assert page.unbalanced == []
    assert page.open == []


def test_formulas_and_markup_stay_letters_in_plots(pages: tuple[str, str, Path]) -> None:
    files = list((pages[2] / "plots").glob("*.svg"))
    assert len(files) >= 10
    text = ""
    for file in files:
        picture = ElementTree.fromstring(file.read_text())
        assert {element.tag.rpartition("}")[2] for element in picture.iter()} <= {
            "svg", "style", "g", "path", "defs", "use", "text", "tspan", "clipPath", "rect",
        }  # fmt: skip
        text += "".join(picture.itertext())
    assert "<script>alert(" in text


def test_the_page_is_one_file_that_asks_for_nothing(pages: tuple[str, str, Path]) -> None:
    page = Page(pages[0])
    links = [
        value or "" for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")
    ]
    assert links
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    assert not re.search(r"@import|url\((?!#)", pages[0])
    policy = dict(page.attributes)["content"]
    assert policy is not None
    assert "default-src 'none'" in pages[0]
    assert len(page.ids) == len(set(page.ids))
    assert {link for link in links if link.startswith("#")} <= {f"#{name}" for name in page.ids}


def test_both_pages_say_the_same(pages: tuple[str, str, Path]) -> None:
    html, markdown, out = pages
    for heading in (
        "Transfer", "Training", "Task teachers", "Crops and their labels", "Benchmark: 2026-01-01-store",
        "Benchmarks side by side", "Settings", "Environment",
    ):  # fmt: skip
        assert f"<h2>{heading}" in html
        assert f"\n## {heading}" in markdown
    for link in re.findall(r"!\[.*\]\((.*)\)", markdown):
        assert (out / link).is_file()
    assert "51.0 ± 2.0" in markdown
    assert "51.0 ± 2.0" in html
    for table in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line.rstrip())) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_the_sheet_shows_the_stored_labels_of_the_crop(world: Path) -> None:
    pack = ImagePack.open(str(world / "pack"))
    store = LabelStore.open(str(world / "labels.zarr"))
    sheet = crop_sheet.sheet(str(world / "pack"), str(world / "labels.zarr"))
    assert len(sheet) == crop_sheet.IMAGES
    for image in sheet:
        assert image.key == pack.keys[image.row]
        assert [crop.number for crop in image.crops] == [0, store.crops - 1]
        for crop in image.crops:
            boxes, flips = store.reader.boxes(range(crop.number, crop.number + 1), range(image.row, image.row + 1))
            assert crop.box == tuple(boxes[0, 0])
            assert crop.flipped == bool(flips[0, 0])
            name, chance = next(iter(crop.labels.values()))[0]
            assert name == CLASSES[(image.row + crop.number) % len(CLASSES)]
            assert chance == pytest.approx(np.e**3 / (np.e**3 + 4), rel=2e-3)


def test_a_store_that_moved_or_belongs_elsewhere_is_a_note(world: Path, tmp_path: Path, picture_folder: Path) -> None:
    packing.run(PackConfig(source=str(picture_folder / "apple"), out=str(tmp_path / "other"), num_workers=1))
    write_train(tmp_path / "run", str(tmp_path / "other"), str(world / "labels.zarr"), ["teacher"])
    html, _ = make(tmp_path / "out", tmp_path / "run")
    assert "another pack" in html
    write_train(tmp_path / "gone", str(tmp_path / "nowhere"), str(tmp_path / "nowhere.zarr"), ["teacher"])
    html, _ = make(tmp_path / "out2", tmp_path / "gone")
    assert "Training" in html
    assert "Crops and their labels" not in html


def test_several_runs_are_marked_only_beyond_the_noise() -> None:
    runs = {
        "a": {"x": 1.0, "x_low": 0.9, "x_high": 1.1, "y": 5.0},
        "b": {"x": 1.15, "x_low": 1.05, "x_high": 1.25, "y": 500.0},
        "c": {"x": 2.0, "x_low": 1.9, "x_high": 2.1, "y": 5.0},
    }
    rows = tables.side_by_side("", {name: record_figures(held) for name, held in runs.items()}).rows
    assert [cell.mark for cell in rows[0]] == ["", "", "", "higher"]
    assert [cell.mark for cell in rows[1]] == ["", "", "", ""]


def test_figures_are_joined_with_their_intervals_and_flattened() -> None:
    figures = {"a": {"b": 1, "c": {"mean": 2.0, "low": 1.0, "high": 3.0}}, "t": 4.0, "t_20": 3.0, "t_80": 5.0}
    assert {name: figure.value for name, figure in record_figures(figures).items()} == {
        "a / b": 1, "a / c": Interval(mean=2.0, low=1.0, high=3.0), "t": Interval(mean=4.0, low=3.0, high=5.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("memory_bytes", 1_234_567, "1.23 MB"),
        ("megabytes", 10.7, "10.7"),
        ("step_seconds", 0.0412, "41.2 ms"),
        ("seconds", 251.2, "4 min 11 s"),
        ("seconds", 7500.0, "2 h 5 min"),
        ("data_share", 0.125, "12.5 %"),
        ("validation / birds / kl", 0.34754, "0.3475 nat"),
        ("gaps_worst_kl", 7.6e-05, "7.6e-05 nat"),
        ("dali_label_kl_worst", 0.25, "0.25 nat"),
        ("loss / birds", 1.5, "1.5 nat"),
        ("loss_us", 12.0, "12 µs"),
        ("kl_k4", 0.5, "0.5 nat"),
        ("images", 123456, "123,456"),
        ("loss", float("nan"), "-"),
        ("anything", None, "-"),
        ("converged", True, "yes"),
        ("weight_hash", "0123456789abcdef" * 4, "0123456789abcdef…"),
        ("licence", "", "-"),
        ("names", ["a"] * 12, "a, a, a, a, a, a, a, a, … (12 in all)"),
        ("x", Interval(mean=1.0, low=0.5, high=1.5), "1 (0.5 to 1.5)"),
    ],
)
def test_figures_of_records_have_the_unit_that_their_names_tell(name: str, value: Any, shown: str) -> None:
    assert record_figure(name, value).text == shown


def test_figures_of_runs_have_the_units_of_repcon_s_own_names() -> None:
    results = {
        "seconds": 251.2, "memory_bytes": 9e8, "data_share": 0.125, "loss": {"birds": 1.5, "seconds": 2.0},
        "validation": {"knn": 0.58, "heads": {"American_Goldfinch": {"kl": 0.34754, "agreement": 0.5}}},
        "validation_accuracy": 83.71, "megabytes": 10.7, "images": 123456, "some_kl": 0.5, "licence": "",
    }  # fmt: skip
    shown = {figure.label: figure.text for figure in run_figures(results).values()}
    assert shown == {
        "time": "4 min 11 s", "memory": "900 MB", "waiting for data": "12.5 %", "loss / birds": "1.5 nat",
        "loss / seconds": "2 nat", "validation / kNN": "58.0 %", "validation / American_Goldfinch / KL": "0.3475 nat",
        "validation / American_Goldfinch / agreement": "50.0 %", "validation accuracy": "83.7 %", "size": "10.7 MB",
        "images": "123,456", "some kl": "0.5", "licence": "-",
    }  # fmt: skip


def test_figures_of_inspect_are_shown_as_inspect_does(world: Path, tmp_path: Path) -> None:
    found = figures(LabelStore.open(str(world / "labels.zarr")))
    (tmp_path / "labels.json").write_text(json.dumps(found))
    (tmp_path / "old.json").write_text(
        json.dumps({"heads": {"a": {"mass": 1}}, "bytes_per_crop": 1, "sampled_crops": 1})
    )
    html, markdown = make(tmp_path / "out", tmp_path / "labels.json", tmp_path / "old.json", world / "labels.zarr")
    assert "## Truncation: labels\n" in markdown
    assert "old: not the figures of this version" in markdown
    ids = Page(html).ids
    assert len(ids) == len(set(ids))
    plots = sorted(path.name for path in (tmp_path / "out" / "plots").glob("*-kl.svg"))
    assert plots == ["inspect0-kl.svg", "store0-kl.svg"]


def test_a_run_that_was_killed_is_reported_as_far_as_it_came(world: Path, tmp_path: Path) -> None:
    folder = write_train(tmp_path / "killed", "", "", ["teacher"])
    (folder / "results.json").unlink()
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-40])
    html, _ = make(tmp_path / "out", folder)
    assert "no results yet" in html
    assert "1 of 63 lines of metrics.jsonl could not be read" in html
    assert "Loss per head" in html


def test_paths_that_hold_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*no such"):
        sources.read_sources([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: nothing to report on"):
        sources.read_sources([str(tmp_path / "empty")])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json"):
        sources.read_sources([str(tmp_path / "bad.json")])
    with pytest.raises(UserError, match="PATH"):
        sources.read_sources([])


def test_sources_of_one_name_are_told_apart_and_counted_once(tmp_path: Path) -> None:
    first = write_teach(tmp_path / "a" / "teacher")
    second = write_teach(tmp_path / "b" / "teacher")
    names = [source.name for source in sources.read_sources([str(first), str(second), str(first)])]
    assert names == ["a/teacher", "b/teacher"]


def test_figures_of_no_known_shape_go_into_a_table(tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text(
        json.dumps({"backbones": 3, "differences": [], "loss": "?", "x": {"y": [1, {}]}})
    )
    run = RunDir(tmp_path / "evaluate", "evaluate", 'data = "x"\n')
    run.log("step", loss=3)
    run.finish({"backbones": ["a"], "answer": 42})
    html, markdown = make(tmp_path / "out", tmp_path / "figures.json", tmp_path / "evaluate")
    assert "| answer | 42 |" in markdown
    assert "| x / y |" in markdown
    assert "x /<wbr> y" in html


def test_targets_of_a_record_are_shown_and_judged(tmp_path: Path) -> None:
    targets = {"slab_over_memmap": ">= 0.5", "gaps_kl": "<= 1e-4", "other": EVIL}
    record = write_record(tmp_path / "store", slab_over_memmap=0.4, gaps_kl=5e-5, other=1.0, targets=targets)
    html, markdown = make(tmp_path / "out", record)
    assert "| slab over memmap | 0.4 | at least 0.5 **missed** |" in markdown
    assert "| gaps kl | 5e-05 nat | at most 0.0001 nat **reached** |" in markdown
    assert '<th scope="row" title="slab_over_memmap">' in html


def test_a_record_names_its_machine_and_what_to_know_of_it(tmp_path: Path) -> None:
    """And stands beside records of the same device only; growth of bytes is no number of bytes."""
    figures = {"step_over_synthetic": 0.9, "read_bytes_growth": 1.2}
    for name, device, note in (("a", "cpu", {}), ("b", "cpu", {}), ("c", "Some GPU", {"note": "cut off"})):
        facts = {"device": device, "cores": 4, "processor": "", "started": "2026-01-02T03:04:05Z", **note}
        folder = write_record(tmp_path / "records" / name, **figures)
        (folder / "env.json").write_text(json.dumps(facts))
    _, markdown = make(tmp_path / "out", tmp_path / "records")
    assert "\nCPU, 4 cores, 2026-01-02.\n" in markdown
    assert "\nSome GPU, 4 cores, 2026-01-02. cut off\n" in markdown and "> c: cut off" in markdown
    beside = markdown[markdown.index("## Benchmarks side by side") :]
    assert "| figure | a | b |" in beside and "| read bytes growth | 1.2 |" in markdown


def test_evaluations_of_one_test_are_compared_and_marked_beyond_the_noise(tmp_path: Path) -> None:
    paths = [write_evaluate(tmp_path / name, backbones) for name, backbones in (("a", ["x", "y"]), ("b", ["y", "x"]))]
    _, markdown = make(tmp_path / "out", *paths)
    side = markdown[markdown.index("## Transfer side by side") :]
    assert "| x, linear probe | 51.0 ± 2.0 | 56.0 ± 2.0 **higher** |" in side
    assert "| y, linear probe | 56.0 ± 2.0 | 51.0 ± 2.0 **lower** |" in side


def test_the_demos_folder_brings_the_runs_inside_it(tmp_path: Path) -> None:
    RunDir(tmp_path / "demo", "demo", "").finish({})
    write_teach(tmp_path / "demo" / "teacher")
    make(tmp_path / "demo" / "report", tmp_path / "demo" / "teacher")
    assert [source.name for source in sources.read_sources([str(tmp_path / "demo")])] == ["demo", "teacher"]


def test_kNN_while_training_is_in_per_cent(pages: tuple[str, str, Path]) -> None:
    text = (pages[2] / "plots" / "knn.svg").read_text()
    assert re.search(r">5\d(\.\d)?<", text)


def test_a_cell_that_is_marked_is_no_shared_text() -> None:
    assert tables.table("", ("a",), [["b", Cell(text="c", mark="better")]]).rows[0][0].text == "b"


def test_an_evaluation_over_several_data_sets_opens_with_its_verdict(tmp_path: Path) -> None:
    run = write_evaluate_sets(
        tmp_path / "transfer", ["generalist", "expert", f"student {EVIL}"], ["birds", f"food {EVIL}"]
    )
    said = json.loads((run / "results.json").read_text())["verdict"]
    text, markdown = make(tmp_path / "out", run)
    page = Page(text)
    assert said["sentence"] in page.text and said["details"] in page.text
    assert page.text.index(said["sentence"]) < page.text.index("made 20") and page.unbalanced == []
    assert "Transfer to 2 data sets: linear probe" in page.text and "Heads beside their teachers" in page.text
    assert page.text.count("Accuracy in per cent of 6 test images") == 2  # A section for each data set.
    assert markdown.index("beats every other model") < markdown.index("UTC")


def test_one_data_set_s_verdict_and_heads_alone_are_shown(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "heads", "evaluate", "")
    interval = {"mean": 80.0, "low": 70.0, "high": 88.0}
    row = {"student": "s", "head": "h", "dataset": "d", "images": 4, "held_out": False}
    row |= dict.fromkeys(("teacher_accuracy", "head_accuracy", "difference"), interval)
    run.finish({"heads": [row, {"student": "torn"}]})
    text, _ = make(tmp_path / "out", tmp_path / "heads")
    assert "not known to be held out" in text and "torn" not in Page(text).text.split("Settings")[0]
