"""Clips that were made before, from the manifests in the output folder, with thumbnails, and how neighbours differ."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from tilewise.pipelines.batch.manifest import NAME, Line, ManifestError, clip_path, read_manifest
from tilewise.pipelines.batch.manifest_comparison import method_name
from tilewise.pipelines.media.video import read_first_frame
from tilewise.plugins.text_format import counted
from tilewise.ui.web.common import media
from tilewise.ui.web.tabs.highres_result import stages_html

MOST = 60  # clips that the list shows, the latest first
THUMB = 240  # pixels of the longer side
COMPARED = ("model", "negative", "frames", "height", "width", "steps", "guidance", "fps", "max_sequence_length")


@dataclasses.dataclass(frozen=True)
class Past:
    """One clip of a manifest."""

    name: str  # folder and key: what the page calls it by
    path: Path
    line: Line

    @property
    def label(self) -> str:
        """In one line, for screen readers."""
        words = str(self.line["prompt"])[:80]
        size = f"{self.line['frames']}×{self.line['height']}×{self.line['width']}"
        return f"{self.started} · {words} · {self.method} · {size} · seed {self.line['seed']}"

    @property
    def started(self) -> str:
        return str(self.line["run"].get("started", ""))[:16].replace("T", " ")

    @property
    def method(self) -> str:
        stages = self.line["run"].get("highres")
        if stages is None:
            return str(self.line["method"]["method"]["name"])
        return f"two stages, from {stages['native']['height']}×{stages['native']['width']}"

    @property
    def facts(self) -> dict[str, str]:
        """What a card says, by name, in words. Two clips are told apart by these."""
        line = self.line
        facts = {"prompt": str(line["prompt"]), "method": method_name(line), "seed": f"seed {line['seed']}"}
        if line["run"].get("highres") is not None:
            facts["method"] = f"{self.method}, {json.dumps(line['run']['highres'].get('options'), sort_keys=True)}"
        facts["size"] = f"{counted(line['frames'], 'frame')} of {line['height']}×{line['width']}"
        facts["steps"] = counted(line["steps"], "step")
        rest = {name: line.get(name) for name in COMPARED if name not in ("frames", "height", "width", "steps")}
        return facts | {
            name: f"{name.replace('_', ' ')} {value}" for name, value in rest.items() if value not in (None, "")
        }

    @property
    def html(self) -> str:
        """The clip with what is worth knowing about it."""
        run = self.line["run"]
        if run.get("highres") is not None:
            return stages_html(self.path, self.line)
        rows = [
            ("prompt", escape(str(self.line["prompt"])[:500])),
            ("method", escape(method_name(self.line))),
            *media.run_share_rows(run),
            ("seconds", f"{run['seconds']['total']:.2f}"),
            ("device", escape(f"{run['device_name']}, {run['dtype']}")),
        ]
        player = media.video(self.path, str(self.line["prompt"]), version=str(self.line["sha256"])[:12])
        return f'<div class="tw-result">{player}<div>{media.table(rows)}{media.download(self.path)}</div></div>'


def past_clips(outputs: Path, most: int = MOST) -> tuple[list[Past], list[str]]:
    """The latest clips whose files are there, and what could not be read."""
    folders = [outputs, *sorted(path for path in outputs.iterdir() if path.is_dir())] if outputs.is_dir() else []
    found: list[Past] = []
    problems: list[str] = []
    for folder in folders:
        try:
            lines = read_manifest(folder, problems.append)
        except ManifestError as error:
            problems.append(str(error))
            continue
        for key, line in lines.items():
            path = clip_path(folder, line)
            if line["status"] != "done" or path is None:
                continue
            try:
                if path.is_file():
                    past = Past(f"{folder.name}/{key}", path, line)
                    _ = past.label, past.html, past.facts
                    found.append(past)
            except Exception as error:  # whatever is odd about a line, it hides no other clip
                problems.append(f"{folder / NAME}: the line of {path.name:.80} cannot be shown ({error!r:.80})")
    found.sort(key=lambda past: str(past.line["run"].get("started", "")), reverse=True)
    return found[:most], problems


def gallery_html(clips: list[Past], cache: Path, picked: str = "") -> str:
    """Cards with a thumbnail each. Marked is what differs from the next, which was made before it.

    cache: the page's own folder of pictures.
    """
    with ThreadPoolExecutor(2) as pool:  # each waits for an ffmpeg
        thumbs = list(pool.map(lambda past: thumbnail(past.path, past.path.stat().st_mtime_ns, cache), clips))
    cards = []
    for number, (past, thumb) in enumerate(zip(clips, thumbs, strict=True)):
        before = clips[number + 1].facts if number + 1 < len(clips) else past.facts
        cards.append(_card(past, thumb, before, past.name == picked))
    return f'<div class="tw-gallery">{"".join(cards)}</div>'


@lru_cache(maxsize=512)
def thumbnail(path: Path, changed: int, cache: Path) -> Path | None:
    """A small picture of the first frame; None where the file cannot be read. changed: when, so that a new file is read anew."""
    try:
        image = Image.fromarray(read_first_frame(path))
        image.thumbnail((THUMB, THUMB))
        return media.kept_picture(image, cache)
    except Exception:  # a damaged clip has a card without a picture
        return None


def _card(past: Past, thumb: Path | None, before: dict[str, Any], picked: bool) -> str:
    facts = past.facts
    always = ("prompt", "method", "seed", "size", "steps")
    shown = [name for name in facts if name in always or facts[name] != before.get(name)]
    words = {name: _marked(facts[name][:160], facts[name] != before.get(name)) for name in shown}
    rest = " · ".join(words[name] for name in shown if name != "prompt")
    image = f'<img alt="" loading="lazy" src="{escape(media.file_url(thumb), quote=True)}">' if thumb else "<i></i>"
    return (
        f'<button type="button" class="tw-card" data-action="pick" data-name="{escape(past.name, quote=True)}" '
        f'aria-pressed="{str(picked).lower()}" aria-label="{escape(past.label, quote=True)}">{image}'
        f'<span class="tw-prompt">{words["prompt"]}</span><span class="tw-quiet">{rest}</span>'
        f'<span class="tw-quiet">{escape(past.started)}</span></button>'
    )


def _marked(words: str, different: bool) -> str:
    return f"<mark>{escape(words)}</mark>" if different else escape(words)
