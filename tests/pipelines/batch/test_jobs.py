"""From lines to jobs: who wins, what is refused, what a job is known by, and who makes it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_wan
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import tilewise
from tilewise.pipelines.batch import job as job_module
from tilewise.pipelines.batch.estimate import denoising_flop, estimate
from tilewise.pipelines.batch.input import InputError, Row, read_input
from tilewise.pipelines.batch.job import Job, slug
from tilewise.pipelines.batch.jobs import Tools, make_jobs, parse_seeds, parse_sweep
from tilewise.pipelines.batch.ranks import owned
from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.generation.resolve import explain_settings, resolve_settings
from tilewise.pipelines.loading.load import load_skeleton
from tilewise.pipelines.loading.revision import model_revision
from tilewise.pipelines.parallel.world import World, world_from_environment
from tilewise.ui.common.options import method_config


@pytest.fixture(scope="module")
def tools(tiny_pipe_dir):
    skeletons = {str(tiny_pipe_dir): load_skeleton(tiny_pipe_dir)}
    return Tools(
        config=method_config,
        skeleton=lambda model: skeletons.get(model) or load_skeleton(model),
        revision=lambda model: "folder:0",
        dtype=lambda name: "float32" if name == "auto" else name,
        device=torch.device("cpu"),
    )


def jobs_of(tools, tiny_pipe_dir, rows, sweep=(), seeds="0", **command):
    base = {"model": str(tiny_pipe_dir), "method": "sta-balanced"} | command
    numbered = [Row(line, {"prompt": "a red circle", **fields}) for line, fields in enumerate(rows, 1)]
    return make_jobs(
        Path("in.jsonl"), numbered, tools, command=base, sweep=parse_sweep(sweep), seeds=parse_seeds(seeds)
    )


def test_lines_times_sweep_times_seeds_in_that_order(tools, tiny_pipe_dir):
    plan = jobs_of(tools, tiny_pipe_dir, [{}, {"prompt": "two"}], ["method=dense,sta", "steps=2,3"], "4-5")
    found = [(j.lines, j.settings.method.method.name, j.settings.steps, j.settings.seed) for j in plan.jobs]
    assert found == [
        ((line,), name, steps, seed)
        for line in (1, 2)
        for name in ("dense", "sta")
        for steps in (2, 3)
        for seed in (4, 5)
    ]
    assert [job.index for job in plan.jobs] == list(range(16))
    assert len({job.key for job in plan.jobs}) == 16
    assert sorted(explained.jobs for explained in plan.explanations) == [4, 4, 4, 4]


def test_the_line_wins_over_the_sweep_and_the_sweep_over_the_command(tools, tiny_pipe_dir):
    rows = [{}, {"steps": 7}, {"seed": 9}]
    plan = jobs_of(tools, tiny_pipe_dir, rows, ["steps=2,3"], "0-1", steps=5, frames=5)
    found = [(j.lines[0], j.settings.steps, j.settings.seed) for j in plan.jobs]
    assert found == [(1, 2, 0), (1, 2, 1), (1, 3, 0), (1, 3, 1), (2, 7, 0), (2, 7, 1), (3, 2, 9), (3, 3, 9)]
    assert {job.settings.frames for job in plan.jobs} == {5}
    assert "2 of 10 jobs ask for the same" in plan.notes[0]


def test_window_and_density_replace_each_other(tools, tiny_pipe_dir):
    rows = [{}, {"window": "1,2,2"}, {"density": 0.9, "method": "sta"}]
    methods = [job.settings.method.method for job in jobs_of(tools, tiny_pipe_dir, rows, density=0.5).jobs]
    far = {"far": "tiles"}  # the preset's
    assert methods == [
        tilewise.STA(density=0.5, **far),
        tilewise.STA(window=(1, 2, 2), **far),
        tilewise.STA(density=0.9),
    ]
    swept = jobs_of(tools, tiny_pipe_dir, [{}], ["window=1,2,2;3,3,3"], density=0.5).jobs
    assert [job.settings.method.method.window for job in swept] == [(1, 2, 2), (3, 3, 3)]


def test_the_density_of_the_command_is_not_for_a_dense_line(tools, tiny_pipe_dir):
    plan = jobs_of(tools, tiny_pipe_dir, [{}], ["method=dense,sta", "density=0.3,0.6"])
    assert [j.settings.method.method.to_dict().get("density") for j in plan.jobs] == [None, 0.3, 0.6]
    assert any("not used where the method is dense" in note for note in plan.notes)
    with pytest.raises(InputError, match="line 1: method 'dense' has no option 'density'"):
        jobs_of(tools, tiny_pipe_dir, [{"method": "dense", "density": 0.3}])
    with pytest.raises(InputError, match="method 'dense' has no option 'density'"):
        jobs_of(tools, tiny_pipe_dir, [{}], method="dense", density=0.3)
    with pytest.raises(
        tilewise.ConfigError, match=r"--set recal=… is an option of none of the methods here: draft, sta"
    ):
        jobs_of(tools, tiny_pipe_dir, [{}], ["method=draft,sta", "set.recal=0.9"])


def test_options_of_any_method_are_columns_and_sweeps(tools, tiny_pipe_dir):
    rows = [
        {"method": "draft", "set.recall": 0.9, "blocks": "1:"},
        {"method": "draft", "density": 0.5, "set.select": "head", "steps_sparse": "0.5,1"},
        {"method": "neighborhood", "window": "3,5,5", "set.causal": True},
    ]
    first, second, third = (job.settings.method for job in jobs_of(tools, tiny_pipe_dir, rows).jobs)
    assert first == tilewise.Config(tilewise.Draft(recall=0.9), blocks="1:")
    assert second == tilewise.Config(tilewise.Draft(density=0.5, select="head"), steps=(0.5, 1.0))
    assert third.method == tilewise.Neighborhood(window=(3, 5, 5), causal=True)
    swept = jobs_of(tools, tiny_pipe_dir, [{}], ["set.recall=0.8,0.9", "blocks=1:;:"], method="draft", density=0.3).jobs
    assert [(job.settings.method.method.recall, job.settings.method.blocks) for job in swept] == [
        (0.8, "1:"), (0.8, ":"), (0.9, "1:"), (0.9, ":"),
    ]  # fmt: skip
    # a schedule that the command gives is not for dense lines
    plan = jobs_of(tools, tiny_pipe_dir, [{"method": "dense"}, {"method": "sta"}], blocks="1:")
    assert [job.settings.method.blocks for job in plan.jobs] == [":", "1:"]


def test_the_settings_of_a_clip_make_a_line(tools, tiny_pipe_dir):
    first = jobs_of(tools, tiny_pipe_dir, [{"method": "sta-fast", "steps": 3, "seed": 5, "negative": "no"}]).jobs[0]
    fields = {name: value for name, value in first.settings.to_dict().items() if name != "tilewise"}
    again = jobs_of(tools, tiny_pipe_dir, [json.loads(json.dumps(fields))]).jobs[0]
    assert again.settings == first.settings
    assert again.key == first.key


def test_what_the_model_refuses_is_told_by_line(tools, tiny_pipe_dir):
    rows = [{}, {"height": 60}, {"method": "stta"}, {"height": 60}, {"seed": -1}, {"dtype": "float32", "frames": 8}]
    with pytest.raises(InputError) as caught:
        jobs_of(tools, tiny_pipe_dir, rows)
    told = str(caught.value)
    assert "lines 2, 4: " in told
    for words in ("nearest is 64", "line 3: unknown", "Did you mean 'sta'", "line 5: seed must", "frames=8"):
        assert words in told
    with pytest.raises(ModelError, match=r"line 2: .*/nowhere"):
        jobs_of(tools, tiny_pipe_dir, [{}, {"model": "/nowhere"}])


def test_what_cannot_be_read_and_what_cannot_be_made_are_told_together(tools, tiny_pipe_dir, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x", "method": "stta"}\n{"prompt": \n{"prompt": "y", "height": 60}\n')
    rows, problems = read_input(path)
    with pytest.raises(InputError) as caught:
        make_jobs(path, rows, tools, command={"model": str(tiny_pipe_dir), "method": "sta"}, problems=problems)
    told = str(caught.value)
    for words in ("line 1: unknown method", "line 2: malformed JSON", "line 3: WanTransformer3DModel does not take"):
        assert words in told


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1-", "0,0", "0-5,3", f"{2**63}", "0-100000000", "1.5"])
def test_bad_seeds(text):
    with pytest.raises(tilewise.ConfigError, match="--seeds"):
        parse_seeds(text)


def test_seeds():
    assert parse_seeds("7") == [7]
    assert parse_seeds("0-3, 9") == [0, 1, 2, 3, 9]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method", "--sweep method needs values: --sweep method=VALUE,VALUE"),
        ("metod=sta", "Did you mean 'method'"),
        ("seed=1,2", "--seeds"),
        ("prompt=a,b", "prompt cannot be swept"),
        ("steps=2,x", "steps must be a whole number"),
        ("steps=2,2", "different values"),
        ("steps=", "different values"),
        ("out=a,b", "unknown field"),
    ],
)
def test_bad_sweeps(text, words):
    with pytest.raises(tilewise.ConfigError, match=words):
        parse_sweep([text])


def test_sweeping_a_field_twice():
    with pytest.raises(tilewise.ConfigError, match="given twice"):
        parse_sweep(["steps=1,2", "steps=3"])


def test_too_many(tools, tiny_pipe_dir):
    with pytest.raises(tilewise.ConfigError, match="at most 100,000"):
        jobs_of(tools, tiny_pipe_dir, [{}] * 3, seeds="0-50000")


# --- keys and names -----------------------------------------------------------------------------------------------


def test_the_key_is_of_what_is_made(tools, tiny_pipe_dir, monkeypatch):
    job = jobs_of(tools, tiny_pipe_dir, [{}]).jobs[0]
    same = [
        dataclasses.replace(job, index=5, lines=(9,), ids=("x",), flop=1.0),
        dataclasses.replace(job, settings=dataclasses.replace(job.settings, model="elsewhere")),
    ]
    assert {other.key for other in same} == {job.key}
    other = [
        dataclasses.replace(job, dtype="bfloat16"),
        dataclasses.replace(job, revision="folder:1"),
        *(
            dataclasses.replace(job, settings=dataclasses.replace(job.settings, **{name: value}))
            for name, value in {"seed": 1, "prompt": "b", "steps": 9, "method": tilewise.resolve("dense")}.items()
        ),
    ]
    keys = {job.key, *(one.key for one in other)}
    monkeypatch.setattr(job_module, "__version__", "9.9")
    keys.add(dataclasses.replace(job, index=1).key)
    assert len(keys) == len(other) + 2


def test_file_names(tools, tiny_pipe_dir):
    rows = [{}, {"id": "../../etc/passwd", "seed": 1}, {"id": "/abs", "seed": 2}, {"prompt": "円"}]
    rows += [{"prompt": "x" * 5000, "seed": 2**63 - 1}]
    jobs = jobs_of(tools, tiny_pipe_dir, rows).jobs
    assert [job.file.rsplit("-", 1)[0] for job in jobs] == [
        "00000-a-red-circle-0",
        "00001-etc-passwd-1",
        "00002-abs-2",
        "00003-円-0",
        f"00004-{'x' * 60}-{2**63 - 1}",
    ]
    for job in jobs:
        assert job.file.endswith(f"-{job.key[:8]}.mp4")
    assert slug("A  red_CIRCLE!") == "a-red-circle"


def test_lines_that_ask_for_the_same_are_one_job_with_all_their_names(tools, tiny_pipe_dir):
    plan = jobs_of(tools, tiny_pipe_dir, [{"id": "a"}, {"prompt": "other"}, {"id": "b"}, {}])
    assert [(job.index, job.lines, job.ids) for job in plan.jobs] == [(0, (1, 3, 4), ("a", "b")), (1, (2,), ())]


def test_the_revision_follows_the_weights(tiny_pipe_dir, tmp_path):
    folder = shutil.copytree(tiny_pipe_dir, tmp_path / "m")
    before = model_revision(tiny_pipe_dir)
    assert model_revision(folder) == before
    (folder / "README.md").write_text("no part of the model")
    assert model_revision(folder) == before
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "proj_out.bias": weights["proj_out.bias"] + 1e-3}, file)
    assert model_revision(folder) != before
    with pytest.raises(ModelError):
        model_revision(tmp_path / "absent")


def test_large_weight_files_are_sampled_in_every_tensor(tmp_path, monkeypatch):
    from tilewise.pipelines.loading import revision

    monkeypatch.setattr(revision, "WHOLE", 100)
    folder = tmp_path / "m"
    (folder / "part").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    tensors = {"a": torch.zeros(5000), "b": torch.zeros(3), "c": torch.zeros(20_000)}
    seen = set()
    for name in (None, "a", "b", "c"):
        changed = {key: value + (key == name) for key, value in tensors.items()}
        save_file(changed, folder / "part" / "w.safetensors")
        seen.add(revision.fingerprint(folder))
    (folder / "part" / "w.safetensors").write_bytes(b"\xff" * 500)  # damaged: still a fingerprint
    seen.add(revision.fingerprint(folder))
    assert len(seen) == 5


# --- cost and ownership -------------------------------------------------------------------------------------------


def test_the_operations_of_a_denoising(tiny_pipe_dir):
    """Against the same count done by hand for the tiny model: 320 tokens, 2 layers of 2 heads x 16, guidance on, 4 steps."""
    skeleton = load_skeleton(tiny_pipe_dir)
    parameters = sum(p.numel() for p in tiny_wan.tiny_transformer().parameters())
    dense = resolve_settings(skeleton, "x", method="dense")
    per_pass = 2 * parameters * 320 + 2 * 4 * 320**2 * 32
    assert denoising_flop(skeleton, dense, explain_settings(skeleton, dense)) == 2 * 4 * per_pass
    sparse = dataclasses.replace(
        dense, method=tilewise.resolve(tilewise.STA(window=(1, 1, 1)), blocks="1:"), guidance=1.0
    )
    explanation = explain_settings(skeleton, sparse)
    saved = explanation.sparse_steps * 4 * 320**2 * 32 * (1 - explanation.rows[0].work)
    assert denoising_flop(skeleton, sparse, explanation) == pytest.approx(4 * per_pass - saved)
    # Of 4 steps, taylor reuses one, in which attention layers with their projections do not run, or nothing does.
    skipped = sum(p.numel() for block in skeleton.transformer.blocks for p in block.attn1.parameters())
    for lite, left in ((False, 2 * (parameters - skipped) * 320), (True, 0)):
        cache = {"name": "taylor", "cache_interval": 2, "disable_cache_before_step": 2, "use_lite_mode": lite}
        cached = dataclasses.replace(dense, method=tilewise.resolve("dense", cache=cache))
        told = explain_settings(skeleton, cached)
        assert told.reused_steps == 1
        assert denoising_flop(skeleton, cached, told) == pytest.approx(2 * (3 * per_pass + left))
    # Methods that decide at each call: by the density that they were asked for, and by a recall as if dense.
    for options, cheaper in (({"density": 0.25}, True), ({"recall": 0.9}, False)):
        dynamic = dataclasses.replace(sparse, method=tilewise.Config(tilewise.Draft(min_tokens=0, **options)))
        guess = denoising_flop(skeleton, dynamic, explain_settings(skeleton, dynamic))
        assert (guess < 4 * per_pass) == cheaper


def job(index: int, flop: float) -> Job:
    return Job(index, (index,), (), None, "float32", "", flop)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_every_job_has_one_owner(size):
    jobs = [job(i, 1.0 + i % 3) for i in range(20)]
    shares = [owned(jobs, World(rank, size)) for rank in range(size)]
    assert sorted(j.index for share in shares for j in share) == list(range(20))
    loads = [sum(j.flop for j in share) for share in shares]
    assert max(loads) - min(loads) <= 3.0


def test_a_sweep_is_spread_evenly():
    """Alternating cheap and dear jobs: dealt out in turn, one process would get all the dear ones."""
    jobs = [job(i, 10.0 if i % 2 else 1.0) for i in range(12)]
    assert [sum(j.flop for j in owned(jobs, World(rank, 2))) for rank in (0, 1)] == [33.0, 33.0]


def test_the_world_comes_from_the_environment():
    assert world_from_environment({}) == World()
    assert world_from_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == World(3, 4, 1)
    assert world_from_environment({"RANK": "1", "WORLD_SIZE": "2"}) == World(1, 2, 1)
    for bad in ({"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"},
                {"RANK": "-1", "WORLD_SIZE": "2"}):  # fmt: skip
        with pytest.raises(tilewise.ConfigError, match="RANK"):
            world_from_environment(bad)


def test_each_process_gets_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert World(5, 8, 1).device("auto") == "cuda:1"
    assert World(5, 8, 1).device("cuda") == "cuda:1"
    assert World(5, 8, 1).device("cuda:3") == "cuda:3"
    assert World(5, 8, 1).device("cpu") == "cpu"
    assert World().device("auto") == "auto"


def test_the_estimate_follows_what_was_measured(tools, tiny_pipe_dir):
    jobs = jobs_of(tools, tiny_pipe_dir, [{}, {"steps": 8}]).jobs
    rough = estimate(jobs, [], torch.device("cpu"))
    assert rough.seconds > 0
    assert "rough" in rough.basis
    size = {"height": 64, "width": 64, "frames": 9}
    run = {"device_name": "cpu", "dtype": "float32", "seconds": {"total": 3.0}, "batch": {"flop": jobs[0].flop}}
    line = {"status": "done", "bytes": 64 * 64 * 9, **size, "run": run}
    found = estimate(jobs, [line, {"status": "failed"}], torch.device("cpu"))
    assert found.seconds == pytest.approx(3.0 * (1 + jobs[1].flop / jobs[0].flop))
    assert found.bytes == pytest.approx(2 * 64 * 64 * 9)
    assert "1 clip made here" in found.basis


def test_layers_with_grids_of_their_own_are_counted():
    """A UNet's attention works on a grid for each level: 32x32 and 16x16 places of 256x256 pixels here."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8, cross_attention_dim=32,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=(1, 2),
    )  # fmt: skip
    explanation = tilewise.explain(unet, height=256, width=256, frames=1, num_inference_steps=3, method="dense")
    assert [row.tokens for row in explanation.rows] == [32 * 32, 16 * 16]
    attention = 3 * 4 * 1024**2 * 32 + 4 * 4 * 256**2 * 64  # one layer down, two up; the same and one in the middle
    linear = 2 * sum(p.numel() for p in unet.parameters()) * 1024
    unguided: Any = SimpleNamespace(guidance=1.0, method=tilewise.resolve("dense"))
    assert denoising_flop(unet, unguided, explanation) == 3 * (linear + attention)
