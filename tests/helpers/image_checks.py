"""What the tests of image denoisers share, beyond ``family_checks``.

masked_stock        stock with a window as an explicit mask, in every attention over the image, with any part of the text
own_processor       a processor that is not taken over gets its tokens in the model's own order
compiled_is_eager   torch.compile(fullgraph=True) gives what eager gives
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import family_checks
import torch

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.runtime.call_stats import DENSE_STEP, SPARSE


def random_weights(model: torch.nn.Module, seed: int = 0) -> Any:
    """Weights of variance 1 / fan-in, so that attention reaches the output visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)
    return model.eval()


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positions(h: int, w: int, number: int = 0, columns: int = 3) -> torch.Tensor:
    """(h·w, columns) positions of an image as the Flux pipelines make them: image number, row, column, 0 …"""
    ids = torch.zeros(h, w, columns)
    ids[..., 0] = number
    ids[..., 1] = torch.arange(h)[:, None]
    ids[..., 2] = torch.arange(w)
    return ids.view(-1, columns)


def output(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    out = family_checks.forward(model, inputs)
    return torch.stack(out) if isinstance(out, list) else out


def _window(method: tilewise.STA, grid: Grid, heads: int) -> torch.Tensor:
    """(1, H, S, S) bool: the method's window over the tokens of a call, in the model's order."""
    layout = method.layout(grid)
    at = layout.inverse
    return method.plan(layout, heads, torch.device("cpu")).to_mask(heads)[:, :, at][:, :, :, at]


@contextmanager
def _masked(model: Any, method: tilewise.STA, grid: Grid) -> Iterator[list[int]]:
    """The stock processors' attention with the method's window as a mask; yields the token counts of the calls."""
    (layer, *_) = family_checks.tilewise_layers(model)
    module = type(layer.module.processor).__call__.__globals__
    calls: list[int] = []

    def window(tokens: int, given: torch.Tensor | None) -> torch.Tensor | None:
        if not grid.video <= tokens <= grid.tokens:
            return given
        calls.append(tokens)
        mask = _window(method, grid.with_text(tokens - grid.video), layer.heads)
        if given is None:
            return mask
        return mask & given if given.dtype == torch.bool else torch.where(mask, given, -torch.inf)

    def dispatch(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        return stock(query, key, value, window(query.shape[1], attn_mask), **options)

    class Functional:
        @staticmethod
        def scaled_dot_product_attention(
            query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any
        ) -> Any:
            attn_mask = window(query.shape[2], attn_mask)
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, **options)

    stock = module.get("dispatch_attention_fn")
    if "dispatch_attention_fn" in type(layer.module.processor).__call__.__code__.co_names:
        replaced: dict[str, Any] = {"dispatch_attention_fn": dispatch}
    else:
        replaced = {"F": Functional}
    with mock.patch.dict(module, replaced):
        yield calls


def masked_stock(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    grid: Grid,
    *,
    method: tilewise.STA = family_checks.SMALL,
    atol: float = 2e-5,
) -> None:
    """Our sparse output = stock's with the same window as a mask; all calls sparse."""
    stock = output(model, inputs)
    with _masked(model, method, grid) as calls:
        want = output(model, inputs)
    assert len(calls) == len(family_checks.tilewise_layers(model))
    assert float((want - stock).abs().max()) > 10 * atol, "the window must matter"
    with tilewise.patched(model, method, steps=(0, 1), strict=True):
        ours = output(model, inputs)
        summary = tilewise.summary(model)
    assert {row.kind for row in summary.rows} == {SPARSE}, summary
    assert sum(row.calls for row in summary.rows) == len(calls)
    torch.testing.assert_close(ours, want, atol=atol, rtol=atol)


def own_processor(model: Any, inputs: dict[str, Any], number: int) -> None:
    """Layer ``number`` gets a processor that cannot be taken over: it sees what it sees in stock, and is reported."""
    layer = family_checks.tilewise_layers(model)[number]
    stock = layer.module.processor
    seen: list[torch.Tensor] = []

    class Own(type(stock)):  # type: ignore[misc]
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(hidden_states)
            return stock(attn, hidden_states, *args, **kwargs)

    Own.__call__.__signature__ = inspect.signature(type(stock).__call__)  # type: ignore[attr-defined]
    layer.module.set_processor(Own())
    try:
        want = output(model, inputs)
        with tilewise.patched(model, family_checks.FULL, steps=(0, 1)):
            ours = output(model, inputs)
            (reported,) = tilewise.summary(model).skipped_layers
            assert reported.endswith(layer.name)
        torch.testing.assert_close(seen[1], seen[0], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(ours, want, atol=2e-5, rtol=2e-5)
    finally:
        layer.module.set_processor(stock)


def compiled_is_eager(model: Any, *inputs: dict[str, Any]) -> None:
    """One graph for each kind of input, and the same output as eager; sparse."""
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
        want = [output(model, x) for x in inputs]
    torch.compiler.reset()
    try:
        with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            for x, expected in zip(inputs, want, strict=True):
                torch.testing.assert_close(output(compiled, x), expected, atol=1e-5, rtol=1e-5)
            assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE}
    finally:
        torch.compiler.reset()


def pipeline_full_window_is_dense(pipe: Any, call: dict[str, Any], *, calls: int | None = None) -> None:
    """A whole pipeline call with a full window = stock; unpatched it is stock to the bit. calls: how many must be sparse."""
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent", return_dict=False)[0]

    stock = run()
    tilewise.patch(pipe, family_checks.FULL, steps=(0.25, 1), strict=True)
    ours = run()
    counted = {row.kind: row.calls for row in tilewise.summary(pipe).rows}
    tilewise.unpatch(pipe)
    assert set(counted) == {SPARSE, DENSE_STEP}, counted
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)
    assert torch.equal(run(), stock)
