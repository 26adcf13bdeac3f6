"""What a way is to make a window go on from the one before it, and the registry. A new way is one file in this folder.

All are a matrix of noise levels M (rows: passes, columns: latent frames of the window) and shares k of the columns. Before pass
i, with the noise levels σ_0 > … > σ_n = 0 of the scheduler, the last latents of the window before, the tail, in front, and the
noise ε that the window began with,

    x_j ← (1 − k_j) · x_j + k_j · ((1 − M_ij) · tail_j + M_ij · ε_j)

(in diffusion models √(1 − M²) stands for 1 − M),

and the denoiser is told M_ij as the timestep of column j, where that is another than σ_i. What is final after a window is
emitted; columns that the next window still changes are held back.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

import tilewise.pipelines.streaming.windows.ways
from tilewise.pipelines.conditioning.roles import needed_roles
from tilewise.plugins.errors import unknown


class Way(ABC):
    """One way. Stateless: one instance serves all.

    Attributes:
        name: what options call it.
        per_frame: whether the denoiser is told M by a timestep for each latent frame.
        restarts: whether a window is a clip of its own, which begins with the last frames of the one before as pictures.
        holds_back: whether the next window still changes the columns that it shares with this one.
        queued: whether frames go through a queue, see ``windows/queue.py``, and not all of a window at once.
        experimental: what is unproven of it; "": nothing.
    """

    name: ClassVar[str]
    per_frame: ClassVar[bool] = False
    restarts: ClassVar[bool] = False
    holds_back: ClassVar[bool] = False
    queued: ClassVar[bool] = False
    experimental: ClassVar[str] = ""

    @abstractmethod
    def refuses(self, pipe: Any) -> str | None:
        """Why a pipeline cannot go this way, or None."""

    @abstractmethod
    def usual(self, pipe: Any) -> bool:
        """Whether it is the way to go for a pipeline, where nobody names one. Asked only if it is not refused."""

    @abstractmethod
    def usual_overlap(self, pipe: Any, window: int) -> int:
        """Latent frames, less than window."""

    def usual_steps(self, steps: int, chunk: int) -> int:
        """Steps of a window, where nobody names them and the model has so many; chunk: its new latent frames."""
        return steps

    def refuses_steps(self, steps: int, chunk: int) -> str | None:
        """Why a window cannot have so many steps, or None."""
        return None

    def most(self, pipe: Any) -> int | None:
        """The longest overlap in latent frames that a pipeline can have; None: any shorter than the window."""
        return None

    def arguments(self, pipe: Any, frames: NDArray[np.uint8], length: int) -> dict[str, Any]:
        """Arguments of the pipeline's call for a window of ``length`` frames that begins with some, (F, H, W, 3): where a way
        restarts."""
        raise NotImplementedError

    def trained(self, pipe: Any) -> int | None:
        """The longest overlap in latent frames that the weights were trained with; 0: they say nothing of it; None: training
        does not come into it."""
        return None

    @abstractmethod
    def level(self, sigma: float, prefix_noise: float) -> float:
        """M of a column of the tail, where the window is at noise level sigma."""

    @abstractmethod
    def shares(self, overlap: int) -> torch.Tensor:
        """(overlap,) float32 in 0 … 1: k of each column of the tail."""

    def matrix(self, sigmas: Sequence[float], window: int, overlap: int, prefix_noise: float = 0.0) -> torch.Tensor:
        """M, (len(sigmas), window) float32. sigmas: of the passes, the last one 0 for the finished window."""
        rows = torch.tensor(sigmas, dtype=torch.float32)[:, None].repeat(1, window)
        rows[:, :overlap] = torch.tensor([self.level(sigma, prefix_noise) for sigma in sigmas])[:, None]
        rows[-1] = 0
        return rows


def needs_picture(pipe: Any) -> str | None:
    """Why a pipeline whose every call begins with a picture cannot go on from latents; None for others."""
    return "each window begins with a picture" if "image" in needed_roles(pipe) else None


_REGISTRY: dict[str, Way] = {}


def register(way: type[Way]) -> type[Way]:
    """Decorator: makes a class known as a way."""
    _REGISTRY[way.name] = way()
    return way


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(tilewise.pipelines.streaming.windows.ways.__path__):
        importlib.import_module(f"tilewise.pipelines.streaming.windows.ways.{module.name}")


def ways() -> dict[str, Way]:
    """All ways by name."""
    _import_all()
    return dict(sorted(_REGISTRY.items()))


def way_named(name: str) -> Way:
    """Raises ConfigError for an unknown name."""
    if name not in (known := ways()):
        raise unknown("way to go on from a window", name, known)
    return known[name]
