"""Uploads and downloads through huggingface_hub; each of its errors becomes one line with a remedy."""

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from repcon.runtime.console import console
from repcon.runtime.disk_space import require_disk_space
from repcon.runtime.errors import UserError, first_line
from repcon.runtime.extras import require_extra
from repcon.runtime.filesystem import is_safe_name
from repcon.sharing.address import Address

_REMEDIES = {
    "RepositoryNotFoundError": "there is no such repository, or your token may not see it; check the name and the "
    "token (HF_TOKEN, or `hf auth login`)",
    "GatedRepoError": "access has to be asked for on its page first",
    "RevisionNotFoundError": "there is no such revision; name another --revision",
    "RemoteEntryNotFoundError": "there is nothing of that path in the repository; check the path",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set; unset it",
}
"""By the name of huggingface_hub's exception."""


def hub_api(address: Address) -> Any:
    """huggingface_hub's client; its progress bars are for terminals only."""
    require_extra("hub", ("huggingface_hub",), str(address))
    import huggingface_hub

    if not console.is_terminal:
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub.HfApi(library_name="repcon")


@contextlib.contextmanager
def explained(address: Address, hint: str = "") -> Iterator[None]:
    """Raises UserError for whatever the hub, its client or the network says. `hint` ends the message."""
    try:
        yield
    except UserError:
        raise
    # huggingface_hub and the libraries behind it raise errors that have no base in common.
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        reason = first_line(error)[:200]
        remedy = _REMEDIES.get(type(error).__name__)
        if remedy is None and status in (401, 403):
            remedy = f"your token may not do that ({reason}); make one with write access"
        message = remedy or f"the hub could not be used ({reason}); try again"
        raise UserError(f"{address}: {message}{hint}") from error


def require_token(address: Address) -> None:
    """Raises UserError where nothing can be written for want of a token."""
    import huggingface_hub

    if not huggingface_hub.get_token():
        raise UserError(f"{address}: no token of the hub; set HF_TOKEN, or run `hf auth login`")


def upload(address: Address, folder: Path, patterns: tuple[str, ...], *, private: bool, revision: str) -> str:
    """Puts the folder's files there, in place of those that match the patterns; gives the last commit.

    The repository, and a branch `revision`, are made where they are missing. Raises UserError where `private` is asked
    for and the repository is public.
    """
    api = hub_api(address)
    require_token(address)
    with explained(address):
        api.create_repo(address.repo, repo_type=address.repo_type, private=private or None, exist_ok=True)
        if private and not api.repo_info(address.repo, repo_type=address.repo_type).private:
            raise UserError(f"{address}: the repository is public; make it private on its page, or leave out --private")
        if revision:
            api.create_branch(address.repo, repo_type=address.repo_type, branch=revision, exist_ok=True)
        made = api.upload_folder(
            repo_id=address.repo, repo_type=address.repo_type, folder_path=folder, path_in_repo=address.path or None,
            revision=revision or None, delete_patterns=list(patterns), commit_message=f"repcon push {address.path}",
        )  # fmt: skip
    return made.oid


def find_commit(address: Address, revision: str) -> str:
    """The commit that the revision (empty: the main branch) is now."""
    with explained(address):
        return hub_api(address).repo_info(address.repo, repo_type=address.repo_type, revision=revision or None).sha


def download(address: Address, commit: str, folder: Path, patterns: tuple[str, ...]) -> Path:
    """Downloads the address's files that match into `folder`, going on where an earlier download stopped; gives the
    folder inside it that stands for the address.

    Raises UserError for names that no file here should have, where there is no room, and where the hub fails.
    """
    api = hub_api(address)
    where = {"repo_id": address.repo, "repo_type": address.repo_type, "revision": commit}
    wanted = [address.inside(pattern) for pattern in patterns]
    folder.mkdir(parents=True, exist_ok=True)
    with explained(address, "; the same command goes on where it stopped"):
        tree = api.list_repo_tree(**where, path_in_repo=address.path or None, recursive=True)
        sizes = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
        sizes = {name: size for name, size in sizes.items() if any(fnmatch(name, pattern) for pattern in wanted)}
        if odd := [name for name in sizes if not is_safe_name(name)]:
            raise UserError(f"{address}: holds a file of the unusual name {odd[0]!r}; nothing was pulled")
        missing = sum(size for name, size in sizes.items() if not (folder / name).is_file())
        require_disk_space(folder, missing, name=f"{address}, for {folder.parent}")
        api.snapshot_download(**where, allow_patterns=wanted, local_dir=folder)
    return folder / address.path
