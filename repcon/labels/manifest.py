"""The store's manifest: contents and origin of the labels, checked before memory is allocated for them.

Array metadata (`zarr.json`) follows from the manifest, which has its sha256. Every JSON file of repcon's own in a
store is sealed with the sha256 of its content.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from repcon import config
from repcon.config import Codec, CropConfig, Precision, Values
from repcon.crops.plan import check_crop_config
from repcon.runtime.errors import UserError

FORMAT, VERSION = "repcon labels", 1
MANIFEST, JOURNAL, COMPLETION_RECORDS = "manifest.json", "manifest.next.json", "done"
CROPS_PER_SHARD, ROWS_PER_SHARD = 8, 16_384
MAX_BYTES = 64 * 2**20
"""A longer manifest is refused."""
_SHARDS, _ROW_STEP = 64, 128
"""The default number of shards along the images, fewer for small sets, and what their images are a multiple of: 8 crops
of 128 images fill the largest batch."""
HASHED_VALUES = {"float16": "float16", "quantized8": "gaps8"}
"""The name of each encoding in hashes: `quantized8` was called `gaps8`, and stores made then must stay valid."""
_SEAL = re.compile(rb'\n "sha256": "([0-9a-f]{64})"(,?)(?=\n)')
HEAD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MAXIMA = {"images": 2**36, "crops": 2**16, "k": 2**16, "rows_per_shard": 2**20, "crops_per_shard": CROPS_PER_SHARD}
_MAX_UNITS = 2**21
_MAX_UNIT_BYTES, _MAX_CHUNK_BYTES = 2**28, 2**30
_MAX_CLASSES, _MAX_SIDE, _MAX_TEACHERS = 2**26, 2**14, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherMetadata:
    """Identity of the teacher that made a head's labels."""

    name: str
    model: str
    """The string that loads it again: a timm name, a folder, `package:...` or `module:function`."""
    architecture: str
    weight_hash: str
    preprocessing: dict[str, Any]
    num_classes: int
    classes: tuple[str, ...] = ()
    """Class names by id; empty where unknown."""
    precision: Precision = "fp32"
    versions: dict[str, str] = field(default_factory=dict)
    licence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpec:
    """Requested contents of a store."""

    pack_fingerprint: str
    images: int
    crops: int
    crop_recipe: dict[str, Any]
    k: int
    temperatures: tuple[float, ...]
    teachers: tuple[TeacherMetadata, ...]
    rows_per_shard: int = 0
    """0 chooses it by the number of images."""
    codec: Codec = "zstd"
    values: Values = "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The heads and crops that one run added."""

    heads: tuple[str, ...]
    crops: tuple[int, int]
    boxes: bool
    """Whether the boxes of these crops are written by this part's units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Identity and layout of a store: the content of `manifest.json`."""

    format: str
    version: int
    pack_fingerprint: str
    images: int
    crops: int
    crop_recipe: dict[str, Any]
    k: int
    temperatures: tuple[float, ...]
    crops_per_shard: int
    rows_per_shard: int
    codec: Codec
    values: Values
    teachers: tuple[TeacherMetadata, ...]
    parts: tuple[Part, ...]
    metadata: dict[str, str]
    """sha256 of every `zarr.json`."""


def manifest_of(spec: StoreSpec, origin: str) -> Manifest:
    """The manifest of a new store, still without the hashes of its metadata. Raises UserError, which names `origin`."""
    depth = next(d for d in range(min(CROPS_PER_SHARD, max(spec.crops, 1)), 0, -1) if spec.crops % d == 0)
    rows = spec.rows_per_shard or _rows_per_shard(spec)
    asked: dict[str, Any] = {each.name: getattr(spec, each.name) for each in dataclasses.fields(spec)}
    derived = {
        "temperatures": tuple(float(t) for t in spec.temperatures),
        "crops_per_shard": depth,
        "rows_per_shard": min(rows, max(spec.images, 1)),
        "parts": (Part(heads=tuple(t.name for t in spec.teachers), crops=(0, spec.crops), boxes=True),),
        "metadata": {},
    }
    manifest = Manifest(format=FORMAT, version=VERSION, **asked | derived)
    check(manifest, origin)
    return manifest


def _rows_per_shard(spec: StoreSpec) -> int:
    """About 64 shards along the images, so that an interruption loses little, and no unit that is large in memory.

    Fewer rows than `_ROW_STEP` would not repay the 40 ms that writing a unit takes, however few they are.
    """
    rows = min(ROWS_PER_SHARD, max(1, -(-spec.images // (_SHARDS * _ROW_STEP))) * _ROW_STEP)
    values = sum(min(spec.k, teacher.num_classes) + len(spec.temperatures) for teacher in spec.teachers)
    while rows > 64 and 4 * values * rows * CROPS_PER_SHARD > _MAX_UNIT_BYTES:
        rows //= 2
    return rows


def check(manifest: Manifest, origin: str) -> None:
    """Raises UserError for values that no valid store has, before memory is allocated for them."""
    for name, largest in _MAXIMA.items():
        if not 1 <= getattr(manifest, name) <= largest:
            raise UserError(f"{origin}: {name} is {_short(getattr(manifest, name))}; it must lie in 1 to {largest}")
    units = -(-manifest.images // manifest.rows_per_shard) * -(-manifest.crops // manifest.crops_per_shard)
    if units * max(len(manifest.parts), 1) > _MAX_UNITS:
        raise UserError(f"{origin}: {units} shards per array; rows_per_shard is too small for so many images and crops")
    check_values(dataclasses.asdict(manifest), origin)
    check_crop_config(config.parse(CropConfig, manifest.crop_recipe, f"{origin}: crop_recipe"))
    temperatures = manifest.temperatures
    if len(set(temperatures)) < len(temperatures) or not temperatures or len(temperatures) > 64:
        raise UserError(f"{origin}: temperatures {list(temperatures)} must be 1 to 64 different ones")
    if not all(0.01 <= temperature <= 1000 for temperature in temperatures):
        raise UserError(f"{origin}: temperatures {list(temperatures)} must lie in 0.01 to 1000")
    names = [teacher.name for teacher in manifest.teachers]
    if not names or len({name.lower() for name in names}) < len(names):
        what = f"teachers {_short(names)} must be one or more, with names that differ in more than case"
        raise UserError(f"{origin}: {what}")
    if len(names) > _MAX_TEACHERS:
        raise UserError(f"{origin}: {len(names)} teachers are too many; a store holds {_MAX_TEACHERS}")
    for teacher in manifest.teachers:
        _check_teacher(teacher, origin)
        width = min(manifest.k, teacher.num_classes) + len(temperatures)
        if 4 * width * manifest.rows_per_shard > _MAX_CHUNK_BYTES:
            raise UserError(f"{origin}: rows_per_shard {manifest.rows_per_shard} is too many for a k of {manifest.k}")
    _check_parts(manifest, names, origin)


def _check_teacher(teacher: TeacherMetadata, origin: str) -> None:
    if not HEAD_NAME.fullmatch(teacher.name):
        raise UserError(f"{origin}: teacher name {teacher.name!r} may hold letters, digits, - and _, at most 64")
    if not 2 <= teacher.num_classes <= _MAX_CLASSES:
        what = f"num_classes {_short(teacher.num_classes)} must be 2 or more, at most {_MAX_CLASSES}"
        raise UserError(f"{origin}: teacher {teacher.name}: {what}")
    side = teacher.preprocessing.get("size", 1)
    if type(side) is not int or not 1 <= side <= _MAX_SIDE:
        what = f"preprocessing.size {_short(side)} must be a whole number of pixels, 1 to {_MAX_SIDE}"
        raise UserError(f"{origin}: teacher {teacher.name}: {what}")
    if len(teacher.classes) not in (0, teacher.num_classes):
        named = f"{len(teacher.classes)} class names for {teacher.num_classes} classes"
        raise UserError(f"{origin}: teacher {teacher.name}: {named}")


def _check_parts(manifest: Manifest, names: list[str], origin: str) -> None:
    """Every head has each crop exactly once, and every crop's boxes are written exactly once."""
    covered: dict[str | None, list[tuple[int, int]]] = {name: [] for name in (*names, None)}
    for part in manifest.parts:
        for head in (*part.heads, *((None,) if part.boxes else ())):
            if head not in covered:
                raise UserError(f"{origin}: parts name the head {_short(head)}, which has no teacher metadata")
            covered[head].append(part.crops)
    for head, spans in covered.items():
        joined = [0, *(edge for pair in sorted(spans) for edge in pair), manifest.crops]
        aligned = all(edge % manifest.crops_per_shard == 0 for edge in joined)
        if not aligned or joined[::2] != joined[1::2] or joined != sorted(joined):
            raise UserError(f"{origin}: parts do not cover the crops of {head or 'the boxes'} exactly once")


def check_values(value: Any, origin: str, place: str = "") -> None:
    """Raises UserError for numbers that JSON does not have and for text that is not Unicode."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{origin}: {place} is {value}, which is no finite number")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{origin}: {place} holds text that is not Unicode ({_short(value)}); rename it") from error
    elif isinstance(value, Mapping):
        for key, held in value.items():
            check_values(key, origin, f"a name in {place}")
            check_values(held, origin, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for held in value:
            check_values(held, origin, place)


def plain(record: Any) -> dict[str, Any]:
    """A dataclass as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(record)))


def label_identity(metadata: TeacherMetadata) -> dict[str, Any]:
    """The fields that determine a teacher's labels, as JSON values: not its licence, versions and model path."""
    return {key: value for key, value in plain(metadata).items() if key not in ("versions", "licence", "model")}


def seal(values: Mapping[str, Any]) -> bytes:
    """The values as JSON with their sha256."""
    content = {key: value for key, value in values.items() if key != "sha256"}
    digest = hashlib.sha256(_render(content)).hexdigest()
    return _render({**content, "sha256": digest})


def unseal(data: bytes, origin: str) -> dict[str, Any]:
    """Reads what `seal` wrote; a single changed byte raises UserError."""
    try:
        values = json.loads(data)
        intact = isinstance(values, dict) and _is_sealed(data)
    except (ValueError, RecursionError):
        values, intact = {}, False
    if not intact:
        raise UserError(f"{origin}: damaged (its content does not match its own sha256); restore it from a copy")
    return {key: value for key, value in values.items() if key != "sha256"}


def _is_sealed(data: bytes) -> bool:
    """Whether the hash is that of the other lines. To render the values again would take seconds for large files."""
    found = _SEAL.search(data)
    if found is None:
        return False
    before, after = data[: found.start()], data[found.end() :]
    content = (before if found[2] else before.removesuffix(b",")) + after
    return hashlib.sha256(content).hexdigest().encode() == found[1]


def _render(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def write_manifest(manifest: Manifest) -> bytes:
    """The manifest file's bytes."""
    return seal(dataclasses.asdict(manifest))


def read_manifest(data: bytes, origin: str) -> Manifest:
    """Parses and checks a manifest. Raises UserError on another format version, damage, or impossible values."""
    if len(data) > MAX_BYTES:
        raise UserError(f"{origin}: more than {MAX_BYTES} bytes are too many for a manifest")
    try:
        loose = json.loads(data)
    except (ValueError, RecursionError):
        loose = None
    if isinstance(loose, dict) and loose.get("format") == FORMAT and loose.get("version") != VERSION:
        versions = f"made in format version {_short(loose.get('version'))}; this repcon reads version {VERSION}"
        raise UserError(f"{origin}: {versions}: use the repcon that made it, or make the store again")
    values = unseal(data, origin)
    if values.get("format") != FORMAT:
        raise UserError(f"{origin}: not the manifest of a label store")
    if values.get("values") == HASHED_VALUES["quantized8"]:
        values["values"] = "quantized8"
    try:
        manifest = config.parse(Manifest, values, origin)
        check(manifest, origin)
    except RecursionError as error:
        raise UserError(f"{origin}: its values are nested too deeply for a manifest") from error
    return manifest


def difference(held: Any, asked: Any, field_name: str = "") -> str | None:
    """The first field in which two plain values differ, with both values; None where they are equal."""
    if isinstance(held, Mapping) and isinstance(asked, Mapping):
        pairs = [(key, held.get(key), asked.get(key)) for key in sorted({*held, *asked})]
    elif isinstance(held, list) and isinstance(asked, list) and len(held) == len(asked):
        pairs = list(zip(range(len(held)), held, asked, strict=True))
    else:
        return None if held == asked else f"{field_name}: the store has {_short(held)}, this run has {_short(asked)}"
    for key, left, right in pairs:
        if found := difference(left, right, f"{field_name}.{key}" if field_name else str(key)):
            return found
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
