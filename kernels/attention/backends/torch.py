"""CPU path: executes any BlockPlan with PyTorch alone.

Query blocks that list the same key blocks are gathered into one group, and groups of equal size into one batched call of
PyTorch's CPU flash attention. Windows shift inward at borders and tiles share windows, so groups are few and large: the
gather is small beside the attention it saves.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from tilewise.kernels.plans.block_plan import BlockPlan

GATHER_BYTES = 1 << 28  # groups are batched up to this much gathered K and V


@dataclass(frozen=True)
class Group:
    """n sets of query rows that see equally many keys, none of them partial, or one set with partial keys.

    rows: (n, R) query rows. keys: (n, K) key rows, full ones first. full: how many keys every row sees.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    full: int


def groups_of(plan: BlockPlan, p: int, g: int) -> list[Group]:
    """Groups of one list set, kept with the plan."""
    cached = plan._cache.get(("groups", p, g))
    if cached is None:
        cached = plan._cache[("groups", p, g)] = _make_groups(plan, p, g)
    return cached


def _make_groups(plan: BlockPlan, p: int, g: int) -> list[Group]:
    q_start, q_rows = plan.q_start.tolist(), plan.q_rows.tolist()
    k_start, k_rows = plan.k_start.tolist(), plan.k_rows.tolist()
    lists, ends = plan.index[p, g].tolist(), plan.ends[p, g].tolist()
    same_keys: dict[tuple, list[int]] = defaultdict(list)
    for i, (blocks, (_, full, total)) in enumerate(zip(lists, ends, strict=True)):
        same_keys[(tuple(sorted(blocks[:full])), tuple(sorted(blocks[full:total])))].append(i)

    def rows_of(blocks: list[int] | tuple[int, ...], start: list[int], rows: list[int]) -> torch.Tensor:
        if not blocks:
            return torch.zeros(0, dtype=torch.long)
        return torch.cat([torch.arange(start[b], start[b] + rows[b]) for b in blocks])

    same_size: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    groups = []
    for (full, partial), queries in same_keys.items():
        rows = rows_of(queries, q_start, q_rows)
        full_keys = rows_of(full, k_start, k_rows)
        if partial:
            keys = torch.cat([full_keys, rows_of(partial, k_start, k_rows)])
            groups.append(Group(rows[None], keys[None], len(full_keys)))
        else:
            same_size[len(rows), len(full_keys)].append((rows, full_keys))
    for (_, keys_each), members in same_size.items():
        rows, keys = (torch.stack(column) for column in zip(*members, strict=True))
        groups.append(Group(rows, keys, keys_each))
    return groups


def torch_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes as in ``block_sparse_attention``, which validates them. CPU tensors."""
    B, Sq, H, _ = q.shape
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((B, H, Sq), -torch.inf, dtype=torch.float32)
    if k.shape[2] != H:
        k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    sets = plan.sets_of_heads(H)
    shared_batch = plan.index.shape[0] == 1
    for p in range(1 if shared_batch else B):
        samples = slice(None) if shared_batch else slice(p, p + 1)
        for g in range(plan.sets):
            heads = torch.nonzero(sets == g).flatten()
            if len(heads) == 0:
                continue
            every_head = len(heads) == H
            qs, ks, vs = (x[samples] if every_head else x[samples][:, :, heads] for x in (q, k, v))
            for group in groups_of(plan, p, g):
                for part in _parts(group, ks):
                    if part.keys.shape[1] == 0:
                        continue  # rows without keys keep 0 and −inf
                    _attend_group(qs, ks, vs, part, plan, g, scale, out[samples], lse[samples], heads)
    return out, lse


def _parts(group: Group, k: torch.Tensor) -> list[Group]:
    """Cut a group's batch so that one gather of K and V stays under GATHER_BYTES."""
    per_set = 2 * k.shape[0] * k.shape[2] * k.shape[3] * k.element_size() * max(1, group.keys.shape[1])
    n = max(1, GATHER_BYTES // per_set)
    return [Group(rows, keys, group.full) for rows, keys in zip(group.rows.split(n), group.keys.split(n), strict=True)]


def _attend_group(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: Group,
    plan: BlockPlan,
    g: int,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    heads: torch.Tensor,
) -> None:
    """Attention of one group, written to its rows of ``out`` (B, S, H, D) and ``lse`` (B, H, S)."""
    n, R = group.rows.shape
    B, H = q.shape[0], q.shape[2]
    rows, keys = group.rows.flatten(), group.keys.flatten()

    def gather(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """(B·n, H, len, D) view of the gathered rows; no copy where a single group holds every row in order."""
        if n == 1 and len(at) == x.shape[1] and bool((at == torch.arange(len(at))).all()):
            return x.transpose(1, 2)
        return x.index_select(1, at).unflatten(1, (n, -1)).flatten(0, 1).transpose(1, 2)

    bias = None
    unseen = None
    if plan.row_encoding is not None and group.full < group.keys.shape[1]:
        seen = torch.ones(R, len(keys), dtype=torch.bool)
        seen[:, group.full :] = plan.visible(g, rows, keys[group.full :])
        unseen = ~seen.any(1)
        seen[unseen] = True  # a row of only −inf would be NaN; it is set to "no keys" below
        bias = torch.zeros(1, 1, R, len(keys), dtype=q.dtype).masked_fill(~seen, -torch.inf)
    o, s = _flash_cpu(gather(q, rows), gather(k, keys), gather(v, keys), bias, scale)
    if unseen is not None:
        o = o.masked_fill(unseen[:, None], 0)
        s = s.masked_fill(unseen, -torch.inf)
    o = o.transpose(1, 2).reshape(B, n * R, H, -1)
    s = s.reshape(B, n, H, R).transpose(1, 2).reshape(B, H, n * R)
    if out.shape[2] == H:
        out.index_copy_(1, rows, o)
        lse.index_copy_(2, rows, s)
    else:
        out[:, rows[:, None], heads[None, :]] = o
        lse[:, heads[:, None], rows[None, :]] = s


def _flash_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, S, D) attention and its float32 log-sum-exp, with the operator that SDPA itself uses on a CPU."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    return out, lse.float()
