"""Tables of what people combine, as lines of cells: clips with caches and 8 bits, and clips of few steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SCORES = ("count", "colour", "shape", "motion", "background", "everything")


def few_steps_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A way to run a line, and how its clips differ from dense ones of as many steps."""
    dense = {row["steps"]: row["scores"] for row in rows if row["what"] == "dense"}
    lines = [["steps", "", "density where sparse", "PSNR to dense, dB", *SCORES]]
    for row in rows:
        exact = dense[row["steps"]]
        if row["what"] == "dense":
            cells = ["–", "–", *(f"{exact[name]:.1%}" for name in SCORES)]
        else:
            change = [f"{100 * (row['scores'][name] - exact[name]):+.1f}" for name in SCORES]
            cells = [f"{row['density']:.2f}", f"{row['psnr']['mean']:.1f}", *change]
        lines.append([str(row["steps"]), row["what"], *cells])
    return lines


def clips_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A way to run a line: seconds of a clip and how many times faster than stock, for each model and number of steps."""
    columns = list(dict.fromkeys((row["model"], row["steps"]) for row in rows))
    found = {(row["model"], row["steps"], row["what"]): row for row in rows}
    lines = [["", *(f"{model}, {steps} steps" for model, steps in columns)]]
    stock = [next(row for row in rows if (row["model"], row["steps"]) == column) for column in columns]
    lines.append(["stock", *(f"{row['stock_seconds']:.1f} s" for row in stock)])
    for what in dict.fromkeys(row["what"] for row in rows):
        cells = [found.get((*column, what)) for column in columns]
        lines.append(
            [what, *("–" if row is None else f"{row['seconds']:.1f} s ({row['speedup']:.2f} ×)" for row in cells)]
        )
    return lines
