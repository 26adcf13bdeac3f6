"""Markdown tables from result files, so that no number in the README is typed by hand.

``python -m benchmarks.render`` rewrites the tables of README.md: each stands between ``<!-- results FILE -->`` and
``<!-- /results -->`` and is made of that file in benchmarks/results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- results (\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def tables(result: dict[str, Any]) -> str:
    """All sections of a result as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    parts = [f"{result['device']}, {result['date']}; {versions}; `{result['command'].strip()}`"]
    if result.get("attention"):
        parts.append(attention_table(result["attention"]))
    if result.get("step"):
        parts.append(step_table(result["step"]))
    if result.get("launch"):
        parts.append(launch_table(result["launch"]))
    if result.get("notes"):
        parts.append("\n".join(f"- {note}" for note in result["notes"]))
    return "\n\n".join(parts)


def attention_table(rows: list[dict[str, Any]]) -> str:
    peers = sorted({peer for row in rows for peer in row["peers"]})
    head = ["work", "density", "computed", "ours, ms", "with permutes, ms", *(f"{p}, ms" for p in peers)]
    head += [f"× {p}" for p in peers] + [f"of ideal ({p})" for p in peers]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [
            row["name"],
            f"{row['density']:.3f}",
            f"{row['work']:.3f}",
            f"{row['ours']['ms']:.2f}",
            f"{row['ours_with_permutes']['ms']:.2f}",
        ]
        cells += [f"{row['peers'][p]['ms']:.2f}" if p in row["peers"] else "–" for p in peers]
        cells += [f"{row['speedup'][p]:.2f}" if p in row["speedup"] else "–" for p in peers]
        cells += [f"{row['fraction_of_ideal'][p]:.2f}" if p in row["peers"] else "–" for p in peers]
        lines.append(cells)
    return _markdown(lines)


def step_table(rows: list[dict[str, Any]]) -> str:
    lines = [["denoiser forward", "attention", "density", "ms", "× best stock", "peak GiB"], ["---"] * 6]
    for row in rows:
        best = min(s["ms"] for s in row["stock"].values())
        for name, stock in row["stock"].items():
            cells = [row["name"], f"stock, {name}", "1", f"{stock['ms']:.1f}", f"{best / stock['ms']:.2f}"]
            lines.append([*cells, f"{stock['peak_gib']:.2f}"])
        for name, ours in row["patched"].items():
            cells = [row["name"], name, f"{ours['density']:.3f}", f"{ours['ms']:.1f}", f"{ours['speedup']:.2f}"]
            lines.append([*cells, f"{ours['peak_gib']:.2f}"])
    return _markdown(lines)


def launch_table(launch: dict[str, Any]) -> str:
    """The four fastest configurations of each head dimension."""
    lines = [[launch["work"], "tile M × N", "warps", "stages", "ms", "TFLOP/s on kept pairs"], ["---"] * 6]
    timed = [row for row in launch["rows"] if "ms" in row]
    for head_dim in dict.fromkeys(row["head_dim"] for row in timed):
        best = sorted((row for row in timed if row["head_dim"] == head_dim), key=lambda row: row["ms"])[:4]
        for row in best:
            size = f"{row['BLOCK_M']} × {row['BLOCK_N']}"
            cells = [f"head dim {head_dim}", size, str(row["num_warps"]), str(row["num_stages"])]
            lines.append([*cells, f"{row['ms']:.2f}", str(row["tflops"])])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def rendered(text: str) -> str:
    """A Markdown text with every marked table made anew from its result file."""

    def table(match: re.Match[str]) -> str:
        result = json.loads((ROOT / "benchmarks" / "results" / match[2]).read_text(encoding="utf-8"))
        return f"{match[1]}{tables(result)}\n{match[3]}"

    return MARKED.sub(table, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text(encoding="utf-8")), encoding="utf-8")
