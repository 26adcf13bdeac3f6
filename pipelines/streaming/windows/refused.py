"""Pipelines that one might look for among those that make windows, and why they do not."""

from __future__ import annotations

WHY = {
    "AnimateDiffPipeline": (
        "the way renoised would fit, but its VAE decodes single pictures, and no stream of those is decoded here"
    ),
    "HunyuanVideoFramepackPipeline": (
        "its own call goes on section after section from a packed history of frames: ask it for more frames in one call"
    ),
    "LTX2Pipeline": ("it denoises sound together with the video, and the sound of a window cannot be chained here"),
    "LTX2ImageToVideoPipeline": "it denoises sound together with the video, and the sound of a window cannot be chained here",
    "CogVideoXImageToVideoPipeline": (
        "its picture is a condition on the whole clip that the last frame of a window does not stand in for here; its "
        "transformer is another one than the CogVideoXPipeline's"
    ),
}
"""Class name → what stands in the way of each way."""
