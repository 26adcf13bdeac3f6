"""A one-layer denoiser of every family and its inputs: what the tests that hold for all families run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import test_allegro as allegro
import test_chroma as chroma
import test_cogvideox as cogvideox
import test_cogview4 as cogview4
import test_cosmos as cosmos
import test_easyanimate as easyanimate
import test_flux as flux
import test_flux2 as flux2
import test_flux_like as flux_like
import test_hunyuan_framepack as framepack
import test_hunyuan_image as hunyuan_image
import test_hunyuan_video as hunyuan_video
import test_hunyuan_video15 as hunyuan_video15
import test_kandinsky5 as kandinsky5
import test_ltx as ltx
import test_mochi as mochi
import test_motif_video as motif_video
import test_pixart as pixart
import test_qwen_image as qwen_image
import test_sd3 as sd3
import test_skyreels as skyreels
import test_wan_animate as animate
import test_wan_like as wan_like
import test_wan_vace as vace
import test_z_image as z_image
import torch

VIDEO, IMAGE = (4, 5, 8), (1, 8, 11)  # neither is a multiple of the tile


@dataclass(frozen=True)
class Case:
    """A one-layer denoiser and its inputs. axes: of its latents and its output, "n" for packed tokens."""

    make: Callable[[], Any]
    inputs: Callable[[Any], dict[str, Any]]
    axes: str = "bcthw"
    latents: str = "hidden_states"
    text: str = "encoder_hidden_states"


def pixels(size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Latents of a grid with patches of 2 × 2."""
    return size[0], 2 * size[1], 2 * size[2]


CASES = {
    "HunyuanVideo, two streams": Case(
        lambda: hunyuan_video.tiny(num_layers=1, num_single_layers=0),
        lambda m: hunyuan_video.inputs(None, pixels(VIDEO), (6,)),
    ),
    "HunyuanVideo, one stream": Case(
        lambda: hunyuan_video.tiny(num_layers=0, num_single_layers=1),
        lambda m: hunyuan_video.inputs(None, pixels(VIDEO), (6,)),
    ),
    "HunyuanVideo 1.5": Case(
        lambda: hunyuan_video15.tiny(num_layers=1), lambda m: hunyuan_video15.inputs(VIDEO, (6,), (2,), True)
    ),
    "FramePack": Case(
        lambda: framepack.tiny(num_layers=1, num_single_layers=0),
        lambda m: framepack.inputs(pixels(VIDEO), (6,), (1, 3, 5)),
    ),
    "LTX-Video": Case(lambda: ltx.ltx(num_layers=1), lambda m: ltx.inputs(VIDEO), "bnc"),
    "LTX-2": Case(lambda: ltx.ltx2(num_layers=1), lambda m: ltx.inputs2(m, VIDEO), "bnc"),
    **{
        f"CogVideoX {version}": Case(
            lambda version=version: cogvideox.denoiser(version, num_layers=1),
            lambda m: cogvideox.inputs(m, VIDEO),
            "btchw",
        )
        for version in ("sincos", "1.5")
    },
    "Mochi": Case(lambda: mochi.denoiser(num_layers=1), lambda m: mochi.inputs(*VIDEO, prompts=(6, 6))),
    "Cosmos": Case(lambda: cosmos.denoiser(num_layers=1), lambda m: cosmos.inputs("2", *VIDEO, per_frame=True)),
    "Allegro": Case(lambda: allegro.denoiser(num_layers=1), lambda m: allegro.inputs(m, *VIDEO)),
    "Kandinsky 5": Case(
        lambda: kandinsky5.denoiser(num_visual_blocks=1), lambda m: kandinsky5.inputs(*VIDEO), "bthwc"
    ),
    "EasyAnimate": Case(lambda: easyanimate.denoiser(num_layers=1), lambda m: easyanimate.inputs(*VIDEO)),
    "SkyReels-V2": Case(
        lambda: skyreels.denoiser(num_layers=1), lambda m: skyreels.inputs(*VIDEO, forcing=True)
    ),
    "VACE": Case(lambda: vace.denoiser(layers=1, vace_layers=(0,)), lambda m: vace.inputs(*VIDEO, scale=(0.7,))),
    "Animate": Case(lambda: animate.denoiser(layers=1, every=1), lambda m: animate.inputs(*VIDEO)),
    "Flux, two streams": Case(
        lambda: flux.tiny(num_layers=1, num_single_layers=0), lambda m: flux.inputs(*IMAGE[1:]), "bnc"
    ),
    "Flux, one stream": Case(
        lambda: flux.tiny(num_layers=0, num_single_layers=1), lambda m: flux.inputs(*IMAGE[1:]), "bnc"
    ),
    "Flux, reference image": Case(
        lambda: flux.tiny(num_layers=1, num_single_layers=0),
        lambda m: flux.inputs(*IMAGE[1:], reference=(3, 5)),
        "bnc",
    ),
    "Flux.2": Case(lambda: flux2.tiny(num_layers=1, num_single_layers=0), lambda m: flux2.inputs(*IMAGE[1:]), "bnc"),
    "Chroma": Case(
        lambda: chroma.tiny(num_layers=0, num_single_layers=1), lambda m: chroma.inputs(*IMAGE[1:], chroma.PADDED), "bnc"
    ),
    "SD 3": Case(lambda: sd3.tiny(num_layers=1), lambda m: sd3.inputs(*IMAGE[1:]), "bchw"),
    "SD 3.5": Case(lambda: sd3.tiny(**sd3.SD35 | {"num_layers": 1}), lambda m: sd3.inputs(*IMAGE[1:]), "bchw"),
    "Qwen-Image": Case(lambda: qwen_image.tiny(num_layers=1), lambda m: qwen_image.inputs(IMAGE), "bnc"),
    "Bria": Case(lambda: flux_like.bria(num_single_layers=0), lambda m: flux_like.inputs(*IMAGE[1:]), "bnc"),
    "Flux.3": Case(flux_like.flux3, lambda m: flux_like.flux3_inputs(*IMAGE[1:]), "bnc"),
    "Krea 2": Case(lambda: flux_like.krea2(num_layers=1), lambda m: flux_like.krea2_inputs(*IMAGE[1:]), "bnc"),
    "Motif-Video": Case(
        lambda: motif_video.tiny(num_single_layers=0), lambda m: motif_video.inputs(*VIDEO, padded=False)
    ),
    "HunyuanImage": Case(
        lambda: hunyuan_image.tiny(num_single_layers=0), lambda m: hunyuan_image.inputs(*IMAGE[1:]), "bchw"
    ),
    "CogView 4": Case(lambda: cogview4.tiny(num_layers=1), lambda m: cogview4.inputs(*IMAGE[1:]), "bchw"),
    "PixArt": Case(lambda: pixart.pixart(num_layers=1), lambda m: pixart.inputs(8, 8), "bchw"),
    "ChronoEdit": Case(lambda: wan_like.chronoedit(num_layers=1), lambda m: wan_like.inputs(*VIDEO)),
    "Helios": Case(lambda: wan_like.helios(num_layers=1), lambda m: wan_like.helios_inputs(*VIDEO)),
    "AnyFlow": Case(
        lambda: wan_like.anyflow(num_layers=1), lambda m: wan_like.inputs(*VIDEO, frames_first=True), "btchw"
    ),
    "Z-Image": Case(
        lambda: z_image.tiny(n_layers=1, n_refiner_layers=0),
        lambda m: z_image.inputs(*IMAGE[1:]),
        "bcthw",
        "x",
        "cap_feats",
    ),
}  # fmt: skip


def run(model: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**given, return_dict=False)
    out = out[0] if isinstance(out, tuple) else out
    return torch.stack(list(out)) if isinstance(out, list | tuple) else out
