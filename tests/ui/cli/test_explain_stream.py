"""`tilewise explain --stream`: window, density and memory of a stream, without weights."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from tilewise.ui.cli.app import app

SIZE = ["--recipe", "self-forcing", "--chunk", "2", "--window", "6", "--sink", "2", "--height", "32", "--width", "48"]


def run(*words: object):
    return CliRunner().invoke(app, ["explain", *map(str, words)])


def test_it_tells_window_density_and_memory(tiny_pipe_dir):
    words = ["--stream", "--model", tiny_pipe_dir, *SIZE, "--method", "sta", "--density", "0.5", "--policy", "dual_ema"]
    result = run(*words, "--guidance", 2, "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    row = told["denoisers"][0]
    assert told["cache"] == {
        "window": 6, "sink": 2, "memory": 4, "sink_position": "clamped", "policy": "dual_ema", "storage": "model",
    }  # fmt: skip
    assert row["lanes"] == 2 and told["dtype"] == "bfloat16" and 0.5 <= row["density"] < 1
    # two layers, two lanes, 4 × 6 tokens of 2 heads × 16, keys and values in 2 bytes; masters whole in 4
    assert told["cache_bytes"] == {"latent": 2 * 2 * 24 * 32 * 2 * 2, "total": 2 * 2 * 24 * 32 * 2 * (10 * 2 + 6 * 4)}
    plain = run(*words)
    assert f"density (kept pairs) {row['density']:.3f}" in re.sub(r"[\s│]+", " ", plain.stdout)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stream", "--frames", "9"], "--frames cannot be used with --stream"),
        (["--stream", "--window", "3,3,3"], "one whole number with --stream"),
        (["--stream", "--plot", "x.png"], "--plot draws the plan of a clip"),
        (["--stream", "--sink", "30"], "do not fit into a window"),
        (["--sink", "3"], "give --stream too"),
        (["--guidance", "3"], "give --stream too"),
    ],
)
def test_bad_input(words, message):
    result = run(*words)
    assert result.exit_code == 2 and message in re.sub(r"[\s│]+", " ", result.stderr) and result.stdout == ""
