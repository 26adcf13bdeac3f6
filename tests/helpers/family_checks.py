"""What every model family must show, on a tiny random-weight denoiser. Each family's test file calls these.

full_window_is_dense   a window that holds everything gives stock's output, and unpatch gives stock's bits
sparse_is_masked_stock a real window gives what stock gives with that window as an explicit (S, S) attention mask
refused_is_stock       inputs without a grid run stock, bit by bit; each call is counted with the reason, and strict raises
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.patching import patches_of
from tilewise.plugins.runtime.call_stats import FALLBACK, SPARSE

FULL = tilewise.STA(window=(99, 99, 99), tile=(2, 3, 3))
SMALL = tilewise.STA(window=(1, 2, 1), tile=(2, 3, 3))


def forward(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def traces(module: torch.nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind: attributes, hooks, buffers and processors of every submodule."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    hooks += ("_forward_hooks_always_called", "_buffers", "_modules")
    return {
        name: (sorted(m.__dict__), [list(getattr(m, h)) for h in hooks], id(getattr(m, "processor", None)))
        for name, m in module.named_modules()
    }


def full_window_is_dense(model: torch.nn.Module, inputs: dict[str, Any], grid: Grid, atol: float = 2e-5) -> None:
    """Sparse with a whole window = stock; every self-attention call sparse; unpatch exact and without a trace."""
    before = traces(model)
    stock = forward(model, inputs)
    tilewise.patch(model, FULL, steps=(0, 1), strict=True)
    ours = forward(model, inputs)
    summary = tilewise.summary(model)
    assert {row.kind for row in summary.rows} == {SPARSE}, summary
    assert next(iter(patches_of(model).values())).state.grid == grid
    assert not summary.skipped_layers
    torch.testing.assert_close(ours, stock, atol=atol, rtol=atol)
    tilewise.unpatch(model)
    assert torch.equal(forward(model, inputs), stock)
    assert traces(model) == before


@contextlib.contextmanager
def masked_dispatch(model: torch.nn.Module, mask: torch.Tensor, tokens: int) -> Iterator[list[int]]:
    """Stock's processors with ``mask`` (1 or B, H, S, S) added to every self-attention call over ``tokens`` tokens."""
    module: Any = sys.modules[type(model).__module__]
    stock = module.dispatch_attention_fn
    calls: list[int] = []

    def dispatch(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if query.shape[1] == key.shape[1] == tokens:
            calls.append(1)
            seen = mask.to(query.device)
            if attn_mask is not None:
                given = attn_mask if attn_mask.ndim == 4 else attn_mask[:, None, None]
                seen = seen & given if given.dtype == torch.bool else torch.where(seen, given, -torch.inf)
            attn_mask = seen
        return stock(query, key, value, attn_mask, *args, **kwargs)

    with mock.patch.object(module, "dispatch_attention_fn", dispatch):
        yield calls


def sparse_is_masked_stock(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    grid: Grid,
    method: tilewise.STA = SMALL,
    atol: float = 2e-5,
) -> None:
    """Our sparse output = stock's with the same window as an explicit mask over raster tokens; text sees and is seen by all."""
    (layer, *_) = tilewise_layers(model)
    layout = method.layout(grid)
    plan = method.plan(layout, layer.heads, torch.device("cpu"))
    assert plan.density < 1
    at = layout.inverse
    mask = plan.to_mask(layer.heads)[:, :, at][:, :, :, at]
    with masked_dispatch(model, mask, grid.tokens) as calls:
        want = forward(model, inputs)
    assert len(calls) >= len(tilewise_layers(model))
    stock = forward(model, inputs)
    assert float((want - stock).abs().max()) > 10 * atol, "the window must matter"
    with tilewise.patched(model, method, steps=(0, 1), strict=True):
        ours = forward(model, inputs)
    torch.testing.assert_close(ours, want, atol=atol, rtol=atol)


def refused_is_stock(model: torch.nn.Module, inputs: dict[str, Any], said: str, run: Any = None) -> None:
    """said: part of the reason, a regular expression. run: the forward, if not ``forward``; it may be several."""
    run = run or forward
    stock = run(model, inputs)
    with tilewise.patched(model, FULL, steps=(0, 1)):
        assert torch.equal(run(model, inputs), stock)
        counted = tilewise.summary(model)
        assert counted.fallbacks and all(re.search(said, reason) for reason in counted.fallbacks), counted.fallbacks
        assert {row.kind for row in counted.rows} == {FALLBACK}
        assert min(counted.fallbacks.values()) >= len(tilewise_layers(model))
    with tilewise.patched(model, FULL, steps=(0, 1), strict=True), pytest.raises(tilewise.FallbackError, match=said):
        run(model, inputs)
    with tilewise.patched(model, FULL, steps=(0, 0), strict=True):  # a dense step asks for nothing
        assert torch.equal(run(model, inputs), stock)
    assert torch.equal(run(model, inputs), stock)


def tilewise_layers(model: torch.nn.Module) -> list[Any]:
    from tilewise.plugins.models.common.registry import family_of

    family = family_of(model)
    assert family is not None
    return family.layers(model)
