"""``raunet``: a resolution-aware UNet, for pictures past the training size (HiDiffusion, arXiv 2311.17528, §4.2, RAU-Net).

Past its training size a UNet's deeper feature maps are larger than they ever were in training, and the picture repeats objects.
In the first steps its deeper levels get maps of the usual size, by two changes of which each has a partner on the way up:

    coarse conv      the convolution that leaves a level skips every other row and column: dilation 2, stride 4 in place of 2,
                     conv(x[::2, ::2])                    up: nearest neighbours to the size that the level had
    coarse level     after the first attention block of a level the map is averaged over 2 × 2
                                                          up: bicubic to the size that it had, after the last such block

With n steps, h × w latents and thresholds T1, T2 (shares of the steps):

    SD 1.5, 2.1      coarse conv at level 0 while step < T1·n, coarse level 1 while step < T2·n
    SDXL             coarse level 1 while step < T1·n, coarse conv at level 1 while step < T2·n
                     below 4096 pixels: coarse conv while step < 8/50·n, then coarse level while step < T1·n (not for inpainting)
    SDXL-Turbo       coarse level 1 while step < T1·n

    SD: T1 0.4, T2 0;  from 2048 pixels 0.7, 0.3        SDXL: 0.4, 0 (ControlNet from noise: 0.5, 0);  from 4096 0.7, 0.3
    SDXL-Turbo: 0.5, 0

Residuals of ControlNets are resampled to the maps that they are added to. At the training size and below nothing is changed.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from tilewise.plugins.additions.base import Addition, Report, register_addition
from tilewise.plugins.diffusers_compat import source_of
from tilewise.plugins.errors import ConfigError, UnsupportedModelError, unknown
from tilewise.plugins.methods.base import Method
from tilewise.plugins.torch_compat import outside_graphs

SERVED = "UNet2DConditionModel"
VARIANTS = ("sd", "sdxl", "sdxl-turbo")
LEVELS = {"sd": 4, "sdxl": 3, "sdxl-turbo": 3}
FIRST_STEPS = 8 / 50  # of SDXL: the share with the coarser conv
LARGE = {"sd": 256, "sdxl": 512}  # latents: from here on, both sides, the thresholds are others
Pair = tuple[int, int]


@register_addition
@dataclass(frozen=True)
class RAUNet(Addition):
    """RAU-Net of HiDiffusion.

    Args:
        t1, t2: thresholds, shares of the steps in [0, 1]. Default: the paper's for the model and size.
        variant: "sd" (1.5, 2.1), "sdxl" or "sdxl-turbo". Default: by the UNet's levels, and "turbo" in the model's name.

    Raises:
        ConfigError: for values that cannot be.
    """

    t1: float | None = None
    t2: float | None = None
    variant: str | None = None

    name: ClassVar[str] = "raunet"

    def __post_init__(self) -> None:
        self._number("t1", 0, 1, optional=True)
        self._number("t2", 0, 1, optional=True)
        if self.variant is not None and self.variant not in VARIANTS:
            raise unknown("variant of raunet", self.variant, VARIANTS)
        if self.variant == "sdxl-turbo" and self.t2:
            raise ConfigError(f"raunet: sdxl-turbo has no second change; leave t2 out, got {self.t2}")

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        blocks: Any = getattr(denoiser, "down_blocks", None)
        if self.variant is not None or not blocks:
            return self
        if _attentions(blocks[0]):
            variant = "sd"
        else:
            named = f"{source_of(target)} {source_of(denoiser)}"
            variant = "sdxl-turbo" if "turbo" in named.lower() else "sdxl"
        return dataclasses.replace(self, variant=variant)

    def check(self, name: str, denoiser: nn.Module, method: Method, beside: Sequence[str]) -> None:
        model = type(denoiser).__name__
        if not any(cls.__name__ == SERVED for cls in type(denoiser).__mro__):
            raise UnsupportedModelError(
                f"raunet changes the levels of a {SERVED} (SD 1.5, SD 2.1, SDXL); {name} is a {model}. Nothing was changed"
            )
        assert self.variant is not None
        unet: Any = denoiser
        levels = LEVELS[self.variant]
        coarse = _attentions(unet.down_blocks[1]) if len(unet.down_blocks) == levels else []
        if not coarse or len(_attentions(unet.up_blocks[-2])) <= len(coarse):
            raise UnsupportedModelError(
                f"raunet: {self.variant} has {levels} levels with attention at the second one; the blocks of {name} are "
                f"{[type(block).__name__ for block in unet.down_blocks]}. Nothing was changed"
            )

    def put_on(self, state: Any, denoiser: nn.Module, handles: list[Any]) -> Report:
        return _Running(self, state).put_on(denoiser, handles)

    def thresholds(self, size: Pair, control: bool) -> tuple[float, float]:
        """(T1, T2) of latents of a size. control: whether a ControlNet guides a run that begins with noise alone."""
        assert self.variant is not None
        if self.variant == "sdxl-turbo":
            t1, t2 = 0.5, 0.0
        elif min(size) >= LARGE[self.variant]:
            t1, t2 = 0.7, 0.3
        else:
            t1, t2 = (0.5 if control and self.variant == "sdxl" else 0.4), 0.0
        return (t1 if self.t1 is None else self.t1), (t2 if self.t2 is None else self.t2)

    def coarse(self, size: Pair, step: int, steps: int, control: bool, inpainting: bool) -> tuple[bool, bool]:
        """(coarse conv, coarse level) at step ``step`` of ``steps``, counted within the run."""
        t1, t2 = self.thresholds(size, control)
        first, second = step < int(steps * t1), step < int(steps * t2)
        if self.variant == "sd":
            return first, second
        if self.variant == "sdxl" and self.t2 is None and min(size) < LARGE["sdxl"] and not inpainting:
            begun = int(steps * FIRST_STEPS)
            return step < begun, first and step >= begun
        return second, first


class _Forward(threading.local):
    """What one forward goes by.

    conv, level: whether the two changes are on. sizes: of what each level's downsampler was given. before: of the map that was
    averaged.
    """

    def __init__(self) -> None:
        self.conv = self.level = False
        self.sizes: dict[int, Pair] = {}
        self.before: Pair | None = None


class _Running:
    """The hooks on one UNet."""

    def __init__(self, addition: RAUNet, state: Any) -> None:
        self.addition, self.state = addition, state
        self.forward = _Forward()
        self.counts = {"forwards": 0, "coarse conv": 0, "coarse level": 0}
        self.lock = threading.Lock()

    def put_on(self, unet: Any, handles: list[Any]) -> Report:
        forward, levels = self.forward, len(unet.down_blocks)
        at_conv = 0 if self.addition.variant == "sd" else 1  # the level whose downsampler is the coarse one

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return self._begin(module, args, kwargs, at_conv)

        def end(*_: Any) -> None:
            forward.conv = forward.level = False
            forward.sizes.clear()
            forward.before = None

        handles.append(unet.register_forward_pre_hook(outside_graphs(begin), with_kwargs=True))
        handles.append(unet.register_forward_hook(outside_graphs(end), always_call=True))
        for level, block in enumerate(unet.down_blocks):
            for sampler in getattr(block, "downsamplers", None) or ():
                hook = self._down(level, level == at_conv)
                handles.append(sampler.register_forward_pre_hook(outside_graphs(hook), with_kwargs=True))
        for number, block in enumerate(unet.up_blocks):
            for sampler in getattr(block, "upsamplers", None) or ():
                hook = self._up(levels - 2 - number)
                handles.append(sampler.register_forward_pre_hook(outside_graphs(hook), with_kwargs=True))
        down, up = _attentions(unet.down_blocks[1]), _attentions(unet.up_blocks[-2])
        handles.append(down[0].register_forward_hook(outside_graphs(self._average())))
        handles.append(up[len(down) - 1].register_forward_hook(outside_graphs(self._enlarge())))
        for block in [*unet.down_blocks, *unet.up_blocks, unet.mid_block]:
            for attention in _attentions(block):
                handles += [attention.register_forward_pre_hook(outside_graphs(self._seen()), with_kwargs=True)]
        return self.report

    def report(self) -> str | None:
        """For ``summary``."""
        done = self.counts
        if not done["forwards"]:
            return None
        return (
            f"raunet ({self.addition.variant}): of {done['forwards']} forwards {done['coarse conv']} with a coarse conv and "
            f"{done['coarse level']} with a coarse level"
        )

    # ── a forward ────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, unet: Any, args: tuple, kwargs: dict[str, Any], at_conv: int) -> tuple[tuple, dict[str, Any]]:
        forward, addition = self.forward, self.addition
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        size = (sample.shape[-2], sample.shape[-1])
        controlled = kwargs.get("mid_block_additional_residual") is not None
        if kwargs.get("down_intrablock_additional_residuals") is not None or (
            not controlled and kwargs.get("down_block_additional_residuals") is not None
        ):
            raise UnsupportedModelError(
                "raunet: the forward was given residuals of a T2I-Adapter, which are for maps of the usual sizes; leave the "
                "adapter or raunet out"
            )
        forward.conv = forward.level = False
        if size[0] * size[1] > _native(unet):
            at = self.state.steps.of(timestep if isinstance(timestep, torch.Tensor) else torch.tensor(timestep))
            inpainting = unet.config.in_channels == 9
            forward.conv, forward.level = addition.coarse(
                size, at.step - at.first, at.steps, controlled and at.first == 0, inpainting
            )
        with self.lock:
            self.counts["forwards"] += 1
            self.counts["coarse conv"] += forward.conv
            self.counts["coarse level"] += forward.level
        if controlled and (forward.conv or forward.level):
            kwargs = self._resampled(unet, size, kwargs, at_conv)
        return args, kwargs

    def _resampled(self, unet: Any, size: Pair, kwargs: dict[str, Any], at_conv: int) -> dict[str, Any]:
        """The arguments with a ControlNet's residuals in the sizes of the maps that they are added to."""
        sizes = [size]
        for level, block in enumerate(unet.down_blocks):
            for number in range(len(block.resnets)):
                if number == 0 and level == 1 and self.forward.level:
                    sizes.append(_half(size))
                    size = sizes[-1]
                else:
                    sizes.append(size)
            for sampler in block.downsamplers or ():
                size = _half(size) if level == at_conv and self.forward.conv else size
                size = _half(size) if sampler.padding else (size[0] // 2, size[1] // 2)
                sizes.append(size)
        residuals = kwargs["down_block_additional_residuals"]
        found = tuple(_resized(one, to) for one, to in zip(residuals, sizes, strict=True))
        middle = _resized(kwargs["mid_block_additional_residual"], size)
        return {**kwargs, "down_block_additional_residuals": found, "mid_block_additional_residual": middle}

    def _down(self, level: int, coarse: bool) -> Callable[..., Any]:
        forward = self.forward

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            if not (forward.conv or forward.level):
                return None
            hidden, args = args[0], args[1:]
            forward.sizes[level] = (hidden.shape[2], hidden.shape[3])
            # A convolution of stride 4 and dilation 2 is the stock one, of stride 2, on every other row and column.
            return (hidden[:, :, ::2, ::2] if coarse and forward.conv else hidden, *args), kwargs

        return before

    def _up(self, level: int) -> Callable[..., Any]:
        forward = self.forward

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            size = forward.sizes.get(level)
            if size is None:
                return None
            return (args[0], size, *args[2:]), {key: x for key, x in kwargs.items() if key != "output_size"}

        return before

    def _average(self) -> Callable[..., Any]:
        forward = self.forward

        def after(module: nn.Module, args: tuple, output: tuple) -> Any:
            if not forward.level:
                return None
            forward.before = (output[0].shape[2], output[0].shape[3])
            return (F.avg_pool2d(output[0], 2, ceil_mode=True), *output[1:])

        return after

    def _enlarge(self) -> Callable[..., Any]:
        forward = self.forward

        def after(module: nn.Module, args: tuple, output: tuple) -> Any:
            if not forward.level or forward.before is None:
                return None
            return (F.interpolate(output[0], size=forward.before, mode="bicubic"), *output[1:])

        return after

    def _seen(self) -> Callable[..., Any]:
        """Tells the method the size of the map that the layers of an attention block are about to attend over."""
        forward, state = self.forward, self.state

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            changed = forward.conv or forward.level
            state.forward.map = (hidden.shape[2], hidden.shape[3]) if changed else None

        return before


def _attentions(block: Any) -> list[Any]:
    return list(getattr(block, "attentions", None) or ())


def _native(unet: Any) -> int:
    """Latents that the UNet was trained on; 0 where its config does not say."""
    size = getattr(unet.config, "sample_size", None)
    if size is None:
        return 0
    return size * size if isinstance(size, int) else size[0] * size[1]


def _half(size: Pair) -> Pair:
    return -(-size[0] // 2), -(-size[1] // 2)


def _resized(x: torch.Tensor, size: Pair) -> torch.Tensor:
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size=size, mode="bicubic")
