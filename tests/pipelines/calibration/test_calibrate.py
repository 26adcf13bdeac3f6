"""Calibration on a tiny pipeline: what is measured, what is made of it, and what a patch then does."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny_wan
import torch
from diffusers import UniPCMultistepScheduler

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.calibration.calibrate import calibrate
from tilewise.pipelines.calibration.profile import head_errors, profile_run
from tilewise.pipelines.calibration.records import RunProfile, Schedule
from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.calibrated import DIGITS, Calibrated
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.xattention import XAttention

BASE = Draft(tile=(1, 4, 4), min_tokens=0)
DENSITIES = (0.1, 0.4, 1.0)
SCHEDULE = Schedule(steps=5, first=1, count=2)
SIZE = {"height": 64, "width": 64, "frames": 9, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def pipe():
    return tiny_wan.tiny_pipeline()


@pytest.fixture(scope="module")
def settings(pipe):
    return resolve_settings(pipe, prompt="a red circle", steps=5, seed=3, method=Config(BASE), model="tiny", **SIZE)


@pytest.fixture(scope="module")
def run(pipe, settings) -> RunProfile:
    return profile_run(pipe, settings, BASE, DENSITIES, SCHEDULE)


def test_parts_of_a_schedule():
    assert (SCHEDULE.borders, SCHEDULE.lengths, SCHEDULE.middles) == ((1, 3, 5), (2, 2), (1, 3))
    assert Schedule(7, 2, 3).borders == (2, 3, 5, 7)
    with pytest.raises(ConfigError, match="4 sparse steps of 5 cannot be divided into 5 parts"):
        Schedule(5, 1, 5)


@pytest.mark.parametrize("kind", [Draft, XAttention])
def test_errors_of_heads_are_those_of_a_naive_mask(kind):
    generator = torch.Generator().manual_seed(0)
    base = kind(tile=(1, 4, 4), min_tokens=0, compensate=False)
    layout = base.layout(Grid(3, 8, 10))
    shape = 1, layout.grid.tokens, 4, 16
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    weight = torch.randn(4, 16, 24, generator=generator)  # a head's rows of the output projection
    found = head_errors(base, (0.3, 1.0), layout, (q, k, v), 0.5, weight @ weight.transpose(1, 2))
    plan = dataclasses.replace(base, density=0.3).plan_call(layout, q, k, v, 0.5, {}, 0).plan
    mask = plan.to_mask(4)
    scores = torch.einsum("bshd,bthd->bhst", q.double(), k.double()) * 0.5
    exact, sparse = (
        torch.einsum("bhst,bthd,hdc->hsc", s.softmax(-1), v.double(), weight.double())
        for s in (scores, scores.masked_fill(~mask, -torch.inf))
    )
    torch.testing.assert_close(found.errors[:, 0], (sparse - exact).square().sum((1, 2)), rtol=1e-3, atol=1e-3)
    assert found.errors[:, 1].tolist() == [0.0] * 4 and found.kept[:, 1].tolist() == [1.0] * 4
    torch.testing.assert_close(found.kept[:, 0], mask[0].double().mean((1, 2)), rtol=1e-6, atol=0)
    assert found.output == pytest.approx(float(exact.square().sum()), rel=1e-4)


def test_a_run_tells_of_each_part_and_layer_and_leaves_no_trace(pipe, run):
    assert not tilewise.is_patched(pipe)
    (found,) = run.denoisers
    assert set(found.errors) == {(part, layer) for part in range(2) for layer in range(2)}
    for errors in found.errors.values():
        assert errors.shape == (2, 3) and (errors[:, 2] == 0).all()
        assert (errors[:, 0] > errors[:, 1]).all() and (errors[:, 1] > 0).all()
    sigmas = [float(t) / 1000 for t in pipe.scheduler.timesteps]
    assert run.noise == pytest.approx(sigmas[: len(run.noise)]) and len(run.noise) == 1 + SCHEDULE.middles[-1]
    again = RunProfile.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again.noise == run.noise and again.denoisers[0].denoiser == found.denoiser
    assert all(torch.equal(again.denoisers[0].errors[where], errors) for where, errors in found.errors.items())


def planted(run: RunProfile) -> RunProfile:
    """The same run, where head 1 of layer 0 needs everything, and no other head anything."""
    (found,) = run.denoisers
    errors = {where: torch.zeros(2, 3, dtype=torch.float64) for where in found.errors}
    for part in range(2):
        errors[part, 0][1] = torch.tensor([5.0, 4.0, 0.0])
    return RunProfile(run.noise, [dataclasses.replace(found, errors=errors)])


def test_heads_get_what_they_need(pipe, settings, run):
    (low,) = {round(float(kept) / 320**2, 6) for found in run.denoisers[0].kept.values() for kept in found[:, 0]}
    share = (low * 6 + 1.0 * 2) / 8
    made = calibrate([planted(run)], BASE, SCHEDULE, budget=0.2 + 0.8 * share + 1e-6, densities=DENSITIES)
    method = made.config.method
    assert isinstance(method, Calibrated) and made.config.steps == (0.2, 1.0)
    assert method.tables[0].heads == (("02", "00"), ("02", "00"))
    assert (made.error, made.density) == (0.0, pytest.approx(0.2 + 0.8 * share, abs=2e-6)) and made.uniform > 0.01
    tilewise.patch(pipe, made.config)
    try:
        with tilewise.watch(pipe) as calls:
            run_of(pipe, settings)
    finally:
        tilewise.unpatch(pipe)
    sparse = [call for call in calls if call.kind == "sparse"]
    assert {call.step for call in sparse} == {1, 2, 3, 4}
    for call in sparse:
        by_head = call.plan.to_mask(2).float().mean((-1, -2)).flatten()
        low = by_head if call.block else by_head[:1]
        assert (low < 0.2).all() and (call.block or by_head[1] == 1)


@pytest.mark.parametrize(
    ("base", "size", "budget"),
    [
        (Draft(tile=(1, 4, 4), min_tokens=0, always=("self", "neighbours")), {}, 0.45),
        (Draft(tile=(1, 4, 4), min_tokens=0, always=("self", "first-frame")), {}, 0.6),
        (Draft(min_tokens=0), {"height": 48, "width": 48, "frames": 5}, 0.5),  # 12 blocks, of 4 to 16 tokens
    ],
)
def test_no_clip_keeps_more_than_the_budget(pipe, settings, base, size, budget):
    settings = dataclasses.replace(settings, method=Config(base), **size)
    found = profile_run(pipe, settings, base, DENSITIES, SCHEDULE)
    made = calibrate([found], base, SCHEDULE, budget=budget, densities=DENSITIES)
    more = {"height": settings.height, "width": settings.width, "num_frames": settings.frames}
    with tilewise.patched(pipe, made.config):
        run_of(pipe, settings, **more)
        kept = tilewise.summary(pipe).overall_density
    assert made.density <= budget and kept == pytest.approx(made.density, abs=0.01)
    assert kept > 0.85 * budget
    told = tilewise.explain(
        pipe, method=made.config, height=settings.height, width=settings.width, frames=settings.frames
    )
    assert 0.2 + 0.8 * told.density == pytest.approx(kept, abs=0.03)


@pytest.mark.parametrize("boundary", [0.55, 0.8, 0.87, 0.95, 0.2])
def test_two_denoisers_share_a_run(settings, boundary):
    """Wherever the border is: in the middle of a part, before or after the step that is measured, in the dense steps."""
    pipe = tiny_wan.tiny_pipeline(boundary_ratio=boundary)
    found = profile_run(pipe, settings, BASE, DENSITIES, SCHEDULE)
    made = calibrate([found], BASE, SCHEDULE, budget=0.5, densities=DENSITIES)
    with tilewise.patched(pipe, made.config):
        run_of(pipe, settings)
        told = tilewise.summary(pipe)
    assert told.overall_density == pytest.approx(made.density, abs=0.02) and made.density <= 0.5
    sigmas = [float(t) / 1000 for t in pipe.scheduler.timesteps]
    for number, profile in enumerate(found.denoisers):
        ran = [step for step, sigma in enumerate(sigmas) if (sigma < boundary) == bool(number)]
        assert profile.steps == ran[: len(profile.steps)]
        steps = [found.steps_of(number, part, SCHEDULE) for part in range(2)]
        assert steps == [sum(step in part for step in ran) for part in ((1, 2), (3, 4))]
        if sum(steps):  # it chose something for each part, whether it ran there or not
            levels = made.config.method.tables[number].heads
            assert profile.errors and any(set("".join(level)) != {"2"} for level in levels)


def run_of(pipe, settings, **more):
    return pipe(
        settings.prompt, guidance_scale=3.0, max_sequence_length=16, output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **{"num_inference_steps": 5, "height": 64, "width": 64, "num_frames": 9, **more},
    ).frames  # fmt: skip


@pytest.mark.parametrize("changed", ["steps", "size", "scheduler"])
def test_it_serves_other_runs(pipe, settings, run, changed):
    """Noise levels, not step numbers, say which densities a step has."""
    made = calibrate([run], BASE, SCHEDULE, budget=0.5, densities=DENSITIES)
    (table,), (border,) = made.config.method.tables, made.config.method.noise
    scheduler = pipe.scheduler
    more = {"steps": {"num_inference_steps": 8}, "size": {"height": 96, "num_frames": 13}, "scheduler": {}}[changed]
    if changed == "scheduler":
        pipe.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    tilewise.patch(pipe, made.config)
    try:
        with tilewise.watch(pipe) as calls:
            run_of(pipe, settings, **more)
        levels = [float(t) / 1000 for t in pipe.scheduler.timesteps]
    finally:
        tilewise.unpatch(pipe)
        pipe.scheduler = scheduler
    sparse = {(call.step, call.block): call for call in calls if call.kind == "sparse"}
    assert sparse
    for step in range(len(levels)):
        for layer in range(2):
            digits = table.heads[int(levels[step] >= border)][layer]
            wanted = [DENSITIES[DIGITS.index(digit)] for digit in digits]
            call = sparse.get((step, layer))
            if step < 0.2 * len(levels) or min(wanted) == 1:
                assert call is None
            else:
                found = call.plan.to_mask(2).float().mean((-1, -2)).flatten()
                torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=0.07)


def test_a_file_patches_and_another_model_is_refused(pipe, run, tmp_path, monkeypatch):
    made = calibrate([run], BASE, SCHEDULE, budget=0.5, densities=DENSITIES, made={"budget": 0.5})
    file = tmp_path / "calibration.json"
    tilewise.save_config(made.config, file)
    assert tilewise.load_config(file) == made.config and file.stat().st_size < 10_000
    before = {
        name: id(module.processor) for name, module in pipe.transformer.named_modules() if hasattr(module, "processor")
    }
    with tilewise.patched(pipe, str(file)):
        pass
    told = tilewise.explain(pipe, method=str(file), height=64, width=64, frames=9)
    assert told.rows[0].options["base"] == "draft" and 0.1 < told.rows[0].density < 1
    assert before == {n: id(m.processor) for n, m in pipe.transformer.named_modules() if hasattr(m, "processor")}
    half = tiny_wan.tiny_transformer().to(torch.bfloat16)
    tilewise.unpatch(tilewise.patch(half, str(file)))  # the same weights in another dtype
    for other, why in (
        (
            tiny_wan.tiny_transformer(num_layers=3),
            "3 attention layers have 2 heads, not 2 attention layers have 2 heads",
        ),
        (tiny_wan.tiny_transformer(seed=1), "its weights are others"),
    ):
        with pytest.raises(ConfigError, match=f"another model than WanTransformer3DModel.*{why}"):
            tilewise.patch(other, str(file))
        assert not tilewise.is_patched(other)


def test_what_cannot_be(pipe, settings, run):
    for budget, why in ((0.0, "in \\(0, 1\\]"), (1.5, "in \\(0, 1\\]"), (0.2, "stay dense"), (0.25, "is below 0.100")):
        with pytest.raises(ConfigError, match=why):
            calibrate([run], BASE, SCHEDULE, budget=budget, densities=DENSITIES)
    with pytest.raises(ConfigError, match="make its file with `tilewise calibrate`"):
        Calibrated()
    with pytest.raises(ConfigError, match="sta cannot have a density for each head"):
        Calibrated(base={"name": "sta"}, densities=(1.0,), tables=({},))
    told = calibrate([run], BASE, SCHEDULE, budget=0.5, densities=DENSITIES).config.to_dict()
    (table,) = told["method"]["tables"]
    for option, value, why in (
        ("tables", 5, "tables must be a list, one for each denoiser, got 5"),
        ("tables", "abc", "tables must be a list, one for each denoiser, got 'abc'"),
        ("tables", [5], "a table has the keys 'denoiser' and 'heads', got 5"),
        ("tables", [{**table, "heads": [["0", 1]]}], "the heads of a table are lists of text"),
        ("tables", [{**table, "heads": "00"}], "the heads of a table are lists of text"),
        ("tables", [{**table, "denoiser": 5}], "not the fingerprint of a denoiser"),
        ("noise", 5, r"noise must be rising numbers in \(0, 1\], got 5"),
        ("densities", "0.1", "densities must be rising numbers"),
        ("base", 5, "5 cannot have a density for each head"),
    ):
        with pytest.raises(ConfigError, match=why):
            Config.from_dict({**told, "method": {**told["method"], option: value}})
    with pytest.raises(ConfigError, match="head_density has 3 densities, but the layer has 2 heads"):
        tilewise.patch(pipe, Draft(head_density=(0.1, 0.2, 0.3)))
    with pytest.raises(ConfigError, match="nothing to calibrate"):
        profile_run(pipe, settings, Draft(), DENSITIES, SCHEDULE)  # too short for it
    assert not tilewise.is_patched(pipe)


def test_activations_that_are_not_finite(settings):
    broken = tiny_wan.tiny_pipeline()
    with torch.no_grad():
        broken.transformer.blocks[1].attn1.to_v.weight[0, 0] = torch.nan
    with pytest.raises(OutputError, match="attention of layer 0 is not finite in step 1"):
        profile_run(broken, settings, BASE, DENSITIES, SCHEDULE)
    assert not tilewise.is_patched(broken)
