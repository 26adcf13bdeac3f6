"""Cases of ``torchrun_ranks.py``: sizes that the GPU kernels take, in bfloat16; on a CPU smaller, which shows that they run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import every_family
import test_hunyuan_video as hunyuan_video
import tiny_wan
import torch

import tilewise
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.sta import STA
from tilewise.plugins.methods.xattention import XAttention

CUDA = torch.cuda.is_available()
GRID = (9, 32, 48) if CUDA else (3, 6, 8)
METHODS: dict[str, Any] = {
    "dense": "dense",
    "sta": STA(),
    "sta, a window a head": STA(window=((3, 3, 3), (1, 3, 3), (3, 1, 3), (5, 3, 3), (3, 5, 3), (3, 3, 5))),
    "sta, int8": tilewise.Config(STA(), precision="int8"),
    "draft": Draft(density=0.3, min_tokens=0),
    "xattention": XAttention(density=0.3, min_tokens=0),
}


def placed(model: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if not CUDA:
        return model, given
    device = torch.device("cuda", torch.cuda.current_device())

    def there(x: Any) -> Any:
        x = x.to(device)
        return x.bfloat16() if x.is_floating_point() else x

    return model.to(device, torch.bfloat16), {name: there(x) for name, x in given.items()}


def wan(heads: int) -> tuple[Any, dict[str, Any]]:
    model = tiny_wan.tiny_transformer(num_attention_heads=heads, attention_head_dim=128 if CUDA else 16)
    t, h, w = GRID
    noise = torch.Generator().manual_seed(1)
    given = {
        "hidden_states": torch.randn(2, tiny_wan.Z_CHANNELS, t, 2 * h, 2 * w, generator=noise),
        "timestep": torch.tensor([500.0] * 2),
        "encoder_hidden_states": torch.randn(2, 8, tiny_wan.TEXT_DIM, generator=noise),
    }
    return placed(model, given)


def hunyuan() -> tuple[Any, dict[str, Any]]:
    config = {"attention_head_dim": 64, "rope_axes_dim": (16, 24, 24)} if CUDA else {}
    model = hunyuan_video.tiny(num_attention_heads=3, **config)
    return placed(model, hunyuan_video.inputs(None, every_family.pixels(GRID), (6, 9)))


def forward(split: Callable[[Any], Any] | None, make: Callable[[], Any], method: Any) -> tuple[torch.Tensor, Any]:
    model, given = make()
    if split:
        split(model)
    tilewise.patch(model, method, steps=(0, 1), strict=CUDA)
    out = model(**given, return_dict=False)[0]
    found = tilewise.summary(model)
    kinds, backends = ({getattr(row, name) for row in found.rows} for name in ("kind", "backend"))
    return out, {"kinds": sorted(kinds), "backends": sorted(backends), "fused": found.fused_calls, "calls": found.calls}


def cases() -> dict[str, Callable[..., Any]]:
    found: dict[str, Any] = {
        f"Wan, {name}": functools.partial(forward, make=functools.partial(wan, 6), method=method)
        for name, method in METHODS.items()
    }
    found["Wan of 5 heads, sta"] = functools.partial(forward, make=functools.partial(wan, 5), method=METHODS["sta"])
    for name in ("dense", "sta", "draft"):
        found[f"HunyuanVideo, {name}"] = functools.partial(forward, make=hunyuan, method=METHODS[name])
    return found
