"""Markdown tables from a result file, so that no number in the README is typed by hand: python -m benchmarks.render FILE."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def tables(result: dict[str, Any]) -> str:
    """All sections of a result as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    parts = [f"{result['device']}, {result['date']}; {versions}; `{result['command'].strip()}`"]
    if result.get("attention"):
        parts.append(attention_table(result["attention"]))
    if result.get("step"):
        parts.append(step_table(result["step"]))
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


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
