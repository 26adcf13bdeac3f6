"""A stream that was asked for by names and numbers: checked without weights, then opened."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilewise.pipelines.conditioning.inputs import Inputs, files_of, first_picture, video_frames
from tilewise.pipelines.conditioning.sizes import check_kinds
from tilewise.pipelines.generation.settings import OWN_VAE, GenerateSettings, check_fps
from tilewise.pipelines.generation.tiny_decoding import resolve_decode
from tilewise.pipelines.loading.device import resolve_device
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.loading.loras import LoraChoice, resolve_lora
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.pipelines.loading.model_folder import find_model
from tilewise.pipelines.streaming.checkpoints.known import RECIPES
from tilewise.pipelines.streaming.checkpoints.load import load_causal_checkpoint, merge_lora, recipe_of_checkpoint
from tilewise.pipelines.streaming.checks import cache_of, check_negative, check_stream
from tilewise.pipelines.streaming.explain import StreamExplanation, explain_stream
from tilewise.pipelines.streaming.memory import denoisers_used, memory_of, window_memory
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.settings import StreamSettings
from tilewise.pipelines.streaming.stream import stream
from tilewise.pipelines.streaming.video_in import check_edit, length_of_video
from tilewise.pipelines.streaming.video_stream import VideoStream
from tilewise.pipelines.streaming.windows.earlier import check_earlier
from tilewise.pipelines.streaming.windows.explain import WindowExplanation
from tilewise.pipelines.streaming.windows.plan import (
    UNTRAINED,
    check_start,
    check_windows,
    window_recipe,
    window_settings,
    window_space,
)
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.plugins.autoencoders.streaming import streaming_decoder, streaming_encoder
from tilewise.plugins.config import MethodLike, resolve
from tilewise.plugins.errors import ConfigError, unknown
from tilewise.plugins.patching import check_config, denoisers_of
from tilewise.plugins.streaming.kv_cache import ADD_REFUSED, KEEP_REFUSED, STEP_CACHE_REFUSED, KVCache

CAUSAL_FOLDER = "causal"  # of a model folder
SHARED = (
    "model",
    "negative",
    "seed",
    "fps",
    "height",
    "width",
    "max_sequence_length",
    "decode",
    "lora",
    "image",
    "video",
    "strength",
)  # with other clips


@dataclasses.dataclass(frozen=True)
class StreamWork:
    """A checked stream. settings: of the clip. options: as given. recipe: with what they change. checkpoint: None where the
    model's own weights are causal, or make windows."""

    settings: GenerateSettings
    options: StreamSettings
    recipe: CausalRecipe | WindowRecipe
    checkpoint: Path | None

    @property
    def cache(self) -> KVCache | None:
        """The KV cache; windows have none."""
        return None if isinstance(self.recipe, WindowRecipe) else cache_of(self.recipe, self.options.storage)

    def to_dict(self) -> dict[str, Any]:
        """What makes the stream again, beside the clip's settings: JSON values only."""
        return {"settings": self.options.to_dict(), "recipe": self.recipe.to_dict()}

    def until(self, frames: int) -> StreamWork:
        """The work of a stream that was ended after so many frames."""
        if frames == self.settings.frames:
            return self
        return dataclasses.replace(
            self,
            settings=dataclasses.replace(self.settings, frames=frames),
            options=self.options.until(frames / self.settings.fps),
        )

    def with_prompts(self, prompts: Sequence[tuple[int, str]]) -> StreamWork:
        """The work of a stream that was made with these prompts. prompts: (first frame, text), the first one at frame 0."""
        (_, first), *others = prompts
        changes = tuple(f"{frame / self.settings.fps:.9f}s={prompt}" for frame, prompt in others)
        return dataclasses.replace(
            self,
            settings=dataclasses.replace(self.settings, prompt=first),
            options=dataclasses.replace(self.options, prompt_at=changes),
        )


def prepare(
    skeleton: Any,
    prompt: str,
    options: StreamSettings,
    *,
    model: str,
    method: MethodLike = "dense",
    recipe: CausalRecipe | WindowRecipe | None = None,
    guidance: float | None = None,
    **shared: Any,
) -> StreamWork:
    """Check a stream and choose its recipe; no weights are read.

    Args:
        skeleton: the model's pipeline, with or without weights.
        model: its name ("demo", a folder, a hub id), beside whose weights a causal checkpoint may lie.
        method: attention inside the window.
        recipe: of an earlier stream that is made again; None: the one that the options or the checkpoint's files name.
        guidance: scale of the guidance; None: the recipe's.
        shared: those of SHARED that were given.

    Raises:
        ConfigError, UnsupportedModelError, ModelError: what cannot be, or is not there.
    """
    found, checkpoint = recipe_for(skeleton, options, model=model, recipe=recipe, guidance=guidance)
    check_negative(found, shared.get("negative"))
    files = {role: tuple(one.resolved(role) for one in named) for role, named in files_of(shared).items()}
    check_kinds(files)
    fps = float(found.fps if shared.get("fps") is None else shared["fps"])
    strength = None
    if "video" in files:
        strength = check_edit(found, shared.get("strength"), with_image="image" in files)
        options, fps = length_of_video(files["video"][0].path, options, shared.get("fps"), fps)
    elif shared.get("strength") is not None:
        raise ConfigError("strength is how far a stream may go from a video: give --video too")
    if options.seconds is None:
        raise ConfigError("a stream needs its length: give --seconds")
    check_fps(fps)
    if options.decode_device is not None:
        resolve_device(options.decode_device)
    height, width = (shared.get(name) or getattr(found, name) for name in ("height", "width"))
    decode = resolve_decode(skeleton, shared.get("decode", OWN_VAE))
    if decode == OWN_VAE:
        streaming_decoder(skeleton.vae, fuse=False)
    if strength is not None:
        streaming_encoder(skeleton.vae, fuse=False)
    config = resolve(method)
    if isinstance(found, WindowRecipe):
        found = found.replace(height=height, width=width)
        check_earlier(found, config)
        used = denoisers_of(skeleton)
    else:
        check_stream(
            skeleton, found, cache_of(found, options.storage), chunk=found.chunk, height=height, width=width,
            edits=strength is not None,
        )  # fmt: skip
        if config.step_cache is not None:
            raise ConfigError(STEP_CACHE_REFUSED)
        if config.add is not None:
            raise ConfigError(ADD_REFUSED)
        if config.keep is not None:
            raise ConfigError(KEEP_REFUSED)
        used = denoisers_used(skeleton, found)
    for name, denoiser in used.items():
        check_config(name, denoiser, config.prepare(skeleton, denoiser))
    tokens = shared.get("max_sequence_length")
    settings = GenerateSettings(
        prompt=prompt,
        negative=shared.get("negative") or "",
        model=model,
        method=config,
        height=height,
        width=width,
        frames=max(1, round(options.seconds * fps)),
        steps=found.steps if isinstance(found, WindowRecipe) else len(found.timesteps),
        guidance=found.guidance,
        seed=shared.get("seed", 0),
        fps=fps,
        max_sequence_length=model_defaults(skeleton).max_sequence_length if tokens is None else tokens,
        decode=decode,
        lora=tuple(map(resolve_lora, shared.get("lora") or ())),
        image=str(files["image"][0]) if "image" in files else None,
        video=str(files["video"][0]) if "video" in files else None,
        strength=strength,
    )
    if isinstance(found, WindowRecipe):
        check_windows(skeleton, found, window_of(skeleton, found, settings))
        check_start(skeleton, found, "image" in files, "video" in files)
    return StreamWork(settings, options, found, checkpoint)


def window_of(skeleton: Any, recipe: WindowRecipe, settings: GenerateSettings) -> GenerateSettings:
    """The settings of one window of a stream, without a picture."""
    window = window_settings(skeleton, window_space(skeleton), recipe, prompt=settings.prompt, negative=settings.negative,
                             model=settings.model, method=settings.method, seed=settings.seed)  # fmt: skip
    return dataclasses.replace(window, max_sequence_length=settings.max_sequence_length)


def find_causal(model: str, options: StreamSettings) -> Path | None:
    """The causal checkpoint that options name, or that lies in a model's folder; None where there is none."""
    if options.causal is not None:
        return Path(options.causal).expanduser()
    source = find_model(model)
    folder = source / CAUSAL_FOLDER if isinstance(source, Path) else None
    if folder is not None and folder.is_dir():
        files = list(folder.glob("*.safetensors"))
        return files[0] if len(files) == 1 else folder  # a LoRA alone is named by its file
    return None


def recipe_for(
    skeleton: Any,
    options: StreamSettings,
    *,
    model: str,
    recipe: CausalRecipe | WindowRecipe | None = None,
    guidance: float | None = None,
) -> tuple[CausalRecipe | WindowRecipe, Path | None]:
    """The recipe of a stream with what its options change, and the causal checkpoint; arguments and errors as for `prepare`.

    Windows are made where a way is named, and where there is neither a causal checkpoint nor the name of a recipe.
    """
    windows = isinstance(recipe, WindowRecipe) or options.way is not None
    checkpoint = None if windows else find_causal(model, options)
    if windows or (checkpoint is None and options.recipe is None and recipe is None):
        why = (
            f"this one makes windows, by the way {options.way}"
            if options.way is not None
            else f"the model {model} comes without a causal checkpoint: give one with --causal, a file or folder "
            "(docs/causal-checkpoints.md lists those that load), or a --recipe where the model's own weights are causal"
        )
        options.refuse_others(windows=True, why=why)
        said = {**options.windows(), **({} if guidance is None else {"guidance": guidance})}
        return recipe.replace(**said) if isinstance(recipe, WindowRecipe) else window_recipe(skeleton, **said), None
    assert not isinstance(recipe, WindowRecipe)
    options.refuse_others(windows=False, why="this one goes by a causal checkpoint: name a --way to make windows")
    if checkpoint is not None:
        found = recipe_of_checkpoint(checkpoint, skeleton, recipe=recipe or options.recipe)
    else:
        found = recipe or _named(options.recipe)
    found = options.applied(found)
    return found if guidance is None else found.replace(guidance=guidance), checkpoint


def explain_work(skeleton: Any, work: StreamWork, device: torch.device) -> StreamExplanation | WindowExplanation:
    """`explain_stream` of a stream that is to be made. skeleton: the model's pipeline, in the types that it will have. device:
    where it will be loaded."""
    settings = work.settings
    return explain_stream(
        skeleton, recipe=work.recipe, method=settings.method, cache=work.cache, height=settings.height, width=settings.width,
        device=device, decode=settings.decode, decode_device=work.options.decode_device, edits=settings.video is not None,
    )  # fmt: skip


def check_memory(skeleton: Any, work: StreamWork, device: torch.device) -> None:
    """Refuse a stream that the device has no room for, before weights are read. Raises ConfigError; arguments: `explain_work`."""
    recipe, size = work.recipe, (work.settings.height, work.settings.width)
    own_vae = work.settings.decode == OWN_VAE
    if isinstance(recipe, WindowRecipe):
        window_memory(
            skeleton, window_space(skeleton), window_of(skeleton, recipe, work.settings), recipe, device=device,
            decode_device=work.options.decode_device, own_vae=own_vae,
        ).check()  # fmt: skip
        return
    cache = cache_of(recipe, work.options.storage)
    space, grid = check_stream(skeleton, recipe, cache, chunk=recipe.chunk, height=size[0], width=size[1],
                               edits=work.settings.video is not None)  # fmt: skip
    memory_of(
        skeleton, space, recipe, cache, grid, size, device=device, decode_device=work.options.decode_device,
        own_vae=own_vae, exact=False,
    ).check()  # fmt: skip


def load(work: StreamWork, *, device: str = "auto", dtype: str = "auto") -> Any:
    """The pipeline of a stream, with the causal weights in it. Raises ModelError and others, as those who load it do."""
    pipe = load_pipeline(work.settings.model, device=device, dtype=dtype)
    put_weights(pipe, work)
    return pipe


def put_weights(pipe: Any, work: StreamWork) -> None:
    """Put the causal weights into a loaded pipeline. Raises as `load_causal_checkpoint`."""
    if work.checkpoint is not None:
        assert isinstance(work.recipe, CausalRecipe)
        load_causal_checkpoint(work.checkpoint, pipe, recipe=work.recipe)
    for choice in map(LoraChoice.parse, work.settings.lora):
        merge_lora(pipe, choice.path, choice.weight)


def open_stream(pipe: Any, work: StreamWork) -> VideoStream:
    """The stream, with its changes of the prompt planned."""
    settings, options = work.settings, work.options
    files = Inputs.of(settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", UNTRAINED)  # which `window_notes` told
        video = stream(
            pipe,
            settings.prompt,
            recipe=work.recipe,
            method=settings.method,
            cache=work.cache,
            height=settings.height,
            width=settings.width,
            seconds=options.seconds,
            seed=settings.seed,
            negative=settings.negative,
            image=np.asarray(first_picture(files)) if "image" in files.files else None,
            video=video_frames(files) if "video" in files.files else None,
            strength=settings.strength,
            fps=settings.fps,
            decode=settings.decode,
            decode_device=options.decode_device,
            max_sequence_length=settings.max_sequence_length,
        )
    try:
        for time, prompt in options.prompts():
            video.set_prompt(prompt, options.prompt_change, options.prompt_over, at=time)
    except BaseException:
        video.close()
        raise
    return video


def stream_of(told: Mapping[str, Any]) -> tuple[StreamSettings, CausalRecipe | WindowRecipe]:
    """What `StreamWork.to_dict` wrote. Raises ConfigError for anything else."""
    if not isinstance(told, Mapping) or not all(isinstance(told.get(name), Mapping) for name in ("settings", "recipe")):
        raise ConfigError("what the clip says of its stream is incomplete, or of another kind")
    kind: Any = WindowRecipe if "way" in told["recipe"] else CausalRecipe
    return StreamSettings.from_dict(told["settings"]), kind.from_dict(told["recipe"])


def _named(recipe: str | None) -> CausalRecipe:
    assert recipe is not None
    if recipe not in RECIPES:
        raise unknown("causal recipe", recipe, RECIPES)
    return RECIPES[recipe]
