"""The decoder and the encoder of ``AutoencoderKLWan`` in fewer passes over memory, on the stock modules' own weights.

What differs from the stock forward, which it equals to rounding:

- activations are channels-last, and so are the weights, converted once a clip;
- bias, residual, RMS norm and SiLU between two convolutions are one kernel (``kernels/fused/rms_norm_silu.py``), which writes
  behind the two cached frames that the next convolution needs before its input: no concatenation, no copy of the input;
- the convolution pads height and width itself;
- nearest upsampling copies 16-bit words (``kernels/fused/upsample_nearest.py``), where the stock one goes through float32.

The feature cache is the caller's list, with the entries at the numbers that the stock forward gives them. Either forward goes on
from what the other left in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tilewise.kernels.fused.rms_norm_silu import add_in_place, rms_norm_silu
from tilewise.kernels.fused.upsample_nearest import upsample_nearest
from tilewise.plugins.diffusers_compat import wan_vae_modules
from tilewise.plugins.torch_compat import version_of

REPEAT = "Rep"  # stands in the cache where an upsampling in time has seen the first latent and nothing else
HISTORY = 2  # frames before its input that a causal convolution of size 3 sees
WEIGHTS = "_tilewise_weights"  # an attribute of the first tensor in a cache: converted weights live as long as the clip


@dataclass
class Sum:
    """x + bias + residual, not added yet. x: (B, T, H, W, C), contiguous and nobody else's if there is something to add."""

    x: torch.Tensor
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def parts(self) -> dict[str, Any]:
        return {"bias": self.bias, "residual": None if self.residual is None else _rows(self.residual)}

    def added(self) -> torch.Tensor:
        add_in_place(_rows(self.x), **self.parts())
        return self.x


class FusedPass:
    """One call of a decoder or an encoder.

    Args:
        cache: the feature cache of the clip; entries are (B, C, 1 or 2, H, W), None, or ``REPEAT``.
        first_chunk: whether the clip begins here.
    """

    def __init__(self, cache: list[Any], first_chunk: bool) -> None:
        self.cache = cache
        self.next = 0  # the entry of the next convolution
        self.first_chunk = first_chunk
        self.kinds = wan_vae_modules()
        self.weights: dict[int, tuple[int, int | None, torch.Tensor]] = getattr(cache[0], WEIGHTS, {})

    def decode(self, decoder: Any, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, h, w) → (B, 3, F, H, W), as ``WanDecoder3d.forward``."""
        s = self._middle(decoder.mid_block, self._convolve_input(x, decoder.conv_in))
        for block in decoder.up_blocks:
            shortcut = getattr(block, "avg_shortcut", None)
            upsamplers = [block.upsampler] if hasattr(block, "upsampler") else block.upsamplers or []
            first, *others = block.resnets
            start = s
            s = self._residual_block(first, s)  # adds what was left to add
            for resnet in others:
                s = self._residual_block(resnet, s)
            for upsampler in filter(None, upsamplers):
                s = self._upsample(upsampler, s)
            if shortcut is not None:  # only where there is an upsampler, which leaves its bias alone to add
                s.residual = self._repeat(shortcut, start.x)
        return self._convolve_output(decoder, s)

    def encode(self, encoder: Any, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, F, H, W) → (B, 2C, T, h, w), as ``WanEncoder3d.forward``."""
        s = self._convolve_input(x, encoder.conv_in)
        for block in encoder.down_blocks:
            if isinstance(block, self.kinds.residual_down_block):
                start = Sum(s.added())
                s = start
                for resnet in block.resnets:
                    s = self._residual_block(resnet, s)
                if block.downsampler is not None:
                    s = self._downsample(block.downsampler, s)
                mean = _channels_last(block.avg_shortcut(_channels_first(start.x))).contiguous()
                s = Sum(s.added(), None, mean)
            elif isinstance(block, self.kinds.resample):
                s = self._downsample(block, s)
            elif isinstance(block, self.kinds.attention):
                s = self._attend(block, s)
            else:
                s = self._residual_block(block, s)
        return self._convolve_output(encoder, self._middle(encoder.mid_block, s))

    # ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _middle(self, block: Any, s: Sum) -> Sum:
        s = self._residual_block(block.resnets[0], s)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            s = self._residual_block(resnet, s if attention is None else self._attend(attention, s))
        return s

    def _residual_block(self, block: Any, s: Sum) -> Sum:
        """conv2(SiLU(norm2(conv1(SiLU(norm1(s)))))) + shortcut(s); s.x holds the added s afterwards."""
        y = self._norm_convolve(block.norm1, block.conv1, s, keep_sum=True)
        y = self._norm_convolve(block.norm2, block.conv2, Sum(y, block.conv1.bias), keep_sum=False)
        shortcut = block.conv_shortcut
        kept = s.x if isinstance(shortcut, nn.Identity) else F.linear(s.x, shortcut.weight.flatten(1), shortcut.bias)
        return Sum(y, block.conv2.bias, kept)

    def _attend(self, block: Any, s: Sum) -> Sum:
        """Attention of each frame with itself, one head over all channels."""
        B, T, H, W, C = s.x.shape
        n = rms_norm_silu(_rows(s.x), block.norm.gamma.flatten(), keep_sum=True, silu=False, **s.parts())
        qkv = F.linear(n, block.to_qkv.weight.flatten(1), block.to_qkv.bias).view(B * T, 1, H * W, 3 * C)
        query, key, value = qkv.chunk(3, -1)
        out = F.scaled_dot_product_attention(query, key, value)
        y = F.linear(out, block.proj.weight.flatten(1)).view(B, T, H, W, C)
        return Sum(y, block.proj.bias, s.x)

    def _upsample(self, block: Any, s: Sum) -> Sum:
        x, frames = s.added(), 1
        if block.mode == "upsample3d":
            if self.cache[self.next] is None:  # the first latent is one frame
                self.cache[self.next] = REPEAT
                self.next += 1
            else:
                room = self._room(x)
                room[:, HISTORY:] = x
                x, frames = self._convolve(room, block.time_conv, block.time_conv.bias), 2
        x = upsample_nearest(x, frames)
        return Sum(self._convolve_frames(x, block.resample[1], padding=1), block.resample[1].bias)

    def _downsample(self, block: Any, s: Sum) -> Sum:
        x = F.pad(s.added(), (0, 0, 0, 1, 0, 1))
        x = self._convolve_frames(x, block.resample[1], padding=0)
        x = Sum(x, block.resample[1].bias).added()
        if block.mode == "downsample3d":
            before = self.cache[self.next]
            self.cache[self.next] = _channels_first(x[:, -1:].clone())
            self.next += 1
            if before is not None:
                x = torch.cat([_channels_last(before[:, :, -1:]), x], 1)
                x = self._convolve_causal(x, block.time_conv, block.time_conv.bias)
        return Sum(x)

    def _repeat(self, shortcut: Any, x: torch.Tensor) -> torch.Tensor:
        """``DupUp3D``: each channel's values repeated over the pixels and frames that come of one."""
        B, T, H, W, C = x.shape
        t, s = shortcut.factor_t, shortcut.factor_s
        x = x[..., None].expand(B, T, H, W, C, shortcut.repeats)
        x = x.reshape(B, T, H, W, shortcut.out_channels, t, s, s).permute(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.reshape(B, T * t, H * s, W * s, shortcut.out_channels)
        return x[:, t - 1 :] if self.first_chunk else x

    # ── convolutions ─────────────────────────────────────────────────────────────────────────────────────────────

    def _convolve_input(self, x: torch.Tensor, conv: Any) -> Sum:
        x = _channels_last(x)
        room = self._room(x)
        room[:, HISTORY:] = x
        return Sum(self._convolve(room, conv), conv.bias)

    def _convolve_output(self, module: Any, s: Sum) -> torch.Tensor:
        y = self._norm_convolve(module.norm_out, module.conv_out, s, keep_sum=False, bias=module.conv_out.bias)
        if isinstance(self.cache[0], torch.Tensor):
            setattr(self.cache[0], WEIGHTS, self.weights)
        return _channels_first(y).contiguous()

    def _norm_convolve(
        self, norm: Any, conv: Any, s: Sum, *, keep_sum: bool, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """conv(SiLU(norm(s))), without the convolution's own bias unless ``bias`` is it."""
        room = self._room(s.x)
        rms_norm_silu(_rows(s.x), norm.gamma.flatten(), out=_rows(room[:, HISTORY:]), keep_sum=keep_sum, **s.parts())
        return self._convolve(room, conv, bias)

    def _room(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 2 + T, H, W, C) for T frames like ``x``, with the two before them filled in from the cache."""
        B, T, H, W, C = x.shape
        room = x.new_empty(B, HISTORY + T, H, W, C)
        before = self.cache[self.next]
        known = before.shape[2] if isinstance(before, torch.Tensor) else 0
        room[:, : HISTORY - known].zero_()
        if known:
            room[:, HISTORY - known : HISTORY] = _channels_last(before)
        return room

    def _convolve(self, room: torch.Tensor, conv: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        """A causal convolution of a filled ``_room``, whose last two frames go to the cache."""
        self.cache[self.next] = _channels_first(room[:, -HISTORY:].clone())
        self.next += 1
        return self._convolve_causal(room, conv, bias)

    def _convolve_causal(self, room: torch.Tensor, conv: Any, bias: torch.Tensor | None) -> torch.Tensor:
        weight = self._weight(conv, torch.channels_last_3d)
        padding = (0, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2)
        y = F.conv3d(_channels_first(room), weight, bias, conv.stride, padding)
        return _channels_last(y).contiguous()

    def _convolve_frames(self, x: torch.Tensor, conv: Any, padding: int) -> torch.Tensor:
        """A convolution of each frame, without its bias."""
        B, T = x.shape[:2]
        images = x.flatten(0, 1).permute(0, 3, 1, 2)
        y = F.conv2d(images, self._weight(conv, torch.channels_last), None, conv.stride, padding)
        return y.permute(0, 2, 3, 1).contiguous().unflatten(0, (B, T))

    def _weight(self, conv: Any, layout: torch.memory_format) -> torch.Tensor:
        weight = conv.weight
        now = weight.data_ptr(), version_of(weight)
        pointer, version, converted = self.weights.get(id(conv), (0, None, weight))
        if (pointer, version) != now:
            converted = weight.detach().contiguous(memory_format=layout)
            self.weights[id(conv)] = (*now, converted)
        return converted


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(B, T, H, W, C) as (B, T·H·W, C), a view."""
    return x.view(x.shape[0], -1, x.shape[4]) if x.is_contiguous() else x.flatten(1, 3)


def _channels_first(x: torch.Tensor) -> torch.Tensor:
    """(B, T, H, W, C) as (B, C, T, H, W), a view."""
    return x.permute(0, 4, 1, 2, 3)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) as (B, T, H, W, C), a view."""
    return x.permute(0, 2, 3, 4, 1)
