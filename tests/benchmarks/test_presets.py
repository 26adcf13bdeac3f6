"""The table of presets: quality of small clips and seconds of a clip at real size."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("scipy")

import torch
import typer

from benchmarks import presets, render
from tilewise.plugins.config import Config

pytestmark = pytest.mark.slow


def test_a_clip_counts_dense_steps_and_dense_blocks():
    class Forwards:
        bench = SimpleNamespace(
            device=torch.device("cuda"),
            model=SimpleNamespace(blocks=[None] * 10),
            size=SimpleNamespace(name="14B, 10 layers"),
        )

        def __init__(self, asked=None):
            self.asked = [] if asked is None else asked

        def __call__(self, method, precision, min_tokens=None):
            self.asked.append((method, precision))
            return (80.0, 1.0) if method == "dense" else (20.0, 0.25)

    config = Config.from_dict({"method": {"name": "sta", "density": 0.25}, "steps": [0.2, 1.0], "blocks": "4:"})
    clip = presets.clip_of(config, Forwards(), 100.0, None)
    # 10 dense steps of 80 ms and 40 of 0.9 · 20 + 0.1 · 80 = 26 ms; four times the layers, two forwards a step.
    assert clip["sparse_steps"] == 40
    assert clip["seconds"] == pytest.approx(8 * (10 * 80 + 40 * 26) / 1000)
    assert clip["speedup"] == pytest.approx(50 * 100 / (10 * 80 + 40 * 26))
    # In 8 bits the dense steps are measured in 8 bits too.
    asked = []
    presets.clip_of(config, Forwards(asked), 100.0, "int8")
    assert asked == [("dense", "int8"), (config.method, "int8")]


def test_presets_are_measured_and_shown(tmp_path):
    more = tmp_path / "more.json"
    config = {"method": {"name": "draft", "density": 0.3}, "steps": [0.5, 1.0], "blocks": ":"}
    failing = {**config, "precision": "int8"}  # refused: the demo model's tiles are too small for it
    more.write_text(json.dumps({"another": config, "another, failing": failing}), encoding="utf-8")
    with pytest.raises(typer.Exit):
        presets.main("cpu", only="another", candidates=more, seconds=0.01, tiny=True, out=tmp_path)
    (file,) = tmp_path.glob("*-tiny.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    dense, row = result["sections"]["presets"]
    assert (dense["preset"], dense["density"]) == ("dense", 1.0)
    assert row["config"] == config
    assert 0.2 < row["density"] < 0.6  # however short the clip: the preset ran
    assert row["psnr"]["mean"] < 90
    table = render.tables(result, ["presets"])
    assert "`another`" in table
    assert "stock clip" in table
