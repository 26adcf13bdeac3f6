"""Plan the streams of a batch: `streaming.prepare` for input lines, and what decides a stream beside its clip's settings."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from tilewise.pipelines.loading.load import cast_skeleton
from tilewise.pipelines.loading.revision import weights_fingerprint
from tilewise.pipelines.options import field_values
from tilewise.pipelines.streaming.explain import StreamExplanation
from tilewise.pipelines.streaming.preparation import SHARED, StreamWork, check_memory, explain_work, prepare
from tilewise.pipelines.streaming.settings import StreamSettings, stream_window
from tilewise.pipelines.streaming.windows.explain import WindowExplanation
from tilewise.plugins.config import Config
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of

WHERE = ("causal", "decode_device")  # options that say where something lies or runs, and not what is made


@dataclasses.dataclass(frozen=True)
class Streamed:
    """How a stream is made, beside its clip's settings. weights: fingerprint of the causal checkpoint; "": the model's
    own weights are causal."""

    work: StreamWork
    weights: str

    def to_dict(self) -> dict[str, Any]:
        """What decides the video, as JSON values."""
        told = self.work.to_dict()
        settings = {name: value for name, value in told["settings"].items() if name not in WHERE}
        return {**told, "settings": settings, "weights": self.weights}

    @property
    def loaded(self) -> str:
        """Equal for streams that are made with the same causal checkpoint."""
        return str(self.work.checkpoint or "")


def plan_stream(
    skeleton: Any, fields: Mapping[str, Any], *, method: Config, dtype: str, device: torch.device
) -> tuple[Streamed, StreamExplanation | WindowExplanation]:
    """What the fields of a line ask for, of any prompt and seed, and what it would do.

    skeleton: of the model; it is copied. method: attention inside the window. dtype: of the weights, "float32" and the like.
    device: where it will run. Raises as `prepare` does, and ConfigError for a stream without room there.
    """
    named = dict(fields)
    if "window" in named:
        named["window"] = stream_window(str(named["window"]))
    options = StreamSettings(**field_values(StreamSettings, named))
    shared = {name: fields[name] for name in SHARED if name in fields and name not in ("model", "negative", "seed")}
    cast = cast_skeleton(copy.deepcopy(skeleton), getattr(torch, dtype))
    work = prepare(
        cast, "?", options, model=fields["model"], method=method, guidance=fields.get("guidance"), **shared
    )  # fmt: skip
    check_memory(cast, work, device)
    weights = "" if work.checkpoint is None else weights_fingerprint([work.checkpoint])
    return Streamed(work, weights), explain_work(cast, work, device)


def stream_flop(skeleton: Any, streamed: Streamed, explanation: StreamExplanation) -> float:
    """Estimated operations of all denoising passes; windows count as full, as most of them are."""
    chunk = explanation.chunk["latents"]
    temporal = explanation.chunk["frames"] // chunk
    latents = 1 + math.ceil((streamed.work.settings.frames - 1) / temporal)
    total = 0.0
    for row, denoiser in zip(explanation.rows, denoisers_of(skeleton).values(), strict=False):
        family = family_of(denoiser)
        assert family is not None
        linear = 2.0 * sum(weight.numel() for weight in denoiser.parameters()) * row.tokens
        layers = family.layers(denoiser)
        full = sum(4.0 * row.tokens * row.keys * layer.heads * layer.head_dim for layer in layers)
        share = next((share for share in (row.work, row.density) if not math.isnan(share)), 1.0)
        dense = row.passes - row.sparse_passes
        total += row.lanes * (row.passes * linear + full * (dense + share * row.sparse_passes))
    return total * math.ceil(latents / chunk)
