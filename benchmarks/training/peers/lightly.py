"""lightly-train's distillation, in another Python: it is AGPL, and its dependencies exclude some of repcon's tests'.

It takes the features of one teacher, by a projection, and knows no second teacher.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repcon.models.factory import create_model

SCRIPT = Path(__file__).with_name("lightly_process.py")


def train_lightly(
    python: str, *, student: Path, teacher: Path, images: Path, out: Path, size: int, epochs: int, batch_size: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone that it makes of the folder `student` with the features of the folder `teacher`, both timm's; and
    what the process said of itself: its version, `seconds` of training, and which of its ways was taken.

    Raises ImportError with the process's last words where it fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    request = {
        "student": str(student), "teacher": str(teacher), "images": str(images), "out": str(out / "run"),
        "size": size, "epochs": epochs, "batch_size": batch_size, "weights": str(out / "weights.pt"),
    }  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}
    # Isolated: nothing of this checkout is imported there, where lightly-train's `lightly` would be this module.
    command = [python, "-I", str(SCRIPT), json.dumps(request)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise ImportError(f"{python}: {error.strerror}") from error
    (out / "process.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise ImportError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    backbone = create_model(str(student), num_classes=0)
    held = torch.load(out / "weights.pt", weights_only=True)
    backbone.load_state_dict({name: held[name] for name in backbone.state_dict()})
    return backbone, json.loads(done.stdout.splitlines()[-1])
