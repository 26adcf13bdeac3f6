"""Frames of a stream are rounded as an ordinary clip's are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor

from tilewise.pipelines.media.video import to_uint8
from tilewise.pipelines.streaming.decoding import _to_uint8


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0), (torch.bfloat16, 2)])
def test_rounding_is_that_of_diffusers_for_float32(dtype, most):
    video = (2.4 * torch.rand(1, 3, 4, 16, 24, generator=torch.Generator().manual_seed(0)) - 1.2).to(dtype)
    clip = VideoProcessor(vae_scale_factor=8).postprocess_video(video, output_type="np")[0]
    off = np.abs(_to_uint8(video).numpy().astype(int) - to_uint8(clip))
    assert off.max() <= most and (off.max() > 0) == (most > 0)
