"""Query-key RMSNorm and rotary embedding in one pass over what the projections return.

For each token, with x its H·D channels (``across_heads``: one mean over all of them) or the D of one head:

    n = x / √(mean(x²) + eps) · weight                                  RMSNorm (arXiv 1910.07467)
    (a, b) → (a·cos θ − b·sin θ,  a·sin θ + b·cos θ)                    RoPE (arXiv 2104.09864)

for each pair (a, b) of a head's channels: (2i, 2i + 1), or (i, i + D/2) with ``interleaved=False``. All of it in float32, rounded
once at the end; the separate operators round after the norm too. One launch serves q and k. With ``order``, row i of the results
comes from row order[i] of all that has a token axis, so that queries and keys are in tile order at no extra memory traffic.
"""

from __future__ import annotations

import torch

from tilewise.kernels.device import FLOATS, runs_triton


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    heads: int,
    eps: float,
    across_heads: bool = True,
    interleaved: bool = True,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of q and k, then rotary embedding, split into heads.

    Args:
        q: (B, S, H·D) float16, bfloat16 or float32 with contiguous channels; any other strides, so a chunk of a fused
            projection comes as it is.
        k: (B, S, Hk·D), likewise; Hk may be smaller (grouped-query attention).
        q_weight, k_weight: (H·D,) and (Hk·D,) with ``across_heads``, else (D,); any of the three dtypes; None: 1.
        cos, sin: rotary tables, (S, N), (1 or B, S, N) or (1 or B, S, 1, N): N = D/2, one entry a pair, or N = D, where
            both channels of a pair hold the same entry. None, both of them: no rotation.
        heads: H.
        eps: added to the mean square.
        across_heads: one mean over all channels of a token (Wan, LTX), or one a head (most other families).
        interleaved: pairs of neighbours, or of the first and second half of a head.
        order: (S,) int64, entries in [0, S) (a GPU does not check them): row i of the results is row ``order[i]`` of q and k,
            turned by row ``order[i]`` of the tables. None: the order of q and k.

    Returns:
        (B, S, H, D) and (B, S, Hk, D), contiguous, in the dtypes of q and k.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: another dtype.
        IndexError or RuntimeError: on a CPU, an entry of ``order`` outside [0, S).
    """
    where = f"qk_norm_rope(q {tuple(q.shape)}, k {tuple(k.shape)}, heads={heads})"
    if q.ndim != 3 or k.ndim != 3 or q.shape[:2] != k.shape[:2]:
        raise ValueError(f"{where}: q and k must be (B, S, H·D) and (B, S, Hk·D), with the same B and S")
    if heads < 1 or q.shape[2] % heads or (q.shape[2] // heads) % 2:
        raise ValueError(f"{where}: q's {q.shape[2]} channels must be {heads} heads of an even number of channels")
    depth = q.shape[2] // heads
    if k.shape[2] == 0 or k.shape[2] % depth:
        raise ValueError(f"{where}: k's {k.shape[2]} channels must be heads of {depth} channels, as q's are")
    if q.stride(2) != 1 or k.stride(2) != 1:
        raise ValueError(f"{where}: channels must be contiguous; call .contiguous() on the tensor that is not")
    for name, weight, width in (("q_weight", q_weight, q.shape[2]), ("k_weight", k_weight, k.shape[2])):
        expected = width if across_heads else depth
        if weight is not None and (weight.shape != (expected,) or weight.stride(0) != 1):
            raise ValueError(
                f"{where}: {name} must be contiguous and have shape ({expected},) for across_heads={across_heads}, "
                f"got {tuple(weight.shape)}"
            )
    if (cos is None) != (sin is None):
        raise ValueError(f"{where}: give both rotary tables, cos and sin, or neither")
    if cos is not None and sin is not None:
        if cos.shape != sin.shape:
            raise ValueError(f"{where}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must have one shape")
        cos, sin = (_table(x, q, depth, where) for x in (cos, sin))
    for x in (q, k, q_weight, k_weight, cos, sin):
        if x is not None and x.dtype not in FLOATS:
            raise TypeError(f"{where}: takes float16, bfloat16 and float32, got {x.dtype}")
        if x is not None and x.device != q.device:
            raise ValueError(f"{where}: all tensors must be on one device, got {q.device} and {x.device}")
    if order is not None:
        if order.shape != q.shape[1:2]:
            raise ValueError(f"{where}: order must have shape ({q.shape[1]},), got {tuple(order.shape)}")
        if order.dtype != torch.int64:
            raise TypeError(f"{where}: order must be int64, got {order.dtype}; convert it once, where it is made")
        if order.device != q.device:
            raise ValueError(f"{where}: all tensors must be on one device, got {q.device} and {order.device}")
    return qk_norm_rope_op(q, k, q_weight, k_weight, cos, sin, heads, eps, across_heads, interleaved, order)


def _table(x: torch.Tensor, q: torch.Tensor, depth: int, where: str) -> torch.Tensor:
    """A rotary table as (1 or B, S, N), a view."""
    given = tuple(x.shape)
    if x.ndim == 4 and x.shape[2] == 1:
        x = x.squeeze(2)
    elif x.ndim == 2:
        x = x.unsqueeze(0)
    fits = x.ndim == 3 and x.shape[0] in (1, q.shape[0]) and x.shape[1] == q.shape[1]
    if not fits or x.shape[2] not in (depth, depth // 2) or x.stride(2) != 1:
        raise ValueError(
            f"{where}: rotary tables must be (S, N), (B, S, N) or (B, S, 1, N) with S = {q.shape[1]}, N = {depth} or "
            f"{depth // 2} and a contiguous last axis, got {given}"
        )
    return x


def qk_norm_rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    heads: int,
    eps: float,
    across_heads: bool = True,
    interleaved: bool = True,
    order: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, computed in ``dtype``, which is also what it returns; tables as (1 or B, S, N)."""
    depth = q.shape[2] // heads
    if order is not None:
        q, k = q.index_select(1, order), k.index_select(1, order)
        cos, sin = (None if table is None else table.index_select(1, order) for table in (cos, sin))

    def one(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x.to(dtype)
        if not across_heads:
            x = x.unflatten(2, (-1, depth))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        if weight is not None:
            x = x * weight.to(dtype)
        if across_heads:
            x = x.unflatten(2, (-1, depth))
        if cos is None or sin is None:
            return x
        c, s = (t.to(dtype).unsqueeze(2) for t in (cos, sin))
        if cos.shape[-1] == depth:
            c, s = (c[..., 0::2], s[..., 1::2]) if interleaved else (c[..., : depth // 2], s[..., depth // 2 :])
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.unflatten(-1, (2, -1)).unbind(-2)
        turned = torch.stack((a * c - b * s, a * s + b * c), dim=-1 if interleaved else -2)
        return turned.flatten(-2)

    return one(q, q_weight), one(k, k_weight)


@torch.library.custom_op("tilewise::qk_norm_rope", mutates_args=())
def qk_norm_rope_op(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    heads: int,
    eps: float,
    across_heads: bool,
    interleaved: bool,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel as a PyTorch operator, so that torch.compile keeps it whole. Validated by ``qk_norm_rope``."""
    if runs_triton(q.device):
        from tilewise.kernels.fused.triton_qk_norm_rope import triton_qk_norm_rope

        return triton_qk_norm_rope(q, k, q_weight, k_weight, cos, sin, heads, eps, across_heads, interleaved, order)
    out = qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, heads, eps, across_heads, interleaved, order)
    return out[0].to(q.dtype, copy=True).contiguous(), out[1].to(k.dtype, copy=True).contiguous()


@qk_norm_rope_op.register_fake
def _(q, k, q_weight, k_weight, cos, sin, heads, eps, across_heads, interleaved, order=None):
    depth = q.shape[2] // heads
    q_out = q.new_empty((q.shape[0], q.shape[1], heads, depth))
    return q_out, k.new_empty((k.shape[0], k.shape[1], k.shape[2] // depth, depth))
