"""Targets of the benchmarks' figures, such as `<= 0.01`, by benchmark and figure."""

from collections.abc import Mapping

Targets = dict[str, str]

TARGETS: Mapping[str, Targets] = {
    "kernels": {"worst_error": "<= 1"},
    "store": {
        "bytes_per_crop_zstd": "<= 120",
        "bytes_per_crop_gaps": "<= 85",
        "gaps_mean_kl": "<= 1e-4",
        "gaps_worst_kl": "<= 1e-3",
        "slab_over_memmap_zstd": ">= 0.15",
        "slab_over_memmap_lz4": ">= 0.35",
        "batch_over_gather": ">= 0.6",
        "write_over_raw_zstd": ">= 0.12",
    },
    "scale": {
        "open_seconds_growth": "<= 1.5",
        "first_window_bytes_growth": "<= 1.5",
        "bytes_per_row_growth": "<= 1.05",
    },
    "loaders": {
        "torch_over_decode": ">= 0.5",
        "dali_over_decode": ">= 0.35",
        "ffcv_over_decode": ">= 0.55",
        **{f"{kind}_decode_only_over_decode": ">= 0.95" for kind in ("torch", "dali", "ffcv")},
        **{f"{kind}_pixel_difference": "<= 0.05" for kind in ("torch", "dali", "ffcv")},
        **{f"{kind}_label_kl": "<= 0.01" for kind in ("torch", "dali", "ffcv")},
        **{f"{kind}_label_agreement": ">= 0.99" for kind in ("torch", "dali", "ffcv")},
    },
    "loaders_peers": {
        f"torch_over_{peer}_4x160": ">= 1"
        for peer in ("dataloader_pil", "ffcv_stock", "torchvision", "litdata", "streaming", "webdataset", "spdl")
    }
    | {f"{peer}_pixel_difference": "<= 0.5" for peer in ("torchvision", "litdata", "streaming", "webdataset")}
    | {"spdl_pixel_difference": "<= 2"},
    "precompute": {
        "over_teachers_heavy": ">= 0.9",
        "over_limit_light": ">= 0.95",
        "memory_growth": "<= 1.05",
        "cost_growth": "<= 1.05",
    },
    "precompute_peers": {f"ours_over_{script}": ">= 1" for script in ("torch_files", "webdataset_parquet", "ray_data")},
    "training": {
        "step_over_synthetic": ">= 0.9",
        "epoch_over_plain_4": "<= 0.8",
        "ideal_over_ours": ">= 0.95",
    },
    "cli": {"help_seconds": "<= 0.3", "import_seconds": "<= 0.1"},
    "consolidation": {"finding_1": ">= 0", "finding_2": ">= 0", "finding_3": ">= 0"},
}

ON_GPU: Mapping[str, Targets] = {
    "kernels": {
        "b4096_21841-1000_bf16_floor_over_time": ">= 0.9",
        "b4096_21841-1000_bf16_compile_over_ours": ">= 2",
        "b4096_21841-1000_bf16_liger_over_ours": ">= 3",
        "b1024_1000-196-45_bf16_launches_worth": "<= 1.5",
    },
    "loaders_gpu": {
        "dali_mixed_1_over_resnet50": ">= 1",
        "dali_mixed_4_over_resnet50": ">= 1",
        "dali_mixed_pixel_difference": "<= 0.05",
        "dali_mixed_label_kl": "<= 0.01",
        "dali_mixed_label_agreement": ">= 0.99",
    },
    "precompute": {"over_teachers_heavy": ">= 0.95"},
    "training": {"step_over_synthetic": ">= 0.97", "torch_over_synthetic": ">= 0.97"},
}
"""Targets that are added, or replace those above, where the device is a GPU."""


def targets(benchmark: str, device: str) -> Targets:
    """The targets of one benchmark on a device, `cpu` or a GPU's name."""
    key = benchmark.replace("-", "_")
    return {**TARGETS.get(key, {}), **(ON_GPU.get(key, {}) if device != "cpu" else {})}


def met(target: str, value: float) -> bool:
    """Whether a figure reaches its target; NaN never does."""
    sign, _, limit = target.partition(" ")
    return value <= float(limit) if sign == "<=" else value >= float(limit)
