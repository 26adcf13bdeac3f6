"""Resolve settings for a pipeline: fill in the model's defaults and reject what the model does not support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilewise.pipelines.conditioning.files import ONE
from tilewise.pipelines.conditioning.inputs import check_references, files_of
from tilewise.pipelines.conditioning.roles import check_roles, share_of_steps
from tilewise.pipelines.conditioning.sizes import size_of_clip
from tilewise.pipelines.generation.settings import OWN_VAE, GenerateSettings, parse_seed
from tilewise.pipelines.generation.tiny_decoding import resolve_decode
from tilewise.pipelines.loading.loras import check_loras, merged_loras, resolve_lora
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.plugins.config import MethodLike, resolve
from tilewise.plugins.diffusers_compat import source_of
from tilewise.plugins.explain import Explanation, explain
from tilewise.plugins.models.common.family import Size


def resolve_settings(
    pipe: Any,
    prompt: str,
    *,
    method: MethodLike = "sta-balanced",
    model: str = "",
    negative: str = "",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | str = 0,
    fps: float | None = None,
    max_sequence_length: int | None = None,
    decode: str = OWN_VAE,
    lora: Sequence[str] | None = None,
    image: str | None = None,
    last_image: str | None = None,
    video: str | None = None,
    mask: str | None = None,
    reference: Sequence[str] = (),
    strength: float | None = None,
) -> GenerateSettings:
    """Settings for a pipeline: what is not given comes from `model_defaults(pipe)`, and the size is checked.

    Diffusers rounds a size that the model cannot make, with a line in the log; here it is an error, so that a clip is
    always as large as it was asked for. The seed may be "random". `pipe` may be a skeleton: no weights are run. The file of a
    tiny autoencoder and those of LoRAs are read. lora: default: those that `load_pipeline` merged into the pipeline. The clip has
    the shape of the picture or video that it is made from, at the model's own area; a video that is changed gives its length and
    rate too.

    Raises ConfigError for a bad value, for a size, with the nearest one that the model takes, and for files that are not there,
    not readable, or not taken by the pipeline; SetupError for a library that it lacks. For a tiny autoencoder raises as
    `tiny_decoding.read_fitting`.
    """
    native = model_defaults(pipe)
    named = {"image": image, "last_image": last_image, "video": video, "mask": mask, "reference": tuple(reference)}
    files = {role: tuple(one.resolved(role) for one in several) for role, several in files_of(named).items()}
    check_roles(pipe, files, strength, native.steps if steps is None else steps)
    check_references(pipe, files)
    size = size_of_clip(
        pipe, files, Size(native.height, native.width, native.frames), height=height, width=width, frames=frames
    )

    def pick(given: Any, default: Any) -> Any:
        return default if given is None else given

    settings = GenerateSettings(
        prompt=prompt,
        negative=negative,
        model=model or source_of(pipe) or type(pipe).__name__,
        method=resolve(method),
        height=size.height,
        width=size.width,
        frames=size.frames,
        steps=pick(steps, native.steps),
        guidance=float(pick(guidance, native.guidance)),
        seed=parse_seed(seed),
        fps=float(pick(fps, pick(size.fps, native.fps))),
        max_sequence_length=pick(max_sequence_length, native.max_sequence_length),
        decode=resolve_decode(pipe, decode),
        lora=merged_loras(pipe) if lora is None else tuple(map(resolve_lora, lora)),
        **{role: str(several[0]) for role, several in files.items() if role in ONE},
        reference=tuple(map(str, files.get("reference", ()))),
        strength=strength,
    )
    check_loras(pipe, settings.lora)
    explain_settings(pipe, settings)
    return settings


def explain_settings(pipe: Any, settings: GenerateSettings) -> Explanation:
    """`tilewise.explain` for these settings; raises ConfigError for a size that the model does not take."""
    share = share_of_steps(pipe, settings.strength)
    return explain(
        pipe,
        height=settings.height,
        width=settings.width,
        frames=settings.frames,
        num_inference_steps=settings.steps,
        strength=1.0 if share is None else share,
        method=settings.method,
    )


def prompt_notes(pipe: Any, settings: GenerateSettings) -> list[str]:
    """What the text encoder will not see of the prompts: words that it does not know, and words past its limit."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        return []
    notes = []
    for name, text in (("prompt", settings.prompt), ("negative prompt", settings.negative)):
        ids = tokenizer(text).input_ids
        limit = settings.max_sequence_length
        if limit is not None and len(ids) > limit:
            notes.append(f"the {name} has {len(ids)} tokens, the model reads the first {limit}")
        strange = _unknown_words(tokenizer, text)
        if strange:
            notes.append(f"the model does not know these words of the {name}: {', '.join(strange)}")
    return notes


def _unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The pieces of a text that the tokenizer turns into its unknown token, punctuation aside, each once."""
    if tokenizer.unk_token_id is None or not tokenizer.is_fast:
        return []
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pieces = (
        text[start:end]
        for token, (start, end) in zip(coded.input_ids, coded.offset_mapping, strict=True)
        if token == tokenizer.unk_token_id
    )
    return list(dict.fromkeys(piece for piece in pieces if any(c.isalnum() for c in piece)))
