"""``tilewise.stream``: a pipeline with a causal checkpoint, as an iterator of finished frames."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.pipelines.errors import DeviceError
from tilewise.pipelines.generation.settings import OWN_VAE, check_fps
from tilewise.pipelines.generation.tiny_decoding import tiny_decoder_of
from tilewise.pipelines.loading.device import resolve_device
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.pipelines.streaming.checks import cache_of, check_negative, check_stream, recipe_of
from tilewise.pipelines.streaming.decoding import FrameDecoder
from tilewise.pipelines.streaming.memory import denoisers_used, lanes_of, memory_of
from tilewise.pipelines.streaming.prompts import Prompts
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.sampler import CausalSampler, TextStates
from tilewise.pipelines.streaming.settings import check_seconds
from tilewise.pipelines.streaming.video_stream import VideoStream
from tilewise.plugins.autoencoders.streaming import streaming_decoder
from tilewise.plugins.config import MethodLike
from tilewise.plugins.diffusers_compat import execution_device
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.patching import denoisers_of, is_patched, patch, unpatch
from tilewise.plugins.streaming.causal_denoiser import CausalDenoiser
from tilewise.plugins.streaming.kv_cache import KVCache


def stream(
    pipe: Any,
    prompt: str,
    *,
    recipe: CausalRecipe | None = None,
    method: MethodLike = "dense",
    cache: KVCache | None = None,
    chunk: int | None = None,
    height: int | None = None,
    width: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    negative: str = "",
    image: NDArray | None = None,
    fps: float | None = None,
    decode: str = OWN_VAE,
    decode_device: str | torch.device | None = None,
    max_sequence_length: int | None = None,
) -> VideoStream:
    """Make a video chunk by chunk, for as long as you like, in constant memory.

        for chunk in tilewise.stream(pipe, "a boat on a lake"):
            show(chunk.frames)                                      uint8 (F, H, W, 3)

    Args:
        pipe: a text-to-video pipeline of the Wan family with a causal checkpoint (``tilewise.load_causal_checkpoint``).
        prompt: what to show; ``VideoStream.set_prompt`` changes it on the way.
        recipe: how the checkpoint makes video. Default: what ``load_causal_checkpoint`` found.
        method: attention inside the window; "dense" is exact. A pipeline that is patched already keeps its patch.
        cache: window, sink, memory and policy. Default: the recipe's.
        chunk: latent frames of a chunk. Default: the recipe's.
        height, width: pixels. Default: the recipe's.
        seconds: length of the video; None: without end.
        seed: of all noise.
        negative: what to avoid, where the recipe has guidance.
        image: the first frame, (H, W, 3) uint8 or float in 0 … 1, at the size of the video.
        fps: frames a second on playback, which ``seconds`` counts by. Default: the recipe's.
        decode: what makes frames of latents: "vae", the pipeline's own, or "tiny=PATH", the file of a tiny autoencoder.
        decode_device: where that decodes, such as "cuda:1"; a VAE is moved there while the stream is open. Default: where the
            VAE is.
        max_sequence_length: text tokens. Default: the model's.

    Returns:
        An iterator of ``Chunk``, and a context manager.

    Raises:
        ConfigError: a checkpoint that is not causal, sizes that the model does not take, options that do not fit, more memory
            than the device has (``explain_stream`` tells how much).
        UnsupportedModelError: a pipeline or VAE that cannot stream.
        ModelError: the file of a tiny autoencoder is missing or none.
        In each case nothing was changed.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError("stream: the prompt is empty: say what the video should show")
    recipe = recipe_of(pipe, recipe)
    chunk = recipe.chunk if chunk is None else chunk
    fps = float(recipe.fps) if fps is None else fps
    check_fps(fps)
    if seconds is not None:
        check_seconds(seconds)
    check_negative(recipe, negative)
    height, width = recipe.height if height is None else height, recipe.width if width is None else width
    cache = cache or cache_of(recipe)
    space, grid = check_stream(pipe, recipe, cache, chunk=chunk, height=height, width=width)
    start_picture = None if image is None else _picture(image, height, width)
    used = list(denoisers_used(pipe, recipe).values())
    device = execution_device(pipe, pipe.device)
    if hasattr(pipe.vae, "_hf_hook"):
        raise ConfigError(
            "stream: the pipeline's parts are offloaded, and a stream needs the VAE and the denoiser at the same time; load the "
            "pipeline without CPU offload"
        )
    vae_device = pipe.vae.device
    wanted = vae_device if decode_device is None else _device(decode_device)
    tiny = tiny_decoder_of(pipe, decode, device=wanted)
    decoder = streaming_decoder(pipe.vae) if tiny is None else tiny
    memory_of(
        pipe, space, recipe, cache, grid, (height, width), device=device, decode_device=wanted, own_vae=tiny is None,
        exact=False,
    ).check()  # fmt: skip

    with contextlib.ExitStack() as undo:
        if not is_patched(pipe):
            patch(pipe, method)
            undo.callback(unpatch, pipe)
        lanes = lanes_of(recipe)
        causal = [undo.enter_context(CausalDenoiser(one, cache, grid=grid, lanes=lanes)) for one in used]
        length = model_defaults(pipe).max_sequence_length if max_sequence_length is None else max_sequence_length
        encode = _encoder(pipe, device, length)
        states = TextStates(encode(prompt), encode(negative) if lanes == 2 else None)
        spatial, temporal = space.factors(pipe)
        sampler = CausalSampler(
            causal,
            recipe,
            states,
            shape=(used[0].config.in_channels, height // spatial, width // spatial),
            generator=torch.Generator(device).manual_seed(seed),
            device=device,
            dtype=used[0].dtype,
        )
        if wanted != vae_device and tiny is None:
            undo.callback(pipe.vae.to, vae_device)
            pipe.vae.to(wanted)
        start = None if start_picture is None else space.encode(pipe, start_picture).to(device)
        frames = None if seconds is None else max(1, round(seconds * fps))
        return VideoStream(
            sampler,
            FrameDecoder(decoder, space, pipe.vae, wanted),
            Prompts(encode, prompt, states),
            recipe,
            window=cache.window,
            chunk=chunk,
            frames=frames,
            fps=fps,
            close=undo.pop_all().close,
            temporal=temporal,
            ahead=1 if device.type == "cuda" else 0,
            start=start,
        )


def _device(named: str | torch.device) -> torch.device:
    """Raises ConfigError for a device that there is not."""
    try:
        return resolve_device(str(named))
    except DeviceError as error:
        raise ConfigError(f"stream: decode_device: {error}") from error


def _encoder(pipe: Any, device: torch.device, length: int | None) -> Callable[[str], torch.Tensor]:
    """Gives the text states (1, tokens, width) of a prompt, as the pipeline makes them."""
    more = {} if length is None else {"max_sequence_length": length}

    @torch.no_grad()
    def encode(prompt: str) -> torch.Tensor:
        states, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=device, **more)
        denoiser: Any = next(iter(denoisers_of(pipe).values()))
        return states.to(denoiser.dtype)

    return encode


def _picture(image: NDArray, height: int, width: int) -> NDArray[np.float32]:
    """(1, H, W, 3) float32 in 0 … 1. Raises ConfigError for another size or kind of array."""
    array = np.asarray(image)
    if array.shape != (height, width, 3):
        raise ConfigError(
            f"stream: the image is {array.shape}; the video needs (height, width, 3) = ({height}, {width}, 3): resize it first"
        )
    if array.dtype == np.uint8:
        array = array / 255
    return np.ascontiguousarray(array[None], dtype=np.float32).clip(0, 1)
