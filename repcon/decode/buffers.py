"""Memory for batches: taken again once the consumer has let go of it, never before. And memory to decode into.

A fresh batch of tens of megabytes costs a page fault for every 4 kB, as much time as a third of the JPEG decoding
that fills it. So a buffer goes back to its pool when the last tensor that looks at it is gone.
"""

import weakref
from collections import deque

import numpy as np
import torch

from repcon.images.pack import ImagePack


class CropBuffers:
    """A pool of uint8 buffers; as many exist as batches are held at the same time."""

    def __init__(self, device: str = "cpu") -> None:
        # Batches that travel to a GPU lie in pinned memory, which torch's own allocator already takes again.
        self._pinned = device.startswith("cuda")
        self._free: deque[np.ndarray] = deque(maxlen=8)

    def crops(self, count: int, side: int) -> torch.Tensor:
        """(count, 3, side, side) uint8, channels-last in memory, not initialised."""
        shape = (count, side, side, 3)
        if self._pinned:
            with torch.inference_mode(False):
                return torch.empty(shape, dtype=torch.uint8, pin_memory=True).permute(0, 3, 1, 2)
        size = count * side * side * 3
        memory = self._take(size)
        # A consumer under inference_mode would make this an inference tensor, which the workers may not write to.
        # torch holds exactly this array for as long as any tensor looks at it; its end returns the memory.
        held = memory[:size].reshape(shape)
        weakref.finalize(held, self._free.append, memory).atexit = False
        with torch.inference_mode(False):
            return torch.from_numpy(held).permute(0, 3, 1, 2)

    def _take(self, size: int) -> np.ndarray:
        """A free buffer of this size or a little more, else a new one."""
        for _ in range(len(self._free)):
            try:
                memory = self._free.popleft()
            except IndexError:
                break
            if size <= memory.size <= 2 * size:
                return memory
            self._free.append(memory)
        return np.empty(size, dtype=np.uint8)


def for_one_image(pack: ImagePack) -> np.ndarray:
    """Flat uint8 memory for libjpeg-turbo to decode any one image of the pack into, RGB; at an odd address.

    Where pixels go to a multiple of 32 bytes, libjpeg-turbo writes them past the processor's cache, from which the
    resize would read them next. At an odd address no row of an even width begins at one. An image of 400 x 300, half
    of whose rows did, decodes in 0.88 of the time (two cores of an AMD EPYC).
    """
    memory = np.empty(3 * pack.largest + 1, np.uint8)
    return memory[1 - memory.ctypes.data % 2 :][: 3 * pack.largest]
