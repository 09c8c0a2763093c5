"""Several sources as one: what `repcon pack A B C OUT` packs, and `--limit`."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from repcon.images import hub, sources
from repcon.images.labels import about_names, about_numbers, ordered
from repcon.images.sources import Item, Listing
from repcon.runtime.errors import UserError


def paths(source: str | tuple[str, ...]) -> tuple[str, ...]:
    """The sources, one or several."""
    return (source,) if isinstance(source, str) else source


def told(source: str | tuple[str, ...]) -> str:
    """The sources in a message."""
    return ", ".join(paths(source))


def read_all(source: str | tuple[str, ...], limit: int = 0) -> Listing:
    """Lists every source, in the order given, as one; at most `limit` images of them where that is not 0.

    Classes of one name are one class. Of several sources, each image's name starts with the end of its source's path.
    Raises UserError where one of the sources has nothing to pack, or is named twice.
    """
    names = paths(source)
    if not names:
        raise UserError("source: none given; name an image folder, a .tar, a .parquet, or a folder of such files")
    if len({Path(name).resolve() for name in names}) < len(names):
        raise UserError(f"source: {told(source)}: one of them is named twice")
    listings = [sources.read(name) for name in names]
    if len(listings) == 1 and not limit:
        return listings[0]
    shares = equal_shares([len(listing.items) for listing in listings], limit)
    if len(listings) == 1:
        (listing,) = listings
        return replace(listing, items=_spread(listing.items, shares[0]), identity=_identity(listings, limit))
    return _joined(listings, _prefixes(names), shares, _identity(listings, limit))


def equal_shares(sizes: Sequence[int], limit: int) -> list[int]:
    """How many to take of sets of these sizes for `limit` in all: as many of each, those that are too small whole."""
    if not limit or sum(sizes) <= limit:
        return list(sizes)
    shares, left = [0] * len(sizes), limit
    order = sorted(range(len(sizes)), key=lambda place: (sizes[place], place))
    for number, place in enumerate(order):
        shares[place] = min(sizes[place], left // (len(order) - number))
        left -= shares[place]
    return shares


def _spread(items: list[Item], count: int) -> list[Item]:
    """`count` of the items, evenly over their order, which is that of their folders."""
    return items if count == len(items) else [items[place * len(items) // count] for place in range(count)]


def _joined(listings: list[Listing], prefixes: list[str], shares: list[int], identity: str) -> Listing:
    """One listing of all, its labels counted anew."""
    classes = _ordered({name for listing in listings for name in listing.classes})
    numbers = {name: number for number, name in enumerate(classes)}
    items, left_out = [], []
    for listing, prefix, share in zip(listings, prefixes, shares, strict=True):
        for item in _spread(listing.items, share):
            label = numbers[listing.classes[item.label]] if item.label >= 0 else -1
            key = f"{prefix.replace('.', '_')}/{item.key}"
            items.append(replace(item, name=f"{prefix}/{item.name}", key=key, label=label))
        left_out += [(f"{prefix}/{name}", reason) for name, reason in listing.left_out]
    cautions = [caution for listing in listings for caution in listing.cautions]
    cautions += about_names(classes) + about_numbers(listing.classes for listing in listings)
    return Listing(items, classes, left_out, identity, tuple(dict.fromkeys(cautions)))


def _ordered(classes: set[str]) -> tuple[str, ...]:
    """Sorted; by value where every name is a number."""
    return tuple(ordered(classes))


def _prefixes(names: Sequence[str]) -> list[str]:
    """The end of each path, with a number where another one has the same: no two may differ in dots alone."""
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


def _identity(listings: list[Listing], limit: int) -> str:
    """Changes with any source's identity, their order, and the limit."""
    words = "\n".join([f"limit {limit}", *(listing.identity for listing in listings)])
    return hashlib.sha256(words.encode()).hexdigest()
