"""`tilewise compare`: measure the clips of manifests, print a table, write a report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track
from rich.table import Table

from tilewise.pipelines.batch.coherence_comparison import coherence_rows
from tilewise.pipelines.batch.manifest_comparison import Group, measured, method_rows, read_groups
from tilewise.pipelines.media.files import check_writable, replacing
from tilewise.pipelines.media.output_names import Outputs
from tilewise.pipelines.media.video import ffmpeg_path, read_frames
from tilewise.pipelines.quality.coherence import repetition
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.text_format import counted
from tilewise.ui.cli.html_report import COLUMNS, table_cells, write_html
from tilewise.ui.common.terminal import say, standard_error, standard_output

REPORT = Path("comparison.html")


def compare_command(manifests: Sequence[Path], out: Path | None, embed: int, *, force: bool = False) -> None:
    """Prints a row a method, and writes the HTML report. embed: MiB of clips that go into the file."""
    if embed < 0:
        raise ConfigError(f"--embed takes a size in MiB of at least 0, not {embed}")
    notes = standard_error()
    groups = read_groups(manifests, notes.note)
    ffmpeg_path()
    outputs = Outputs(out or REPORT, given=out is not None, force=force, settings=False).free()
    check_writable(outputs.file, suffix=".html")
    outputs.check()
    shown = track(measured(groups), "measuring", len(groups), console=notes, disable=not notes.is_terminal)
    found = list(shown)
    rows = method_rows(found)
    table = Table(title="medians over clips; speed-up, PSNR and SSIM against dense", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    for row in rows:
        table.add_row(*table_cells(row))
    standard_output().print(table)
    for line in repetition_lines(found):
        say(line)
    coherent = coherence_rows(found)
    if coherent:
        say("past the training size (means over clips):")
    for told in coherent:
        say(f"  {told}")
    with outputs.claimed() as (report,), replacing(report) as part, part.open("w", encoding="utf-8") as file:
        left_out = write_html(file, report.parent, found, rows, embed * 2**20)
    damaged = sum(clip.damaged for group in found for clip in group.clips)
    if damaged:
        say(
            f"{counted(damaged, 'clip')} {'is' if damaged == 1 else 'are'} missing or not as the manifest says, and not measured"
        )
    if left_out - damaged:
        linked = left_out - damaged
        words = f"{counted(linked, 'clip')} {'is' if linked == 1 else 'are'} linked, not inside"
        say(f"{words}: the clips are more than --embed {embed} MiB")
    say(f"wrote {report}")


def repetition_lines(groups: Sequence[Group]) -> list[str]:
    """How much each method's clips show the same thing several times, and how much more than dense at the same size does."""
    by_method: dict[str, list[tuple[float, float | None]]] = {}
    for group in groups:
        dense: float | None = None
        for clip in group.clips:  # the dense one first
            if clip.damaged:
                continue
            score = repetition(read_frames(clip.path))
            dense = score if clip.is_dense else dense
            excess = None if dense is None else score - dense
            by_method.setdefault(clip.method, []).append((score, excess))
    lines = ["repetition (0 … 1, means over clips; against dense):"] if by_method else []
    for method, scores in by_method.items():
        above = [more for _, more in scores if more is not None]
        told = f", {statistics.mean(above):+.3f}" if above else ""
        lines.append(f"  {method}: {statistics.mean(score for score, _ in scores):.3f}{told}")
    return lines
