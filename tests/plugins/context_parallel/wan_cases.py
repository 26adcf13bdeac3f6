"""Cases of Wan for ``forked_ranks.py``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import tiny_wan
import torch
import torch.distributed as dist

import tilewise
from tilewise.plugins.methods.auto import Auto
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.inward import Inward
from tilewise.plugins.methods.neighborhood import Neighborhood
from tilewise.plugins.methods.sta import STA
from tilewise.plugins.methods.xattention import XAttention

SELECTING = {"density": 0.4, "tile": (1, 4, 4), "min_tokens": 0}
WINDOWS = ((3, 1, 3), (1, 3, 1), (1, 1, 1), (3, 3, 1))
METHODS = {
    "dense": "dense",
    "sta": STA(window=(3, 1, 3), tile=(2, 3, 4)),
    "sta, a window a head": STA(window=WINDOWS, tile=(2, 3, 4)),
    "sta, far field": STA(window=(1, 1, 3), tile=(2, 3, 4), far="tiles"),
    "inward": Inward(native=(4, 4)),
    "neighborhood": Neighborhood(window=(3, 3, 5)),
    "draft": Draft(**SELECTING),
    "draft, a density a head": Draft(head_density=(0.2, 0.4, 0.6, 0.9), tile=(1, 4, 4), min_tokens=0),
    "draft within sta": Draft(**SELECTING, within=STA(window=WINDOWS)),
    "xattention": XAttention(**SELECTING, stride=4),
}


def inputs(grid: tuple[int, int, int], batch: int = 2) -> dict[str, Any]:
    t, h, w = grid
    noise = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, tiny_wan.Z_CHANNELS, t, 2 * h, 2 * w, generator=noise),
        "timestep": torch.tensor([500.0] * batch),
        "encoder_hidden_states": torch.randn(batch, 8, tiny_wan.TEXT_DIM, generator=noise),
    }


def forward(
    split: Callable[[Any], Any] | None,
    method: Any,
    *,
    grid: tuple[int, int, int] = (5, 6, 8),
    heads: int = 4,
    patch_first: bool = False,
    by_token: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """One forward, patched; then unpatched, where split and whole must be equal too."""
    model = tiny_wan.tiny_transformer(num_attention_heads=heads)
    given = inputs(grid)
    if by_token:
        given["timestep"] = torch.linspace(100, 900, 2 * math.prod(grid)).view(2, -1)
    if split and not patch_first:
        split(model)
    processors = [block.attn1.processor for block in model.blocks]
    tilewise.patch(model, method, steps=(0, 1), strict=True, **options)
    if split and patch_first:
        split(model)
    out = model(**given, return_dict=False)[0]
    found = tilewise.summary(model)
    said = {
        "kinds": sorted({row.kind for row in found.rows}),
        "calls": found.calls,
        "density": found.density,
        "text": str(found),
    }
    tilewise.unpatch(model)
    assert [block.attn1.processor for block in model.blocks] == processors
    stock = model(**given, return_dict=False)[0] if heads == 4 else out  # diffusers pads some numbers of heads alone
    return torch.cat([out, stock]), said


def unequal_heads(
    split: Callable[[Any], Any] | None, method: Any, heads: int = 4, strict: bool = True
) -> tuple[torch.Tensor, Any]:
    """Forwards of a model whose first heads attend to little, and whose last ones to almost everything."""
    model = tiny_wan.tiny_transformer(num_attention_heads=heads)
    weights = torch.tensor([5.0, 4.0, 1.0, 0.5]).repeat_interleave(heads // 4)
    for block in model.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.weight.view(heads, -1).mul_(weights[:, None])
    if split:
        split(model)
    tilewise.patch(model, method, steps=(0, 1), strict=strict)
    given, out, balance = inputs((5, 6, 8)), [], []
    for timestep in (500.0, 480.0, 460.0):
        out.append(model(**given | {"timestep": torch.tensor([timestep] * 2)}, return_dict=False)[0])
        found = tilewise.summary(model, reset=timestep > 460)
        balance += [row.balance for row in found.ranks]
    said = {"kinds": sorted({row.kind for row in found.rows}), "calls": found.calls, "text": str(found)}
    return torch.stack(out), said | {"balance": balance}


def case(method: Any, *, ranks: tuple[int, ...] | None = None, **options: Any) -> Callable[..., Any]:
    run: Any = functools.partial(forward, method=method, **options)
    if ranks is not None:
        run.ranks = ranks
    return run


def unequal(method: Any, ranks: tuple[int, ...] = (2,), heads: int = 4) -> Callable[..., Any]:
    run: Any = functools.partial(unequal_heads, method=method, heads=heads)
    run.ranks = ranks
    return run


def cases() -> dict[str, Callable[..., Any]]:
    whole = {name: case(method, ranks=((2,), (4,))[n % 2]) for n, (name, method) in enumerate(METHODS.items())}
    return {
        **whole,
        "sta, patched first": case(METHODS["sta"], patch_first=True, ranks=(2,)),
        "sta, ragged": case(METHODS["sta"], grid=(5, 7, 5), heads=5),
        "draft, ragged, dense steps and layers": case(
            METHODS["draft"], grid=(5, 7, 5), heads=7, blocks="1:", ranks=(3,)
        ),
        "sta, a timestep a token": case(METHODS["sta"], by_token=True, grid=(5, 7, 5), heads=6),
        "draft, a recall, unequal heads": unequal(Draft(recall=0.8, tile=(1, 4, 4), min_tokens=0)),
        "xattention, a recall, unequal heads": unequal(XAttention(recall=0.8, tile=(1, 4, 4), min_tokens=0, stride=4)),
        "auto, unequal heads": unequal(Auto(**SELECTING, every=2)),
        "auto, 12 heads of 8 ranks": unequal(Auto(**SELECTING, every=2), heads=12, ranks=(8,)),
        "sta, 12 windows of 8 ranks": unequal(STA(window=WINDOWS * 3, tile=(2, 3, 4)), heads=12, ranks=(8,)),
        "keep": case(METHODS["draft"], keep="ends", ranks=(2,)),
        **{f"error: {name}": error for name, error in ERRORS.items()},
    }


def too_many_ranks(split: Any) -> Any:
    if split:
        split(tiny_wan.tiny_transformer(num_attention_heads=2))


def uneven(split: Any) -> Any:
    if split:
        model = split(tiny_wan.tiny_transformer())
        model._parallel_config.context_parallel_config.ulysses_anything = False
        tilewise.patch(model, METHODS["sta"])(**inputs((5, 7, 5)))


def other_methods(split: Any) -> Any:
    if split:
        model = split(tiny_wan.tiny_transformer())
        method = METHODS["sta"] if dist.get_rank() else METHODS["draft"]
        tilewise.patch(model, method, steps=(0, 1))(**inputs((5, 6, 8)))


def ring(split: Any) -> Any:
    if split:
        model = tilewise.patch(split(tiny_wan.tiny_transformer()), METHODS["sta"], steps=(0, 1), strict=True)
        config = model._parallel_config.context_parallel_config
        config.ring_degree, config.ulysses_degree = config.ulysses_degree, 1
        model(**inputs((5, 6, 8)))


def all_heads_needed(split: Any) -> Any:
    if split:
        method = Draft(**SELECTING, select="shared")
        model = tilewise.patch(split(tiny_wan.tiny_transformer()), method, steps=(0, 1), strict=True)
        model(**inputs((5, 6, 8)))


def twice(split: Any) -> Any:
    if split:
        split(split(tiny_wan.tiny_transformer()))


ERRORS: dict[str, Any] = {
    run.__name__: run for run in (too_many_ranks, uneven, other_methods, ring, all_heads_needed, twice)
}
for run in ERRORS.values():
    run.ranks = (2,)
too_many_ranks.ranks = (3,)  # type: ignore[attr-defined]
