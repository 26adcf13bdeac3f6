"""`tilewise tune`: measured, remembered, said by `tilewise env`, taken back; and what it refuses."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from tilewise.kernels.attention import dispatch
from tilewise.kernels.attention.backends.tiles import Tile
from tilewise.kernels.device import ROCM, runs_triton
from tilewise.pipelines.tuning import tune as tuning
from tilewise.pipelines.tuning.shapes import Shape
from tilewise.pipelines.tuning.timing import Timing
from tilewise.plugins.config import resolve
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.sta import STA
from tilewise.plugins.tuning import in_use
from tilewise.plugins.tuning.record import file_of
from tilewise.ui.cli import environment
from tilewise.ui.cli.app import app

CPU = torch.device("cpu")
SHORT = ["--shape", "2x16x16:2x16", "--seconds", "0.001"]


def invoke(*words: object):
    result = CliRunner().invoke(app, list(map(str, words)))
    return result, re.sub(r"[\s│]+", " ", result.stdout + result.stderr)


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    yield
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    in_use.load()


def test_measured_remembered_said_and_taken_back():
    result, said = invoke("tune", *SHORT, "--max-spread", "1000")
    assert result.exit_code == 0, said
    for word in ("PyTorch", "torch (fastest)", "partial", "sta", "draft", "× stock", "wrote"):
        assert word in said
    written = json.loads(file_of(CPU).read_text())
    assert written["min_tokens"].keys() == {"sta", "draft"} and written["chip"] == "cpu"
    kinds = {(row["what"], row["plan"]) for row in written["measured"]}
    assert {("stock", ""), ("backend", "whole"), ("backend", "partial"), ("method", "")} <= kinds
    assert all(row["ms"] > 0 and not row["wrong"] for row in written["measured"])
    result, said = invoke("env")
    assert "as tuned on this cpu" in said and str(file_of(CPU)) in said
    result, said = invoke("tune", "--reset")
    assert result.exit_code == 0 and "removed" in said and not file_of(CPU).exists()
    assert "nothing was tuned on" in invoke("tune", "--reset")[1]
    assert "tilewise tune" in invoke("env")[1]


def test_a_model_and_a_size(tiny_pipe_dir):
    words = ["tune", "--model", tiny_pipe_dir, "--height", 64, "--width", 64, "--frames", 9, "--method", "sta"]
    result, said = invoke(*words, "--dry-run")
    assert (result.exit_code == 0 and "cpu" in said and "3×4×4, 2 heads × 16" in said) or "heads ×" in said, said
    assert "would write" in said and not file_of(CPU).exists()


def test_a_device_that_others_use_is_not_saved(monkeypatch):
    monkeypatch.setattr(tuning, "measure", lambda run, device, seconds: Timing(1.0, 0.5, 2.0, 9, 0.7))
    result, said = invoke("tune", *SHORT)
    assert result.exit_code == 1 and "differed by up to 70%" in said and "nothing was saved" in said
    assert not file_of(CPU).exists()


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_timed(monkeypatch, tmp_path):
    (tmp_path / "tilewise").write_text("a file")
    monkeypatch.setattr(tuning, "measure", lambda *_, **__: pytest.fail("something was timed"))
    result, said = invoke("tune", *SHORT)
    assert result.exit_code != 0 and "cannot write" in said and "is a file, not a directory" in said, said


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["--shape", "21x45:12x128"], 2, "give frames x rows x columns"),
        (["--shape", "21x45x80:0x128"], 2, "each number must be at least 1"),
        (["--shape", "21x45x80:12x512"], 2, "the head dimension at most 256"),
        (["--shape", "9999x9999x9999:1x64"], 2, "tokens at most"),
        ([*SHORT, "--height", "64"], 2, "not both: got --height"),
        ([*SHORT, "--method", "dense"], 2, "dense is dense, there is nothing to time"),
        ([*SHORT, "--method", "nothing"], 2, "unknown method or preset"),
        ([*SHORT, "--method", "sta", "--method", "sta-fast"], 2, "give each method once"),
        ([*SHORT, "--seconds", "0"], 2, "must be above 0"),
        ([*SHORT, "--device", "cuda:9"], 3, "there is no device cuda:9"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_anything_is_timed(words, code, why, monkeypatch):
    monkeypatch.setattr(tuning, "measure", lambda *_, **__: pytest.fail("something was timed"))
    result, said = invoke("tune", *words)
    assert result.exit_code == code and why in said, said
    assert not file_of(CPU).exists()


def test_a_chip_that_is_too_old_is_dense_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    why = tuning.nothing_runs(torch.device("cuda"))
    assert why is not None and "needs compute capability 8.0 or later, Tesla T4 has 7.5" in why
    assert tuning.nothing_runs(CPU) is None
    assert not runs_triton(torch.device("cuda", 7))  # so that norms and the VAE stay stock there too
    assert "attention is dense, our kernels do not run here" in environment._chip(torch.device("cuda"))


def test_rocm_is_refused_unless_asked_for(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(ROCM, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "AMD Instinct MI300X")
    amd = torch.device("cuda")
    whys = {name: why for name, _, why in dispatch.available_backends(amd)}
    assert "never tried on an AMD GPU: set TILEWISE_ROCM=1" in whys["triton"]
    monkeypatch.setenv(ROCM, "1")
    usable = {name: usable for name, usable, _ in dispatch.available_backends(amd)}
    assert usable["triton"] and not usable["gluon"] and not usable["fa4"]


@pytest.mark.parametrize(("cost", "least"), [(100, 128), (600, 1024), (3000, 4096), (9000, 4097)])
def test_the_shortest_call_that_pays(cost, least, monkeypatch):
    """Stock costs tokens², a method so many times tokens: it pays where there are more tokens than that."""

    def stock(bench, shape):
        return (None, None, None), Timing(float(shape.grid.tokens**2), 0, 0, 1)

    def timed(bench, run, what, first):
        t, h, w = map(int, re.findall(r"on (\d+)×(\d+)×(\d+)", what)[0])
        return None, Timing(float(t * h * w * cost), 0, 0, 1), ""

    monkeypatch.setattr(tuning._Bench, "_stock", stock)
    monkeypatch.setattr(tuning._Bench, "_timed", timed)
    monkeypatch.setattr(tuning, "method_call", lambda *_: lambda: None)
    bench = tuning._Bench(CPU, torch.float32, 0.1, lambda _: None)
    shape = Shape.parse("4x32x32:2x64")
    monkeypatch.setattr("tilewise.pipelines.tuning.shapes.SHORTEST", 100)
    assert bench.pays_from(resolve("sta"), [shape]) == least


def test_the_fastest_backend_and_tile_are_chosen_and_wrong_ones_are_not(monkeypatch):
    """On a GPU that stands in for one: three tiles and two backends, of which one is fast and wrong."""
    times = {"triton, 128×32, 2 stages, 8 warps": 5.0, "triton, 128×64, 2 stages, 8 warps": 4.0}
    times |= {"gluon": 1.0, "fa4": 9.0, "int8, triton, 64×64, 2 stages, 4 warps": 2.0}
    tiles = (Tile(128, 32, 2, 8), Tile(128, 64, 2, 8))
    variants = [tuning.Variant("triton", lambda: None, "triton", tile) for tile in tiles]
    variants += [tuning.Variant(name, lambda: None) for name in ("gluon", "fa4")]
    variants += [tuning.Variant("int8, triton", lambda: None, "triton-8bit", Tile(64, 64, 2, 4), exact=False)]
    monkeypatch.setattr(tuning._Bench, "_variants", lambda *_: iter(variants))
    monkeypatch.setattr(
        tuning._Bench,
        "_timed",
        lambda bench, run, what, first, tolerance: (
            torch.ones(1), Timing(times[what.split(" on ")[0]], 0, 0, 1), "differs by 30%" if "gluon" in what else ""
        ),
    )  # fmt: skip
    bench = tuning._Bench(CPU, torch.float32, 0.001, lambda _: None)
    bench.backends(Shape.parse("2x16x16:2x64"))
    chosen = {("triton", 64): (128, 64, 2, 8), ("triton-8bit", 64): (64, 64, 2, 4)}
    assert bench.tiles == {(*key, partial): tile for key, tile in chosen.items() for partial in (False, True)}
    assert bench.order == {
        (64, partial): ("triton", "fa4") for partial in (False, True)
    }  # in 8 bits is asked for, not chosen


def test_what_is_not_timed_is_said():
    """A window for each of 3 heads, where the call has 2; and a kernel that fails."""
    config = resolve(STA(window=((1, 1, 1), (1, 1, 2), (1, 2, 1))))
    shape = Shape.parse("2x16x16:2x16")
    bench = tuning._Bench(CPU, torch.float32, 0.001, lambda _: None)
    assert bench.pays_from(config, [shape]) is None
    assert [note for note in bench.notes if "sta does not take 2×16×16, 2 heads × 16" in note]

    def failing():
        raise RuntimeError("out of memory\nand more")

    assert bench._timed(failing, "triton on a shape", None) == (None, None, "")
    assert bench.notes[-1] == "triton on a shape failed: out of memory"


def test_shapes_are_read_as_they_are_written():
    shape = Shape.parse("30x45x80+256:24x128")
    assert (shape.grid.tokens, shape.heads, shape.head_dim) == (30 * 45 * 80 + 256, 24, 128)
    tokens = [one.grid.video for one in shape.shorter()]
    assert tokens == sorted(tokens, reverse=True) and tokens[0] == 108_000 and 256 <= tokens[-1] < 512
    with pytest.raises(ConfigError, match="--shape"):
        Shape.parse("a fox")
