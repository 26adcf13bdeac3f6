"""The memory-bound steps around attention: fused kernels against what PyTorch does eagerly and compiled.

GB/s counts every input once and every output once: what a kernel that wastes nothing moves. The eager version is the
arithmetic of diffusers' Wan block, with its float32 islands; of tokens that are reordered, ``index_select``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.peers import reason
from benchmarks.timing import measure
from tilewise.kernels.fused.linear_gelu import linear_gelu
from tilewise.kernels.fused.qk_norm_rope import qk_norm_rope
from tilewise.kernels.fused.reorder import reorder_tokens
from tilewise.kernels.fused.residual_norm import gated_residual, layer_norm, residual_norm
from tilewise.kernels.plans.layout import Grid, cached_layout

EPS = 1e-6
Tensors = tuple[torch.Tensor, ...]
Make = Callable[..., torch.Tensor]  # sizes, dtype → random tensor


@dataclass(frozen=True)
class Size:
    name: str
    grid: Grid
    heads: int
    head_dim: int
    hidden: int  # width of the feed-forward layer

    @property
    def tokens(self) -> int:
        return self.grid.tokens

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim


SIZES = [
    Size("Wan2.1-1.3B 480×832×81", Grid(21, 30, 52), 12, 128, 8960),
    Size("Wan2.1-14B 720×1280×81", Grid(21, 45, 80), 40, 128, 13824),
    Size("Flux 1024²", Grid(1, 64, 64, text=512, text_first=True), 24, 128, 12288),
]
TINY = [Size("tiny", Grid(4, 5, 4, text=16), 2, 32, 128)]


@dataclass(frozen=True)
class Operation:
    """``inputs(size, make)`` gives the arguments of ``ours`` and of ``eager``; each returns a tensor or several."""

    name: str
    inputs: Callable[[Size, Make], Tensors]
    ours: Callable[..., Any]
    eager: Callable[..., Any]


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    c, s = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * c - odd * s
    out[..., 1::2] = even * s + odd * c
    return out


def _qk_inputs(size: Size, make: Make) -> Tensors:
    # cos and sin of a real model lie in [−1, 1] too; the arithmetic does not care that these are not of one angle.
    table = (1, size.tokens, 1, size.head_dim // 2)
    q, k = (make(1, size.tokens, size.channels) for _ in range(2))
    weights = (make(size.channels) for _ in range(2))
    return q, k, *weights, *(_pairs(make(*table, dtype=torch.float32).sin()) for _ in range(2))


def _pairs(table: torch.Tensor) -> torch.Tensor:
    """Each entry twice: both channels of a pair turn by one angle."""
    return table.repeat_interleave(2, -1)


def _qk_ours(q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, order: Any = None) -> Any:
    heads = q.shape[2] // cos.shape[-1]
    return qk_norm_rope(q, k, q_weight, k_weight, cos, sin, heads=heads, eps=EPS, order=order)


def _qk_eager(q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any) -> Any:
    out = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        normed = F.rms_norm(x, x.shape[-1:], weight, EPS)
        out.append(_turn(normed.unflatten(2, (-1, cos.shape[-1])), cos, sin))
    return tuple(out)


def _norm(hidden: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return (F.layer_norm(hidden.float(), hidden.shape[-1:], eps=EPS) * (1 + scale) + shift).type_as(hidden)


def _residual(hidden: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (hidden.float() + y * gate).type_as(hidden)


def _residual_norm(hidden: Any, y: Any, gate: Any, scale: Any, shift: Any) -> Any:
    hidden = _residual(hidden, y, gate)
    return hidden, _norm(hidden, scale, shift)


def _tokens(count: int, heads_first: bool = False) -> Callable[[Size, Make], Tensors]:
    """``count`` tensors (1, S, H, D), then the order of the tokens in tiles; ``heads_first``: in memory (1, H, S, D)."""

    def inputs(size: Size, make: Make) -> Tensors:
        S, H, D = size.tokens, size.heads, size.head_dim
        tensors = [make(1, H, S, D).transpose(1, 2) if heads_first else make(1, S, H, D) for _ in range(count)]
        return *tensors, _order(size, tensors[0].device)

    return inputs


def _order(size: Size, device: torch.device) -> torch.Tensor:
    return cached_layout(size.grid, (6, 8, 8)).permutation.to(device)


def _ordered_qk_inputs(size: Size, make: Make) -> Tensors:
    inputs = _qk_inputs(size, make)
    return *inputs, _order(size, inputs[0].device)


def _ordered_qk_eager(*inputs: Any) -> Any:
    *qk, order = inputs
    return tuple(x.index_select(1, order) for x in _qk_eager(*qk))


def _reorder_ours(*inputs: Any) -> Any:
    *tensors, order = inputs
    return tuple(reorder_tokens(tensors, order))


def _reorder_eager(*inputs: Any) -> Any:
    *tensors, order = inputs
    return tuple(x.index_select(1, order) for x in tensors)


def _stream(count: int, rows: int) -> Callable[[Size, Make], Tensors]:
    """``count`` tensors over tokens, then ``rows`` modulations, in float32 as the model has them."""

    def inputs(size: Size, make: Make) -> Tensors:
        stream = (make(1, size.tokens, size.channels) for _ in range(count))
        return *stream, *(make(1, 1, size.channels, dtype=torch.float32) for _ in range(rows))

    return inputs


OPERATIONS = [
    Operation("QK-RMSNorm + RoPE", _qk_inputs, _qk_ours, _qk_eager),
    Operation("LayerNorm + modulation", _stream(1, 2), lambda h, a, b: layer_norm(h, scale=a, shift=b, eps=EPS), _norm),
    Operation("gate + residual", _stream(2, 1), gated_residual, _residual),
    Operation(
        "gate + residual + LayerNorm + modulation",
        _stream(2, 3),
        lambda h, y, g, a, b: residual_norm(h, y, g, scale=a, shift=b, eps=EPS),
        _residual_norm,
    ),
    Operation(
        "linear + GELU",
        lambda size, make: (
            make(1, size.tokens, size.channels),
            make(size.hidden, size.channels) * size.channels**-0.5,
            make(size.hidden),
        ),
        linear_gelu,
        lambda x, weight, bias: F.gelu(F.linear(x, weight, bias), approximate="tanh"),
    ),
    Operation("QK-RMSNorm + RoPE into tile order", _ordered_qk_inputs, _qk_ours, _ordered_qk_eager),
    Operation("reorder q, k, v", _tokens(3), _reorder_ours, _reorder_eager),
    Operation("reorder q, k, v, heads first", _tokens(3, heads_first=True), _reorder_ours, _reorder_eager),
    Operation("reorder output", _tokens(1), _reorder_ours, _reorder_eager),
]


def _tuple(out: Any) -> Tensors:
    return out if isinstance(out, tuple) else (out,)


def _bytes(tensors: Tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def run_operation(
    operation: Operation, size: Size, device: torch.device, seconds: float, backend: str
) -> dict[str, Any]:
    """Milliseconds and GB/s of one operation, eager, compiled and ours, each compared with the eager one in float32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    inputs = operation.inputs(size, make)
    want = _tuple(operation.eager(*(x.float() if x.is_floating_point() else x for x in inputs)))
    moved = _bytes(inputs) + _bytes(_tuple(operation.eager(*inputs)))
    result: dict[str, Any] = {
        "name": f"{size.name}: {operation.name}",
        "tokens": size.tokens,
        "channels": size.channels,
        "dtype": str(dtype).removeprefix("torch."),
        "implementations": [],
        "missing": {},
        "wrong": [],
    }
    torch.compiler.reset()
    compiled = torch.compile(operation.eager, backend=backend, dynamic=False)
    for name, function in (("eager", operation.eager), ("torch.compile", compiled), ("tilewise", operation.ours)):
        try:
            got = _tuple(function(*inputs))
            error = max(float((g.float() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True))
            if not error < 1e-2:
                result["wrong"] += ["tilewise"] if name == "tilewise" else []
                raise AssertionError(f"wrong result: relative error {error:.2e}, expected below 1e-02")
            del got
            timing = measure(lambda function=function: function(*inputs), device, seconds=seconds)  # type: ignore[misc]
        except Exception as error_:  # kept, by name
            result["missing"][name] = reason(error_)
            continue
        facts = {"relative_error": error, "gbps": moved / timing.median / 1e6}
        result["implementations"].append({"name": name, **timing.to_dict(), **facts})
    return result


def run(
    device: torch.device, seconds: float, work: list[tuple[Size, Operation]], backend: str = "inductor"
) -> Iterator[dict[str, Any]]:
    """One result an operation and size. ``backend`` is torch.compile's."""
    with torch.no_grad():
        for size, operation in work:
            yield run_operation(operation, size, device, seconds, backend)
            if device.type == "cuda":
                torch.cuda.empty_cache()
