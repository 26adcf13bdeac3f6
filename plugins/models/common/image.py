"""What image denoisers share: names for forward arguments, valid image sizes, and the order of a stream beside text.

Tokens of one attention call stand as [text | others | image] or [image | others | text]. "Others" are tokens that belong to the
image stream of the model but not to the grid: reference images of an edit, padding. They count as text: every token sees
them, they see every token, and they are not reordered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tilewise.plugins.models.common.family import Reorder, Size
from tilewise.plugins.models.common.sizes import Rule, refuse, wrong_sizes


def by_name(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward call by name; ``names``: its parameters, in order, as far as callers pass them by position."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def image_tokens(denoiser: nn.Module, size: Size, pixels: int) -> tuple[int, int]:
    """(h, w) in tokens of an image whose tokens are ``pixels`` wide and high.

    Raises:
        ConfigError: for more than one frame, or a height or width that is not a multiple of ``pixels``, with the nearest.
    """
    wrong = wrong_sizes(Rule("height", size.height, pixels), Rule("width", size.width, pixels))
    if size.num_frames != 1:
        wrong.append(f"num_frames={size.num_frames} must be 1: it makes images")
    refuse(denoiser, wrong)
    return size.height // pixels, size.width // pixels


class StreamOrder:
    """The order in force of an image stream of n tokens, the last ``others`` of which are not of the grid, beside one of text.

    In the model, the others follow the image. With text last, they stay there; with text first, they move before the image. So
    the image's tokens are always at one end of the sequence.

    Args:
        reorder: the patch's, which knows the order of the whole sequence.
        tokens: n. text: number of text tokens. others: how many of the n, at the end of the stream; used only with text_first.
        text_first: whether the sequence is [text | stream] or [stream | text].
    """

    def __init__(
        self,
        reorder: Reorder,
        tokens: int,
        text: int,
        device: torch.device,
        *,
        text_first: bool,
        others: int = 0,
    ) -> None:
        self.tokens, self.text, self.others, self.text_first = tokens, text, others, text_first
        self.into: torch.Tensor | None = None
        self.back: torch.Tensor | None = None
        sequence = torch.arange(tokens + text, device=device)
        into = reorder.into(sequence, 0)
        if into is sequence:  # no order in force: the stream stays as it is
            return
        back = reorder.back(sequence, 0)
        first, last = (text, text + tokens) if text_first else (0, tokens)
        into, back = into[first:last] - first, back[first:last] - first
        if text_first:
            stream = torch.arange(tokens, device=device)
            # Position i of [others | image] is i + image, modulo n, of [image | others].
            into = ((stream + (tokens - others)) % tokens).index_select(0, into)
            back = back.index_select(0, (stream + others) % tokens)
        self.into, self.back = into, back

    def enter(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """``x`` with its token axis ``dim``, n long, brought from the model's own order into the one in force."""
        return x if self.into is None else x.index_select(dim, self.into)

    def others_first(self, mask: torch.Tensor) -> torch.Tensor:
        """An attention mask over [text | image | others] as one over [text | others | image], wherever an axis is that long.

        Attention calls reorder their masks from that order.
        """
        if self.into is None or not self.text_first:
            return mask
        whole = torch.arange(self.text + self.tokens, device=mask.device)
        stream = (whole - self.text + (self.tokens - self.others)) % self.tokens + self.text
        whole = torch.where(whole < self.text, whole, stream)
        for dim in range(mask.ndim):
            if mask.shape[dim] == len(whole) and (dim > 0 or mask.ndim == 1):  # the first of several is the batch
                mask = mask.index_select(dim, whole)
        return mask

    def leave(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """``x`` brought back."""
        return x if self.back is None else x.index_select(dim, self.back)
