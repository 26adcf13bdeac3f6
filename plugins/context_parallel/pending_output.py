"""An output that another process computes, given to the caller before it is there."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.torch_compat import version_of, without_subclasses

# Methods that say how a tensor lies in memory, and nothing of its values.
LAYOUT = {
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous", "get_device",
    "is_floating_point", "is_complex", "untyped_storage", "data_ptr", "__len__", "is_inference",
}  # fmt: skip


class Promise:
    """That outputs which were given out will be filled in. kept: they are. why: what the error says of who reads one before."""

    def __init__(self, why: str) -> None:
        self.kept = False
        self.why = why


class PendingOutput(torch.Tensor):
    """A tensor whose values are written later, in place. Views of it may be taken before; what reads values raises TilewiseError.

    Once its promise is kept it is like any tensor, and what is computed from it is a plain one.
    """

    promise: Promise

    @staticmethod
    def of(values: torch.Tensor, promise: Promise) -> PendingOutput:
        """values: the memory that will be written."""
        pending: PendingOutput = values.as_subclass(PendingOutput)
        pending.promise = promise
        return pending

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, PendingOutput)]
        waiting = [x for x in given if not x.promise.kept]
        with without_subclasses():
            before = [version_of(x) for x in waiting]
            out = func(*args, **(kwargs or {}))
            if not waiting:
                return out
            promise, name = waiting[0].promise, getattr(func, "__name__", str(func))
            made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            memory = {x.untyped_storage().data_ptr() for x in waiting}
            told = bool(made) or name == "__get__" or name in LAYOUT
            copied = any(x.untyped_storage().data_ptr() not in memory for x in made)
            if copied or not told or before != [version_of(x) for x in waiting]:
                raise TilewiseError(f"{promise.why} (it was read by {name})")
            return tree_map_only(torch.Tensor, lambda x: PendingOutput.of(x, promise), out)
