"""The high-resolution benchmarks: the FreeSwim that ours is compared with does the same mathematics, and both scripts run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny_wan
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are programs of the repository, not of the package

import tilewise  # noqa: E402
from benchmarks import global_path, highres, highres_quality, render  # noqa: E402
from benchmarks.freeswim import REFRESH, REUSE, WINDOW, FreeSwim, raster_mask  # noqa: E402
from tilewise.kernels.plans.layout import Grid  # noqa: E402
from tilewise.plugins.guidance.dual_path import two_paths  # noqa: E402
from tilewise.plugins.methods.inward import Inward  # noqa: E402


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_freeswim_and_ours_agree():
    """Refresh, reuse and the window alone, temperature included: the second row and the doubled batch change nothing."""
    native = (4, 6)
    x, later = (torch.randn(1, 4, 3, 18, 20, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=torch.Generator().manual_seed(2))
    first, then = torch.tensor([900.0]), torch.tensor([800.0])
    model = tiny_wan.tiny_transformer(num_layers=3)
    with torch.no_grad():
        theirs = FreeSwim(model, raster_mask(Grid(3, 9, 10), native, torch.device("cpu")), native, compiled=False)
        wanted = {}
        for mode, y, t in ((REFRESH, x, first), (REUSE, later, then), (WINDOW, later, then)):
            theirs.mode = mode
            wanted[mode] = theirs.forward(y, t, text)
        theirs.remove()
        tilewise.patch(model, Inward(native=native), steps=(0, 1), strict=True)
        torch.testing.assert_close(model(later, then, text).sample, wanted[WINDOW], atol=5e-5, rtol=5e-5)
        with two_paths(model, refresh=2):
            torch.testing.assert_close(model(x, first, text).sample, wanted[REFRESH], atol=5e-5, rtol=5e-5)
            torch.testing.assert_close(model(later, then, text).sample, wanted[REUSE], atol=5e-5, rtol=5e-5)
    assert (wanted[REUSE] - wanted[WINDOW]).abs().max() > 1e-3


def test_speed_table_averages_over_k():
    forwards = {
        "stock dense": 10.0, "FreeSwim refresh": 20.0, "FreeSwim reuse": 14.0, "FreeSwim window only": 13.0,
        "ours refresh": 12.0, "ours reuse": 3.0, "ours window only": 4.0,
    }  # fmt: skip
    rows = {
        (r["name"], r["k"]): r["seconds"] for r in highres.steps_of({k: {"seconds": v} for k, v in forwards.items()})
    }
    assert rows["stock dense", None] == 20
    assert rows["FreeSwim, both guided", 1] == 40
    assert rows["FreeSwim, prompt guided", 2] == 17 + 13
    assert rows["ours, both guided", 5] == 2 * (12 + 4 * 3) / 5
    assert rows["ours, prompt guided", 5] == (12 + 4 * 3) / 5 + 4
    assert ("FreeSwim, both guided", 2) not in rows


def test_speed_runs_on_a_cpu(tmp_path, capsys):
    highres.main("tiny", "cpu", 0, 1, "native", False, True, "", True, tmp_path)
    assert "ours, both guided k=5" in capsys.readouterr().out
    (file,) = tmp_path.glob("*-tiny.json")
    (row,) = json.loads(file.read_text())["sections"]["highres"]
    assert row["missing"] == {}
    assert {"ours refresh", "ours reuse", "ours window only", "ours, pooled refresh"} <= set(row["forwards"])
    # A run of one way keeps what is there of the others.
    highres.main("tiny", "cpu", 0, 1, "native", False, True, "pooled", True, tmp_path)
    (again,) = json.loads(file.read_text())["sections"]["highres"]
    assert set(again["forwards"]) == set(row["forwards"])
    assert again["forwards"]["ours refresh"] == row["forwards"]["ours refresh"]
    assert again["forwards"]["ours, pooled refresh"] != row["forwards"]["ours, pooled refresh"]
    assert [step["name"] for step in again["steps"]] == [step["name"] for step in row["steps"]]


@pytest.mark.parametrize(("size", "step"), [("tiny-joint", "ours, guided"), ("tiny-LTX", "ours, prompt guided")])
def test_speed_of_other_families(size, step, tmp_path, capsys):
    """Guidance as an input is one forward a step; text in the sequence has no coarser full path."""
    highres.main(size, "cpu", 0, 1, "native", True, True, "", False, tmp_path)
    assert f"{step} k=5" in capsys.readouterr().out
    (file,) = tmp_path.glob("*-tiny.json")
    (row,) = json.loads(file.read_text())["sections"]["highres"]
    assert row["missing"] == {}
    assert row["forwards_a_step"] == (1 if size == "tiny-joint" else 2)
    names = {each["name"] for each in row["steps"]}
    assert {"stock dense", "ours, window alone", step} <= names
    assert any("pooled" in name for name in names) == (size == "tiny-LTX")
    assert not any("FreeSwim" in name for name in row["forwards"])
    assert "| ours, window alone |" in render.tables(json.loads(file.read_text()), ["highres"])


def test_layers_are_left_of_each_kind_in_its_share():
    model = torch.nn.Module()
    model.transformer_blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
    model.single_transformer_blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))
    assert highres.fewest(model) == 6
    with highres.first_layers(model, 3):
        assert (len(model.transformer_blocks), len(model.single_transformer_blocks)) == (1, 2)
    assert len(model.single_transformer_blocks) == 4
    with (
        pytest.raises(ValueError, match="2 of 6 layers are no whole share of transformer_blocks"),
        highres.first_layers(model, 2),
    ):
        pass


def test_quality_runs_on_a_cpu(tmp_path, capsys):
    names = "dense;two paths, k=2"
    highres_quality.main("160", "1", names, 2, 1, 0.5, 0.0, 1, "cpu", "auto", 1e9, tmp_path / "pictures", tmp_path)
    said = capsys.readouterr().out
    assert "160×160" in said
    (file,) = tmp_path.glob("*.json")
    (row,) = json.loads(file.read_text())["sections"]["highres quality"]
    assert [v["name"] for v in row["variants"]] == ["native, scaled up", "dense", "two paths, k=2"]
    scaled, _, two = row["variants"]
    assert scaled["sharpness"] == pytest.approx(1, abs=0.05)
    assert two["clips"] == 1
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3
    # Run again, it makes nothing anew: no time is left for any clip, and the one that was made is there.
    highres_quality.main("160", "1", names, 2, 1, 0.5, 0.0, 1, "cpu", "auto", 0.0, None, tmp_path)
    assert "1 of 1 clips" in capsys.readouterr().out


def test_what_a_coarser_path_loses_runs_on_a_cpu(tmp_path, capsys):
    global_path.main("cpu", 0, 0, "", 0, 0, "float32", True, tmp_path)
    (file,) = tmp_path.glob("*-tiny.json")
    (row,) = json.loads(file.read_text())["sections"][global_path.SECTION]
    found = {name: values["lost"] for name, values in row["paths"].items()}
    assert found["dense"] == 0
    assert 0 < found["draft"] < found["pooled, 4×4"]
    assert "| draft |" in render.tables(json.loads(file.read_text()), ["paths"])
