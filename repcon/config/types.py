"""Types of settings with a fixed set of values."""

from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
TrainingPrecision = Literal["auto", "fp32", "bf16", "fp16"]
LoaderKind = Literal["auto", "reference", "torch", "dali", "ffcv"]
Tail = Literal["bucket", "renormalise", "uniform"]
LossKind = Literal["auto", "torch", "triton"]
Codec = Literal["zstd", "lz4"]
Values = Literal["float16", "quantized8"]
Device = Literal["auto", "cpu", "cuda"]
Init = Literal["auto", "average", "backbone"]
TrackerKind = Literal["tensorboard", "wandb", "mlflow", "trackio"]
AutoBool = bool | Literal["auto"]
