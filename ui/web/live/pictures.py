"""What a stream's next chunk is made from, as a small picture: the frames in a KV cache, or the noise levels of a window."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

CELL, GAP = 18, 2  # pixels
KINDS = {"memory": "memory", "sink": "sink", "ring": "last frames"}


def source_svg(view: Mapping[str, Any]) -> str:
    """SVG of what `ChunkSource.view` tells."""
    return _cache(view) if view["kind"] == "cache" else _noise(view)


def _cache(view: Mapping[str, Any]) -> str:
    """A cell for each latent frame that is kept: its number in the video, and why it is there."""
    frames = view["frames"]
    cells = "".join(
        _cell(i, 0, f"tw-{kind}", f"{KINDS[kind]}: latent frame {number}" if number >= 0 else "averages", number)
        for i, (number, kind) in enumerate(frames)
    )
    words = f"{sum(kind != 'memory' for _, kind in frames)} of {view['window']} latent frames in the cache"
    return _svg(max(len(frames), 1), 1, cells, words)


def _noise(view: Mapping[str, Any]) -> str:
    """The matrix of a window: a row a pass, a column a latent frame; dark is noise."""
    rows, passes = view["levels"], view["passes"]
    cells = "".join(
        _cell(
            column,
            row,
            "tw-noise",
            f"before pass {passes[row] + 1}, latent frame {column + 1} of the window: {level:.2f}",
            share=level,
        )
        for row, levels in enumerate(rows)
        for column, level in enumerate(levels)
    )
    words = f"noise levels of a window of {len(rows[0])} latent frames, from the first pass (top) to the last; full is noise"
    return _svg(len(rows[0]), len(rows), cells, words)


def _cell(x: int, y: int, kind: str, title: str, number: int = -1, share: float = 1.0) -> str:
    step = CELL + GAP
    text = (
        f'<text x="{x * step + CELL / 2}" y="{y * step + CELL / 2 + 3}" text-anchor="middle">{number}</text>'
        if number >= 0
        else ""
    )
    opacity = f' fill-opacity="{share:.3f}"' if share < 1 else ""
    return (
        f'<g class="{kind}"><title>{escape(title)}</title><rect x="{x * step}" y="{y * step}" width="{CELL}" '
        f'height="{CELL}" rx="3"{opacity}/>{text}</g>'
    )


def _svg(columns: int, rows: int, cells: str, words: str) -> str:
    wide, high = columns * (CELL + GAP), rows * (CELL + GAP)
    return (
        f'<svg class="tw-source" role="img" aria-label="{escape(words, quote=True)}" viewBox="0 0 {wide} {high}" '
        f'width="{wide}" height="{high}">{cells}</svg><p class="tw-quiet">{escape(words)}</p>'
    )
