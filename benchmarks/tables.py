"""Writes the tables of README.md and docs/ from the records, and the recipes that they quote.

`python -m benchmarks.tables` does it. A page marks where a table goes, with blank lines around the markers:

    <!-- table: figure | median -->       the table whose columns begin so, all of it
    <!-- rows: figure | median -->        of that table only the rows that are there already, by their first cells
    <!-- table: SPEED -->                 one of README's own, made in `readme_tables.py`
    <!-- end of table -->

    <!-- file: repcon/config/recipes/teach.toml -->    the recipe as it is, below a line with its name
    <!-- end of file -->

The record is the one that the page names last before the marker, as `Record: ` and the folder in backquotes. To show
another record, write its folder there; to show another row, add a line with its name.
"""

import re
from pathlib import Path

from benchmarks import readme_tables

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/transfer.md", "docs/how-to/own-images.md")
_MARKED = re.compile(r"<!-- (table|rows): (.*?) -->\n\n(.*?)\n*<!-- end of table -->", re.DOTALL)
_FILE = re.compile(r"<!-- file: (\S+) -->\n\n.*?\n*<!-- end of file -->", re.DOTALL)
_RECORD = re.compile(r"^Record: `([\w./-]+)`", re.MULTILINE)
_TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


def updated(text: str) -> str:
    """The page with every marked table as its record has it now, and every marked file as it is.

    Raises SystemExit, naming the marker, where a record, a table or a row is missing.
    """

    def replaced(found: re.Match[str]) -> str:
        kind, title, held = found.groups()
        if title in readme_tables.TABLES:
            rows = readme_tables.TABLES[title]()
        else:
            records = _RECORD.findall(text, 0, found.start())
            if not records:
                raise SystemExit(f"table {title}: no line `Record: ...` stands above it")
            rows = _recorded(records[-1], title)
            if kind == "rows":
                rows = _chosen(rows, [_first(line) for line in held.splitlines()[2:]], f"{records[-1]}: {title}")
        return f"<!-- {kind}: {title} -->\n\n" + "\n".join(rows) + "\n\n<!-- end of table -->"

    return _FILE.sub(_quoted, _MARKED.sub(replaced, text))


def _quoted(found: re.Match[str]) -> str:
    path = ROOT / found[1]
    return f"<!-- file: {found[1]} -->\n\n```toml\n# {path.name}\n{path.read_text()}```\n\n<!-- end of file -->"


def _recorded(folder: str, title: str) -> list[str]:
    """The lines of the record's table whose columns begin with `title`."""
    path = ROOT / folder / "table.md"
    if not path.is_file():
        raise SystemExit(f"{folder}: no such record")
    tables = [table.splitlines() for table in _TABLE.findall(path.read_text())]
    found = [lines for lines in tables if lines[0].strip("| ").startswith(title.strip("| "))]
    if len(found) != 1:
        raise SystemExit(f"{folder}: {len(found)} tables have columns that begin with {title}")
    return found[0]


def _chosen(lines: list[str], names: list[str], where: str) -> list[str]:
    """The head and the rows of these names, in their order."""
    rows = {_first(line): line for line in lines[2:]}
    if missing := [name for name in names if name not in rows]:
        raise SystemExit(f"{where}: no rows {', '.join(missing)}")
    return lines[:2] + [rows[name] for name in names]


def _first(line: str) -> str:
    """A row's first cell."""
    return line.strip("|").split("|")[0].strip()


def main() -> None:
    """Rewrites the pages that differ, and names them."""
    for name in PAGES:
        path = ROOT / name
        text = path.read_text()
        new = updated(text)
        if new != text:
            path.write_text(new)
            print(f"{name}: written anew")


if __name__ == "__main__":
    main()
