"""Markdown tables from result files, so that no number in the README is typed by hand.

``python -m benchmarks.render`` rewrites the tables of README.md and docs/*.md: each stands between ``<!-- results FILE -->`` and
``<!-- /results -->`` and is made of that file in benchmarks/results. Behind FILE may stand the tables that are wanted, some of

    glance headline others attention implementations dynamic windows quality presets few_steps clips methods errors method_errors
    gist highres coherence paths step families time fused streaming vae gpus unets launch missing

and without any, all of them do. A file may have notes, written by hand: section → sentences that stand below its tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.recipe_tables import clips_lines, few_steps_lines

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- results (\S+)((?: \w+)*) -->\n).*?(<!-- /results -->)", re.DOTALL)
Rows = list[dict[str, Any]]
NAMES = {"cudnn": "cuDNN", "fa3": "FA3", "fa4": "FA4", "fa4 dense": "FA4 dense", "flash-sdpa": "flash SDPA"}
OVER = ("over dense", "over FreeSwim")
NAMES |= {"sage": "SageAttention (int8)", "sdpa": "SDPA"}


def tables(result: dict[str, Any], wanted: Iterable[str] = (), header: bool = True) -> str:
    """The wanted tables of a result as Markdown; all of them if none is named.

    Raises:
        ValueError: for a table that there is not.
    """
    wanted = tuple(wanted) or tuple(TABLES)
    if unknown := set(wanted) - set(TABLES):
        raise ValueError(f"no such table: {sorted(unknown)}; there are {', '.join(TABLES)}")
    parts = []
    shown = {TABLES[name][0] for name in wanted}
    if header:
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        commands = "; ".join(f"`{command.strip()}`" for command in _commands(result["commands"], wanted))
        parts.append(f"{result['device']}, {result['date']}; {versions}; {commands}")
    for name in wanted:
        section, table = TABLES[name]
        rows = result["sections"].get(section, []) if section else [r for s in result["sections"].values() for r in s]
        if rows and (text := table(rows)):
            parts.append(text)
    notes = [note for section, told in result.get("notes", {}).items() if section in shown for note in told]
    if header and notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts)


def _commands(commands: list[str], wanted: tuple[str, ...]) -> list[str]:
    """Those of a result's commands that made the wanted tables; all, if that cannot be told."""
    marks = [MADE_BY.get(TABLES[name][0], f"--only {TABLES[name][0]}") for name in wanted if TABLES[name][0]]
    mine = [command for command in commands if any(mark in f"{command} " for mark in marks)]
    return mine if mine and set(wanted) != set(TABLES) else commands


def attention_table(rows: Rows) -> str:
    """What runs by itself on each work, against the dense peers that matter. Other backends are in the next table."""
    dense = _names(rows, "dense")
    over = [name for name in ("cudnn", "fa3") if name in dense] or dense
    head = [
        "work",
        "density",
        "kept / needed",
        "ours, ms",
        "with permutes, ms",
        "TFLOP/s",
        *(f"× {_title(n)}" for n in over),
    ]
    lines = [[*head, "of ideal"]]
    for row in rows:
        ours = next((r for r in row["implementations"] if r["name"] == row.get("chosen")), None)
        cells = [row["name"], f"{row['density']:.3f}", f"{row['work'] / row['density']:.2f}"]
        if ours is None:
            lines.append([*cells, *["–"] * (len(lines[0]) - len(cells))])
            continue
        # Permutes were timed around the fastest backend, which need not be the one that is chosen.
        permuted = _spread(row["with_permutes"]) if row.get("best") == row["chosen"] else "–"
        cells += [f"{_spread(ours)} ({ours['name']})", permuted, f"{ours['tflops']:.3g}"]
        cells += [f"{ours['over'][n]:.2f}" if n in ours.get("over", {}) else "–" for n in over]
        lines.append([*cells, f"{ours['of_ideal']:.2f}" if "of_ideal" in ours else "–"])
    return _markdown(lines)


def implementations_table(rows: Rows) -> str:
    """Milliseconds of everything that ran, own backends first, dense ones last."""
    names = [name for kind in ("ours", "8-bit", "sparse", "dense") for name in _names(rows, kind)]
    lines = [["ms: median ± half the range", *map(_title, names)]]
    for row in rows:
        found = {r["name"]: r for r in row["implementations"]}
        lines.append([row["name"], *(_spread(found[n]) if n in found else "–" for n in names)])
    return _markdown(lines)


def dynamic_table(rows: Rows) -> str:
    """What looking costs, and what is left."""
    over = [name for name in ("cudnn", "fa3") if any(name in row["over"] for row in rows)]
    head = ["method and call", "density", "planning, ms", "attention, ms", "summaries, ms"]
    around = any("around" in row["parts"] for row in rows)
    head += ["around, ms", "all, ms"] if around else ["all, ms"]
    lines = [[*head, *(f"× {_title(name)}" for name in over), "of ideal", "planning / dense"]]
    for row in rows:
        parts = row["parts"]
        cells = [row["name"], f"{row['density']:.3f}", *(f"{parts[n]:.2f}" for n in ("planning", "attention"))]
        shown = ("summaries", "around") if around else ("summaries",)
        cells += [*(f"{parts[name]:.2f}" if name in parts else "–" for name in shown), _spread(row)]
        cells += [f"{row['over'][name]:.2f}" if name in row["over"] else "–" for name in over]
        cells += [f"{row['of_ideal']:.2f}", f"{row['planning_share']:.1%}"] if "of_ideal" in row else ["–", "–"]
        lines.append(cells)
    return _markdown(lines)


def quality_table(rows: Rows) -> str:
    """Clips of the demo model beside their dense twins: a variant a line, a density a column."""
    return _by_density(
        rows,
        lambda row: row["name"].split(", density")[0],
        "clips",
        "PSNR to dense (worst), dB · everything right",
        lambda row: f"{row['psnr']['mean']:.1f} ({row['psnr']['min']:.1f}) · {row['scores']['everything']:.0%}",
    )


def methods_table(rows: Rows) -> str:
    """Every method at equal kept pairs: a variant a line, a density a column."""
    return _by_density(
        rows,
        lambda row: row["name"].split(", density")[0],
        "clips",
        "cost · PSNR to dense, dB · everything right",
        lambda row: f"{row['cost']:.3f} · {row['psnr']['mean']:.1f} · {row['scores']['everything']:.0%}",
    )


PRESETS_IN_8_BITS = {"clip_int8": "with int8 attention", "clip_int8_fp8": "and fp8 linear layers"}


def presets_table(rows: Rows) -> str:
    """A preset a line: how its small clips differ from dense, and seconds of a clip at real size where they were measured."""
    dense = {row["name"].split(":")[0]: row for row in rows if row["preset"] == "dense"}
    clips = [row["clip"] for row in rows if row["clip"]]
    names = ("count", "colour", "shape", "motion", "background", "everything")
    head = ["preset", "density where sparse", "PSNR to dense, dB", *names]
    if clips:
        head[2:2] = [f"{clips[0]['name'].split(',')[0]} clip, s", "× stock clip"]
    faster = {key: said for key, said in PRESETS_IN_8_BITS.items() if any(row.get(key) for row in rows)}
    head[4:4] = faster.values()
    lines = [head]
    for row in rows:
        scores, clip, about = row["scores"], row["clip"], row["name"].split(":")[0]
        if row["preset"] == "dense":
            cells = [
                about,
                "1.000",
                *(("–", "–") if clips else ()),
                *["–"] * len(faster),
                "–",
                *(f"{scores[name]:.1%}" for name in names),
            ]
        else:
            at_size = (
                [f"{clip['seconds']:.0f} (stock {clip['stock_seconds']:.0f})", f"{clip['speedup']:.2f}"]
                if clip
                else ["–", "–"]
            )
            spread = f" ± {row['psnr']['std']:.1f}" if "std" in row["psnr"] else ""
            cells = [f"`{row['preset']}`", f"{(clip or row)['density']:.3f}", *(at_size if clips else ())]
            cells += [f"{row[key]['speedup']:.2f}" if row.get(key) else "–" for key in faster]
            exact = dense[about]["scores"]
            cells += [
                f"{row['psnr']['mean']:.1f}{spread}",
                *(f"{100 * (scores[name] - exact[name]):+.1f}" for name in names),
            ]
        lines.append(cells)
    return _markdown(lines)


def errors_table(rows: Rows) -> str:
    """Attention calls of the demo model: a variant a line, a density a column."""
    return _by_density(
        rows,
        lambda row: row["name"].split(", density")[0],
        "attention calls",
        "relative error · recall",
        lambda row: f"{row['error']:.3f} · {row['recall']:.2f}" if row["recall"] is not None else f"{row['error']:.3f}",
    )


def highres_table(rows: Rows) -> str:
    """Steps past the training size: a way a line, how often its global path runs a column."""
    every = sorted({step["k"] for row in rows for step in row["steps"] if step["k"]})
    shown = "s · × dense · × FreeSwim"
    lines = [["high-resolution step", "", "peak GiB, one cache", *(f"k={k}: {shown}" for k in every)]]
    for row in rows:
        if len(row["steps"]) < 2:  # nothing to compare
            continue
        partly = row["layers_run"] < row["layers"]
        title = _layers_title(row)
        for number, name in enumerate(dict.fromkeys(step["name"] for step in row["steps"])):
            way, _, guided = name.rpartition(", ")
            peak = row["peak_gib"].get(way if guided in ("prompt guided", "guided") else name)
            cells = ["" if number else title, name, "–" if partly or peak is None else f"{peak:.1f}"]
            found = {step["k"]: step for step in row["steps"] if step["name"] == name}
            for k in every:
                step = found.get(k) or (found.get(None) if k == every[0] else None)
                over = [f"{step[key]:.2f}" if step.get(key) else "–" for key in OVER] if step else []
                cells.append(" · ".join([f"{step['seconds']:.2f}", *over]) if step else "–")
            lines.append(cells)
    return _markdown(lines)


def highres_gist_table(rows: Rows) -> str:
    """A size past the training one a line: dense, FreeSwim and the main ways of ours."""
    usual = ("prompt guided", 5), ("guided", 5)  # ``highres``'s defaults, with two forwards a step and with one
    ways = {
        "FreeSwim, cached": [("FreeSwim", usual)],
        "window alone": [("ours", (("window alone", None),))],
        "two paths": [("ours", usual)],
        "draft": [("ours, draft", usual)],
        "int8": [("ours, draft, int8", usual), ("ours, int8", usual)],
        "careful": [("ours", (("both guided", 2), ("guided", 2)))],
    }
    lines = [["seconds a step (× dense)", "dense", *ways]]
    for row in rows:
        found = {(step["name"], step["k"]): step for step in row["steps"]}
        if len(found) < 2:
            continue
        dense = found.get(("stock dense", None))
        cells = [_layers_title(row), f"{dense['seconds']:.2f}" if dense else "–"]
        for names in ways.values():
            each = [found.get((f"{way}, {kind}", k)) for way, kinds in names for kind, k in kinds]
            step = next((s for s in each if s), None)
            over = f" ({step['over dense']:.2f})" if step and step.get("over dense") else ""
            cells.append(f"{step['seconds']:.2f}{over}" if step else "–")
        lines.append(cells)
    return _markdown(lines) if len(lines) > 1 else ""


def _layers_title(row: dict[str, Any]) -> str:
    partly = row["layers_run"] < row["layers"]
    return f"{row['name']}, {row['layers_run']} of {row['layers']} layers run" if partly else row["name"]


def global_path_table(rows: Rows) -> str:
    """What a coarser global path changes."""
    lines = [["one forward of", "global path", "differs from dense by", "at most"]]
    for row in rows:
        title = f"{row['name']}, {row['clips']} clips, σ {row['levels'].replace(',', ', ')}"
        for number, (name, found) in enumerate(row["paths"].items()):
            lines.append(["" if number else title, name, f"{found['lost']:.4f}", f"{found['lost_max']:.4f}"])
    return _markdown(lines)


def unets_table(rows: Rows) -> str:
    """Runs of 50 steps of SDXL past its training size, as sums of their forwards."""
    lines = [["50 steps, two samples a forward", "", "s", "of stock"]]
    for row in rows:
        for number, (name, taken) in enumerate(row["runs"].items()):
            share = f"{taken / row['runs']['stock']:.2f}" if "stock" in row["runs"] else "–"
            lines.append(["" if number else row["name"], name, f"{taken:.1f}", share])
    return _markdown(lines)


def highres_quality_table(rows: Rows) -> str:
    """The demo model past its native 128²: what the detector finds, and how sharp it is."""
    head = ["demo model at", "", "clips", "one object", "everything right", "objects", "repetition", "sharpness"]
    head.append("denoising, s, many at once")
    lines = [head]
    for row in rows:
        for number, v in enumerate(row["variants"]):
            count = "–" if v["count"] is None else f"{v['count']:.0%}"
            cells = ["" if number else row["name"], v["name"], str(v["clips"]), count, f"{v['everything']:.0%}"]
            lines.append([*cells, f"{v['objects']:.2f}", f"{v['excess']:+.3f}", f"{v['sharpness']:.2f}"])
            lines[-1].append(f"{v['seconds']:.1f}")
    return _markdown(lines)


def _by_density(rows: Rows, place: Callable[[dict], str], what: str, shown: str, cell: Callable[[dict], str]) -> str:
    densities = sorted({row["density_asked"] for row in rows}, reverse=True)
    lines = [[what, "variant", *(f"density {d:g}: {shown}" for d in densities)]]
    found = {(place(row), row["variant"], row["density_asked"]): cell(row) for row in rows}
    for where in dict.fromkeys(w for w, _, _ in found):
        for number, variant in enumerate(dict.fromkeys(v for w, v, _ in found if w == where)):
            cells = [found.get((where, variant, d), "–") for d in densities]
            lines.append(["" if number else where, variant, *cells])
    return _markdown(lines)


def step_table(rows: Rows) -> str:
    head = ["denoiser forward", "", "density", "ms", "× stock", "× stock, cuDNN", "× stock, compiled", "peak GiB"]
    lines = [[*head, "difference from stock"]]
    for row in rows:
        title = f"{row['name']}, grid {'×'.join(map(str, row['grid']))}"
        for number, variant in enumerate(row["variants"]):
            cells = ["" if number else title, variant["name"], f"{variant['density']:.3f}", _spread(variant)]
            stocks = ("stock", "stock, cuDNN", "stock, torch.compile")
            cells += [f"{variant['over'][n]:.2f}" if n in variant["over"] else "–" for n in stocks]
            cells.append(f"{variant['peak_gib']:.2f}" if "peak_gib" in variant else "–")
            lines.append([*cells, f"{variant['relative_error']:.1e}" if "relative_error" in variant else ""])
    return _markdown(lines)


def families_table(rows: Rows) -> str:
    """As ``step_table``; where a window was measured, also what a window that holds everything changes, which is rounding."""
    head = ["denoiser forward", "layers", "", "density", "ms", "× stock", "× stock, cuDNN", "peak GiB"]
    lines = [[*head, "difference from stock"]]
    for row in rows:
        title = f"{row['name']}, grid {row['grid']}"
        for number, variant in enumerate(row["variants"]):
            cells = ["", ""] if number else [title, row["layers"]]
            cells += [variant["name"], f"{variant['overall_density']:.3f}" if "overall_density" in variant else "1.000"]
            cells.append(_spread(variant))
            cells += [f"{variant['over'][n]:.2f}" if n in variant["over"] else "–" for n in ("stock", "stock, cuDNN")]
            cells.append(f"{variant['peak_gib']:.2f}" if "peak_gib" in variant else "–")
            error = f"{variant['relative_error']:.1e}" if "relative_error" in variant else ""
            if "window_changes" in variant:
                error = f"full window {error or 'not run'}; this one {variant['window_changes']:.1e}"
            lines.append([*cells, error])
    return _markdown(lines)


def headline_table(rows: Rows) -> str:
    """Of every denoiser forward: exact and sparse against stock, as they come out of the box."""
    lines = [["denoiser forward", "layers", "with tilewise", "density", "stock, ms", "ms", "× stock", "× stock, cuDNN"]]
    for row in rows:
        variants = row.get("variants", [])
        stock = next((v for v in variants if v["name"] == "stock"), None)
        ours = [v for v in variants if v["name"].startswith("tilewise, ")]
        ours = [v for v in ours if not v["name"].endswith(("not fused", "torch.compile"))]
        for number, variant in enumerate(ours if stock else []):
            assert stock is not None
            cells = [
                "",
                "",
                variant["name"].removeprefix("tilewise, "),
                f"{variant.get('overall_density', variant['density']):.3f}",
            ]
            if not number:
                cells[:2] = [row["name"], str(row["layers"])]
            over = [f"{variant['over'][n]:.2f}" if n in variant["over"] else "–" for n in ("stock", "stock, cuDNN")]
            lines.append([*cells, "" if number else f"{stock['ms']:.0f}", f"{variant['ms']:.0f}", *over])
    return _markdown(lines) if len(lines) > 1 else ""


def glance_table(rows: Rows) -> str:
    """A denoiser forward a line: how many times faster than stock each of the main variants is, and its milliseconds."""
    names = ("dense", "STA window (3,3,3)", "STA density 0.2", "draft density 0.25")
    lines = [["denoiser forward", "stock, ms", *names]]
    for row in rows:
        found = {v["name"]: v for v in row.get("variants", [])}
        if "stock" not in found:
            continue
        ours = [found.get(f"tilewise, {name}") for name in names]
        cells = [f"{v['over']['stock']:.2f} × ({v['ms']:.0f} ms)" if v and "stock" in v["over"] else "–" for v in ours]
        lines.append([row["name"], f"{found['stock']['ms']:.0f}", *cells])
    return _markdown(lines) if len(lines) > 1 else ""


def time_table(rows: Rows) -> str:
    """Where the GPU time of a forward goes, before and after."""
    groups = list(dict.fromkeys(g for row in rows for t in row["time"].values() for g in t["ms"]))
    lines = [["GPU time of one forward, ms", "", *groups, "all"]]
    for row in rows:
        for number, (name, spent) in enumerate(row["time"].items()):
            total = sum(spent["ms"].values())
            cells = [f"{spent['ms'][g]:.1f} ({spent['ms'][g] / max(total, 1e-9):.0%})" for g in groups]
            lines.append(["" if number else row["name"], name, *cells, f"{total:.1f}"])
    return _markdown(lines) if len(lines) > 1 else ""


def fused_table(rows: Rows) -> str:
    names = _names(rows)
    lines = [["operation", *(f"{n}, ms" for n in names), "tilewise, GB/s", *(f"× {n}" for n in names[:-1])]]
    for row in rows:
        found = {r["name"]: r for r in row["implementations"]}
        ours = found.get("tilewise")
        cells = [row["name"], *(f"{found[n]['ms']:.3f}" if n in found else "–" for n in names)]
        cells.append("–" if ours is None else f"{ours['gbps']:.0f}")
        cells += ["–" if ours is None or n not in found else f"{found[n]['ms'] / ours['ms']:.2f}" for n in names[:-1]]
        lines.append(cells)
    return _markdown(lines)


def streaming_table(rows: Rows) -> str:
    """One forward of a chunk against a full KV cache, and chunks end to end."""
    titles = ["chunk of a stream", "implementation", "density", "ms", "× stock blocks", "frames a second", "p95, ms"]
    lines = [[*titles, "first, ms"]]
    changes: list[str] = []
    for row in rows:
        for variant in row["variants"]:
            cells = [row["name"], variant["name"], f"{variant['density']:.2f}", _spread(variant)]
            cells.append(f"{row['variants'][0]['ms'] / variant['ms']:.2f}")
            for key, digits in (("fps", 1), ("ms_p95", 0), ("first_ms", 0)):
                cells.append(f"{variant[key]:.{digits}f}" if key in variant else "–")
            lines.append(cells)
            if "prompt_changes" in variant:
                ways = [
                    f"{how} {found['ms']:.0f} ms ({found['ms'] / variant['ms']:.1f} chunks)"
                    for how, found in variant["prompt_changes"].items()
                ]
                changes.append(f"- {row['name']}, {variant['name']}: {', '.join(ways)}")
    if changes:
        said = "From `set_prompt` to the first frames of the new prompt, in milliseconds and in times of a chunk:"
        return "\n".join([_markdown(lines), "", said, "", *changes])
    return _markdown(lines)


def far_field_table(rows: Rows) -> str:
    """Windows and what stands for their outside."""
    names = ("attention", "means", "merge", "two launches")
    lines = [["window", "outside", "density", "cost", "ms", "× alone", *(f"{name}, ms" for name in names)]]
    for row in rows:
        for variant in row["variants"]:
            cells = [row["name"], variant["name"], f"{variant['density']:.3f}", f"{variant['cost']:.3f}"]
            cells += [_spread(variant), f"{variant['ms'] / row['variants'][0]['ms']:.2f}"]
            parts = variant["parts"]
            lines.append([*cells, *(f"{parts[name]:.2f}" if name in parts else "–" for name in names)])
    return _markdown(lines)


def vae_table(rows: Rows) -> str:
    """A chunk of a clip through Wan's VAE."""
    lines = [["autoencoder", "implementation", "ms", "× stock", "frames a second", "peak GiB", "error"]]
    for row in rows:
        for variant in row["variants"]:
            cells = [row["name"], variant["name"], _spread(variant)]
            cells.append(f"{row['variants'][0]['ms'] / variant['ms']:.2f}")
            cells += [f"{variant['fps']:.1f}", f"{variant['peak_gib']:.2f}" if "peak_gib" in variant else "–"]
            lines.append([*cells, f"{variant['error']:.1e}"])
    return _markdown(lines)


def launch_table(rows: Rows) -> str:
    """What the rules choose, and the four fastest configurations."""
    lines = [["Triton kernel alone", "tile M × N", "warps", "stages", "ms", "TFLOP/s"]]
    for row in rows:
        timed = [c for c in row["configs"] if "ms" in c]
        best = sorted((c for c in timed if not c["rule"]), key=lambda c: c["ms"])[:4]
        for config in [*(c for c in timed if c["rule"]), *best]:
            name = f"{row['name']}, {'by rule' if config['rule'] else 'swept'}"
            size = f"{config['BLOCK_M']} × {config['BLOCK_N']}"
            cells = [name, size, str(config["num_warps"]), str(config["num_stages"])]
            lines.append([*cells, _spread(config), f"{config['tflops']:.0f}"])
    return _markdown(lines)


def gpus_table(rows: Rows) -> str:
    """A forward on one GPU and split over several; the peer is diffusers' own Ulysses with cuDNN's attention."""
    head = [
        "forward",
        "variant",
        "density",
        "one GPU, ms",
        "split, ms",
        "speed-up",
        "× diffusers split",
        "exchange",
        "balance",
    ]
    lines = [[*head, "peak GiB, one GPU and a rank", "error"]]
    for row in rows:
        for variant in row["gpu_variants"]:
            one, split = variant.get("one"), variant.get("split")
            both = [_spread(found) if found else "–" for found in (one, split)]
            known = split or one or {}
            cells = [
                f"{row['name']} ({row['layers']} layers)",
                variant["name"],
                f"{known.get('density', 1.0):.3f}",
                *both,
            ]
            cells += [f"{variant[name]:.2f}" if name in variant else "–" for name in ("speed_up", "over_stock_split")]
            cells.append(f"{split['exchange_share']:.1%}" if split and "exchange_share" in split else "–")
            cells.append(f"{split['balance']:.3f}" if split and "balance" in split else "–")
            cells.append(" / ".join(f"{found['peak_gib']:.1f}" if found else "–" for found in (one, split)))
            lines.append([*cells, f"{variant['error']:.1e}" if "error" in variant else "–"])
    return _markdown(lines)


def missing_list(rows: Rows) -> str:
    """What did not run, with its reason; works in brackets unless it ran on none."""
    found: dict[tuple[str, str], list[str]] = {}
    ran = {r["name"] for row in rows for r in [*row.get("implementations", []), *row.get("variants", [])]}
    for row in rows:
        for name, why in row.get("missing", {}).items():
            found.setdefault((name, why), []).append(row["name"])
    lines = []
    for (name, why), works in found.items():
        where = f" ({'; '.join(works)})" if name in ran or len(works) < 3 else ""
        lines.append(f"- {_title(name)} not run: {why}{where}")
    return "\n".join(lines)


# section → what its command has in it, where that is not --only and its name
MADE_BY = {
    "quality": "benchmarks.quality ", "presets": "benchmarks.presets ",
    "few steps": "benchmarks.few_steps ", "clips": "benchmarks.clips ",
    "highres": "benchmarks.highres ",
    "attention error": "benchmarks.attention_error ", "quality, methods": "benchmarks.quality ",
    "attention error, methods": "benchmarks.attention_error ",
    "context parallel": "benchmarks.context_parallel", "unets": "benchmarks.unets",
    "highres quality": "benchmarks.highres_quality ", "global path": "benchmarks.global_path ",
}  # fmt: skip
# name → (section of the result file, its table); no section: rows of all
TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "glance": ("step", glance_table),
    "headline": ("step", headline_table),
    "others": ("families", headline_table),
    "attention": ("attention", attention_table),
    "implementations": ("attention", implementations_table),
    "dynamic": ("dynamic", dynamic_table),
    "windows": ("far-field", far_field_table),
    "quality": ("quality", quality_table),
    "presets": ("presets", presets_table),
    "few_steps": ("few steps", lambda rows: _markdown(few_steps_lines(rows))),
    "clips": ("clips", lambda rows: _markdown(clips_lines(rows))),
    "methods": ("quality, methods", methods_table),
    "errors": ("attention error", errors_table),
    "method_errors": ("attention error, methods", errors_table),
    "gist": ("highres", highres_gist_table),
    "highres": ("highres", highres_table),
    "coherence": ("highres quality", highres_quality_table),
    "paths": ("global path", global_path_table),
    "step": ("step", step_table),
    "families": ("families", families_table),
    "time": ("step", time_table),
    "fused": ("fused", fused_table),
    "streaming": ("streaming", streaming_table),
    "vae": ("vae", vae_table),
    "gpus": ("context parallel", gpus_table),
    "unets": ("unets", unets_table),
    "launch": ("launch", launch_table),
    "missing": ("", missing_list),
}


def _title(name: str) -> str:
    return NAMES.get(name, name)


def _names(rows: Rows, kind: str | None = None) -> list[str]:
    """Names of implementations (of one kind), in the order in which they are first met."""
    found = [r for row in rows for r in row["implementations"]]
    return list(dict.fromkeys(r["name"] for r in found if kind is None or r["kind"] == kind))


def _spread(timing: dict[str, Any]) -> str:
    """Median ± half the range, with as many decimals as matter."""
    digits = 1 if timing["ms"] >= 100 else 2 if timing["ms"] >= 1 else 3
    text = f"{timing['ms']:.{digits}f}"
    return f"{text} ± {(timing['ms_max'] - timing['ms_min']) / 2:.{digits}f}" if "ms_max" in timing else text


def _markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def rendered(text: str) -> str:
    """A Markdown text with every marked table made anew from its result file."""

    def table(match: re.Match[str]) -> str:
        result = json.loads((ROOT / "benchmarks" / "results" / match[2]).read_text(encoding="utf-8"))
        return f"{match[1]}{tables(result, match[3].split())}\n{match[4]}"

    return MARKED.sub(table, text)


if __name__ == "__main__":
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")
