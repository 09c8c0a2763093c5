"""The loaders' thread pool: ends whoever waits for it."""

import threading
import time

import numpy as np
import pytest
import torch

from repcon.decode.base import CropBatch, CropRequest
from repcon.decode.worker_pool import WorkerPool


def request() -> CropRequest:
    numbers = np.zeros((4, 1), np.int64)
    return CropRequest(images=numbers[:, 0], crops=numbers, boxes=np.ones((4, 1, 4), np.uint16), flips=numbers)


def test_closing_ends_a_thread_that_waits_for_a_batch():
    """Its jobs that had not begun are cancelled; who waits for them must hear of it."""
    pool, waiting, told = WorkerPool(1, int), threading.Event(), threading.Event()

    def begin(asked: CropRequest) -> tuple[CropBatch, list]:
        def job(state: int) -> None:
            waiting.set()
            time.sleep(0.2)

        return CropBatch.for_request(asked, {8: torch.zeros(4, 3, 8, 8)}), [job] * 4

    def consume() -> None:
        with pytest.raises(RuntimeError, match="the loader was closed"):
            list(pool.run([request()] * 4, begin))
        told.set()

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    waiting.wait()
    pool.close()
    consumer.join(10)
    assert told.is_set()
