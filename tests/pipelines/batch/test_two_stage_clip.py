"""Clips of two stages in a batch, on the tiny pipeline: what is made and written, refused before anything runs, resumed."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tilewise.pipelines.batch import manifest
from tilewise.pipelines.batch import two_stage_clip as batch_highres
from tilewise.pipelines.batch.input import InputError, Row
from tilewise.pipelines.batch.jobs import Tools, make_jobs
from tilewise.pipelines.batch.run import Options, Watch, run_batch
from tilewise.pipelines.generation.clip_metadata import frames_sha256
from tilewise.pipelines.highres.two_stages import highres
from tilewise.pipelines.loading.load import load_pipeline, load_skeleton
from tilewise.pipelines.media.video import read_frames, read_settings
from tilewise.pipelines.memory.options import MemoryOptions
from tilewise.plugins.errors import ConfigError
from tilewise.ui.cli import batch as batching
from tilewise.ui.cli.app import app
from tilewise.ui.common.options import method_config

SMALL = {"frames": 5, "steps": 4}
RANGE = {"flow_shift": 4.0, "rope": "ntk", "rope_time": "riflex"}


@pytest.fixture(scope="module")
def pipe(tiny_pipe_dir):
    return load_pipeline(tiny_pipe_dir, device="cpu")


@pytest.fixture(scope="module")
def plan(tiny_pipe_dir):
    """Jobs of rows, with what the command gives beside model and size."""
    skeleton = load_skeleton(tiny_pipe_dir)
    tools = Tools(method_config, lambda _: skeleton, lambda _: "r", lambda _: "float32", torch.device("cpu"))

    def jobs_of(*rows, sweep=None, **command):
        numbered = [Row(line, {"prompt": "a red circle", **fields}) for line, fields in enumerate(rows, 1)]
        base = {"model": str(tiny_pipe_dir), **SMALL, **command}
        return make_jobs(tiny_pipe_dir / "in.jsonl", numbered, tools, command=base, sweep=sweep, usual_method="sta")

    return jobs_of


@pytest.fixture
def invoke(tiny_pipe_dir, tmp_path, monkeypatch):
    """`tilewise batch p.jsonl` with options, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(rows, *words):
        if rows is not None:
            (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shared = ["--model", tiny_pipe_dir, "--out", "o", "--frames", 5, "--steps", 4, "--device", "cpu"]
        return CliRunner().invoke(app, [str(word) for word in ("batch", "p.jsonl", *shared, *words)])

    return run


def lines(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def clips(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith((".batch", "manifest")))


def test_warm_up_once_for_the_same_kernels(plan, pipe, tmp_path):
    rows = [{"seed": seed, "refresh": refresh, "strength": 0.5} for seed in (0, 1) for refresh in (1, 2)]
    rows += [{"refresh": 4, "strength": 0.75}]
    jobs = plan(*rows, highres=True, height=80, width=64)
    run_batch(jobs.jobs, tmp_path / "o", lambda *_: pipe, options=Options(warm_up=True))
    found = [line["run"]["seconds"]["warm_up"] > 0 for line in lines(tmp_path / "o")]
    assert found == [True, True, False, False, False]
    assert all(line["run"]["highres"]["coherence"] for line in lines(tmp_path / "o"))


# ── what is made ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_rows_of_different_sizes(invoke, pipe, tmp_path):
    rows = [
        {"prompt": "a red circle", "height": 80, "width": 64},
        {"prompt": "a blue square", "height": 64, "width": 96, "refresh": 2, "strength": 0.75, "seed": 3, **RANGE},
    ]
    command = ["--highres", "--refresh", 1, "--max-memory", "2GB"]
    done = invoke(rows, *command)
    assert done.exit_code == 0, done.output
    found = lines(tmp_path / "o")
    natives = [line["file"].replace(".mp4", "-native.mp4") for line in found]
    assert clips(tmp_path / "o") == sorted([line["file"] for line in found] + natives)
    options = ({"refresh": 1}, {"refresh": 2, "strength": 0.75, **RANGE})
    for row, line, native, given in zip(rows, found, natives, options, strict=True):
        path, run = tmp_path / "o" / line["file"], line["run"]
        size = {"height": row["height"], "width": row["width"]}
        made = highres(pipe, row["prompt"], **size, **SMALL, **given, seed=row.get("seed", 0))
        assert run["frames_sha256"] == frames_sha256(made.frames)
        assert read_frames(path).shape == made.frames.shape == (5, row["height"], row["width"], 3)
        told = run["highres"]
        assert told["coherence"] == made.coherence.to_dict()
        assert told["forwards"] == made.forwards
        assert told["options"] == {**made.options.to_dict(), "max_memory": 2 * 10**9}
        assert (told["native"]["file"], told["native"]["method"]["method"]["name"]) == (native, "dense")
        assert told["objects"] is None  # of this model's world the detector knows nothing
        inside = read_settings(path)
        assert inside == {name: line[name] for name in inside}
        assert set(line) - set(inside) == {"manifest", "status", "file", "bytes", "sha256"}
        first = read_settings(tmp_path / "o" / native)
        own = made.native.settings
        assert (first["height"], first["width"], first["seed"]) == (own.height, own.width, row.get("seed", 0))
        assert first["run"]["frames_sha256"] == frames_sha256(made.native.frames)
        assert read_frames(tmp_path / "o" / native).shape == (5, own.height, own.width, 3)

    # Again: nothing is made, in whatever memory; a dry run knows it, and what took how long.
    before = sorted(os.listdir(tmp_path / "o"))
    dry = invoke(None, *command[:-1], "3GB", "--dry-run")
    assert dry.exit_code == 0, dry.output
    stages = f"highres from {own.height}×{own.width}, strength 0.75, refresh 2"
    for words in ("0 of 2 clips", "nothing to make", stages, "memory: "):
        assert words in " ".join(dry.stdout.replace("│", " ").split())
    again = invoke(None, *command[:-1], "3GB")
    assert "0 made, 2 there already, 0 failed" in again.stdout
    assert "loading" not in again.stderr
    assert sorted(os.listdir(tmp_path / "o")) == before
    # From its own settings alone: the same pixels.
    words = ["generate", "--from", f"o/{found[0]['file']}", "--out", "again.mp4", "--device", "cpu"]
    assert "the same, bit for bit" in " ".join(CliRunner().invoke(app, words).stdout.split())


def test_one_and_two_stages_in_one_batch(plan):
    """What a line says of itself decides; the command's options go to the clips that they are for."""
    made = plan(
        {"height": 80, "width": 64, "highres": True},
        {"height": 80, "width": 64},
        {"height": 80, "width": 64, "highres": True, "refresh": 1, "method": "sta"},
        sweep={"density": [0.4]}, refresh=5,
    )  # fmt: skip
    first, plain, own = made.jobs
    assert plain.highres is None
    assert plain.settings.method.method.to_dict()["density"] == 0.4
    assert (first.highres.options.refresh, own.highres.options.refresh) == (5, 1)
    assert [job.highres.method.method.name for job in (first, own)] == ["dense", "sta"]
    assert {job.settings.method.method.name for job in (first, own)} == {"inward"}
    assert sorted(made.notes) == [
        "--density is not used where the method is dense",
        "the command's refresh is not used where highres is not",
    ]
    assert own.highres.method.method.density == 0.4
    swept = plan({"height": 80, "width": 64}, sweep={"highres": [True, False], "refresh": [1, 5]}, method="dense")
    assert [job.highres and job.highres.options.refresh for job in swept.jobs] == [1, 5, None]
    assert [explained.jobs for explained in swept.explanations] == [1, 1, 1]


def test_cells_of_a_table(tmp_path):
    from tilewise.pipelines.batch.input import read_rows

    path = tmp_path / "a.csv"
    path.write_text(
        "prompt,highres,refresh,native,max_memory,flow_shift,rope\nx,True,5,64x48,24GB,4,ntk\ny,false,,,,,\nz,,,,,,\n"
    )
    assert [row.fields for row in read_rows(path)] == [
        {
            "prompt": "x",
            "highres": True,
            "refresh": 5,
            "native": "64x48",
            "max_memory": "24GB",
            "flow_shift": 4.0,
            "rope": "ntk",
        },
        {"prompt": "y", "highres": False},
        {"prompt": "z"},
    ]
    path.write_text("prompt,highres\nx,yes\n")
    with pytest.raises(InputError, match="line 2: highres must be true or false, not 'yes'"):
        read_rows(path)


def test_the_key_is_of_what_is_made(plan):
    size = {"height": 80, "width": 64, "highres": True}
    rows = [
        size,
        {**size, "refresh": 1},
        {**size, "flow_shift": 4.0},
        {**size, "rope": "yarn"},
        {**size, "rope_time": "ntk"},
        {**size, "native": "48x48"},
        {**size, "method": "sta"},
        {**size, "seed": 1},
    ]
    jobs = plan(*rows).jobs
    assert len({job.key for job in jobs}) == len(rows)
    assert len({job.shape for job in jobs}) == len(rows) - 1
    assert [job.lines for job in plan(size, {**size, "max_memory": "2GB"}, {**size, "refresh": 5}).jobs] == [(1, 2, 3)]


def test_an_estimate_counts_what_runs(plan):
    """The native stage and half of the steps at the target, where every refresh is a dense forward more."""
    size = {"height": 128, "width": 128}
    rows = [
        {**size, "highres": True, "strength": 0.5, **more}
        for more in ({"global_path": "none"}, {"refresh": 1, "guided": "all"})
    ]
    window, both = (job.flop for job in plan(*rows, {**size, "highres": True, "strength": 1.0, "refresh": 4}).jobs[:2])
    native, dense = (job.flop for job in plan({"method": "dense"}, {**size, "method": "dense"}).jobs)
    inward = plan({**size, "method": {"method": {"name": "inward", "native": [8, 8]}, "steps": [0, 1]}}).jobs[0].flop
    assert window == pytest.approx(native + inward / 2)
    assert both == pytest.approx(window + dense / 2)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_bad_rows_are_refused_before_anything_runs(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "load_pipeline", lambda *_, **__: pytest.fail("the weights are read"))
    good = {"prompt": "a red circle", "height": 80, "width": 64, "highres": True}
    rows = [
        good,
        {**good, "height": 84},
        {**good, "width": 48},
        {**good, "max_memory": "10kB"},
        {**good, "height": 16384, "width": 16384},
        {"prompt": "a red circle", "highres": True, "width": 64},
        {**good, "refresh": 0},
        {**good, "global_path": "dreft"},
        {**good, "native": "big"},
        {**good, "strength": 0.1},
        {**good, "density": 0.3},
        {"prompt": "a red circle", "highres": False, "refresh": 2},
    ]
    refused = invoke(rows)
    assert refused.exit_code == 2
    told = refused.stderr.splitlines()
    for line, words in {
        2: "height=84 must be a multiple of 16, the nearest is 80",
        3: "width 48 is smaller than the native stage's 64",
        4: "does not fit",
        5: "a clip of 16384×16384 pixels and 5 frames does not fit",
        6: "highres needs the size to make the clip at: height missing",
        7: "refresh must be",
        8: "draft",
        9: "such as 480x832, not 'big'",
        10: "strength 0.1 leaves none of 4 steps",
        11: "method 'dense' has no option 'density'",
        12: "refresh is an option of highres: give highres as true too",
    }.items():
        assert any(row.startswith(f"  line {line}: ") and words in row for row in told), (line, told)
    assert not any(row.startswith("  line 1:") for row in told)
    for rows, words, message in (
        (
            [{"prompt": "x"}],
            ["--strength", "0.5"],
            "--strength is for clips made from a picture or video, and for --highres",
        ),
        ([{"prompt": "x"}], ["--sweep", "refresh=1,5"], "--refresh is an option of --highres"),
        ([good], ["--density", "0.5"], "--density is an option of none of the methods here: dense"),
    ):
        refused = invoke(rows, *words)
        assert refused.exit_code == 2
        assert message in refused.stderr
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_what_does_not_fit_with_all_of_the_model_is_refused_before_its_first_clip(plan, pipe, tmp_path):
    """The input is planned without the text encoder's weights; with them a clip that just fitted does not."""
    size = {"highres": True, "refresh": 1, "width": 64}
    [job] = plan({**size, "height": 96}).jobs
    just = plan({**size, "height": 96}).explanations[0].work.plan.peak
    assert job.highres.options.max_memory is None
    rows = [{"height": 80, "width": 64, "highres": True}, *({**size, "height": 96, "max_memory": str(just)},) * 2]
    rows[2] = {**rows[2], "seed": 1}
    with pytest.raises(
        ConfigError, match=r"none of its clips was begun:\n  lines 2, 3: a clip of 64×96 .* does not fit"
    ):
        run_batch(plan(*rows).jobs, tmp_path / "o", lambda *_: pipe)
    assert clips(tmp_path / "o") == []
    assert not (tmp_path / "o" / "manifest.jsonl").exists()


# ── interrupted, and short of memory ─────────────────────────────────────────────────────────────────────────────────


class Stopping(Watch):
    """Interrupts the second clip at the first step of its second stage; remembers which clips are begun."""

    def __init__(self, *, stop):
        self.stop, self.begun = stop, []

    def started(self, job):
        self.begun.append(job.index)

    def progress(self, phase, done, total):
        if self.stop and phase == "denoise" and done == 1 and len(self.begun) == 2:
            raise KeyboardInterrupt


def test_interrupted_and_resumed(plan, pipe, tmp_path):
    folder = tmp_path / "o"
    jobs = plan({"seed": 0}, {"seed": 1}, height=80, width=64, highres=True, refresh=1).jobs
    with pytest.raises(KeyboardInterrupt):
        run_batch(jobs, folder, lambda *_: pipe, watch=Stopping(stop=True))
    one, two = (job.file.removesuffix(".mp4") for job in jobs)
    assert clips(folder) == sorted([f"{one}.mp4", f"{one}-native.mp4", f"{two}-native.mp4"])
    assert [line["file"] for line in lines(folder)] == [f"{one}.mp4"]
    assert manifest.is_whole(folder, lines(folder)[0])
    kept = (folder / f"{one}.mp4").stat().st_mtime_ns
    begun_before = read_settings(folder / f"{two}-native.mp4")["run"]["frames_sha256"]
    (folder / f".{two}-native.mp4.123-abcdef.part").write_text("half")  # of a process that was killed

    watch = Stopping(stop=False)
    outcome = run_batch(jobs, folder, lambda *_: pipe, watch=watch)
    assert (outcome.made, outcome.kept, outcome.missing, watch.begun) == (1, 1, 0, [1])
    assert (folder / f"{one}.mp4").stat().st_mtime_ns == kept
    assert clips(folder) == sorted(f"{name}{kind}.mp4" for name in (one, two) for kind in ("", "-native"))
    assert all(manifest.is_whole(folder, line) for line in lines(folder))
    made = highres(pipe, "a red circle", height=80, width=64, **SMALL, refresh=1, seed=1)
    assert lines(folder)[1]["run"]["frames_sha256"] == frames_sha256(made.frames)
    assert begun_before == frames_sha256(made.native.frames)


def test_short_of_memory_it_is_tried_again_in_tiles(plan, pipe, tmp_path, monkeypatch):
    real, tiles = batch_highres.make, []

    def tight(pipe, *rest):
        tiles.append(pipe.vae.use_tiling)
        if not pipe.vae.use_tiling:
            raise torch.OutOfMemoryError("out of memory")
        return real(pipe, *rest)

    monkeypatch.setattr(batch_highres, "make", tight)
    jobs = plan({"height": 80, "width": 64, "highres": True}).jobs
    outcome = run_batch(jobs, tmp_path / "o", lambda *_: pipe, options=Options(memory=MemoryOptions(retry_oom=True)))
    assert (outcome.made, tiles, pipe.vae.use_tiling) == (1, [False, True], False)
    [line] = lines(tmp_path / "o")
    assert (line["run"]["memory_saving"], line["run"]["oom_retries"]) == (["vae-tiling"], 1)


def test_a_native_stage_without_an_edge_has_no_sharpness(plan, pipe, tmp_path, monkeypatch):
    """Nor has JSON a number for it: the clip is kept all the same."""
    from tilewise.pipelines.highres import two_stages as module

    real = module.coherence
    monkeypatch.setattr(module, "coherence", lambda frames, native: real(frames, np.zeros_like(native)))
    outcome = run_batch(plan({"height": 80, "width": 64, "highres": True}).jobs, tmp_path / "o", lambda *_: pipe)
    assert outcome.made == 1
    found = lines(tmp_path / "o")[0]["run"]["highres"]["coherence"]
    assert (found["sharpness"], found["native"]) == (None, 0.0)
