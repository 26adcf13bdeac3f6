"""highres from pictures and videos: both stages have the conditions that the stock pipeline makes of the files at their size, and
the second one begins with the native clip, noised, everywhere else."""

from __future__ import annotations

import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import test_hunyuan_video
import test_models
import test_qwen_image
import test_skyreels
import tiny_conditioned
import tiny_wan
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from tilewise.pipelines.generation.stock_call import stock_call
from tilewise.pipelines.highres import two_stages
from tilewise.pipelines.highres.two_stages import highres
from tilewise.pipelines.latent_spaces.base import latent_space
from tilewise.pipelines.quality.coherence import Coherence
from tilewise.plugins.errors import ConfigError, UnsupportedModelError

SIZE = {"native": (16, 32), "height": 32, "width": 48, "frames": 5}
LTX = {"native": (32, 64), "height": 64, "width": 96, "frames": 9}
LARGER = {"native": (48, 48), "height": 64, "width": 96, "frames": 5}
STILL = {"native": (32, 32), "height": 48, "width": 64, "frames": 1}


def of_class(kind: type, pipe: Any, **more: Any) -> Any:
    """A pipeline of another class with a pipeline's parts, and its prompts."""
    needed, optional = map(set, kind._get_signature_keys(kind))
    given = {**pipe.components, **more}
    parts = {name: part for name, part in given.items() if name in needed | optional}
    parts.update(dict.fromkeys(needed - set(parts)))
    made = kind(**parts)
    if "encode_prompt" in vars(pipe):
        made.encode_prompt = pipe.encode_prompt
    return made


def wan(image_encoder: bool = True, **options: Any) -> Any:
    more = {} if image_encoder else {"image_dim": None, "added_kv_proj_dim": None}
    pipe = tiny_wan.tiny_pipeline(image=True, **{**more, **options})
    pipe.encode_prompt = lambda **_: (
        test_models.noise(1, 512 if image_encoder else 16, tiny_wan.TEXT_DIM),
        test_models.noise(1, 512 if image_encoder else 16, tiny_wan.TEXT_DIM, seed=1),
    )
    return pipe


def vace() -> Any:
    parts = dict(tiny_wan.tiny_pipeline().components)
    others = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
    told = parts["transformer"].config
    own = {name: value for name, value in told.items() if not name.startswith("_") and name not in others}
    torch.manual_seed(0)
    model = diffusers.WanVACETransformer3DModel(**own, vace_layers=[0], vace_in_channels=2 * tiny_wan.Z_CHANNELS + 4)
    return video_pipe(diffusers.WanVACEPipeline, transformer=model.eval())


def video_pipe(kind: type, **more: Any) -> Any:
    pipe = tiny_wan.tiny_pipeline()
    pipe.encode_prompt = lambda **_: (
        test_models.noise(1, 16, tiny_wan.TEXT_DIM),
        test_models.noise(1, 16, tiny_wan.TEXT_DIM, seed=1),
    )
    return of_class(kind, pipe, vae=tiny_wan.tiny_vae(**tiny_conditioned.PLAIN_VAE), **more)


def skyreels() -> Any:
    made, _ = test_models.skyreels()
    model = test_skyreels.denoiser(
        in_channels=2 * tiny_wan.Z_CHANNELS + tiny_wan.TEMPORAL, image_dim=tiny_wan.IMAGE_DIM, added_kv_proj_dim=32
    )
    of_pictures = {name: part for name, part in wan().components.items() if name.startswith("image_")}
    return of_class(diffusers.SkyReelsV2ImageToVideoPipeline, made, transformer=model, **of_pictures)


def ltx(kind: type) -> Any:
    pipe, _ = test_models.ltx()
    made = of_class(kind, pipe)
    made.scheduler = FlowMatchEulerDiscreteScheduler()
    # A little noise on the pictures, by the timestep, which is another one where the second stage begins.
    made.add_noise_to_image_conditioning_latents = lambda t, first, latents, *_: latents
    return made


def hunyuan_video(kind: str = "token_replace") -> Any:
    pipe, _ = test_models.hunyuan_video()
    model = test_hunyuan_video.tiny(image_condition_type=kind, guidance_embeds=True)
    return of_class(diffusers.HunyuanVideoImageToVideoPipeline, pipe, transformer=model)


def flux(kind: type) -> Any:
    pipe, _ = test_models.flux()
    return of_class(kind, pipe)


def qwen(kind: type) -> Any:
    pipe, _ = test_models.qwen_image()
    pipe.encode_prompt = lambda prompt=None, **_: (
        test_models.noise(1, 7, test_qwen_image.TEXT_DIM, seed=len(prompt or "")),
        torch.ones(1, 7, dtype=torch.int64),
    )
    return of_class(kind, pipe)


def flux2() -> Any:
    pipe, _ = test_models.flux2()
    return pipe


FRAME = slice(None), slice(None), slice(1)  # the first latent frame of (B, C, t, h, w)
C = tiny_wan.Z_CHANNELS
# How the pipeline is made; its size; its files; where a denoiser's arguments have the conditions, and where the latents.
CASES: dict[str, Any] = {
    "Wan I2V": (wan, SIZE, "image", lambda x: x["hidden_states"][:, C:], lambda x: x["hidden_states"][:, :C]),
    "Wan FLF2V": (
        lambda: wan(image_encoder=False), SIZE, "image last_image",
        lambda x: x["hidden_states"][:, C:], lambda x: x["hidden_states"][:, :C],
    ),
    "Wan 5B": (
        lambda: wan(image_encoder=False, expand_timesteps=True, in_channels=C), SIZE, "image",
        lambda x: x["hidden_states"][FRAME], lambda x: x["hidden_states"][:, :, 1:],
    ),
    "VACE": (vace, SIZE, "video mask", lambda x: x["control_hidden_states"], lambda x: x["hidden_states"]),
    "Wan V2V": (lambda: video_pipe(diffusers.WanVideoToVideoPipeline), SIZE, "video", None, lambda x: x["hidden_states"]),
    "SkyReels I2V": (skyreels, SIZE, "image", lambda x: x["hidden_states"][:, C:], lambda x: x["hidden_states"][:, :C]),
    "LTX I2V": (
        lambda: ltx(diffusers.LTXImageToVideoPipeline), LTX, "image",
        lambda x: x["hidden_states"][:1, : 16 * 24], lambda x: x["hidden_states"][:1, 16 * 24 :],
    ),
    "LTX conditions": (
        lambda: ltx(diffusers.LTXConditionPipeline), LTX, "image last_image",
        lambda x: x["hidden_states"][:1, : 2 * 16 * 24], lambda x: x["hidden_states"][:1, 2 * 16 * 24 :],
    ),
    "Kandinsky 5 I2V": (
        lambda: of_class(diffusers.Kandinsky5I2VPipeline, test_models.kandinsky5()[0]), {**LARGER, "frames": 17}, "image",
        lambda x: x["hidden_states"][:, :1], lambda x: x["hidden_states"][:, 1:],
    ),
    "HunyuanVideo I2V": (
        hunyuan_video, LARGER, "image",
        lambda x: x["hidden_states"][FRAME], lambda x: x["hidden_states"][:, :, 1:],
    ),
    "Kontext": (
        lambda: flux(diffusers.FluxKontextPipeline), STILL, "image",
        lambda x: x["hidden_states"][:, 12 * 16 :], lambda x: x["hidden_states"][:, : 12 * 16],
    ),
    "Flux img2img": (lambda: flux(diffusers.FluxImg2ImgPipeline), STILL, "image", None, lambda x: x["hidden_states"]),
    "Flux.2": (
        flux2, STILL, "image", lambda x: x["hidden_states"][:, 12 * 16 :], lambda x: x["hidden_states"][:, : 12 * 16],
    ),
    "Qwen-Image-Edit": (
        lambda: qwen(diffusers.QwenImageEditPipeline), STILL, "image",
        lambda x: x["hidden_states"][:, 3 * 4 :], lambda x: x["hidden_states"][:, : 3 * 4],
    ),
    "Qwen-Image-Edit-Plus": (
        lambda: qwen(diffusers.QwenImageEditPlusPipeline), STILL, "image reference",
        lambda x: x["hidden_states"][:, 3 * 4 :], lambda x: x["hidden_states"][:, : 3 * 4],
    ),
    "Qwen-Image img2img": (
        lambda: qwen(diffusers.QwenImageImg2ImgPipeline), STILL, "image", None, lambda x: x["hidden_states"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    pictures = {
        name: tiny_conditioned.picture(folder / f"{name}.png", (96, 64), seed)
        for seed, name in enumerate(("image", "last_image", "reference"))
    }
    clip = tiny_conditioned.video(folder / "clip.mp4", 9, (48, 32))
    mask = folder / "mask.png"
    Image.fromarray(np.repeat(np.uint8([[0, 255]]), 24, 1).repeat(32, 0)).save(mask)
    return {name: str(path) for name, path in {**pictures, "video": clip, "mask": mask}.items()}


@pytest.fixture(autouse=True)
def small_references(monkeypatch) -> None:
    """Pipelines that look at a picture at a size of their own do so at a megapixel."""
    kontext, edit, plus = (
        sys.modules[kind.__module__]
        for kind in (
            diffusers.FluxKontextPipeline,
            diffusers.QwenImageEditPipeline,
            diffusers.QwenImageEditPlusPipeline,
        )
    )
    monkeypatch.setattr(kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(48, 32)])
    for module in (edit, plus):
        whole = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, whole=whole: whole(64 * 64, ratio))


@pytest.fixture(autouse=True)
def what_takes_the_time_elsewhere(monkeypatch) -> None:
    """The plan of the VAE's memory and the clip's scores, which test_wiring.py and test_coherence.py are about."""
    monkeypatch.setattr("tilewise.pipelines.memory.plan.vae_bytes", lambda *args: 0)
    monkeypatch.setattr(two_stages, "coherence", lambda *clips: Coherence(0.0, 0.0, None))


class Enough(Exception):  # noqa: N818 - no error
    """The first forward was seen."""


class Recorded:
    """The arguments of each forward of a denoiser, by name. once: the first one ends the run."""

    def __init__(self, denoiser: Any, once: bool = False) -> None:
        self.calls: list[dict[str, Any]] = []
        self.once = once
        self.handle = denoiser.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        assert not args
        self.calls.append({name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()})
        if self.once:
            raise Enough


@pytest.mark.parametrize("name", CASES)
def test_conditions_at_both_sizes(files, monkeypatch, name):
    tiny_conditioned.without_ftfy(monkeypatch)
    make, size, roles, condition, noise = CASES[name]
    pipe = make()
    pipe.vae.eval()
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {role: files[role] for role in roles.split()}
    if "reference" in given:
        given["reference"] = [given["reference"]]
    begun: list[torch.Tensor] = []
    real = two_stages.noised
    monkeypatch.setattr(two_stages, "noised", lambda *a, **k: begun.append(real(*a, **k)) or begun[-1])
    recorded = Recorded(pipe.transformer)
    guided = name == "Wan I2V"  # by a global path
    options = {"strength": 0.5, "global_path": "dense" if guided else "none"}
    made = highres(pipe, "a star", **size, steps=2, guidance=1.0, seed=3, **options, **given)
    recorded.handle.remove()
    assert made.frames.shape == (size["frames"], size["height"], size["width"], 3)
    assert made.forwards == {"refreshed": int(guided), "reused": 0, "unguided": 0}
    assert "prepare_latents" not in vars(pipe)
    assert made.clip.settings.image == made.native.settings.image
    assert str(made.clip.settings.image).startswith(str(given.get("image")))
    target = recorded.calls[-1]  # one of the two steps
    for settings, got in ((made.native.settings, recorded.calls[0]), (made.clip.settings, target)):
        stock = Recorded(pipe.transformer, once=True)
        with pytest.raises(Enough):
            stock_call(pipe, settings, lambda *_: None, output_type="latent")
        stock.handle.remove()
        (want,) = stock.calls
        assert want["hidden_states"].shape == got["hidden_states"].shape
        if got is not target:
            assert torch.equal(want["hidden_states"], got["hidden_states"])
            continue
        assert not torch.allclose(noise(want), noise(got))
        if condition is not None:
            assert torch.equal(condition(want), condition(got))
            assert condition(got).numel() and condition(got).float().std() > 0
    # What is no condition is the native clip at its noise level.
    space = latent_space(pipe)
    packed = space.packed(pipe, begun[0])
    if isinstance(pipe, diffusers.Flux2Pipeline):
        packed = pipe._pack_latents(packed)
    whole = noise({"hidden_states": packed})
    if name.startswith("LTX"):  # the noise of the first frame is under the picture
        whole = packed[:, 16 * 24 :]
    if name == "Kandinsky 5 I2V":
        whole = packed[:, 1:]
    torch.testing.assert_close(noise(target).float(), whole.float(), atol=1e-6, rtol=1e-6)


def test_what_is_refused(files, monkeypatch):
    tiny_conditioned.without_ftfy(monkeypatch)
    with pytest.raises(
        ConfigError, match=r"takes no --reference with WanVACEPipeline: VACE's reference pictures are frames"
    ):
        highres(vace(), "a star", **SIZE, reference=[files["reference"]])
    with pytest.raises(ConfigError, match="needs a file for --image"):
        highres(wan(), "a star", **SIZE)
    sized_by_its_picture = object.__new__(diffusers.HunyuanVideo15ImageToVideoPipeline)
    with pytest.raises(UnsupportedModelError, match="its call takes no size, and a larger one cannot be asked for"):
        latent_space(sized_by_its_picture)
    with pytest.raises(UnsupportedModelError, match="those with 'token_replace' are served"):
        highres(hunyuan_video("latent_concat"), "a star", **SIZE, image=files["image"])
