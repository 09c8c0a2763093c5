"""Join several sources into one listing, and limit its number of images."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from repcon.images import hub, sources
from repcon.images.archives import ParquetColumns
from repcon.images.class_labels import name_warnings, number_warnings, sort_classes
from repcon.images.sources import SourceItem, SourceListing
from repcon.runtime.errors import UserError


def source_paths(source: str | tuple[str, ...]) -> tuple[str, ...]:
    """The sources of a setting that names one or several."""
    return (source,) if isinstance(source, str) else source


def format_sources(source: str | tuple[str, ...]) -> str:
    """The sources as text for a message."""
    return ", ".join(source_paths(source))


def list_sources(
    source: str | tuple[str, ...], limit: int = 0, columns: ParquetColumns = ParquetColumns()  # noqa: B008 (frozen)
) -> SourceListing:  # fmt: skip
    """Lists all sources, in the order given, as one; at most `limit` images in all unless that is 0.

    Classes of the same name are one class. With several sources, each image's name starts with the last part of its
    source's path. Raises UserError where a source has no images, or is named twice, and where columns are named and
    there is no Parquet file.
    """
    names = source_paths(source)
    if not names:
        raise UserError("source: none given; name an image folder, a .tar, a .parquet, or a folder of such files")
    if len({Path(name).resolve() for name in names}) < len(names):
        raise UserError(f"source: {format_sources(source)}: one of them is named twice")
    listings = [sources.list_source(name, columns) for name in names]
    if columns != ParquetColumns() and not any(item.column for listing in listings for item in listing.items):
        flag = "image_column" if columns.image else "label_column"
        raise UserError(f"{flag}: {format_sources(source)} has no Parquet files, whose columns it names; leave it out")
    if len(listings) == 1 and not limit:
        return listings[0]
    shares = split_limit([len(listing.items) for listing in listings], limit)
    if len(listings) == 1:
        (listing,) = listings
        return replace(listing, items=_sample_evenly(listing.items, shares[0]), identity=_identity(listings, limit))
    return _join(listings, _prefixes(names), shares, _identity(listings, limit))


def split_limit(sizes: Sequence[int], limit: int) -> list[int]:
    """Number of images to take from sets of these sizes: equal numbers, at most the whole set, `limit` in all."""
    if not limit or sum(sizes) <= limit:
        return list(sizes)
    shares, left = [0] * len(sizes), limit
    order = sorted(range(len(sizes)), key=lambda place: (sizes[place], place))
    for number, place in enumerate(order):
        shares[place] = min(sizes[place], left // (len(order) - number))
        left -= shares[place]
    return shares


def _sample_evenly(items: list[SourceItem], count: int) -> list[SourceItem]:
    """`count` of the items at equal distances, in the order of their folders."""
    return items if count == len(items) else [items[place * len(items) // count] for place in range(count)]


def _join(listings: list[SourceListing], prefixes: list[str], shares: list[int], identity: str) -> SourceListing:
    """One listing of all sources, with labels renumbered."""
    classes = tuple(sort_classes({name for listing in listings for name in listing.classes}))
    numbers = {name: number for number, name in enumerate(classes)}
    items, left_out = [], []
    for listing, prefix, share in zip(listings, prefixes, shares, strict=True):
        for item in _sample_evenly(listing.items, share):
            label = numbers[listing.classes[item.label]] if item.label >= 0 else -1
            key = f"{prefix.replace('.', '_')}/{item.key}"
            items.append(replace(item, name=f"{prefix}/{item.name}", key=key, label=label))
        left_out += [(f"{prefix}/{name}", reason) for name, reason in listing.left_out]
    warnings = [warning for listing in listings for warning in listing.warnings]
    warnings += name_warnings(classes) + number_warnings(listing.classes for listing in listings)
    return SourceListing(items, classes, left_out, identity, tuple(dict.fromkeys(warnings)))


def _prefixes(names: Sequence[str]) -> list[str]:
    """The last part of each path, with a number where another has the same; no two differ in dots only."""
    found: list[str] = []
    for name in names:
        end = hub.short_name(name) if hub.is_dataset(name) else Path(name).resolve().name
        end = end.encode("utf-8", "surrogateescape").decode("utf-8", "replace") or "root"
        taken = {prefix.replace(".", "_") for prefix in found}
        number, prefix = 1, end
        while prefix.replace(".", "_") in taken:
            number += 1
            prefix = f"{end}~{number}"
        found.append(prefix)
    return found


def _identity(listings: list[SourceListing], limit: int) -> str:
    """A hash of the sources' identities, their order, and the limit."""
    words = "\n".join([f"limit {limit}", *(listing.identity for listing in listings)])
    return hashlib.sha256(words.encode()).hexdigest()
