import re
from pathlib import Path

import pytest
from store_builder import fill, spec, teacher_metadata

from repcon.commands import inspect
from repcon.config import InspectConfig
from repcon.labels.store import LabelStore
from repcon.runtime.console import console
from repcon.runtime.errors import UserError


def shown(config: InspectConfig) -> str:
    with console.capture() as capture:
        inspect.run(config)
    return capture.get()


@pytest.mark.parametrize("values", ["float16", "quantized8"])
def test_the_tables_name_teachers_sizes_and_losses(tmp_path, values):
    fill(LabelStore.create(str(tmp_path / "s"), spec(values=values)))
    text = shown(InspectConfig(store=str(tmp_path / "s")))
    for words in (
        "wide", "small", "resnet10t", "bytes per crop", "k=4", "quantized8", "3 of 3", "x smaller than the same labels",
        "mutual information adjusted for chance",
    ):  # fmt: skip
        assert words in text
    assert re.search(r"0\.\d\d nat", text)
    assert max(len(line) for line in text.splitlines()) <= 80 or str(tmp_path) in text


def test_the_page_is_self_contained_and_shows_names_as_text(tmp_path):
    odd = teacher_metadata(
        "small", 4, classes=("<script>alert(1)</script>", "b", "c", "[bold]d"), architecture="[red]x[/]"
    )
    fill(LabelStore.create(str(tmp_path / "s"), spec(teachers=(odd,))))
    page = tmp_path / "new" / "page.html"
    text = shown(InspectConfig(store=str(tmp_path / "s"), html=str(page)))
    assert "[red]x[/]" in text
    html = page.read_text()
    assert html.count("<svg") == 5 and "<script" not in html
    assert not re.search(r'(src|href)="(?!#|data:)', html)


def test_an_unfinished_store_is_shown(tmp_path):
    LabelStore.create(str(tmp_path / "s"), spec())
    page = str(tmp_path / "page.html")
    text = shown(InspectConfig(store=str(tmp_path / "s"), html=page))
    assert "0 of 3" in text and "nothing is finished yet" in text
    assert "smaller" not in text and "bytes per crop" not in text
    html = Path(page).read_text()
    assert "nothing is finished yet" in html and "smaller" not in html


def test_sizes_of_a_teacher_that_was_added_are_left_open(tmp_path):
    store = fill(LabelStore.create(str(tmp_path / "s"), spec()))
    store.append_teachers([teacher_metadata("third", 9)])
    text = shown(InspectConfig(store=str(tmp_path / "s"), html=str(tmp_path / "page.html")))
    assert "no crop has every teacher's answer yet" in text and "smaller" not in text
    assert re.search(r"third +9 +5 +- ", text) and re.search(r"wide +300 +5 +\d", text)


def test_no_store_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no label store here"):
        inspect.run(InspectConfig(store=str(tmp_path)))
