"""Cases of the other families for ``forked_ranks.py``: three heads, lengths that neither 2 nor 3 divides, padded prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import every_family
import test_allegro as allegro
import test_chroma as chroma
import test_cogvideox as cogvideox
import test_cosmos as cosmos
import test_easyanimate as easyanimate
import test_flux as flux
import test_flux2 as flux2
import test_hunyuan_framepack as framepack
import test_hunyuan_video as hunyuan_video
import test_hunyuan_video15 as hunyuan_video15
import test_kandinsky5 as kandinsky5
import test_ltx as ltx
import test_mochi as mochi
import test_qwen_image as qwen_image
import test_sd3 as sd3
import test_skyreels as skyreels
import test_wan_animate as animate
import test_wan_vace as vace
import test_z_image as z_image
import torch

import tilewise
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.sta import STA

VIDEO, IMAGE = (4, 5, 7), (1, 7, 11)
METHODS = {
    "dense": "dense",
    "sta": STA(window=(3, 1, 3), tile=(2, 2, 3)),
    "draft": Draft(density=0.5, tile=(1, 3, 4), min_tokens=0),
}
RANKS = {"dense": (2,), "sta": (2,), "draft": (3,)}
OF_KNOWN_PLANS = ("VACE", "SkyReels-V2", "ConsisID", "Kandinsky 5", "Chroma", "SD 3", "SD 3.5", "EasyAnimate")
Make = Callable[[], tuple[Any, dict[str, Any]]]


def kandinsky(num_attention_heads: int) -> Any:
    return kandinsky5.denoiser(model_dim=16 * num_attention_heads)


def conditioned() -> dict[str, Any]:
    t, h, w = VIDEO
    given = ltx.inputs(VIDEO, extra=h * w)
    for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
        del given[name]
    coords = ltx.condition_coords([(24, 1, h, w), (0, t, h, w)])
    return given | {"video_coords": coords, "timestep": ltx.noise(2, (t + 1) * h * w, 1).abs() * 500}


def families(heads: int) -> dict[str, Make]:
    """A tiny model of each family with so many heads, and of what is in any method's way."""
    width = 16 * heads
    ltx2 = functools.partial(
        ltx.ltx2, audio_num_attention_heads=heads, cross_attention_dim=width, audio_cross_attention_dim=width // 2
    )

    def made(build: Callable[..., Any], given: Callable[[Any], dict[str, Any]], **config: Any) -> Make:
        def make() -> tuple[Any, dict[str, Any]]:
            torch.manual_seed(0)  # of the biases that a builder leaves as they are drawn
            model = build(num_attention_heads=heads, **config)
            return model, given(model)

        return make

    return {
        "Flux": made(flux.tiny, lambda m: flux.inputs(*IMAGE[1:])),
        "Flux, reference image": made(flux.tiny, lambda m: flux.inputs(*IMAGE[1:], reference=(3, 5))),
        "Flux.2": made(flux2.tiny, lambda m: flux2.inputs(*IMAGE[1:], (3, 5))),
        "Qwen-Image": made(qwen_image.tiny, lambda m: qwen_image.inputs(IMAGE)),
        "Qwen-Image, padded": made(qwen_image.tiny, lambda m: qwen_image.inputs(IMAGE, mask=qwen_image.PADDED)),
        "LTX-Video": made(ltx.ltx, lambda m: ltx.inputs(VIDEO), cross_attention_dim=width),
        "LTX-Video, a timestep a token": made(
            ltx.ltx,
            lambda m: ltx.inputs(VIDEO) | {"timestep": ltx.noise(2, 140).abs() * 500},
            cross_attention_dim=width,
        ),
        "LTX-Video, one timestep a sample": made(
            ltx.ltx, lambda m: ltx.inputs(VIDEO) | {"timestep": torch.full((2, 1), 500.0)}, cross_attention_dim=width
        ),
        "LTX-Video, conditions before the video": made(ltx.ltx, lambda m: conditioned(), cross_attention_dim=width),
        "LTX-2": made(ltx2, lambda m: ltx.inputs2(m, VIDEO)),
        "LTX-2, split tables": made(functools.partial(ltx2, rope_type="split"), lambda m: ltx.inputs2(m, VIDEO)),
        "HunyuanVideo": made(
            hunyuan_video.tiny, lambda m: hunyuan_video.inputs(None, every_family.pixels(VIDEO), (6, 9)), num_layers=1
        ),
        "HunyuanVideo, one stream": made(
            hunyuan_video.tiny, lambda m: hunyuan_video.inputs(None, every_family.pixels(VIDEO), (6,)), num_layers=0
        ),
        "HunyuanVideo 1.5": made(hunyuan_video15.tiny, lambda m: hunyuan_video15.inputs(VIDEO, (6, 9), (2, 0), True)),
        "CogVideoX": made(cogvideox.denoiser, lambda m: cogvideox.inputs(m, VIDEO)),
        "CogVideoX, positions": made(
            functools.partial(cogvideox.denoiser, "sincos"), lambda m: cogvideox.inputs(m, VIDEO)
        ),
        "VACE": made(functools.partial(vace.denoiser, layers=2, vace_layers=(0, 1)), lambda m: vace.inputs(*VIDEO)),
        "SkyReels-V2": made(skyreels.denoiser, lambda m: skyreels.inputs(*VIDEO)),
        "SkyReels-V2, a timestep a frame": made(skyreels.denoiser, lambda m: skyreels.inputs(*VIDEO, forcing=True)),
        "ConsisID": made(cogvideox.consisid, lambda m: cogvideox.consisid_inputs(m, VIDEO)),
        "HunyuanVideo, first frame replaced": made(
            functools.partial(hunyuan_video.tiny, "token_replace"),
            lambda m: hunyuan_video.inputs("token_replace", every_family.pixels(VIDEO), (6, 9)),
        ),
        "Cosmos": made(cosmos.denoiser, lambda m: cosmos.inputs("2", *VIDEO)),
        "Cosmos, a timestep a frame": made(cosmos.denoiser, lambda m: cosmos.inputs("2", *VIDEO, per_frame=True)),
        "Cosmos, learnable positions": made(
            functools.partial(cosmos.denoiser, "1.0"), lambda m: cosmos.inputs("1.0", *VIDEO)
        ),
        "Kandinsky 5": made(kandinsky, lambda m: kandinsky5.inputs(*VIDEO)),
        "Chroma": made(chroma.tiny, lambda m: chroma.inputs(*IMAGE[1:], chroma.PADDED)),
        "SD 3": made(functools.partial(sd3.tiny, caption_projection_dim=width), lambda m: sd3.inputs(*IMAGE[1:])),
        "SD 3.5": made(
            functools.partial(sd3.tiny, caption_projection_dim=width, **sd3.SD35), lambda m: sd3.inputs(*IMAGE[1:])
        ),
        "EasyAnimate": made(easyanimate.denoiser, lambda m: easyanimate.inputs(*VIDEO)),
        "Mochi": made(mochi.denoiser, lambda m: mochi.inputs(*VIDEO, prompts=(6, 0))),
    }


FAMILIES = families(3)


def forward(split: Callable[[Any], Any] | None, make: Make, method: Any) -> tuple[torch.Tensor, Any]:
    model, given = make()
    if split:
        split(model)
    tilewise.patch(model, method, steps=(0, 1), strict=True)
    out = every_family.run(model, given)
    found = tilewise.summary(model)
    if split:
        out = torch.stack([out, every_family.run(model, given)])  # sizes are known now
    else:
        out = torch.stack([out, out])
    return out, {"kinds": sorted({row.kind for row in found.rows}), "calls": found.calls, "text": str(found)}


def refused(split: Any, make: Callable[[], Any]) -> Any:
    if split:
        split(make())


def unpatched(split: Any) -> Any:
    if split:
        model, given = FAMILIES["Mochi"]()
        every_family.run(split(model), given)


def short_text(split: Any) -> Any:
    if split:
        model, given = FAMILIES["Flux"]()
        given = given | {name: given[name][..., :1, :] for name in ("encoder_hidden_states", "txt_ids")}
        every_family.run(tilewise.patch(split(model), "sta"), given)


def controlnet(split: Any) -> Any:
    if split:
        model, given = FAMILIES["SD 3"]()
        tilewise.patch(split(model), "dense")
        every_family.run(model, given | {"block_controlnet_hidden_states": [torch.zeros(2, 77, 48)]})


REFUSED = {
    "FramePack": lambda: framepack.tiny(),
    "Animate": lambda: animate.denoiser(layers=1, every=1),
    "Allegro": lambda: allegro.denoiser(),
    "Cosmos of one block": lambda: cosmos.denoiser(num_layers=1),
    "Z-Image": lambda: z_image.tiny(),
}


def cases() -> dict[str, Callable[..., Any]]:
    found: dict[str, Any] = {}
    for name, make in FAMILIES.items():
        # What differs from the family's first case is in any method's way, and so is what such plans have of their own.
        variant = ", " in name or name in OF_KNOWN_PLANS
        for method_name, method in METHODS.items():
            if variant and method_name != "sta":
                continue
            one: Any = functools.partial(forward, make=make, method=method)
            one.ranks = (3,) if variant else RANKS[method_name]
            found[f"{name}: {method_name}"] = one
    for name, make in REFUSED.items():
        run: Any = functools.partial(refused, make=make)
        run.ranks = (2,)
        found[f"refused: {name}"] = run
    for alone in (unpatched, controlnet, short_text):
        run = functools.partial(alone)
        run.ranks = (2,)
        found[f"refused: {alone.__name__}"] = run
    return found
