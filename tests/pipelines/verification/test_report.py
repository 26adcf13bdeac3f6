"""What a verification measures and reports, and which reports are refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
import types

import numpy as np
import pytest
import torch

import tilewise
from tilewise.pipelines.errors import SetupError
from tilewise.pipelines.generation.kept_results import KeptResults
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.verification.measures import Lpips, differences, temporal_error
from tilewise.pipelines.verification.report import check_report, make_report, summarise
from tilewise.plugins.errors import ConfigError

RNG = np.random.default_rng(0)
SETTINGS = GenerateSettings(
    prompt="a", negative="", model="m", method=tilewise.Config(tilewise.STA()), height=32, width=48, frames=5, steps=4,
    guidance=1.0, seed=0, fps=8.0,
)  # fmt: skip


def pair(prompt: str = "a", seed: int = 0, **more) -> dict:
    seconds = {"dense": {"denoise": 4.0, "total": 5.0}, "sparse": {"denoise": 2.0, "total": 4.0}}
    content = {"dense": {"colour": True, "shape": True}, "sparse": {"colour": True, "shape": False}}
    given = {"psnr": 30.0, "ssim": 0.9, "temporal": 2.0, "lpips": None, "density": 0.25, "cost": 0.3}
    return {
        "prompt": prompt, "negative": "", "seed": seed, "seconds": seconds, "fallbacks": {}, "content": content, **given, **more,
    }  # fmt: skip


def report() -> dict:
    pairs = [pair(), pair("b", psnr=None, ssim=1.0, temporal=0.0), pair("c", seed=3, psnr=34.0)]
    return json.loads(json.dumps(make_report(SETTINGS, "folder:0", {"device": "cpu"}, pairs)))


def test_the_temporal_error_is_that_of_the_changes():
    clip = RNG.integers(0, 256, (4, 6, 8, 3)).astype(np.uint8)
    other = RNG.integers(0, 256, clip.shape).astype(np.uint8)
    changes = np.diff(clip.astype(float), axis=0) - np.diff(other.astype(float), axis=0)
    assert temporal_error(clip, other) == pytest.approx(math.sqrt((changes**2).mean()))
    lighter = np.minimum(clip, 200) + np.uint8(55)
    assert temporal_error(lighter, np.minimum(clip, 200)) == 0  # another brightness is no flicker
    assert temporal_error(clip[:1], other[:1]) is None
    with pytest.raises(ValueError, match="differ in shape"):
        temporal_error(clip, other[:3])


def test_differences_of_equal_and_small_clips():
    clip = RNG.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    assert differences(clip, clip, None) == {"psnr": None, "ssim": 1.0, "temporal": 0.0, "lpips": None}
    assert differences(clip[:, :8], clip[:, :8], None)["ssim"] is None


def test_lpips_is_the_mean_over_frames(monkeypatch):
    """The package is not installed for the tests: what it is given, and what is made of its answer."""
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x, y):
            seen.append((x, y))
            return (x - y).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=lambda net, verbose: Net()))
    a, b = (RNG.integers(0, 256, (11, 8, 8, 3)).astype(np.uint8) for _ in range(2))
    got = Lpips(torch.device("cpu"))(a, b)
    assert got == pytest.approx(np.abs(a.astype(float) - b).mean() / 127.5, rel=1e-5)
    assert [len(x) for x, _ in seen] == [8, 3] and all(x.min() >= -1 and x.max() <= 1 for x, _ in seen)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(SetupError, match="pip install lpips"):
        Lpips(torch.device("cpu"))


def test_the_summary_is_of_the_pairs():
    found = summarise(report()["pairs"])
    assert (found["pairs"], found["identical"]) == (3, 1)
    assert found["psnr"] == {"n": 2, "mean": 32.0, "std": pytest.approx(math.sqrt(8)), "min": 30.0, "max": 34.0}
    assert found["lpips"] is None and found["ssim"]["n"] == 3
    assert found["speedup_denoise"]["mean"] == 2.0 and found["speedup_total"]["mean"] == 1.25
    assert (found["shown_dense"], found["shown_sparse"]) == (1.0, 0.5)


def test_a_report_is_accepted_and_says_what_made_it():
    made = report()
    check_report(made)
    assert made["model"] == {"name": "m", "revision": "folder:0"}
    assert made["method"]["method"]["name"] == "sta" and made["settings"]["frames"] == 5
    assert "prompt" not in made["settings"] and [one["seed"] for one in made["pairs"]] == [0, 0, 3]


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("format",), 2, "no format 1"),
        (("machine",), None, "machine is missing"),
        (("pairs",), [], "there are no pairs"),
        (("pairs", 0, "psnr"), -1.0, "pair 1: psnr"),
        (("pairs", 0, "ssim"), 1.5, "pair 1: ssim"),
        (("pairs", 1, "seed"), "0", "pair 2: seed"),
        (("pairs", 1, "density"), float("nan"), "pair 2: density"),
        (("pairs", 2, "seconds", "dense"), {"denoise": 1}, "pair 3: the seconds of the dense clip"),
        (("pairs", 2, "fallbacks"), [], "pair 3: fallbacks"),
        (("pairs", 2, "content"), {"dense": 1}, "pair 3: content"),
        (("pairs", 1, "prompt"), "a", "there twice"),
        (("pairs", 0, "psnr"), 40.0, "summary.psnr.mean is 32.0, and the pairs give 37"),
        (("summary", "speedup_total", "mean"), 9.0, "summary.speedup_total.mean is 9.0"),
        (("summary", "fallbacks"), None, "summary.fallbacks is None"),
        (("summary",), {}, "does not have the entries"),
        (("method",), {"method": {"name": "fast"}}, "method: "),
    ],
)
def test_other_reports_are_refused(where, value, message):
    made = copy.deepcopy(report())
    inner = made
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(ConfigError) as error:
        check_report(made)
    assert message in str(error.value)


def test_what_is_no_object_is_refused():
    for value in (None, [], {"format": 1, "pairs": [None]}):
        with pytest.raises(ConfigError, match="no report of tilewise verify"):
            check_report(value)


def test_results_are_kept_by_what_made_them(tmp_path):
    kept = KeptResults(tmp_path / "parts", "pair", ["folder:0", "cpu"])
    one = {"found": pair(), "stills": {"dense": ["x"]}}
    assert kept.read(SETTINGS) is None
    kept.keep(SETTINGS, one)
    assert kept.read(SETTINGS) == one
    assert KeptResults(tmp_path / "parts", "pair", ["folder:1", "cpu"]).read(SETTINGS) is None
    assert KeptResults(tmp_path / "parts", "profile", ["folder:0", "cpu"]).read(SETTINGS) is None
    assert kept.read(dataclasses.replace(SETTINGS, seed=1)) is None
    (file,) = (tmp_path / "parts").iterdir()
    file.write_text(file.read_text()[:-9])
    assert kept.read(SETTINGS) is None  # half a file
    kept.remove()
    assert not (tmp_path / "parts").exists()
