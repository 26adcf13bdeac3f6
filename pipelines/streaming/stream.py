"""``tilewise.stream``: a pipeline as an iterator of finished frames, from a causal checkpoint or window after window."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.pipelines.errors import DeviceError
from tilewise.pipelines.generation.settings import OWN_VAE, check_fps
from tilewise.pipelines.generation.tiny_decoding import tiny_decoder_of
from tilewise.pipelines.loading.device import resolve_device
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.pipelines.streaming.checks import check_negative
from tilewise.pipelines.streaming.choice import choose_recipe
from tilewise.pipelines.streaming.decoding import FrameDecoder
from tilewise.pipelines.streaming.opening import Asked, CausalOpening, Opening, WindowOpening
from tilewise.pipelines.streaming.pushed import PushedFrames
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.settings import check_seconds
from tilewise.pipelines.streaming.video_in import check_edit
from tilewise.pipelines.streaming.video_stream import VideoStream
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.plugins.autoencoders.streaming import streaming_decoder, streaming_encoder
from tilewise.plugins.config import MethodLike
from tilewise.plugins.context_parallel.checks import refuse_split
from tilewise.plugins.diffusers_compat import execution_device
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.patching import denoisers_of, is_patched, patch, unpatch
from tilewise.plugins.streaming.kv_cache import KVCache


def stream(
    pipe: Any,
    prompt: str,
    *,
    recipe: CausalRecipe | WindowRecipe | None = None,
    method: MethodLike = "dense",
    cache: KVCache | None = None,
    chunk: int | None = None,
    height: int | None = None,
    width: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    negative: str = "",
    image: NDArray | None = None,
    video: Iterable[NDArray[np.uint8]] | None = None,
    strength: float | None = None,
    fps: float | None = None,
    decode: str = OWN_VAE,
    decode_device: str | torch.device | None = None,
    max_sequence_length: int | None = None,
    way: str | None = None,
    window: int | None = None,
    overlap: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    adain: float | None = None,
    prefix_noise: float | None = None,
    sink: int | None = None,
    previous: int | None = None,
) -> VideoStream:
    """Make a video chunk by chunk, for as long as you like, in constant memory.

        for chunk in tilewise.stream(pipe, "a boat on a lake"):
            show(chunk.frames)                                      uint8 (F, H, W, 3)

    A pipeline with a causal checkpoint (``tilewise.load_causal_checkpoint``) makes it against a KV cache. Any other, whose model
    was trained on whole clips, makes window after window, each of which goes on from the last latents of the one before;
    ``VideoStream.recipe`` says which way it takes.

    Args:
        pipe: a text-to-video pipeline.
        prompt: what to show; ``VideoStream.set_prompt`` changes it on the way.
        recipe: how the weights make video. Default: what ``load_causal_checkpoint`` found, or windows.
        method: attention inside the window; "dense" is exact. A pipeline that is patched already keeps its patch.
        cache: of a causal checkpoint: window, sink, memory and policy. Default: the recipe's.
        chunk: of a causal checkpoint: latent frames of a chunk. Default: the recipe's.
        height, width: pixels. Default: the recipe's, or the model's own.
        seconds: length of the video; None: without end.
        seed: of all noise.
        negative: what to avoid, where there is guidance.
        image: the first frame, (H, W, 3) uint8 or float in 0 … 1, at the size of the video.
        video: that is changed: arrays of uint8 frames (F, H, W, 3) in order, taken as they are needed.
            With ``strength`` alone, ``VideoStream.push_frames`` brings them. As many frames come out.
        strength: noise level that the video is brought to, 0 (it is encoded and decoded) … 1 (nothing of it stays but its
            length). Default: that of a recipe for video to video, or 0.6.
        fps: frames a second on playback, which ``seconds`` counts by. Default: the recipe's, or the model's own.
        decode: what makes frames of latents: "vae", the pipeline's own, or "tiny=PATH", the file of a tiny autoencoder.
        decode_device: where that decodes, such as "cuda:1"; a VAE is moved there while the stream is open. Default: where the
            VAE is.
        max_sequence_length: text tokens. Default: the model's.
        way, window, overlap, steps, guidance, adain, prefix_noise, sink, previous: of windows; see ``WindowRecipe``. Lengths are
            in latent frames. Default: the way that the model was trained for or can go, and the model's own. ``way`` makes
            windows of a pipeline with a causal checkpoint too.

    Returns:
        An iterator of ``Chunk``, and a context manager.

    Raises:
        ConfigError: sizes that the model does not take, options that do not fit, more memory than the device has
            (``explain_stream`` tells how much).
        UnsupportedModelError: a pipeline or VAE that cannot stream, and why.
        ModelError: the file of a tiny autoencoder is missing or none.
        In each case nothing was changed.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError("stream: the prompt is empty: say what the video should show")
    recipe = choose_recipe(
        pipe, recipe, way=way, window=window, overlap=overlap, steps=steps, guidance=guidance, adain=adain,
        prefix_noise=prefix_noise, sink=sink, previous=previous, cache=cache, chunk=chunk,
    )  # fmt: skip
    refuse_split("stream", denoisers_of(pipe), "a stream is made by one process", halves=True)
    fps = float(recipe.fps) if fps is None else fps
    check_fps(fps)
    if seconds is not None:
        check_seconds(seconds)
    check_negative(recipe, negative)
    height, width = recipe.height if height is None else height, recipe.width if width is None else width
    device = execution_device(pipe, pipe.device)
    asked = Asked(
        prompt=prompt,
        negative=negative,
        size=(height, width),
        seed=seed,
        text_tokens=model_defaults(pipe).max_sequence_length if max_sequence_length is None else max_sequence_length,
        frames=None if seconds is None else max(1, round(seconds * fps)),
        device=device,
    )
    edits = video is not None or strength is not None
    if edits:
        strength = check_edit(recipe, strength, with_image=image is not None)
    opening: Opening
    if isinstance(recipe, WindowRecipe):
        opening = WindowOpening(pipe, recipe, asked, image is not None, edits=edits)
    else:
        opening = CausalOpening(pipe, recipe, cache, chunk, asked, edits=edits)
    space = opening.space
    start_picture = None if image is None else _picture(image, height, width)
    if hasattr(pipe.vae, "_hf_hook"):
        raise ConfigError(
            "stream: the pipeline's parts are offloaded, and a stream needs the VAE and the denoiser at the same time; load the "
            "pipeline without CPU offload"
        )
    vae_device = pipe.vae.device
    wanted = vae_device if decode_device is None else _device(decode_device)
    tiny = tiny_decoder_of(pipe, decode, device=wanted)
    decoder = streaming_decoder(pipe.vae) if tiny is None else tiny
    encoder = streaming_encoder(pipe.vae) if edits else None
    opening.memory(wanted, tiny is None).check()

    with contextlib.ExitStack() as undo:
        if not is_patched(pipe):
            patch(pipe, method)
            undo.callback(unpatch, pipe)
        if wanted != vae_device and tiny is None:
            undo.callback(pipe.vae.to, vae_device)
            pipe.vae.to(wanted)
        source = opening.open(undo, start_picture)
        if encoder is not None:
            assert strength is not None
            source.strength = strength
            source.pushed = PushedFrames(
                encoder, space, pipe.vae, size=(height, width), device=pipe.vae.device, factors=space.factors(pipe),
                more=video,
            )  # fmt: skip
        return VideoStream(
            source,
            FrameDecoder(decoder, space, pipe.vae, wanted),
            frames=asked.frames,
            fps=fps,
            close=undo.pop_all().close,
            temporal=space.factors(pipe)[1],
            # Steps of windows wait for the host: the frames of one would come with the next, and a thread makes it instead.
            # A chunk that waits for pushed frames would keep those of the one before.
            beside=runs_beside(device, recipe) and not source.restarts,
            ahead=1 if device.type == "cuda" and isinstance(recipe, CausalRecipe) and not edits else 0,
        )


def runs_beside(device: torch.device, recipe: CausalRecipe | WindowRecipe) -> bool:
    """Whether a window is decoded while the next one is denoised: on a CPU each would only slow the other down."""
    return device.type == "cuda" and isinstance(recipe, WindowRecipe)


def _device(named: str | torch.device) -> torch.device:
    """Raises ConfigError for a device that there is not."""
    try:
        return resolve_device(str(named))
    except DeviceError as error:
        raise ConfigError(f"stream: decode_device: {error}") from error


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
