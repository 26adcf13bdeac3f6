"""``soft-pag``: guidance away from a forward whose chosen heads look less around (SoftPAG, arXiv 2506.10978; PAG, 2403.17377).

A second forward of the prompt's samples has other attention in some heads, by which each token keeps a share u of its own value:

    A' = (1 − u) A + u I      that is      O' = (1 − u) · A V + u · V

and the output is moved away from it, whatever other guidance there is:

    ε = ε_negative + g (ε_prompt − ε_negative) + scale · (ε_prompt − ε'_prompt)

In one batch with the negative prompt's samples both halves get the last term, which gives this for any g. u = 1 is perturbed
attention guidance. Rows of A that are of text in the same sequence stay. ``tilewise rank-heads`` finds heads for a purpose
(HeadHunter).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.plugins.additions.base import Addition, Report, register_addition
from tilewise.plugins.diffusers_compat import holds_both_prompts
from tilewise.plugins.errors import ConfigError, UnsupportedModelError
from tilewise.plugins.hooks.forward_override import ForwardOverride, override_forward
from tilewise.plugins.methods.base import Method
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.text_format import counted
from tilewise.plugins.torch_compat import outside_graphs

SERVED = ("UNet2DConditionModel", "UNetMotionModel", "SD3Transformer2DModel", "FluxTransformer2DModel")
MID = "mid"
HEAD = re.compile(r"(\d+)(?:\.(\d+))?")
# Their own changes of a forward would be of two forwards here, or do not pass through the processors.
NOT_BESIDE = {
    "cache": "reuses of one forward what belongs to the other",
    "broadway": "goes by which half of a batch is the prompt's",
    "agent": "does not ask the layers' processors for attention",
}


@register_addition
@dataclass(frozen=True)
class SoftPAG(Addition):
    """SoftPAG by chosen heads.

    Args:
        heads: "BLOCK.HEAD", or "BLOCK" for all of a block, numbered as in ``summary``; "mid" for the middle block, as in PAG.
        scale: of the guidance. u: in (0, 1], how far heads go to the identity.

    Raises:
        ConfigError: for values that cannot be; when a denoiser is patched, for heads that it has not.
    """

    heads: tuple[str, ...] = (MID,)
    scale: float = 3.0
    u: float = 1.0

    name: ClassVar[str] = "soft-pag"
    forwards: ClassVar[int] = 2

    def __post_init__(self) -> None:
        heads = self.heads
        good = isinstance(heads, list | tuple) and len(heads) > 0 and all(isinstance(one, str) for one in heads)
        if not good or not all(one == MID or HEAD.fullmatch(one) for one in heads):
            raise ConfigError(
                f"soft-pag: heads are named BLOCK.HEAD, BLOCK or mid, such as 5.3,5.7,8; got {str(heads)[:80]!r}"
            )
        object.__setattr__(self, "heads", tuple(heads))
        self._number("scale", 0)
        self._number("u", 0, 1)
        if not self.u:
            raise ConfigError("soft-pag: u must be above 0: at 0 nothing is perturbed")

    def check(self, name: str, denoiser: nn.Module, method: Method, beside: Sequence[str]) -> None:
        if not any(cls.__name__ in SERVED for cls in type(denoiser).__mro__):
            raise UnsupportedModelError(
                f"soft-pag serves {', '.join(SERVED)}; {name} is a {type(denoiser).__name__}. Nothing was changed"
            )
        for other in beside:
            if other in NOT_BESIDE:
                raise ConfigError(f"soft-pag: {other} {NOT_BESIDE[other]}; use one of the two")
        if getattr(method, "keeps_memory", False):
            raise ConfigError(
                f"soft-pag runs two forwards a step, and {method.name} keeps what it selected from one to the next; give "
                "refresh=1"
            )
        self.weights(denoiser)

    def put_on(self, state: Any, denoiser: nn.Module, handles: list[Any]) -> Report:
        return _Running(self, state).put_on(denoiser, handles)

    def weights(self, denoiser: nn.Module) -> dict[int, torch.Tensor]:
        """By number of a self-attention layer, (H,) float32: u for the chosen heads, 0 for others.

        Raises:
            ConfigError: for heads that the denoiser has not.
        """
        family = family_of(denoiser)
        assert family is not None
        layers = family.layers(denoiser)
        found: dict[int, torch.Tensor] = {}
        for text in self.heads:
            for number in numbers_of(text, layers):
                heads = layers[number].heads
                weight = found.setdefault(number, torch.zeros(heads))
                _, _, head = text.partition(".")
                if head and int(head) >= heads:
                    raise ConfigError(
                        f"soft-pag: block {layers[number].block} has {heads} heads, so there is no {text}"
                    )
                weight[int(head) if head else slice(None)] = self.u
        return found


def numbers_of(text: str, layers: Sequence[AttentionLayer]) -> list[int]:
    """Which self-attention layers a name of heads means.

    Raises:
        ConfigError: for a block that there is not.
    """
    if text == MID:
        middle = [n for n, layer in enumerate(layers) if layer.name.startswith("mid_block.")]
        return middle or [n for n, layer in enumerate(layers) if layer.block == layers[len(layers) // 2].block]
    block = int(text.partition(".")[0])
    found = [n for n, layer in enumerate(layers) if layer.block == block]
    if not found:
        raise ConfigError(
            f"soft-pag: there is no block {block}; they go from 0 to {max(layer.block for layer in layers)}"
        )
    return found


class _Forward(threading.local):
    """Whether the forward under way is the perturbed one."""

    perturbed = False


class _Edit:
    """The change of attention outputs in a patch's state; ``remove()`` takes it off."""

    def __init__(self, edits: list[Any], edit: Any) -> None:
        self.edits, self.edit = edits, edit
        edits.append(edit)

    def remove(self) -> None:
        if self.edit in self.edits:
            self.edits.remove(self.edit)


class _Running:
    """The guidance of one denoiser."""

    def __init__(self, addition: SoftPAG, state: Any) -> None:
        self.addition, self.state = addition, state
        self.forward = _Forward()
        self.weights: dict[int, torch.Tensor] = {}
        self.guided = 0
        self.lock = threading.Lock()

    def put_on(self, denoiser: nn.Module, handles: list[Any]) -> Report:
        self.weights = self.addition.weights(denoiser)
        for number in self.weights:
            layer = self.state.layers[number]
            if why := self.state.call_stats.skipped_layers.get(layer.name):
                raise UnsupportedModelError(f"soft-pag: attention of {layer.name} cannot be changed: {why}")
        override = override_forward(denoiser, outside_graphs(self._run()), True)
        if override is None:
            raise UnsupportedModelError(
                f"soft-pag: the forward of this {type(denoiser).__name__} was replaced by somebody else; take that off first"
            )
        handles += [override, _Edit(self.state.edits, self._edit)]
        return self.report

    def report(self) -> str | None:
        """For ``summary``."""
        heads = sum(int((weight > 0).sum()) for weight in self.weights.values())
        layers = counted(len(self.weights), "layer")
        told = f"soft-pag: {self.guided} forwards guided by {counted(heads, 'head')} of {layers}, u {self.addition.u:g}"
        return told if self.guided else None

    def _run(self) -> Any:
        def run(override: ForwardOverride, *args: Any, **kwargs: Any) -> Any:
            out = override.stock(*args, **kwargs)
            if override.state is None or not self.addition.scale:
                return out
            sample = _sample_of(out)
            halves = holds_both_prompts(self.state.steps.pipeline()) and len(sample) % 2 == 0
            if halves:
                args, kwargs = second_half(args, len(sample)), second_half(kwargs, len(sample))
            self.forward.perturbed = True
            try:
                weak = _sample_of(override.stock(*args, **kwargs))
            finally:
                self.forward.perturbed = False
            with self.lock:
                self.guided += 1
            away = self.addition.scale * (sample[len(sample) // 2 if halves else 0 :] - weak)
            return _with_sample(out, sample + (torch.cat([away, away]) if halves else away))

        return run

    def _edit(self, number: int, value: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The output (B, S, H, D) of a layer's call, of value (B, S, Hk, D), both in the model's order."""
        weight = self.weights.get(number) if self.forward.perturbed else None
        if weight is None:
            return out
        if value.shape[2] != out.shape[2]:
            value = value.repeat_interleave(out.shape[2] // value.shape[2], 2)
        share = weight.to(out.device, out.dtype)[:, None]
        grid = self.state.forward.whole
        if grid is None or not grid.text or out.shape[1] != grid.tokens:
            return out.lerp(value, share)
        rows = slice(grid.video_start, grid.video_start + grid.video)
        out = out.clone()
        out[:, rows] = out[:, rows].lerp(value[:, rows], share)
        return out


def second_half(given: Any, batch: int) -> Any:
    """Arguments of a forward for the second half of its samples: of tensors whose first axis is the batch or a multiple of it."""
    if isinstance(given, torch.Tensor):
        return given[len(given) // 2 :] if given.ndim and len(given) and len(given) % batch == 0 else given
    if isinstance(given, dict):
        return {key: second_half(value, batch) for key, value in given.items()}
    if isinstance(given, list | tuple):
        return type(given)(second_half(value, batch) for value in given)
    return given


def _sample_of(out: Any) -> torch.Tensor:
    sample: torch.Tensor = out[0] if isinstance(out, tuple) else out.sample
    return sample


def _with_sample(out: Any, sample: torch.Tensor) -> Any:
    return (sample, *out[1:]) if isinstance(out, tuple) else type(out)(sample=sample)
