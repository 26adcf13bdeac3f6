"""The page of `tilewise verify`: one HTML file with the measures and, for each pair, frames of both clips and their difference.

The page loads nothing from anywhere, and runs no script. Whatever came from a prompt is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tilewise.pipelines.generation.compare import speedup_words
from tilewise.pipelines.verification.pairs import STRONGER, Pair
from tilewise.pipelines.verification.report import speedup
from tilewise.plugins.text_format import counted
from tilewise.ui.cli.html_report import STYLE

ROWS = {"dense": "dense", "sparse": "{method}", "difference": f"difference × {STRONGER}"}
MORE_STYLE = ".stills img{max-width:256px;width:32%;margin:0 .5% .3rem 0}.stills p{margin:.2rem 0}"
EXPLAINED = (
    "Each pair is from the same prompt, seed and noise. PSNR, SSIM, temporal error and LPIPS say how far a clip is from the "
    "dense one, not which of them is better. They are measured on frames before compression. Temporal error: root mean square "
    "of the difference between the changes from frame to frame, in levels of 255."
)


def summary_cells(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(measure, words) for the table: mean, spread and worst over the pairs."""
    cells = [("pairs", str(summary["pairs"]))]
    if summary["identical"]:
        cells.append(("identical to dense", str(summary["identical"])))
    # (measure, its name, decimals, which end is the worst)
    for key, name, digits, worst in (
        ("psnr", "PSNR, dB", 1, "min"),
        ("ssim", "SSIM", 4, "min"),
        ("temporal", "temporal error, levels", 2, "max"),
        ("lpips", "LPIPS", 4, "max"),
    ):
        if (spread := summary[key]) is not None:
            words = f"{spread['mean']:.{digits}f} ± {spread['std']:.{digits}f} (worst {spread[worst]:.{digits}f})"
            cells.append((name, words))
    for phase in ("denoise", "total"):
        spread = summary[f"speedup_{phase}"]
        words = f"{spread['mean']:.2f} ± {spread['std']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"
        cells.append(
            (
                f"speed-up, {'denoising' if phase == 'denoise' else 'all'}",
                words if spread["n"] > 1 else f"{spread['mean']:.2f} (one pair)",
            )
        )
    density, cost = summary["density"]["mean"], summary["cost"]["mean"]
    cells.append(("density", f"{density:.3f}" + (f" (with means {cost:.3f})" if abs(cost - density) >= 5e-4 else "")))
    if summary["shown_dense"] is not None:
        cells.append(("prompt shown", f"{summary['shown_sparse']:.0%} (dense {summary['shown_dense']:.0%})"))
    cells.append(("dense fallbacks", str(summary["fallbacks"])))
    return cells


def page(report: Mapping[str, Any], pairs: Sequence[Pair]) -> str:
    """The whole page."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    method = report["method"]["method"]["name"] if isinstance(report["method"].get("method"), dict) else "sparse"
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(words)}</td></tr>" for name, words in summary_cells(report["summary"])
    )
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>tilewise verify</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}{MORE_STYLE}</style></head><body>",
        f"<h1>{escape(method)} against dense attention: {counted(len(pairs), 'pair')} of clips</h1>",
        f"<p class=dim>{escape(about(report))}</p>",
        f"<div class=wide><table><tbody>{body}</tbody></table></div><p class=dim>{EXPLAINED}</p>",
    ]
    parts += [_section(pair, method) for pair in pairs]
    told = escape(
        json.dumps({key: report[key] for key in ("method", "settings", "machine")}, indent=1, ensure_ascii=False)
    )
    parts.append(f"<section><h2>Settings</h2><pre>{told}</pre></section>")
    parts.append(f"<p class=dim>Made by tilewise {escape(report['tilewise'])}.</p></body></html>\n")
    return "".join(parts)


def about(report: Mapping[str, Any]) -> str:
    """The model, size and machine in a line."""
    settings, machine = report["settings"], report["machine"]
    size = f"{counted(settings['frames'], 'frame')} of {settings['height']}×{settings['width']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    where = f"{machine.get('device_name')}, {machine.get('dtype')}; {versions}"
    return f"{report['model']['name']}, {size}, {counted(settings['steps'], 'step')}; {where}; {report['date']}"


def _section(pair: Pair, method: str) -> str:
    found = pair.found
    words = ["identical to dense" if found["psnr"] is None else f"PSNR {found['psnr']:.1f} dB"]
    words += [] if found["ssim"] is None else [f"SSIM {found['ssim']:.4f}"]
    words += [] if found["temporal"] is None else [f"temporal error {found['temporal']:.2f}"]
    words += [] if found["lpips"] is None else [f"LPIPS {found['lpips']:.4f}"]
    words += [f"denoising {speedup_words([speedup(found, 'denoise')], 'pair')} as fast", f"seed {found['seed']}"]
    rows = "".join(
        f"<p class=dim>{escape(label.format(method=method))}</p>"
        + "".join(f'<img alt="{escape(which)}" src="data:image/jpeg;base64,{still}">' for still in pair.stills[which])
        for which, label in ROWS.items()
    )
    heading = f'<h2 dir="auto">{escape(found["prompt"][:1000])}</h2><p class=dim>{escape(", ".join(words))}</p>'
    return f"<section>{heading}<div class=stills>{rows}</div></section>"
