"""Where in the schedule a forward is: with every scheduler of diffusers, by whichever pipeline runs the denoiser.

``explain`` must say what then runs, each forward must be counted at its place, and a run must leave nothing in memory.
"""

import functools
import gc
import inspect
import threading
import weakref
from typing import Any

import diffusers
import pytest
import test_cogvideox
import test_flux
import test_hunyuan_video
import test_ltx
import test_unet
import tiny_wan
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PiflowScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.runtime import step_index
from tilewise.plugins.runtime.call_stats import DENSE_STEP, SPARSE

SMALL = tilewise.STA(window=(1, 1, 1), tile=(1, 2, 2))
KEEPS = Draft(density=0.5, tile=(1, 2, 2), min_tokens=0, refresh=3, drift=None)
SIZE = {"height": 16, "width": 16, "num_frames": 1}

# Schedulers that no loop over ``scheduler.timesteps`` with a continuous sample drives, and why.
NOT_HERE = {
    "AmusedScheduler": "denoises tokens of a codebook",
    "BlockRefinementScheduler": "denoises tokens of text",
    "DiscreteDDIMScheduler": "denoises tokens of text",
    "EntropyBoundScheduler": "denoises tokens of text",
    "VQDiffusionScheduler": "denoises tokens of a codebook",
    "CosineDPMSolverMultistepScheduler": "needs torchsde",
    "DPMSolverSDEScheduler": "needs torchsde",
    "ConsistencyDecoderScheduler": "two fixed steps, of a decoder",
    "HeliosScheduler": "a schedule for each stage of its own pyramid pipeline",
    "HeliosDMDScheduler": "a schedule for each stage of its own pyramid pipeline",
    "KarrasVeScheduler": "deprecated; steps from one noise level to another, without timesteps",
    "ScoreSdeVpScheduler": "deprecated; its set_timesteps and steps are those of score models alone",
    "ScoreSdeVeScheduler": "its loop corrects at each step with further forwards of a score model",
    "DDPMWuerstchenScheduler": "its pipelines leave out the last timestep; they have no denoiser that is served",
    "SCMScheduler": "its pipelines leave out the last timestep; they have no denoiser that is served",
    "RFD4ProteinaScheduler": "denoises the atoms of proteins",
}  # fmt: skip


def shipped() -> list[str]:
    """Every scheduler of diffusers that can be asked for a number of steps."""
    found = []
    for name in dir(diffusers.schedulers):
        kind = getattr(diffusers.schedulers, name)
        if inspect.isclass(kind) and name.endswith("Scheduler") and name not in NOT_HERE:
            assert issubclass(kind, SchedulerMixin), f"{name}: an optional package is missing; say so in NOT_HERE"
            if "num_inference_steps" in inspect.signature(kind.set_timesteps).parameters:
                found.append(name)
    return found


SCHEDULERS = shipped()


def scheduler_of(name: str) -> Any:
    kind = getattr(diffusers, name)
    return kind(**{"PNDMScheduler": {"skip_prk_steps": True}, "PiflowScheduler": {"n_grid": 2}}.get(name, {}))


def test_every_scheduler_is_in_the_tests_or_in_the_list_of_those_that_are_not():
    assert {"DDIMScheduler", "PNDMScheduler", "CogVideoXDPMScheduler", "KDPM2DiscreteScheduler"} <= set(SCHEDULERS)
    assert set(NOT_HERE) <= set(dir(diffusers.schedulers)), "no longer shipped"
    assert len(SCHEDULERS) >= 35


class Loop(DiffusionPipeline):
    """The loop of diffusers' pipelines, without text and pictures.

    copies: gives the denoiser timesteps in memory of their own.
    """

    def __init__(self, transformer: WanTransformer3DModel, scheduler: SchedulerMixin, copies: bool = False):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(copies=copies)
        self.set_progress_bar_config(disable=True)

    def get_timesteps(self, num_inference_steps, strength, device):
        start = num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)
        return self.scheduler.timesteps[start * getattr(self.scheduler, "order", 1) :], num_inference_steps - start

    @torch.no_grad()
    def __call__(self, steps=6, strength=1.0, stop_after=None, guided=True, end=1.0):
        """end: the share of the timesteps after which denoising is left to another pipeline (SDXL's denoising_end)."""
        self.scheduler.set_timesteps(steps)
        timesteps, _ = self.get_timesteps(steps, strength, None)
        if end < 1:
            timesteps = timesteps[: int(end * len(timesteps))]
        self._num_timesteps = len(timesteps)
        x, old = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0)), None
        text = torch.zeros(1, 1, tiny_wan.TEXT_DIM)
        for i, t in enumerate(timesteps):
            if i == stop_after:
                raise KeyboardInterrupt
            given = self._given(t)
            scale = getattr(self.scheduler, "scale_model_input", lambda x, t: x)
            for branch in range(1 + guided):
                out = self.transformer(scale(x, t), given, text + branch, return_dict=False)[0]
            x, old = self._step(out, i, t, timesteps, x, old)
        return x

    def _given(self, t):
        return torch.tensor([float(t)]) if self.config.copies else t.expand(1)

    def _step(self, out, i, t, timesteps, x, old):
        if isinstance(self.scheduler, PiflowScheduler):  # takes a prediction for each node of its grid
            out = torch.cat([out] * self.scheduler.n_grid, -1)
        known = {
            "model_output": out, "timestep": t, "sample": x, "return_dict": False, "old_pred_original_sample": old,
            "timestep_back": timesteps[i - 1] if i else None, "original_image": x, "mask": torch.ones_like(x),
        }  # fmt: skip
        names = inspect.signature(self.scheduler.step).parameters
        made = self.scheduler.step(**{name: value for name, value in known.items() if name in names})
        x = made[0] if isinstance(made, tuple) else made.prev_sample
        both = "old_pred_original_sample" in names
        return torch.nan_to_num(x, posinf=0, neginf=0).float().clamp(-9, 9), made[1] if both else None


@functools.cache
def _model() -> Any:
    return tiny_wan.tiny_transformer(num_layers=1, ffn_dim=16)


@pytest.fixture
def model():
    yield tilewise.unpatch(_model())
    tilewise.unpatch(_model())


class Operators(TorchDispatchMode):
    """Counts PyTorch operators: reading a number from a device is one."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class Places(list):
    """(step, total) of each forward. operators: how many ran to find it; without one, nothing waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.operators = []


@pytest.fixture
def places(monkeypatch):
    seen, of, tolist = Places(), step_index.StepIndex.of, torch.Tensor.tolist

    def watched(self, timestep):
        with Operators() as mode, pytest.MonkeyPatch.context() as patch:

            def listed(tensor):  # on a CPU it is no operator
                mode.count += 1
                return tolist(tensor)

            patch.setattr(torch.Tensor, "tolist", listed)
            at = of(self, timestep)
        seen.append(at[:2])
        seen.operators.append(mode.count)
        return at

    monkeypatch.setattr(step_index.StepIndex, "of", watched)
    return seen


def counts(pipe):
    found = {DENSE_STEP: 0, SPARSE: 0}
    for row in tilewise.summary(pipe).rows:
        found[row.kind] += row.calls
    return found[SPARSE], found[DENSE_STEP]


def runs_as_explained(pipe, places, steps=6, strength=1.0, layers=1):
    """Run a loop, and compare what ran with what ``explain`` says and with where the forwards were."""
    told = tilewise.explain(
        pipe, **SIZE, num_inference_steps=steps, **({} if strength == 1 else {"strength": strength})
    )
    sparse, dense = counts(pipe)
    places.clear()
    pipe(steps, strength)
    total = len(pipe.scheduler.timesteps)
    first = total - told.sparse_steps - told.dense_steps
    if not pipe.config.copies or hasattr(pipe.scheduler, "step_index"):
        assert not any(places.operators)
    assert first == (0 if strength == 1 else total - len(pipe.get_timesteps(steps, strength, None)[0]))
    assert places == [(step, total) for step in range(first, total) for _ in range(2)]
    now = counts(pipe)
    assert (now[0] - sparse, now[1] - dense) == (2 * layers * told.sparse_steps, 2 * layers * told.dense_steps)
    if strength == 1:
        assert told.dense_steps == -(-total // 4)
    return told


def plain(model, make, places):
    pipe = tilewise.patch(Loop(model, make()), SMALL)
    for _ in range(2):  # a second run begins anew
        runs_as_explained(pipe, places)


def cancelled(model, make, places):
    """The patched pipeline stopped at step 4; another one has the same denoiser and a scheduler of its own."""
    first, second = tilewise.patch(Loop(model, make()), SMALL), Loop(model, make())
    with pytest.raises(KeyboardInterrupt):
        first(stop_after=4)
    runs_as_explained(second, places)
    runs_as_explained(first, places)


def from_pipe(model, make, places):
    first = tilewise.patch(Loop(model, make()), SMALL)
    second = Loop.from_pipe(first)
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    runs_as_explained(second, places)


def shared(model, make, places):
    """One scheduler: the pipeline that was patched ran 4 steps, another is asked for more, then for fewer."""
    scheduler = make()
    first, second = tilewise.patch(Loop(model, scheduler), SMALL), Loop(model, scheduler)
    runs_as_explained(first, places, 4)
    runs_as_explained(second, places, 7)
    runs_as_explained(first, places, 5)


def part_way(model, make, places):
    first = tilewise.patch(Loop(model, make()), SMALL)
    runs_as_explained(first, places, 8, strength=0.5)
    runs_as_explained(Loop(model, make()), places, 8, strength=0.4)


def replaced(model, make, places):
    """Another scheduler is put on the pipeline after the patch."""
    pipe = tilewise.patch(Loop(model, FlowMatchEulerDiscreteScheduler()), SMALL)
    with pytest.raises(KeyboardInterrupt):
        pipe(stop_after=2)
    pipe.scheduler = make()
    runs_as_explained(pipe, places)


# One scheduler of each kind: those that count their own steps and those that do not, of one order and of two, with timesteps that
# are equal, and of flow matching.
KINDS = ("DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "CogVideoXDPMScheduler",
         "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")  # fmt: skip
CASES = [(name, way) for way in (plain, part_way) for name in SCHEDULERS]
CASES += [(name, way) for way in (cancelled, from_pipe, shared, replaced) for name in KINDS]


@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda case: getattr(case, "__name__", case))
@pytest.mark.slow
def test_explain_says_what_runs(model, places, name, way):
    way(model, functools.partial(scheduler_of, name), places)


# A timestep that is a copy leaves the scheduler's own count, and the timestep's value where there is none. Of equal timesteps the
# value cannot tell which one it is.
REPEATED = ("PNDMScheduler",)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in REPEATED])
@pytest.mark.slow
def test_timesteps_that_are_copied(model, places, name):
    pipe = tilewise.patch(Loop(model, scheduler_of(name), copies=True), SMALL)
    other = Loop(model, scheduler_of(name), copies=True)
    with pytest.raises(KeyboardInterrupt):
        pipe(stop_after=4)
    runs_as_explained(other, places)
    runs_as_explained(pipe, places, 8, strength=0.5)


@pytest.mark.parametrize(("name", "guided"), [*((n, True) for n in SCHEDULERS), *((n, False) for n in KINDS)])
@pytest.mark.slow
def test_nothing_is_kept_after_a_run(model, name, guided):
    pipe = tilewise.patch(Loop(model, scheduler_of(name)), KEEPS, steps=(0, 1), strict=True)
    memories, most = model._tilewise.state.memories, []
    handle = model.register_forward_hook(lambda *args: most.append(len(memories)))
    try:
        for steps, strength in (
            (5, 1.0),
            (6, 0.5),
            (2 if name in ("MiniMaxH3Scheduler", "UnCLIPScheduler") else 1, 1.0),
        ):
            pipe(steps, strength, guided=guided)
            assert len(memories) == 0
    finally:
        handle.remove()
    assert max(most) == 1 + guided


def test_nothing_is_kept_where_denoising_ends_early(model):
    pipe = tilewise.patch(Loop(model, DDIMScheduler()), KEEPS, steps=(0, 1), strict=True)
    pipe(8, end=0.75)
    assert len(model._tilewise.state.memories) == 0


def test_a_denoiser_that_has_had_its_part_keeps_nothing():
    """Wan 2.2's two denoisers share one run."""
    pipe = tiny_wan.tiny_pipeline(boundary_ratio=0.9, num_layers=1)
    tilewise.patch(pipe, KEEPS, steps=(0, 1), strict=True)
    first, second = (m._tilewise.state.memories for m in (pipe.transformer, pipe.transformer_2))
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((len(first), len(second)))
        return tensors

    wan(pipe, 6, callback_on_step_end=look)
    assert seen[:3] == [(2, 0), (2, 0), (2, 2)]
    assert set(seen[3:-1]) == {(0, 2)}
    assert (len(first), len(second)) == (0, 0)
    pipe.register_to_config(boundary_ratio=0.4)  # the second has the last step alone
    seen.clear()
    wan(pipe, 6, callback_on_step_end=look)
    assert seen == [(2, 0)] * 5 + [(0, 0)]


# ── diffusers' own pipelines ─────────────────────────────────────────────────────────────────────────────────────


def wan(pipe, steps=4, **options):
    embeds = torch.zeros(1, 16, tiny_wan.TEXT_DIM)
    size = {"height": 32, "width": 32} | ({} if "latents" in options else {"num_frames": 5})
    return pipe(
        prompt_embeds=embeds, negative_prompt_embeds=embeds, num_inference_steps=steps, guidance_scale=3.0,
        output_type="latent", **size, **options,
    )  # fmt: skip


def wan_unipc():
    pipe = tiny_wan.tiny_pipeline()
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return pipe


def flux(pipe, steps):
    embeds = torch.zeros(1, test_flux.TEXT, test_flux.TEXT_DIM)
    pipe(
        prompt_embeds=embeds, pooled_prompt_embeds=torch.zeros(1, 8), height=36, width=44, num_inference_steps=steps,
        output_type="latent",
    )  # fmt: skip


def ltx(pipe, steps):
    embeds, mask = torch.zeros(1, test_ltx.TEXT, 16), torch.ones(1, test_ltx.TEXT)
    pipe(
        prompt_embeds=embeds, prompt_attention_mask=mask, negative_prompt_embeds=embeds, height=32, width=32,
        negative_prompt_attention_mask=mask, num_frames=9, num_inference_steps=steps, output_type="latent",
    )  # fmt: skip


def cogvideox(pipe, steps):
    embeds = torch.zeros(1, test_cogvideox.TEXT, 16)
    pipe(
        prompt_embeds=embeds, negative_prompt_embeds=embeds, height=80, width=112, num_frames=13,
        num_inference_steps=steps, output_type="latent",
    )  # fmt: skip


PIPELINES = {
    "Wan": (tiny_wan.tiny_pipeline, wan),
    "Wan, UniPC": (wan_unipc, wan),
    "Wan 2.2, a timestep per token": (lambda: tiny_wan.tiny_pipeline(expand_timesteps=True), wan),
    "Flux": (test_flux.pipeline, flux),
    "LTX": (lambda: test_ltx.pipeline(diffusers.LTXPipeline), ltx),
    "CogVideoX": (test_cogvideox.pipeline, cogvideox),
    "HunyuanVideo": (
        test_hunyuan_video.pipeline,
        lambda pipe, steps: test_hunyuan_video.generate(pipe, output_type="latent"),
    ),
}


@pytest.mark.parametrize(("make", "run"), PIPELINES.values(), ids=PIPELINES)
def test_no_forward_reads_a_device(make, run, places):
    """Neither for the step nor, where a method keeps anything, for the end of the run."""
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    tilewise.patch(pipe, Draft(density=0.5, min_tokens=0, tile=(1, 2, 2), refresh=2))
    run(pipe, 4)
    assert [step for step, _ in dict.fromkeys(places)] == [0, 1, 2, 3]
    assert not any(places.operators)


def test_a_run_of_timesteps_that_are_copied_reads_one_a_forward(model, places):
    pipe = tilewise.patch(Loop(model, DDIMScheduler(), copies=True), SMALL)
    pipe(6, guided=False)
    assert places.operators == [3, 2, 2, 2, 2, 2]  # the largest of the forward's, read; before, all of the schedule's


def test_the_timestep_that_a_pipeline_notes_down_needs_no_read(model, places):
    class Noting(Loop):
        def _given(self, t):
            self._current_timestep = t
            return super()._given(t)

    pipe = tilewise.patch(Noting(model, DDIMScheduler(), copies=True), SMALL)
    pipe(6, guided=False)
    assert places == [(step, 6) for step in range(6)]
    assert not any(places.operators)


def test_of_equal_timesteps_that_are_copied_the_last_counts(model, places):
    """And so the end of the run is seen."""
    pipe = tilewise.patch(Loop(model, scheduler_of("PNDMScheduler"), copies=True), SMALL)
    pipe(4, guided=False)
    assert places == [(step, 5) for step in (0, 2, 2, 3, 4)]


def stable_diffusion(kind, scheduler):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = kind(vae, None, None, test_unet.unet_2d(), scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, HeunDiscreteScheduler])
def test_stable_diffusion(kind, strength, places):
    cls = StableDiffusionPipeline if strength == 1 else StableDiffusionImg2ImgPipeline
    options = {"skip_prk_steps": True} if kind is PNDMScheduler else {}
    pipe = tilewise.patch(stable_diffusion(cls, kind(**options)), SMALL, min_tokens=0)
    call = {"height": 16, "width": 16} if strength == 1 else {"image": torch.zeros(1, 3, 16, 16), "strength": strength}
    told = tilewise.explain(pipe, height=16, width=16, frames=1, num_inference_steps=8, strength=strength)
    embeds = torch.zeros(1, 5, 32)
    pipe(
        prompt_embeds=embeds, negative_prompt_embeds=embeds, num_inference_steps=8, output_type="latent", **call
    )  # fmt: skip
    layers = len(pipe.unet._tilewise.layers)
    assert counts(pipe) == (told.sparse_steps * layers, told.dense_steps * layers)
    assert not any(places.operators)
    expected = {
        (DDIMScheduler, 1.0): (6, 2), (PNDMScheduler, 1.0): (6, 3), (HeunDiscreteScheduler, 1.0): (11, 4),
        (DDIMScheduler, 0.5): (4, 0), (PNDMScheduler, 0.5): (5, 0), (HeunDiscreteScheduler, 0.5): (7, 0),
    }  # fmt: skip
    assert (told.sparse_steps, told.dense_steps) == expected[kind, strength]


def test_wan_video_to_video_of_a_pipeline_that_is_gone(places):
    pipe = tilewise.patch(tiny_wan.tiny_pipeline(num_layers=1), SMALL)
    wan(pipe, 4)
    before = counts(pipe)
    pipe = WanVideoToVideoPipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    gc.collect()
    told = tilewise.explain(pipe, height=32, width=32, frames=5, num_inference_steps=8, strength=0.8)
    assert (told.sparse_steps, told.dense_steps) == (6, 0)
    assert "strength 0.8 leaves 6 of 8 timesteps" in str(told)
    places.clear()
    wan(pipe, 8, latents=torch.zeros(1, 4, 3, 8, 8), strength=0.8)
    assert places == [(step, 8) for step in range(2, 8) for _ in range(2)]
    after = counts(pipe)
    assert (after[0] - before[0], after[1] - before[1]) == (12, 0)


# ── which pipeline is running ────────────────────────────────────────────────────────────────────────────────────


def forward(model, timestep):
    with torch.no_grad():
        return model(torch.zeros(1, 4, 1, 4, 4), torch.tensor([timestep]), torch.zeros(1, 1, tiny_wan.TEXT_DIM))


def test_a_pipeline_without_the_denoiser_does_not_count(model, places):
    """A bare denoiser that another pipeline's callback calls goes by its noise level."""
    tilewise.patch(model, SMALL)
    other = tiny_wan.tiny_pipeline(num_layers=1)

    def call(pipe, step, timestep, tensors):
        forward(model, 250.0)
        return tensors

    wan(other, 2, callback_on_step_end=call)
    assert places == [(750, 1000)] * 2


def test_the_innermost_pipeline_counts(model, places):
    """A pipeline that runs inside another with the same denoiser, from its callback."""
    inner = Loop(model, DDIMScheduler())
    outer = WanPipeline(None, None, tiny_wan.tiny_vae(), FlowMatchEulerDiscreteScheduler(), model)
    outer.set_progress_bar_config(disable=True)
    tilewise.patch(outer, SMALL)

    def call(pipe, step, timestep, tensors):
        if step == 0:
            inner(3, guided=False)
        return tensors

    wan(outer, 2, callback_on_step_end=call)
    assert places == [(0, 2)] * 2 + [(0, 3), (1, 3), (2, 3)] + [(1, 2)] * 2


def test_two_threads_run_one_denoiser(model, monkeypatch):
    """Each has a pipeline of its own; both search for a timestep at the same moment."""
    at, seen, barrier = step_index.StepIndex(lambda: None, model), {}, threading.Barrier(2)
    search = step_index.StepIndex._search

    def together(self, *args):
        barrier.wait(20)
        return search(self, *args)

    def place(module, args):
        seen.setdefault(threading.get_ident(), []).append(at.of(args[1])[:2])

    monkeypatch.setattr(step_index.StepIndex, "_search", together)
    handle = model.register_forward_pre_hook(place)
    pipes = [Loop(model, DDIMScheduler(num_train_timesteps=n), copies=True) for n in (1000, 600)]
    threads = [threading.Thread(target=pipe, args=(6,), kwargs={"guided": False}) for pipe in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert list(seen.values()) == [[(step, 6) for step in range(6)]] * 2


@pytest.mark.parametrize("wrapped", [pytest.param("compiled", marks=pytest.mark.compile), "in another module"])
def test_a_denoiser_that_is_wrapped(places, wrapped):
    """torch.compile's module, and one that holds the denoiser: the pipeline that runs is found all the same."""

    class Holder(torch.nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, *args, **kwargs):
            return self.inside(*args, **kwargs)

    model = tiny_wan.tiny_transformer(num_layers=1)
    patched = tilewise.patch(Loop(model, DDIMScheduler()), SMALL)
    with pytest.raises(KeyboardInterrupt):
        patched(stop_after=2)
    outside = torch.compile(model, backend="eager", fullgraph=True) if wrapped == "compiled" else Holder(model)
    other = Loop(outside, FlowMatchEulerDiscreteScheduler(), copies=True)
    places.clear()
    other(4, guided=False)
    assert places == [(step, 4) for step in range(4)]
    tilewise.unpatch(model)
    torch.compiler.reset()


def test_a_loop_of_ones_own_goes_by_the_pipeline_that_was_patched(model, places):
    pipe = tilewise.patch(Loop(model, DDIMScheduler()), SMALL)
    pipe.scheduler.set_timesteps(5)
    for t in pipe.scheduler.timesteps:
        forward(model, float(t))
    assert places == [(step, 5) for step in range(5)]
    forward(model, 77.0)  # none of its timesteps
    assert places[-1] == (923, 1000)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe(4)
    forward(model, 250.0)  # its run is over
    assert places[-1] == (750, 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_a_lower_precision(model, dtype):
    """Pipelines may round the timestep to the denoiser's dtype; of 40 steps, neighbours are up to 26 apart."""
    pipe = Loop(model, DDIMScheduler())
    at = step_index.StepIndex(lambda: pipe, model)
    pipe.scheduler.set_timesteps(40)
    assert [at.of(t.to(dtype))[:2] for t in pipe.scheduler.timesteps] == [(step, 40) for step in range(40)]
    assert [at.of(t.to(dtype)).is_last for t in pipe.scheduler.timesteps] == [False] * 39 + [True]
    assert at.of(torch.tensor(962.5, dtype=dtype)).total == 1000


def test_rising_noise_levels_are_no_timesteps_of_a_forward(model, places):
    """Mochi's scheduler counts from noise to video, and its family turns the timestep round."""
    pipe = tilewise.patch(Loop(model, FlowMatchEulerDiscreteScheduler(invert_sigmas=True)), SMALL)
    pipe.scheduler.set_timesteps(4)
    forward(model, 1000.0)
    assert places == [(0, 1000)]


def test_a_timestep_that_is_not_the_schedulers_is_said(model):
    class Odd(Loop):
        def __call__(self):
            self.scheduler.set_timesteps(4)
            forward(self.transformer, 77.0)
            forward(self.transformer, 77.0)

    pipe = tilewise.patch(Odd(model, DDIMScheduler()), SMALL)
    with pytest.warns(UserWarning, match=r"Odd: the timestep .* not among those of its DDIMScheduler") as told:
        pipe()
    assert len([one for one in told if "DDIMScheduler" in str(one.message)]) == 1


def test_variables_of_the_callers_are_left_alone(model):
    """Looking for the pipeline keeps nothing of a frame alive, and does not touch what its own ``locals()`` gave."""
    tilewise.patch(model, SMALL)

    class Plain(Loop):
        def __call__(self, hold):
            self.scheduler.set_timesteps(2)
            large = torch.zeros(1000)
            alive = weakref.ref(large)
            mine = locals() if hold else None
            forward(self.transformer, float(self.scheduler.timesteps[0]))
            del large
            return mine, alive() is not None

    pipe = Plain(model, DDIMScheduler())
    assert pipe(hold=False) == (None, False)
    mine, _ = pipe(hold=True)
    assert {"self", "hold", "large", "alive"} <= set(mine)


def test_place_in():
    timesteps = torch.linspace(1000, 0, 12)
    place_in = step_index.place_in
    assert [place_in(timesteps, t) for t in timesteps] == list(range(12))
    assert [place_in(timesteps, t.expand(3, 2)) for t in timesteps[5:]] == list(range(5, 12))
    assert [place_in(timesteps[4:], t) for t in timesteps[3:6]] == [None, 0, 1]
    assert place_in(timesteps[::2], timesteps[4]) == 2
    assert place_in(timesteps[::2], timesteps[3]) is None
    for other in (timesteps[2:4], timesteps[3].clone(), timesteps[3].half(), timesteps[3] * 1, timesteps[:0], 3, None):
        assert place_in(timesteps, other) is None
    assert place_in(torch.empty(4, device="meta"), torch.empty((), device="meta")) is None


# ── explain ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_explain_leaves_the_scheduler_alone(model):
    pipe = Loop(model, DDIMScheduler())
    pipe.scheduler.set_timesteps(3)
    calls, whole = [], pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda *args: (calls.append(args), whole(*args))
    before = pipe.scheduler.timesteps
    told = tilewise.explain(pipe, **SIZE, method=SMALL, num_inference_steps=8, strength=0.5)
    assert (told.sparse_steps, told.dense_steps) == (4, 0)
    assert pipe.scheduler.timesteps is before
    assert pipe.scheduler.num_inference_steps == 3
    assert not calls


def test_explain_of_schedules_that_cannot_be_made(model):
    say = functools.partial(tilewise.explain, **SIZE, method=SMALL)
    for strength in (0, 1.5, "half", True):
        with pytest.raises(tilewise.ConfigError, match=r"strength must be in \(0, 1\]"):
            say(Loop(model, DDIMScheduler()), strength=strength)
    with pytest.raises(tilewise.ConfigError, match=r"WanPipeline has no get_timesteps, so it takes no strength"):
        say(tiny_wan.tiny_pipeline(), strength=0.5)
    with pytest.raises(tilewise.ConfigError, match="takes no strength"):
        say(model, strength=0.5)
    told = say(Loop(model, DDIMScheduler()), num_inference_steps=2000)
    assert (told.sparse_steps, told.dense_steps) == (1500, 500)
    assert "DDIMScheduler.set_timesteps(2000) failed" in str(told)
    moved = say(Loop(model, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)), num_inference_steps=8)
    assert (moved.sparse_steps, moved.dense_steps) == (6, 2) and "timesteps" not in str(moved.notes)
    twice = say(Loop(model, HeunDiscreteScheduler()), num_inference_steps=6)
    assert "HeunDiscreteScheduler calls the denoiser at 11 timesteps in 6 steps" in twice.notes
