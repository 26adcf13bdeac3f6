"""The command line, as a program of its own: files, tables, exit codes, Ctrl-C.

What needs a process (signals, entry points, output streams) starts one; the many kinds of bad input run in this process,
through the same app, because importing torch each time would take minutes.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import global_state
import numpy as np
import pytest
import tiny_wan
import torch
from diffusers import DanceDiffusionPipeline, IPNDMScheduler, UNet1DModel
from typer.testing import CliRunner

import tilewise
from tilewise.__main__ import main
from tilewise.pipelines.generation.generate import Clip, add_content_score
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.media.video import read_frames, read_settings
from tilewise.ui.cli import generate as generating
from tilewise.ui.cli.app import app
from tilewise.ui.common.options import default_out, method_config

PROMPT = "a red circle moving right"
NAME = "a-red-circle-moving-right-0"
FRAMES = np.zeros((9, 64, 64, 3), np.uint8)
SECONDS = {"encode": 0.1, "denoise": 1.0, "decode": 0.2, "total": 1.3}
COMMAND = [sys.executable, "-m", "tilewise"]


def cli(*words: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def shapes_dir(tmp_path_factory) -> Path:
    """A tiny model that claims to draw the world of shapes, so that its clips are judged."""
    return tiny_wan.save_tiny_pipeline(tmp_path_factory.mktemp("shapes") / "m", native={"world": "shapes"})


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- what works ---------------------------------------------------------------------------------------------------


def test_generate_and_compare(tiny_pipe_dir, tmp_path):
    result = cli(
        "generate", PROMPT, "--model", tiny_pipe_dir, "--window", "1,2,2", "--compare", "dense", "--seed", 3,
        "--out", "new/clip.mp4", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    stems = ("clip", "clip-dense", "clip-side-by-side")
    assert files_in(tmp_path) == sorted(f"new/{stem}.{kind}" for stem in stems for kind in ("mp4", "json"))
    clip, dense, both = (read_frames(tmp_path / "new" / f"{stem}.mp4") for stem in stems)
    assert clip.shape == dense.shape == (9, 64, 64, 3)
    assert both.shape == (9, 80, 132, 3)

    record = read_settings(tmp_path / "new" / "clip.mp4")
    assert record == json.loads((tmp_path / "new" / "clip.json").read_text())
    settings = GenerateSettings.from_dict(record)
    assert (settings.prompt, settings.seed, settings.frames) == (PROMPT, 3, 9)
    assert settings.method.method == tilewise.STA(window=(1, 2, 2), far="tiles")
    assert settings.method.steps == tilewise.presets()["sta-balanced"].steps
    assert GenerateSettings.from_dict(read_settings(tmp_path / "new" / "clip-dense.mp4")).is_dense
    assert record["run"]["summary"]["fallbacks"] == {}
    assert record["run"]["comparison"]["psnr"] > 0
    density, cost = record["run"]["density"], record["run"]["cost"]
    assert density < cost
    for name, share in (("density where sparse", density), ("cost, means counted too", cost)):
        assert re.search(rf"{name}\W+{share:.3f}", result.stdout)

    for word in ("sparse", "dense step", "torch", "speed-up over dense", "PSNR", "SSIM", "fallbacks to dense"):
        assert word in result.stdout
    assert re.findall(r"^wrote (.*)$", result.stdout, re.M) == [f"new/{stem}.mp4" for stem in stems]
    assert "sta: denoise 4/4" in result.stderr
    assert "4/4" not in result.stdout
    assert "Traceback" not in result.stderr
    assert "it/s" not in result.stderr  # nor the libraries' own bars


def test_generate_dense_twice_gives_the_same_clip(tiny_pipe_dir, tmp_path):
    for name in ("a", "b"):
        words = ["generate", PROMPT, "--model", str(tiny_pipe_dir), "--method", "dense", "--steps", "2"]
        result = CliRunner().invoke(app, [*words, "--frames", "5", "--out", str(tmp_path / f"{name}.mp4")])
        assert result.exit_code == 0, result.stderr
    a, b = (read_frames(tmp_path / f"{name}.mp4") for name in ("a", "b"))
    assert len(a) == 5
    assert (a == b).all()


def test_dry_run_writes_nothing(tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["generate", PROMPT, "--model", str(tiny_pipe_dir), "--density", "0.3", "--dry-run"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert files_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    for word in (PROMPT, "density=0.3", "5×8×8", f"outputs/{NAME}.mp4"):
        assert word in result.stdout


def test_explain(tiny_pipe_dir):
    words = ["explain", "--model", str(tiny_pipe_dir), "--method", "sta", "--frames", "17"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert "9×8×8" in result.stdout
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["size"] == {"height": 64, "width": 64, "frames": 17, "num_inference_steps": 4}
    assert told["denoisers"][0]["tokens"] == 9 * 8 * 8
    assert 0 < told["density"] <= 1


def test_a_random_seed_is_drawn_said_and_stored(tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(generating, "generate", lambda pipe, settings, *_: Clip(FRAMES, SECONDS, None, settings))
    seeds = set()
    for name in ("a.mp4", "b.mp4"):
        words = ["generate", PROMPT, "--model", str(tiny_pipe_dir), "--seed", "random", "--out", str(tmp_path / name)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.stderr
        seed = read_settings(tmp_path / name)["seed"]
        assert f", {seed} " in result.stdout
        seeds.add(seed)
    assert len(seeds) == 2
    again = CliRunner().invoke(
        app, ["generate", "--from", str(tmp_path / "a.mp4"), "--dry-run", "--out", str(tmp_path / "c.mp4")]
    )
    assert str(read_settings(tmp_path / "a.mp4")["seed"]) in again.stdout


def test_out_of_memory_is_tried_again_where_that_is_asked_for(tiny_pipe_dir, tmp_path, monkeypatch):
    tiled = []

    def tight(pipe, settings, *_):
        tiled.append(pipe.vae.use_tiling)
        if not pipe.vae.use_tiling:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 1 GiB")
        return Clip(FRAMES, SECONDS, None, settings)

    monkeypatch.setattr(generating, "generate", tight)
    out = tmp_path / "clip.mp4"
    words = ["generate", PROMPT, "--model", str(tiny_pipe_dir), "--out", str(out)]
    assert CliRunner().invoke(app, words).exit_code == 1
    result = CliRunner().invoke(app, [*words, "--retry-oom"])
    assert result.exit_code == 0, result.stderr
    assert "note: out of GPU memory; trying again with vae-tiling" in result.stderr
    run = read_settings(out)["run"]
    assert (run["memory_saving"], run["oom_retries"], run["offload"]) == (["vae-tiling"], 1, "none")
    result = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "tiled.mp4"), "--vae-tiling"])
    assert result.exit_code == 0, result.stderr
    assert tiled == [False, False, True, True]


def test_presets_and_options_are_listed():
    result = CliRunner().invoke(app, ["presets"])
    assert result.exit_code == 0, result.stderr
    for word in (
        *tilewise.presets(),
        *tilewise.methods(),
        "stride",
        "three whole numbers such as 3,3,3",
        "steps_sparse",
    ):
        assert word in result.stdout
    told = json.loads(CliRunner().invoke(app, ["presets", "--json"]).stdout)
    assert {name: tilewise.Config.from_dict(one) for name, one in told.items()} == tilewise.presets()


def test_methods_are_listed_with_source_and_use():
    result = CliRunner().invoke(app, ["methods", "--json"])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert sorted(told) == tilewise.methods()
    for one in told.values():
        assert all(one[key] for key in ("what", "source", "use")), one
        assert one["what"].endswith(".")
    table = CliRunner().invoke(app, ["methods"]).stdout
    assert all(name in table for name in told)


@pytest.mark.parametrize("command", [[], ["generate"], ["batch"], ["presets"], ["methods"]])
def test_h_is_help(command):
    long, short = (CliRunner().invoke(app, [*command, word]) for word in ("--help", "-h"))
    assert short.exit_code == 0
    assert short.stdout == long.stdout


def test_env():
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0, result.stderr
    for word in ("python", torch.__version__, "diffusers", "ffmpeg", "cpu", "chosen", "triton"):
        assert word in result.stdout


def test_help_and_version_need_no_model(tmp_path):
    for words in (["--help"], ["generate", "--help"], ["explain", "--help"], ["env", "--help"]):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert cli("--version", cwd=tmp_path).stdout == f"tilewise {tilewise.__version__}\n"


def test_help_and_version_import_no_torch():
    code = (
        "import sys, tilewise\n"
        "from typer.testing import CliRunner\n"
        "from tilewise.ui.cli.app import app\n"
        "for word in ('--help', '--version'): assert CliRunner().invoke(app, [word]).exit_code == 0\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))\n"
        "tilewise.STA; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[]\nTrue\n", done.stderr


def test_the_lazy_names_are_the_public_names():
    assert set(tilewise._MODULES) == set(tilewise.__all__)
    tree = ast.parse(Path(tilewise.__file__).read_text())
    checked = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in checked for alias in node.names if node.module != "importlib"}
    seen.pop("TYPE_CHECKING"), seen.pop("Any")
    assert seen == tilewise._MODULES
    assert set(tilewise.__all__) < set(dir(tilewise))
    with pytest.raises(AttributeError, match="has no attribute 'pacth'"):
        tilewise.pacth  # noqa: B018


def test_what_the_clip_shows_is_added_once_it_is_written(shapes_dir, tmp_path, monkeypatch):
    words = ["generate", PROMPT, "--model", str(shapes_dir), "--steps", "1", "--window", "1,2,2", "--compare", "dense"]
    stems = ("clip", "clip-dense", "clip-side-by-side")
    before = []

    def look(pipe, clip):
        before.append([read_settings(tmp_path / f"{stem}.mp4")["run"]["content"] for stem in stems])
        return add_content_score(pipe, clip)

    monkeypatch.setattr(generating, "add_content_score", look)
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "clip.mp4")])
    assert result.exit_code == 0, result.stderr
    assert before == [[None, None, None]] * 2
    for stem in stems:
        record = read_settings(tmp_path / f"{stem}.mp4")
        assert record == json.loads((tmp_path / f"{stem}.json").read_text())
        assert set(record["run"]["content"]) >= {"colour", "shape", "motion"}
    assert record["run"]["comparison"]["content"]["dense"] is not None
    assert "prompt shown, dense" in result.stdout
    assert "note: sta never runs: the only step is outside the part from 0.2 to 1" in result.stderr
    assert "the method never ran" in result.stdout
    assert result.stdout.count("(one run)") == 2


def test_a_failing_judge_is_a_note(shapes_dir, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("[no] verdict")

    monkeypatch.setattr(generating, "add_content_score", fail)
    path = tmp_path / "clip.mp4"
    words = ["generate", PROMPT, "--model", str(shapes_dir), "--steps", "1", "--out", str(path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert "note: the clip is written, but could not be scored: [no] verdict" in result.stderr
    assert f"wrote {path}" in result.stdout
    assert len(read_frames(path)) == 9
    assert read_settings(path)["run"]["content"] is None


def test_a_config_file_as_method(tiny_pipe_dir, tmp_path):
    tilewise.save_config(tilewise.resolve(tilewise.STA(window=(1, 2, 2)), steps=(0.5, 1.0)), tmp_path / "my.json")
    assert method_config(str(tmp_path / "my.json")).steps == (0.5, 1.0)
    words = ["explain", "--model", str(tiny_pipe_dir), "--method", str(tmp_path / "my.json"), "--json"]
    told = json.loads(CliRunner().invoke(app, words).stdout)
    assert (told["sparse_steps"], told["dense_steps"]) == (2, 2)


def test_window_and_density_replace_the_presets_own():
    assert method_config("sta-fast", {"window": "1, 3,5"}).method == tilewise.STA(window=(1, 3, 5), far="tiles")
    assert method_config("sta", {"density": 0.5}).method == tilewise.STA(density=0.5)
    assert method_config("sta-fast", {"window": "3,3,3"}).steps == tilewise.presets()["sta-fast"].steps
    assert method_config("draft", {"set.recall": "0.9"}).method == tilewise.Draft(recall=0.9)


def test_default_names():
    assert default_out("A red circle, moving right!", 7, 9) == Path("outputs/a-red-circle-moving-right-7.mp4")
    assert default_out("円を描く", 0, 1) == Path("outputs/円を描く-0.png")
    assert default_out("!? …", 0, 1) == Path("outputs/clip-0.png")
    assert len(default_out("x/../" * 100, 0, 9).name) <= 70
    assert len(os.fsencode(default_out("円" * 100, 0, 9).name)) <= 70
    assert default_out("../../etc", 0, 9).parent == Path("outputs")


# --- what cannot be: one clear message, the right exit code, no file ----------------------------------------------

BAD = {
    "unknown method": (["--method", "stta"], 2, "Did you mean 'sta'"),
    "unknown preset": (["--method", "sta-quick"], 2, "sta-quality"),
    "window of rank 2": (["--window", "3,3"], 2, "three whole numbers"),
    "window below 1": (["--window", "3,0,3"], 2, "at least 1"),
    "window of words": (["--window", "a,b,c"], 2, "such as 3,3,3"),
    "density above 1": (["--density", "1.5"], 2, "(0, 1]"),
    "density 0": (["--density", "0"], 2, "(0, 1]"),
    "window and density": (["--window", "3,3,3", "--density", "0.3"], 2, "not both"),
    "window for dense": (
        ["--method", "dense", "--window", "3,3,3"],
        2,
        "method 'dense' has no option 'window'. Its only ones are cache and add",
    ),
    "window for draft": (
        ["--method", "draft", "--window", "3,3,3"],
        2,
        "no option 'window'. Its options: density, head_density, recall",
    ),
    "unknown option of a method": (
        ["--method", "draft", "--set", "recal=.9"],
        2,
        "no option 'recal'. Its options: density, head_density, recall",
    ),
    "no value": (["--set", "recall"], 2, "--set takes NAME=VALUE"),
    "an option twice": (["--set", "density=.4", "--density", ".3"], 2, "--set density and --density are the same"),
    "a number of words": (
        ["--method", "draft", "--set", "floor=few"],
        2,
        "floor of draft must be a whole number, not 'few'",
    ),
    "a schedule of one": (
        ["--steps-sparse", "0.5"],
        2,
        "steps must be two fractions (from, to), or step numbers such as '1:' or '2:6', got '0.5'",
    ),
    "a schedule past the end": (["--steps-sparse", "0.5,2"], 2, "0 ≤ from ≤ to ≤ 1"),
    "blocks": (["--blocks", "first"], 2, "blocks: cannot read 'first'"),
    "a schedule for dense": (["--method", "dense", "--blocks", "1:"], 2, "method 'dense' has no option 'blocks'"),
    "density and recall": (
        ["--method", "draft", "--density", ".3", "--set", "recall=.9"],
        2,
        "give density, head_density or recall, not both",
    ),
    "no such config": (["--method", "nowhere.json"], 2, "nowhere.json"),
    "height": (["--height", "60"], 2, "nearest is 64"),
    "frames": (["--frames", "8"], 2, "frames=8"),
    "frames past anything": (["--frames", "1000000000"], 2, "frames must be at most 10,000,000, not 1000000000"),
    "steps": (["--steps", "0"], 2, "steps must be a whole number of at least 1, not 0"),
    "not a number": (["--steps", "many"], 2, "--steps"),
    "seed": (["--seed", "-1"], 2, "seed"),
    "suffix": (["--out", "clip.avi"], 2, ".mp4"),
    "directory": (["--out", "."], 2, "directory"),
    "unwritable": (["--out", "/proc/clip.mp4"], 2, "cannot write /proc/clip.mp4"),
    "runs without compare": (["--runs", "3"], 2, "give --compare dense too"),
    "no runs": (["--compare", "dense", "--runs", "0"], 2, "--runs takes a whole number of at least 1"),
    "compare with": (["--compare", "sta"], 2, "takes 'dense'"),
    "compare dense": (["--method", "dense", "--compare", "dense"], 2, "another method"),
    "unknown device": (["--device", "gpu"], 2, "unknown device"),
    "unknown dtype": (["--dtype", "int8"], 2, "unknown dtype"),
    "unknown option": (["--widow", "3,3,3"], 2, "--window"),
    "way of offloading": (
        ["--offload", "gpu"],
        2,
        "unknown offload 'gpu'. Did you mean 'group'?",
    ),
    "offload on a CPU": (
        ["--offload", "model"],
        2,
        "--offload model keeps weights off a GPU, and this runs on the CPU",
    ),
    "a seed of words": (["--seed", "lucky"], 2, "seed takes a whole number, or random, not 'lucky'"),
    "no such device": (["--device", "cuda:99"], 3, "cuda:99"),
    "no such model": (["--model", "/nowhere"], 3, "/nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tiny_pipe_dir, tmp_path, monkeypatch):
    words, code, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["generate", PROMPT, "--model", str(tiny_pipe_dir), *words])
    assert result.exit_code == code, result.output
    assert message in re.sub(r"[\s│]+", " ", result.stderr)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("steps", ["0", "-5"])
def test_explain_refuses_steps_below_1(steps, tiny_pipe_dir):
    result = CliRunner().invoke(app, ["explain", "--model", str(tiny_pipe_dir), "--steps", steps])
    assert result.exit_code == 2, result.output
    assert re.search(rf"steps must be .*at least 1.* {steps}\n", result.stderr)
    assert result.stdout == ""


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("out", ["file/clip.mp4", "file/new/clip.mp4"])
def test_a_parent_that_is_a_file(out, dry, tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    result = CliRunner().invoke(app, ["generate", PROMPT, "--model", str(tiny_pipe_dir), "--out", out, *dry])
    assert result.exit_code == 2, result.output
    assert f"cannot write {out}: {tmp_path / 'file'} is a file, not a directory" in result.stderr
    assert Path("file").read_text() == "mine"
    assert files_in(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["", "-dense", "-side-by-side"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_settings_that_cannot_be_written_are_found_before_any_work(kind, dry, tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generating, "load_pipeline", lambda *_, **__: pytest.fail("the weights are read"))
    words = ["generate", PROMPT, "--model", str(tiny_pipe_dir), "--compare", "dense", "--out", "new/clip.mp4", *dry]
    config = Path("new", f"clip{kind}.json")
    config.parent.mkdir()
    tilewise.save_config(tilewise.resolve("sta-fast"), config)
    before = config.read_text()
    result = CliRunner().invoke(app, [*words, "--method", f"./{config}"])
    assert result.exit_code == 2, result.output
    assert f"{config}, which is the config that --method names" in result.stderr
    assert config.read_text() == before
    config.unlink()
    config.mkdir()
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert f"{config}, which is a directory" in result.stderr
    assert files_in(tmp_path) == []


def test_bad_config_file(tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content, message in {"{": "not a JSON file", '{"method": "sta", "stpes": [0, 1]}': "steps"}.items():
        Path("my.json").write_text(content)
        words = ["generate", PROMPT, "--model", str(tiny_pipe_dir), "--method", "my.json"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2
        assert "my.json" in result.stderr
        assert message in result.stderr


@pytest.mark.parametrize(("words", "code"), [(["frobnicate"], 2), (["generate"], 2), (["generate", " "], 2)])
def test_bad_commands(words, code, tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if words == ["generate", " "]:
        words = [*words, "--model", str(tiny_pipe_dir)]
    assert CliRunner().invoke(app, words).exit_code == code


def test_exit_codes_of_the_program(tiny_pipe_dir, tmp_path, monkeypatch, capsys):
    """One of each code from the entry point: bad usage, a damaged model, and a model that makes no picture."""
    damaged = shutil.copytree(tiny_pipe_dir, tmp_path / "damaged")
    weights = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    broken = tiny_wan.tiny_pipeline()
    with torch.no_grad():
        broken.transformer.proj_out.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    (tmp_path / "run").mkdir()
    size = ["--height", 64, "--width", 64, "--frames", 5, "--steps", 1]
    for model, words, code, message in (
        (tiny_pipe_dir, ["--density", 7], 2, "density"),
        (damaged, [], 3, weights.name),
        (tmp_path / "broken", size, 1, "NaN"),
    ):
        command = ["generate", PROMPT, "--model", model, "--out", "c.mp4", *words]
        monkeypatch.chdir(tmp_path / "run")
        monkeypatch.setattr(sys, "argv", ["tilewise", *map(str, command)])
        with global_state.restored(), pytest.raises(SystemExit) as ended:
            main()
        stdout, stderr = capsys.readouterr()
        assert ended.value.code == code, stderr
        assert message in stderr
        assert "Traceback" not in stderr
        assert stdout == ""
        assert files_in(tmp_path / "run") == []


def test_a_pipeline_that_no_family_serves(tmp_path, monkeypatch):
    unet = UNet1DModel(sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock1D",),
                       up_block_types=("UpBlock1D",), mid_block_type="UNetMidBlock1D", extra_in_channels=0)  # fmt: skip
    DanceDiffusionPipeline(unet, IPNDMScheduler()).save_pretrained(tmp_path / "sound")
    monkeypatch.chdir(tmp_path)
    for words in (["generate", PROMPT, "--out", "c.mp4"], ["explain"]):
        result = CliRunner().invoke(app, [*words, "--model", "sound"])
        assert result.exit_code == 1
        assert "UNet1DModel" in result.stderr
    assert not Path("c.mp4").exists()


def test_without_ffmpeg(tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
    result = CliRunner().invoke(app, ["generate", PROMPT, "--model", str(tiny_pipe_dir)])
    assert result.exit_code == 3
    assert "there is no ffmpeg" in result.stderr


def test_debugging_shows_the_traceback(tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TILEWISE_DEBUG", "1")
    result = CliRunner().invoke(app, ["generate", PROMPT, "--model", "/nowhere"])
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert "ModelError" in result.stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143)])  # Ctrl-C: of a batch, in test_batch.py
def test_interrupted_while_denoising(tiny_pipe_dir, tmp_path, sent, code):
    (tmp_path / "clip.mp4").write_text("an older clip")
    command = [
        *COMMAND,
        "generate",
        PROMPT,
        "--model",
        str(tiny_pipe_dir),
        "--steps",
        "100000",
        "--out",
        "clip.mp4",
        "--force",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("denoise 0/"):
                break
        process.send_signal(sent)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    assert stdout == ""
    said = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[sent]
    assert stderr == f"tilewise: {said}; nothing was left half-written\n"
    assert files_in(tmp_path) == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_text() == "an older clip"


@pytest.mark.parametrize(
    ("module", "swallowed"),
    [
        ("typer", ""),
        ("torch", ""),
        ("torch", "except KeyboardInterrupt as e: raise ImportError('initialization failed') from e"),
    ],
)
def test_interrupted_while_importing(module, swallowed, tmp_path):
    """Ctrl-C while a library loads; extension modules turn it into an ImportError."""
    slow = "try:\n    print('importing', flush=True)\n    time.sleep(60)\n"
    (tmp_path / f"{module}.py").write_text(f"import time\n{slow}{swallowed or 'finally: pass'}\n")
    process = subprocess.Popen(
        [*COMMAND, "explain"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
