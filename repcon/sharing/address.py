"""Where something lies on the hub: `hf://OWNER/NAME[/PATH]` in a model repository, `hf://datasets/...` in a dataset."""

import re
from dataclasses import dataclass
from typing import Literal

from repcon.runtime.errors import UserError
from repcon.runtime.filesystem import is_safe_name

RepoType = Literal["model", "dataset"]
PREFIX, DATASETS = "hf://", "datasets/"
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True, slots=True)
class Address:
    """A folder of a repository; `path` is empty for its root."""

    repo_type: RepoType
    repo: str
    path: str

    def __str__(self) -> str:
        kind = DATASETS if self.repo_type == "dataset" else ""
        return f"{PREFIX}{kind}{self.repo}" + (f"/{self.path}" if self.path else "")

    def inside(self, name: str) -> str:
        """The name in the repository of a file of this folder."""
        return f"{self.path}/{name}" if self.path else name


def parse_address(text: str) -> Address:
    """Raises UserError for what is no address, or a path that could leave its folder."""
    rest = text.removeprefix(PREFIX)
    is_dataset = rest.startswith(DATASETS)
    owner, _, more = rest.removeprefix(DATASETS).partition("/")
    name, _, path = more.strip("/").partition("/")
    named = text.startswith(PREFIX) and _PART.fullmatch(owner) and _PART.fullmatch(name)
    if not named or (path and not is_safe_name(path)):
        forms = f"{PREFIX}OWNER/NAME[/PATH] for a model, {PREFIX}{DATASETS}OWNER/NAME[/PATH] for a label store"
        raise UserError(f"{text}: not an address of the hub; write {forms}")
    return Address("dataset" if is_dataset else "model", f"{owner}/{name}", path)
