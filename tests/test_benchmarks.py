"""The benchmark harness measures what it says, and the README shows what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import attention, render  # noqa: E402
from tilewise.kernels.layout import Grid, Layout  # noqa: E402
from tilewise.kernels.window import window_plan  # noqa: E402


def test_readme_tables_are_the_result_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert render.MARKED.search(text)
    assert render.rendered(text) == text, "run: python -m benchmarks.render"


def test_result_files_say_where_they_come_from():
    files = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {"device", "date", "command", "versions"} <= set(result)
        assert {"torch", "triton", "diffusers", "tilewise"} <= set(result["versions"])


def test_a_wrong_result_is_not_timed():
    layout = Layout(Grid(3, 8, 8), (3, 4, 4))
    plan = window_plan(layout, [(1, 1, 1)], unit="tile")
    q, k, v = (torch.randn(1, 192, 2, 32) for _ in range(3))
    assert attention.check(q, k, v, plan, 1e-5) < 1e-5
    with pytest.raises(AssertionError, match="wrong result"):
        attention.check(q, k, v, plan, 1e-12)


def test_the_command_writes_a_result_file(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--only", "attention", "--device", "cpu", "--seconds", "0.01"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("cpu-*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["attention"]
    assert [row["name"] for row in rows] == [row.name for row in attention.CPU_ROWS]
    assert all(row["peers"]["sdpa"]["ms"] > 0 for row in rows)
    assert "demo 256×256" in done.stdout
