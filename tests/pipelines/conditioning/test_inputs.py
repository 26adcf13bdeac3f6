"""Files become arguments of a stock call: the clip's size follows them, and what the pipeline gets is what it gets by hand."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import test_ltx
import torch
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from PIL import Image
from tiny_conditioned import picture, save, video, without_ftfy

import tilewise
from tilewise.pipelines.conditioning.files import InputFile
from tilewise.pipelines.conditioning.inputs import Inputs, files_of, fitted, input_arguments, input_notes
from tilewise.pipelines.conditioning.sizes import size_of_clip
from tilewise.pipelines.generation.compare import compare
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.resolve import explain_settings, resolve_settings
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.generation.stock_call import call_arguments
from tilewise.pipelines.loading.load import load_pipeline, load_skeleton
from tilewise.pipelines.media.input_video import read_video
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.family import Size

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {kind: save(base / kind, kind) for kind in ("i2v", "first", "v2v", "vace")}


@pytest.fixture(scope="module")
def pipes(folders) -> dict[str, Any]:
    return {kind: load_pipeline(folder) for kind, folder in folders.items()}


@pytest.fixture(autouse=True)
def no_ftfy(monkeypatch):
    without_ftfy(monkeypatch)


def by_hand(pipe, settings: GenerateSettings, **files: Any) -> np.ndarray:
    """The stock call's clip, with the files' content given by hand."""
    frames = pipe(**call_arguments(pipe, settings), **files, output_type="np", return_dict=False)[0][0]
    return (frames * 255).round().astype(np.uint8)


def test_a_clip_from_a_first_and_a_last_picture(pipes, tmp_path):
    pipe = pipes["i2v"]
    first, last = picture(tmp_path / "a.png", (64, 40)), picture(tmp_path / "b.png", (64, 40), seed=1)
    settings = resolve_settings(pipe, PROMPT, image=str(first), last_image=str(last), method="dense", steps=2)
    assert (settings.height, settings.width, settings.frames) == (32, 48, 5)  # 32² pixels in the picture's shape
    clip = generate(pipe, settings)
    shown = [fitted(Image.open(path), 32, 48) for path in (first, last)]
    np.testing.assert_array_equal(clip.frames, by_hand(pipe, settings, image=shown[0], last_image=shown[1]))
    without = generate(pipe, dataclasses.replace(settings, last_image=None))
    assert (without.frames != clip.frames).any()


def test_a_video_gives_length_rate_and_shape(pipes, tmp_path):
    pipe = pipes["v2v"]
    path = video(tmp_path / "a.mp4", 12, (80, 32), fps=12)
    settings = resolve_settings(pipe, PROMPT, video=str(path), strength=0.5, method="dense", steps=4)
    # The model's usual 5 frames, of the video's 12.
    assert (settings.height, settings.width, settings.frames, settings.fps) == (16, 48, 5, 12)
    clip = generate(pipe, settings)
    shown = [fitted(frame, 16, 48) for frame in read_video(path, 5)]
    np.testing.assert_array_equal(clip.frames, by_hand(pipe, settings, video=shown, strength=0.5))
    assert "strength 0.5 leaves 2 of 4 timesteps" in str(explain_settings(pipe, settings))
    longer = resolve_settings(pipe, PROMPT, video=str(path), frames=11, fps=5)
    assert (longer.frames, longer.fps) == (11, 5)
    with pytest.raises(ConfigError, match="has 12 frames, and the clip is to have 13: give fewer --frames"):
        resolve_settings(pipe, PROMPT, video=str(path), frames=13)
    notes = input_notes(pipe, Inputs.of(settings))
    assert notes == [
        "a.mp4 is 80×32 and the clip 48×16: 17% of it is cut off at top and bottom",
        "a.mp4 is longer than the clip: its first 5 frames are used",
    ]


def test_a_comparison_warms_up_with_a_strength_that_leaves_a_step(pipes, tmp_path):
    path = video(tmp_path / "a.mp4", 5)
    settings = resolve_settings(pipes["v2v"], PROMPT, video=str(path), method="sta", steps=4)
    result = compare(pipes["v2v"], settings)
    assert result.sparse.frames.shape == result.dense.frames.shape == (5, 32, 48, 3)


def test_a_masked_video_with_references(pipes, tmp_path):
    pipe = pipes["vace"]
    path, mask = video(tmp_path / "a.mp4", 5), picture(tmp_path / "mask.png", (48, 32), mode="L")
    references = [picture(tmp_path / f"{n}.png", (20 + n, 30), seed=n) for n in (1, 2)]
    given = {"video": str(path), "mask": str(mask), "reference": [str(one) for one in references]}
    settings = resolve_settings(pipe, PROMPT, **given, method="dense", steps=2)
    assert settings.frames == 5 and len(settings.reference) == 2
    size = settings.height, settings.width
    clip = generate(pipe, settings)
    shown = [fitted(frame, *size) for frame in read_video(path, 5)]
    masks = [fitted(Image.open(mask).convert("RGB"), *size)] * 5
    expected = by_hand(pipe, settings, video=shown, mask=masks, reference_images=[Image.open(p) for p in references])
    np.testing.assert_array_equal(clip.frames, expected)
    moving = video(tmp_path / "mask.mp4", 4)
    with pytest.raises(ConfigError, match=r"mask.mp4 has 4 frames, and the clip 5"):
        resolve_settings(pipe, PROMPT, **given | {"mask": str(moving)})
    alone = resolve_settings(pipe, PROMPT, reference=[str(references[0])], method="dense", steps=2)
    assert (alone.height, alone.width, alone.frames) == (32, 32, 5)  # the model's own
    assert generate(pipe, alone).frames.shape == (5, 32, 32, 3)


@pytest.mark.parametrize(
    ("size", "given", "expected"),
    [
        ((64, 64), {}, (32, 32)),
        ((40, 160), {}, (64, 16)),
        ((1000, 20), {}, (16, 64)),  # not 50 times as long as high
        ((64, 32), {"height": 32}, (32, 64)),
        ((64, 32), {"width": 32}, (16, 32)),
        ((64, 32), {"height": 48, "width": 16}, (48, 16)),
    ],
)
def test_the_size_follows_the_pictures_shape_unless_given(folders, tmp_path, size, given, expected):
    path = picture(tmp_path / "a.png", size)
    settings = resolve_settings(load_skeleton(folders["i2v"]), PROMPT, image=str(path), **given)
    assert (settings.height, settings.width) == expected


def test_a_pipeline_that_sizes_the_clip_by_its_picture_takes_no_other_size(tmp_path):
    class Own:
        target_size = 640
        video_processor = HunyuanVideo15ImageProcessor(vae_scale_factor=16)

        def __call__(self, image, prompt, num_frames=5): ...

    files = {"image": (InputFile(picture(tmp_path / "a.png", (64, 64))),)}
    native = Size(480, 832, 5)
    found = size_of_clip(Own(), files, native, height=None, width=None, frames=None)
    assert found == (*Own.video_processor.calculate_default_height_width(64, 64, 640), 5, None)
    assert size_of_clip(Own(), files, native, height=found.height, width=found.width, frames=None) == found
    with pytest.raises(ConfigError, match=f"makes {found.width}×{found.height} pixels"):
        size_of_clip(Own(), files, native, height=480, width=832, frames=None)


def test_what_is_cut_off_is_said(pipes, tmp_path):
    path = picture(tmp_path / "a.png", (64, 32))
    settings = resolve_settings(pipes["i2v"], PROMPT, image=str(path), height=32, width=32)
    assert input_notes(pipes["i2v"], Inputs.of(settings)) == [
        "a.png is 64×32 and the clip 32×32: 50% of it is cut off at left and right"
    ]
    marked = np.zeros((32, 64, 3), np.uint8)
    marked[:, 16:48] = 255
    Image.fromarray(marked).save(path)
    settings = resolve_settings(pipes["i2v"], PROMPT, image=str(path), height=32, width=32)
    assert (np.asarray(input_arguments(pipes["i2v"], Inputs.of(settings))["image"]) == 255).mean() > 0.9


def test_settings_know_files_by_their_content(pipes, tmp_path):
    path = picture(tmp_path / "a.png", (32, 32))
    settings = resolve_settings(pipes["i2v"], PROMPT, image=str(path), method="dense", steps=1)
    assert GenerateSettings.from_dict(settings.to_dict()) == settings
    assert settings.image is not None and settings.image.startswith(f"{path}@sha256:")
    again = {name: getattr(settings, name) for name in ("image", "height", "width")}
    assert resolve_settings(pipes["i2v"], PROMPT, **again, method="dense", steps=1) == settings
    picture(path, (32, 32), seed=5)
    with pytest.raises(ConfigError, match=r"--image: .*a.png has changed since the clip was made from it"):
        resolve_settings(pipes["i2v"], PROMPT, **again)
    with pytest.raises(ConfigError, match="has changed"):
        generate(pipes["i2v"], settings)
    path.unlink()
    with pytest.raises(ConfigError, match=r"--image: the file .*a.png is not there"):
        resolve_settings(pipes["i2v"], PROMPT, **again)


def test_files_in_the_wrong_place_are_refused(folders, tmp_path):
    still, clip = str(picture(tmp_path / "a.png")), str(video(tmp_path / "a.mp4", 5))

    def refused(kind: str, said: str, **given: Any) -> None:
        with pytest.raises(ConfigError, match=said):
            resolve_settings(load_skeleton(folders[kind]), PROMPT, **given)

    refused("i2v", "a.mp4 is no picture in a format that is read here; a video is given by --video", image=clip)
    refused("v2v", "a.png is one picture and no video; a picture is given by --image", video=still)
    refused("i2v", "is a folder", image=str(tmp_path))
    refused("first", "--last-image is not for these weights", image=still, last_image=still)
    refused("v2v", "strength must be a number above 0, up to 1", video=clip, strength=1.5)
    refused("i2v", "image takes a file's path", image=" ")


def test_ltx_gets_conditions_with_their_places(tmp_path):
    first, last = str(picture(tmp_path / "a.png")), str(picture(tmp_path / "b.png", seed=1))
    for name, places in (("LTXConditionPipeline", [0, 16]), ("LTX2ConditionPipeline", [0, -1])):
        pipe = object.__new__(getattr(diffusers, name))
        settings = GenerateSettings(
            PROMPT,
            "",
            "m",
            tilewise.resolve("dense"),
            32,
            64,
            17,
            2,
            1.0,
            0,
            8.0,
            image=first,
            last_image=last,
            strength=0.7,
        )
        found = input_arguments(pipe, Inputs.of(settings))["conditions"]
        assert [getattr(one, "frame_index", getattr(one, "index", None)) for one in found] == places
        assert {one.strength for one in found} == {0.7}


def test_ltx_makes_clips_from_them(tmp_path):
    pipe = test_ltx.pipeline(diffusers.LTXConditionPipeline)
    first, last = str(picture(tmp_path / "a.png", (96, 64))), str(picture(tmp_path / "b.png", (96, 64), seed=1))
    clip = str(video(tmp_path / "c.mp4", 7, (96, 64)))  # of which 5 frames are 4 k + 1
    states = {f"{name}prompt_embeds": test_ltx.noise(1, test_ltx.TEXT, 16) for name in ("", "negative_")}
    masks = {f"{name}prompt_attention_mask": torch.ones(1, test_ltx.TEXT).long() for name in ("", "negative_")}

    def run(**files: str) -> torch.Tensor:
        given = input_arguments(pipe, Inputs(files_of(files), 64, 96, 9, 0.9))
        size = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
        return pipe(**states, **masks, **size, generator=torch.Generator().manual_seed(0), **given).frames

    made = [run(), run(image=first), run(image=first, last_image=last), run(video=clip)]
    assert all(float((a - b).abs().max()) > 0.05 for a, b in itertools.combinations(made, 2))


def test_many_pictures_are_one_list_at_their_own_size(tmp_path):
    paths = [str(picture(tmp_path / f"{n}.png", (30 + n, 20))) for n in range(3)]
    pipe = object.__new__(diffusers.Flux2Pipeline)
    settings = GenerateSettings(
        PROMPT,
        "",
        "m",
        tilewise.resolve("dense"),
        32,
        64,
        1,
        2,
        1.0,
        0,
        8.0,
        image=paths[0],
        reference=tuple(paths[1:]),
    )
    assert [one.size for one in input_arguments(pipe, Inputs.of(settings))["image"]] == [(30, 20), (31, 20), (32, 20)]
