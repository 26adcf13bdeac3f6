"""Cancel a pipeline run from another thread, within a step: checked before each forward of a denoiser or of the VAE decoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from tilewise.plugins.patching import DENOISERS


class Cancelled(BaseException):
    """Somebody asked for the work to stop. No error, as KeyboardInterrupt is none: nothing that handles failures, such as a
    batch that goes on with the next clip, may take it for one."""


@contextlib.contextmanager
def cancellable(pipe: Any, stop: Callable[[], bool]) -> Iterator[None]:
    """Whatever runs on `pipe` in this block raises Cancelled soon after `stop` begins to return True.

    With guidance a step has two forwards, and a video decoder has one for each latent frame or so: the longest wait is one
    of those. `stop` is called often and from the thread that runs the pipeline; it should only look at a flag.
    """

    def ask(*_: Any) -> None:
        if stop():
            raise Cancelled("stopped on request")

    asked = [getattr(pipe, name, None) for name in DENOISERS]
    asked.append(getattr(getattr(pipe, "vae", None), "decoder", None))
    handles = [module.register_forward_pre_hook(ask) for module in asked if isinstance(module, nn.Module)]
    try:
        ask()
        yield
    finally:
        for handle in handles:
            handle.remove()
