"""Cases of ``gpu_ranks.py``: sizes that the GPU kernels take, in bfloat16; on a CPU smaller, which shows that they run.

Few and small, with one head dim for all: each rank compiles every kernel that a case is the first to use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import test_hunyuan_video as hunyuan_video
import tiny_wan
import torch

import tilewise
from tilewise.plugins.methods.auto import Auto
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.sta import STA

CUDA = torch.cuda.is_available()
GRID = (6, 24, 32) if CUDA else (3, 6, 8)
HEAD_DIM = 128 if CUDA else 16
METHODS: dict[str, Any] = {
    "dense": "dense",
    "sta, a window a head": STA(window=((3, 3, 3), (1, 3, 3), (1, 1, 3), (1, 3, 1), (1, 1, 1), (3, 1, 3))),
    "sta, int8": tilewise.Config(STA(window=(1, 3, 3)), precision="int8"),
    "draft": Draft(density=0.3, min_tokens=0),
}


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")


def placed(model: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    def there(x: Any) -> Any:
        x = x.to(device())
        return x.bfloat16() if CUDA and x.is_floating_point() else x

    return model.to(device(), torch.bfloat16 if CUDA else None), {name: there(x) for name, x in given.items()}


def wan(heads: int) -> tuple[Any, dict[str, Any]]:
    model = tiny_wan.tiny_transformer(num_attention_heads=heads, attention_head_dim=HEAD_DIM)
    t, h, w = GRID
    noise = torch.Generator().manual_seed(1)
    given = {
        "hidden_states": torch.randn(2, tiny_wan.Z_CHANNELS, t, 2 * h, 2 * w, generator=noise),
        "timestep": torch.tensor([500.0] * 2),
        "encoder_hidden_states": torch.randn(2, 8, tiny_wan.TEXT_DIM, generator=noise),
    }
    return placed(model, given)


def hunyuan() -> tuple[Any, dict[str, Any]]:
    config = {"attention_head_dim": HEAD_DIM, "rope_axes_dim": (16, 56, 56)} if CUDA else {}
    model = hunyuan_video.tiny(num_attention_heads=3, num_layers=1, num_single_layers=1, **config)
    t, h, w = GRID
    return placed(model, hunyuan_video.inputs(None, (t, 2 * h, 2 * w), (6, 9)))


def forward(split: Callable[[Any], Any] | None, make: Callable[[], Any], method: Any) -> tuple[torch.Tensor, Any]:
    model, given = make()
    if split:
        split(model)
    tilewise.patch(model, method, steps=(0, 1), strict=CUDA)
    out = model(**given, return_dict=False)[0]
    return out, said(model)


def unequal_heads(split: Callable[[Any], Any] | None, method: Any) -> tuple[torch.Tensor, Any]:
    """Forwards of a model whose first heads attend to little: the second deals heads by what they kept in the first."""
    model, given = wan(6)
    weights = torch.linspace(8, 0.5, 6, device=device())[:, None]
    for block in model.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.weight.data.view(6, -1).mul_(weights)
    if split:
        split(model)
    tilewise.patch(model, method, steps=(0, 1), strict=CUDA)
    out = torch.stack([model(**given | {"timestep": given["timestep"] - n}, return_dict=False)[0] for n in (0, 9)])
    return out, said(model) | {"balance": [row.balance for row in tilewise.summary(model).ranks]}


def clip(split: Callable[[Any], Any] | None) -> tuple[torch.Tensor, Any]:
    """A whole run of a pipeline with guidance, its steps dense and sparse, and the decode."""
    pipe = tiny_wan.tiny_pipeline(num_attention_heads=4, attention_head_dim=HEAD_DIM)
    pipe = pipe.to(device(), torch.bfloat16 if CUDA else torch.float32)
    if split:
        split(pipe)
    tilewise.patch(pipe, STA(window=(3, 1, 3)), strict=CUDA)
    t, h, w = GRID
    size = {"height": 8 * h, "width": 8 * w, "num_frames": tiny_wan.TEMPORAL * (t - 1) + 1}
    generator = torch.Generator().manual_seed(0)
    frames = pipe("a red circle", generator=generator, num_inference_steps=4, output_type="pt", **size).frames
    return frames, said(pipe)


def said(target: Any) -> dict[str, Any]:
    found = tilewise.summary(target)
    kinds, backends = ({getattr(row, name) for row in found.rows} for name in ("kind", "backend"))
    return {"kinds": sorted(kinds), "backends": sorted(backends), "fused": found.fused_calls, "calls": found.calls}


def cases() -> dict[str, Callable[..., Any]]:
    found: dict[str, Any] = {
        f"Wan, {name}": functools.partial(forward, make=functools.partial(wan, 6), method=method)
        for name, method in METHODS.items()
    }
    for name, method in (
        ("auto", Auto(density=0.3, min_tokens=0)),
        ("draft, a recall", Draft(recall=0.8, min_tokens=0)),
    ):
        found[f"Wan, {name}, unequal heads"] = functools.partial(unequal_heads, method=method)
    sta = STA(window=(1, 3, 3))
    found["Wan of 5 heads, sta"] = functools.partial(forward, make=functools.partial(wan, 5), method=sta)
    for name, method in (("sta", sta), ("draft", METHODS["draft"])):
        found[f"HunyuanVideo, {name}"] = functools.partial(forward, make=hunyuan, method=method)
    found["Wan, a whole clip"] = functools.partial(clip)
    halves: Any = functools.partial(clip)
    halves.cfg = True
    found["Wan, a whole clip, a branch of guidance on each"] = halves
    return found
