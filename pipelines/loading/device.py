"""Devices and dtypes by name."""

from __future__ import annotations

import torch

from tilewise.pipelines.errors import DeviceError
from tilewise.plugins.errors import ConfigError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def resolve_device(device: str) -> torch.device:
    """The torch device for "auto" or a name. Raises DeviceError for one that this machine has not."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}; give auto, cpu, cuda or cuda:N") from error
    if where.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (where.index or 0) >= count:
            built = "" if torch.version.cuda else f"; this PyTorch ({torch.__version__}) is built without CUDA"
            raise DeviceError(f"there is no device {device}: {count} CUDA devices found{built}. Try --device cpu")
    elif where.type != "cpu" and not (where.type == "mps" and torch.backends.mps.is_available()):
        raise DeviceError(f"the device {device} cannot be used here; give auto, cpu, cuda or cuda:N")
    return where


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype for "auto" or a name. Raises ConfigError for an unknown name."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; give auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def device_name(device: torch.device) -> str:
    """The GPU's name, or what kind of device it is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
