"""Plan the memory of a high-resolution clip before it runs: whether it fits, and which measures make it fit.

    denoise = weights + activations + cache on the device          decode = weights + VAE

Weights are counted. Activations of a denoiser forward are  tokens × (7 d + 1.6 f + 2 d) × bytes:  d channels, f the widest layer;
the first two terms were fitted to stock Wan forwards on an H200 (``memory_estimate``), the last is the second path, 2 d more
where text is part of the sequence. The cache is exact:  branches × blocks × tokens × d × bytes  (``full_path.kept_bytes``). The
VAE's part comes from a run on the meta device, where tensors have a size and no content; in tiles, of one tile, and 4 times the
clip for the tiles that wait to be put together.

What gives, in this order, each on top of the last: the VAE in tiles; part of the cache in pinned host memory; the parts that are
not at work kept off the device (model offload). A plan that still does not fit is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from tilewise.kernels.attention.lse_merge import MAX_SCORES
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.pipelines.latent_spaces.base import LatentSpace, latent_space
from tilewise.pipelines.memory.estimate import OF_WIDEST, OF_WIDTH, _LiveTensors
from tilewise.pipelines.memory.units import gib
from tilewise.plugins.diffusers_compat import execution_device
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.guidance.global_path import draft_bytes, joint, kept_bytes
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of
from tilewise.plugins.torch_compat import uncompiled

# Where text is part of the sequence, attention's two parts and what text told are there at once, and float32 numbers on the way.
GUIDED, MERGING = 2.0, 4
SECOND_PATH = (
    2.0  # hidden states more: the global path's, and the cross-attention on its way from one path to the other
)
WAITING = 4.0  # clips' worth of decoded tiles: overlapping, blended, put together by rows, and whole
TILE = 256  # pixels: diffusers' tiles
UNTOLD = 2**44  # bytes of a frame: beyond, PyTorch's own sizes overflow
CGROUP = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes, and what is done to stay within ``limit``.

    weights: on the device at a time. activations: of a denoiser forward with both paths. cache: of cross-attention, all of it.
    cache_on_device: what of it stays there. vae: of encoding and decoding, beside weights; output: of the clip.
    host_limit: of host memory, for what of the cache is not on the device. vae_tiling, native_tiling: whether the VAE works in
    tiles at the target, and where the native stage is decoded.
    """

    limit: int
    host_limit: int
    weights: int
    activations: int
    cache: int
    cache_on_device: int
    vae: int
    output: int
    vae_tiling: bool
    offload: bool
    native_tiling: bool = False

    @property
    def denoise(self) -> int:
        return self.weights + self.activations + self.cache_on_device

    @property
    def decode(self) -> int:
        return self.weights + self.vae

    @property
    def peak(self) -> int:
        return max(self.denoise, self.decode)

    @property
    def on_host(self) -> int:
        return self.cache - self.cache_on_device

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit and self.on_host <= self.host_limit

    def __str__(self) -> str:
        done = [
            name
            for name, on in (
                ("the VAE in tiles", self.vae_tiling),
                (f"{gib(self.on_host)} of the cache in host memory", self.on_host > 0),
                ("parts that are not at work off the device", self.offload),
            )
            if on
        ]
        return (
            f"memory: {gib(self.peak)} of {gib(self.limit)} (denoising {gib(self.denoise)}: weights {gib(self.weights)}, "
            f"activations {gib(self.activations)}, cache {gib(self.cache_on_device)}; decoding {gib(self.decode)}: VAE "
            f"{gib(self.vae)})" + (f"; {', '.join(done)}" if done else "")
        )

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "peak": self.peak, "fits": self.fits}


def plan_memory(
    pipe: Any,
    grid: Grid,
    *,
    height: int,
    width: int,
    frames: int,
    refresh: int,
    branches: int,
    samples: int = 1,
    limit: int | None = None,
    device: torch.device | None = None,
    draft: Layout | None = None,
    full_path: bool = True,
    native: tuple[int, int] = (0, 0),
) -> MemoryPlan:
    """The plan of a clip of this size; `fits` says whether there is one.

    Args:
        pipe: a loaded pipeline of a kind in ``latent_spaces``, or its skeleton.
        grid: of the target size. height, width: pixels. frames: of the clip.
        refresh: as for ``two_paths``; 1 keeps no cache. branches: texts that the global path guides, 1 or 2.
        samples: of one denoiser forward: 2 where guidance runs as one batch.
        limit: bytes; None: what the device has. device: default: the pipeline's.
        draft: the layout that a global path by draft is over, if there is one. full_path: whether there is a global path at all.
        native: height and width of the stage before, which is decoded too.
    """
    # Where it runs: parts of an offloaded pipeline lie on the CPU until they are at work, or on "meta" where modules are brought
    # one by one. A skeleton, whose device is given, is on "meta" too.
    runs_on = execution_device(pipe, pipe.device)
    offloaded = device is None and pipe.device.type in ("cpu", "meta") and pipe.device != runs_on
    device = runs_on if device is None else device
    limit = device_bytes(device) if limit is None else limit
    host = host_bytes()
    if device.type == "cpu":  # what is planned for there is not free beside it
        host = max(0, device_bytes(device) - limit)
    denoisers = denoisers_of(pipe)
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    one_by_one = offloaded and pipe.device.type == "meta"
    weights = [_bytes(part) for part in (_layers(parts) if one_by_one else parts)]
    activations, cache = 0, 0
    for denoiser in denoisers.values():
        family = family_of(denoiser)
        assert family is not None
        layers = family.layers(denoiser)
        model: Any = denoiser  # which knows what of it is kept in float32, or stored in 8 bits
        size = model.dtype.itemsize
        width_ = max(layer.heads * layer.head_dim for layer in layers)
        widest = max((m.out_features for m in denoiser.modules() if isinstance(m, nn.Linear)), default=width_)
        each = OF_WIDTH * width_ + OF_WIDEST * widest + SECOND_PATH * width_
        guided = full_path and joint(denoiser)
        each += GUIDED * width_ if guided else 0
        merging = MERGING * MAX_SCORES * 4 if guided else 0
        maps = 0 if draft is None else draft_bytes(draft, max(layer.heads for layer in layers))
        activations = max(activations, int(samples * (grid.tokens * each * size + maps)) + merging)
        if refresh > 1:
            cache += branches * kept_bytes(denoiser, grid.video, size)
    resident = max(weights) if offloaded else sum(weights)
    at_target, in_tiles = _in_tiles_if_need_be(pipe, height, width, frames, limit - resident)
    at_native, native_tiles = (
        _in_tiles_if_need_be(pipe, *native, frames, limit - resident) if all(native) else (0, False)
    )
    plan = MemoryPlan(
        limit, host, resident, activations, cache, cache, max(at_target, at_native), _output(height, width, frames), in_tiles,
        False, native_tiles,
    )  # fmt: skip
    plan = _cache_placed(plan)
    if not plan.fits and device.type == "cuda" and not offloaded and getattr(pipe, "model_cpu_offload_seq", None):
        plan = _cache_placed(dataclasses.replace(plan, weights=max(weights), offload=True))
    return plan


def _in_tiles_if_need_be(pipe: Any, height: int, width: int, frames: int, room: int) -> tuple[int, bool]:
    """What encoding and decoding of a size take, and whether in tiles: where the whole has no room, or the user wants tiles."""
    whole = vae_bytes(pipe, height, width, frames)
    if min(height, width) <= TILE or (whole <= room and not getattr(pipe.vae, "use_tiling", False)):
        return whole, False
    tile = vae_bytes(pipe, TILE, TILE, frames) + int(WAITING * _output(height, width, frames))
    return min(tile, whole), tile < whole


def _output(height: int, width: int, frames: int) -> int:
    """Bytes of a clip, float32."""
    return 3 * frames * height * width * 4


def check_plan(plan: MemoryPlan, what: str) -> None:
    """Raises ConfigError, with the plan's numbers, for a plan that does not fit."""
    if plan.fits:
        return
    if plan.weights + plan.activations <= plan.limit and plan.on_host > plan.host_limit:
        short = f"the cache's {gib(plan.on_host)} do not fit into the {gib(plan.host_limit)} of host memory; refresh=1 keeps none"
    elif plan.denoise > plan.limit:
        short = f"denoising needs {gib(plan.denoise)}; give a smaller size or fewer frames"
    else:
        short = f"decoding needs {gib(plan.decode)}; give a smaller size or fewer frames"
    raise ConfigError(f"{what} does not fit: {short}. {plan}")


def vae_bytes(pipe: Any, height: int, width: int, frames: int) -> int:
    """Peak of the live tensors of a decode or an encode in one piece, whichever holds more: run on the meta device, with a VAE of
    the same config.

    The first five latent frames are run: after that, memory grows by the clip itself, which is added. A size for which not even
    that can be counted gets what the clip takes alone.
    """
    vae: Any = uncompiled(pipe.vae)
    space = latent_space(pipe)
    temporal = space.factors(pipe)[1]
    latent_frames, *picture = space.shape(pipe, height, width, frames)
    latent_frames = min(latent_frames, 5)
    config = json.dumps(dict(vae.config), sort_keys=True, default=str)
    kind: Any = type(vae)
    run = 1 + (latent_frames - 1) * temporal
    each = 3 * height * width * vae.dtype.itemsize
    if each > UNTOLD:
        return 2 * each * frames
    decoding = decode_peak(space, kind, config, vae.dtype, latent_frames, *picture)
    encoding = encode_peak(space, kind, config, vae.dtype, run, height, width)
    # The clip: twice while it grows, once where it is read.
    return max(decoding + 2 * each * (frames - run), encoding + each * (frames - run))


@lru_cache(maxsize=32)
def decode_peak(space: LatentSpace, kind: Any, config: str, dtype: torch.dtype, *latents: int) -> int:
    """Peak of the live tensors of a decode of (1, C, *latents) by a VAE of a config."""
    model = _weightless(kind, config, dtype)
    with torch.no_grad(), _LiveTensors() as live:
        space.decode_vae(model, torch.empty(1, space.channels(model), *latents, device="meta", dtype=dtype))
    return live.peak


@lru_cache(maxsize=32)
def encode_peak(space: LatentSpace, kind: Any, config: str, dtype: torch.dtype, *video: int) -> int:
    """The same of an encode of (1, 3, *video)."""
    model = _weightless(kind, config, dtype)
    with torch.no_grad(), _LiveTensors() as live:
        space.encode_vae(model, torch.empty(1, 3, *video, device="meta", dtype=dtype))
    return live.peak


def _weightless(kind: Any, config: str, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        model: Any = kind.from_config({k: v for k, v in json.loads(config).items() if not k.startswith("_")})
    model.eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def device_bytes(device: torch.device) -> int:
    """What a device has for this process: all that is free, and what this process holds already."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return host_bytes() + psutil.Process().memory_info().rss


def free_bytes(device: torch.device) -> int:
    """What a device can still give this process, beyond what it holds."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return host_bytes()


def host_bytes() -> int:
    """Free memory of this machine: what the system can give without swapping, within the control group's limit."""
    free = psutil.virtual_memory().available
    try:
        most, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such group, or one without a limit
        return free
    return min(free, max(0, most - used))


def _cache_placed(plan: MemoryPlan) -> MemoryPlan:
    """The plan with as much of the cache on the device as there is room for."""
    room = max(0, plan.limit - plan.weights - plan.activations)
    return dataclasses.replace(plan, cache_on_device=min(plan.cache, room))


def _layers(parts: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules that hold weights themselves and no other modules."""
    return [module for part in parts for module in part.modules() if not any(module.children())]


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.dtype.itemsize for p in module.parameters())
