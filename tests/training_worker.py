"""One process of the torchrun tests: trains as `repcon train` does, and writes down which crops it was shown, and the
batch norms' statistics that it is validated with.

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
from repcon.training.validation import Validation

recipe, shown, stop_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
plain, measured = Trainer.train_batch, Validation.measure


def writing(self: Trainer, batch: Any, *arguments: Any) -> torch.Tensor:
    losses = plain(self, batch, *arguments)
    line = {"step": self.step, "shown": list(zip(batch.images.tolist(), batch.crops.tolist(), strict=True))}
    with shown.open("a") as file:
        file.write(json.dumps(line) + "\n")
    if self.step == stop_at and self.team.rank == self.team.world - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return losses


def telling(self: Validation, student: Any, *arguments: Any) -> dict[str, Any]:
    statistics = [buffer.double().sum().item() for buffer in student.buffers()]
    with shown.with_suffix(".statistics").open("a") as file:
        file.write(json.dumps(statistics) + "\n")
    return measured(self, student, *arguments)


Trainer.train_batch, Validation.measure = writing, telling
try:
    train.run(config.parse(TrainConfig, config.read_toml(recipe), str(recipe)))
except KeyboardInterrupt:
    sys.exit(130)
