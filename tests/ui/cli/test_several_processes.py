"""`tilewise generate` by several processes: the clip of one, and what goes wrong in one of them ends all."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import forked_commands
import pytest
import tiny_wan
from typer.testing import CliRunner

from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.media.video import read_settings
from tilewise.pipelines.memory.options import MemoryOptions
from tilewise.pipelines.parallel.ranks import OtherRankError, Ranks, joined
from tilewise.pipelines.parallel.world import World
from tilewise.plugins.config import resolve
from tilewise.plugins.errors import ConfigError
from tilewise.ui.cli.app import app
from tilewise.ui.cli.parallel import check_parallel, refuse_parallel
from tilewise.ui.cli.request import Request

SMALL = ["--steps", "2", "--frames", "5", "--height", "64", "--width", "64"]
CLIP = ["generate", "a red circle moving right", *SMALL, "--method", "draft", "--set", "min_tokens=0"]
WRITTEN = sorted(f"{name}.{ending}" for name in ("one", "two", "cfg") for ending in ("json", "mp4"))
TWO = World(0, 2)
ENDED = [("SIGKILL", 1), ("SIGINT", 0)]  # signal, and the process that gets it


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def found(folder) -> dict[str, Any]:
    def to(name: str) -> list[str]:
        return ["--out", str(folder / name)]

    runs = [
        {"name": "one", "commands": [[*CLIP, *to("one.mp4")]]},
        {"name": "two", "commands": [[*CLIP, *to("two.mp4")]] * 2},
        {"name": "other seed", "commands": [[*CLIP, "--seed", str(rank), *to("seeds.mp4")] for rank in (0, 1)]},
        {"name": "cfg", "commands": [[*CLIP, "--parallel", "cfg", *to("cfg.mp4")]] * 2},
        {"name": "one of them fails", "commands": [[*CLIP, *to("failed.mp4")]] * 2, "fails": 1},
        *(
            {"name": f"{by} in {rank}", "commands": [[*CLIP, *to("ended.mp4")]] * 2, "fails": rank, "by": by}
            for by, rank in ENDED
        ),
    ]
    return forked_commands.run_commands(runs)


def test_two_processes_make_the_clip_of_one(found, folder):
    assert found["one"]["codes"] == [0], found["one"]["output"]
    assert found["two"]["codes"] == [0, 0], found["two"]["output"]
    one, two = (read_settings(folder / f"{name}.mp4") for name in ("one", "two"))
    assert one is not None and two is not None
    assert one["run"]["frames_sha256"] == two["run"]["frames_sha256"]
    assert (one["run"]["gpus"], two["run"]["gpus"]) == (1, 2)


def test_the_first_process_alone_talks(found):
    first, second = found["two"]["output"]
    assert "context parallelism, transformer: rank 0 of 2, heads 0-1 of 4" in first
    assert "attention of the slowest process:" in first and "transformer heads 2-3 of 4" in first
    assert "denoise 2/2" in first and "wrote" in first
    assert second == ""


def test_two_processes_with_a_branch_of_guidance_each_make_the_clip_of_one(found, folder):
    assert found["cfg"]["codes"] == [0, 0], found["cfg"]["output"]
    one, cfg = (read_settings(folder / f"{name}.mp4") for name in ("one", "cfg"))
    assert one is not None and cfg is not None
    assert one["run"]["frames_sha256"] == cfg["run"]["frames_sha256"]
    assert (cfg["run"]["gpus"], cfg["run"]["parallel"]) == (2, "cfg")
    first, second = found["cfg"]["output"]
    assert "CFG parallelism, transformer: rank 0 of 2, the first forward of each step" in first
    assert "transformer the second forward" in first and second == ""


def test_processes_with_other_arguments_end_before_weights_are_read(found):
    run = found["other seed"]
    assert run["codes"] == [2, 1]
    assert "the processes that make one clip differ in seed (process 0: 0; process 1: 1)" in run["output"][0]
    assert "denoise" not in run["output"][0]


def test_a_process_that_fails_ends_the_others_and_leaves_nothing(found, folder):
    run = found["one of them fails"]
    assert run["codes"][1] == 1 and run["codes"][0] != 0
    assert "tilewise, process 1: RuntimeError: this GPU fell off the bus" in run["output"][1]
    assert run["seconds_after_failure"] < 30
    assert sorted(path.name for path in folder.iterdir()) == WRITTEN


@pytest.mark.parametrize(("by", "rank"), ENDED)
def test_a_process_that_is_ended_ends_the_others_and_leaves_nothing(found, folder, by, rank):
    run = found[f"{by} in {rank}"]
    assert run["codes"][rank] == (130 if by == "SIGINT" else -signal.SIGKILL), run["output"]
    assert run["codes"][1 - rank] not in (0, None)
    assert run["seconds_after_failure"] < 30
    said = {"SIGINT": "interrupted; nothing was left half-written", "SIGKILL": "another of the 2 processes ended"}
    # Or the launcher ended it first: within an exchange, or just after one failed.
    assert said[by] in run["output"][0] or run["codes"][0] in (-signal.SIGTERM, 143)
    # A signal that comes while an object is deleted leaves Python's own words.
    other = re.sub(r"Exception ignored in.*?SystemExit: \d+\n?", "", run["output"][1], flags=re.DOTALL)
    assert "wrote" not in run["output"][0] and other == ""
    assert sorted(path.name for path in folder.iterdir()) == WRITTEN


@pytest.mark.parametrize(
    ("changes", "memory", "request_", "expected"),
    [
        ({}, {"offload": "model"}, {}, "--offload cannot be used with 2 processes"),
        ({}, {"retry_oom": True}, {}, "--retry-oom cannot be used with 2 processes"),
        ({}, {}, {"compare": "dense"}, "--compare cannot be used with 2 processes"),
        (
            {"method": resolve("sta", cache="mag:calibrate=true")},
            {},
            {},
            "--cache cannot be used with 2 processes: transformer is a",
        ),
        ({}, {}, {"parallel": "cfg"}, "--parallel cfg: guidance 1 is off"),
        ({}, {}, {"parallel": "both"}, "unknown value of parallel 'both'. Valid: cfg, context"),
    ],
)
def test_what_several_processes_cannot_do(changes, memory, request_, expected):
    settings = GenerateSettings("a cat", "", "demo", changes.get("method", resolve("sta")), 64, 64, 9, 2, 1.0, 0, 8)
    request = Request("a cat", {}, **request_)
    with pytest.raises(ConfigError, match=expected):
        check_parallel(tiny_wan.tiny_pipeline(), settings, request, MemoryOptions(**memory), Ranks(TWO))


def test_guidance_is_divided_where_there_is_some():
    pipe, memory = tiny_wan.tiny_pipeline(), MemoryOptions()
    request = Request("a cat", {}, parallel="cfg")
    guided = GenerateSettings("a cat", "", "demo", resolve("sta", cache="mag:calibrate=true"), 64, 64, 9, 2, 3.0, 0, 8)
    check_parallel(pipe, guided, request, memory, Ranks(TWO))
    with pytest.raises(ConfigError, match="--cache cannot be used with 4 processes"):
        check_parallel(pipe, guided, request, memory, Ranks(World(0, 4)))
    with pytest.raises(ConfigError, match="an even number of processes"):
        check_parallel(pipe, guided, request, memory, Ranks(World(0, 3)))
    with pytest.raises(ConfigError, match="there is one: start it with torchrun"):
        check_parallel(pipe, guided, request, memory, Ranks(World()))
    pipe.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ConfigError, match="the model takes guidance as an input"):
        check_parallel(pipe, guided, request, memory, Ranks(TWO))


@pytest.mark.parametrize("option", ["stream", "highres"])
def test_streams_and_two_stages_are_made_by_one(option):
    with pytest.raises(ConfigError, match=f"--{option} is made by one process"):
        refuse_parallel(Request("a cat", {option: True}), Ranks(TWO))
    refuse_parallel(Request("a cat", {option: True}), Ranks(World()))


def test_without_a_launcher(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2 -m tilewise"), joined(TWO, "auto"):
        pass
    with pytest.raises(ConfigError, match="names one GPU"), joined(TWO, "cuda:1"):
        pass


class Told(Ranks):
    """Process ``rank`` of two, of which the other gives ``other``."""

    def __init__(self, rank: int, other: Any) -> None:
        super().__init__(World(rank, 2))
        self.other = other

    def all(self, value: Any) -> list[Any]:
        return [value, self.other] if self.first else [self.other, value]


def test_what_one_process_finds_ends_the_other_too():
    def fail() -> None:
        raise ConfigError("no such size")

    assert Told(0, False).together(lambda: 5) == 5
    with pytest.raises(ConfigError, match="no such size"):
        Told(0, True).together(fail)
    with pytest.raises(OtherRankError):  # the first says it
        Told(1, True).together(fail)
    with pytest.raises(OtherRankError, match="process 1 of 2 failed"):
        Told(0, True).together(lambda: 5)
    with pytest.raises(ConfigError, match="differ in torch"):
        Told(0, {"torch": "2.12"}).agree({"torch": "2.13"})


@pytest.mark.parametrize(
    "arguments", [["rank-heads"], ["verify", "--prompts", "x.txt"], ["calibrate", "--prompts", "x.txt"]]
)
def test_other_commands_are_for_one_process(arguments, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert f"`tilewise {arguments[0]}` is for one process" in " ".join(done.output.replace("│", " ").split())
    assert CliRunner().invoke(app, ["presets"]).exit_code == 0
