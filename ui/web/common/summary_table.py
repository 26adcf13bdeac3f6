"""What the attention calls of a clip did, as an HTML table from its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from tilewise.plugins.text_format import counted

DENSE = "dense: the stock pipeline, not patched, so that nothing was counted"
HEADS = {
    "denoiser": "denoiser", "layers": "blocks", "kind": "kind", "calls": "calls", "density": "density", "cost": "cost",
    "backend": "backend", "seconds": "seconds",
}  # fmt: skip


def summary_html(summary: Mapping[str, Any] | None) -> str:
    """summary: as `Summary.to_dict` writes it; None for dense."""
    if summary is None:
        return f"<p>{DENSE}</p>"
    rows = [{"cost": row["density"], **row} for row in summary["rows"]]
    means = any(_cell(row, "cost") != _cell(row, "density") for row in rows)  # whether there are any to count
    columns = [name for name in HEADS if means or name != "cost"]
    head = "".join(f'<th scope="col">{HEADS[name]}</th>' for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(_cell(row, name))}</td>' for name in columns)}</tr>" for row in rows)
    table = (
        f'<div class="tw-wide"><table class="tw-grid"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    if not summary["rows"]:
        table = "<p>no attention call was counted</p>"
    return table + "".join(f"<p>{escape(note)}</p>" for note in _notes(summary))


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return "–"
    if name == "kind" and row.get("reason"):
        return f"{value}: {row['reason']}"
    if name == "calls":
        return f"{value:,}"
    return {"density": "{:.3f}", "cost": "{:.3f}", "seconds": "{:.2f}"}.get(name, "{}").format(value)


def _notes(summary: Mapping[str, Any]) -> list[str]:
    calls = sum(row["calls"] for row in summary["rows"])
    notes = []
    if summary.get("fused_calls"):
        notes.append(f"fused kernels ran around {summary['fused_calls']:,} of {counted(calls, 'attention call')}")
    if summary.get("recall") is not None:
        probe = summary.get("probe")
        probed = "" if probe is None else f"; measured on probe rows: {probe:.3f}"
        notes.append(f"attention mass kept by sparse calls, estimated: {summary['recall']:.3f}{probed}")
    if summary.get("broken"):
        notes.append(
            f"queries or keys were not finite: {counted(summary['broken'], 'list')} of key blocks kept everything"
        )
    notes += [f"{name} stays dense: {reason}" for name, reason in summary.get("skipped_layers", {}).items()]
    for row in summary.get("cache", ()):
        reused = f"{row['reused']:,} of {counted(row['forwards'], 'forward')} reused"
        notes.append(
            f"cache {row['cache']}, {row['denoiser']}: {reused}, {row['skipped']:,} of {row['modules']:,} {row['skips']} skipped"
        )
    for row in summary.get("vae", ()):
        how = "fused" if row["fused"] else f"stock code ({row['reason']})"
        notes.append(f"vae.{row['part']}: {counted(row['calls'], 'call')}, {how}")
    return [*notes, *summary.get("notes", ())]
