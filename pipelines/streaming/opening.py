"""A checked stream before anything is put on its pipeline: what it takes, and how its source of latents is opened."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.pipelines.latent_spaces.base import LatentSpace
from tilewise.pipelines.media.video import to_uint8
from tilewise.pipelines.memory.stream_plan import StreamMemory
from tilewise.pipelines.streaming.causal_source import CausalSource
from tilewise.pipelines.streaming.checks import cache_of, check_stream
from tilewise.pipelines.streaming.memory import denoisers_used, lanes_of, memory_of, window_memory
from tilewise.pipelines.streaming.prompts import Prompts
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.sampler import CausalSampler, TextStates
from tilewise.pipelines.streaming.source import ChunkSource
from tilewise.pipelines.streaming.windows.earlier import earlier_keys
from tilewise.pipelines.streaming.windows.plan import check_start, check_windows, warn, window_settings, window_space
from tilewise.pipelines.streaming.windows.prompts import WindowPrompts
from tilewise.pipelines.streaming.windows.queue import FrameQueue
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.pipelines.streaming.windows.sampler import WindowSampler
from tilewise.pipelines.streaming.windows.source import WindowSource
from tilewise.pipelines.streaming.windows.ways.base import needs_picture, way_named
from tilewise.plugins.config import resolve
from tilewise.plugins.patching import denoisers_of
from tilewise.plugins.streaming.causal_denoiser import CausalDenoiser
from tilewise.plugins.streaming.kv_cache import KVCache


@dataclass(frozen=True)
class Asked:
    """What any stream is asked for. size: height and width in pixels. text_tokens: None for the pipeline's own. frames: of the
    video; None: without end. device: of the denoisers."""

    prompt: str
    negative: str
    size: tuple[int, int]
    seed: int
    text_tokens: int | None
    frames: int | None
    device: torch.device


class Opening(Protocol):
    """A checked stream. space: of its latents."""

    space: LatentSpace

    def memory(self, decode_device: torch.device, own_vae: bool) -> StreamMemory:
        """What it takes."""

    def open(self, undo: contextlib.ExitStack, picture: NDArray[np.float32] | None) -> ChunkSource:
        """Its source of latents.

        undo: gets what takes all of it off the pipeline. picture: (1, H, W, 3) in 0 … 1 to begin with.
        """


class CausalOpening:
    """Of a causal checkpoint; see ``Opening``. edits: a video, and does not begin with noise. Raises as ``check_stream``."""

    def __init__(
        self, pipe: Any, recipe: CausalRecipe, cache: KVCache | None, chunk: int | None, asked: Asked, *, edits: bool
    ) -> None:
        self.pipe, self.recipe, self.asked = pipe, recipe, asked
        self.cache = cache or cache_of(recipe)
        self.chunk = recipe.chunk if chunk is None else chunk
        height, width = asked.size
        self.space, self.grid = check_stream(
            pipe, recipe, self.cache, chunk=self.chunk, height=height, width=width, edits=edits
        )

    def memory(self, decode_device: torch.device, own_vae: bool) -> StreamMemory:
        return memory_of(
            self.pipe, self.space, self.recipe, self.cache, self.grid, self.asked.size, device=self.asked.device,
            decode_device=decode_device, own_vae=own_vae, exact=False,
        )  # fmt: skip

    def open(self, undo: contextlib.ExitStack, picture: NDArray[np.float32] | None) -> ChunkSource:
        pipe, asked, lanes = self.pipe, self.asked, lanes_of(self.recipe)
        used = list(denoisers_used(pipe, self.recipe).values())
        causal = [undo.enter_context(CausalDenoiser(one, self.cache, grid=self.grid, lanes=lanes)) for one in used]
        encode = _encoder(pipe, asked.device, asked.text_tokens)
        states = TextStates(encode(asked.prompt), encode(asked.negative) if lanes == 2 else None)
        spatial, _ = self.space.factors(pipe)
        sampler = CausalSampler(
            causal,
            self.recipe,
            states,
            shape=(used[0].config.in_channels, *(side // spatial for side in asked.size)),
            generator=torch.Generator(asked.device).manual_seed(asked.seed),
            device=asked.device,
            dtype=used[0].dtype,
        )
        prompts = Prompts(encode, asked.prompt, states)
        start = _encoded(pipe, self.space, picture, asked.device)
        return CausalSource(sampler, prompts, self.recipe, window=self.cache.window, chunk=self.chunk, start=start)


class WindowOpening:
    """Of windows of a bidirectional pipeline; see ``Opening``.

    with_image: whether the video begins with a picture. edits: a video, and does not begin with noise.

    Raises as ``check_windows``, and ConfigError for a picture that the way has no place for.
    """

    def __init__(self, pipe: Any, recipe: WindowRecipe, asked: Asked, with_image: bool, *, edits: bool) -> None:
        height, width = asked.size
        self.pipe, self.recipe, self.asked = pipe, recipe.replace(height=height, width=width), asked
        self.way = way_named(recipe.way)
        self.settings = window_settings(
            pipe, window_space(pipe), self.recipe, prompt=asked.prompt, negative=asked.negative, model="",
            method=resolve("dense"), seed=asked.seed, max_sequence_length=asked.text_tokens,
        )  # fmt: skip
        self.space = check_windows(pipe, self.recipe, self.settings)
        check_start(pipe, recipe, with_image, edits)
        warn(pipe, self.recipe)

    def memory(self, decode_device: torch.device, own_vae: bool) -> StreamMemory:
        return window_memory(
            self.pipe, self.space, self.settings, self.recipe, device=self.asked.device, decode_device=decode_device,
            own_vae=own_vae,
        )  # fmt: skip

    def open(self, undo: contextlib.ExitStack, picture: NDArray[np.float32] | None) -> ChunkSource:
        frames, temporal = self.asked.frames, self.space.factors(self.pipe)[1]
        generator, recipe = torch.Generator("cpu").manual_seed(self.asked.seed), self.recipe
        sampler = WindowSampler(
            self.pipe,
            self.space,
            self.settings,
            self.way,
            prefix_noise=recipe.prefix_noise,
            earlier=undo.enter_context(earlier_keys(self.pipe, recipe)),
            generator=generator,
        )
        if self.way.queued:
            sampler.queue = FrameQueue(
                self.pipe, self.space, sampler.shape, chunk=recipe.chunk, steps=recipe.steps, generator=generator
            )
        return WindowSource(
            sampler,
            WindowPrompts(lambda _: None, self.asked.prompt),
            self.recipe,
            total=None if frames is None else 1 + -(-(frames - 1) // temporal),
            device=self.asked.device,
            start=None if self.way.restarts else _encoded(self.pipe, self.space, picture, self.asked.device),
            frames=to_uint8(picture) if self.way.restarts and picture is not None else None,
            needs_frame=needs_picture(self.pipe) is not None,
        )


def _encoded(
    pipe: Any, space: LatentSpace, picture: NDArray[np.float32] | None, device: torch.device
) -> torch.Tensor | None:
    """Latents (1, C, 1, h, w) of a picture (1, H, W, 3) in 0 … 1."""
    return None if picture is None else space.encode(pipe, picture).to(device)


def _encoder(pipe: Any, device: torch.device, length: int | None) -> Callable[[str], torch.Tensor]:
    """Gives the text states (1, tokens, width) of a prompt, as the pipeline makes them."""
    more = {} if length is None else {"max_sequence_length": length}

    @torch.no_grad()
    def encode(prompt: str) -> torch.Tensor:
        states, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=device, **more)
        denoiser: Any = next(iter(denoisers_of(pipe).values()))
        return states.to(denoiser.dtype)

    return encode
