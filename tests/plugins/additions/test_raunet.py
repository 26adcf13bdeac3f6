"""HiDiffusion: RAU-Net and shifted windows against a plain UNet with both written out, its schedule, pipelines, and undo."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_checks import forward, traces
from tiny_unets import TEXT, prompt, tiny_controlnet, tiny_pipe, tiny_unet, tiny_xl_pipe

import tilewise
from tilewise.plugins.additions.raunet import RAUNet
from tilewise.plugins.methods.shifted_windows import shift_of
from tilewise.plugins.models.common.registry import family_of

EVERY_MAP: dict[str, Any] = {"min_tokens": 1}


def inputs_of(h: int, w: int, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    sample, text = torch.randn(2, 4, h, w, generator=generator), torch.randn(2, 5, TEXT, generator=generator)
    return {"sample": sample, "timestep": torch.tensor(999), "encoder_hidden_states": text}


def plain(
    unet: Any, inputs: dict[str, Any], conv: int | None, level: bool, residuals: tuple[Any, Any] | None = None
) -> torch.Tensor:
    """The UNet's forward with HiDiffusion's RAU-Net written into it. conv: the level whose downsampling conv is dilated."""
    text, hidden = inputs["encoder_hidden_states"], unet.conv_in(inputs["sample"])
    emb = unet.time_embedding(unet.time_proj(inputs["timestep"].expand(len(hidden))))
    skips, full = [hidden], None
    for number, block in enumerate(unet.down_blocks):
        for i, resnet in enumerate(block.resnets):
            hidden = resnet(hidden, emb)
            if hasattr(block, "attentions"):
                hidden = block.attentions[i](hidden, encoder_hidden_states=text).sample
            if level and number == 1 and i == 0:
                full, hidden = hidden.shape[2:], F.avg_pool2d(hidden, kernel_size=(2, 2), ceil_mode=True)
            skips.append(hidden)
        if block.downsamplers is not None:
            own = block.downsamplers[0].conv
            how: dict[str, Any] = (
                {"stride": 4, "padding": 2, "dilation": 2} if number == conv else {"stride": 2, "padding": 1}
            )
            hidden = F.conv2d(hidden, own.weight, own.bias, **how)
            skips.append(hidden)
    if residuals is not None:
        skips = [
            one + F.interpolate(more, one.shape[2:], mode="bicubic")
            for one, more in zip(skips, residuals[0], strict=True)
        ]
    hidden = unet.mid_block(hidden, emb, encoder_hidden_states=text)
    if residuals is not None:
        hidden = hidden + F.interpolate(residuals[1], hidden.shape[2:], mode="bicubic")
    for number, block in enumerate(unet.up_blocks):
        for i, resnet in enumerate(block.resnets):
            hidden = resnet(torch.cat([hidden, skips.pop()], 1), emb)
            if hasattr(block, "attentions"):
                hidden = block.attentions[i](hidden, encoder_hidden_states=text).sample
            if level and number == len(unet.up_blocks) - 2 and i == 1:
                hidden = F.interpolate(hidden, size=full, mode="bicubic")
        if block.upsamplers is not None:
            hidden = block.upsamplers[0].conv(F.interpolate(hidden, size=skips[-1].shape[2:], mode="nearest"))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


@contextlib.contextmanager
def windowed(unet: Any, level: int, step: int, seed: int) -> Iterator[None]:
    """Self-attention of a level in 2 × 2 windows of the rolled map, cut and put together by reshapes; even maps of one shape
    per number of tokens."""
    layers = [layer for layer in family_of(unet).layers(unet) if layer.downsample == level]
    sizes: dict[int, tuple[int, int]] = {}
    handles = []

    def seen(module: Any, args: tuple, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        sizes[hidden.shape[2] * hidden.shape[3]] = tuple(hidden.shape[2:])

    for block in [*unet.down_blocks, *unet.up_blocks]:
        handles += [one.register_forward_pre_hook(seen, with_kwargs=True) for one in getattr(block, "attentions", ())]

    def inside(layer: Any) -> Any:
        stock = type(layer.module).forward

        def run(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            h, w = sizes[x.shape[1]]
            shift = [-(-n // 2) // 4 * shift_of(seed, step, layer.block) for n in (h, w)]
            x = torch.roll(x.unflatten(1, (h, w)), (-shift[0], -shift[1]), (1, 2))
            x = x.unflatten(2, (2, -1)).unflatten(1, (2, -1)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
            x = stock(layer.module, x)
            x = x.unflatten(0, (-1, 2, 2)).unflatten(3, (h // 2, w // 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
            return torch.roll(x, shift, (1, 2)).flatten(1, 2)

        return run

    try:
        for layer in layers:
            layer.module.forward = inside(layer)
        yield
    finally:
        for layer in layers:
            del layer.module.forward
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("h", "w"), [(33, 38), (24, 40)])
@pytest.mark.parametrize(
    ("kind", "t1", "t2", "conv", "level"),
    [("sd", 1, 0, 0, False), ("sd", 1, 1, 0, True), ("sdxl", 1, 0, None, True), ("sdxl", 1, 1, 1, True)],
)
def test_forward_is_the_plain_one(kind, t1, t2, conv, level, h, w):
    unet, inputs = tiny_unet(kind), inputs_of(h, w)
    before, stock = traces(unet), forward(unet, inputs)
    tilewise.patch(unet, "dense", add=RAUNet(t1=t1, t2=t2))
    with torch.no_grad():
        got = forward(unet, inputs)
        by_position = unet(*inputs.values(), return_dict=False)[0]
    report = tilewise.summary(unet)
    tilewise.unpatch(unet)
    with torch.no_grad():
        want = plain(unet, inputs, conv, level)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_position, got)
    assert float((want - stock).abs().max()) > 0.01
    assert any(f"of 2 forwards {0 if conv is None else 2} with a coarse conv" in note for note in report.notes)
    assert torch.equal(forward(unet, inputs), stock) and traces(unet) == before


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("t", [0, 1])
def test_windows_are_rolled_and_cut(kind, t):
    """The preset against reshapes, with RAU-Net and without; the summary counts a quarter of the pairs."""
    unet, inputs, level = tiny_unet(kind), inputs_of(32, 48), 0 if kind == "sd" else 1
    method = tilewise.resolve("hidiffusion", add=RAUNet(t1=t, t2=0), **EVERY_MAP, strict=True)
    tilewise.patch(unet, method)
    got, report = forward(unet, inputs), tilewise.summary(unet)
    tilewise.unpatch(unet)
    step = round((1 - 0.999) * 1000)
    with torch.no_grad(), windowed(unet, level, step, 0):
        want = plain(unet, inputs, 0 if t and kind == "sd" else None, bool(t and kind == "sdxl"))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert report.density == pytest.approx(0.25)
    assert not report.fallbacks


def test_shifts_are_drawn_by_seed_step_and_layer():
    drawn = [shift_of(0, step, layer) for step in range(50) for layer in range(10)]
    assert {drawn.count(k) > 80 for k in range(4)} == {True}
    assert drawn != [shift_of(1, step, layer) for step in range(50) for layer in range(10)]
    unet, inputs = tiny_unet(), inputs_of(32, 32)
    outs = {}
    for seed in (0, 0, 1):
        with tilewise.patched(unet, tilewise.ShiftedWindows(seed=seed), steps=(0, 1), **EVERY_MAP):
            out = forward(unet, inputs)
        assert seed not in outs or torch.equal(outs[seed], out)
        outs[seed] = out
    assert not torch.equal(outs[0], outs[1])


def test_odd_maps_have_windows_of_two_sizes():
    unet, inputs = tiny_unet(), inputs_of(18, 26)
    with tilewise.patched(unet, "hidiffusion", **EVERY_MAP, strict=True):
        out = forward(unet, inputs)
        assert tilewise.summary(unet).density == pytest.approx(0.25)
    assert out.shape == inputs["sample"].shape and out.isfinite().all()
    with tilewise.patched(unet, tilewise.ShiftedWindows(levels=(1,)), steps=(0, 1), **EVERY_MAP, strict=True):
        forward(unet, inputs)  # 9 × 13: windows of 5 and 4, 7 and 6
        assert tilewise.summary(unet).density == pytest.approx((25 + 16) / 81 * (49 + 36) / 169)


@pytest.mark.parametrize(
    ("variant", "size", "control", "inpainting", "want"),
    [
        ("sd", 128, False, False, [(20, 0), (0, 0)]),
        ("sd", 256, False, False, [(35, 0), (15, 0)]),
        ("sdxl", 256, False, False, [(8, 0), (20, 8)]),
        ("sdxl", 256, True, False, [(8, 0), (25, 8)]),
        ("sdxl", 256, False, True, [(0, 0), (20, 0)]),
        ("sdxl", 512, False, False, [(15, 0), (35, 0)]),
        ("sdxl-turbo", 128, False, False, [(0, 0), (25, 0)]),
    ],
)
def test_published_thresholds(variant, size, control, inpainting, want):
    """(end, begin) of the steps of 50 with the coarse conv, and with the coarse level."""
    addition = RAUNet(variant=variant)
    on = [addition.coarse((size, size), step, 50, control, inpainting) for step in range(50)]
    for (end, begin), steps in zip(want, zip(*on, strict=True), strict=True):
        assert list(steps) == [begin <= step < end for step in range(50)]


def run(pipe: Any, kind: str, size: int = 160, **more: Any) -> torch.Tensor:
    """A run of 5 steps; 160 pixels are 20 × 20 latents, more than the 16 × 16 of training."""
    given: dict[str, Any] = {**prompt(), "num_inference_steps": 5, "output_type": "latent", "return_dict": False}
    picture = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(5))
    if kind in ("image", "inpaint", "control"):
        given["image"] = picture
    if kind != "image":
        given |= {"height": size, "width": size}
    if kind == "inpaint":
        given["mask_image"] = torch.ones(1, 1, size, size)
    return pipe(**given, generator=torch.Generator().manual_seed(0), **more)[0]


@pytest.mark.parametrize("kind", ["text", "image", "inpaint", "control"])
def test_pipelines_run_it_in_their_first_steps(kind):
    pipe = tiny_pipe(tiny_unet(in_channels=9) if kind == "inpaint" else tiny_unet(), kind)
    before = traces(pipe.unet)
    stock = run(pipe, kind)
    tilewise.patch(pipe, "hidiffusion", **EVERY_MAP)
    out = run(pipe, kind)
    notes = tilewise.summary(pipe, reset=True).notes
    assert kind != "text" or torch.equal(run(pipe, kind), out)
    steps = {"image": 4}.get(kind, 5)  # strength 0.8 leaves 4 of 5 steps; T1 is counted in those
    assert any(f"of {steps} forwards {int(steps * 0.4)} with a coarse conv and 0 with" in note for note in notes), notes
    assert out.isfinite().all() and not torch.allclose(out, stock, atol=1e-3)
    if kind == "text":
        copied = copy.deepcopy(pipe)
        torch.testing.assert_close(run(copied, kind), out)
        tilewise.unpatch(copied)
        assert torch.equal(run(copied, kind), stock)
    tilewise.unpatch(pipe)
    assert torch.equal(run(pipe, kind), stock) and traces(pipe.unet) == before


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("text", "of 10 forwards 1 with a coarse conv and 3 with"), ("image", "of 5 forwards 0 with a coarse conv and 2 with"),
        ("inpaint", "of 9 forwards 0 with a coarse conv and 3 with"),
        ("control", "of 10 forwards 1 with a coarse conv and 4 with"),
        ("control image", "of 5 forwards 0 with a coarse conv and 2 with"),
    ],
)  # fmt: skip
def test_pipelines_of_sdxl(kind, told):
    pipe, generator = tiny_xl_pipe(kind), torch.Generator().manual_seed(1)
    pooled = {f"{name}pooled_prompt_embeds": torch.randn(1, TEXT, generator=generator) for name in ("", "negative_")}
    picture = torch.rand(1, 3, 160, 192, generator=generator)
    given: dict[str, Any] = {
        **prompt(),
        **pooled,
        "num_inference_steps": 10,
        "output_type": "latent",
        "return_dict": False,
    }
    given |= {} if kind == "text" else {"image": picture}
    given |= {} if kind == "image" else {"height": 160, "width": 192}
    given |= {"strength": 0.5} if "image" in kind else {}
    given |= {"control_image": picture} if kind == "control image" else {}
    given |= {"mask_image": torch.ones(1, 1, 160, 192)} if kind == "inpaint" else {}

    def run() -> torch.Tensor:
        return pipe(**given, generator=torch.Generator().manual_seed(0))[0]

    stock = run()
    tilewise.patch(pipe, "hidiffusion", **EVERY_MAP)
    out, report = run(), tilewise.summary(pipe)
    assert any(told in note for note in report.notes), report.notes
    assert not report.fallbacks and not torch.allclose(out, stock, atol=1e-3)
    tilewise.unpatch(pipe)
    assert torch.equal(run(), stock)


def test_the_training_size_stays_as_it_is():
    unet, inputs = tiny_unet(), inputs_of(16, 16)
    stock = forward(unet, inputs)
    with tilewise.patched(unet, "dense", add="raunet"):
        assert torch.equal(forward(unet, inputs), stock)
        assert any("of 1 forwards 0 with a coarse conv" in note for note in tilewise.summary(unet).notes)


@pytest.mark.parametrize(("kind", "t2"), [("sd", 1), ("sdxl", 1), ("sdxl", 0)])
@pytest.mark.parametrize(("h", "w"), [(25, 38)])
def test_residuals_of_a_controlnet_are_resampled(kind, t2, h, w):
    unet, inputs = tiny_unet(kind), inputs_of(h, w)
    picture = torch.randn(2, 3, h * 8, w * 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        down, middle = tiny_controlnet(unet)(**inputs, controlnet_cond=picture, return_dict=False)
        given = {**inputs, "down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        with tilewise.patched(unet, "dense", add=RAUNet(t1=1, t2=t2)):
            got = forward(unet, given)
        conv = 0 if kind == "sd" else 1 if t2 else None
        want = plain(unet, inputs, conv, kind == "sdxl" or bool(t2), (down, middle))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "method", [tilewise.STA(window=(1, 1, 2), tile=(1, 4, 4)), tilewise.Draft(density=0.5, min_tokens=1)]
)
def test_other_methods_find_the_coarser_maps(method):
    """No call falls back: grids are those that the layers have in these steps."""
    unet, inputs = tiny_unet(), inputs_of(34, 30)
    with tilewise.patched(unet, method, steps=(0, 1), add=RAUNet(t1=1, t2=1), **EVERY_MAP):
        out = forward(unet, inputs)
        report = tilewise.summary(unet)
    assert not report.fallbacks and report.ran and out.isfinite().all()


def test_it_is_put_on_once_however_often():
    unet, inputs = tiny_unet(), inputs_of(32, 32)
    upsamplers, hooks = unet.num_upsamplers, len(unet._forward_pre_hooks)
    outs = []
    for _ in range(3):
        tilewise.patch(unet, "hidiffusion", **EVERY_MAP)
        outs.append(forward(unet, inputs))
        assert unet.num_upsamplers == upsamplers and len(unet._forward_pre_hooks) == hooks + 2
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(
    ("add", "said"),
    [
        ("raunet:t1=2", "t1 must be a number from 0 to 1"),
        ("raunet:variant=sd3", "unknown variant of raunet"),
        ("raunet:t3=1", "unknown option of add 'raunet'"),
        ("raunat", "unknown add 'raunat'. Did you mean 'raunet'"),
        ("raunet + raunet:t1=1", "raunet is given twice"),
        ("raunet:variant=sdxl-turbo:t2=0.5", "no second change"),
        (3, "add must be a name"),
    ],
)
def test_what_cannot_be_is_refused(add, said):
    with pytest.raises(tilewise.ConfigError, match=said):
        tilewise.resolve("dense", add=add)


def test_models_that_it_is_not_for(tiny_pipe):
    with pytest.raises(tilewise.UnsupportedModelError, match="raunet changes the levels of a UNet2DConditionModel"):
        tilewise.patch(tiny_pipe, "dense", add="raunet")
    with pytest.raises(tilewise.ConfigError, match="shifted-windows is for UNets"):
        tilewise.patch(tiny_pipe, "shifted-windows")
    two = tiny_unet(
        "sdxl", down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), block_out_channels=(8, 8),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=1,
    )  # fmt: skip
    with pytest.raises(tilewise.UnsupportedModelError, match="sdxl has 3 levels"):
        tilewise.patch(two, "hidiffusion")
    with pytest.raises(tilewise.ConfigError, match=r"self-attention at the levels \[1, 2\], not at \[0\]"):
        tilewise.patch(tiny_unet("sdxl"), tilewise.ShiftedWindows(levels=(0,)))
    assert not tilewise.is_patched(two)


def test_turbo_is_told_by_its_name():
    unet = tiny_unet("sdxl")
    for name, variant in (("stabilityai/sdxl-turbo", "sdxl-turbo"), ("a/b", "sdxl")):
        unet.register_to_config(_name_or_path=name)
        assert RAUNet().prepare(unet, unet).variant == variant
    assert RAUNet(variant="sdxl-turbo").thresholds((512, 512), True) == (0.5, 0.0)
    assert RAUNet().prepare(tiny_unet(), tiny_unet()).variant == "sd"


def test_residuals_of_an_adapter_are_refused():
    unet, inputs = tiny_unet(), inputs_of(32, 32)
    given = {**inputs, "down_intrablock_additional_residuals": [torch.zeros(2, 8, 32, 32)]}
    with (
        tilewise.patched(unet, "dense", add="raunet"),
        pytest.raises(tilewise.UnsupportedModelError, match="T2I-Adapter"),
    ):
        forward(unet, given)


def test_explain_tells_levels_apart():
    unet = tiny_unet("sdxl")
    told = tilewise.explain(unet, height=1024, width=1024, frames=1, method="hidiffusion", **{"blocks": None})
    assert [(row.denoiser, row.density) for row in told.rows] == [("denoiser, 1/2", 0.25), ("denoiser, 1/4", 1.0)]
