"""List and read images in Parquet files with one image column and at most one label column, as `datasets` writes them.

An image is a struct {bytes, path} or plain binary. A row is named `FILE/ROW`, with rows counted from 0. The file's
`huggingface` metadata, if present, tells which columns are images and gives the class names of a ClassLabel column.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from repcon.images.archives import MAX_LABEL_BYTES, FoundImage, SourceScan, plain_file_status, read_or_damage
from repcon.images.file_names import MAX_FILE_BYTES
from repcon.images.jpeg import InvalidImageError
from repcon.images.tar_samples import Label
from repcon.runtime.errors import UserError
from repcon.runtime.extras import require_extra

SUFFIX = ".parquet"
LABEL_COLUMNS = ("label", "labels", "cls", "class")
"""Names of text or integer columns that are labels even if they are not declared as ClassLabel."""
MAX_NAMES = 20
"""Columns that a message lists."""
_ROWS = 8
"""Rows that are read from a file at a time."""


def add_parquet(path: Path, name: str, scan: SourceScan) -> None:
    """Adds a file's rows; images are not read. `name`: the file's part in the names of its rows.

    Raises UserError where pyarrow is missing, where several columns may be the image or the label, where the file has
    no such column as `scan.columns` names, and where it cannot be read for a reason other than damage.
    """
    if (status := plain_file_status(str(path), name, scan)) is None:
        return
    file = read_or_damage(lambda: _open(path), path)
    if isinstance(file, str):
        scan.left_out.append((name, f"a damaged Parquet file: {file}"))
        return
    if file.metadata.num_rows > status.st_size:
        scan.left_out.append(
            (name, f"a damaged Parquet file: {file.metadata.num_rows:,} rows in {status.st_size} bytes")
        )
        return
    features = _features(file.schema_arrow)
    column = _image_column(path, file.schema_arrow, features, scan.columns.image)
    if not column:
        scan.left_out.append((name, "a Parquet file without an image column (binary, or a struct of bytes and path)"))
        return
    label = _label_column(path, file.schema_arrow, features, scan.columns.label)
    if not scan.columns.label and label != "label":
        text = f"labels are column {label}: there is no column label" if label else "no labels: no ClassLabel column"
        scan.warnings[f"Parquet: {text}"] = None
    names = _class_names(path, label, features)
    scan.class_order.update(dict.fromkeys(names))
    for row, labels in enumerate(_labels(file, path, label, names)):
        if isinstance(labels, str):
            scan.left_out.append((f"{name}/{row}", labels))
        else:
            scan.found.append(FoundImage(f"{name}/{row}", str(path), row, 0, labels, column))
    scan.identify(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")


class RowReader:
    """Reads images of rows in increasing order: each row group once, with a page and a few rows in memory."""

    def __init__(self) -> None:
        self._of: tuple[str, str] | None = None

    def read(self, path: str, column: str, row: int) -> bytes:
        """The row's image.

        Raises InvalidImageError where the row has none or its row group is damaged, UserError for transient errors.
        """
        if self._of != (path, column):
            self._of, self._group, self._damage = None, -1, ""
            file = read_or_damage(lambda: _open(Path(path)), Path(path))
            if isinstance(file, str):
                raise InvalidImageError(f"a damaged Parquet file: {file}")
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._of, self._file, self._starts = (path, column), file, [0, *accumulate(counts)]
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._first:
            self._start(group, column)
        while not self._damage and row >= self._first + len(self._held):
            self._first += len(self._held)
            held = read_or_damage(self._next, Path(path))
            self._held, self._damage = (self._held, held) if isinstance(held, str) else (held, "")
        if self._damage:
            raise InvalidImageError(f"a damaged row group: {self._damage}")
        return _image(self._held[row - self._first])

    def _start(self, group: int, column: str) -> None:
        self._group, self._damage, self._held = group, "", ()
        if group >= self._file.num_row_groups:
            self._damage = "the file has become shorter"
            return
        self._first = self._starts[group]
        self._batches = self._file.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False)

    def _next(self) -> Any:
        batch = next(self._batches, None)
        if batch is None:
            raise ValueError("fewer rows than it claims")
        return batch.column(0)


def _open(path: Path) -> Any:
    """A ParquetFile that reads page by page, not whole row groups; pyarrow writes pages of up to 1,024 rows."""
    require_extra("hf", ("pyarrow",), str(path))
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)


def _features(schema: Any) -> dict[str, dict]:
    """Column -> its declaration by `datasets`; {} where there is none."""
    try:
        held = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return {name: one for name, one in held.items() if isinstance(one, dict)} if isinstance(held, dict) else {}


def _image_column(path: Path, schema: Any, features: dict[str, dict], name: str) -> str:
    """The column that holds the images; empty where none does. Raises UserError where several may, or `name` cannot."""
    if name:
        return _named(path, schema, name, "image", _holds_bytes)
    found = [field.name for field in schema if _holds_bytes(field.type)]
    declared = [name for name in found if features.get(name, {}).get("_type") == "Image"]
    return _only(path, declared or found, "image")


def _label_column(path: Path, schema: Any, features: dict[str, dict], name: str) -> str:
    """The column of the labels; empty where there is none. Raises UserError where several may be, or `name` cannot."""
    from pyarrow import types

    if name:
        return _named(path, schema, name, "label", _holds_labels)
    found = []
    for field in schema:
        held = field.type.value_type if types.is_dictionary(field.type) else field.type
        is_usual = field.name in LABEL_COLUMNS and _holds_labels(field.type)
        if is_usual or (features.get(field.name, {}).get("_type") == "ClassLabel" and types.is_integer(held)):
            found.append(field.name)
    return _only(path, found, "label")


def _only(path: Path, columns: Sequence[str], name: str) -> str:
    """The column `name` if it is among them, else the only one, else ""."""
    if name in columns or not columns:
        return name if columns else ""
    if len(columns) > 1:
        raise UserError(
            f"{path}: several columns may be the {name} ({', '.join(columns[:5])}) and none is called {name}; name one "
            f"to `repcon pack` with --{name}-column"
        )
    return columns[0]


def _named(path: Path, schema: Any, column: str, what: str, is_fit: Callable[[Any], bool]) -> str:
    """The column that `--{what}-column` names. Raises UserError where it is not there once, or of another type."""
    places = schema.get_all_field_indices(column)
    if len(places) != 1:
        count = "several columns are called" if places else "there is no column"
        names = ", ".join(schema.names[:MAX_NAMES]) + (", …" if len(schema.names) > MAX_NAMES else "")
        raise UserError(f"{path}: {count} {column!r}; give --{what}-column one of {names}")
    kind = schema.field(places[0]).type
    if not is_fit(kind):
        fit = [field.name for field in schema if is_fit(field.type)][:MAX_NAMES] or ["a column of another file"]
        raise UserError(f"{path}: column {column!r} holds {kind}, no {what}s; give --{what}-column {', '.join(fit)}")
    return column


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this type may hold images."""
    from pyarrow import types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _holds_labels(kind: Any) -> bool:
    """Whether a column of this type may hold labels: integers or texts, also as a dictionary."""
    from pyarrow import types

    held = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_integer(held) or _is_text(held)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _class_names(path: Path, label: str, features: dict[str, dict]) -> list[str]:
    """A ClassLabel's names in the order of their ids; [] for other columns. Raises UserError where two are equal."""
    declared = features.get(label, {})
    names = declared.get("names") if declared.get("_type") == "ClassLabel" else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []
    if twice := [name for place, name in enumerate(names) if name in names[:place] or not name.strip()]:
        raise UserError(f"{path}: column {label}: {twice[0]!r} names two classes, or none; give each its own name")
    return names


def _labels(file: Any, path: Path, column: str, names: list[str]) -> Iterator[tuple[Label, ...] | str | None]:
    """Each row's labels: None where the file has no such column, a text saying why where they cannot be read."""
    held: dict[Any, tuple[Label, ...]] = {}
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if not column:
            yield from [None] * rows
            continue
        values = read_or_damage(
            lambda group=group: _values(file.read_row_group(group, [column], use_threads=False)), path
        )
        if isinstance(values, str) or len(values) != rows:
            damage = values if isinstance(values, str) else "fewer rows than it claims"
            yield from [f"a damaged row group: {damage}"] * rows
            continue
        for value in values:
            if value not in held:
                held[value] = _label(value, names)
            yield held[value]


def _values(table: Any) -> list[int | bytes | None]:
    """A label column's values: integers, or texts as their bytes, which may be no UTF-8."""
    import pyarrow

    column = table.column(0)
    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return (column.cast(pyarrow.large_binary()) if _is_text(column.type) else column).to_pylist()


def _label(value: int | bytes | None, names: list[str]) -> tuple[Label, ...]:
    """-1 and null are no label, as in `datasets`."""
    if value is None or value == -1:
        return ()
    if isinstance(value, bytes):
        if len(value) > MAX_LABEL_BYTES:
            return (Label("", "", f"its label has {len(value)} bytes, of which at most {MAX_LABEL_BYTES} are read"),)
        return (Label("", value.decode("utf-8", "surrogateescape").strip()),)
    if not names:
        return (Label("", str(value)),)
    if not 0 <= value < len(names):
        return (Label("", "", f"its label is {value}, and the file names {len(names)} classes"),)
    return (Label("", names[value].strip()),)


def _image(scalar: Any) -> bytes:
    """The image's bytes. Raises InvalidImageError where the row has none."""
    value = scalar.as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        raise InvalidImageError("only the image's path is stored, not its bytes")
    if not data:
        raise InvalidImageError("an empty row")
    if len(data) > MAX_FILE_BYTES:
        raise InvalidImageError(f"too large a file: {len(data)} bytes, of which at most {MAX_FILE_BYTES} are read")
    return data
