"""Settings of every command, and the TOML files that hold them."""

from repcon.config.base import check_minimum, expand_home, parse_named_values, split_name
from repcon.config.data import ClassSubset, CropConfig, PackConfig
from repcon.config.evaluation import DatasetConfig, EvaluateConfig, ReportConfig
from repcon.config.labels import InspectConfig, PrecomputeConfig, TeacherConfig, VerifyConfig
from repcon.config.pipeline import ConsolidateConfig, DemoConfig
from repcon.config.sharing import ExportConfig, PullConfig, PushConfig
from repcon.config.toml import dump, parse, read_toml, to_plain
from repcon.config.training import HeadConfig, OptimConfig, TeachConfig, TrainConfig, check_optim_config
from repcon.config.types import (
    Codec,
    Device,
    LoaderKind,
    LossKind,
    Precision,
    Tail,
    TrackerKind,
    TrainingPrecision,
    Values,
)

__all__ = [
    "ClassSubset",
    "Codec",
    "ConsolidateConfig",
    "CropConfig",
    "DatasetConfig",
    "DemoConfig",
    "Device",
    "EvaluateConfig",
    "ExportConfig",
    "HeadConfig",
    "InspectConfig",
    "LoaderKind",
    "LossKind",
    "OptimConfig",
    "PackConfig",
    "Precision",
    "PrecomputeConfig",
    "PullConfig",
    "PushConfig",
    "ReportConfig",
    "Tail",
    "TeachConfig",
    "TeacherConfig",
    "TrackerKind",
    "TrainConfig",
    "TrainingPrecision",
    "Values",
    "VerifyConfig",
    "check_minimum",
    "check_optim_config",
    "dump",
    "expand_home",
    "parse",
    "parse_named_values",
    "read_toml",
    "split_name",
    "to_plain",
]
