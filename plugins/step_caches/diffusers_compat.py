"""What tilewise uses of diffusers' cache hooks that is no public API, as ``plugins/diffusers_compat.py`` does of the rest.

Seen in 0.42. If names change, ``cache=`` fails when a pipeline is patched or at its first forward (``AttributeError``), or stock
and patched pipelines reuse different steps: tests/plugins/step_caches/ compares them.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tilewise.plugins.torch_compat import uncompiled

REGISTRY = "_diffusers_hook"  # of a module: its HookRegistry
CACHE_CONFIG = "_cache_config"  # of a denoiser: what CacheMixin.enable_cache was given


def remove_hook(module: nn.Module, name: str) -> None:
    """Takes a hook off one module."""
    getattr(module, REGISTRY).remove_hook(name, recurse=False)


def drop_empty_registry(module: nn.Module) -> None:
    """Removes a module's registry if it holds no hook any more."""
    registry = module.__dict__.get(REGISTRY)
    if registry is not None and not registry.hooks:
        delattr(module, REGISTRY)


def forget_child_registries(denoiser: nn.Module) -> None:
    """A denoiser's registry lists those below it; hooks have come or gone."""
    registry = denoiser.__dict__.get(REGISTRY)
    if registry is not None:
        registry.invalidate_child_registries_cache()


def state_managers(hook: Any) -> list[Any]:
    """What keeps a hook's state by cache context."""
    from diffusers.hooks.hooks import StateManager

    return [value for value in vars(hook).values() if isinstance(value, StateManager)]


def context_of(manager: Any) -> Any:
    """The ``CacheContext`` that a pipeline has set, or None."""
    return manager._context


def states_of(manager: Any) -> list[Any]:
    """The states that a manager holds, of all cache contexts."""
    return list(manager._state_cache.values())


def new_context(name: str, **where: Any) -> Any:
    """A ``CacheContext``. where: step_index, num_inference_steps, timestep, sigma."""
    from diffusers.hooks.hooks import CacheContext

    return CacheContext(name, **where)


def is_stateful(hook: Any) -> bool:
    """Whether a hook has a state to reset."""
    return bool(hook._is_stateful)


def replace_decision(hook: Any, decide: Callable[[Any, Callable[..., bool], torch.Tensor], bool]) -> None:
    """Have ``decide(hook, stock, change)`` say whether the blocks after the first run, in First Block Cache's first hook. stock:
    its own decision, by the change of the first block. Hooks of other caches are left as they are.
    ``FBCHeadBlockHook._should_compute_remaining_blocks``."""
    stock: Any = getattr(type(hook), "_should_compute_remaining_blocks", None)
    if stock is None:
        return
    own = weakref.ref(hook)  # which holds tensors of a whole sequence: it must not be part of a cycle

    def decided(change: torch.Tensor) -> bool:
        found = own()
        return decide(found, functools.partial(stock, found), change)

    hook._should_compute_remaining_blocks = decided


def last_change(hook: Any) -> tuple[torch.Tensor | None, float]:
    """What that hook compares with: the change of the first block when the others ran last, in the cache context that is set, and
    how large a part of it may be different."""
    return hook.state_manager.get_state().head_block_residual, hook.threshold


def branch_states(hook: Any) -> None:
    """Give a hook of Pyramid Attention Broadcast a state for each cache context; diffusers' own has one for all.

    A pipeline that runs the branches of guidance one after another would reuse one branch's attention in the other.
    """
    from diffusers.hooks.hooks import StateManager

    kind: Any = type(hook.state)
    hook.state_manager = StateManager(kind)
    hook.state = _StateOfContext(hook.state_manager)


class _StateOfContext:
    """``PyramidAttentionBroadcastState`` of the cache context that is set."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    @property
    def iteration(self) -> int:
        return int(self._manager.get_state().iteration)

    @iteration.setter
    def iteration(self, value: int) -> None:
        self._manager.get_state().iteration = value

    @property
    def cache(self) -> Any:
        return self._manager.get_state().cache

    @cache.setter
    def cache(self, value: Any) -> None:
        self._manager.get_state().cache = value

    def reset(self) -> None:
        self._manager.reset()


def attention_patterns() -> tuple[str, ...]:
    """Patterns of the modules that TaylorSeer extrapolates by default."""
    from diffusers.hooks import taylorseer_cache

    patterns: tuple[str, ...] = taylorseer_cache._TRANSFORMER_BLOCK_IDENTIFIERS
    return patterns


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """The transformer blocks that First Block Cache, MagCache and SeaCache hook, in order."""
    from diffusers.hooks import _common

    stacks = [
        stack
        for name, stack in denoiser.named_children()
        if name in _common._ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(stack, nn.ModuleList)
    ]
    return [uncompiled(block) for stack in stacks for block in stack]


def block_metadata(block: nn.Module) -> Any:
    """What diffusers knows about a block's arguments and outputs (``TransformerBlockMetadata``), or None."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        return TransformerBlockRegistry.get(type(block))
    except ValueError:
        return None


def takes_hidden_states(block: nn.Module) -> bool:
    """Whether a block's forward has the parameter that First Block Cache looks for, under that name."""
    return "hidden_states" in inspect.signature(type(block).forward).parameters


def sea_cache_serves(denoiser: nn.Module) -> bool:
    """Whether SeaCache can read the latents of a denoiser: of ``WanTransformer3DModel`` without an image among its channels."""
    from diffusers import WanTransformer3DModel

    config: Any = getattr(denoiser, "config", None)
    return isinstance(denoiser, WanTransformer3DModel) and config.in_channels == config.out_channels
