"""Attention calls of a denoiser whose tokens are split over processes: to all tokens of some heads, and back.

    call of a rank's tokens → exchange → the call that one process would make, of this rank's heads → exchange

Between the two exchanges nothing is different from a denoiser in one process but the number of heads: any method, any backend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from tilewise.plugins.context_parallel.head_dealing import deal
from tilewise.plugins.context_parallel.head_exchange import gather, gather_size, in_order, to_heads, to_tokens
from tilewise.plugins.context_parallel.token_shares import TokenShares, segments_of, shares_of
from tilewise.plugins.diffusers_compat import ContextParallel
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.methods.base import DynamicMethod
from tilewise.plugins.methods.head_part import HeadPart, Heads
from tilewise.plugins.runtime.attention_request import AttentionRequest
from tilewise.plugins.runtime.call_stats import FALLBACK, CallKind
from tilewise.plugins.runtime.dense_call import Stock, attend_dense, forbid
from tilewise.plugins.runtime.forward_state import ForwardState


@dataclass(frozen=True)
class Sharding:
    """How one call is split: the tokens of each rank, the heads of each rank, and who this process is."""

    tokens: TokenShares
    heads: tuple[Heads, ...]
    at: ContextParallel

    @property
    def own(self) -> Heads:
        """The heads that this rank computes."""
        return self.heads[self.at.rank]


def sharding_of(state: ForwardState, number: int, request: AttentionRequest, at: ContextParallel) -> Sharding | str:
    """How a call of layer ``number`` is split; or why it cannot be told, and diffusers has to answer it.

    Ranks ask each other for their number of tokens, once for each layer of a grid; at each call where masks decide it.

    Raises:
        TilewiseError: there are more ranks than heads, or they have other methods, libraries or GPUs, which is asked once.
    """
    query, key, whole = request.query, request.key, state.forward.whole
    if whole is None:
        return state.forward.refused or "the grid of this forward is not known"
    ranks, heads = at.ulysses, query.shape[2]
    if heads < ranks:
        raise TilewiseError(
            f"{state.name}.{state.layers[number].name}: {heads} heads cannot be split over {ranks} ranks. Use at most {heads}"
        )
    state.plans.rank_sizes.lookup(("alike", ranks), lambda: _check_alike(state, query, at))
    # Every rank comes here with the same grid, layer and count, whatever its own number of tokens: none asks alone.
    count = state.forward.asked[number] = state.forward.asked.get(number, 0) + 1

    def ask() -> tuple[int, ...]:
        both = [gather_size(x.shape[1], query.device, ranks, at.group) for x in (query, key)]
        return both[0] if both[0] == both[1] else ()

    sizes = ask() if state.text_per_sample else state.plans.rank_sizes.lookup((whole, number, count, ranks), ask)
    if not sizes:
        return "queries and keys are split in different ways"
    shares = shares_of(segments_of(whole, state.one_tensor), whole, sizes)
    return shares if isinstance(shares, str) else Sharding(shares, _dealt_for(state, number, request, at), at)


def _check_alike(state: ForwardState, query: torch.Tensor, at: ContextParallel) -> bool:
    """Raises TilewiseError, on all ranks, where they differ in what makes a call: two methods would mix without a word."""
    facts = {
        "method": state.config.to_dict(),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "GPU": torch.cuda.get_device_name(query.device) if query.is_cuda else query.device.type,
    }
    differ = []
    for name, fact in facts.items():
        digest = hashlib.sha256(json.dumps(fact, sort_keys=True, default=str).encode()).digest()
        if len(set(gather_size(int.from_bytes(digest[:7]), query.device, at.ulysses, at.group))) > 1:
            differ.append(f"{name} {fact}")
    if differ:
        raise TilewiseError(
            f"{state.name}: the ranks differ; rank {at.rank} of {at.ulysses} has {'; '.join(differ)}. Patch the denoiser alike "
            "in all processes, with the same libraries and kind of GPU"
        )
    return True


def attend_by_diffusers(
    state: ForwardState, number: int, request: AttentionRequest, stock: Stock, why: str
) -> torch.Tensor:
    """A call that cannot be split here: dense, counted, by diffusers' own context parallelism.

    Raises:
        FallbackError: with ``strict``.
        TilewiseError: the processor is none that diffusers splits.
    """
    layer: Any = state.layers[number]
    kind = CallKind(FALLBACK, reason=f"under context parallelism, {why}", fused=request.fused)
    forbid(state, layer, request, kind)
    if getattr(layer.module.processor, "_parallel_config", None) is None:
        raise TilewiseError(f"{state.name}.{layer.name}: a call cannot be split over ranks: {why}")
    return attend_dense(state, number, kind, request.replace(parallel_config=state.parallel_config), stock)


def whole_call(
    state: ForwardState, number: int, request: AttentionRequest, sharding: Sharding
) -> tuple[AttentionRequest, Callable[[torch.Tensor], torch.Tensor]]:
    """The call over all tokens of this rank's heads, in the order of the ranks; and what brings its output (B, S, h, D) back."""
    at, shares = sharding.at, sharding.tokens
    dealt = [sharding.heads, *(_dealt(x, request.query, sharding) for x in (request.key, request.value))]
    given = [_repeated(x, heads) for x, heads in zip(request.qkv, dealt, strict=True)]
    order = None if shares.order is None else state.plans.rank_order(shares.order, request.query.device)
    with state.call_stats.exchange(request.query):
        qkv = to_heads(given, dealt, shares.sizes, at.rank, at.group)
        mask = _whole_mask(state, request.attn_mask, sharding, None if order is None else order.order)
    query, key, value = qkv
    whole = request.replace(query=query, key=key, value=value, attn_mask=mask, parallel_config=None, rank_order=order)

    def back(out: torch.Tensor) -> torch.Tensor:
        with state.call_stats.exchange(out):
            return to_tokens(out, sharding.heads, shares.sizes, at.rank, at.group)

    return whole, back


def head_part(state: ForwardState) -> HeadPart | None:
    """Which heads the call under way is over, in a layer whose others are on other ranks; None: all."""
    at = state.sharding()
    if state.forward.dealt is None or at is None:
        return None
    dealt, rank = state.forward.dealt
    sizes, group = tuple(map(len, dealt)), at.group
    return HeadPart(dealt[rank], sum(sizes), lambda x: in_order(gather(x, 1, sizes, rank, group), dealt, 1))


def _dealt_for(state: ForwardState, number: int, request: AttentionRequest, at: ContextParallel) -> tuple[Heads, ...]:
    """The heads of each rank, so that each has as much work, as far as that is known before the call."""
    heads, ranks = request.query.shape[2], at.ulysses
    forward = state.forward
    runs = forward.runs and not forward.global_path and state.layers[number].block in state.selected
    method = state.method_of(number) if runs else None
    if method is None:
        return deal(heads, ranks)
    if isinstance(method, DynamicMethod) and method.remembers_heads:
        return state.head_dealer.known(heads, ranks, None)
    if isinstance(method, DynamicMethod) and _may_differ(method) and request.key.shape[2] == heads:
        return state.head_dealer.by_last(number, heads, at, request.query.device)
    return state.head_dealer.known(heads, ranks, method.head_costs())


def _may_differ(method: DynamicMethod) -> bool:
    """Whether only a call decides what each head keeps."""
    return not method.heads_alike and method.head_costs() is None


def _dealt(x: torch.Tensor, query: torch.Tensor, sharding: Sharding) -> tuple[Heads, ...]:
    """The heads of each rank, of a key or value that may have fewer than the query: those that the rank's queries attend to."""
    each = query.shape[2] // x.shape[2]  # query heads that share one
    found: list[Heads] = []
    for heads in sharding.heads:
        if each == 1 or not isinstance(heads, range) or heads.start % each or len(heads) % each:
            return sharding.heads
        found.append(range(heads.start // each, heads.stop // each))
    return tuple(found)


def _repeated(x: torch.Tensor, dealt: tuple[Heads, ...]) -> torch.Tensor:
    """A key or value with a head for each query head, where ranks would have to share one."""
    heads = sum(map(len, dealt))
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _whole_mask(
    state: ForwardState, mask: torch.Tensor | None, sharding: Sharding, order: torch.Tensor | None
) -> torch.Tensor | None:
    """A call's mask over the tokens of all ranks, in the model's order. One that several layers share is gathered once.

    Raises:
        TilewiseError: a mask of pairs of tokens, or one for each head, which no rank has all of.
    """
    if mask is None or mask.shape[-1] in (1, sharding.tokens.tokens):  # made before the split: of the whole sequence
        return mask
    local = sharding.tokens.sizes[sharding.at.rank]
    if mask.shape[-1] != local or (mask.ndim > 2 and any(n != 1 for n in mask.shape[1:-1])):
        raise TilewiseError(
            f"{state.name}: an attention mask of shape {tuple(mask.shape)} cannot be split over {len(sharding.heads)} ranks, of "
            f"which this one has {local} tokens: it must be one of keys alone, (B, 1, 1, S)"
        )

    def whole() -> torch.Tensor:
        found = gather(mask, mask.ndim - 1, sharding.tokens.sizes, sharding.at.rank, sharding.at.group)
        return found if order is None else found.index_select(-1, order)

    return state.forward.masks.gathered(mask, whole)
