"""The loader for a GPU, run on the CPU: DALI decodes; torch cuts in place of the kernel, which has its own tests."""

import pytest
import torch
from loader_case import SIDES, make_pack, request

from repcon.decode.factory import open_loader
from repcon.decode.libraries import installed
from repcon.images.pack import ImagePack
from repcon.runtime.errors import UserError

pytestmark = pytest.mark.skipif(
    not installed("dali"), reason="loader dali is not installed: pip install 'repcon[dali]'"
)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> ImagePack:
    return ImagePack.open(make_pack(tmp_path_factory.mktemp("dali")))


def test_it_gives_the_references_crops(pack: ImagePack) -> None:
    from repcon.decode.dali_gpu import DaliGpuLoader

    requests = [request(pack, range(len(pack)), 6, seed=1), request(pack, [3, 1], 2), request(pack, [5] * 140, 3)]
    loader = DaliGpuLoader(pack, SIDES, num_workers=2, device="cpu")
    expected = open_loader("reference", pack, SIDES).batches(requests)
    for wanted, found in zip(expected, loader.batches(requests), strict=True):
        assert torch.equal(wanted.images, found.images) and torch.equal(wanted.crops, found.crops)
        for side in SIDES:
            gap = (wanted.pixels[side].float() - found.pixels[side].float()).abs()
            assert gap.mean() <= 0.05 and gap.max() <= 1
            assert found.pixels[side].is_contiguous(memory_format=torch.channels_last)
    loader.close()


def test_a_damaged_image_is_named(pack: ImagePack, monkeypatch: pytest.MonkeyPatch) -> None:
    from repcon.decode.dali_gpu import DaliGpuLoader

    real = ImagePack.read
    monkeypatch.setattr(ImagePack, "read", lambda self, row: real(self, row)[: 300 if row == 3 else None])
    loader = DaliGpuLoader(pack, SIDES, num_workers=1, device="cpu")
    with pytest.raises(UserError, match="cannot be decoded") as caught:
        list(loader.batches([request(pack, range(len(pack)), 2)]))
    assert pack.keys[3] in str(caught.value)
    monkeypatch.undo()
    assert len(list(loader.batches([request(pack, [3], 2)]))) == 1
    loader.close()


def test_a_kernel_that_goes_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from repcon.decode import dali_gpu

    real, device = dali_gpu.cut_crops, torch.device("cpu")
    dali_gpu.check_kernel("torch", SIDES, device)

    def mirrored(images, boxes, flips, out, *, implementation: str = "torch") -> None:
        real(images, boxes, flips if implementation == "torch" else 1 - flips, out)

    monkeypatch.setattr(dali_gpu, "cut_crops", mirrored)
    with pytest.raises(UserError, match=f"at {SIDES[0]} pixels"):
        dali_gpu.check_kernel("triton", SIDES, device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_pixels_lie_there(pack: ImagePack) -> None:
    wanted = [request(pack, range(len(pack)), 4)]
    loader = open_loader("dali", pack, SIDES, device="cuda")
    (found,) = loader.batches(wanted)
    (expected,) = open_loader("reference", pack, SIDES).batches(wanted)
    for side in SIDES:
        assert found.pixels[side].device.type == "cuda"
        assert (found.pixels[side].cpu().float() - expected.pixels[side].float()).abs().mean() <= 1.0
    loader.close()
