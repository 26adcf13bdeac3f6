"""A step's decisions as PyTorch operators, so that torch.compile keeps a patched denoiser in one graph.

    begin(timestep, handle, grid) → ticket          which step this is, and so whether the method runs
    attend(ticket, q, k, v, handle, …) → output     one attention call: sparse, dense, or fallen back, and counted

What a step does depends on the schedule, the grid, the plan and the call stats: Python, which a graph would freeze as it was when
it was compiled. Inside an operator that Python runs at every call instead, and one graph serves all steps. Two small tensors
keep it right:

- ``handle``, a number on the CPU, names the denoiser or layer that an operator belongs to. It is an input of the graph, whose
  value is not guarded, so blocks of equal shape share one graph; reading it never waits for a GPU.
- ``ticket`` is made by ``begin`` and read by nothing: as an argument of all later operators it keeps them after it.

Without torch.compile the same methods are called directly. Inference only: there is no backward pass.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from tilewise.kernels.device import CUDAGRAPH_UNSAFE
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.runtime.attention_request import AttentionRequest

_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def handle_for(owner: Any) -> torch.Tensor:
    """A new handle, () int64 on the CPU, by which operators find ``owner`` for as long as something else keeps it alive.

    owner: a ``ForwardState`` for ``begin``, a ``TilewiseProcessor`` for ``attend``.
    """
    number = next(_numbers)
    _owners[number] = owner
    return _scalar(number)


def new_ticket() -> torch.Tensor:
    """The ticket of a step that was begun outside the graph: () int64 on the CPU."""
    return _scalar(0)


def _scalar(value: int) -> torch.Tensor:
    with torch.inference_mode(False):  # a graph made later may run outside inference mode
        return torch.tensor(value, device="cpu")


def _owner(handle: torch.Tensor) -> Any:
    owner = _owners.get(int(handle))
    if owner is None:
        raise TilewiseError(
            "a compiled graph ran for a patch that has been taken off: call torch.compiler.reset() after tilewise.unpatch of "
            "a denoiser that is compiled inside a function of yours"
        )
    return owner


@torch.library.custom_op("tilewise::begin", mutates_args=(), **CUDAGRAPH_UNSAFE)
def begin(
    timestep: torch.Tensor,
    handle: torch.Tensor,
    t: int,
    h: int,
    w: int,
    text: int,
    text_first: bool,
    opposite: int,
    refused: str | None = None,
) -> torch.Tensor:
    """Begin a forward over the grid (t, h, w, text, …); see ``ForwardState.begin``. Returns its ticket, () int64 on the CPU.

    t: 0 where there is no grid, as ``refused`` says.
    """
    _owner(handle).begin(Grid(t, h, w, text, text_first, opposite) if t else None, timestep, refused)
    return torch.zeros((), dtype=torch.int64, device="cpu")


@begin.register_fake
def _(timestep, handle, t, h, w, text, text_first, opposite, refused=None):
    return torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("tilewise::attend", mutates_args=(), **CUDAGRAPH_UNSAFE)
def attend(
    ticket: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    handle: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
    fused: bool,
) -> torch.Tensor:
    """One attention call of a layer; as diffusers' dispatcher takes it, (B, S, H, D). See ``AttentionCalls.answer``."""
    request = AttentionRequest(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=backend, fused=fused
    )
    return _owner(handle).answer(request).contiguous()


@attend.register_fake
def _(ticket, query, key, value, attn_mask, handle, dropout_p, is_causal, scale, enable_gqa, backend, fused):
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _no_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    raise TilewiseError(
        "a compiled patched denoiser is for inference: call it under torch.no_grad() or torch.inference_mode(), as diffusers' "
        "pipelines do, or call tilewise.unpatch before training"
    )


attend.register_autograd(lambda ctx, *gradients: None, setup_context=_no_gradients)
