"""The documentation against the code: commands parse, links lead somewhere, messages and figures are real."""

import ast
import json
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
from store_builder import fill, spec, write

from benchmarks import readme_tables, tables
from repcon import cli
from repcon.config import CropConfig
from repcon.crops.plan import philox, plan_crops
from repcon.labels.store import LabelStore

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of every command in the page's shell blocks, continued lines joined, comments dropped."""
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def repcon_words(words: list[str]) -> list[str]:
    """What follows `repcon`, however it is started; nothing for other commands."""
    if words[0] == "repcon":
        return words[1:]
    return words[words.index("repcon.cli") + 1 :] if "repcon.cli" in words else []


def recipes(text: str) -> dict[str, str]:
    """The page's TOML blocks whose first line is a comment with their file name."""
    named = (block.partition("\n") for block in blocks(text, "toml"))
    return {first.removeprefix("# "): rest for first, _, rest in named if first.startswith("# ")}


@pytest.mark.parametrize("page", TEXTS)
def test_every_repcon_command_parses(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A recipe that one page introduces may be used on another.
    for text in (*TEXTS.values(), TEXTS[page]):
        for name, content in recipes(text).items():
            (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    for words in filter(None, map(repcon_words, commands(TEXTS[page]))):
        kind = cli.COMMANDS[words[0]]
        flags = words[1:]
        recipe, _ = cli._take(flags, "--recipe"), cli._take(flags, "--json")
        assert isinstance(cli._settings(words[0], kind, flags, recipe), kind), words


@pytest.mark.parametrize("page", TEXTS)
def test_every_recipe_is_used(page: str) -> None:
    used = {word for words in commands(TEXTS[page]) for word in words}
    assert recipes(TEXTS[page]).keys() <= used


@pytest.mark.parametrize("page", TEXTS)
def test_every_make_target_and_script_is_there(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(TEXTS[page]):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        if words[0] == "python":
            name = words[2].replace(".", "/") if words[1] == "-m" else words[1]
            assert any((ROOT / file).is_file() for file in (name, f"{name}.py", f"{name}/__main__.py")), words
    for path in re.findall(r"`((?:tools|benchmarks|repcon|kernels|tests|docs)/[\w./-]+)`", TEXTS[page]):
        assert "NAME" in path or (ROOT / path).exists(), path


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS)
def test_every_internal_link_resolves(page: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def templates() -> list[str]:
    """Every text in the source, with `…` where a value is put in."""
    found = []
    for path in (*(ROOT / "repcon").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_quoted_message_is_one_of_the_source() -> None:
    known = templates()
    messages = re.findall(r"^### (`+)(.*)\1$", TEXTS["docs/troubleshooting.md"], re.MULTILINE)
    assert len(messages) >= 25
    for _, message in messages:
        for piece in filter(None, message.strip("…").split("…")):
            assert any(piece in text for text in known), (message, piece)


@pytest.mark.parametrize("values", ["float16", "quantized8"])
@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (0.5, 4.0)])
def test_the_independent_reader_gives_what_the_store_gives(
    values: str, temperatures: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from read_store import read

    path = str(tmp_path / "labels.zarr")
    store = LabelStore.create(path, spec(values=values, temperatures=temperatures))
    write(store, store.units()[0], missing=[3, 7])
    fill(store)
    for crop in (0, 3):
        crop_labels = store.reader.crop_labels(crop)
        for head, (ids, logp) in crop_labels.labels.items():
            for found, wanted in zip(
                read(path, head, crop), (crop_labels.boxes, crop_labels.flips, ids, logp), strict=True
            ):
                assert found.dtype == wanted.dtype
                # Eight-bit values are decoded in float64 there, in float32 here: they may round apart.
                close = 0.0 if wanted is not logp or values == "float16" else 0.003
                np.testing.assert_allclose(found, wanted, rtol=0, atol=close)


def test_the_crop_contract_s_golden_vectors() -> None:
    text = TEXTS["docs/crop-contract.md"]
    rows = re.findall(r"^\| ([0-9a-f ]+?)(?: \(4 times\))? \| ([0-9a-f ]+) \| ([0-9a-f ]+) \|$", text, re.MULTILINE)
    assert len(rows) == 3
    for counter, key, words in ([[int(word, 16) for word in cell.split()] for cell in row] for row in rows):
        arrays = [np.array([word], np.uint64) for word in (counter * 4)[:4]]
        found = philox(arrays, [np.array([word], np.uint64) for word in key])
        assert [int(word[0]) for word in found] == words
    crop = r"([\d, ]+) \| (\d)"
    drawn = re.findall(rf"^\| `(\w{{32}})` \| (\d+) x (\d+) \| {crop} \| {crop} \|$", text, re.MULTILINE)
    hashes = np.frombuffer(bytes.fromhex("".join(row[0] for row in drawn)), np.uint8).reshape(-1, 16)
    sizes = np.array([[int(row[1]), int(row[2])] for row in drawn])
    plan = plan_crops(CropConfig(seed=2**40 + 7), hashes, sizes, [0, 5])
    assert len(drawn) == 3
    for place, column in ((0, 3), (1, 5)):
        assert plan.boxes[place].tolist() == [[int(number) for number in row[column].split(",")] for row in drawn]
        assert plan.flips[place].tolist() == [int(row[column + 1]) for row in drawn]


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_are_those_of_the_records(page: str) -> None:
    assert tables.updated(TEXTS[page]) == TEXTS[page], "run python -m benchmarks.tables"


@pytest.mark.parametrize("page", ["docs/performance.md", "docs/transfer.md"])
def test_every_record_that_is_named_has_a_marked_table_below_it(page: str) -> None:
    for section in TEXTS[page].split("Record: ")[1:]:
        table = re.search(r"^\|", section, re.MULTILINE)
        assert table and section[: table.start()].endswith("-->\n\n"), section[:80]


@pytest.mark.parametrize("page", ["docs/performance.md", "docs/transfer.md"])
def test_a_record_s_processor_is_the_one_that_the_page_names(page: str) -> None:
    for record, rest in re.findall(r"^Record: `([\w./-]+)`(.*?)\.\s", TEXTS[page], re.MULTILINE | re.DOTALL):
        for maker in re.findall("AMD|Intel", rest):
            assert maker in json.loads((ROOT / record / "env.json").read_text("utf-8"))["processor"], record


def test_the_readme_shows_the_plot_of_its_table_s_record() -> None:
    assert f"benchmarks/records/{readme_tables.TRANSFER}/consolidation.svg" in TEXTS["README.md"]


@pytest.mark.parametrize("page", TEXTS)
def test_lines_are_short_enough_to_read(page: str) -> None:
    inside = False
    for line in TEXTS[page].splitlines():
        inside = inside != line.startswith("```")
        assert inside or line.startswith("|") or len(line) <= 120, line


@pytest.mark.parametrize("page", sorted(name for name in TEXTS if name.startswith("docs/how-to/")))
def test_every_how_to_page_starts_with_the_command(page: str) -> None:
    title, _, rest = TEXTS[page].partition("\n\n")
    assert title.startswith("# ") and rest.startswith(("```sh\n", "```python\n")), page


def test_the_readme_names_every_extra_for_users() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    named = re.search(r"# extras: (.*)$", TEXTS["README.md"], re.MULTILINE)
    assert named and set(named[1].split(", ")) == extras - {"bench", "peers", "test", "lint", "docs"}
    pages = " ".join(text for text in TEXTS.values())
    used = re.findall(r"(?:repcon|\.)\[([\w,]+)\]", pages)
    assert {extra for group in used for extra in group.split(",")} <= extras
