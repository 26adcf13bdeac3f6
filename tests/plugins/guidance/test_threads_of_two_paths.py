"""Threads that run one denoiser with two paths at the same time: each gets what it gets alone."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import test_hunyuan_video
import test_sd3
import tiny_wan
import torch
from threads import Turns

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.guidance.dual_path import two_paths
from tilewise.plugins.guidance.rope_scaling import scaled_rope
from tilewise.plugins.methods.inward import Inward

METHOD = Inward(native=(4, 4), temperature=False)
SIZES = ((5, 16, 12), (3, 12, 20))


def loop(model, text, number, steps=4):
    """A denoising loop over latents of a size of its own."""
    x = torch.randn(1, 4, *SIZES[number], generator=torch.Generator().manual_seed(number))
    for timestep in torch.linspace(900, 100, steps + number):
        x = x - 0.1 * model(x, timestep[None], text).sample
    return x


@pytest.mark.parametrize(
    "options",
    [
        {"refresh": 2},
        {"refresh": 3, "cache_bytes": 30_000},
        {"refresh": 1},
        {"guided": "cond"},
        {"global_path": "pooled"},
    ],
    ids=str,
)
def test_two_loops_with_one_text(options):
    """The text is the same tensor in both: a server keeps its embedding."""
    model = tiny_wan.tiny_transformer()
    tilewise.patch(model, METHOD, steps=(0.1, 1))
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=torch.Generator().manual_seed(5))
    alone, counts = [], []
    with torch.no_grad(), scaled_rope(model, Grid(3, 4, 4), spatial="ntk"):
        for number in range(2):
            with two_paths(model, **options) as on:
                alone.append(loop(model, text, number))
                counts.append(vars(on["denoiser"].counts))
        turns = Turns()
        with two_paths(model, **options) as on, turns.at_every_module(model):
            together = turns.run(lambda: loop(model, text, 0), lambda: loop(model, text, 1))
            assert vars(on["denoiser"].counts) == {name: sum(c[name] for c in counts) for name in counts[0]}
    assert turns.switches > 100
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got, want)


def test_two_requests_of_a_pipeline(tiny_pipe):
    tilewise.patch(tiny_pipe, METHOD, steps=(0.1, 1))
    sizes = ({"height": 64, "width": 48, "num_frames": 9}, {"height": 48, "width": 80, "num_frames": 5})

    def request(number):
        own = type(tiny_pipe)(**{**tiny_pipe.components, "scheduler": copy.deepcopy(tiny_pipe.scheduler)})
        own.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(number)
        options = {"num_inference_steps": 4 + number, "max_sequence_length": 16, "output_type": "latent"}
        return own("a red circle", "blurry", generator=generator, **options, **sizes[number]).frames

    alone = []
    for number in range(2):
        with two_paths(tiny_pipe, refresh=2):
            alone.append(request(number))
    turns = Turns()
    with two_paths(tiny_pipe, refresh=2), turns.at_every_module(tiny_pipe.transformer):
        together = turns.run(lambda: request(0), lambda: request(1))
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("name", ["hunyuan video", "sd 3"])
def test_two_loops_where_text_is_in_the_sequence(name):
    if name == "sd 3":
        model, given = test_sd3.tiny(), test_sd3.inputs(8, 10)
    else:  # a mask hides another part of each prompt
        model, given = test_hunyuan_video.tiny(), test_hunyuan_video.inputs(None, (2, 10, 14), (9, 4))
    inputs = given, {**given, "hidden_states": given["hidden_states"].flip(1)}

    def run(number):
        outs = []
        for time in (1.0, 0.7, 0.4)[: 2 + number]:
            now = {**inputs[number], "timestep": inputs[number]["timestep"] * time}
            outs.append(model(**now, return_dict=False)[0])
        return torch.stack(outs)

    tilewise.patch(model, METHOD, steps=(0, 1))
    alone = []
    with torch.no_grad():
        for number in range(2):
            with two_paths(model, refresh=2):
                alone.append(run(number))
    turns = Turns()
    with two_paths(model, refresh=2), turns.at_every_module(model):
        together = turns.run(lambda: run(0), lambda: run(1))
    assert all(map(torch.equal, together, alone))


def test_a_thread_that_ended_leaves_nothing_in_the_cache():
    model = tiny_wan.tiny_transformer()
    tilewise.patch(model, METHOD, steps=(0, 1))
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM)
    with torch.no_grad(), two_paths(model, refresh=2) as on:
        cache = on["denoiser"].cache
        loop(model, text, 0)
        kept = cache.on_device
        for _ in range(3):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(torch.no_grad()(loop), model, text, 0).result()
        gc.collect()
        loop(model, text, 0)
        assert cache.on_device == kept > 0


def test_a_run_that_begins_later_in_the_schedule_reuses_nothing_of_another(tiny_pipe):
    """The same text, and a run that was cancelled before: its global path saw another clip."""
    tilewise.patch(tiny_pipe, METHOD, steps=(0, 1))
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM)
    model, x = tiny_pipe.transformer, torch.randn(2, 1, 4, 3, 16, 12)

    def step(latents, number):
        return model(latents, tiny_pipe.scheduler.timesteps[number][None], text).sample

    with torch.no_grad():
        with two_paths(tiny_pipe, refresh=2):
            tiny_pipe.scheduler.set_timesteps(4)
            alone = step(x[1], 2)
        with two_paths(tiny_pipe, refresh=2):
            tiny_pipe.scheduler.set_timesteps(4)
            step(x[0], 1)
            tiny_pipe.scheduler.set_timesteps(4)
            assert torch.equal(step(x[1], 2), alone)
