"""One process of the torchrun test: trains as `repcon train` does, and writes down which crops it was shown.

Arguments: the recipe, the file to write to, the step at which this run is asked to stop (0: never).
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from repcon import config, train
from repcon.config import TrainConfig
from repcon.training.trainer import Trainer

recipe, shown, stop_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
plain = Trainer.train_batch


def writing(self: Trainer, batch: Any, *arguments: Any) -> torch.Tensor:
    losses = plain(self, batch, *arguments)
    line = {"step": self.step, "shown": list(zip(batch.images.tolist(), batch.crops.tolist(), strict=True))}
    with shown.open("a") as file:
        file.write(json.dumps(line) + "\n")
    if self.step == stop_at and self.team.rank == self.team.world - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return losses


Trainer.train_batch = writing
try:
    train.run(config.load(TrainConfig, recipe))
except KeyboardInterrupt:
    sys.exit(130)
