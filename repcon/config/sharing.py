"""Settings of push, pull and export."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from repcon.config.base import BaseConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig(BaseConfig):
    """Write a student as one ONNX or torch.export file.

    It opens without repcon and timm, and takes batches of any size.
    """

    model: Annotated[Positional[str], arg(metavar="STUDENT")]
    """A folder of `repcon train`."""
    to: Literal["onnx", "torch"]
    """An ONNX model, or a program of torch.export (.pt2)."""
    out: str = ""
    """The file; empty takes `student.onnx` or `student.pt2` in the student's folder. One that exists is replaced."""
    normalize: bool = False
    """Take (B, 3, S, S) uint8 pixels and normalise them inside; otherwise float32 that is normalised."""
    heads: bool = False
    """Also give the logits of each head, as `logits/NAME`, with the pooled features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushConfig(BaseConfig):
    """Put a student, teacher or store on the Hugging Face hub.

    Its card goes with it.
    """

    source: Annotated[Positional[str], arg(metavar="WHAT")]
    """A folder of `repcon train` or `repcon teach`, or a store."""
    repository: Annotated[Positional[str], arg(metavar="hf://OWNER/NAME[/PATH]")]
    """Where to; a store goes to `hf://datasets/OWNER/NAME[/PATH]`. A repository that is missing is made."""
    private: bool = False
    """Make the repository private; refused where it is there and public."""
    revision: str = ""
    """The branch; empty takes the main one, and one that is missing is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullConfig(BaseConfig):
    """Get what `repcon push` put on the hub, checked on the way."""

    repository: Annotated[Positional[str], arg(metavar="hf://OWNER/NAME[/PATH]")]
    """Where from; a store lies at `hf://datasets/OWNER/NAME[/PATH]`."""
    out: str
    """Folder that is made for it; it must not be there yet."""
    revision: str = ""
    """A branch, tag or commit; empty takes the main branch."""
