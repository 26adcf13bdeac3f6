"""Pipelines that one might look for among those that make windows, and why they do not."""

from __future__ import annotations

WHY = {
    "HunyuanVideoFramepackPipeline": (
        "its own call goes on section after section from a packed history of frames, which it keeps to itself, and decodes each "
        "section: ask it for more frames in one call"
    ),
    "LTX2ImageToVideoPipeline": (
        "its picture is a condition on the first frame alone; LTX2Pipeline takes the same weights, "
        "and goes on by prefix"
    ),
    "CogVideoXImageToVideoPipeline": (
        "its picture is a condition on the whole clip that the last frame of a window does not stand in for here; its "
        "transformer is another one than the CogVideoXPipeline's"
    ),
}
"""Class name → what stands in the way of each way."""
