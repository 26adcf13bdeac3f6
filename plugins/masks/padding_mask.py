"""Attention masks that hide whole keys: the padding of a prompt that is shorter than its neighbours or than the maximum.

Such a mask needs no mask in a kernel. The hidden text tokens are left out, and each group of samples that keeps the same ones
runs the method's plan for a grid with that many text tokens. It is exact: a hidden key has weight 0, and what a hidden token
itself would get is never seen by one that is not hidden; here it gets 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tilewise.kernels.device import capturing
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.masks.additive_padding_mask import visible_of

HIDDEN = -1e4  # what adds this much or less to a score hides it: e⁻¹⁰⁰⁰⁰ is 0 in every floating-point type


@dataclass(frozen=True)
class Group:
    """Samples that keep the same tokens.

    samples: their numbers; None: all of the batch. tokens: positions that they keep, as a slice where these follow each
    other; None: all. text: how many of the kept tokens are text. weighed: positions of the others, where they are not hidden
    but weighed down (see ``weighed_text``), and by how much; None: hidden.
    """

    samples: torch.Tensor | None
    tokens: slice | torch.Tensor | None
    text: int
    weighed: tuple[torch.Tensor, float] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole call: every sample, with every token."""
        return self.samples is None and self.tokens is None

    def take(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What of each (B, S, H, D) tensor belongs to the group: views where that is possible."""

        def part(x: torch.Tensor) -> torch.Tensor:
            if self.samples is not None:
                x = x.index_select(0, self.samples)
            if isinstance(self.tokens, slice):
                return x[:, self.tokens]
            return x if self.tokens is None else x.index_select(1, self.tokens)

        return part(query), part(key), part(value)

    def put(self, out: torch.Tensor, part: torch.Tensor) -> None:
        """Write the group's outputs where ``take`` took its tokens from."""
        if self.samples is not None and isinstance(self.tokens, torch.Tensor):
            out[self.samples[:, None], self.tokens[None]] = part
        elif self.samples is not None:
            out[self.samples, slice(None) if self.tokens is None else self.tokens] = part
        else:
            out[:, slice(None) if self.tokens is None else self.tokens] = part


def shares_of(groups: list[Group], batch: int) -> list[float]:
    """What part of a batch each group is."""
    samples = [batch if group.samples is None else len(group.samples) for group in groups]
    return [n / sum(samples) for n in samples]


def visible_keys(mask: torch.Tensor, batch: int, tokens: int) -> torch.Tensor | str:
    """(batch, tokens) bool on the CPU, True where a key may be seen, or why the mask is not one of keys alone.

    Args:
        mask: bool (True = visible) or additive floating point; (S,), (B, S), (B, 1, S) or (B, 1, 1, S), B may be 1; also
            (B, H, 1, S), the same for all heads. Reading it waits for the GPU.
    """
    if mask.ndim == 4 and mask.shape[1] > 1 and mask.shape[2] == 1 and bool((mask == mask[:, :1]).all()):
        mask = mask[:, :1]
    shape = tuple(mask.shape)
    if mask.ndim > 4 or mask.ndim == 0 or shape[-1] != tokens or any(n != 1 for n in shape[1:-1]):
        return f"the call has an attention mask of shape {shape}, which is not one of keys alone"
    if mask.ndim > 1 and shape[0] not in (1, batch):
        return f"the call has an attention mask for {shape[0]} samples, the batch is {batch}"
    values = mask.detach().reshape(-1, tokens).cpu()
    if values.dtype != torch.bool:
        hidden = values <= HIDDEN
        if not bool((hidden | (values == 0)).all()):
            return "the call has an attention mask that weighs keys, not only hides them"
        values = ~hidden
    return values.expand(batch, tokens)


def read_groups(mask: torch.Tensor, batch: int, grid: Grid, device: torch.device) -> list[Group] | str:
    """Samples by what a mask leaves them, hidden or weighed, or why the method cannot run with it. Waits for the GPU."""
    weighed = visible_of(mask, batch, grid)
    if weighed is None:
        visible = visible_keys(mask, batch, grid.tokens)
        return visible if isinstance(visible, str) else groups_of(visible, grid, device)
    shown, weight = weighed
    found = groups_of(shown, grid, device)
    if isinstance(found, str):
        return found
    groups = []
    for group in found:
        sample = 0 if group.samples is None else int(group.samples[0])
        others = (~shown[sample]).nonzero()[:, 0].to(device)
        groups.append(group if group.tokens is None else dataclasses.replace(group, weighed=(others, weight)))
    return groups


def groups_of(visible: torch.Tensor, grid: Grid, device: torch.device) -> list[Group] | str:
    """Samples by what they keep, or why the method cannot run with this mask.

    Args:
        visible: (B, S) bool, on the CPU. Text tokens stand where the grid has them; the order of the video tokens is free, as
            all of them must be visible.
    """
    if not bool(visible[:, grid.video_start : grid.video_start + grid.video].all()):
        return "the call's attention mask hides video tokens"
    kept, which = torch.unique(visible, dim=0, return_inverse=True)
    groups = []
    for number, row in enumerate(kept):
        at = row.nonzero()[:, 0]
        start, count = int(at[0]), len(at)
        follow = start + count - 1 == int(at[-1])
        tokens: slice | torch.Tensor | None = slice(start, start + count) if follow else at.to(device)
        samples = (which == number).nonzero()[:, 0].to(device) if len(kept) > 1 else None
        groups.append(Group(samples, None if count == grid.tokens else tokens, count - grid.video))
    return groups


def reorder_mask(mask: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A mask with each token axis, one of the last two that is as long as ``order``, in that order."""
    for dim in range(-min(mask.ndim, 2), 0):
        if mask.shape[dim] == len(order) and (mask.ndim > 2 or dim == -1):  # of (B, S), the first is the batch
            mask = mask.index_select(dim, order)
    return mask


class Masks:
    """The masks of one forward: models hand one to all layers, and each is read once.

    made_per_layer: each layer makes its own mask from what the forward was given, so that all masks of a shape are equal.
    """

    def __init__(self, made_per_layer: bool = False) -> None:
        self.made_per_layer = made_per_layer
        self._read: dict[tuple, tuple[torch.Tensor, list[Group] | str]] = {}
        self._gathered: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def clear(self) -> None:
        self._read.clear()
        self._gathered.clear()

    def gathered(self, mask: torch.Tensor, gather: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The whole of a mask of which each rank has a part: asked for once, where layers share it."""
        where = (0 if self.made_per_layer else mask.data_ptr(), mask.dtype, tuple(mask.shape), mask.stride())
        if where not in self._gathered:
            self._gathered[where] = mask, gather()  # the part is kept too, so that nothing else comes to lie there
        return self._gathered[where][1]

    def groups(
        self, mask: torch.Tensor | None, grid: Grid, query: torch.Tensor, order: torch.Tensor | None = None
    ) -> list[Group] | str:
        """The samples of a call over ``grid`` by the tokens that its mask leaves them, or why it cannot run sparse.

        order: (S,) the token order in which the groups take their tokens; None: the model's. It matters only where it brings text
        tokens from one side of the video to the other.
        """
        if mask is None:
            return [Group(None, None, grid.text)]
        # By where it lies, not by its identity: a compiled model's operators get a new object at each call. The mask is kept with
        # its entry, so that the allocator puts nothing else there before the forward ends.
        ordered = order is not None and bool(grid.opposite)
        where = (0 if self.made_per_layer else mask.data_ptr(), mask.dtype, tuple(mask.shape), mask.stride(), ordered)
        if where not in self._read:
            if capturing(mask.device):
                return "the call has an attention mask, which cannot be read while a CUDA graph is being captured"
            seen = mask
            if order is not None and ordered:
                seen, grid = reorder_mask(mask, order), dataclasses.replace(grid, opposite=0)
            self._read[where] = mask, read_groups(seen, query.shape[0], grid, query.device)
        return self._read[where][1]

    def shown(self, mask: torch.Tensor | None, grid: Grid | None, query: torch.Tensor) -> list[Group]:
        """What a dense call's mask leaves each sample; empty where it does more than hide text. grid: the forward's, of whose
        text a call may have a part."""
        if mask is None:
            return [Group(None, None, 0)]
        tokens = query.shape[1]
        if grid is None or not grid.video <= tokens <= grid.tokens:
            return []
        groups = self.groups(mask, grid.with_text(tokens - grid.video), query)
        return [] if isinstance(groups, str) or any(group.weighed is not None for group in groups) else groups
