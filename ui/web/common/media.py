"""Pieces of HTML: clips, previews, numbers. Whatever came from a user or a file is escaped."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tilewise.pipelines.generation.clip_metadata import cost_of
from tilewise.pipelines.media.files import is_still, replacing
from tilewise.ui.common.shares import DENSITY, shares

SMALLEST = 256  # pixels: previews are enlarged to at least this, with hard edges, so that each latent cell shows


def file_url(path: Path) -> str:
    """Where the page's server has a file of the output folder; relative, so that it works behind a path too."""
    return "gradio_api/file=" + quote(str(path))


def video(path: Path, label: str, *, version: str, autoplay: bool = True) -> str:
    """A player, or a picture. version: of the content; a file that was made anew must not come from the browser's cache."""
    source = escape(f"{file_url(path)}?v={version}", quote=True)
    if is_still(path):
        return f'<img class="tw-clip" alt="{escape(label, quote=True)}" src="{source}">'
    play = " autoplay" if autoplay else ""
    return (
        f'<video class="tw-clip" controls loop muted playsinline{play} aria-label="{escape(label, quote=True)}" '
        f'src="{source}"></video>'
    )


def figure(path: Path, label: str, caption: str, *, version: str) -> str:
    """A player with a caption (HTML) and a link to the file."""
    link = download(path, "Download")
    return f"<figure>{video(path, label, version=version)}<figcaption>{caption}<br>{link}</figcaption></figure>"


def pair(figures: Sequence[str]) -> str:
    """Players that page.js starts, stops and moves together."""
    button = '<p class="tw-pair-buttons"><button type="button" class="tw-play">Play or pause both</button></p>'
    return f'<div class="tw-pair" data-sync>{"".join(figures)}{button if len(figures) > 1 else ""}</div>'


def download(path: Path, words: str = "") -> str:
    words = words or ("Download the picture (png)" if is_still(path) else "Download the clip (mp4)")
    source, name = escape(file_url(path), quote=True), escape(path.name, quote=True)
    return f'<a class="tw-download" href="{source}" download="{name}">{escape(words)}</a>'


class Preview:
    """Small pictures (T, h, w, 3) of a run under way, at `fps` a second. Encoded once, when they are first shown."""

    def __init__(self, frames: NDArray[np.uint8], fps: float) -> None:
        self.frames, self.fps = frames, fps

    @cached_property
    def html(self) -> str:
        high, wide = self.frames.shape[1:3]
        width = wide * max(1, -(-SMALLEST // max(high, wide)))
        source = animation(self.frames, self.fps)
        return f'<img class="tw-preview" alt="live preview, made from the latents" width="{width}" src="{source}">'


def animation(frames: NDArray[np.uint8], fps: float) -> str:
    """A data URL of small pictures (T, h, w, 3) as an animated WebP."""
    pictures = [Image.fromarray(frame) for frame in frames]
    out = io.BytesIO()
    duration = max(20, int(1000 / max(fps, 0.1)))
    pictures[0].save(out, "WEBP", save_all=True, append_images=pictures[1:], duration=duration, loop=0, quality=70)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def picture(image: Image.Image) -> str:
    """A data URL of one picture."""
    out = io.BytesIO()
    image.save(out, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def kept_picture(image: Image.Image, folder: Path) -> Path:
    """A WebP file in ``folder`` by its content; there complete or not at all, and never written again."""
    out = io.BytesIO()
    image.save(out, "WEBP", quality=85)
    path = folder / f"tilewise-{hashlib.sha256(out.getvalue()).hexdigest()[:32]}.webp"
    try:
        os.utime(path)  # the page sweeps what has not been shown for long
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(out.getvalue())
    return path


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Pairs of words; the values may hold HTML, the names are escaped."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{value}</td></tr>' for name, value in rows)
    return f'<table class="tw-table">{body}</table>'


def bar(share: float, words: str) -> str:
    """A share of 1 as a bar with its words beside it."""
    return (
        f'<span class="tw-bar" aria-hidden="true"><span style="width:{100 * min(max(share, 0), 1):.1f}%"></span></span> '
        f"{escape(words)}"
    )


def share_rows(density: float, cost: float, name: str = DENSITY) -> list[tuple[str, str]]:
    """Rows of ``table`` for the shares of token pairs that are computed. name: of the density."""
    return [(words, bar(value, f"{value:.3f}")) for words, value in shares(density, cost, name)]


def run_share_rows(run: Mapping[str, Any], name: str = DENSITY) -> list[tuple[str, str]]:
    """The same by the "run" part of a clip's metadata."""
    return share_rows(run["density"], cost_of(run), name)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
