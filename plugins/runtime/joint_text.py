"""Two paths where text and picture share one attention (HunyuanVideo, Flux, …): the text part of the softmax, by the global path.

Such models have no cross-attention that a global path could guide through. But the softmax of a picture's query has two parts,
one over its picture keys and one over its text keys, each with a log-sum-exp. The second part, the *text partial*, stands in
for cross-attention:

    global path f   (t, τ) = attention of f's picture queries over f's text keys
    window path h   (o, λ) = attention of h's picture queries over the picture keys in their window
                    out    = (e^λ o + e^τ t) / (e^λ + e^τ)

Text queries attend to everything, each in its own path. FreeSwim (arXiv 2511.14712) describes models with cross-attention only;
this extends its rule to joint attention. Between two refreshes (t, τ) come from the cache.
"""

from __future__ import annotations

from typing import Protocol

import torch

from tilewise.kernels.attention.dispatch import Choice
from tilewise.kernels.attention.lse_merge import attend_with_lse, merge_attention
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.masks.additive_padding_mask import attend_all
from tilewise.plugins.masks.padding_mask import Group, shares_of
from tilewise.plugins.runtime.sparse_call import QKV, add_means, far_means, run_plan

TextPartial = tuple[torch.Tensor, torch.Tensor]  # (B, V, H, D) and (B, H, V) float32: t and τ of V picture queries


class TextGuide(Protocol):
    """What ``AttentionCalls`` asks, at attention calls over picture and text."""

    @property
    def keeps(self) -> bool:
        """Whether the text partial is needed at a later step too."""

    def keep(self, partial: TextPartial) -> None:
        """Take the text partial of a call of the global path."""

    def given(self, device: torch.device) -> TextPartial | None:
        """The text partial for a call of the window path; None: this forward is not guided."""


def text_partial(layout: Layout, groups: list[Group] | str, whole: QKV, scale: float | None) -> TextPartial:
    """(t, τ) of a call of the global path; a mask may hide text from some samples.

    Raises:
        TilewiseError: for a mask that does more than hiding text.
    """
    if isinstance(groups, str) or any(group.weighed is not None for group in groups):
        why = groups if isinstance(groups, str) else "the call has an attention mask that weighs text"
        raise TilewiseError(f"two paths: the global path cannot separate its text keys: {why}. Use global_path='none'")
    found = []
    for group in groups:
        part = group.take(*whole)
        picture, text = slices(layout, group)
        qkv = part[0][:, picture], part[1][:, text], part[2][:, text]
        found.append((group, attend_with_lse(*qkv, scale, keep_with=layout)))
    if len(found) == 1 and found[0][0].samples is None:
        return found[0][1]
    query = whole[0]
    batch, _, heads, width = query.shape
    out = query.new_empty((batch, layout.grid.video, heads, width))
    lse = query.new_empty((batch, heads, layout.grid.video), dtype=torch.float32)
    for group, (t, tau) in found:
        assert group.samples is not None
        out[group.samples], lse[group.samples] = t, tau
    return out, lse


def slices(layout: Layout, group: Group) -> tuple[slice, slice]:
    """Where a group's tokens are picture, and where text."""
    if layout.grid.text_first:
        return slice(group.text, None), slice(0, group.text)
    return slice(0, layout.grid.video), slice(layout.grid.video, None)


def attend_with_text_partial(
    layout: Layout, groups: list[Group], parts: list[QKV], pictures: list[QKV], whole: QKV, plan: BlockPlan, choice: Choice,
    partial: TextPartial, scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """A window path's call: ``pictures`` (see ``pictures_of``) by ``plan``, over picture tokens alone, and the text partial of
    the global path; hidden tokens get 0."""
    alone = len(groups) == 1 and groups[0].tokens is None
    out = (torch.empty_like if alone else torch.zeros_like)(whole[0], memory_format=torch.contiguous_format)
    for group, part, seen in zip(groups, parts, pictures, strict=True):
        picture, text = slices(layout, group)
        inside, lse = run_plan(seen, plan, choice, scale, return_lse=True)
        t, tau = partial if group.samples is None else (partial[0][group.samples], partial[1][group.samples])
        piece = out if alone else torch.empty_like(part[0], memory_format=torch.contiguous_format)
        merge_attention(inside, lse, t, tau, into=piece[:, picture])
        if (far := far_means(seen, plan)) is not None:
            lse = torch.logaddexp(lse, tau)
            piece[:, picture] = add_means(seen[0], piece[:, picture], lse, far, layout.with_text(0), scale)
        piece[:, text] = attend_all(part[0][:, text], part[1], part[2], scale)
        if not alone:
            group.put(out, piece)
    return out


def density_with_text_partial(layout: Layout, groups: list[Group], density: float, query: torch.Tensor) -> float:
    """Kept ÷ all token pairs: the window's, whose ``density`` (or cost) is given, and all with text, whichever path's it is."""
    video = layout.grid.video
    shares = shares_of(groups, query.shape[0])
    whole = sum(share * (video + group.text) ** 2 for share, group in zip(shares, groups, strict=True))
    return 1 - (1 - density) * video**2 / whole


def pictures_of(layout: Layout, groups: list[Group], parts: list[QKV]) -> list[QKV]:
    """The picture tokens of each group's part."""
    found = []
    for group, (query, key, value) in zip(groups, parts, strict=True):
        picture, _ = slices(layout, group)
        found.append((query[:, picture], key[:, picture], value[:, picture]))
    return found
