"""A patched denoiser that makes a video chunk by chunk against a KV cache.

    with CausalDenoiser(denoiser, KVCache(window=12, sink=3), grid=Grid(3, 30, 52)) as causal:
        causal.begin(3)                                             room for 3 latent frames
        velocity = causal(noisy, timestep, text)                    as often as there are denoising steps
        causal(clean, zero, text)                                   the last pass leaves its keys and values in the cache
        causal.commit()

The denoiser is diffusers' own, and sees each chunk as a clip of its own. Two things are changed while this is open: its rotary
tables start at the chunk's first frame, and its self-attention calls attend to the keys and values of the window. Every pass of a
chunk writes over those of the pass before it, so the last pass counts. It runs on clean latents, at the timestep that the model
was trained with for its context (0, or a little noise).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Self

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError, TilewiseError, UnsupportedModelError
from tilewise.plugins.models.common.denoisers import ATTRIBUTE
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.models.common.rotary import Rotary
from tilewise.plugins.runtime.patched_denoiser import Patch
from tilewise.plugins.runtime.plan_cache import Order
from tilewise.plugins.streaming.buffers import Buffers
from tilewise.plugins.streaming.cache_plan import CachePlan, plan_cache
from tilewise.plugins.streaming.graphs import ForwardGraphs
from tilewise.plugins.streaming.kv_cache import ADD_REFUSED, KEEP_REFUSED, STEP_CACHE_REFUSED, KVCache
from tilewise.plugins.streaming.policies.base import Event, Kept, policy
from tilewise.plugins.streaming.slots import Slots
from tilewise.plugins.streaming.sparse_window import SparseWindow


class CausalDenoiser:
    """See above.

    Args:
        denoiser: patched by ``tilewise.patch``, of a family that says how its positions are offset (``Family.rotary``).
        cache: options of the KV cache.
        grid: tokens of a chunk: its usual number of latent frames, rows and columns.
        lanes: forwards of a step that each need keys of their own: 2 with classifier-free guidance.
        batch: samples of a forward.
        cuda_graph: on a GPU, capture forwards and replay them; ``graphs.refused`` says where that failed.

    Attributes:
        slots: which frame is where. graphs: captured forwards. order, step, steps, reason: see ``KeyValueWindow``.

    Raises:
        UnsupportedModelError: the family does not serve this.
        ConfigError: options that do not fit the chunk or the policy.
        TilewiseError: the denoiser is not patched, or another stream runs on it.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        cache: KVCache,
        *,
        grid: Grid,
        lanes: int = 1,
        batch: int = 1,
        cuda_graph: bool = True,
    ) -> None:
        self.rotary = rotary_of(denoiser)
        patch = denoiser.__dict__.get(ATTRIBUTE)
        if not isinstance(patch, Patch):
            raise TilewiseError(
                f'CausalDenoiser: {type(denoiser).__name__} is not patched; call tilewise.patch first, with the method "dense" '
                "for exact attention"
            )
        if patch.cache is not None:
            raise ConfigError(STEP_CACHE_REFUSED)
        if patch.config.add is not None:
            raise ConfigError(ADD_REFUSED)
        if patch.config.keep is not None:
            raise ConfigError(KEEP_REFUSED)
        self.policy = policy(cache.policy)
        cache.check_chunk(grid.t)
        self.policy.check(cache, grid.t)
        self.denoiser = denoiser
        self.options = cache
        self.grid = grid
        self.lanes = lanes
        self.batch = batch
        self.memory = self.policy.memory(grid.t, cache.sink)
        self.slots = Slots(cache.window, cache.sink)
        self.order: Order | None = None
        self.step, self.steps = 0, 1
        self._sparse = SparseWindow(patch.config.method, grid, cache, self.memory) if patch.sparse else None
        self.reason = "" if self._sparse is None else self._sparse.reason
        # Hooks that move weights between devices cannot be captured.
        self._captures = cuda_graph and not hasattr(denoiser, "_hf_hook")
        self.graphs = ForwardGraphs()
        self._patch = patch
        self._buffers: Buffers | None = None
        self._has_memory = False
        self._sink_at: list[int] | None = None  # positions to which sink and memory are turned now
        self._first_of_shot = False
        self._lane = 0
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        self._hook: Any = None

    # ── on and off ───────────────────────────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> Self:
        state = self._patch.state
        if state.window is not None:
            raise TilewiseError(f"{state.name}: another stream runs on this denoiser; close it first")
        self._hook = self.rotary.module.register_forward_hook(self._offset_tables)
        state.window = self
        return self

    def __exit__(self, *error: object) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self._patch.state.window = None
            self.graphs.clear()

    close = __exit__

    # ── a chunk ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def next_frame(self) -> int:
        """Number of the latent frame that comes next."""
        return self.slots.next_frame

    def begin(self, chunk: int | None = None) -> None:
        """Make room for ``chunk`` latent frames, by default ``grid.t``. A chunk that was not finished is dropped.

        Raises:
            ConfigError: the window has no room for so many.
        """
        chunk = self.grid.t if chunk is None else chunk
        self.options.check_chunk(chunk)
        self._keep_order(chunk)
        change = self.slots.begin(chunk)
        if self._buffers is not None:
            if change.evicted and "evicted" in self.policy.events:
                slots, frames = zip(*change.evicted, strict=True)
                self._update(Event("evicted", self._buffers.read(slots, frames)))
            self._buffers.move(change.moves)
            self._place()
        self._set_tables(range(self.next_frame, self.next_frame + chunk))

    def __call__(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, *, lane: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """The denoiser's output (B, C, t, h, w) for the chunk under way, which attends to the window.

        Args:
            latents: (B, C, t, h, w) with as many frames as were begun. timestep: (B,). text: as the denoiser takes it.
            lane: which of the caches. kwargs: further arguments of the denoiser.

        Raises:
            TilewiseError: no chunk was begun, or the denoiser was unpatched meanwhile.
        """
        if self._hook is None or self.denoiser.__dict__.get(ATTRIBUTE) is not self._patch:
            raise TilewiseError("CausalDenoiser: it is closed, or its denoiser was unpatched or patched anew since")
        if latents.shape[2] != len(self.slots.current) or latents.shape[0] != self.batch:
            raise TilewiseError(
                f"CausalDenoiser: got latents {tuple(latents.shape)} (B, C, t, h, w) for a chunk of {len(self.slots.current)} "
                f"latent frames and a batch of {self.batch}; call begin with the number of frames first"
            )
        self._lane = lane
        denoiser: Any = self.denoiser
        if not (self._captures and latents.is_cuda and not kwargs):
            return denoiser(latents, timestep, text, return_dict=False, **kwargs)[0]
        runs = self._patch.config.runs_at(self.step, self.steps)
        sparse = self._sparse if self.order is not None else None
        turn: Hashable = self.slots.current if sparse is None else sparse.turn(self.slots.in_time)
        return self.graphs(self._forward, (lane, turn, self._has_memory, runs, self.reason), latents, timestep, text)

    def _forward(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        denoiser: Any = self.denoiser
        return denoiser(latents, timestep, text, return_dict=False)[0]

    def commit(self) -> None:
        """The chunk is finished: what its last pass wrote stays."""
        chunk = self.slots.current
        before = len(self.slots.frames)
        self.slots.commit()
        buffers = self._buffers
        if buffers is None:
            raise TilewiseError("CausalDenoiser.commit: no pass ran since begin")
        if self.options.sink and before < self.options.sink:  # frames of this chunk are frames of the sink
            new = range(before, min(self.options.sink, len(self.slots.frames)))
            frames = self.slots.frames[new.start : new.stop]
            buffers.write_kept(range(self.memory + new.start, self.memory + new.stop), buffers.read(list(new), frames))
            self._sink_at = self.slots.frames[: self.options.sink]  # where they were written
        if "committed" in self.policy.events and before >= self.options.sink:
            frames = self.slots.frames[chunk.start : chunk.stop]
            self._update(Event("committed", buffers.read(list(chunk), frames), self._first_of_shot))
        self._first_of_shot = False

    @property
    def config(self) -> Config:
        """What the denoiser is patched with."""
        return self._patch.config

    def new_shot(self) -> None:
        """The next chunk begins a new shot, which some policies keep."""
        self._first_of_shot = True

    def drop_ring(self) -> list[int]:
        """Forget all frames but those of sink and memory. Returns their numbers: their latents may be run again."""
        return self.slots.drop_ring()

    def flush(self, keep: int) -> None:
        """Forget all frames but those of sink and memory and the last ``keep``, which stay as they are.

        Where chunks are stored in tile order, as sparse attention needs it, whole chunks stay: ``keep`` is rounded up.
        """
        if self.order is not None:
            keep = -(-keep // self.grid.t) * self.grid.t
        change = self.slots.flush(keep)
        if self._buffers is not None:
            self._buffers.move(change.moves)

    def reset(self, next_frame: int = 0) -> None:
        """Forget everything; the next frame has this number."""
        self.slots.load_state_dict({"frames": [], "next_frame": next_frame})
        self._has_memory, self._sink_at = False, None

    # ── what the attention calls ask for ─────────────────────────────────────────────────────────────────────────

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._buffers is None:
            self._buffers = self._allocate(key.dtype, key.device)
        buffers = self._buffers
        start = 0 if self._has_memory else self.memory * buffers.shape.tokens
        return buffers.extend(self._lane, layer, self.slots.current, start, key, value)

    def keys(self) -> WindowKeys:
        assert self._sparse is not None
        return self._sparse.keys(self.slots.in_time, self._has_memory)

    def _keep_order(self, chunk: int) -> None:
        """Decide with the first chunk in which order rows are stored; refuse one that does not fit it later.

        Raises:
            ConfigError: a chunk of another length among chunks that are stored in tile order.
        """
        if self._sparse is None or self._sparse.layout is None or self.reason:
            return
        if chunk == self.grid.t:
            if self.order is None:
                device = next(self.denoiser.parameters()).device
                layout = self._sparse.layout
                self.order = layout.permutation.to(device), layout.inverse.to(device)
        elif self.order is None or not self.slots.frames:
            self.order = None
            self.reason = f"a chunk of {chunk} latent frames among chunks of {self.grid.t}"
        else:
            raise ConfigError(
                f"CausalDenoiser.begin: sparse attention in the window needs all chunks alike, {self.grid.t} latent frames; got "
                f"{chunk}"
            )

    # ── sink and memory ──────────────────────────────────────────────────────────────────────────────────────────

    def _update(self, event: Event) -> None:
        """Let the policy change what is kept."""
        buffers, sink = self._buffers, range(self.memory, self.memory + self.options.sink)
        assert buffers is not None
        whole = len(self.slots.frames) >= self.options.sink > 0
        memory = range(self.memory)
        kept = Kept(buffers.read_kept(sink) if whole else None, buffers.read_kept(memory) if self._has_memory else None)
        assert self.policy.update is not None
        self.policy.update(kept, event)
        if kept.sink is not None:
            buffers.write_kept(sink, kept.sink)
        if kept.memory is not None:
            buffers.write_kept(memory, kept.memory)
            self._has_memory = True
        self._sink_at = None

    def _place(self) -> None:
        """Turn sink and memory to where they stand for the chunk under way."""
        assert self._buffers is not None
        positions = self._positions()
        if positions == self._sink_at:
            return
        first = 0 if self._has_memory else self.memory
        kept = range(first, self.memory + min(self.options.sink, len(self.slots.frames)))
        if len(kept):
            self._buffers.place(kept, positions)
        self._sink_at = positions

    def _positions(self) -> list[int]:
        """Positions of the frames of memory (where there is one) and sink for the chunk under way."""
        sink = self.slots.frames[: self.options.sink]
        memory = self.memory if self._has_memory else 0
        ring, current = self.slots.ring, self.slots.next_frame
        oldest = ring[0] if ring else current
        if self.policy.ahead:
            sink = [current + len(self.slots.current) + i for i in range(len(sink))]
        elif self.options.sink_position == "clamped":
            sink = [max(frame, oldest - len(sink) + i) for i, frame in enumerate(sink)]
        before = min([oldest, *sink])
        return [*range(before - memory, before), *sink]

    # ── tables and buffers ───────────────────────────────────────────────────────────────────────────────────────

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> Buffers:
        return Buffers(self.cache_plan(dtype), self.rotary, device=device, frame_of_row=self._frame_of_row())

    def _frame_of_row(self) -> torch.Tensor | None:
        if self.order is None:
            return None
        assert self._sparse is not None and self._sparse.layout is not None
        tokens = self.grid.h * self.grid.w
        return (self._sparse.layout.permutation // tokens).view(self.grid.t, tokens).cpu()

    def cache_plan(self, dtype: torch.dtype | None = None) -> CachePlan:
        """The sizes of the cache, known before the first pass. dtype: of keys; the denoiser's own."""
        denoiser: Any = self.denoiser
        return plan_cache(
            self._patch.layers, self.rotary, self.options, self.grid, memory=self.memory, averages=self.policy.averages,
            lanes=self.lanes, batch=self.batch, dtype=denoiser.dtype if dtype is None else dtype,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Memory that the cache takes on the device now."""
        return 0 if self._buffers is None else self._buffers.nbytes

    def _set_tables(self, frames: range) -> None:
        """Make the chunk's tables; in the same tensors if they fit, as a captured CUDA graph reads those."""
        tokens, time = self.grid.h * self.grid.w, self.rotary.time_channels
        if self._tables is None or self._tables[0].shape[1] != len(frames) * tokens:
            self._tables = self.rotary.tables(frames, self.grid.h, self.grid.w)
            return
        # Only the channels of t differ from chunk to chunk, and a few numbers come to the device without a wait.
        angles = self.rotary.time_angles(frames).repeat_interleave(2, 1)
        for table, new in zip(self._tables, (angles.cos(), angles.sin()), strict=True):
            new = new.to(table.dtype).to(table.device, non_blocking=True)
            table.unflatten(1, (len(frames), tokens))[..., :time] = new[None, :, None, None]

    def _offset_tables(self, module: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
        hidden_states, tables = args[0], self._tables
        assert tables is not None
        dtype = torch.promote_types(torch.float32, output[0].dtype)
        if hidden_states.dtype == torch.float64:
            dtype = torch.float64
        if tables[0].device != hidden_states.device or tables[0].dtype != dtype:
            tables = self._tables = tables[0].to(hidden_states.device, dtype), tables[1].to(hidden_states.device, dtype)
        return tables

    # ── state ────────────────────────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(JSON values, tensors by name, not copied): all that a stream needs to go on bit for bit, between chunks."""
        tensors = {} if self._buffers is None else self._buffers.tensors()
        plain = {
            "slots": self.slots.state_dict(),
            "has_memory": self._has_memory,
            "sink_at": self._sink_at,
            "options": self.options.to_dict(),
            "dtype": None if self._buffers is None else str(self._buffers.shape.dtype).removeprefix("torch."),
            "tile_order": self.order is not None,
            "reason": self.reason,
        }
        return plain, tensors

    def load_state_dict(self, plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Go on from a ``state_dict`` of a denoiser with the same options.

        Raises:
            ConfigError: it is of other options or sizes.
        """
        if plain["options"] != self.options.to_dict():
            raise ConfigError(
                f"CausalDenoiser.load_state_dict: the state is of {plain['options']}, this cache of {self.options.to_dict()}"
            )
        self.reason = plain["reason"]
        if plain["tile_order"]:
            self._keep_order(self.grid.t)
        if tensors:
            device = next(self.denoiser.parameters()).device
            self._buffers = self._allocate(getattr(torch, plain["dtype"]), device)
            own = self._buffers.tensors()
            if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
                raise ConfigError(
                    f"CausalDenoiser.load_state_dict: keys of {tuple(tensors['key'].shape)} do not fit a cache of "
                    f"{tuple(own['key'].shape)}; make the stream at the size of the saved one"
                )
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        self.slots.load_state_dict(plain["slots"])
        self._has_memory = bool(plain["has_memory"])
        # Keys that stand where they were written are not turned: those turned anew differ in the last bit.
        self._sink_at = plain["sink_at"] if tensors else None


def rotary_of(denoiser: nn.Module) -> Rotary:
    """How a denoiser's keys turn with their position.

    Raises:
        UnsupportedModelError: no family serves it, or its family does not say, with the reason.
    """
    family = family_of(denoiser)
    found = "no family adapter serves it" if family is None else family.rotary(denoiser)
    if isinstance(found, str):
        raise UnsupportedModelError(
            f"streaming: {type(denoiser).__name__} cannot run with a KV cache: {found}. Wan 2.1 and 2.2 and SkyReels-V2 can"
        )
    return found
