"""The report of `tilewise compare`: one HTML file that holds everything it shows, readable offline.

The page loads nothing from anywhere: style and script are inside, clips and thumbnails are data URLs, and a content security
policy forbids requests. Whatever came from a manifest is escaped.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import IO
from urllib.parse import quote

from PIL import Image

from tilewise import __version__
from tilewise.pipelines.batch.coherence_comparison import coherence_rows, coherence_words
from tilewise.pipelines.batch.manifest import spent
from tilewise.pipelines.batch.manifest_comparison import ComparedClip, Group, MethodRow
from tilewise.pipelines.generation.compare import speedup_words
from tilewise.pipelines.media.files import is_still
from tilewise.pipelines.media.video import read_frames
from tilewise.plugins.text_format import counted
from tilewise.ui.common.shares import shares_words

THUMBNAIL = 320  # pixels, the longer side

STYLE = """
:root{color-scheme:light dark;--line:#8886;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1400px;padding:0 1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:1rem 0}
th,td{border-bottom:1px solid var(--line);padding:.3rem .7rem;text-align:right}
th:first-child,td:first-child{text-align:left}section{border-top:1px solid var(--line);margin-top:2rem;padding-top:1rem}
.clips{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;max-width:100%;flex:1 1 260px}
video,img{width:100%;height:auto;background:var(--soft);image-rendering:auto}figcaption{font-size:.87rem;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:.2rem 0;overflow-wrap:anywhere}.dim{opacity:.75;font-size:.87rem}
button{font:inherit;margin:.3rem .3rem .6rem 0}
"""

# The clips of a section start together, and follow the first one: separate decoders drift apart.
SCRIPT = """
for (const section of document.querySelectorAll('section')) {
  const clips = [...section.querySelectorAll('video')];
  const button = section.querySelector('button');
  if (!button) continue;
  button.addEventListener('click', () => {
    const play = clips[0].paused;
    for (const clip of clips) {
      if (play) { clip.currentTime = clips[0].currentTime; clip.play().catch(() => {}); } else clip.pause();
    }
    button.textContent = play ? 'Pause all' : 'Play all together';
  });
  clips[0].addEventListener('timeupdate', () => {
    for (const clip of clips.slice(1))
      if (Math.abs(clip.currentTime - clips[0].currentTime) > 0.1) clip.currentTime = clips[0].currentTime;
  });
}
"""


def write_html(file: IO[str], folder: Path, groups: Sequence[Group], rows: Sequence[MethodRow], max_bytes: int) -> int:
    """Writes the page piece by piece. Clips go in while they sum up to at most `max_bytes`; of the others a thumbnail and a
    link to the file, from `folder`, where the page lies. Returns how many clips were left out."""
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    file.write(f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>tilewise compare</title>'
               f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
               f'<meta name="viewport" content="width=device-width,initial-scale=1">'
               f"<style>{STYLE}</style></head><body>")  # fmt: skip
    clips = sum(len(group.clips) for group in groups)
    file.write(f"<h1>{counted(clips, 'clip')}, {counted(len(rows), 'method')}</h1>{_table(rows)}")
    file.write("<p class=dim>Medians over clips. Speed-up: denoising, one run against the dense clip of the same prompt and seed "
               "on the same kind of device. PSNR and SSIM say how far a clip is from the dense one, not which of them is better; "
               "they are measured on the compressed files.</p>")  # fmt: skip
    coherent = coherence_rows(groups)
    if coherent:
        told = "".join(f"<li>{escape(str(row))}</li>" for row in coherent)
        file.write(f"<p>Past the training size, means over clips:</p><ul>{told}</ul>")
    left, out = max_bytes, 0
    for group in groups:
        file.write(_heading(group))
        for clip in group.clips:
            fits = not clip.damaged and clip.line["bytes"] <= left
            left -= clip.line["bytes"] if fits else 0
            out += not fits
            file.write(_figure(clip, folder, coherence_words(clip) if coherent else [], inside=fits))
        file.write("</div></section>")
    file.write(f"<p class=dim>Made by tilewise {escape(__version__)}.</p><script>{SCRIPT}</script></body></html>\n")
    return out


def table_cells(row: MethodRow) -> list[str]:
    """A row of the table as words, in the order of COLUMNS."""
    close = f"{row.psnr:.1f}" if row.psnr is not None else ""
    if row.same:
        close += f"{', ' if close else ''}{row.same} identical"
    return [
        row.method,
        str(row.clips),
        f"{row.density:.3f}",
        f"{row.cost:.3f}",
        f"{row.seconds:.2f}",
        speedup_words(row.speedups, "clip") if row.speedups else "",
        close,
        "" if row.ssim is None else f"{row.ssim:.3f}",
        "" if row.shown is None else f"{100 * row.shown:.0f} %",
        str(row.fallbacks),
    ]


COLUMNS = [
    "method",
    "clips",
    "density",
    "cost",
    "denoise, s",
    "speed-up",
    "PSNR, dB",
    "SSIM",
    "prompt shown",
    "fallbacks",
]


def _table(rows: Sequence[MethodRow]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in table_cells(row))}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class=wide tabindex=0 role=region aria-label="medians by method">{table}</div>'


def _heading(group: Group) -> str:
    line = group.clips[0].line
    frames, steps = counted(line["frames"], "frame"), counted(line["steps"], "step")
    size = f"{frames} of {line['height']}×{line['width']}, {steps}, seed {line['seed']}"
    button = "<button type=button>Play all together</button>" if len(group.clips) > 1 else ""
    prompt = line["prompt"] if len(line["prompt"]) <= 1000 else line["prompt"][:1000] + " …"
    about = f"{line['model']}, {size}"
    return (
        f'<section><h2 dir="auto">{escape(prompt)}</h2><div class=dim>{escape(about)}</div>{button}<div class="clips">'
    )


def _figure(clip: ComparedClip, folder: Path, more: Sequence[str], *, inside: bool) -> str:
    """A clip with its caption; more: words for the end of that."""
    words = [shares_words(clip.line["run"]), f"{spent(clip.line, 'denoise'):.2f} s"]
    if clip.speedup is not None:
        words.append(f"{speedup_words([clip.speedup])} as fast as dense")
    if clip.psnr is not None:
        words.append("identical to dense" if math.isinf(clip.psnr) else f"PSNR {clip.psnr:.1f} dB")
    if clip.ssim is not None and clip.psnr is not None and math.isfinite(clip.psnr):
        words.append(f"SSIM {clip.ssim:.3f}")
    if clip.shown is not None:
        words.append(f"prompt shown {100 * clip.shown:.0f} %")
    words += more
    name = f"<b>{escape(clip.method)}</b>"
    caption = f"<figcaption>{name}<br>{escape(', '.join(words))}<br><span class=dim>{escape(clip.path.name)}</span>"
    if clip.damaged:
        return f"<figure>{caption}<br>missing, or not as the manifest says</figcaption></figure>"
    poster = _thumbnail(clip.path)
    if not inside:
        target = escape(quote(Path(os.path.relpath(clip.path, folder)).as_posix()))
        link = f'<a href="{target}">open the file</a> (left out of the report for its size)'
        return f'<figure><img alt="first frame" src="{poster}">{caption}<br>{link}</figcaption></figure>'
    data = base64.b64encode(clip.path.read_bytes()).decode()
    label = escape(clip.method, quote=True)
    if is_still(clip.path):
        return f'<figure><img alt="{label}" src="data:image/png;base64,{data}">{caption}</figcaption></figure>'
    video = f'<video controls loop muted playsinline aria-label="{label}" poster="{poster}" src="data:video/mp4;base64,{data}">'
    return f"<figure>{video}</video>{caption}</figcaption></figure>"


def _thumbnail(path: Path) -> str:
    frames = read_frames(path)
    picture = Image.fromarray(frames[len(frames) // 2])
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
