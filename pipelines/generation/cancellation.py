"""Cancel a pipeline run from another thread, within a step: asked before each block of a denoiser, a text encoder and the VAE.

What to ask is any function that looks at a flag, such as ``threading.Event().is_set``:

    stop = threading.Event()
    with cancellable(pipe, stop.is_set):      # in the thread that runs the pipeline
        generate(pipe, settings)              # raises Cancelled soon after stop.set() in any other thread or signal handler

A block of a large clip takes a GPU tens of milliseconds, and Python is done with its share of it in one: without a limit it runs
whole steps ahead, and a run that was given up goes on until the GPU has done them all. So Python also waits until the GPU is at
most AHEAD blocks behind, which is early enough that it never runs out of work.

Compiled code is left as it is, for a hook inside would be compiled in: a denoiser that was compiled as a whole is asked between
its forwards (one a step, two with guidance), one whose blocks were compiled each (``compile_repeated_blocks``) between blocks.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tilewise.plugins.autoencoders.patched_vae import vae_of
from tilewise.plugins.diffusers_compat import execution_device
from tilewise.plugins.torch_compat import before_calls, runs_compiled, uncompiled

AHEAD = 2  # blocks that a GPU may have left to do when the next is begun


class Cancelled(BaseException):
    """Somebody asked for the work to stop. No error, as KeyboardInterrupt is none: nothing that handles failures, such as a
    batch that goes on with the next clip, may take it for one."""


@contextlib.contextmanager
def cancellable(pipe: Any, stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Whatever runs on `pipe` in this block raises Cancelled soon after `stop` begins to return True: within a block or two.

    `stop` is called often and from the thread that runs the pipeline; it should only look at a flag. By default it says no: then
    this only keeps Python close to the GPU, so that Ctrl-C ends a run as soon.

    Works on patched and on stock pipelines, and patching and unpatching in the block is fine. No hook stays behind.
    """
    pace = _Pace(execution_device(pipe, pipe.device))

    def ask() -> None:
        if stop():
            raise Cancelled("stopped on request")
        pace.keep()

    with contextlib.ExitStack() as undo:
        for module in _asked(pipe):
            undo.callback(before_calls(module, ask))
        ask()
        yield


def _asked(pipe: Any) -> Iterator[nn.Module]:
    """The modules of a pipeline before whose calls there is a question, each once."""
    vae = getattr(pipe, "vae", None)
    for part in pipe.components.values():
        if not isinstance(part, nn.Module):
            continue
        if part is not vae:
            yield part
            yield from _blocks(part)
            continue
        fused = vae_of(pipe) is not None  # its fused forward is for modules without hooks, and runs once a latent frame
        for half in (getattr(vae, "encoder", None), getattr(vae, "decoder", None)):
            if isinstance(half, nn.Module):
                yield half
                yield from () if fused else _blocks(half, deep=True)


def _blocks(module: nn.Module, deep: bool = False) -> Iterator[nn.Module]:
    """Entries of the outermost lists of modules in one, and with `deep` of lists within them; none that compiled code calls."""
    if runs_compiled(module) or uncompiled(module) is not module:
        return
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
            inside: list[nn.Module] = list(child) if deep else []
        else:
            inside = [child]
        for one in inside:
            yield from _blocks(one, deep)


class _Pace:
    """Keeps Python at most AHEAD calls of `keep` ahead of a GPU; on other devices it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: deque[torch.cuda.Event] = deque()

    def keep(self) -> None:
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self.device))
        self.marks.append(mark)
        if len(self.marks) > AHEAD:
            self.marks.popleft().synchronize()
