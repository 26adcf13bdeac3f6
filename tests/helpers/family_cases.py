"""What the tests of several families share: weights and inputs, and checks besides those of family_checks.

masked_attention          as family_checks.masked_dispatch, also for processors that call PyTorch's attention, or that leave
                          the padding of a prompt out
foreign_layer_is_stock    a layer whose processor cannot be taken over gets its tokens in the model's own order
compiled_is_eager         torch.compile(fullgraph=True) of a patched denoiser gives what it gives without
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import family_checks
import torch

import tilewise
from tilewise.plugins.hooks.attention_rebinding import DISPATCH
from tilewise.plugins.runtime.call_stats import SPARSE


def weights(model: torch.nn.Module, seed: int = 0) -> Any:
    """Every matrix drawn with variance 1 / fan-in, larger than the library does: attention reaches the output visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)
    return model.eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def masked_attention(model: torch.nn.Module, mask: torch.Tensor, tokens: int, fewer: int = 0) -> Iterator[list[int]]:
    """Stock's processors with ``mask`` (1, H, S, S) in every call over ``tokens`` = S tokens, or up to ``fewer`` at the end."""
    processor = family_checks.tilewise_layers(model)[0].module.processor
    module: Any = sys.modules[type(processor).__module__]
    names = type(processor).__call__.__code__.co_names
    functional = DISPATCH not in names
    holder, name = (torch.nn.functional, "scaled_dot_product_attention") if functional else (module, DISPATCH)
    stock = getattr(holder, name)
    axis = 2 if functional else 1
    calls: list[int] = []

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        n = query.shape[axis]
        if key.shape[axis] == n and tokens - fewer <= n <= tokens:
            calls.append(1)
            assert attn_mask is None
            attn_mask = mask[..., :n, :n]
        return stock(query, key, value, attn_mask, *args, **kwargs)

    with mock.patch.object(holder, name, attention):
        yield calls


def check(model: torch.nn.Module, inputs: dict[str, Any], grid: Any, **options: Any) -> None:
    """Both of family_checks, whatever way the model's processors ask for attention."""
    masked = functools.partial(masked_attention, fewer=0 if grid.text_first else grid.text)
    family_checks.full_window_is_dense(model, inputs, grid, **options)
    with mock.patch.object(family_checks, "masked_dispatch", masked):
        family_checks.sparse_is_masked_stock(model, inputs, grid, **options)


def foreign_layer_is_stock(model: torch.nn.Module, inputs: dict[str, Any], layer: int = 1, atol: float = 2e-5) -> None:
    """With a processor on one layer that counts on raster order, a full window gives stock's output."""
    module = family_checks.tilewise_layers(model)[layer].module
    original = module.processor

    class Exotic(type(original)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            out = super().__call__(*args, **kwargs)
            video = out[0] if isinstance(out, tuple) else out
            video = video * torch.linspace(0, 1, video.shape[1])[None, :, None]
            return (video, *out[1:]) if isinstance(out, tuple) else video

    # diffusers' Attention passes on what the signature names.
    Exotic.__call__.__signature__ = inspect.signature(type(original).__call__)
    module.processor = Exotic()
    before = family_checks.traces(model)
    stock = family_checks.forward(model, inputs)
    with tilewise.patched(model, family_checks.FULL, steps=(0, 1)):
        torch.testing.assert_close(family_checks.forward(model, inputs), stock, atol=atol, rtol=atol)
        assert len(tilewise.summary(model).skipped_layers) == 1
    assert family_checks.traces(model) == before
    module.processor = original


def compiled_is_eager(model: torch.nn.Module, inputs: dict[str, Any]) -> None:
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
        eager = family_checks.forward(model, inputs)
        torch.compiler.reset()
        with torch.no_grad():
            call = torch.compile(model, backend="eager", fullgraph=True)
            out = call(**inputs, return_dict=False)[0]
        assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE}
        torch.testing.assert_close(out, eager, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()
