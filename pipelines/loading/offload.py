"""Keep the weights of a pipeline off the device until they are at work, in diffusers' three ways."""

from __future__ import annotations

from typing import Any

from tilewise.plugins.errors import ConfigError, UnsupportedModelError, unknown

OFFLOADS = ("none", "model", "group", "sequential")


def check_offload(kind: str, device: Any) -> None:
    """Raises ConfigError for a way of offloading that there is not, or a torch device that needs none."""
    if kind not in OFFLOADS:
        raise unknown("way of offloading", kind, OFFLOADS)
    if kind != "none" and device.type == "cpu":
        raise ConfigError(f"--offload {kind} keeps weights off a GPU, and this runs on the CPU: leave it out")


def offload(pipe: Any, kind: str, device: Any) -> None:
    """Moves a pipeline to a torch device by way of offloading.

    kind: "none": all of it. "model": a part at a time, such as the text encoder. "group": within a part, block by block, the next
    one on its way while one runs. "sequential": module by module, the least memory and the slowest.

    Raises:
        UnsupportedModelError: for a pipeline that says no order of its parts, which "model" needs.
    """
    if kind == "none":
        pipe.to(device)
    elif kind == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")
    elif kind == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif getattr(pipe, "model_cpu_offload_seq", None) is None:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} cannot be offloaded part by part; give --offload sequential"
        )
    else:
        pipe.enable_model_cpu_offload(device=device)
