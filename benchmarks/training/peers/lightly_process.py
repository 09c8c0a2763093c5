"""Run lightly-train once; started by `lightly.py` in a Python that has lightly-train and timm, and not repcon.

Takes a JSON object, writes the student's weights to its `weights`, and prints a JSON object as its last line. First
lightly-train's own way is tried, timm models as student and teacher; where it fails, both are wrapped as its custom
models.
"""

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch


def complete_torchvision() -> None:
    """A torchvision for another torch lacks its operators; two schemas are enough to import it."""
    try:
        import torchvision as _  # noqa: F401
    except RuntimeError:
        sys.modules.pop("torchvision", None)
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)


KEPT: list[Any] = []
"""The definitions end with their library."""


def main() -> None:
    complete_torchvision()
    import lightly_train  # pyright: ignore[reportMissingImports]
    import timm

    request = json.loads(sys.argv[1])
    errors = []
    for way in ("timm", "custom"):
        student = timm.create_model(f"local-dir:{request['student']}", pretrained=True)
        teacher = timm.create_model(f"local-dir:{request['teacher']}", pretrained=True)
        given = (student, teacher) if way == "timm" else (wrapped(student), wrapped(teacher))
        started = time.perf_counter()
        try:
            lightly_train.pretrain(
                out=f"{request['out']}-{way}", data=request["images"], model=given[0], method="distillation",
                method_args={"teacher": given[1]}, epochs=request["epochs"], batch_size=request["batch_size"],
                accelerator="cpu", devices=1, num_workers=request.get("num_workers", 2), overwrite=True,
                transform_args={"image_size": (request["size"], request["size"])},
            )  # fmt: skip
        except Exception as error:  # it raises whatever torch does
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            print(f"{way}: {errors[-1]}", file=sys.stderr)
            continue
        seconds = time.perf_counter() - started
        torch.save(student.state_dict(), request["weights"])
        print(json.dumps({"version": version("lightly-train"), "seconds": seconds, "way": way, "errors": errors}))
        return
    raise SystemExit("; ".join(errors))


def wrapped(model: torch.nn.Module) -> torch.nn.Module:
    """A timm model by lightly-train's protocol for custom models: its features before pooling, and the mean of them."""
    return Wrapper(model)


class Wrapper(torch.nn.Module):
    """The methods that lightly-train asks of a custom model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model: Any = model  # torch's stubs know no attributes of a module

    def feature_dim(self) -> int:
        """Channels of the features."""
        return int(self.model.num_features)

    def forward_features(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, S, S) images to (B, C, H, W) features."""
        return {"features": self.model.forward_features(x)}

    def forward_pool(self, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """(B, C, H, W) features to (B, C, 1, 1)."""
        return {"pooled_features": x["features"].mean((2, 3), keepdim=True)}

    def get_model(self) -> torch.nn.Module:
        """The model that is trained."""
        return self.model


if __name__ == "__main__":
    main()
