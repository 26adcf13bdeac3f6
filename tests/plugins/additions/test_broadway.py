"""BroadWay: temporal attention against the two changes written out map by map, its steps, and undo."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter, UNetMotionModel
from family_checks import forward, traces
from test_unet import unet_svd
from tiny_unets import prompt, tiny_unet, tiny_vae

import tilewise
from tilewise.plugins.additions.broadway import BroadWay
from tilewise.plugins.models.common.registry import family_of


def motion_adapter() -> Any:
    torch.manual_seed(5)
    adapter = MotionAdapter(
        block_out_channels=(8, 8, 16, 16),
        motion_layers_per_block=2,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    )
    for weight in adapter.parameters():
        if weight.ndim >= 2:  # its last layer is zero otherwise
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return adapter


@pytest.fixture(scope="module")
def stock_unet():
    return UNetMotionModel.from_unet2d(tiny_unet(), motion_adapter()).eval()


@pytest.fixture
def unet(stock_unet):
    return copy.deepcopy(stock_unet)


def inputs_of(frames: int, batch: int = 1, h: int = 8, w: int = 16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    sample, text = (
        torch.randn(batch, 4, frames, h, w, generator=generator),
        torch.randn(batch, 5, 8, generator=generator),
    )
    text = text.repeat_interleave(frames, 0)
    return {"sample": sample, "timestep": torch.tensor(999), "encoder_hidden_states": text}


class Plain:
    """A temporal layer's processor with BroadWay's changes of its map written out. maps: those of the second block, by layer."""

    def __init__(
        self, name: str, size: tuple[int, int], maps: dict[str, Any], settings: BroadWay, halves: bool
    ) -> None:
        self.name, self.size, self.maps, self.settings, self.halves = name, size, maps, settings, halves

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        q, k, v = (
            to(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for to in (attn.to_q, attn.to_k, attn.to_v)
        )
        maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)  # (N, H, F, F)
        n, frames = len(maps), maps.shape[-1]
        h, w = self.size
        kept = slice(n // 2 if self.halves else 0, n)
        before = (maps[kept] ** 2).sum(-1).mean()
        block, layer = self.name.split(".")[1], self.name.split(".", 2)[2]
        if block == "1":
            self.maps[layer] = (maps, h, w)
        else:
            coarse, low_h, low_w = self.maps[layer]
            at = [s * low_h * low_w + (y * low_h // h) * low_w + x * low_w // w
                  for s in range(n // (h * w)) for y in range(h) for x in range(w)]  # fmt: skip
            maps = (1 - self.settings.alpha) * maps + self.settings.alpha * coarse[at]
        spectrum = torch.fft.fft(maps)
        tau = frames / 2 - 1 if self.settings.tau is None else self.settings.tau
        high = [i for i in range(frames) if abs(i - frames / 2) <= tau]
        low = [i for i in range(frames) if i not in high]
        power = (spectrum[kept].abs() ** 2).mean((0, 1, 2)) / frames
        wanted = (before - power[low].sum()) / power[high].sum()
        spectrum[..., high] *= max(self.settings.beta, math.sqrt(max(0.0, float(wanted))))
        maps = torch.fft.ifft(spectrum).real
        maps = torch.where(maps > 0, maps, 0.0)
        maps = maps / maps.sum(-1, keepdim=True)
        return attn.to_out[0]((maps @ v).transpose(1, 2).flatten(2))


def plain(model: Any, inputs: dict[str, Any], settings: BroadWay, halves: bool = False) -> torch.Tensor:
    layers = [one for one in family_of(model).temporal_layers(model) if one.name.split(".")[0] == "up_blocks"]
    deepest = len(model.up_blocks) - 1
    h, w = inputs["sample"].shape[-2:]
    maps: dict[str, Any] = {}
    stock = {}
    for layer in layers:
        level = deepest - int(layer.name.split(".")[1])
        if level < deepest:
            stock[layer.name] = layer.module.processor
            layer.module.processor = Plain(layer.name, (h >> level, w >> level), maps, settings, halves)
    try:
        return forward(model, inputs)
    finally:
        for layer in layers:
            if layer.name in stock:
                layer.module.processor = stock[layer.name]


@pytest.mark.parametrize("frames", [7, 16])
@pytest.mark.parametrize(
    "add", ["broadway:steps=1", "broadway:steps=1:alpha=0.1:beta=10", "broadway:steps=1:tau=1:beta=1"]
)
def test_forward_is_the_plain_one(unet, frames, add):
    settings = tilewise.resolve("dense", add=add).additions[0]
    before, inputs = traces(unet), inputs_of(frames)
    stock = forward(unet, inputs)
    tilewise.patch(unet, "dense", add=add)
    got = forward(unet, inputs)
    assert "denoiser: broadway: changed 1 of 1 forwards" in tilewise.summary(unet).notes
    tilewise.unpatch(unet)
    want = plain(unet, inputs, settings)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert float((want - stock).abs().max()) > 1e-3
    assert torch.equal(forward(unet, inputs), stock) and traces(unet) == before


def test_temporal_attention_of_the_video_unet_is_reached():
    model = unet_svd()
    names = [layer.name for layer in family_of(model).temporal_layers(model)]
    assert names and all("temporal_transformer_blocks" in name and name.endswith("attn1") for name in names)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(1, 5, 8, 16, 16, generator=generator), "timestep": torch.tensor(999),
        "encoder_hidden_states": torch.randn(1, 1, 32, generator=generator),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
    }  # fmt: skip
    stock = forward(model, inputs)
    tilewise.patch(model, "dense", add="broadway:steps=1")
    assert not torch.equal(forward(model, inputs), stock)
    tilewise.unpatch(model)
    assert torch.equal(forward(model, inputs), stock)


def test_pipeline_changes_its_first_fifth(stock_unet):
    """Energy is that of the prompt's half of a batch; copies are of their own; a sparse method runs beside it."""
    pipe = AnimateDiffPipeline(
        vae=tiny_vae(), text_encoder=None, tokenizer=None, unet=copy.deepcopy(stock_unet), motion_adapter=None,
        scheduler=DDIMScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    given = {
        **prompt(),
        "num_frames": 4,
        "height": 64,
        "width": 64,
        "num_inference_steps": 5,
        "output_type": "latent",
    }

    def run(pipe: Any) -> torch.Tensor:
        return pipe(**given, generator=torch.Generator().manual_seed(0), return_dict=False)[0]

    seen = []
    stock = run(pipe)
    handle = pipe.unet.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    sparse = tilewise.STA(window=(1, 2, 1), tile=(1, 4, 4))
    tilewise.patch(pipe, sparse, add="broadway", steps=(0.5, 1), min_tokens=1)
    changed = run(pipe)
    assert any("broadway: changed 1 of 5 forwards" in note for note in tilewise.summary(pipe).notes)
    assert tilewise.summary(pipe).ran and not tilewise.summary(pipe).fallbacks
    handle.remove()
    assert torch.equal(run(copy.deepcopy(pipe)), changed)
    tilewise.unpatch(pipe)
    assert torch.equal(run(pipe), stock) and not torch.allclose(changed, stock, atol=1e-4)
    args, kwargs, out = seen[0]
    inputs = {"sample": args[0], "timestep": args[1], "encoder_hidden_states": kwargs["encoder_hidden_states"]}
    torch.testing.assert_close(out[0], plain(pipe.unet, inputs, BroadWay(), halves=True), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_is_refused(unet, tiny_pipe):
    with pytest.raises(tilewise.UnsupportedModelError, match="broadway changes temporal attention"):
        tilewise.patch(tiny_unet(), "dense", add="broadway")
    with pytest.raises(tilewise.UnsupportedModelError, match="broadway changes temporal attention"):
        tilewise.patch(tiny_pipe, "dense", add="broadway")
    wrong = {"beta=0.5": "at least 1", "alpha=2": "from 0 to 1", "tau=-1": "at least 0"}
    for add, said in ((f"broadway:{option}", said) for option, said in wrong.items()):
        with pytest.raises(tilewise.ConfigError, match=said):
            tilewise.resolve("dense", add=add)
    with (
        tilewise.patched(unet, "dense", add="broadway:tau=7:steps=1"),
        pytest.raises(
            tilewise.ConfigError, match="tau=7 takes the mean of 4 frames for a high frequency; give at most 1"
        ),
    ):
        forward(unet, inputs_of(4))
