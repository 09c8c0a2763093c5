"""Tables of pages from records."""

from pathlib import Path

import pytest

from benchmarks import tables

PAGE = """Record: `records/new`, on two cores.

<!-- table: figure | value -->

| figure | value |
|---|---|
| gone | 1 |

<!-- end of table -->

<!-- rows: variant -->

| variant | images/s |
| --- | --- |
| second | 0 |

<!-- end of table -->

| a table | of the page's own |
"""


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    path = tmp_path / "records" / "new" / "table.md"
    path.parent.mkdir(parents=True)
    path.write_text(
        "Title\n\n| figure | value |\n|---|---|\n| one | 2 |\n| two | 3 |\n\nMore:\n\n"
        "| variant | images/s |\n|---|---|\n| first | 5 |\n| second | 6 |\n"
    )
    return path


@pytest.mark.usefixtures("record")
def test_whole_tables_and_chosen_rows_follow_the_record() -> None:
    new = tables.updated(PAGE)
    assert "| one | 2 |\n| two | 3 |\n" in new and "gone" not in new
    assert "| second | 6 |\n" in new and "first" not in new and "of the page's own" in new
    assert tables.updated(new) == new


def test_what_is_missing_is_named(record: Path) -> None:
    with pytest.raises(SystemExit, match=r"records/new: variant: no rows second"):
        record.write_text(record.read_text().replace("second", "third"))
        tables.updated(PAGE)
    with pytest.raises(SystemExit, match=r"records/new: 0 tables have columns that begin with variant"):
        record.write_text(record.read_text().replace("variant", "kind"))
        tables.updated(PAGE)
    with pytest.raises(SystemExit, match=r"records/old: no such record"):
        tables.updated(PAGE.replace("records/new", "records/old"))
