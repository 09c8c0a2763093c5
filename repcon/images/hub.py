"""Download datasets of the Hugging Face hub: `hf://datasets/OWNER/NAME[/CONFIG][:SPLIT]`.

The hub keeps every public dataset as Parquet, `CONFIG/SPLIT/NUMBER.parquet`, on the branch `refs/convert/parquet`.
One split's files are downloaded into the cache of huggingface_hub, and found there again without network.
"""

import glob
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repcon.runtime.errors import UserError, first_line

PREFIX = "hf://datasets/"
BRANCH = "refs/convert/parquet"


def is_dataset(source: str) -> bool:
    """Whether a source is a dataset of the hub."""
    return source.startswith(PREFIX)


def short_name(source: str) -> str:
    """A dataset's `NAME`, with config and split where they are given."""
    return "-".join(source.removeprefix(PREFIX).replace(":", "/").split("/")[1:]) or source


def download(source: str) -> tuple[Path, str]:
    """Downloads one split's files that are not in the cache; gives their folder and the split's identity.

    The identity is a hash of the dataset's name, commit, config and split. Raises UserError where the dataset, config
    or split cannot be downloaded.
    """
    path, _, split = source.removeprefix(PREFIX).partition(":")
    owner, name, config, *more = [*path.split("/"), "", ""]
    if not owner or not name or any(more):
        raise UserError(f"{source}: must be {PREFIX}OWNER/NAME, with /CONFIG and :SPLIT where there are several")
    files = [parts for file in _files(source, f"{owner}/{name}") if len(parts := file.split("/")) == 3]
    config = _choose(source, "config", config, {parts[0] for parts in files}, "default")
    split = _choose(source, "split", split, {parts[1] for parts in files if parts[0] == config}, "train")
    root = _snapshot(source, f"{owner}/{name}", allow_patterns=f"{glob.escape(f'{config}/{split}')}/*.parquet")
    words = f"{owner}/{name}@{root.name}/{config}/{split}"
    return root / config / split, hashlib.sha256(words.encode()).hexdigest()


def _files(source: str, repo: str) -> list[str]:
    """The dataset's Parquet files; those of the cache where the hub cannot be reached."""
    try:
        held = _call_hub(source, lambda api: api.dataset_info(repo, revision=BRANCH).siblings)
        found = [file.rfilename for file in held]
    except UserError:
        root = _snapshot(source, repo, local_files_only=True)
        found = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.parquet"))]
    return [file for file in found if file.endswith(".parquet")]


def _snapshot(source: str, repo: str, **options: Any) -> Path:
    """The folder of the commit in the cache of huggingface_hub."""
    options |= {"repo_type": "dataset", "revision": BRANCH}
    return Path(_call_hub(source, lambda api: api.snapshot_download(repo, **options)))


def _call_hub(source: str, call: Callable[[Any], Any]) -> Any:
    """Calls huggingface_hub's client. Raises UserError for all its errors."""
    import huggingface_hub

    try:
        return call(huggingface_hub.HfApi(library_name="repcon"))
    except Exception as error:  # those of huggingface_hub and of the libraries behind it have no common base class
        why = first_line(error)
        raise UserError(
            f"{source}: cannot be had from the Hugging Face hub as Parquet ({why}); download its files and name their "
            "folder instead"
        ) from error


def _choose(source: str, kind: str, name: str, available: set[str], default: str) -> str:
    """The config or split `name`, or the default or only one. Raises UserError listing those available."""
    chosen = name or (default if default in available or len(available) != 1 else next(iter(available)))
    if chosen not in available:
        raise UserError(
            f"{source}: there is no {kind} {chosen}; name one of {', '.join(sorted(available)[:20]) or 'none'}"
        )
    return chosen
