"""``python -m benchmarks.community [FILE …]``: check reports of `tilewise verify`, by default those in this folder; a row each.

A report is refused if values are missing or out of their ranges, if its summary is not that of its pairs, or if its method does
not exist. Whether the clips were as it says cannot be seen from a file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilewise.pipelines.verification.report import check_report
from tilewise.plugins.errors import ConfigError

FOLDER = Path(__file__).parent
MOST = 5 * 2**20  # bytes of a report


def read_report(path: Path) -> dict[str, Any]:
    """The checked report. Raises ConfigError for one that is not right."""
    try:
        if path.stat().st_size > MOST:
            raise ConfigError(f"it has more than {MOST // 2**20} MiB")
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"it cannot be read: {error}") from error
    check_report(report)
    return report


def row(report: dict[str, Any]) -> str:
    """A line of a table: model, method, size, machine and the means."""
    settings, summary, machine = report["settings"], report["summary"], report["machine"]
    size = f"{settings['height']}×{settings['width']}×{settings['frames']}, {settings['steps']} steps"
    close = "identical" if summary["psnr"] is None else f"{summary['psnr']['mean']:.1f} ± {summary['psnr']['std']:.1f}"
    similar = "–" if summary["ssim"] is None else f"{summary['ssim']['mean']:.4f}"
    cells = [
        str(report["model"]["name"]),
        str(report["method"]["method"]["name"]),
        size,
        str(machine.get("device_name")),
        str(summary["pairs"]),
        f"{summary['density']['mean']:.3f}",
        close,
        similar,
        f"{summary['speedup_denoise']['mean']:.2f}",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def main(arguments: Sequence[str]) -> int:
    files = [Path(argument) for argument in arguments] or sorted(FOLDER.glob("*.json"))
    print("| model | method | size | device | pairs | density | PSNR, dB | SSIM | denoising, × dense |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    wrong = 0
    for file in files:
        try:
            print(row(read_report(file)))
        except ConfigError as error:
            wrong += 1
            print(f"{file}: {error}", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
