"""`tilewise batch` and `tilewise generate --from` as programs: exit codes, Ctrl-C, several processes, one of them killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tilewise.pipelines.batch import clip as batch_clip
from tilewise.pipelines.batch import manifest
from tilewise.pipelines.media.video import read_frames, read_settings
from tilewise.ui.cli.app import app

COMMAND = [sys.executable, "-m", "tilewise"]
SMALL = ["--steps", "2", "--frames", "5"]
LONG = 100_000  # steps: minutes of work, for what is to be interrupted


def invoke(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def start(*words: object, cwd: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, words)], cwd=cwd, env={**os.environ, **env},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    """Reads a process's stderr up to the line with a word in it."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if word in line:
            return
    pytest.fail(f"the process ended with {process.wait()} and never said {word!r}: {''.join(seen)}")


def clips(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith((".batch", "manifest")))


def done(folder: Path) -> dict[str, dict]:
    """The lines of manifest.jsonl by file; fails if one is about a clip that is not there, or two about the same."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    found = {line["file"]: line for line in lines if line["status"] == "done"}
    assert len(found) == len(lines)
    assert all(manifest.is_whole(folder, line) for line in lines)
    return found


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\n# no\na blue square\n")
    return tmp_path


def test_a_batch_and_the_same_again(tiny_pipe_dir, prompts):
    words = ["batch", "p.txt", "--model", tiny_pipe_dir, "--sweep", "method=dense,sta", "--seeds", "0-1", *SMALL]
    result = invoke(*words)
    assert result.exit_code == 0, result.stderr
    assert "8 made, 0 there already, 0 failed" in result.stdout
    assert "8 of 8 clips are in outputs/p" in result.stdout
    folder = prompts / "outputs" / "p"
    assert clips(folder) == sorted(done(folder))
    assert [name[:5] for name in clips(folder)] == [f"{i:05d}" for i in range(8)]
    assert "[8/8] made in" in result.stderr
    again = invoke(*words)
    assert again.exit_code == 0
    assert "0 made, 8 there already, 0 failed" in again.stdout
    assert "loading" not in again.stderr


def test_dry_run_prints_and_writes_nothing(tiny_pipe_dir, prompts):
    words = ["batch", "p.txt", "--model", tiny_pipe_dir, "--sweep", "method=dense,sta", *SMALL]
    result = invoke(*words, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert os.listdir(prompts) == ["p.txt"]
    for word in ("00003-a-blue-square-0-", "what would run", "3×8×8", "4 of 4 clips", "rough", "GiB free", "to make"):
        assert word in result.stdout
    assert result.stdout.count("what would run") == 2
    assert invoke(*words).exit_code == 0
    after = invoke(*words, "--dry-run")
    assert "0 of 4 clips" in after.stdout
    assert "nothing to make" in after.stdout
    assert "4 clips made here before" in invoke(*words, "--dry-run", "--seeds", "1").stdout


BAD = {
    "no such input": (["absent.txt"], 2, "absent.txt"),
    "suffix": (["p.yaml"], 2, ".jsonl"),
    "seeds": (["p.txt", "--seeds", "9-1"], 2, "--seeds"),
    "sweep": (["p.txt", "--sweep", "metod=a"], 2, "Did you mean 'method'"),
    "method": (["p.txt", "--method", "stta"], 2, "lines 1, 3: unknown"),
    "size": (["p.txt", "--height", "60"], 2, "nearest is 64"),
    "dtype": (["p.txt", "--dtype", "int8"], 2, "unknown dtype"),
    "max failures": (["p.txt", "--max-failures", "0"], 2, "--max-failures"),
    "both limits": (["p.txt", "--max-failures", "2", "--fail-fast"], 2, "--fail-fast"),
    "out is a file": (["p.txt", "--out", "p.txt"], 2, "is a file, not a directory"),
    "out cannot be": (["p.txt", "--out", "/proc/x"], 2, "cannot write"),
    "device": (["p.txt", "--device", "cuda:99"], 3, "cuda:99"),
    "model": (["p.txt", "--model", "/nowhere"], 3, "/nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(case, tiny_pipe_dir, prompts, monkeypatch):
    from tilewise.ui.cli import batch as batching

    monkeypatch.setattr(batching, "load_pipeline", lambda *_, **__: pytest.fail("the weights are read"))
    words, code, message = BAD[case]
    model = [] if "--model" in words else ["--model", tiny_pipe_dir]
    result = invoke("batch", *words, *model)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert os.listdir(prompts) == ["p.txt"]


def test_the_folder_of_a_model_is_no_folder_for_clips(tiny_pipe_dir, prompts):
    Path("m").symlink_to(tiny_pipe_dir)
    result = invoke("batch", "p.txt", "--model", "m", "--out", "m")
    assert result.exit_code == 2
    assert "stand in for the model m" in result.stderr
    # "demo" is the bundled model wherever it is run: its name is free for a folder
    result = invoke("batch", "p.txt", "--out", "demo", "--dry-run", *SMALL)
    assert result.exit_code == 0, result.output


def test_failures_are_told_and_the_exit_code_says_so(tiny_pipe_dir, prompts, monkeypatch):
    real = batch_clip.generate

    def fail(pipe, settings, progress=None):
        if "blue" in settings.prompt:
            raise RuntimeError("no blue today")
        return real(pipe, settings, progress)

    monkeypatch.setattr(batch_clip, "generate", fail)
    words = ["batch", "p.txt", "--model", tiny_pipe_dir, *SMALL]
    result = invoke(*words)
    assert result.exit_code == 1
    assert "1 made, 0 there already, 1 failed" in result.stdout
    assert "(line 3): RuntimeError: no blue today" in result.stderr
    assert invoke(*words, "--fail-fast", "--seeds", "1-9").stderr.count("] failed:") == 1
    monkeypatch.undo()
    monkeypatch.chdir(prompts)
    assert "1 made, 1 there already" in invoke(*words).stdout


def test_a_manifest_that_is_damaged_or_of_a_later_format(tiny_pipe_dir, prompts):
    words = ["batch", "p.txt", "--model", tiny_pipe_dir, "--out", "o", *SMALL]
    (prompts / "o").mkdir()
    path = prompts / "o" / "manifest.jsonl"
    path.write_text('{"manifest": 9}\n')
    for more in ([], ["--dry-run"]):
        result = invoke(*words, *more)
        assert result.exit_code == 2
        assert "later tilewise" in result.stderr
        assert path.read_text() == '{"manifest": 9}\n'
    path.write_text("{}\n{}\n")
    dry = invoke(*words, "--dry-run")
    assert dry.exit_code == 0 and "line 1 is damaged" in dry.stdout
    made = invoke(*words)
    assert made.exit_code == 0 and "line 2 is damaged" in made.stderr
    assert path.with_name("manifest.damaged.txt").read_text() == "{}\n{}\n"
    assert len(path.read_text().splitlines()) == 2 and "2 made" in made.stdout


# --- signals ------------------------------------------------------------------------------------------------------


def rows(folder: Path, *steps: int) -> None:
    lines = [
        {"prompt": "a red circle", "seed": i, "steps": n, "frames": 5, "id": f"clip {i}"} for i, n in enumerate(steps)
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_first_ctrl_c_finishes_the_clip(tiny_pipe_dir, prompts):
    rows(prompts, 2, 300, 2)
    words = ["batch", "p.jsonl", "--model", tiny_pipe_dir, "--out", "o"]
    process = start(*words, cwd=prompts)
    try:
        wait_for(process, "[2/3] 00001-clip-1")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "finishing this clip" in stderr
    assert "Traceback" not in stderr
    assert "2 made" in stdout
    assert clips(prompts / "o") == sorted(done(prompts / "o"))
    assert len(clips(prompts / "o")) == 2
    assert "1 made, 2 there already" in invoke(*words).stdout


@pytest.mark.parametrize(("sent", "code"), [((signal.SIGINT, signal.SIGINT), 130)])
def test_the_second_ctrl_c_or_a_termination_leaves_at_once(tiny_pipe_dir, prompts, sent, code):
    rows(prompts, 2, LONG)
    process = start("batch", "p.jsonl", "--model", tiny_pipe_dir, "--out", "o", cwd=prompts)
    try:
        wait_for(process, "[2/2] 00001-clip-1")
        process.send_signal(sent[0])
        if len(sent) == 2:
            wait_for(process, "finishing this clip")
            process.send_signal(sent[1])
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert clips(prompts / "o") == sorted(done(prompts / "o"))
    assert len(clips(prompts / "o")) == 1


def test_a_second_batch_in_the_folder_is_refused(tiny_pipe_dir, prompts):
    rows(prompts, LONG)
    words = ["batch", "p.jsonl", "--model", tiny_pipe_dir, "--out", "o"]
    process = start(*words, cwd=prompts)
    try:
        wait_for(process, "[1/1] 00000-clip-0")
        process.send_signal(signal.SIGSTOP)  # it holds the folder; the core is of use to the others
        for more in ([], ["--seeds", "5", "--steps", "3"], ["--overwrite"]):
            result = invoke(*words, *more)
            assert result.exit_code == 2, result.output
            assert "another batch is at work in o" in result.stderr
    finally:
        process.kill()
        process.wait()


# --- several processes --------------------------------------------------------------------------------------------


def ranks(words, cwd, size=2) -> list[subprocess.Popen[str]]:
    return [start(*words, cwd=cwd, RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank)) for rank in range(size)]


def test_one_of_two_processes_is_killed_in_mid_job(tiny_pipe_dir, prompts):
    """A rerun completes exactly the missing work: nothing twice, nothing lost."""
    rows(prompts, *[2] * 6, 150, 150)  # one long job for each process, made last
    words = ["batch", "p.jsonl", "--model", tiny_pipe_dir, "--out", "o"]
    processes = ranks(words, prompts)
    try:
        wait_for(processes[1], "[4/4]")
        time.sleep(0.2)  # well inside of the denoising
        processes[1].send_signal(signal.SIGKILL)
        assert processes[1].wait() == -signal.SIGKILL
        stdout, stderr = processes[0].communicate(timeout=300)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 0, stderr
    assert "7 of 8 clips are in o" in stdout
    first = done(prompts / "o")
    assert len(first) == 7
    times = {name: (prompts / "o" / name).stat().st_mtime_ns for name in first}

    again = invoke(*words)
    assert again.exit_code == 0, again.stderr
    assert "1 made, 7 there already" in again.stdout
    second = done(prompts / "o")
    assert len(second) == 8
    assert {name: second[name] for name in first} == first
    assert {name: (prompts / "o" / name).stat().st_mtime_ns for name in first} == times
    assert clips(prompts / "o") == sorted(second)


def test_killed_between_the_clip_and_its_line(tiny_pipe_dir, prompts):
    """SIGKILL right after the rename: the clip is taken over, not made again."""
    rows(prompts, 2, 2)
    words = ["batch", "p.jsonl", "--model", tiny_pipe_dir, "--out", "o"]
    program = (
        "import os, signal\n"
        "from tilewise.pipelines.batch import manifest\n"
        "manifest.append = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from tilewise.ui.cli.app import main\n"
        "main()\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, *map(str, words)], cwd=prompts, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(clips(prompts / "o")) == 1
    result = invoke(*words)
    assert "1 made, 1 there already" in result.stdout
    assert len(done(prompts / "o")) == 2


LAUNCHERS = {  # accelerate starts one process alone with --cpu; with --multi_gpu as many as asked for, GPUs or not
    "torchrun": (["torch.distributed.run", "--nproc-per-node", "2", "--master-port"], 5),
    "accelerate": (
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
        2,
    ),
}


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_launchers(launcher, tiny_pipe_dir, prompts):
    """Each of two processes makes its part; one merges what both noted down."""
    start, count = LAUNCHERS[launcher]
    rows(prompts, *[2] * count)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    result = subprocess.run(
        [sys.executable, "-m", *start, port, "-m", "tilewise", "batch", "p.jsonl", "--model", str(tiny_pipe_dir), "--out", "o"],
        cwd=prompts, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = done(prompts / "o")
    assert clips(prompts / "o") == sorted(found)
    assert {line["run"]["world_size"] for line in found.values()} == {2}
    assert sorted(line["run"]["rank"] for line in found.values()) == [0] * (count - count // 2) + [1] * (count // 2)
    assert [path.name for path in (prompts / "o").glob("manifest*")] == ["manifest.jsonl"]
    assert result.stdout.count(f"{count} of {count} clips are in o") == 1


def test_a_world_that_cannot_be(tiny_pipe_dir, prompts, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    result = invoke("batch", "p.txt", "--model", tiny_pipe_dir)
    assert result.exit_code == 2
    assert "RANK=2 and WORLD_SIZE=2" in result.stderr


# --- a clip again, from itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("made_by", ["batch", "generate"])
def test_a_clip_makes_itself_again_bit_for_bit(tiny_pipe_dir, prompts, made_by):
    (prompts / "p.jsonl").write_text(
        json.dumps({"prompt": "a red circle", "method": "sta", "window": "1,2,2", "negative": "blurry", "seed": 7,
                    "guidance": 2.5, "steps": 3, "frames": 5})
    )  # fmt: skip
    if made_by == "batch":
        assert invoke("batch", "p.jsonl", "--model", tiny_pipe_dir, "--out", "o").exit_code == 0
        clip = prompts / "o" / clips(prompts / "o")[0]
    else:
        clip = prompts / "first.mp4"
        words = ["--method", "sta", "--window", "1,2,2", "--negative", "blurry", "--seed", 7, "--guidance", 2.5]
        assert invoke("generate", "a red circle", "--model", tiny_pipe_dir, *words, "--steps", 3, "--frames", 5,
                      "--out", clip).exit_code == 0  # fmt: skip
    result = invoke("generate", "--from", clip, "--out", "again.mp4")
    assert result.exit_code == 0, result.stderr
    assert f"frames of {clip}: the same, bit for bit" in result.stdout
    before, after = read_settings(clip), read_settings("again.mp4")
    for name in {*before, *after} - {"run"}:
        assert before[name] == after[name]
    assert before["run"]["frames_sha256"] == after["run"]["frames_sha256"]
    assert (read_frames(clip) == read_frames("again.mp4")).all()


def test_another_process_makes_the_same_clip(tiny_pipe_dir, prompts):
    assert invoke("batch", "p.txt", "--model", tiny_pipe_dir, "--out", "o", *SMALL).exit_code == 0
    for name in clips(prompts / "o")[:1]:
        process = start("generate", "--from", f"o/{name}", "--out", f"again-{name}", cwd=prompts)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert "the same, bit for bit" in stdout
        assert (read_frames(prompts / "o" / name) == read_frames(f"again-{name}")).all()


def test_what_is_given_with_from_wins(tiny_pipe_dir, prompts):
    first = ["--model", tiny_pipe_dir, "--method", "sta", "--density", "0.5", "--seed", 3, *SMALL]
    assert invoke("generate", "a red circle", *first, "--out", "a.mp4").exit_code == 0
    result = invoke("generate", "a blue square", "--from", "a.mp4", "--window", "1,2,2", "--seed", 4, "--out", "b.mp4")
    assert result.exit_code == 0, result.stderr
    assert "bit for bit" not in result.stdout
    before, after = read_settings("a.mp4"), read_settings("b.mp4")
    assert (after["prompt"], after["seed"], after["steps"], after["frames"]) == ("a blue square", 4, 2, 5)
    assert after["method"]["method"]["window"] == [1, 2, 2]
    assert after["model"] == before["model"] == str(tiny_pipe_dir)


def test_vae_tiling_is_remembered(tiny_pipe_dir, prompts, monkeypatch):
    """A clip that only fitted with tiles in the VAE is made with them again."""
    real, used = batch_clip.generate, []

    def tight(pipe, settings, progress=None):
        if not pipe.vae.use_tiling:
            raise torch.OutOfMemoryError("out of memory")
        return real(pipe, settings, progress)

    monkeypatch.setattr(batch_clip, "generate", tight)
    assert invoke("batch", "p.txt", "--model", tiny_pipe_dir, "--out", "o", "--retry-oom", *SMALL).exit_code == 0
    from tilewise.ui.cli import generate as generating

    monkeypatch.setattr(
        generating, "generate", lambda pipe, *rest: (used.append(pipe.vae.use_tiling), real(pipe, *rest))[1]
    )
    result = invoke("generate", "--from", f"o/{clips(prompts / 'o')[0]}", "--out", "again.mp4")
    assert result.exit_code == 0, result.stderr
    assert used == [True]
    assert "bit for bit" in result.stdout
    assert read_settings("again.mp4")["run"]["memory_saving"] == ["vae-tiling"]


def test_bad_froms(tiny_pipe_dir, prompts):
    (prompts / "text.mp4").write_text("no clip")
    assert invoke("generate", "x", "--model", tiny_pipe_dir, *SMALL, "--out", "a.mp4").exit_code == 0
    for words, code, message in (
        (["--from", "absent.mp4"], 2, "absent.mp4"),
        (["--from", "text.mp4"], 1, "could not read"),
        (["--from", "a.mp4", "--out", "a.mp4"], 2, "would be replaced"),
        ([], 2, "there is no prompt"),
    ):
        result = invoke("generate", *words)
        assert result.exit_code == code, result.output
        assert message in result.stderr
