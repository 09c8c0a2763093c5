"""`repcon pull`: what `repcon push` put on the Hugging Face hub, checked before it is there."""

import glob
import os
import shutil
from pathlib import Path
from typing import Any

from repcon.commands import verify
from repcon.config import PullConfig, VerifyConfig
from repcon.runtime.atomic_files import move_into_place
from repcon.runtime.errors import UserError
from repcon.sharing.address import parse_address
from repcon.sharing.bundle import ABOUT, FILES, Kind, fingerprint_of, read_about, require_place
from repcon.sharing.hub import download, find_commit

PARTIAL = ".pulling"
"""What the folder of an unfinished download ends in."""


def run(config: PullConfig) -> dict[str, Any]:
    """Downloads next to `out`, checks, and only then puts it at `out`; gives kind, commit and fingerprint."""
    address, out = parse_address(config.repository), Path(config.out)
    if os.path.lexists(out):
        raise UserError(f"out: {out} is there already; name another, or remove it")
    commit = find_commit(address, config.revision)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{commit[:12]}{PARTIAL}"
    about = download(address, commit, partial, (ABOUT,)) / ABOUT
    if not about.is_file():
        shutil.rmtree(partial)
        raise UserError(f"{address}: holds no {ABOUT}, so `repcon push` did not put it there; check the path")
    kind, fingerprint = read_about(about, address)
    require_place(kind, address)
    folder = download(address, commit, partial, (ABOUT, *FILES[kind]))
    if fault := _find_fault(kind, folder, fingerprint):
        shutil.rmtree(partial)
        raise UserError(f"{address}: {fault}; nothing was kept")
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    move_into_place(folder, out)
    for old in out.parent.glob(f".{glob.escape(out.name)}.*{PARTIAL}"):  # of other commits too
        shutil.rmtree(old, ignore_errors=True)
    return {"out": str(out), "kind": kind, "commit": commit, "fingerprint": fingerprint}


def _find_fault(kind: Kind, folder: Path, fingerprint: str) -> str:
    """In a store's structure, checksums and labels, a model's weights, or the fingerprint; empty where all is sound."""
    try:
        if kind == "store":
            verify.run(VerifyConfig(store=str(folder), sample=0))
        found = fingerprint_of(kind, folder)
    except UserError as error:
        return str(error)
    return "" if found == fingerprint else f"its fingerprint is {found[:16]}, not {fingerprint[:16]} as it was pushed"
