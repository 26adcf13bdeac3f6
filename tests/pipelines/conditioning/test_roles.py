"""Which files a pipeline takes is read from its call; another file is refused with those that it takes."""

from __future__ import annotations

import sys

import diffusers
import pytest
import tiny_conditioned

from tilewise.pipelines.conditioning.roles import check_roles, needed_roles, roles_of, share_of_steps
from tilewise.pipelines.errors import SetupError
from tilewise.plugins.errors import ConfigError

TAKES = {
    "WanPipeline": "",
    "WanImageToVideoPipeline": "image! last_image",
    "WanVACEPipeline": "video mask reference",
    "WanVideoToVideoPipeline": "video!",
    "LTXConditionPipeline": "image last_image video",
    "LTX2ConditionPipeline": "image last_image video",
    "LTXImageToVideoPipeline": "image!",
    "HunyuanVideoImageToVideoPipeline": "image!",
    "HunyuanVideo15ImageToVideoPipeline": "image!",
    "HunyuanVideoFramepackPipeline": "image! last_image",
    "SkyReelsV2ImageToVideoPipeline": "image! last_image",
    "CogVideoXImageToVideoPipeline": "image!",
    "CogVideoXVideoToVideoPipeline": "video!",
    "Kandinsky5I2VPipeline": "image!",
    "Cosmos2VideoToWorldPipeline": "image video",
    "FluxImg2ImgPipeline": "image!",
    "FluxFillPipeline": "image! mask!",
    "FluxInpaintPipeline": "image! mask!",
    "FluxKontextPipeline": "image",
    "FluxKontextInpaintPipeline": "image! mask! reference",
    "Flux2Pipeline": "image reference",
    "QwenImageEditPipeline": "image!",
    "QwenImageEditPlusPipeline": "image reference",
    "StableDiffusionImg2ImgPipeline": "image!",
    "StableDiffusionXLImg2ImgPipeline": "image!",
    "StableDiffusion3Img2ImgPipeline": "image!",
    "EasyAnimateInpaintPipeline": "",  # whose videos are tensors
}


def bare(name):
    """A pipeline of a class, without parts: signatures are all that is read."""
    return object.__new__(getattr(diffusers, name))


@pytest.mark.parametrize("name", TAKES)
def test_roles_are_read_from_the_call(name):
    pipe = bare(name)
    needed = needed_roles(pipe)
    assert " ".join(f"{role}{'!' * (role in needed)}" for role in roles_of(pipe)) == TAKES[name]


@pytest.mark.parametrize(
    ("name", "given", "strength", "said"),
    [
        ("WanPipeline", ["image"], None, "--image is not for this WanPipeline: it makes clips from text alone"),
        ("WanVACEPipeline", ["image"], None, "it takes --video, --mask and --reference"),
        ("CogVideoXImageToVideoPipeline", [], None, "needs a file for --image: it takes --image"),
        ("FluxFillPipeline", ["image"], None, "needs a file for --mask: it takes --image and --mask"),
        ("WanVACEPipeline", ["mask", "reference"], None, "--mask says which part of a picture or video is made anew"),
        ("LTXConditionPipeline", ["image", "video"], None, "--image and --video both begin the clip"),
        ("CogVideoXImageToVideoPipeline", ["image"], 0.5, "--strength is not for this CogVideoXImageToVideoPipeline"),
        ("CogVideoXVideoToVideoPipeline", ["video"], 0.2, "strength 0.2 of 4 steps leaves none to run"),
    ],
)
def test_what_a_pipeline_does_not_take_is_refused(name, given, strength, said):
    with pytest.raises(ConfigError, match=said):
        check_roles(bare(name), given, strength, 4)


def test_the_share_of_the_steps_is_the_pipelines_own_where_none_is_given():
    pipe = bare("CogVideoXVideoToVideoPipeline")
    assert (share_of_steps(pipe, None), share_of_steps(pipe, 0.5)) == (0.8, 0.5)
    assert share_of_steps(bare("LTXConditionPipeline"), 0.5) is None  # there it is how closely the picture is kept
    with pytest.raises(ConfigError, match=r"strength 0.8 of 1 step leaves none"):
        check_roles(pipe, ["video"], None, 1)


def test_a_missing_library_is_said_before_anything_is_loaded(monkeypatch):
    module = sys.modules[type(bare("WanVideoToVideoPipeline")).__module__]
    monkeypatch.delattr(module, "ftfy", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="pip install ftfy"):
        check_roles(bare("WanVideoToVideoPipeline"), ["video"], None, 4)
    tiny_conditioned.without_ftfy(monkeypatch)
    check_roles(bare("WanVideoToVideoPipeline"), ["video"], None, 4)
