"""The attention tab: select a position in a frame, and see which tokens its query attends to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.media.video import read_frames
from tilewise.plugins.text_format import counted
from tilewise.plugins.watch import WatchedCall
from tilewise.ui.web.common import media
from tilewise.ui.web.common.messages import error_html, log_unexpected
from tilewise.ui.web.common.safety import RefusedError
from tilewise.ui.web.forms.controls import Controls
from tilewise.ui.web.forms.form_parsing import settings_from, settings_of
from tilewise.ui.web.forms.slider import Slider
from tilewise.ui.web.jobs.clips import Studio
from tilewise.ui.web.jobs.fit import check_fits
from tilewise.ui.web.jobs.job import DONE, Job
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.tabs import attention_picture as picture
from tilewise.ui.web.tabs.attention_query import Place, Seen, layer_at, seen_from
from tilewise.ui.web.tabs.job_view import JobView

ABOUT = """Click a position in the picture. The bright outline marks **what the query there attends to**, in every latent frame of
the clip. Everything outside it is skipped, which saves the time. The sliders do the same from the keyboard."""
PLACE = ("t", "h", "w", "head", "step", "block")
LEAST = (0, 0, 0, 0, 1, 0)
MAX_WATCHED = 2_000_000  # tokens x steps: what a watched block decided is kept in memory
MAX_KEPT = 4  # watched runs whose calls are kept
KIND = "watch"


class AttentionTab:
    """Built inside a gr.Tab. `clip`: the gr.State of the visitor's last clip, which the region is drawn over."""

    def __init__(
        self, controls: Controls, job_queue: JobQueue, studio: Studio, clip: gr.State, tab: gr.Tab, job: Any
    ) -> None:
        self.controls, self.studio = controls, studio
        self._watched: dict[str, tuple[GenerateSettings, list[WatchedCall]]] = {}  # by job, the last runs
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                gr.Markdown("**The query's frame** (click a position)")
                large = gr.Image(
                    label="The query's frame", show_label=False, type="pil", interactive=False, format="webp",
                    buttons=["fullscreen"], elem_id="attention", alt_text="what the query sees in its own frame",
                )  # fmt: skip
                self._cache = Path(large.GRADIO_CACHE)
            with gr.Column(scale=2, min_width=240):
                words = gr.HTML(elem_id="attention-words")
                labels = ("Latent frame", "Row", "Column", "Head", "Step", "Transformer block")
                sliders = [
                    Slider(low, low + 1, low, step=1, label=label, elem_id=f"query-{name}")
                    for label, name, low in zip(labels, PLACE, LEAST, strict=True)
                ]
        gr.Markdown(
            "**Every latent frame**, with the share of it that the query sees (click one to move the query there)"
        )
        film = gr.Image(
            label="Every latent frame", show_label=False, type="pil", interactive=False, format="webp",
            buttons=["fullscreen"], elem_id="attention-strip", alt_text="what the query sees in every latent frame",
        )  # fmt: skip
        gr.Markdown(
            "**Attention that the method expected** at each position, for methods that select blocks while the model runs"
        )
        with gr.Row(elem_classes=["tw-buttons"]):
            go = gr.Button("Watch a run of this block", elem_id="watch")
            stop = gr.Button("Cancel", elem_id="watch-cancel", interactive=False)
        status = gr.HTML(elem_id="watch-status")
        preview = gr.HTML()
        job_queue.register(KIND, self.work)
        self.view = JobView(job_queue, KIND, job, self.start, self.result, [gr.skip()])
        draft = gr.Image(
            label="What the method expected", show_label=False, type="pil", interactive=False, format="webp", visible=False,
            buttons=["fullscreen"], elem_id="attention-draft", alt_text="the low-resolution map of the query",
        )  # fmt: skip
        # The query's place is kept here, by the server, and the sliders show it. A drawing takes its time, and reads the place as
        # it begins: one that was asked for before a click cannot put the query back.
        begun, place = gr.State(False), gr.State(None)  # begun: whether the tab was ever shown; place: None until then
        inputs = [begun, clip, self.view.job, place, *sliders, *controls.inputs]
        outputs = [large, film, draft, words, *sliders]
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        quiet: dict[str, Any] = {"queue": False, **hidden}
        told: dict[str, Any] = {
            "concurrency_limit": None,
            **hidden,
        }  # Gradio tells of a State's change from its queue alone
        tab.select(self.begin, [place], [begun, place, words], **told)
        for number, slider in enumerate(sliders):  # of the others, the browser may not know yet what a click has set
            move = functools.partial(_moved, number)
            slider.input(move, [slider, place], place, trigger_mode="always_last", **told)
        anew: dict[str, Any] = {"trigger_mode": "always_last", **quiet}
        gr.on([begun.change, place.change, clip.change], self.draw, inputs, outputs, **anew)
        controls.moved.then(self.draw, inputs, outputs, **anew)
        here = [place, *controls.inputs]
        large.select(self.picked, here, place, **told)
        film.select(self.picked_in_strip, here, place, **told)
        _, followed = self.view.wire(go, stop, here, status, preview, [clip])
        followed.then(self.draw, inputs, outputs, **quiet)

    def begin(self, place: Sequence[Any] | None) -> tuple[Any, Any, Any]:
        """The tab is shown; (begun, place, words). The query stands in the middle of the first model at first, at its last step
        and block."""
        if place is not None:
            return True, place, gr.skip()
        try:
            name = self.controls.models.names[0]
            skeleton = self.controls.models.skeleton(name)
            settings = resolve_settings(skeleton, "-", method="dense", model=name)
            extent = layer_at(skeleton, settings, 10**6)[1]
        except Exception as error:  # of a model whose files are damaged
            log_unexpected(error)
            return gr.skip(), gr.skip(), error_html(error)
        grid = extent.grid
        return True, (grid.t // 2, grid.h // 2, grid.w // 2, 0, extent.steps, extent.blocks - 1), gr.skip()

    def start(self, place: Sequence[Any], *given: Any) -> tuple[str, dict[str, Any]]:
        settings, seen = self._seen(place, given)
        self._check(settings, seen.extent.grid.tokens)
        check_fits(self.controls.models, settings)
        return settings.prompt[:200], {"settings": settings.to_dict(), "block": seen.place.block}

    def work(self, values: Mapping[str, Any], job: Job) -> dict[str, Any]:
        """Runs the settings and keeps what the block's attention calls decided, until a few more were watched."""
        models, limits = self.controls.models, self.controls.limits
        settings = settings_from(values["settings"], models, limits)
        limits.check(settings)
        check_fits(models, settings)
        block = int(values["block"])
        self._check(settings, layer_at(models.skeleton(settings.model), settings, block)[1].grid.tokens)
        made, calls = self.studio.watched(settings, block, job)
        while len(self._watched) >= MAX_KEPT:
            del self._watched[next(iter(self._watched))]
        self._watched[job.id] = settings, calls
        return {"clip": self.studio.name(made)}

    def result(self, job: Job) -> list[Any]:
        """The clip."""
        return [str(self.studio.find(job.result["clip"]).path)] if job.status == DONE else self.view.nothing

    def _check(self, settings: GenerateSettings, tokens: int) -> None:
        if tokens * settings.steps > MAX_WATCHED:
            raise RefusedError("so large a run cannot be watched here; take a smaller size or fewer steps")
        if settings.method.method.name == "dense":
            raise RefusedError("dense sees everything: there is nothing to watch")

    def draw(self, begun: bool, clip: str | None, job: str, place: Sequence[Any], *given: Any) -> list[Any]:
        if not begun:  # nobody has looked yet
            return [gr.skip()] * (4 + len(PLACE))
        try:
            sliders, values = given[: len(PLACE)], given[len(PLACE) :]
            settings, seen = self._seen(place, values, str(job))
            frames = clip_frames(clip, settings)
            large, film, expected = pictures(seen, frames, settings)
            draft = gr.update(value=self._kept(expected), visible=expected is not None)
            return [
                self._kept(large),
                self._kept(film),
                draft,
                words(seen, frames is not None),
                *_sliders(seen, sliders),
            ]
        except Exception as error:
            log_unexpected(error)
            return [gr.skip(), gr.skip(), gr.skip(), error_html(error), *[gr.skip()] * len(PLACE)]

    def _kept(self, image: Image.Image | None) -> str | None:
        """As a file of Gradio's cache, written once: two drawings of the same picture must not write what a browser reads."""
        return None if image is None else str(media.kept_picture(image, self._cache))

    def picked(self, event: gr.SelectData, place: Sequence[Any], *given: Any) -> Any:
        """A click into the large picture: row and column."""
        try:
            settings, seen = self._seen(place, given)
            size = picture.frame_size((settings.width, settings.height), picture.LARGE)
            grid = seen.extent.grid
            return (place[0], *picture.token_at(*_pixel(event), (grid.h, grid.w), size), *place[3:])
        except Exception as error:
            log_unexpected(error)
            return gr.skip()

    def picked_in_strip(self, event: gr.SelectData, place: Sequence[Any], *given: Any) -> Any:
        """A click into the strip: latent frame, row and column."""
        try:
            settings, seen = self._seen(place, given)
            x, y = _pixel(event)
            size = picture.frame_size((settings.width, settings.height), picture.SMALL)
            grid = seen.extent.grid
            for t, (left, top) in enumerate(picture.strip_places(grid.t, size)):
                if left <= x < left + size[0] and top <= y < top + size[1]:
                    return (t, *picture.token_at(x - left, y - top, (grid.h, grid.w), size), *place[3:])
        except Exception as error:
            log_unexpected(error)
        return gr.skip()

    def _settings(self, given: Sequence[Any]) -> GenerateSettings:
        values = self.controls.values(given)
        values["prompt"] = values["prompt"] or "-"
        return settings_of(self.controls.models, self.controls.limits, values)

    def _seen(self, at: Sequence[Any], given: Sequence[Any], job: str = "") -> tuple[GenerateSettings, Seen]:
        """The settings, and what the query at a place (the numbers of a `Place`) sees; a place outside is moved inside.
        job: the watched run, if there is one."""
        settings = self._settings(given)
        place = Place(*(int(n or 0) for n in at))
        of, calls = self._watched.get(job, (None, []))
        same = of is not None and dataclasses.replace(of, fps=settings.fps) == settings
        models = self.controls.models
        kept = calls if same else ()
        return settings, seen_from(models.skeleton(settings.model), settings, place, kept, models.device)


def clip_frames(clip: str | None, settings: GenerateSettings) -> NDArray[np.uint8] | None:
    """The frames of a visitor's clip, if it has the size of the settings."""
    if not clip or not Path(clip).is_file():
        return None
    frames = _frames(clip, Path(clip).stat().st_mtime_ns)
    return frames if frames.shape[:3] == (settings.frames, settings.height, settings.width) else None


@lru_cache(maxsize=4)
def _frames(clip: str, changed: int) -> NDArray[np.uint8]:
    return read_frames(clip)


def pictures(
    seen: Seen, frames: NDArray[np.uint8] | None, settings: GenerateSettings
) -> tuple[Image.Image, Image.Image, Image.Image | None]:
    """The query's frame, the strip of all, and a strip of what a dynamic method expected, if there is one."""
    grid, place = seen.extent.grid, seen.place
    region = np.zeros(grid.shape, bool) if seen.region is None else seen.region
    bases = picture.base_pictures(frames, grid.shape, (settings.height, settings.width))
    if seen.means is not None:
        bases = [picture.as_means(base, means) for base, means in zip(bases, seen.means, strict=True)]
        region = region | (seen.means > 0)
    large = picture.one_frame(bases[place.t], region[place.t], (place.h, place.w))
    position = (place.t, place.h, place.w)
    draft = None if seen.draft is None else picture.strip(bases, seen.draft, position)
    return large, picture.strip(bases, region, position), draft


def words(seen: Seen, has_clip: bool) -> str:
    """What the picture shows, in words and numbers."""
    grid, place = seen.extent.grid, seen.place
    rows = [("query", f"latent frame {place.t}, row {place.h}, column {place.w} of {escape(str(grid))}")]
    if seen.region is not None:
        share = float(seen.region.mean())
        rows.append(
            ("sees", media.bar(share, f"{int(seen.region.sum()):,} of {seen.region.size:,} tokens: {share:.1%}"))
        )
        if seen.means is not None:
            coarse, cells = int((seen.means > 0).sum()), len(np.unique(seen.means[seen.means > 0]))
            rows.append(("as means", f"{coarse:,} tokens more, as {counted(cells, 'mean')} (blurred in the picture)"))
        frames = int(seen.region.any((1, 2)).sum())
        rows.append(("over time", f"{frames} of {grid.t} latent frames"))
    if grid.text:
        rows.append(("text", f"all {grid.text} tokens, which every query sees"))
    rows.append(("here", escape(f"head {place.head}, step {place.step}, block {place.block}: {seen.words}")))
    hint = "" if has_clip else "<p>Make a clip of this size, and the region is drawn over it.</p>"
    return f"{media.table(rows)}{hint}"


def _moved(number: int, value: Any, place: Sequence[Any]) -> tuple[Any, ...]:
    """A place with one of its numbers changed."""
    return (*place[:number], value, *place[number + 1 :])


def _sliders(seen: Seen, given: Sequence[Any]) -> list[Any]:
    """How far the sliders go here. A value is only sent where it must change: the one that is being dragged stays free."""
    grid, extent, place = seen.extent.grid, seen.extent, seen.place
    most = [grid.t - 1, grid.h - 1, grid.w - 1, extent.heads - 1, extent.steps, extent.blocks - 1]
    updates = []
    for name, low, top, now in zip(PLACE, LEAST, most, given, strict=False):
        value = getattr(place, name)
        # A slider needs room: where there is one value only, it has none to move in.
        change: dict[str, Any] = {"maximum": max(top, low + 1), "interactive": top > low}
        updates.append(gr.update(**change) if now == value else gr.update(value=value, **change))
    return updates


def _pixel(event: gr.SelectData) -> tuple[float, float]:
    x, y = event.index
    return float(x), float(y)
