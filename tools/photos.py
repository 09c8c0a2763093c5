"""Builds the five photograph sets of the consolidation benchmark from their public homes.

    python tools/photos.py FOLDER

FOLDER/downloads takes the archives (about 2.5 GB): what cannot be fetched can be put there by hand under the name that
is printed. Every archive is checked before use: by its SHA-256, or, where the host packs it anew for each download, by
git's content hashes of all its images. Images are made smaller, so their bytes depend on Pillow's version; sets built
with another one agree in content, not to the byte.

birds.tar       Caltech-UCSD Birds 200-2011, 100 of its classes, square around the bounding box     research use
grocery.tar     Grocery Store Dataset, natural images, fine classes                                 MIT
aerial.tar      UC Merced Land Use                                                                  public domain
objects.tar     Caltech-101                                                                         CC BY 4.0
imagenet.tar    one image of each ImageNet-1k class                                                 research use
"""

import hashlib
import io
import re
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps
from rich.progress import Progress, track

Photograph = tuple[str, Image.Image]
"""Class and picture."""

BIRDS = frozenset(
    """
    American_Goldfinch American_Redstart American_Three_toed_Woodpecker Anna_Hummingbird Baltimore_Oriole
    Barn_Swallow Bay_breasted_Warbler Belted_Kingfisher Black_and_white_Warbler Black_capped_Vireo
    Black_footed_Albatross Black_throated_Sparrow Blue_Grosbeak Blue_Jay Blue_headed_Vireo Bobolink Bohemian_Waxwing
    Bronzed_Cowbird Brown_Creeper Brown_Pelican Cactus_Wren Cape_Glossy_Starling Cape_May_Warbler Carolina_Wren
    Cedar_Waxwing Cerulean_Warbler Chestnut_sided_Warbler Chuck_will_Widow Clark_Nutcracker Common_Yellowthroat
    Downy_Woodpecker Eared_Grebe European_Goldfinch Evening_Grosbeak Fox_Sparrow Gadwall Geococcyx
    Glaucous_winged_Gull Golden_winged_Warbler Gray_Catbird Gray_crowned_Rosy_Finch Green_Jay Green_Kingfisher
    Green_Violetear Groove_billed_Ani Heermann_Gull Henslow_Sparrow Hooded_Merganser Hooded_Oriole Horned_Grebe
    Horned_Lark Horned_Puffin Indigo_Bunting Ivory_Gull Lazuli_Bunting Le_Conte_Sparrow Louisiana_Waterthrush
    Magnolia_Warbler Mallard Mourning_Warbler Nashville_Warbler Orchard_Oriole Pacific_Loon Painted_Bunting
    Parakeet_Auklet Pied_Kingfisher Pied_billed_Grebe Pigeon_Guillemot Pileated_Woodpecker Pine_Grosbeak
    Prairie_Warbler Purple_Finch Red_bellied_Woodpecker Red_breasted_Merganser Red_cockaded_Woodpecker
    Red_faced_Cormorant Red_headed_Woodpecker Red_winged_Blackbird Rock_Wren Rose_breasted_Grosbeak
    Ruby_throated_Hummingbird Rufous_Hummingbird Scarlet_Tanager Scissor_tailed_Flycatcher Scott_Oriole
    Spotted_Catbird Summer_Tanager Tree_Swallow Tropical_Kingbird Vermilion_Flycatcher Western_Grebe
    Western_Meadowlark Whip_poor_Will White_Pelican White_breasted_Kingfisher White_breasted_Nuthatch
    White_crowned_Sparrow Wilson_Warbler Worm_eating_Warbler Yellow_headed_Blackbird
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a set comes from, and how it is known to be the right one."""

    url: str
    archive: str
    photographs: Callable[[Path], Iterator[Photograph]]
    count: int
    short_side: int
    sha256: str = ""
    """Of the archive; empty where `blobs` stands."""
    blobs: str = ""
    """SHA-256 over the sorted lines `path blob-hash` of the archive's images, as `git ls-tree` names them."""


def birds(archive: Path) -> Iterator[Photograph]:
    """The square around each bird's box, moved into the picture where it stands over."""
    with tarfile.open(archive) as tar:
        lines = {
            name: _member(tar, f"CUB_200_2011/{name}.txt").decode().splitlines()
            for name in ("images", "bounding_boxes")
        }
        boxes = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in lines["bounding_boxes"]}
        for line in lines["images"]:
            number, path = line.split()
            name = path.split("/")[0].partition(".")[2]
            if name in BIRDS:
                picture = Image.open(io.BytesIO(_member(tar, f"CUB_200_2011/images/{path}")))
                yield name, picture.crop(_square(boxes[number], picture.size))


def _square(box: list[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(x, y, width, height) to a square's corners: the box's longer side, at most the picture's shorter."""
    x, y, width, height = box
    side = int(min(max(width, height), *size))
    left = int(min(max(x + width / 2 - side / 2, 0), size[0] - side))
    top = int(min(max(y + height / 2 - side / 2, 0), size[1] - side))
    return left, top, left + side, top + side


def grocery(archive: Path) -> Iterator[Photograph]:
    for part in ("train", "val", "test"):
        for path, data in _zip_images(archive):
            if path.startswith(f"dataset/{part}/"):
                yield path.split("/")[-2], Image.open(io.BytesIO(data))


def aerial(archive: Path) -> Iterator[Photograph]:
    with zipfile.ZipFile(archive) as held:
        for path in sorted(name for name in held.namelist() if name.endswith(".tif")):
            yield path.split("/")[-2], Image.open(io.BytesIO(held.read(path)))


def objects(archive: Path) -> Iterator[Photograph]:
    with zipfile.ZipFile(archive) as held:
        inner = io.BytesIO(held.read("caltech-101/101_ObjectCategories.tar.gz"))
    with tarfile.open(fileobj=inner) as tar:
        for name in sorted(tar.getnames()):
            if name.endswith(".jpg") and not Path(name).name.startswith("._"):
                yield name.split("/")[-2], Image.open(io.BytesIO(_member(tar, name)))


def imagenet(archive: Path) -> Iterator[Photograph]:
    for path, data in _zip_images(archive):
        yield re.sub(r"[^\w.-]", "_", Path(path).stem), Image.open(io.BytesIO(data))


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    handle = tar.extractfile(name)
    if handle is None:
        raise SystemExit(f"{name} is missing in the archive")
    return handle.read()


def _zip_images(archive: Path) -> Iterator[tuple[str, bytes]]:
    """(path in the repository, bytes) of a GitHub archive's JPEGs, sorted."""
    with zipfile.ZipFile(archive) as held:
        for name in sorted(name for name in held.namelist() if name.lower().endswith((".jpg", ".jpeg"))):
            yield name.partition("/")[2], held.read(name)


GITHUB = "https://github.com/{}/archive/{}.zip"
SOURCES = {
    "birds": Source(
        url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        archive="CUB_200_2011.tgz",
        sha256="0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
        photographs=birds,
        count=5902,
        short_side=160,
    ),
    "grocery": Source(
        url=GITHUB.format("marcusklasson/GroceryStoreDataset", "fc80ba90f803d79d0383df52c5a4ac5de99ff6fc"),
        archive="GroceryStoreDataset.zip",
        blobs="1b082cd14992ef2480bf28db231372c28ed7e8d3accaf438f33e68b4671847a1",
        photographs=grocery,
        count=5421,
        short_side=144,
    ),
    "aerial": Source(
        url="http://weegee.vision.ucmerced.edu/datasets/UCMerced_LandUse.zip",
        archive="UCMerced_LandUse.zip",
        sha256="06c539ef28703a58fb07bd2837991ac7c48b813b00bb12ac197efd813a18daeb",
        photographs=aerial,
        count=2100,
        short_side=192,
    ),
    "objects": Source(
        url="https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
        archive="caltech-101.zip",
        sha256="331234750fc7f77520e50d9565e8b6907b03565e30320da1401130db08c61f91",
        photographs=objects,
        count=9144,
        short_side=128,
    ),
    "imagenet": Source(
        url=GITHUB.format("EliSchwartz/imagenet-sample-images", "bc69043e2862758a1906c6a24a792bb28c6bb2ff"),
        archive="imagenet-sample-images.zip",
        blobs="dcf7869c5662c49069759e1ddd34b9139e702ed38cda55e357df752c5706fc4d",
        photographs=imagenet,
        count=1000,
        short_side=160,
    ),
}


def build(name: str, folder: Path) -> None:
    """Fetches, checks and writes FOLDER/name.tar. Raises SystemExit with what to do where that fails."""
    source = SOURCES[name]
    archive = folder / "downloads" / source.archive
    if not archive.is_file():
        _download(source, archive)
    _check(source, archive)
    numbers: dict[str, int] = {}
    temporary = folder / f".{name}.tmp"
    with tarfile.open(temporary, "w") as tar:
        for label, picture in track(source.photographs(archive), description=name, total=source.count):
            jpeg = _smaller(picture, source.short_side)
            number = numbers[label] = numbers.get(label, -1) + 1
            info = tarfile.TarInfo(f"{label}/{number:04d}.jpg")
            info.size = len(jpeg)
            tar.addfile(info, io.BytesIO(jpeg))
    written = sum(numbers.values()) + len(numbers)
    if written != source.count:
        raise SystemExit(f"{name}: {written} images where {source.count} were expected; the archive is another edition")
    temporary.replace(folder / f"{name}.tar")


def _smaller(picture: Image.Image, short_side: int) -> bytes:
    picture = ImageOps.exif_transpose(picture).convert("RGB")
    scale = min(1.0, short_side / min(picture.size))
    size = [max(1, round(side * scale)) for side in picture.size]
    buffer = io.BytesIO()
    picture.resize((size[0], size[1]), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=80, optimize=True)
    return buffer.getvalue()


def _download(source: Source, archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(archive.name + ".part")
    try:
        with urllib.request.urlopen(source.url, timeout=60) as reply, partial.open("wb") as out, Progress() as bars:
            task = bars.add_task(archive.name, total=int(reply.headers.get("Content-Length") or 0) or None)
            while block := reply.read(1 << 20):
                out.write(block)
                bars.advance(task, len(block))
            wanted = reply.headers.get("Content-Length")
            if wanted and out.tell() != int(wanted):  # no error of `read`, which then only ends early
                raise OSError(f"{out.tell():,} of {int(wanted):,} bytes came")
    except OSError as error:
        raise SystemExit(f"cannot fetch {source.url} ({error}); put it there by hand as {archive}") from error
    partial.replace(archive)


def _check(source: Source, archive: Path) -> None:
    if source.sha256:
        with archive.open("rb") as handle:
            found, wanted = hashlib.file_digest(handle, "sha256").hexdigest(), source.sha256
    else:
        try:
            found, wanted = blobs(archive), source.blobs
        except zipfile.BadZipFile as error:
            found, wanted = str(error), source.blobs
    if found != wanted:
        raise SystemExit(f"{archive} is another file than expected ({found}, not {wanted}); delete it and try again")


def blobs(archive: Path) -> str:
    """SHA-256 over the lines `path blob-hash` of a GitHub archive's images, iconic pictures left out."""
    lines = []
    for path, data in _zip_images(archive):
        if "iconic" not in path:
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            lines.append(f"{path} {blob}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for name in SOURCES:
        if (folder / f"{name}.tar").is_file():
            continue
        try:
            build(name, folder)
        except SystemExit as failure:
            failures.append(str(failure))
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
