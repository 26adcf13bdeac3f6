"""The causal sampler against a loop from the formulas in float64, over a known velocity and over a tiny Wan denoiser.

The loop is in tests/helpers/causal_sampling.py. The sampler keeps float32: results are compared to its rounding.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import tilewise
from tests.helpers.causal_reference import MaskProcessor
from tests.helpers.causal_sampling import Context, reference
from tests.helpers.tiny_wan import tiny_pipeline
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.sampler import CausalSampler, TextStates
from tilewise.plugins.streaming.kv_cache import KVCache

SHAPE = (2, 4, 3)  # C, h, w of a latent frame
ROUNDING = 1e-5  # values are below 20, and a chunk has up to six passes
TEXTS = [torch.full((1, 3, 2), value, dtype=torch.float64) for value in (0.9, -0.4)]  # positive and negative

# ── a known velocity ─────────────────────────────────────────────────────────────────────────────────────────────────


Written = tuple[
    torch.Tensor, float, torch.Tensor
]  # latents, timestep and text of the pass that wrote a chunk's keys and values


def known(x: torch.Tensor, timestep: float, text: torch.Tensor, before: list[Written], which: int = 0) -> torch.Tensor:
    """Not linear in the latents, noise level, text and number of the chunk, nor in what chunks before it left."""
    past = sum(0.5 * torch.tanh(3 * latents.mean() + at / 150 + seen.mean()) for latents, at, seen in before)
    wave = torch.sin(torch.tensor(timestep / 300 + len(before) + which, dtype=torch.float64))
    return torch.tanh(0.8 * x + x.roll(1, 3) * text.mean() + past) + wave * x * text.mean()


class KnownDenoiser:
    """What the sampler uses of a ``CausalDenoiser``, with ``known`` in place of a network. log: all that happened, in order."""

    def __init__(self, log: list, which: int = 0) -> None:
        self.log, self.which = log, which
        self.next_frame, self.step, self.steps = 0, 0, 1
        self.frames = 0  # of the chunk under way
        self.last: dict[int, Written] = {}  # by lane
        self.written: list[dict[int, Written]] = []  # of finished chunks

    def begin(self, frames: int) -> None:
        self.log.append(("begin", self.which, frames))
        self.frames, self.last = frames, {}

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, *, lane: int) -> torch.Tensor:
        assert x.shape == (1, SHAPE[0], self.frames, *SHAPE[1:]) and x.dtype == torch.float64 and timestep.shape == (1,)
        at = round(timestep.item(), 3)
        self.log.append(("pass", self.which, at, lane, text.mean().item(), self.step, self.steps))
        self.last[lane] = x, timestep.item(), text
        return known(x, timestep.item(), text, [one[lane] for one in self.written], self.which)

    def commit(self) -> None:
        self.log.append(("commit", self.which))
        self.written.append(self.last)
        self.next_frame += self.frames

    def drop_ring(self) -> None:
        self.log.append(("drop", self.which))


def sampler_of(recipe: CausalRecipe, seed: int = 0, denoisers: int = 1) -> tuple[CausalSampler, list]:
    log: list = []
    sampler = CausalSampler(
        [KnownDenoiser(log, which) for which in range(denoisers)],
        recipe,
        TextStates(TEXTS[0], TEXTS[1] if recipe.guidance > 1 else None),
        shape=SHAPE,
        generator=torch.Generator().manual_seed(seed),
        device=torch.device("cpu"),
        dtype=torch.float64,
    )
    return sampler, log


def expected(recipe: CausalRecipe, lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    def velocity(x: torch.Tensor, timestep: float, lane: int, before: list[Context]) -> torch.Tensor:
        which = 0 if recipe.boundary is None or timestep >= 1000 * recipe.boundary else 1
        return known(x, timestep, TEXTS[lane], [(*one, TEXTS[lane]) for one in before], which)

    return reference(recipe, lengths, velocity, SHAPE, seed)


def assert_equal(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.shape == b.shape and a.dtype == torch.float32
        assert (a - b).abs().max() < ROUNDING, f"chunk {number}: {(a - b).abs().max():.1e}"


# ── chunks ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SCHEDULES = {
    "warped": {"timesteps": (1000, 750, 500, 250), "shift": 5.0},
    "as given": {"timesteps": (950, 600, 300), "warp": False},
    "longer first": {"timesteps": (999, 500), "first_timesteps": (1000, 900, 700, 450, 200, 60), "shift": 3.0},
    "one pass": {"timesteps": (1000,), "first_timesteps": (1000, 400)},
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
@pytest.mark.parametrize("context_noise", [0.0, 100.0])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("solver", ["renoise", "euler", "unipc"])
def test_chunks_equal_the_loop_of_the_formulas(solver, guidance, context_noise, schedule):
    recipe = CausalRecipe(solver=solver, guidance=guidance, context_noise=context_noise, **schedule)
    lengths = [1, 3, 3, 2]
    sampler, _ = sampler_of(recipe, seed=5)
    got = [sampler.chunk(frames, first=number == 0) for number, frames in enumerate(lengths)]
    assert_equal(got, expected(recipe, lengths, seed=5))
    assert sampler.next_frame == 9


@pytest.mark.parametrize("solver", ["renoise", "euler", "unipc"])
def test_every_option_changes_the_reference(solver):
    """By far more than rounding: a sampler that ignored one could not pass."""
    options = {"guidance": 3.0, "context_noise": 100.0, "first_timesteps": (1000, 900, 500), "shift": 3.0}
    recipe = CausalRecipe(solver=solver, timesteps=(1000, 400), **options)
    full = expected(recipe, [2, 2, 2])
    changes = [{"guidance": 2.9}, {"context_noise": 90.0}, {"first_timesteps": None}, {"shift": 3.1}]
    for change in [*changes, {"solver": "euler" if solver != "euler" else "unipc"}]:
        other = expected(recipe.replace(**change), [2, 2, 2])
        assert (full[-1] - other[-1]).abs().max() > 100 * ROUNDING, change


@pytest.mark.parametrize("solver", ["renoise", "euler", "unipc"])
def test_two_denoisers_share_the_passes_at_the_boundary(solver):
    recipe = CausalRecipe(
        solver=solver, timesteps=(1000, 875, 800, 300), warp=False, boundary=0.875, guidance=2.0, context_noise=50.0
    )
    sampler, log = sampler_of(recipe, denoisers=2)
    assert_equal([sampler.chunk(2), sampler.chunk(3)], expected(recipe, [2, 3]))
    assert [entry[1] for entry in log if entry[0] == "pass"] == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1] * 2


def test_unipc_takes_noise_levels_closer_than_a_timestep():
    """diffusers' scheduler counts whole timesteps: 999.999 and 999.8 are both 999 to it."""
    recipe = CausalRecipe(solver="unipc", timesteps=(1000, 999, 600, 200), shift=5.0)
    sampler, _ = sampler_of(recipe)
    assert_equal([sampler.chunk(2)], expected(recipe, [2]))


# ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_passes_come_in_order_with_their_timesteps_lanes_and_texts():
    recipe = CausalRecipe(
        timesteps=(1000, 500), first_timesteps=(1000, 750, 500), shift=5, guidance=3, context_noise=20
    )
    sampler, log = sampler_of(recipe)

    def passes(timestep: float, step: int, steps: int) -> list[tuple]:
        return [("pass", 0, timestep, 0, 0.9, step, steps), ("pass", 0, timestep, 1, -0.4, step, steps)]

    sampler.chunk(1, first=True, between=lambda: log.append("between"), ready=lambda latents: log.append("ready"))
    wanted: list = [("begin", 0, 1)]
    for step, timestep in enumerate((1000, 937.5, 833.333)):
        wanted += ["between", *passes(timestep, step, 3)]
    wanted += ["between", "ready", *passes(20, 1, 2), ("commit", 0)]
    found = [entry if isinstance(entry, str) else tuple(pytest.approx(v) for v in entry) for entry in wanted]
    assert log == found
    log.clear()
    sampler.text = TextStates(TEXTS[1], TEXTS[0])
    sampler.chunk(3)
    assert [entry[0] for entry in log] == ["begin", *["pass"] * 6, "commit"] and log[0][2] == 3
    assert [entry[2] for entry in log[1:-1]] == pytest.approx([1000, 1000, 833.333, 833.333, 20, 20])
    assert [entry[4] for entry in log[1:-1]] == pytest.approx([-0.4, 0.9] * 3)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_chunk_that_is_stopped_between_passes_leaves_nothing(at):
    recipe = CausalRecipe(timesteps=(1000, 500), context_noise=30)
    sampler, log = sampler_of(recipe)
    first = sampler.chunk(2)
    state = sampler.generator.get_state()
    calls = itertools.count()

    def stop() -> None:
        if next(calls) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.chunk(2, between=stop)
    assert sampler.next_frame == 2 and log.count(("commit", 0)) == 1
    sampler.generator.set_state(state)
    assert_equal([first, sampler.chunk(2)], expected(recipe, [2, 2]))


def test_latents_that_are_there_are_written_as_context():
    """Of an image, and again after the ring was dropped: the same noise level, noise and timestep as after a chunk."""
    recipe = CausalRecipe(context_noise=100, guidance=3)
    sampler, log = sampler_of(recipe, seed=2)
    generator = torch.Generator().manual_seed(2)
    latents = torch.linspace(-1, 1, 2 * 5 * 12).view(1, 2, 5, 4, 3)
    sampler.given(latents[:, :, :1])
    sampler.rewrite(latents, [3, 2])
    kinds = [entry[:1] if entry[0] == "pass" else entry for entry in log]
    one = [("pass",), ("pass",), ("commit", 0)]
    assert kinds == [("begin", 0, 1), *one, ("drop", 0), ("begin", 0, 3), *one, ("begin", 0, 2), *one]
    denoiser = sampler.denoisers[0]
    assert isinstance(denoiser, KnownDenoiser)
    for chunk, part in zip(denoiser.written, (latents[:, :, :1], latents[:, :, :3], latents[:, :, 3:]), strict=True):
        wanted = 0.9 * part + 0.1 * torch.randn(part.shape, generator=generator)
        for lane in (0, 1):
            assert chunk[lane][1] == 100 and (chunk[lane][0] - wanted).abs().max() < 1e-6


# ── a stream ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
@pytest.mark.parametrize(
    ("solver", "options"),
    [("renoise", {"guidance": 3.0}), ("euler", {"guidance": 1.0}), ("unipc", {"guidance": 3.0, "boundary": 0.9})],
)
def test_a_stream_equals_the_loop_over_whole_clips(solver, options):
    """``tilewise.stream`` over a Wan denoiser in float64; the loop runs it over all latents so far, under a block-causal mask."""
    recipe = CausalRecipe(
        solver=solver, chunk=2, first_chunk=1, timesteps=(1000, 500), first_timesteps=(1000, 700, 300), window=5,
        context_noise=100, height=32, width=48, **options,
    )  # fmt: skip
    pipe = tiny_pipeline(boundary_ratio=recipe.boundary)
    models = [model.double() for model in (pipe.transformer, pipe.transformer_2) if model is not None]
    prompts = "a red circle moving left", "blurry" if recipe.guidance > 1 else ""
    with tilewise.stream(
        pipe, prompts[0], negative=prompts[1], recipe=recipe, cache=KVCache(window=5), seed=3, max_sequence_length=16
    ) as video:
        got = [next(video).latents for _ in range(3)]
    texts = [
        pipe.encode_prompt(one, do_classifier_free_guidance=False, max_sequence_length=16)[0].double()
        for one in prompts
    ]

    def velocity(x: torch.Tensor, timestep: float, lane: int, before: list[Context]) -> torch.Tensor:
        parts = [*before, (x, timestep)]
        number = torch.tensor([i for i, (part, _) in enumerate(parts) for _ in range(part.shape[2])])
        at = torch.cat([torch.full((part.shape[2] * 24,), t, dtype=torch.float64) for part, t in parts])[None]
        model = models[0 if recipe.boundary is None or timestep >= 1000 * recipe.boundary else 1]
        for block in model.blocks:
            block.attn1.set_processor(MaskProcessor(number[:, None] >= number[None], 4, 6))
        whole = torch.cat([part for part, _ in parts], 2)
        return model(whole, at, texts[lane], return_dict=False)[0][:, :, -x.shape[2] :]

    assert [latents.shape[2] for latents in got] == [1, 2, 2]
    assert_equal([x.float() for x in got], reference(recipe, [1, 2, 2], velocity, (4, 8, 12), seed=3))
