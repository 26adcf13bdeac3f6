"""Estimate the memory of a clip before anything is loaded.

    peak = weights + max(one denoiser forward, one decode)

Weights are counted. The decode is run on the meta device, where tensors have sizes and no content, and its live tensors are
added up: exact but for a convolution's scratch memory. Of a long clip the first few latent frames are run, and what the last
of them added is added for each that is left. A denoiser forward takes about

    tokens × (7 d + 1.6 f) × bytes an element        d: heads × head dim, f: the widest layer

of activations, fitted to stock Wan forwards on an H200: 1.3B at 480×832×81 (1.55 GiB) and 10 layers of 14B at 720×1280×81
(8.2 GiB). It is rough for other families. What a step cache keeps comes on top (``cache_bytes``).
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.load import FLOAT32_VAES
from tilewise.plugins.diffusers_compat import source_of
from tilewise.plugins.explain import Explanation
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of

OF_WIDTH, OF_WIDEST = 7.0, 1.6
DECODED = 5  # latent frames that are run; a decoder works frame by frame, and from the third on all are alike

_DECODING = (
    threading.Lock()
)  # a video VAE keeps its causal convolutions' past on itself: one decode of a skeleton at a time


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. denoise, decode: beyond the weights; decode is None where it cannot be told. notes: what is not counted. largest: of
    the weights, those of the largest part."""

    weights: int
    denoise: int
    decode: int | None
    notes: tuple[str, ...]
    largest: int = 0

    @property
    def total(self) -> int:
        return self.weights + max(self.denoise, self.decode or 0)


def estimate_memory(
    skeleton: Any,
    settings: GenerateSettings,
    explanation: Explanation,
    dtype: torch.dtype,
    *,
    decode: bool = True,
    gpus: int = 1,
) -> MemoryEstimate:
    """For one clip, all parts of the pipeline on the device. skeleton: from `load_skeleton`. dtype: as for `load_pipeline`.
    decode: whether that is run too, which takes a second. gpus: that the clip's tokens are split over; it is of one of them."""
    parts, notes = weight_bytes(skeleton, dtype)
    decoding = None
    try:
        if decode:
            with _DECODING:
                decoding = _decode_bytes(skeleton, settings.height, settings.width, settings.frames)
    except (
        Exception
    ) as error:  # a VAE that cannot run without weights, or of another kind: the rest is still worth telling
        notes.append(
            f"the decode is not counted: {str(error).splitlines()[0][:120] if str(error) else type(error).__name__}"
        )
    tokens = -(-max(row.tokens for row in explanation.rows) // gpus)
    denoising = forward_bytes(skeleton, tokens, dtype) + cache_bytes(skeleton, settings, tokens, dtype)
    return MemoryEstimate(sum(parts), denoising, decoding, tuple(notes), max(parts))


def weight_bytes(skeleton: Any, dtype: torch.dtype) -> tuple[list[int], list[str]]:
    """The weights of each part of a pipeline that is still to be loaded, and what is not counted. dtype: for `load_pipeline`."""
    notes = []
    parts = [0]
    for name, part in skeleton.components.items():
        if isinstance(part, nn.Module):
            size = 4 if type(part).__name__ in FLOAT32_VAES else dtype.itemsize
            parts.append(sum(weight.numel() for weight in part.parameters()) * size)
        elif part is None and name.startswith(("text_encoder", "image_encoder")):
            folder = Path(source_of(skeleton)) / name
            numbers = _numbers_in(folder)
            parts.append((numbers or 0) * dtype.itemsize)
            if numbers is None:
                notes.append(f"{name} is not counted: its files are not here")
    return parts, notes


def forward_bytes(pipe: Any, tokens: int, dtype: torch.dtype) -> int:
    """About the activations of a denoiser forward over so many tokens."""
    most = 0.0
    for denoiser in denoisers_of(pipe).values():
        family = family_of(denoiser)
        assert family is not None
        width = max((layer.heads * layer.head_dim for layer in family.layers(denoiser)), default=0)
        widest = max((m.out_features for m in denoiser.modules() if isinstance(m, nn.Linear)), default=width)
        most = max(most, OF_WIDTH * width + OF_WIDEST * widest)
    return int(tokens * most * dtype.itemsize)


def cache_bytes(pipe: Any, settings: GenerateSettings, tokens: int, dtype: torch.dtype) -> int:
    """About what a step cache keeps from one step to the next, for each branch of guidance: residuals and outputs of layers."""
    cache = settings.method.step_cache
    if cache is None:
        return 0
    total = 0.0
    for denoiser in denoisers_of(pipe).values():
        family = family_of(denoiser)
        assert family is not None
        layers = family.layers(denoiser)
        width = max((layer.heads * layer.head_dim for layer in layers), default=0)
        total += cache.kept(len(layers)) * width
    return int(total * tokens * dtype.itemsize * (2 if settings.guidance > 1 else 1))


@lru_cache(maxsize=64)
def _decode_bytes(skeleton: Any, height: int, width: int, frames: int) -> int:
    """Peak of the live tensors of `vae.decode` for a clip of this size, on the meta device. Under _DECODING only."""
    vae = skeleton.vae
    if next(vae.parameters()).device.type != "meta":
        raise ValueError("the VAE has weights; only a skeleton's can be run without work")
    channels = int(getattr(vae.config, "z_dim", None) or vae.config.latent_channels)
    spatial = int(getattr(skeleton, "vae_scale_factor_spatial", None) or skeleton.vae_scale_factor)
    temporal = int(getattr(skeleton, "vae_scale_factor_temporal", None) or 1)
    small = (height // spatial, width // spatial)
    video = any(isinstance(module, nn.Conv3d) for module in vae.modules())
    count = (frames - 1) // temporal + 1 if video else frames

    def run(count: int) -> tuple[int, int]:
        """Of decoding so many latent frames: the peak, and what is alive while the pictures are joined (0: they are not)."""
        shape = (1, channels, count, *small) if video else (count, channels, *small)
        with torch.no_grad(), _LiveTensors() as live:
            pictures = vae.decode(torch.empty(shape, device="meta"), return_dict=False)[0]
        return live.peak, live.joining.get(pictures.nbytes, 0)

    if count <= DECODED:
        return run(count)[0]
    # Some decoders join their frames one by one, by a copy: a long clip's two copies outgrow what a frame's layers need.
    return max(
        last + (count - DECODED) * (last - before) for before, last in zip(run(DECODED - 1), run(DECODED), strict=True)
    )


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed. peak: the most bytes alive at a time. joining: the
    same after concatenations, by the bytes of what each gave."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.joining: dict[int, int] = {}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.now += self._sizes[key]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, key)
                if func is torch.ops.aten.cat.default:
                    self.joining[tensor.nbytes] = max(self.now, self.joining.get(tensor.nbytes, 0))
        return out

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def _numbers_in(folder: Path) -> int | None:
    """How many numbers the safetensors files of a folder hold, by their headers; None if there is no such file."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    total = 0
    for file in files:
        with safe_open(file, framework="np") as content:
            for name in content.keys():  # noqa: SIM118 - no dictionary: it cannot be iterated
                total += torch.Size(content.get_slice(name).get_shape()).numel()
    return total
