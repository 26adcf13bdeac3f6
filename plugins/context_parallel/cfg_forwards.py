"""CFG parallelism where a pipeline calls its denoiser twice a step, once for each branch of guidance (Wan, Qwen-Image):

    call       half 0                                half 1
    first      runs                                  gives out memory that is not filled yet
    second     gives out memory                      runs
               ← both outputs are exchanged, into the memory that was given out →

So the caller sees two calls with two outputs, and each half has run one. Reading the first output before the second call is an
error in both halves (``pending_output.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from tilewise.plugins.context_parallel.halves import GUIDANCE_OFF, Halves
from tilewise.plugins.context_parallel.pending_output import PendingOutput, Promise
from tilewise.plugins.errors import TilewiseError


class Form(NamedTuple):
    """What an output is made of: tensors of these shapes and dtypes, and where each of them is in it (``_apart``)."""

    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    structure: Any

    def empty(self, device: torch.device) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.tensors]


class _First(Promise):
    """A first output that was given out. parts: its tensors."""

    def __init__(self, why: str, parts: list[torch.Tensor], form: Form) -> None:
        super().__init__(why)
        self.parts, self.form = parts, form


class CfgForwards(Halves):
    """Divides the two forwards of each step."""

    in_batch = False

    def __init__(self, name: str, half: int, group: Any) -> None:
        super().__init__(name, half, group)
        self._forms: dict[Any, Form] = {}  # by shape of the latents and kind of output
        self._waiting: Callable[[], _First | None] = lambda: None

    @property
    def sits_out(self) -> bool:
        return (self._first() is None) == (self.half == 1)

    def _first(self) -> _First | None:
        """The first output of this step, where it was given out and its second is still to come."""
        return self._waiting()

    def __call__(self, stock: Callable[..., Any], denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        latents = args[0] if args else next(iter(kwargs.values()))
        first = self._first()
        self._waiting = lambda: None
        if first is None:
            return self._give_out(latents, kwargs, lambda: stock(*args, **kwargs))
        if self.half == 0:
            parts = first.form.empty(latents.device)
        else:
            parts, form = self._parts(stock(*args, **kwargs))
            if form != first.form:
                raise TilewiseError(
                    f"CFG parallelism, {self.name}: the two forwards of a step gave outputs of different shapes, "
                    f"{_shapes(first.form)} and {_shapes(form)}: they are not the two branches of guidance"
                )
        with self.exchanging(denoiser, parts[0]):
            work = [
                dist.broadcast(x, self.source(half), group=self.group, async_op=True)
                for half, output in enumerate((first.parts, parts))
                for x in output
            ]
            for each in work:
                each.wait()
        first.kept = True
        return _together(first.form.structure, parts)

    def _give_out(self, latents: torch.Tensor, kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        key = latents.shape, latents.dtype, kwargs.get("return_dict", True)
        parts, form = self._parts(run()) if self.half == 0 else ([], None)
        if key not in self._forms:  # the other half learns what the output looks like, once for each size
            told = [form]
            dist.broadcast_object_list(told, self.source(0), group=self.group)
            assert told[0] is not None
            self._forms[key] = told[0]
        form = self._forms[key]
        if self.half == 1:
            parts = form.empty(latents.device)
        why = (
            f"CFG parallelism, {self.name}: the output of a step's first forward was needed before a second forward ran. Either "
            f"{GUIDANCE_OFF}; or the pipeline needs one branch of guidance for the other"
        )
        first = _First(why, parts, form)
        self._waiting = weakref.ref(first)  # for as long as the caller holds the output
        return _together(form.structure, [PendingOutput.of(x, first) for x in parts])

    def _parts(self, output: Any) -> tuple[list[torch.Tensor], Form]:
        parts: list[torch.Tensor] = []
        structure = self._apart(output, parts)
        return parts, Form(tuple((tuple(x.shape), x.dtype) for x in parts), structure)

    def _apart(self, output: Any, parts: list[torch.Tensor]) -> Any:
        """Adds an output's tensors to ``parts``. Returns it with their numbers in their place: a list for a tuple, a pair of
        class and fields for an output class of diffusers."""
        if isinstance(output, torch.Tensor):
            parts.append(output.detach().contiguous())
            return len(parts) - 1
        if isinstance(output, tuple) and output:
            return [self._apart(each, parts) for each in output]
        if isinstance(output, dict) and output:
            return type(output), {name: self._apart(each, parts) for name, each in output.items()}
        raise TilewiseError(
            f"CFG parallelism, {self.name}: an output with a {type(output).__name__} in it cannot be exchanged"
        )


def _together(structure: Any, parts: Sequence[torch.Tensor]) -> Any:
    """The output that ``_apart`` took apart."""
    if isinstance(structure, int):
        return parts[structure]
    if isinstance(structure, list):
        return tuple(_together(each, parts) for each in structure)
    kind, fields = structure
    return kind(**{name: _together(each, parts) for name, each in fields.items()})


def _shapes(form: Form) -> str:
    return ", ".join(str(shape) for shape, _ in form.tensors)
