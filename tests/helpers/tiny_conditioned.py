"""Tiny pipelines that make clips from pictures and videos, saved as folders, and files for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tiny_wan
from diffusers import WanImageToVideoPipeline, WanVACEPipeline, WanVACETransformer3DModel, WanVideoToVideoPipeline
from PIL import Image

from tilewise.pipelines.media.video import write_video

# These pipelines take the VAE's factor from the number of its levels, which Wan 2.1's fits, and patches do not.
PLAIN_VAE = {"patch_size": None, "in_channels": 3, "out_channels": 3, "scale_factor_spatial": 2}
NATIVE = {**tiny_wan.NATIVE, "height": 32, "width": 32, "frames": 5, "guidance": 1.0, "max_sequence_length": 8}


def without_ftfy(monkeypatch) -> None:
    """Wan's pipelines call ftfy.fix_text, a library that tests do without."""
    for kind in (WanImageToVideoPipeline, WanVACEPipeline, WanVideoToVideoPipeline):
        stand_in = SimpleNamespace(fix_text=lambda text: text)
        monkeypatch.setattr(sys.modules[kind.__module__], "ftfy", stand_in, raising=False)


def save(folder: Path, kind: str) -> Path:
    """kind: "i2v": first and last picture. "first": a first picture alone. "v2v", "vace"."""
    pipe: Any
    if kind in ("i2v", "first"):
        more = {"image_dim": None, "added_kv_proj_dim": None} if kind == "i2v" else {}
        pipe = tiny_wan.tiny_pipeline(image=True, **more)
    else:
        parts = dict(tiny_wan.tiny_pipeline().components)
        parts["vae"] = tiny_wan.tiny_vae(**PLAIN_VAE)
        if kind == "v2v":
            wanted = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
            pipe = WanVideoToVideoPipeline(**{name: parts[name] for name in wanted})
        else:
            others = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
            told = tiny_wan.tiny_transformer().config
            own = {name: value for name, value in told.items() if not name.startswith("_") and name not in others}
            parts["transformer"] = WanVACETransformer3DModel(
                **own, vace_layers=[0], vace_in_channels=2 * tiny_wan.Z_CHANNELS + 4
            ).eval()
            wanted = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
            pipe = WanVACEPipeline(**{name: parts[name] for name in wanted})
    pipe.save_pretrained(folder)
    (folder / "tilewise.json").write_text(json.dumps(NATIVE))
    return folder


def picture(path: Path, size: tuple[int, int] = (48, 32), seed: int = 0, mode: str = "RGB", **options: Any) -> Path:
    """A file with noise. size: width and height."""
    channels = len(mode) if mode in ("RGB", "RGBA", "LA") else 1
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode if channels > 1 else "L").save(path, **options)
    return path


def video(path: Path, frames: int = 12, size: tuple[int, int] = (48, 32), fps: float = 12) -> Path:
    """A file whose frame n is all of grey 20 n."""
    clip = np.repeat((np.arange(frames) * 20 % 256).astype(np.uint8), size[0] * size[1] * 3)
    return write_video(path, clip.reshape(frames, size[1], size[0], 3), fps)
