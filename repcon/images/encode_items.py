"""Read and encode the images of a source in threads, in order."""

import errno
from collections.abc import Iterator
from contextlib import closing
from functools import partial

from repcon.config import PackConfig
from repcon.images import sources
from repcon.images.encode import Encoded, encode
from repcon.images.file_names import display_name, utf8_name
from repcon.images.jpeg import InvalidImageError
from repcon.images.parquet import RowReader
from repcon.images.sources import SourceItem
from repcon.runtime.errors import UserError
from repcon.runtime.local_files import error_reason
from repcon.runtime.prefetch import map_ahead
from repcon.runtime.system import cores

BATCH = 8
"""Images that a thread encodes at a time."""


def encode_items(items: list[SourceItem], config: PackConfig) -> Iterator[tuple[SourceItem, Encoded | str]]:
    """Yields each item, in order, with its JPEG or the reason why there is none."""
    num_workers = config.num_workers or cores()
    rows = RowReader()
    batches = (
        [(item, _read_row(item, rows)) for item in items[start : start + BATCH]]
        for start in range(0, len(items), BATCH)
    )
    encode_batch = partial(_encode_batch, config=config)
    with closing(map_ahead(encode_batch, batches, num_workers=num_workers, depth=2 * num_workers)) as results:
        for batch in results:
            yield from batch


def _read_row(item: SourceItem, rows: RowReader) -> bytes | str | None:
    """A Parquet row's image, or the reason why there is none; None for other items, which any thread may read."""
    if not item.column:
        return None
    try:
        return rows.read(item.container, item.column, item.offset)
    except InvalidImageError as error:
        return str(error)
    except MemoryError as error:
        raise _unrelated_error(item, "memory is too short to read it") from error


def _encode_batch(
    batch: list[tuple[SourceItem, bytes | str | None]], config: PackConfig
) -> list[tuple[SourceItem, Encoded | str]]:
    results: list[tuple[SourceItem, Encoded | str]] = []
    for item, row in batch:
        try:
            data = sources.read_item(item) if row is None else row
            result = data if isinstance(data, str) else encode(data, config.max_side, config.jpeg_quality)
        except InvalidImageError as error:
            result = str(error)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM):
                raise _unrelated_error(item, f"cannot be read ({error_reason(error)})") from error
            result = f"cannot be read: {error.strerror}"
        except MemoryError as error:
            raise _unrelated_error(item, "memory is too short to decode it") from error
        results.append((item, result))
    return results


def _unrelated_error(item: SourceItem, why: str) -> UserError:
    """The error for a failure that is not the image's, for which leaving the image out would be wrong."""
    where = display_name(utf8_name(item.container)) + (f": {item.name}" if item.offset else "")
    return UserError(
        f"{where}: {why}; no image is left out for that: fix it, or move the file away, and run the same command "
        "again, it goes on after the last finished shard"
    )
