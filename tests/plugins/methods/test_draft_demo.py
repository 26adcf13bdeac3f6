"""``draft`` on the demo model's own activations: it keeps the recall asked for, and compensation makes the error smaller."""

import sys
from pathlib import Path

import pytest
import torch

import tilewise
from tilewise.kernels.plans.block_plan import block_maps
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.plugins.methods.draft import Draft

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmarks import quality
from benchmarks.attention_error import answer, dense
from benchmarks.variants import OURS, PAPER, variants

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo():
    """(grid, attention calls of all eight blocks) of the third step of three."""
    pipe = load_pipeline("demo", device="cpu")
    tilewise.patch(pipe, "dense", fuse=False)
    step, calls = pipe.transformer._tilewise.state, []
    step.observers.append(lambda call: calls.append(call) if call.step == 2 else None)
    pipe(
        "a red circle moving right on a blue striped background", height=128, width=128, num_frames=17,
        num_inference_steps=3, guidance_scale=1.0, max_sequence_length=32, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return step.grid, calls


def block_mass(layout, call):
    """(B, H, N, N) attention mass of each pair of blocks, exactly: rows sum to 1."""
    q, k = (x.index_select(1, layout.permutation) for x in (call.query, call.key))
    weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5).softmax(-1)
    _, rows, _ = layout.block_table(q.device)
    of_token = torch.repeat_interleave(rows.long())
    by_key = torch.zeros(*weights.shape[:3], layout.blocks).index_add_(3, of_token, weights)
    mass = torch.zeros(*weights.shape[:2], layout.blocks, layout.blocks).index_add_(2, of_token, by_key)
    return mass / rows[:, None]


def row_recalls(method, layout, call, mass):
    """(B, H, N) attention mass that each query block keeps: all of its queries, exactly."""
    q, k, v = (x.index_select(1, layout.permutation) for x in (call.query, call.key, call.value))
    full, partial = block_maps(method.plan_call(layout, q, k, v, q.shape[-1] ** -0.5, {}, 0).plan)
    assert not partial.any()
    return (mass * full).sum(-1)


@pytest.mark.parametrize("tile", [None, (1, 8, 16)])
def test_recall_is_reached(demo, tile):
    """By 95 % of the query blocks, and without safety by their mean: the draft is not biased."""
    grid, calls = demo
    assert len(calls) == 8
    layout = Draft(recall=0.9, tile=tile).layout(grid)
    masses = [block_mass(layout, call) for call in calls]
    for recall in (0.8, 0.9, 0.95):
        for safety in (None, 1.0):
            method = Draft(recall=recall, tile=tile, **({} if safety is None else {"safety": safety}))
            found = torch.cat(
                [row_recalls(method, layout, call, mass).flatten() for call, mass in zip(calls, masses, strict=True)]
            )
            if safety is None:
                assert (found >= recall).float().mean() >= 0.95
            else:
                assert recall - 0.01 <= found.mean() < recall + 0.05


def test_compensation_and_ranking_pay(demo):
    grid, calls = demo
    errors = {}
    for name in (OURS, PAPER, "draft, not compensated"):
        method = variants(0.25)[name]
        pairs = [(answer(method, grid, call)[0], dense(call)) for call in calls]
        errors[name] = sum(float((a - b).norm() / b.norm()) for a, b in pairs) / len(pairs)
    assert errors[OURS] < 0.7 * errors["draft, not compensated"]
    assert errors[OURS] < 0.6 * errors[PAPER]


def test_quality_runs_and_goes_on(tmp_path, capsys):
    """The table of benchmarks/quality.py: two variants, then again without making anything anew."""
    options = {
        "device": "cpu", "prompts": 1, "steps": 4, "size": 64, "frames": 5, "seed": 0, "densities": "0.25", "batch": 2,
        "only": "ours|selection$", "dtype": "float32", "blocks": "1:", "workers": 1, "seconds": 1e9, "tiny": True,
        "out": tmp_path,
    }  # fmt: skip
    quality.main(**options)
    first = capsys.readouterr().out
    assert "2 of 2 jobs" in first
    assert "ours − paper's selection" in first
    (file,) = tmp_path.glob("*.json")
    quality.main(**options)
    assert file.exists()
    assert "2 of 2 jobs" in capsys.readouterr().out
    quality.main(**{**options, "seconds": 0.0, "densities": "0.25,0.5"})
    assert "2 of 4 jobs" in capsys.readouterr().out, "no job is begun that has no time left"
