"""Where the time of a forward goes: the GPU time of its kernels, in four groups by kernel name."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

GROUPS = ("attention", "matmul", "norms, RoPE, elementwise", "other")
ATTENTION, MATMUL, ELEMENTWISE, OTHER = GROUPS

# The first pattern that is found in a kernel's name decides. Names, where they are not told by themselves: cuDNN's attention is
# "cudnn_generated_fort_native_sdpa_…"; "nvjet_…" are cuBLAS's newest matrix products, "…s16816gemm…" older ones; "triton_poi",
# "triton_red" and "triton_per" are Inductor's pointwise and reduction kernels, which carry the names of the operators they stand
# next to (even "…scaled_dot_product…"), so they come first.
PATTERNS: tuple[tuple[str, str], ...] = (
    (r"^triton_(poi|red|per|for|mix)_", ELEMENTWISE),
    (r"^triton_tem_.*(flex|attention)", ATTENTION),
    (r"^triton_(tem_|mm)", MATMUL),
    (r"conv(olve|olution|_|\d|$)|nchw|nhwc|dgrad|wgrad", OTHER),
    (r"qk_norm_rope|residual_norm|reorder_kernel|layer_?norm|rms_?norm|rotary|modulat", ELEMENTWISE),
    (r"sdpa|flash|fmha|attention|attend|forward_kernel|hopper_kernel", ATTENTION),
    (r"gemm|nvjet|cublas|addmm|linear|(^|[^a-z])b?mm([^a-z]|$)|matmul|splitk", MATMUL),
    (r"memcpy|memset", OTHER),
    (
        r"elementwise|reduce|vectorized|unrolled|catarray|index|gather|scatter|softmax|gelu|silu|tanh|copy|fill|"
        r"aten::(add|mul|sub|div|pow|rsqrt|mean|cat|stack|neg|sin|cos|exp|sqrt|sum|clone|to|contiguous|square)",
        ELEMENTWISE,
    ),
)
_COMPILED = tuple((re.compile(pattern), group) for pattern, group in PATTERNS)


def group_of(kernel: str) -> str:
    """The group of a kernel (or, on a CPU, operator) by its name."""
    name = kernel.lower()
    for pattern, group in _COMPILED:
        if pattern.search(name):
            return group
    return OTHER


def profile_forward(forward: Callable[[], object], device: torch.device) -> dict[str, object]:
    """Milliseconds of one run by group, and the ten largest kernels of the group "other", so that it hides nothing."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        forward()
        if on_gpu:
            torch.cuda.synchronize(device)
    groups = dict.fromkeys(GROUPS, 0.0)
    rest: dict[str, float] = {}
    for event in profiler.key_averages():
        # A span around kernels is not a kernel, nor is what the host did to launch one.
        if getattr(event, "is_user_annotation", False) or (on_gpu and event.device_type != DeviceType.CUDA):
            continue
        ms = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        group = group_of(event.key)
        groups[group] += ms
        if group == OTHER and ms > 0:
            rest[event.key[:80]] = rest.get(event.key[:80], 0.0) + ms
    largest = sorted(rest.items(), key=lambda item: -item[1])[:10]
    return {"ms": groups, "other": dict(largest)}
