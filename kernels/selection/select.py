"""Which key blocks does each query block keep? The smallest set that is enough, row by row.

For query block i let  p[j] = softmax over j of logits[i, j]  be the attention mass that the draft expects in key block j, and
w[j] what counts towards the target:

    recall r:    w[j] = p[j],            target r           mass kept
    density d:   w[j] = rows[j] / S,     target d           tokens kept

Blocks that ``always`` names are kept first. The others are taken by falling logit (equal ones in their order) until

    (Σ w ≥ target  and  count ≥ floor)  or  count ≥ cap

Taking whole blocks overshoots a density by half a block on average. So row i aims at  d − u[i]·(mean of w)  with u[i] evenly
spread over [0, 1), and the rows together come out at d. Each head may have a density of its own; one of 1 keeps everything.

No row is ever empty: a row of which nothing can be seen, or with a logit that is nan or +inf, keeps every block.
"""

from __future__ import annotations

import torch

from tilewise.kernels.device import runs_triton

GOLDEN = 0.6180339887498949  # u[i] = frac(i · GOLDEN): evenly spread, in any run of rows


def select_rows(
    logits: torch.Tensor,
    always: torch.Tensor,
    rows: torch.Tensor,
    *,
    recall: float | None = None,
    density: float | torch.Tensor | None = None,
    floor: int = 1,
    cap: int | None = None,
) -> torch.Tensor:
    """The key blocks that each query block keeps; see the module's docstring.

    Args:
        logits: (B, H, Nq, Nk) float32: log of the attention mass that query block i gives to key block j, up to a constant of
            the row. −inf: never kept, unless ``always``.
        always: (Nq, Nk) bool, on logits' device.
        rows: (Nk,) int32 tokens of each key block, on logits' device.
        recall, density: exactly one, in (0, 1]. density may be (H,) or (B, H) float32 on logits' device, one for each head, or
            for each head of each sample; its values are not checked, as that would wait for the device.
        floor, cap: fewest and most blocks of a row, ``always`` included; cap None: no limit.

    Returns:
        (B, H, Nq, Nk) bool.

    Raises:
        ValueError: shapes or numbers that do not fit.
    """
    N = logits.shape[-1]
    if logits.ndim != 4 or always.shape != logits.shape[2:] or rows.shape != (N,):
        raise ValueError(
            f"select_rows: needs logits (B, H, Nq, Nk), always (Nq, Nk) and rows (Nk,), got {tuple(logits.shape)}, "
            f"{tuple(always.shape)} and {tuple(rows.shape)}"
        )
    if logits.dtype != torch.float32:
        raise ValueError(f"select_rows: logits must be float32, got {logits.dtype}")
    if (recall is None) == (density is None):
        raise ValueError(f"select_rows: give recall or density, and not both; got {recall} and {density}")
    target = recall if density is None else density
    assert target is not None
    if isinstance(target, torch.Tensor):
        shapes = (logits.shape[1:2], logits.shape[:2])
        if target.shape not in shapes or target.dtype != torch.float32 or target.device != logits.device:
            raise ValueError(
                f"select_rows: a density for each of {logits.shape[1]} heads must be ({logits.shape[1]},) or "
                f"{tuple(shapes[1])} float32 on {logits.device}, got {tuple(target.shape)} {target.dtype} on {target.device}"
            )
    elif not 0 < target <= 1:
        raise ValueError(f"select_rows: recall or density must be in (0, 1], got {target}")
    cap = N if cap is None else cap
    if not 0 <= floor <= cap or cap < 1:
        raise ValueError(f"select_rows: needs 0 ≤ floor ≤ cap and a cap of at least 1, got {floor} and {cap}")
    by_mass = density is None
    if runs_triton(logits.device):
        from tilewise.kernels.selection.triton_select import triton_select_rows

        return triton_select_rows(logits.contiguous(), always, rows, target, by_mass, floor, cap)
    return select_rows_reference(logits, always, rows, target, by_mass, floor, cap)


def select_rows_reference(
    logits: torch.Tensor,
    always: torch.Tensor,
    rows: torch.Tensor,
    target: float | torch.Tensor,
    by_mass: bool,
    floor: int,
    cap: int,
) -> torch.Tensor:
    """The naive way: sort each row and add up. by_mass: the target is a recall, and not a density. target: also (H,), (B, H)."""
    M, N = logits.shape[-2:]
    if isinstance(target, torch.Tensor):
        target = torch.where(target < 1, target, 2.0)[..., None, None]  # never enough: everything is kept
    broken = (logits.isnan() | (logits == torch.inf)).any(-1, keepdim=True)
    candidate = logits > -torch.inf
    if by_mass:
        weight = logits.softmax(-1)
        aim = torch.as_tensor(target, dtype=logits.dtype, device=logits.device).expand(M, 1)
    else:
        weight = (rows / rows.sum()).expand_as(logits)
        spread = torch.arange(M, device=logits.device) * GOLDEN % 1
        aim = target - spread[:, None] / N
    order = torch.where(candidate & ~always, logits, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    free = (candidate & ~always).gather(-1, order)
    w = torch.where(free, weight.gather(-1, order), 0)
    given, given_count = (weight * always).sum(-1, keepdim=True), always.sum(-1, keepdim=True)
    before = given + w.cumsum(-1) - w
    count = given_count + free.cumsum(-1) - free.long()
    enough = ((before >= aim) & (count >= floor)) | (count >= cap)
    kept = torch.zeros_like(candidate).scatter_(-1, order, free & ~enough) | always
    return kept | broken | ~kept.any(-1, keepdim=True)
