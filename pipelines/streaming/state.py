"""The state of a stream between two chunks: what it needs to go on, in this process or another.

The whole state has the KV caches, and the stream goes on bit for bit. The small one has latents instead, of the sink and of the
last frames. Keys and values are computed anew from them, so that what follows looks alike and is not equal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.streaming.source import under
from tilewise.plugins.autoencoders.tiny_streaming import TinyStreamingDecoder
from tilewise.plugins.errors import ConfigError

if TYPE_CHECKING:
    from tilewise.pipelines.streaming.video_stream import VideoStream

FORMAT = 4


@dataclass(frozen=True)
class StreamState:
    """What ``VideoStream.state_dict`` gives. values: JSON values. tensors: on the CPU, by name."""

    values: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file. Raises OutputError."""
        try:
            save_file(self.tensors, path, metadata={"tilewise stream": json.dumps(self.values)})
        except (OSError, RuntimeError) as error:
            raise OutputError(f"could not write the state of the stream to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> StreamState:
        """Read what ``save`` wrote. Raises ConfigError for a file of another kind."""
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get("tilewise stream")
            if told is None:
                raise ConfigError(f"{path} holds no state of a stream")
            return cls(json.loads(told), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def state_of(stream: VideoStream, *, small: bool) -> StreamState:
    """The state of a stream."""
    stream.finish_under_way()
    values, tensors = stream.source.state(small)
    values |= {
        "format": FORMAT,
        **stream.source.identity(),
        "decoder": _decoder_of(stream),
        "chunks": stream.chunks,
        "frames_out": stream.frames_out,
        "prompt": stream.prompts.prompt,
        "ready": [],
    }
    tensors |= {f"decoder.{name}": tensor for name, tensor in stream.decoder.decoder.state_dict().items()}
    for i, chunk in enumerate(stream.under_way):
        tensors[f"ready.{i}.frames"] = torch.from_numpy(chunk.frames.result())
        tensors[f"ready.{i}.latents"] = chunk.latents
        values["ready"].append([chunk.first_latent, chunk.prompt])
    for name, (states, told) in stream.prompts.waiting_state().items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in states.items()}
        values[name] = told
    return StreamState(values, {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})


def restore(stream: VideoStream, state: StreamState) -> None:
    """Put a stream that was just made into a state.

    Raises:
        ConfigError: the state is of another size, recipe or cache, or the stream has begun.
    """
    values, tensors = state.values, state.tensors
    own: dict[str, Any] = {"format": FORMAT, **stream.source.identity(), "decoder": _decoder_of(stream)}
    for name, value in own.items():
        if values.get(name) != value:
            raise ConfigError(
                f"load_state_dict: the state's {name} is {values.get(name)}, this stream's {value}; make the stream "
                "with the same checkpoint, recipe, size, method and decoder"
            )
    if stream.chunks:
        raise ConfigError(
            "load_state_dict: the stream has begun; make a new one and load the state before its first chunk"
        )
    prompts, device = stream.prompts, stream.source.device
    prompts.prompt = values["prompt"]
    prompts.load_waiting(
        {name: (under(name, tensors), values[name]) for name in ("waiting", "planned", "blend") if name in values},
        device,
    )
    stream.source.load_state(values, tensors)
    decoder = stream.decoder
    decoder.decoder.load_state_dict({n: t.to(decoder.device) for n, t in under("decoder", tensors).items()})
    ready = [
        (tensors[f"ready.{i}.frames"], tensors[f"ready.{i}.latents"].to(device), *told)
        for i, told in enumerate(values["ready"])
    ]
    stream.go_on(values["chunks"], values["frames_out"], ready)


def _decoder_of(stream: VideoStream) -> str:
    """Which decoder goes on from a state; tiny ones differ by their files."""
    decoder = stream.decoder.decoder
    return decoder.name + (f" {decoder.sha256}" if isinstance(decoder, TinyStreamingDecoder) else "")
