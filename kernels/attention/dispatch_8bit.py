"""Block-sparse attention in 8 bits: faster than 16 bits, at an error that the caller accepts by calling it.

Scores are int8 products, weights × values int8 (``"int8"``) or e4m3 (``"fp8"``) ones; quantize.py has the formulas.
Relative error ‖out − exact‖ / ‖out‖ on unit-variance inputs, 10 368 keys, simulated (test_8bit.py bounds it):

    q k         weights · v                    error
    bf16        bf16                           0.3 %
    int8        int8, block maximum            2.0 %      "int8"
    int8        e4m3, block maximum            3.5 %      "fp8"
    int8        int8, running maximum          4.7 %
    e4m3        e4m3, running maximum          5.2 %      both products in fp8

e4m3 keeps 3 bits behind the leading one whatever the size, int8 7 bits of the largest: normal inputs, cut into blocks of
128 keys, are better off with the latter once weights are measured from their own block's maximum.

Two kernels run it: one for Hopper (backends/hopper_8bit.py), which also takes means in the same launch, and a portable one
(backends/triton_8bit.py), which takes blocks of other sizes too.
"""

from __future__ import annotations

import math

import torch

from tilewise.kernels.attention.block_compensation import BlockCompensation
from tilewise.kernels.attention.dispatch import _gluon_unavailable, _triton_unavailable, check_means, choose_backend
from tilewise.kernels.attention.quantize import VALUES, Precision, Quantized, key_order, quantize
from tilewise.kernels.device import runs_triton
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.plans.block_plan import BlockPlan

BLOCK = 128  # rows that a block of the plan must have room for in the Hopper kernel
SMALLEST_BLOCK = 32  # and in the portable one, whose 8-bit products take keys by 32
HEAD_DIMS = (64, 128)
TOP = {"int8": 127.0, "fp8": 256.0}  # what a block's largest weight becomes
KERNELS = ("gluon", "triton")  # the preferred one first


def unavailable_8bit(device: torch.device, precision: Precision) -> str | None:
    """Why no GPU kernel runs in a precision on a device, or None if one does."""
    if reason := _triton_unavailable(device):
        return reason
    if torch.version.hip is not None:
        return "the kernels in 8 bits have instructions that only NVIDIA GPUs have"
    if precision == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        return (
            f"e4m3 products need compute capability 8.9 or later, not {torch.cuda.get_device_name(device)}; int8 runs"
        )
    return None


def unsupported_8bit(q: torch.Tensor, plan: BlockPlan) -> str | None:
    """Why these tensors or this plan cannot run in 8 bits, or None if they can. Shapes were validated before."""
    if q.shape[3] not in HEAD_DIMS:
        return f"head dimension {q.shape[3]} is not 64 or 128"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype} is not a 16-bit type"
    if plan.block < SMALLEST_BLOCK:
        return f"the plan's blocks have room for {plan.block} rows, fewer than {SMALLEST_BLOCK}"
    return None


def takes_hopper_8bit(q: torch.Tensor, k: torch.Tensor, plan: BlockPlan) -> str | None:
    """Why a call that runs in 8 bits does not run in the Hopper kernel, or None if it does."""
    if reason := _gluon_unavailable(q.device):
        return reason
    if plan.block != BLOCK:
        return f"the plan's blocks have room for {plan.block} rows, not {BLOCK}"
    for name, x, blocks in (("q", q, plan.q_start), ("k", k, plan.k_start)):
        if x.shape[0] * x.shape[2] * len(blocks) * BLOCK >= 2**30:
            return f"the blocks of {name} have 2³⁰ rows or more over all heads"
    return None


def block_sparse_attention_8bit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    *,
    precision: Precision = "int8",
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale · q kᵀ) v over the key blocks that ``plan`` lists, quantized to 8 bits on the way.

    A CPU computes it naively: for tests, not for speed.

    Args:
        q: (B, Sq, H, D) float16 or bfloat16, any strides with a contiguous D, D 64 or 128.
        k, v: (B, Sk, Hk, D), Hk dividing H (grouped-query attention).
        plan: on the same device, of blocks with room for 32 rows or more.
        precision: of weights and values: "int8" (more exact) or "fp8" (e4m3; fewer instructions). Scores are int8 in both.
        scale: default 1/√D.
        backend: "gluon" (Hopper; blocks with room for 128 rows) or "triton"; None: the first of them that takes this call.
        return_lse: also return the natural log-sum-exp of the scaled scores, (B, H, Sq) float32.

    Returns:
        (B, Sq, H, D) in q's dtype. A query that sees no key has output 0 and log-sum-exp −inf.

    Raises:
        UnsupportedPlanError: this device, these tensors or this plan do not run in 8 bits, with the reason; use
            ``block_sparse_attention`` then.
        ValueError: as ``choose_backend``, or an unknown precision or backend.
    """
    where = f"block_sparse_attention_8bit(q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)})"
    if precision not in VALUES:
        raise ValueError(f"{where}: precision must be one of {', '.join(VALUES)}, got {precision!r}")
    if backend not in (None, *KERNELS):
        raise ValueError(f"{where}: backend must be one of {', '.join(KERNELS)}, got {backend!r}")
    choose_backend(q, k, v, plan)  # whatever it chooses: the shapes, dtypes, devices and strides are checked
    on_cpu = q.device.type == "cpu"
    reason = unsupported_8bit(q, plan) or (
        None if on_cpu and backend is None else unavailable_8bit(q.device, precision)
    )
    if reason is None and backend == "gluon":
        reason = takes_hopper_8bit(q, k, plan)
    if reason:
        raise UnsupportedPlanError(f"{where}: cannot run in 8 bits: {reason}; use block_sparse_attention")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, lse = block_sparse_8bit_op(
        q, k, v, plan.q_start, plan.q_rows, plan.k_start, plan.k_rows, plan.index, plan.key_start, plan.ends,
        plan.head_set, plan.key_encoding, plan.row_encoding, plan.guard_bits, plan.block, scale, precision, backend or "",
    )  # fmt: skip
    return (out, lse) if return_lse else out


def block_sparse_attention_8bit_with_means(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    means: BlockCompensation,
    *,
    precision: Precision,
    scale: float | None = None,
) -> torch.Tensor:
    """As ``block_sparse_attention_with_means``, in 8 bits: the means are quantized as keys and values are, 128 to a block."""
    check_means(q, k, plan, means)
    from tilewise.kernels.attention.backends.hopper_8bit import hopper_8bit_forward

    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    small = quantize(q, k, v, plan, scale, precision, (means.key_mean, means.value_mean))
    return hopper_8bit_forward(small, plan, scale, q.shape[1], q.dtype, means)[0]


@torch.library.custom_op("tilewise::block_sparse_attention_8bit", mutates_args=(), device_types=("cpu", "cuda"))
def block_sparse_8bit_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_start: torch.Tensor,
    q_rows: torch.Tensor,
    k_start: torch.Tensor,
    k_rows: torch.Tensor,
    index: torch.Tensor,
    key_start: torch.Tensor,
    ends: torch.Tensor,
    head_set: torch.Tensor | None,
    key_encoding: torch.Tensor | None,
    row_encoding: torch.Tensor | None,
    guard_bits: int,
    block: int,
    scale: float,
    precision: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantization and kernel as one PyTorch operator (a BlockPlan's tensors one by one), whole under torch.compile."""
    plan = BlockPlan(
        q_start=q_start, q_rows=q_rows, k_start=k_start, k_rows=k_rows, index=index, key_start=key_start, ends=ends,
        block=block, q_len=q.shape[1], k_len=k.shape[1], density=math.nan, work=math.nan,
        head_set=head_set, key_encoding=key_encoding, row_encoding=row_encoding, guard_bits=guard_bits,
    )  # fmt: skip
    small = quantize(q, k, v, plan, scale, precision)  # type: ignore[arg-type]
    if not runs_triton(q.device):
        return forward_8bit_naive(small, plan, scale, q.shape[1], q.dtype)
    if backend == "triton" or takes_hopper_8bit(q, k, plan):
        from tilewise.kernels.attention.backends.triton_8bit import (
            triton_8bit_forward,  # imports Triton: only where it is
        )

        return triton_8bit_forward(small, plan, scale, q.shape[1], q.dtype)
    from tilewise.kernels.attention.backends.hopper_8bit import hopper_8bit_forward

    return hopper_8bit_forward(small, plan, scale, q.shape[1], q.dtype)


@block_sparse_8bit_op.register_fake
def _(q, k, v, *tables_and_options):
    B, Sq, H, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((B, H, Sq), dtype=torch.float32)


def forward_8bit_naive(
    x: Quantized, plan: BlockPlan, scale: float, q_len: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel computes, one list at a time in double precision, with the weights rounded as it rounds them."""
    B, H, _, R, D = x.q.shape
    group = H // x.k.shape[1]
    top = TOP["int8" if x.v.dtype == torch.int8 else "fp8"]
    out = torch.zeros(B, q_len, H, D, dtype=dtype, device=x.q.device)
    lse = torch.full((B, H, q_len), -math.inf, device=x.q.device)
    order = torch.argsort(key_order(R, x.q.device))
    sets = plan.sets_of_heads(H).tolist()
    for b in range(B):
        for h in range(H):
            spread, mean = x.v_facts[b, h // group].double()
            for i in range(x.q.shape[2]):
                at = (b if plan.index.shape[0] > 1 else 0, sets[h], i)
                blocks = plan.index[at][: int(plan.ends[at][2])].long()
                if len(blocks) == 0:
                    continue  # rows without keys keep 0 and −inf
                rows = slice(int(plan.q_start[i]), int(plan.q_start[i] + plan.q_rows[i]))
                c, shift = x.q_facts[b, h, i, :, : plan.q_rows[i]].double()
                queries = x.q[b, h, i, : plan.q_rows[i]].double() * (c * scale)[:, None]
                s, u = x.kv_scales[b, h // group, blocks].double().unbind(-1)
                scores = torch.einsum("rd,nkd,n->rnk", queries, x.k[b, h // group, blocks].double(), s)
                scores = scores.masked_fill(~_seen(plan, at[1], rows, blocks, int(plan.ends[at][1])), -math.inf)
                peak = scores.amax(-1, keepdim=True)
                weights = torch.exp(scores - peak.masked_fill(peak == -math.inf, 0)) * top
                rounded = weights.round() if x.v.dtype == torch.int8 else weights.float().to(x.v.dtype).double()
                total = rounded if x.v.dtype == torch.int8 else weights
                largest = peak.amax(1, keepdim=True)
                share = torch.exp(peak - largest.masked_fill(largest == -math.inf, 0)) / top
                values = x.v[b, h // group, blocks].double()[..., order] * u[:, None, None]
                whole = (total * share).sum((1, 2))
                seen = whole > 0
                sums = torch.einsum("rnk,ndk->rd", rounded * share, values) / whole.clamp(min=1e-300)[:, None]
                out[b, rows, h] = torch.where(seen[:, None], sums * spread + mean, 0.0).to(dtype)
                lse[b, h, rows] = torch.where(seen, largest[:, 0, 0] + whole.log() + shift, -math.inf).float()
    return out, lse


def _seen(plan: BlockPlan, g: int, rows: slice, blocks: torch.Tensor, full: int) -> torch.Tensor:
    """(rows, blocks, R) bool: the keys of listed blocks that rows see; the first ``full`` blocks whole."""
    key = torch.arange(plan.block, device=blocks.device)
    there = key < plan.k_rows[blocks][:, None]
    seen = there.expand(rows.stop - rows.start, -1, -1).clone()
    if full < len(blocks):
        at = (plan.k_start[blocks[full:]][:, None] + key).clamp(max=plan.k_len - 1)
        seen[:, full:] &= plan.visible(g, rows, at.flatten()).view(len(seen), -1, plan.block)
    return seen
