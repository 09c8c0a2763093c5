"""From pixels to a model's inputs."""

import pytest
import torch

from repcon.models.preprocessing import Preprocessing, normalise

DATA = Preprocessing(size=9, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5])
def test_both_memory_layouts_give_the_formula_s_values_and_are_kept(count: int, dtype: torch.dtype) -> None:
    pixels = torch.randint(0, 256, (count, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(DATA.mean).view(3, 1, 1), torch.tensor(DATA.std).view(3, 1, 1)
    wanted = ((pixels.double() / 255 - mean) / std).to(dtype)
    planar = normalise(pixels, DATA, dtype)
    interleaved = normalise(pixels.contiguous(memory_format=torch.channels_last), DATA, dtype)
    torch.testing.assert_close(planar, wanted, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 2**-7)
    assert torch.equal(planar, interleaved) and planar.dtype == interleaved.dtype == dtype
    assert planar.is_contiguous() and interleaved.is_contiguous(memory_format=torch.channels_last)
