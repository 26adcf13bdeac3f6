"""What an empty page shows: a clip of the bundled model, dense and sparse, so that one sees what the page is about."""

from __future__ import annotations

import json
from pathlib import Path

from tilewise.ui.web.common import media

FOLDER = Path(__file__).resolve().parents[1] / "look" / "example"


def example_html() -> str:
    """Both clips in step, with the numbers of that run; nothing if this installation has them not."""
    try:
        told = json.loads((FOLDER / "example.json").read_text(encoding="utf-8"))
        figures = []
        for clip in told["clips"]:
            player = media.video(FOLDER / clip["file"], f"{clip['words']}: {told['prompt']}", version="1")
            figures.append(f"<figure>{player}<figcaption>{clip['words']}</figcaption></figure>")
        pair = media.pair(figures)
    except (OSError, ValueError, KeyError):
        return ""
    return (
        f'<div class="tw-example"><p class="tw-quiet">An example of the bundled model: “{told["prompt"]}”. {told["words"]} '
        f"Write a prompt and press Generate to make your own.</p>{pair}</div>"
    )
