"""Settings of teachers, precompute, inspect and verify."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from repcon.config.base import BaseConfig
from repcon.config.data import CropConfig
from repcon.config.types import AutoBool, Codec, Device, LoaderKind, Precision, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig(BaseConfig):
    """One teacher: a classifier whose answers are stored."""

    name: str
    """The head's name in the store: letters, digits, `-` and `_`."""
    model: str
    """A timm name, a folder that timm or `repcon teach` wrote, `package:efficientnet_lite0`, or
    `module:function` that returns (torch module, preprocessing)."""
    size: int = 0
    """Input side in pixels; 0 takes the model's own."""
    precision: Precision = "fp32"
    compile: AutoBool = "auto"
    """`torch.compile`; `auto` does so on a CPU where the store's crops repay the half minute that it takes."""
    license: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeConfig(BaseConfig):
    """Store every teacher's top-k answers about planned crops.

    Teachers are named by `--teachers NAME=MODEL [NAME=MODEL ...]`, or by a recipe's [[teachers]].
    """

    pack: str
    """Folder or URL of a pack, as `repcon pack` writes it."""
    out: str
    """The store's folder or URL, for example `labels.zarr`."""
    teachers: Annotated[tuple[TeacherConfig, ...], arg(metavar="NAME=MODEL ...")] = ()
    """A MODEL is a timm name, `hf-hub:OWNER/NAME`, a folder, a weights package, or `module:function`."""
    crops: int = 0
    """Crops per image; 0 takes the store's, 8 for a new store."""
    crop: CropConfig = CropConfig()
    """How crops are drawn; the defaults stand for the store's where there is one."""
    k: int = 0
    """Most probable classes that are stored of each answer; 0 takes the store's, 16 for a new store."""
    temperatures: tuple[float, ...] = ()
    """The temperatures whose exact tails are stored: those that students may be trained at, except by renormalising.
    None takes the store's, 1 for a new store."""
    codec: Literal["auto", Codec] = "auto"
    """`lz4` decodes faster and takes more room than `zstd`; `auto` takes the store's, `zstd` for a new store."""
    values: Literal["auto", Values] = "auto"
    """`quantized8` stores log-probabilities in a byte each, two thirds of the room of `float16`; `auto` takes the
    store's, `float16` for a new store."""
    rows_per_shard: int = 0
    """Images per shard; 0 chooses by the pack's size."""
    loader: LoaderKind = "auto"
    batch_size: int = 0
    """Crops per forward pass; 0 finds it."""
    num_workers: int = 0
    """Decoding threads; 0 starts one per core, for a GPU three for four cores, for DALI on it one for two."""
    device: Device = "auto"
    """`auto` takes a GPU where torch sees one."""
    estimate: bool = False
    """Run a sample, print time, size and KL error for each k, and write nothing."""
    tolerate_missing: bool = False
    """End with exit code 0 although some images could not be decoded."""
    processes: int = 0
    """Processes on this machine, each taking whole units; 0 starts one per GPU, or one where there is none."""
    records: str = ""
    """Folder for this command's own records (metrics, environment); empty puts them next to the store. Each of several
    commands that label one store at the same time needs its own."""
    ray: str = ""
    """Address of a Ray cluster (`auto` for the running one); empty for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectConfig(BaseConfig):
    """Show what a store holds and what its truncation costs."""

    store: Annotated[Positional[str], arg(metavar="STORE")]
    """The store's folder or URL."""
    html: str = ""
    """Also write a self-contained page with plots here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyConfig(BaseConfig):
    """Check a store's files and labels, and ask its teachers again.

    Structure, checksums, fill values and normalisation; and a sample re-run through the teachers.
    """

    store: Annotated[Positional[str], arg(metavar="STORE")]
    """The store's folder or URL."""
    pack: str = ""
    """The pack; needed for the re-run of the teachers."""
    sample: int = 64
    """Crops that are recomputed; 0 leaves the re-run out."""
    loaders: tuple[LoaderKind, ...] = ("auto",)
    """Decoders of the re-run; `auto` takes the reference and every other that is installed."""
    max_kl: float = 0.01
    """Mean KL in nat between stored and recomputed labels above which the check fails."""
    min_agreement: float = 0.99
    """Top-1 agreement below which the check fails."""
    models: tuple[str, ...] = ()
    """Where teachers lie here, as NAME=MODEL, in place of the store's word for it. A `module:function` runs, and a
    model is downloaded, only where it is named so: a store's own word is not enough."""
    device: Device = "auto"
    """`auto` takes a GPU where torch sees one."""
    seed: int = 0
