"""Running a batch: every clip once and whole, resumed by key and checksum, and failures that stay where they happen."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

import tilewise
from tilewise.pipelines.batch import clip as batch_clip
from tilewise.pipelines.batch import manifest
from tilewise.pipelines.batch import run as batch_module
from tilewise.pipelines.batch.input import Row
from tilewise.pipelines.batch.jobs import Tools, make_jobs
from tilewise.pipelines.batch.run import DiskFullError, Options, Watch, run_batch
from tilewise.pipelines.errors import ModelError, OutputError
from tilewise.pipelines.generation.clip_metadata import frames_sha256, read_clip_metadata
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.loading.load import load_pipeline, load_skeleton
from tilewise.pipelines.loading.revision import model_revision
from tilewise.pipelines.media.files import PART, replacing
from tilewise.pipelines.media.video import read_frames, read_settings
from tilewise.pipelines.memory import limits as memory
from tilewise.pipelines.memory import retry as retrying
from tilewise.pipelines.memory.limits import PeakMemory, possible, saving
from tilewise.pipelines.memory.options import MemoryOptions
from tilewise.pipelines.parallel.world import World
from tilewise.ui.common.options import method_config


class Seen(Watch):
    def __init__(self):
        self.calls = []
        self.notes = []

    def loading(self, model):
        self.calls.append("load")

    def started(self, job):
        self.calls.append(job.index)

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def pipe(tiny_pipe_dir):
    return load_pipeline(tiny_pipe_dir, device="cpu")


@pytest.fixture(scope="module")
def jobs(tiny_pipe_dir):
    return jobs_of(tiny_pipe_dir, [{"seed": seed} for seed in range(3)] + [{"method": "dense"}])


def jobs_of(folder, rows):
    skeleton = load_skeleton(folder)
    tools = Tools(method_config, lambda _: skeleton, model_revision, lambda _: "float32", torch.device("cpu"))
    numbered = [Row(line, {"prompt": "a red circle", **fields}) for line, fields in enumerate(rows, 1)]
    base = {"model": str(folder), "method": "sta", "window": (1, 2, 2), "steps": 2, "frames": 5}
    return make_jobs(folder / "in.jsonl", numbered, tools, command=base).jobs


@pytest.fixture
def go(pipe, tmp_path):
    """Runs jobs in tmp_path/out with the shared pipeline; returns (outcome, what was seen)."""

    def run(jobs, stop=lambda: False, world=None, **options):
        seen = Seen()
        outcome = run_batch(
            jobs, tmp_path / "out", lambda *_: pipe,
            options=Options(**options), watch=seen, stop=stop, world=world,
        )  # fmt: skip
        return outcome, seen

    run.folder = tmp_path / "out"
    return run


def clips(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith((".batch", "manifest")))


def lines(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_every_clip_and_what_is_written_about_it(go, jobs, pipe):
    outcome, seen = go(jobs)
    assert (outcome.made, outcome.failed, outcome.missing, outcome.stopped) == (4, [], 0, None)
    assert seen.calls == ["load", 0, 1, 2, 3]
    assert clips(go.folder) == [job.file for job in jobs]
    for job, line in zip(jobs, lines(go.folder), strict=True):
        path = go.folder / job.file
        assert line["sha256"] == manifest.sha256(path)
        assert line["bytes"] == path.stat().st_size
        told = {
            name: value for name, value in line.items() if name not in ("manifest", "status", "file", "bytes", "sha256")
        }
        assert read_settings(path) == told
        clip = generate(pipe, job.settings)
        run = line["run"]
        assert read_clip_metadata(path).settings == job.settings
        assert run["frames_sha256"] == frames_sha256(clip.frames)
        assert run["density"] == (1.0 if clip.summary is None else clip.summary.density)
        assert set(run["seconds"]) == {"load", "warm_up", "encode", "denoise", "decode", "total"}
        assert run["seconds"]["warm_up"] is None
        assert run["batch"] == job.to_dict()
        assert run["device"] == run["device_name"] == "cpu"
        assert run["versions"]["torch"] == torch.__version__
        assert run["peak_memory"]["bytes"] > 10**7
        assert run["fallbacks"] == {}
    assert [line["run"]["seconds"]["load"] > 0 for line in lines(go.folder)] == [True, False, False, False]


def test_a_second_run_does_nothing(go, jobs):
    go(jobs)
    before = {name: (go.folder / name).stat().st_mtime_ns for name in os.listdir(go.folder)}
    outcome, seen = go(list(reversed(jobs)))  # nor does the order matter
    assert (outcome.made, outcome.kept, seen.calls) == (0, 4, [])
    after = {name: (go.folder / name).stat().st_mtime_ns for name in os.listdir(go.folder)}
    assert {k: v for k, v in before.items() if ".lock" not in k} == {k: v for k, v in after.items() if ".lock" not in k}


def test_only_what_is_missing_or_damaged_is_made_again(go, jobs):
    go(jobs)
    content = (go.folder / jobs[0].file).read_bytes()
    (go.folder / jobs[0].file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (go.folder / jobs[2].file).unlink()
    outcome, seen = go(jobs)
    assert seen.calls == ["load", 0, 2]
    assert (outcome.made, outcome.kept) == (2, 2)
    assert [note.split(" is missing")[0] for note in seen.notes] == [jobs[0].file, jobs[2].file]
    assert len(lines(go.folder)) == 4
    assert all(manifest.is_whole(go.folder, line) for line in lines(go.folder))


def test_a_whole_clip_without_a_line_is_taken_over(go, jobs):
    """The machine stopped between the rename and the manifest's line."""
    go(jobs)
    path = go.folder / "manifest.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:1]) + kept[1][:50])
    cut = go.folder / jobs[3].file
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])  # this one is not whole
    outcome, seen = go(jobs)
    assert seen.calls == ["load", 3]
    assert (outcome.made, outcome.taken_over, outcome.kept, outcome.missing) == (1, 2, 1, 0)
    again = {line["file"]: line for line in lines(go.folder)}
    assert again[jobs[1].file] == json.loads(kept[1])


def test_another_clip_under_the_name_is_not_taken_over(go, jobs):
    go(jobs[:2])
    (go.folder / "manifest.jsonl").unlink()
    (go.folder / jobs[1].file).replace(go.folder / jobs[0].file)
    outcome, _ = go(jobs[:2])
    assert (outcome.made, outcome.taken_over) == (2, 0)


def test_overwrite(go, jobs):
    go(jobs[:2])
    outcome, seen = go(jobs[:2], overwrite=True)
    assert (outcome.made, outcome.kept, seen.calls) == (2, 0, ["load", 0, 1])
    assert len(manifest.read_manifest(go.folder)) == 2


def test_what_a_killed_process_left_is_removed(go, jobs):
    go(jobs[:1])
    half = f".{jobs[1].file}.123-abcdef.part"
    for name in (half, ".manifest.jsonl.123-abcdef.part", ".mine.part", "mine.mp4"):
        (go.folder / name).write_text("x")
    go(jobs[:1])
    assert clips(go.folder) == [".mine.part", jobs[0].file, "mine.mp4"]
    with replacing(go.folder / jobs[0].file) as part:  # the names are really of this form
        assert PART.fullmatch(part.name)
        part.write_text("x")


def test_a_failing_job_stops_nothing_else(go, jobs, monkeypatch):
    real = batch_clip.generate

    def fail(pipe, settings, progress=None):
        if settings.seed == 1:
            raise RuntimeError("boom")
        return real(pipe, settings, progress)

    monkeypatch.setattr(batch_clip, "generate", fail)
    outcome, _ = go(jobs)
    assert (outcome.made, outcome.missing) == (3, 1)
    assert [(job.index, str(error)) for job, error in outcome.failed] == [(1, "boom")]
    told = manifest.read_manifest(go.folder)[jobs[1].key]
    assert (told["status"], told["error"]) == ("failed", "RuntimeError: boom")
    monkeypatch.undo()
    outcome, seen = go(jobs)
    assert (seen.calls, outcome.made, outcome.kept) == (["load", 1], 1, 3)
    assert manifest.read_manifest(go.folder)[jobs[1].key]["status"] == "done"


def test_a_method_that_never_runs_is_told(go, tiny_pipe_dir):
    (job,) = jobs_of(tiny_pipe_dir, [{"steps": 1, "frames": 1}])
    _, seen = go([job])
    told = "sta never runs: the only step is outside the part from 0.25 to 1 of the schedule, so that all is dense"
    assert seen.notes == [f"{job.file}: {told}"]
    assert lines(go.folder)[0]["run"]["notes"] == [told]


@pytest.mark.parametrize(("limit", "tried", "told"), [(1, 1, "1 job failed"), (2, 2, "2 jobs failed"), (None, 4, None)])
def test_max_failures(go, jobs, monkeypatch, limit, tried, told):
    monkeypatch.setattr(batch_clip, "generate", lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    outcome, seen = go(jobs, max_failures=limit)
    assert len(outcome.failed) == tried == len(seen.calls) - 1
    assert outcome.stopped == told


def test_stopping_between_clips(go, jobs):
    count = 0

    def stop():
        nonlocal count
        count += 1
        return count > 3  # before loading, before the first clip and before the second

    outcome, _ = go(jobs, stop=stop)
    assert (outcome.made, outcome.stopped, outcome.missing) == (2, "interrupted", 2)
    assert go(jobs)[1].calls == ["load", 2, 3]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_leaving_at_once_leaves_nothing_half(go, jobs, monkeypatch, error):
    def leave(path, *_, **__):
        with replacing(path) as part:
            part.write_text("half")
            raise error

    go(jobs[:1])
    monkeypatch.setattr(batch_clip, "write_or_rescue", leave)
    with pytest.raises(error):
        go(jobs)
    assert clips(go.folder) == [jobs[0].file]
    monkeypatch.undo()
    assert go(jobs)[0].made == 3


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OutputError("ffmpeg stopped: No space left on device"), "cause"],
)
def test_a_full_disk_ends_the_batch_cleanly(go, jobs, monkeypatch, error):
    def full(*_, **__):
        if error == "cause":
            raise OutputError("could not write") from OSError(errno.EDQUOT, "quota")
        raise error

    go(jobs[:1])
    monkeypatch.setattr(batch_clip, "write_or_rescue", full)
    with pytest.raises(DiskFullError, match="run the same command again"):
        go(jobs)
    monkeypatch.undo()
    assert [line["status"] for line in lines(go.folder)] == ["done"]
    assert go(jobs)[0].made == 3


def test_a_model_that_does_not_load_is_an_error_and_the_folder_is_free(go, jobs, tmp_path):
    def fail(model, dtype, loras):
        raise ModelError("damaged")

    with pytest.raises(ModelError):
        run_batch(jobs, go.folder, fail)
    assert go(jobs[:1])[0].made == 1


def test_models_are_loaded_one_after_the_other(tiny_pipe_dir, tmp_path, pipe):
    jobs = jobs_of(tiny_pipe_dir, [{"seed": 0}, {"seed": 1}, {"seed": 2}])
    jobs[1] = type(jobs[1])(**{**vars(jobs[1]), "dtype": "bfloat16"})
    loaded = []

    def load(model, dtype, loras):
        loaded.append(dtype)
        return pipe

    outcome = run_batch(jobs, tmp_path / "out", load)
    assert outcome.made == 3
    assert loaded == ["float32", "bfloat16"]


def test_warm_up_is_timed_apart_and_once_a_shape(go, tiny_pipe_dir):
    jobs = jobs_of(tiny_pipe_dir, [{"seed": 0}, {"seed": 1}, {"seed": 0, "steps": 3}])
    go(jobs, warm_up=True)
    assert [line["run"]["seconds"]["warm_up"] > 0 for line in lines(go.folder)] == [True, False, True]


def test_clips_of_another_version_are_told_and_kept(go, jobs):
    go(jobs[:1])
    path = go.folder / "manifest.jsonl"
    old = json.loads(path.read_text())
    old["tilewise"] = "0.0.1"
    old["run"]["batch"]["key"] = "0" * 64
    path.write_text(json.dumps(old) + "\n")
    (go.folder / jobs[0].file).rename(go.folder / "00000-old-0-00000000.mp4")
    outcome, seen = go(jobs[:1])
    assert outcome.made == 1
    assert "tilewise 0.0.1" in seen.notes[0]
    assert (go.folder / "00000-old-0-00000000.mp4").is_file()
    assert len(lines(go.folder)) == 2


def test_a_prompt_that_cannot_be_judged_is_a_note(go, jobs, monkeypatch):
    monkeypatch.setattr(batch_clip, "add_content_score", lambda *_: (_ for _ in ()).throw(RuntimeError("no verdict")))
    outcome, seen = go(jobs[:1])
    assert outcome.made == 1
    assert lines(go.folder)[0]["run"]["notes"] == ["the clip could not be scored: no verdict"]
    assert "no verdict" in seen.notes[0]


# --- memory -------------------------------------------------------------------------------------------------------


def short_of_memory(monkeypatch, needed):
    """generate fails until every measure in `needed` is in force; offload is stood in for: there is no GPU."""
    real, tries, on = batch_clip.generate, [], set()

    def attempt(pipe, settings, progress=None):
        tries.append((settings.seed, pipe.vae.use_tiling, "offload" in on))
        if not needed <= ({"vae-tiling"} if pipe.vae.use_tiling else set()) | on:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 1 GiB")
        return real(pipe, settings, progress)

    def offload(pipe):
        on.add("offload")
        return lambda: on.discard("offload")

    monkeypatch.setattr(batch_clip, "generate", attempt)
    monkeypatch.setitem(memory._SWITCHES, "offload", offload)
    for module in (memory, retrying):
        monkeypatch.setattr(module, "possible", lambda pipe: ["vae-tiling"] * (not pipe.vae.use_tiling) + ["offload"])
    return tries


def test_retry_oom_tries_tiling_then_offload_and_says_so(go, jobs, monkeypatch, pipe):
    tries = short_of_memory(monkeypatch, {"vae-tiling", "offload"})
    outcome, seen = go(jobs[:2], memory=MemoryOptions(retry_oom=True))
    assert (outcome.made, outcome.failed) == (2, [])
    # The second clip, of the same shape, begins where the first one succeeded.
    assert tries == [(0, False, False), (0, True, False), (0, True, True), (1, True, True)]
    assert [line["run"]["memory_saving"] for line in lines(go.folder)] == [["vae-tiling", "offload"]] * 2
    assert [line["run"]["oom_retries"] for line in lines(go.folder)] == [2, 0]
    assert [note.split("; ")[1] for note in seen.notes] == [
        "trying again with vae-tiling",
        "trying again with vae-tiling and offload",
    ]
    assert not pipe.vae.use_tiling


def test_without_retry_oom_the_clip_fails(go, jobs, monkeypatch):
    tries = short_of_memory(monkeypatch, {"vae-tiling"})
    outcome, _ = go(jobs[:2])
    assert len(outcome.failed) == 2
    assert tries == [(0, False, False), (1, False, False)]
    assert "OutOfMemoryError" in manifest.read_manifest(go.folder)[jobs[0].key]["error"]


def test_retry_oom_gives_up_when_nothing_is_left(go, jobs, monkeypatch):
    tries = short_of_memory(monkeypatch, {"more"})
    outcome, _ = go(jobs[:1], memory=MemoryOptions(retry_oom=True))
    assert len(tries) == 3
    assert isinstance(outcome.failed[0][1], torch.OutOfMemoryError)


def test_measures_are_undone(pipe):
    assert possible(pipe) == ["vae-tiling"]  # on a CPU there is nothing to offload from

    def fail() -> None:
        with saving(pipe, ["vae-tiling"]):
            assert pipe.vae.use_tiling
            assert possible(pipe) == []
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not pipe.vae.use_tiling
    with pytest.raises(tilewise.ConfigError, match="offload"), saving(pipe, ["offload"]):
        pass


def test_peak_memory_counts_from_its_start():
    peak = PeakMemory(torch.device("cpu"))
    peak.start()
    before = peak.read()["bytes"]
    torch.ones(50_000_000).sum()
    during = peak.read()["bytes"]
    peak.start()
    after = peak.read()["bytes"]
    assert during - before > 150_000_000
    assert during - after > 150_000_000


# --- several processes, here one after the other ------------------------------------------------------------------


def test_each_process_makes_its_share(go, jobs):
    first, _ = go(jobs, world=World(1, 2))
    assert (first.made, first.missing) == (2, 2)
    assert [name for name in os.listdir(go.folder) if name.startswith("manifest")] == ["manifest.jsonl"]
    second, _ = go(jobs, world=World(0, 2))
    assert (second.made, second.missing) == (2, 0)
    assert clips(go.folder) == [job.file for job in jobs]
    assert go(jobs)[0].kept == 4


def test_the_first_cleans_up_while_another_tries_whether_it_can_write(go, jobs, monkeypatch):
    """Processes of one batch start together: what one writes to try the folder may vanish under the other's clean-up."""
    iterdir, seen = batch_module.Path.iterdir, []

    def listed(path):
        files = list(iterdir(path))
        if path == go.folder and not seen:
            seen.append(go.folder / ".manifest.jsonl.1-0a1b2c.part")  # seen by this one, removed by the other since
        return iter([*files, *seen])

    monkeypatch.setattr(batch_module.Path, "iterdir", listed)
    outcome, _ = go(jobs[:1])
    assert seen
    assert (outcome.made, outcome.missing) == (1, 0)


def test_clips_that_are_read_back_are_the_clips(go, jobs, pipe):
    go(jobs[:1])
    assert read_frames(go.folder / jobs[0].file).shape == (5, 64, 64, 3)
