"""CUDA graphs of a chunk's forward: launching the kernels of a small model takes longer than running them.

The passes of a chunk read and write the same rows, and when the window is full those of all chunks do, so that one graph serves
them. Sparse plans differ with the turn of the ring, and each turn has its own. Inputs are copied into tensors that stay in place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

MAX_GRAPHS = 32  # they share one memory pool

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class _Graph:
    def __init__(self, forward: Forward, inputs: tuple[torch.Tensor, ...], pool: Any) -> None:
        self.inputs = tuple(x.clone() for x in inputs)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(inputs[0].device)
        # Another thread may decode meanwhile: its calls are none of this capture's business.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = forward(*self.inputs)

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output.clone()


class ForwardGraphs:
    """Runs forwards, from the second of a kind on by a captured graph.

    Attributes:
        refused: why nothing is captured any more; "" if nothing went wrong. replays: how many forwards ran by a graph.
    """

    def __init__(self) -> None:
        self.refused = ""
        self.replays = 0
        self._seen: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, _Graph] = {}

    def __call__(self, forward: Forward, kind: Hashable, *inputs: torch.Tensor) -> torch.Tensor:
        """``forward`` of latents, timestep and text: one and the same for as long as there are graphs.

        kind: forwards that read and write the same rows in the same way.
        """
        kind = (kind, *((x.shape, x.dtype) for x in inputs))
        graph = self._graphs.get(kind)
        if graph is None and not self.refused:
            seen = self._seen[kind] = self._seen.get(kind, 0) + 1
            # The first one compiles kernels and makes plans, which cannot be captured.
            if seen > 1 and len(self._graphs) < MAX_GRAPHS:
                graph = self._capture(forward, kind, inputs)
        if graph is None:
            return forward(*inputs)
        self.replays += 1
        return graph.replay(inputs)

    def _capture(self, forward: Forward, kind: Hashable, inputs: tuple[torch.Tensor, ...]) -> _Graph | None:
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        try:
            graph = self._graphs[kind] = _Graph(forward, inputs, pool)
        except RuntimeError as error:  # such as a hook that waits for the device: everything runs as before
            self.refused = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            return None
        return graph

    def clear(self) -> None:
        """Free the graphs and their memory."""
        self._graphs.clear()
        self._seen.clear()
