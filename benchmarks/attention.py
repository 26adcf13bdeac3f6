"""Sparse attention against its peers: every row on the same tensors, in one process, checked before it is timed.

needed work    token pairs that the mask keeps         density = needed / all
kept work      token pairs that the kernel computes    work    = kept / all
TFLOP/s        4 · needed pairs · head dim · heads / time; for a dense peer, which needs them all, all pairs
of ideal       time of the fastest dense peer · density / time: 1 where nothing is lost against 1 / density
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import flex, peers
from benchmarks.rows import Row, visible
from benchmarks.timing import measure
from tilewise.kernels.attention.dispatch import available_backends, block_sparse_attention, choose_backend
from tilewise.kernels.attention.dispatch_8bit import KERNELS, VALUES, block_sparse_attention_8bit
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.fused.reorder import reorder_tokens
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Layout

Mask = Callable[[int, torch.Tensor], torch.Tensor]  # head, (n,) query positions → (n, S) bool
DenseResults = dict[tuple, tuple[list[dict[str, Any]], dict[str, str]]]
SAMPLES, SAMPLE_ROWS = 4, 32


class WrongResultError(AssertionError):
    """An implementation whose output is not the reference's. It is not timed."""


def check(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask | None, tolerance: float
) -> float:
    """Largest relative error ‖out − ref‖ / ‖ref‖ over slices of rows of the first and last head, against fp32.

    Args:
        out: (B, S, H, D), what an implementation returned for q, k and v of that shape.
        mask: None: every query sees every key.

    Raises:
        WrongResultError: if it is not below ``tolerance``, or not a number.
    """
    tokens, heads = q.shape[1:3]
    if out.shape != q.shape:
        raise WrongResultError(f"wrong result: shape {tuple(out.shape)}, expected {tuple(q.shape)}")
    rows = min(SAMPLE_ROWS, tokens)
    worst = 0.0
    for head in {0, heads - 1}:
        for sample in range(SAMPLES):
            first = (tokens - rows) * sample // (SAMPLES - 1)
            queries = torch.arange(first, first + rows, device=q.device)
            seen = None if mask is None else mask(head, queries)
            one = (slice(None), slice(None), slice(head, head + 1))
            want, _ = masked_attention(q[one][:, queries], k[one], v[one], seen, dtype=torch.float32)
            error = float((out[one][:, queries].float() - want).norm() / want.norm())
            if not error < tolerance:
                raise WrongResultError(f"wrong result: relative error {error:.2e}, expected below {tolerance:.0e}")
            worst = max(worst, error)
    return worst


def run_row(
    row: Row, device: torch.device, seconds: float, dense: DenseResults, compiled: bool = True
) -> dict[str, Any]:
    """Everything that runs ``row`` on ``device``. ``dense`` keeps the dense peers' times: they depend on the shape alone."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    layout = row.method.layout(row.grid)
    plan = row.method.plan(layout, row.heads, device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, row.grid.tokens, row.heads, row.head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    coords = layout.coords.to(device)
    flops = 4 * row.grid.tokens**2 * row.heads * row.head_dim
    results: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    wrong: list[str] = []

    def attempt(name: str, kind: str, prepare: Callable[[], peers.Call], mask: Mask | None, **more: Any) -> None:
        try:
            call = prepare()
            error = check(call(), q, k, v, mask, peers.TOLERANCES.get(name.removesuffix(", portable"), tolerance))
            timing = measure(call, device, seconds=seconds, warmup=0)
        except Exception as error_:  # a fact about this implementation on this row: kept, by name
            missing[name] = peers.reason(error_)
            if kind == "ours" and isinstance(error_, WrongResultError):
                wrong.append(name)
            return
        needed = flops if kind == "dense" else flops * plan.density
        facts = {"relative_error": error, "tflops": needed / timing.median / 1e9}
        results.append({"name": name, "kind": kind, **timing.to_dict(), **facts, **more})

    in_tiles: Mask = lambda head, queries: visible(row, layout, coords, head, queries)  # noqa: E731
    for name, usable, why in available_backends(device):
        if usable:
            attempt(
                name,
                "ours",
                lambda name=name: lambda: block_sparse_attention(q, k, v, plan, backend=name),  # type: ignore[misc]
                in_tiles,
            )
        elif device.type == "cuda" and name != "torch":
            missing[name] = why
    # Quantization is part of the call.
    for backend, precision in itertools.product(KERNELS, VALUES) if device.type == "cuda" else ():
        attempt(
            precision if backend == "gluon" else f"{precision}, portable",
            "8-bit",
            lambda precision=precision, backend=backend: (
                lambda: block_sparse_attention_8bit(  # type: ignore[misc]
                    q, k, v, plan, precision=precision, backend=backend
                )
            ),
            in_tiles,
        )
    for order in row.flex:
        _flex(row, layout, order, attempt, q, k, v, compiled)

    # Tensors come from the same seed: rows of one shape have the same, and dense attention sees no difference but that.
    key = (row.grid.tokens, row.heads, row.head_dim)
    if key not in dense:
        first, known = len(results), set(missing)
        found, absent = peers.dense_peers(device)
        for name, peer in found.items():
            attempt(name, "dense", lambda peer=peer: peer(q, k, v), None)  # type: ignore[misc]
        missing.update(absent)
        dense[key] = results[first:], {name: missing[name] for name in missing if name not in known}
    else:
        results += dense[key][0]
        missing.update(dense[key][1])

    _compare(results, plan.density)
    result: dict[str, Any] = {
        "name": row.name,
        "grid": [*row.grid.shape, row.grid.text],
        "heads": row.heads,
        "head_dim": row.head_dim,
        "tile": layout.tile,
        "windows": sorted(set(row.windows(layout))),
        "unit": row.unit,
        "stride": row.stride,
        "dtype": str(dtype).removeprefix("torch."),
        "density": plan.density,
        "work": plan.work,
        "implementations": results,
        "missing": missing,
        "wrong": wrong,
    }
    ours = [r for r in results if r["kind"] == "ours"]
    if ours:
        choice = choose_backend(q, k, v, plan)
        result["chosen"], result["reason"] = choice.backend, choice.reason
        result["best"] = min(ours, key=lambda r: r["ms"])["name"]
        result["with_permutes"] = _with_permutes(layout, plan, q, k, v, result["best"], seconds)
    return result


def _flex(
    row: Row,
    layout: Layout,
    order: str,
    attempt: Callable,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    compiled: bool,
) -> None:
    """FlexAttention in one token order: q, k and v are taken to be in it already, as ours takes them to be in tile order."""
    device = q.device
    coords = layout.coords.to(device)
    if order == "raster order":
        coords = coords[:, layout.inverse.to(device)]
    mask = flex.block_mask(flex.mask_mod(row, layout, order, device), row.grid.tokens, device)
    attempt(
        f"flex, {order}",
        "sparse",
        lambda: flex.flex_call(mask, q, k, v, compiled),
        lambda head, queries: visible(row, layout, coords, head, queries),
        work=flex.computed(mask),
    )


def _with_permutes(
    layout: Layout, plan: BlockPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str, seconds: float
) -> dict[str, float]:
    """The same call with q, k and v reordered before and the output after: what a single call in raster order costs."""
    order, inverse = layout.permutation.to(q.device), layout.inverse.to(q.device)

    def call() -> torch.Tensor:
        out = block_sparse_attention(*reorder_tokens((q, k, v), order), plan, backend=backend)
        return reorder_tokens((out,), inverse)[0]

    return measure(call, q.device, seconds=seconds).to_dict()


def _compare(results: list[dict[str, Any]], density: float) -> None:
    """× over each dense peer and the fraction of the ideal, for what is not dense itself; for 8 bits also × over ours in 16."""
    dense = {r["name"]: r["ms"] for r in results if r["kind"] == "dense"}
    for r in results:
        if r["kind"] != "dense" and dense:
            r["over"] = {name: ms / r["ms"] for name, ms in dense.items()}
            r["of_ideal"] = min(dense.values()) * density / r["ms"]
    ours = {r["name"]: r["ms"] for r in results if r["kind"] == "ours"}
    for r in results:
        if r["kind"] == "8-bit":
            r["over"] = {**r.get("over", {}), **{name: ms / r["ms"] for name, ms in ours.items()}}


def run(device: torch.device, seconds: float, rows: list[Row], compiled: bool = True) -> Iterator[dict[str, Any]]:
    """One result a row."""
    dense: DenseResults = {}
    for row in rows:
        yield run_row(row, device, seconds, dense, compiled)
        if device.type == "cuda":
            torch.cuda.empty_cache()
