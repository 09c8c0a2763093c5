"""Names that come from data: markup in each of them stays text, in the page and in its plots."""

import json
from pathlib import Path

import pytest
from report_case import Page, write_evaluate, write_record, write_store, write_teach, write_train

from benchmarks import report as benchmark_report
from repcon.commands import pack
from repcon.commands import report as report_module
from repcon.config import PackConfig, ReportConfig
from repcon.images.pack import ImagePack
from repcon.labels.statistics import figures
from repcon.reports.sections.records import record_sections
from repcon.runtime.run_dir import RunDir


def evil(place: str) -> str:
    """Would be an element with a handler; no slash, so that a file may be called so."""
    return f"<img src=x onerror=alert(1)>{place}<b>"


@pytest.fixture(scope="module", params=[record_sections, benchmark_report.sections], ids=["repcon", "benchmarks"])
def page(request, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    root = tmp_path_factory.mktemp("names")
    source = root / "source" / evil("folder")
    source.mkdir(parents=True)
    for number, picture in enumerate(sorted(picture_folder.rglob("*.jpg"))[:8]):
        (source / f"{evil('file')}{number}.jpg").write_bytes(picture.read_bytes())
    pack.run(PackConfig(source=str(root / "source"), out=str(root / "pack"), num_workers=1))
    store = write_store(root / "labels.zarr", ImagePack.open(str(root / "pack")), text=evil)
    found = figures(store)
    found["heads"] = {evil("teacher"): found["heads"]["teacher"]}
    found["agreement"] = {evil("pair"): {"mutual_information": 0.5}}
    (root / f"{evil('inspected')}.json").write_text(json.dumps(found))
    write_train(root / evil("run"), str(root / "pack"), str(root / "labels.zarr"), [evil("head")])
    write_evaluate(root / "transfer", [evil("baseline"), evil("backbone")])
    write_teach(root / "taught", text=evil)
    write_record(root / evil("record"), **{evil("figure"): evil("value"), f"{evil('peer')}_over_ours": 2.0})
    interval = {"mean": 50.0, "low": 49.0, "high": 51.0}
    domain, method = evil("domain"), evil("method")
    write_record(
        root / "consolidation", protocol={"domains": [domain]}, **{f"{domain}_{method}_probe": interval},
        **{evil("margin"): interval, f"{evil('margin')}_worst": 49.0},
    )  # fmt: skip
    licences = [{evil("column"): evil("licence"), "url": "javascript:alert(1)"}]
    RunDir(root / "demo", "demo", f"out = '{evil('setting')}'\n").finish({"licences": licences})
    RunDir(root / "odd", evil("command"), "").finish({"x": 1})
    paths = [path for path in root.iterdir() if path.name not in ("source", "pack")]
    out = root / "report"
    report_module.run(ReportConfig(paths=tuple(map(str, paths)), out=str(out), title=evil("title")), request.param)
    return Page((out / "report.html").read_text())


PLACES = (
    "class", "architecture", "terms", "folder", "file", "teacher", "pair", "inspected", "run", "head", "baseline",
    "backbone", "record", "figure", "value", "peer", "domain", "method", "margin", "column", "licence", "setting",
    "command", "title",
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_markup_in_a_name_is_shown_as_it_is(page: Page, place: str) -> None:
    assert evil(place) in page.text


def test_none_of_it_becomes_an_element_or_a_handler(page: Page) -> None:
    assert "b" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    sources = [value or "" for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert page.unbalanced == []
