"""summary: what it prints adds up to the attention calls that ran, and its means are weighed by token pairs."""

from __future__ import annotations

import datetime
import math
from typing import Any

import pytest
import tiny_wan
import torch

import tilewise
from tilewise.plugins.patching import patches_of
from tilewise.plugins.runtime.attention_call import AttentionCalls
from tilewise.plugins.runtime.call_stats import (
    DENSE_LAYER,
    DENSE_STEP,
    FALLBACK,
    MAX_REASONS,
    OTHER_REASONS,
    SHORT,
    SPARSE,
    CallKind,
    CallStats,
)
from tilewise.plugins.summary import Summary

METHOD = tilewise.STA(window=(1, 2, 2), tile=(2, 3, 3))


@pytest.fixture
def model():
    model = tiny_wan.tiny_transformer()
    return tilewise.patch(model, METHOD, steps=(0, 1))


def count(model, layer: int, kind: CallKind, tokens: int, known: float | None = 1.0, *, batch=1, **values) -> None:
    """A call over ``tokens`` tokens; known: its density. values: what it measured."""
    qk = [torch.empty(batch, tokens, 2, 4)] * 2
    with stats_of(model).record(layer, kind, *qk) as call:
        call.density = known
        call.values = {name: torch.tensor(value) for name, value in values.items()}


def patch_of(model) -> Any:
    (patch,) = patches_of(model).values()
    return patch


def stats_of(model) -> CallStats:
    return patch_of(model).state.call_stats


# ── numbers by hand ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unpatched_target_and_one_that_has_not_run(model):
    report = tilewise.summary(model)
    assert (report.rows, report.calls, report.density, report.overall_density) == ([], 0, 1.0, 1.0)
    assert (report.recall, report.probe, report.broken, report.fallbacks, report.fused_calls) == (None, None, 0, {}, 0)
    assert "no attention call yet" in str(report)
    tilewise.unpatch(model)
    with pytest.raises(tilewise.ConfigError, match="not patched"):
        tilewise.summary(model)


def test_a_summary_can_be_reset_and_says_since_when(model):
    patched_at = tilewise.summary(model).since
    count(model, 0, CallKind(SPARSE, "torch"), 4, 0.5)
    count(model, 0, CallKind(FALLBACK, reason="a mask of 5 x 4"), 4)
    stats_of(model).skipped_layers["blocks.1"] = "own processor"
    stats_of(model).since -= datetime.timedelta(hours=1)
    before = tilewise.summary(model, reset=True)
    assert before.calls == 2 and before.since < patched_at
    assert f"counted since {before.since[:10]} {before.since[11:19]} UTC" in str(before)
    after = tilewise.summary(model)
    assert (after.calls, after.fallbacks, after.skipped_layers) == (0, {}, before.skipped_layers)
    assert after.since >= patched_at and after.to_dict()["since"] == after.since
    count(model, 0, CallKind(FALLBACK, reason="a mask of 7 x 4"), 4)
    assert tilewise.summary(model).fallbacks == {"a mask of 7 x 4": 1}


def test_means_are_weighed_by_pairs_and_rows(model):
    sparse = CallKind(SPARSE, "torch")
    count(model, 0, sparse, 4, 0.5)
    count(model, 1, sparse, 4, 0.5)
    count(model, 1, CallKind(DENSE_STEP), 10)
    dynamic = CallKind(SPARSE, "triton", fused=True)
    count(model, 0, dynamic, 8, None, batch=2, density=0.25, recall=0.5, probe=1.0, broken=3.0)
    count(model, 1, dynamic, 2, None, density=0.75, recall=1.0)
    report = tilewise.summary(model)
    assert [(r.layers, r.kind, r.calls, r.queries, r.pairs, r.backend, r.fused) for r in report.rows] == [
        ("0-1", SPARSE, 2, 8, 32, "torch", False),
        ("1", DENSE_STEP, 1, 10, 100, "stock", False),
        ("0-1", SPARSE, 2, 18, 132, "triton", True),
    ]
    assert [r.density for r in report.rows] == [0.5, 1.0, (0.25 * 128 + 0.75 * 4) / 132]
    assert report.density == (16 + 32 + 3) / (32 + 132)
    assert report.overall_density == (16 + 100 + 32 + 3) / (32 + 100 + 132)
    assert report.recall == (0.5 * 16 + 1.0 * 2) / 18
    assert report.probe == 1.0
    assert (report.broken, report.fused_calls, report.calls) == (3, 2, 5)
    text = str(report)
    for words in (
        "fused kernels ran around 2 of 5 attention calls",
        "estimated: 0.556; measured on probe rows: 1.000",
        "queries or keys were not finite: 3 lists",
    ):
        assert words in text


def test_recall_is_weighed_by_query_rows_over_rows(model):
    for backend, tokens, recall in (("torch", 4, 0.25), ("triton", 12, 0.75)):
        count(model, 0, CallKind(SPARSE, backend), tokens, None, density=0.5, recall=recall)
    report = tilewise.summary(model)
    assert report.recall == (4 * 0.25 + 12 * 0.75) / 16
    assert report.probe is None
    assert "probe" not in str(report)


def test_layers_of_other_densities_have_rows_of_their_own(model):
    for layer, density in ((0, 0.5), (1, 0.25)):
        count(model, layer, CallKind(SPARSE, "torch"), 4, density)
    assert [(r.layers, r.density) for r in tilewise.summary(model).rows] == [("0", 0.5), ("1", 0.25)]


def test_a_density_that_nobody_knows_is_left_out(model):
    count(model, 0, CallKind(SPARSE, "triton"), 100, None)  # as in a CUDA graph
    report = tilewise.summary(model)
    assert math.isnan(report.rows[0].density)
    assert (report.density, report.overall_density) == (1.0, 1.0)
    count(model, 0, CallKind(SPARSE, "torch"), 4, 0.5)
    count(model, 0, CallKind(DENSE_LAYER), 4)
    report = tilewise.summary(model)
    assert (report.density, report.overall_density, report.calls) == (0.5, 0.75, 3)
    assert report.to_dict()["rows"][0]["density"] is None


def test_to_dict_has_every_number(model):
    count(model, 0, CallKind(FALLBACK, reason="why"), 4)
    count(
        model, 0, CallKind(SPARSE, "triton", fused=True), 4, None, density=0.5, recall=0.25, probe=math.nan, broken=1.0
    )
    report = tilewise.summary(model)
    told = report.to_dict()
    assert told == {
        "method": report.method, "grids": {}, "density": 0.5, "cost": 0.5, "overall_density": 0.75, "fallbacks": {"why": 1},
        "fused_calls": 1, "recall": 0.25, "probe": None, "broken": 1, "skipped_layers": {}, "notes": [], "vae": [],
        "cache": [],
        "ranks": [],
        "heads": [],
        "rows": told["rows"], "since": told["since"],
    }  # fmt: skip
    assert told["rows"][1] == {
        "denoiser": "denoiser", "layers": "0", "kind": SPARSE, "calls": 1, "queries": 4, "pairs": 16, "density": 0.5,
        "backend": "triton", "seconds": report.rows[1].seconds, "reason": "", "fused": True, "recall": 0.25, "probe": None,
        "broken": 1, "cost": 0.5,
    }  # fmt: skip


def test_reasons_are_shown_with_a_word_on_others_like_it(model):
    for keys in (7, 8, 7):
        count(model, 0, CallKind(FALLBACK, reason=f"{keys} keys"), 4)
    count(model, 1, CallKind(FALLBACK, reason="a mask"), 4)
    for n in range(MAX_REASONS):
        count(model, 1, CallKind(FALLBACK, reason="a " + "b" * (n + 1)), 4)
    found = tilewise.summary(model).fallbacks
    assert found["7 keys (and others that differ in their numbers alone)"] == 3
    assert found["a mask"] == found[OTHER_REASONS] == 1
    assert sum(found.values()) == 4 + MAX_REASONS


def test_the_table_has_a_line_for_each_row_with_its_reason(model):
    count(model, 0, CallKind(SPARSE, "torch"), 4, 0.25)
    count(model, 1, CallKind(FALLBACK, reason="why"), 4)
    stats_of(model).skipped_layers["blocks.0.attn1"] = "it is another's"
    lines = [
        " ".join(word for word in line.split() if word not in "│|┃")
        for line in str(tilewise.summary(model)).splitlines()
    ]
    assert "attention calls" in lines[0]
    assert "denoiser blocks kind calls density backend seconds" in lines
    assert "denoiser 0 sparse 1 0.250 torch 0.00" in lines
    assert "denoiser 1 fallback: why 1 1.000 stock 0.00" in lines
    assert lines[-2] == "denoiser.blocks.0.attn1 stays dense: it is another's" and lines[-1].startswith(
        "counted since 20"
    )


# ── a run with fallbacks ─────────────────────────────────────────────────────────────────────────────────────────────


def printed_calls(report: Summary) -> int:
    """The sum of the column "calls", as it is printed."""
    lines = [line for line in str(report).splitlines() if "│" in line or "|" in line]
    cells = [[cell.strip() for cell in line.replace("|", "│").split("│") if cell.strip()] for line in lines]
    return sum(int(cell) for row in cells for cell in row[3:4] if cell.isdigit())


def test_what_is_printed_adds_up_to_the_attention_calls(monkeypatch):
    """Sparse calls, dense layers, and fallbacks of three kinds: every call of a patched layer is in one row, once."""
    asked: list[int] = []
    answer = AttentionCalls.answer

    def counted(self, number, request, stock):
        batch, queries = request.query.shape[:2]
        asked.append(batch * queries * request.key.shape[1])
        return answer(self, number, request, stock)

    monkeypatch.setattr(AttentionCalls, "answer", counted)
    model = tilewise.patch(tiny_wan.tiny_transformer(), METHOD, steps=(0, 1), blocks="1:")
    state = patch_of(model).state
    text = torch.randn(2, 4, model.config.text_dim)
    begin = state.begin

    def run(frames: int, height: int, width: int, refused: str | None = None) -> None:
        monkeypatch.setattr(state, "begin", lambda grid, timestep, why=None: begin(grid, timestep, refused or why))
        with torch.no_grad():
            model(torch.randn(2, model.config.in_channels, frames, height, width), torch.tensor([500.0]), text)

    run(3, 12, 16)
    for n in range(5):
        run(2, 8 + 2 * n, 12, f"the forward of {n} is refused")
    run(3, 12, 16, "something else")
    run(2, 20, 12)
    report = tilewise.summary(model)
    layers = len(state.layers)
    assert len(asked) == 8 * layers == report.calls == printed_calls(report)
    assert sum(row.pairs for row in report.rows) == sum(asked)
    by_kind = {
        kind: sum(row.calls for row in report.rows if row.kind == kind) for kind in (SPARSE, DENSE_LAYER, FALLBACK)
    }
    assert sum(by_kind.values()) == report.calls
    assert by_kind == {SPARSE: 2 * (layers - 1), DENSE_LAYER: 8, FALLBACK: 6 * (layers - 1)}
    assert sum(report.fallbacks.values()) == by_kind[FALLBACK]
    assert report.fallbacks == {
        "the forward of 0 is refused (and others that differ in their numbers alone)": 5 * (layers - 1),
        "something else": layers - 1,
    }
    kept = sum(row.density * row.pairs for row in report.rows)
    assert report.overall_density == pytest.approx(kept / sum(asked))
    assert SHORT not in {row.kind for row in report.rows}


def test_many_sizes_and_prompts_take_no_more_rows(model):
    """Each forward has another size: what call stats hold stops growing after the first."""
    stats, text = stats_of(model), torch.randn(1, 4, model.config.text_dim)
    held = []
    for n in range(30):
        with torch.no_grad():
            model(
                torch.randn(1, model.config.in_channels, 2, 6 + 2 * n, 8), torch.tensor([500.0]), text[:, : 1 + n % 4]
            )
        held.append(len(stats.records))
    assert held[-1] == held[0]
    report = tilewise.summary(model)
    assert report.calls == 30 * len(patch_of(model).layers)
    assert len(report.rows) == 1
