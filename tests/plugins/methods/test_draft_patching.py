"""Dynamic methods in a patched pipeline: dense where they keep everything, what they remember, what they report."""

import math

import family_checks
import pytest
import test_hunyuan_video as hunyuan
import test_unet as unet
import torch

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.dynamic.reuse import Drift
from tilewise.plugins.methods.dynamic.step_memory import Memories
from tilewise.plugins.methods.xattention import XAttention
from tilewise.plugins.watch import watch

SIZE = {"height": 64, "width": 64, "num_frames": 9}
TILE = (1, 4, 4)


def run(pipe, steps=3, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    options = {**SIZE, "guidance_scale": 3.0, "max_sequence_length": 16, **options}
    prompt = ["a red circle", "a blue square"]
    return torch.from_numpy(
        pipe(prompt, num_inference_steps=steps, generator=generator, output_type="np", **options).frames
    )


def everything(cls=Draft, **options):
    return cls(density=1.0, tile=TILE, min_tokens=0, **options)


@pytest.mark.parametrize("cls", [Draft, XAttention])
def test_keeping_everything_is_dense(tiny_pipe, cls):
    """Two samples, guidance, batch: density 1 is stock, and summary says so."""
    stock = run(tiny_pipe)
    tilewise.patch(tiny_pipe, everything(cls, probe=4), steps=(0, 1), strict=True)
    torch.testing.assert_close(run(tiny_pipe), stock, rtol=1e-3, atol=1e-3)
    told = tilewise.summary(tiny_pipe)
    assert told.density == pytest.approx(1)
    assert told.recall == pytest.approx(1)
    assert told.probe == pytest.approx(1)
    assert told.calls == 3 * 2 * 2
    assert "measured on probe rows: 1.000" in str(told)
    tilewise.unpatch(tiny_pipe)
    assert torch.equal(run(tiny_pipe), stock)


@pytest.mark.parametrize("cls", [Draft, XAttention])
def test_text_and_masks(cls):
    """A joint sequence of video and text whose padding a mask hides, of another length in each sample: one plan a group."""
    model, given = hunyuan.tiny(None), hunyuan.inputs(None, (5, 14, 14), (9, 4))
    stock = family_checks.forward(model, given)
    tilewise.patch(model, everything(cls), steps=(0, 1), strict=True)
    torch.testing.assert_close(family_checks.forward(model, given), stock, atol=1e-4, rtol=1e-4)
    told = tilewise.summary(model)
    assert {row.kind for row in told.rows} == {"sparse"}
    assert told.density == pytest.approx(1)
    tilewise.patch(model, cls(density=0.5, tile=TILE, min_tokens=0), steps=(0, 1), strict=True)
    family_checks.forward(model, given)
    assert tilewise.summary(model).density == pytest.approx(0.5, abs=0.06)


def test_layers_with_grids_of_their_own(monkeypatch):
    monkeypatch.setattr("tilewise.plugins.config.MIN_MAP_TOKENS", 1)
    model, given = unet.KINDS["2d"](), unet.inputs_of("2d", 16, 12)
    stock = unet.forward(model, given)
    tilewise.patch(model, everything(), steps=(0, 1), strict=True)
    torch.testing.assert_close(unet.forward(model, given), stock, atol=1e-4, rtol=1e-4)
    assert {row.kind for row in tilewise.summary(model).rows} == {"sparse"}


def test_summary_measures_density(tiny_pipe):
    tilewise.patch(tiny_pipe, Draft(density=0.4, tile=TILE, min_tokens=0), strict=True)
    run(tiny_pipe, steps=4)
    told = tilewise.summary(tiny_pipe)
    assert told.density == pytest.approx(0.4, abs=0.05)
    assert 0.4 < told.overall_density < 1
    assert {row.kind for row in told.rows} == {"sparse", "dense step"}
    assert math.isfinite(told.to_dict()["recall"])


def test_short_sequences_stay_dense_and_are_counted(tiny_pipe):
    stock = run(tiny_pipe)
    tilewise.patch(tiny_pipe, "draft", strict=True)
    assert torch.equal(run(tiny_pipe), stock) or torch.allclose(run(tiny_pipe), stock, atol=1e-3)
    rows = [row for row in tilewise.summary(tiny_pipe).rows if row.kind == "short"]
    assert "pays from 1024" in rows[0].reason
    assert tilewise.summary(tiny_pipe).density == 1.0


def test_nan_in_a_pipeline_is_counted(tiny_pipe):
    tilewise.patch(tiny_pipe, Draft(tile=TILE, min_tokens=0), steps=(0, 1))
    hook = tiny_pipe.transformer.blocks[1].attn1.to_q.register_forward_hook(lambda m, i, out: out * math.nan)
    run(tiny_pipe, steps=1)
    hook.remove()
    told = tilewise.summary(tiny_pipe)
    assert told.broken > 0
    assert "not finite" in str(told)


@pytest.mark.compile
def test_compiled_blocks_run_it(tiny_pipe):
    """The plan is made inside the operator, so that one graph serves all steps."""
    plain = Draft(density=0.4, tile=TILE, min_tokens=0)
    tilewise.patch(tiny_pipe, plain, steps=(0.3, 1))
    wanted = run(tiny_pipe)
    tiny_pipe.transformer.compile(backend="eager", fullgraph=True)
    tilewise.patch(tiny_pipe, plain, steps=(0.3, 1))
    torch.testing.assert_close(run(tiny_pipe), wanted, rtol=1e-3, atol=1e-3)
    assert tilewise.summary(tiny_pipe).density == pytest.approx(0.4, abs=0.05)


def test_watch_sees_each_call_once(tiny_pipe):
    tilewise.patch(tiny_pipe, Draft(density=0.4, tile=TILE, min_tokens=0), steps=(0.5, 1))
    with watch(tiny_pipe, layers=[1], steps=[2, 3]) as calls:
        run(tiny_pipe, steps=4)
    assert [(c.step, c.branch, c.block, c.kind) for c in calls] == [
        (2, 0, 1, "sparse"), (2, 1, 1, "sparse"), (3, 0, 1, "sparse"), (3, 1, 1, "sparse")
    ]  # fmt: skip
    assert calls[0].layout.grid == Grid(5, 8, 8)
    assert calls[0].draft.shape == (2, 2, 20, 20)
    assert calls[0].plan.q_len == 320
    run(tiny_pipe, steps=1)
    assert len(calls) == 4
    assert not tiny_pipe.transformer._tilewise.state.observers


def choices(pipe, monkeypatch, method, runs=1, steps=4, **options):
    from tilewise.plugins.methods.dynamic import base as guided

    made = []
    select = guided.select
    monkeypatch.setattr(guided, "select", lambda *a, **k: (made.append(1), select(*a, **k))[1])
    tilewise.patch(pipe, method, steps=(0, 1), strict=True)
    for _ in range(runs):
        run(pipe, steps=steps, **options)
    return len(made)


CALLS = 2 * 2  # layers × branches


def test_choices_are_kept_for_refresh_steps_and_not_across_runs(tiny_pipe, monkeypatch):
    kept = Draft(density=0.4, tile=TILE, min_tokens=0, refresh=2, drift=None)
    assert choices(tiny_pipe, monkeypatch, kept) == 2 * CALLS
    monkeypatch.undo()
    assert choices(tiny_pipe, monkeypatch, kept, runs=2, steps=1) == 2 * CALLS, "a one-step run repeated is a new run"
    monkeypatch.undo()
    always = Draft(density=0.4, tile=TILE, min_tokens=0, refresh=4, drift=0.0)
    assert choices(tiny_pipe, monkeypatch, always) > CALLS, "any fall of recall makes a new choice at the next step"
    monkeypatch.undo()
    never = Draft(density=0.4, tile=TILE, min_tokens=0, refresh=4, drift=1.0)
    assert choices(tiny_pipe, monkeypatch, never) == CALLS


def test_branches_and_sizes_have_their_own_memory(tiny_pipe):
    method = Draft(density=0.4, tile=TILE, min_tokens=0, refresh=9, drift=None)
    tilewise.patch(tiny_pipe, method, steps=(0, 1), strict=True)
    memories = tiny_pipe.transformer._tilewise.state.memories
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append(
            (len(memories), {key[0] for key in memories.now._kept}, {key[3].grid for key in memories.now._kept})
        )
        return tensors

    run(tiny_pipe, callback_on_step_end=look)
    assert seen[0][:2] == (CALLS, {0, 1})
    assert len(memories) == 0, "maps are large: none outlives its run"
    run(tiny_pipe, guidance_scale=1.0, height=48, callback_on_step_end=look)
    assert seen[-2] == (2, {0}, {Grid(5, 6, 8)})


def test_a_denoiser_called_again_and_again_at_one_timestep_does_not_pile_up_memories():
    memories = Memories()
    for _ in range(100):
        memories.begin(3)
        memories.now.of("layer")["map"] = object()
    assert len(memories) <= 8


def test_memories_begin_anew():
    memories, first, second = Memories(), torch.zeros(7), torch.zeros(7)

    def forward(step, run=first):
        memories.begin(step, run)
        memory = memories.now.of("layer")
        memory["seen"] = memory.get("seen", 0) + 1
        return memories.now.branch, memory["seen"]

    assert [forward(step) for step in (0, 0, 1, 1, 2, 2)] == [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]
    assert [forward(3), forward(4)] == [(0, 4), (0, 1)], "guidance ended at step 3: nothing older may be mixed up"
    assert forward(5) == (0, 2)
    assert forward(4) == (0, 1), "a step back is another run"
    assert forward(5) == (0, 2)
    assert forward(6, second) == (0, 1)
    assert forward(None, second) == (0, 1)
    assert forward(7, second) == (0, 1)


def test_a_choice_is_made_anew_when_recall_falls():
    memory, made = {}, []

    def at(tick, recall, drift=0.1, refresh=5):
        def choose():
            made.append(tick)
            return torch.ones(1, 1, 1, 1, dtype=torch.bool)

        Drift(refresh, drift).reuse(memory, tick, choose, lambda kept: torch.tensor(recall))

    for tick, recall in enumerate([0.9, 0.85, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]):
        at(tick, recall)
    assert made == [0, 3, 8], "the fall at tick 2 shows at tick 3, and five ticks later the time is up"
    at(9, math.nan)
    at(10, 0.7)
    assert made == [0, 3, 8, 10], "a recall that is not a number is no reason to go on"
