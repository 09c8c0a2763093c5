"""The photographs of the consolidation benchmark, made clean: nothing of a domain is in the proxy set.

From the five tars (tools/photos.py) this writes a labelled tar per domain and one unlabelled proxy tar:
an image whose bytes were seen before is dropped, so is a proxy image that any domain holds, and so is every proxy
class that is named like a class of a domain. What was dropped is counted.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from repcon.runtime.atomic_files import AtomicFile
from repcon.runtime.errors import UserError

DOMAINS = ("birds", "grocery", "aerial")
PROXY = ("objects", "imagenet")


@dataclass(slots=True, kw_only=True)
class Dropped:
    """What cleaning took out."""

    repeated_in_domains: int = 0
    """Images of a domain whose bytes an earlier image has."""
    proxy_repeated: int = 0
    proxy_in_domains: int = 0
    """Proxy images that a domain holds too."""
    proxy_named_images: int = 0
    proxy_named_classes: list[str] = field(default_factory=list)
    """Proxy classes that are named like a class of a domain."""


def members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(class, file name, bytes) of each image in a tar of `class/name.jpg`."""
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                handle = tar.extractfile(member)
                assert handle is not None
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                yield folder, name, handle.read()


def words(name: str) -> frozenset[str]:
    """A class name's words in lower case, without WordNet's number and without the plural's s."""
    plain = re.sub(r"^n\d{8}_", "", name).lower()
    return frozenset(w[:-1] if len(w) > 3 and w.endswith("s") else w for w in re.split(r"[^a-z0-9]+", plain) if w)


def named_alike(name: str, others: set[frozenset[str]]) -> bool:
    """Whether all words of one name are in the other: `jay` and `Blue_Jay`, `sea_cucumber` and `Cucumber`."""
    own = words(name)
    return any(own <= other or other <= own for other in others)


def clean(data: Path, out: Path, proxy_images: int = 0) -> dict[str, object]:
    """Writes OUT/{birds,grocery,aerial,proxy}.tar from DATA's five tars; gives the counts.

    `proxy_images` of the clean proxy images are kept, chosen by their content (so a larger number holds a smaller one);
    0 keeps all. The proxy tar is flat and its names come from the contents: no label is in it.
    """
    absent = [name for name in (*DOMAINS, *PROXY) if not (data / f"{name}.tar").is_file()]
    if absent:
        raise UserError(
            f"{data} lacks {', '.join(f'{name}.tar' for name in absent)}; `python tools/photos.py {data}` builds them"
        )
    out.mkdir(parents=True, exist_ok=True)
    dropped = Dropped()
    seen: set[bytes] = set()
    names: set[frozenset[str]] = set()
    counts: dict[str, int] = {}
    for domain in DOMAINS:
        counts[domain] = _clean_domain(data / f"{domain}.tar", out / f"{domain}.tar", seen, names, dropped)
    kept = _clean_proxy(data, seen, names, dropped)
    chosen = sorted(kept)[: proxy_images or None]
    _write(out / "proxy.tar", ((kept[digest][0], kept[digest][1]) for digest in chosen))
    return {"images": counts | {"proxy": len(chosen), "proxy_available": len(kept)}, "dropped": asdict(dropped)}


def _clean_domain(source: Path, out: Path, seen: set[bytes], names: set[frozenset[str]], dropped: Dropped) -> int:
    kept = []
    for folder, name, data in members(source):
        digest = hashlib.sha256(data).digest()
        names.add(words(folder))
        if digest in seen:
            dropped.repeated_in_domains += 1
            continue
        seen.add(digest)
        kept.append((f"{folder}/{name}", data))
    _write(out, iter(kept))
    return len(kept)


def _clean_proxy(
    data: Path, seen: set[bytes], names: set[frozenset[str]], dropped: Dropped
) -> dict[bytes, tuple[str, bytes]]:
    """{content: (file name, bytes)} of the proxy images that share neither content nor class with a domain."""
    kept: dict[bytes, tuple[str, bytes]] = {}
    for source in PROXY:
        for folder, _, jpeg in members(data / f"{source}.tar"):
            digest = hashlib.sha256(jpeg).digest()
            if named_alike(folder, names):
                dropped.proxy_named_images += 1
                if folder not in dropped.proxy_named_classes:
                    dropped.proxy_named_classes.append(folder)
            elif digest in seen:
                dropped.proxy_in_domains += 1
            elif digest in kept:
                dropped.proxy_repeated += 1
            else:
                kept[digest] = (f"{source}-{digest.hex()[:20]}.jpg", jpeg)
    return kept


def _write(path: Path, files: Iterator[tuple[str, bytes]]) -> None:
    """A tar whose bytes depend on names and contents only."""
    with AtomicFile(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
