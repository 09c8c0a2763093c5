"""`repcon push`: a student, a teacher or a label store into a repository of the Hugging Face hub."""

import tempfile
from pathlib import Path
from typing import Any

from repcon.commands import verify
from repcon.commands.outcome import run_step
from repcon.config import PushConfig, VerifyConfig
from repcon.runtime.run_dir import write_json, write_text
from repcon.sharing.address import parse_address
from repcon.sharing.bundle import ABOUT, CARD, FILES, find_bundle, require_place
from repcon.sharing.cards import card_text
from repcon.sharing.hub import hub_api, require_token, upload


def run(config: PushConfig) -> dict[str, Any]:
    """Checks what is pushed, writes its card, and uploads both; gives the commit and the fingerprint."""
    address = parse_address(config.repository)
    bundle = find_bundle(config.source)
    require_place(bundle.kind, address)
    hub_api(address)
    require_token(address)
    if bundle.kind == "store":
        run_step("verify", verify.run, VerifyConfig(store=str(bundle.folder), sample=0))
    about = bundle.about
    with tempfile.TemporaryDirectory(prefix="repcon-push-") as temporary:
        folder = Path(temporary)
        for file in bundle.files():
            link = folder / file.relative_to(bundle.folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        write_json(folder / ABOUT, about)
        write_text(folder / CARD, card_text(bundle, address, about["fingerprint"]))
        patterns = FILES[bundle.kind]
        commit = upload(address, folder, patterns, private=config.private, revision=config.revision)
    return {"address": str(address), "commit": commit, **about}
