"""The result of a two-stage clip as HTML: both clips and their measurements, from the clip's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from tilewise.pipelines.batch.job import Stages
from tilewise.pipelines.quality.coherence import Coherence
from tilewise.plugins.text_format import counted
from tilewise.ui.common.tables import content_words, method_words
from tilewise.ui.web.common import media
from tilewise.ui.web.forms.highres_form import path_words


def stages_html(path: Path, metadata: Mapping[str, Any]) -> str:
    """Two players that page.js keeps in step, or one where the native clip is no longer there."""
    run, told = metadata["run"], metadata["run"]["highres"]
    stages, forwards = Stages.from_dict(told), told["forwards"]
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in run["seconds"].items() if value)
    found = {name: value for name, value in told["coherence"].items() if name != "excess"}
    guided = f"{forwards['refreshed']} with it, {forwards['reused']} with its cached cross-attention, "
    clip = f"{counted(metadata['frames'], 'frame')} of {metadata['height']}×{metadata['width']}, {metadata['fps']:g} a second"
    native = (
        f"{stages.height}×{stages.width}, {method_words(stages.method)}, {told['native']['seconds']['total']:.2f} s"
    )
    rows = [
        ("prompt", str(metadata["prompt"])[:500]),
        ("clip", f"{clip}, seed {metadata['seed']}"),
        ("native stage", native),
        ("seconds of the second stage", seconds),
        ("coherence", str(Coherence(**found))),
        ("full path", f"{path_words(stages.options)}; forwards: {guided}{forwards['unguided']} without"),
        (
            "fallbacks to dense",
            "; ".join(f"{counted(n, 'call')}: {why}" for why, n in run["fallbacks"].items()) or "none",
        ),
    ]
    if (objects := told.get("objects")) is not None:
        rows.insert(5, ("objects found", f"{objects['clip']}, in the native clip {objects['native']}"))
    if run["content"]:
        rows.append(("prompt shown", content_words(run["content"], metadata["prompt"])))
    if run["peak_memory"].get("bytes"):
        rows.append(("peak memory", f"{media.size(run['peak_memory']['bytes'])} ({run['peak_memory']['of']})"))
    rows.append(("device", f"{run['device_name']}, {run['dtype']}"))
    cells = [(name, escape(words)) for name, words in rows]
    cells += media.run_share_rows(run, "density of the window")
    notes = "".join(f"<p>{escape(note)}</p>" for note in run["notes"])
    version, first = run["frames_sha256"][:12], path.with_name(told["native"]["file"])
    prompt = str(metadata["prompt"])
    figures = [figure(path, f"at the target, {metadata['height']}×{metadata['width']}", prompt, version)]
    if first.is_file():
        figures.insert(0, figure(first, f"native stage, {stages.height}×{stages.width}", prompt, version))
    return f"{media.pair(figures)}{media.table(cells)}{notes}"


def figure(path: Path, words: str, prompt: str, version: str) -> str:
    """One clip with a link to it. version: another one for other content under the same name."""
    return media.figure(path, f"{words}: {prompt}", escape(words), version=version)
