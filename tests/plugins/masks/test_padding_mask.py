"""Masks that hide text keys run sparse and exactly; every other mask says why it does not."""

from types import SimpleNamespace

import pytest
import torch

import tilewise
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.config import resolve
from tilewise.plugins.masks.padding_mask import Group, groups_of, visible_keys
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.runtime.attention_call import AttentionCalls
from tilewise.plugins.runtime.attention_request import AttentionRequest
from tilewise.plugins.runtime.call_stats import FALLBACK, SPARSE
from tilewise.plugins.runtime.forward_state import ForwardState
from tilewise.plugins.runtime.sparse_call import measured
from tilewise.plugins.runtime.step_index import StepIndex

STA = tilewise.STA(window=(1, 2, 1), tile=(2, 3, 3))
LENGTHS = {
    "none hidden": [7, 7],
    "same for both": [4, 4],
    "a sample each": [2, 6],
    "no text at all": [0, 7],
}


def calls_over(grid: Grid, heads: int = 2) -> AttentionCalls:
    layer = AttentionLayer("blocks.0.attn", torch.nn.Identity(), 0, heads, 32)
    steps = StepIndex(lambda: None, layer.module)
    state = ForwardState("transformer", resolve(STA, steps=(0, 1)), steps, [layer], {0}, True)
    state.begin(grid, torch.tensor(0))
    return AttentionCalls(state, torch.tensor(0))


def attend(calls: AttentionCalls, q, k, v, mask):
    def stock(query, *rest, **options):
        return torch.zeros_like(query)

    return calls.answer(0, AttentionRequest(q, k, v, mask), stock)


def visible_of(grid: Grid, lengths: list[int], side: str) -> torch.Tensor:
    """(B, S) bool: that many text tokens of each sample, at the start or the end of its text, or every other one first."""
    visible = torch.ones(len(lengths), grid.tokens, dtype=torch.bool)
    first = 0 if grid.text_first else grid.video
    for sample, n in enumerate(lengths):
        order = {"right": range(7), "left": range(6, -1, -1), "scattered": [0, 2, 4, 6, 1, 3, 5]}[side]
        hidden = list(order)[n:]
        visible[sample, [first + at for at in hidden]] = False
    return visible


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("side", ["right", "left", "scattered"])
@pytest.mark.parametrize("lengths", list(LENGTHS.values()), ids=list(LENGTHS))
def test_hidden_text_keys_change_exactly_what_they_should(text_first, side, lengths):
    grid = Grid(3, 5, 7, text=7, text_first=text_first)
    calls = calls_over(grid)
    q, k, v = (torch.randn(2, grid.tokens, 2, 32) for _ in range(3))
    visible = visible_of(grid, lengths, side)
    layout = STA.layout(grid)
    at = layout.inverse
    window = calls.state.plans.plan(layout, 2, torch.device("cpu")).to_mask(2)[:, :, at][:, :, :, at]
    want, _ = masked_attention(q, k, v, window & visible[:, None, None], dtype=torch.float32)
    # What hidden tokens hold must not matter, not even as 0 × NaN.
    k[~visible], v[~visible] = torch.nan, torch.nan
    additive = torch.where(visible, 0.0, -torch.inf)
    for mask in (visible, visible[:, None, None], additive[:, None], additive[:, None, None].expand(-1, 2, -1, -1)):
        out = attend(calls, q, k, v, mask)
        torch.testing.assert_close(out[visible], want[visible])
        assert bool((out[~visible] == 0).all())
    assert {kind.kind for _, kind in calls.state.call_stats.records} == {SPARSE}


@pytest.mark.parametrize("lengths", list(LENGTHS.values()), ids=list(LENGTHS))
def test_the_density_is_that_of_the_pairs_of_visible_tokens(lengths):
    grid = Grid(3, 5, 7, text=7)
    calls = calls_over(grid)
    q, k, v = (torch.randn(2, grid.tokens, 2, 32) for _ in range(3))
    visible = visible_of(grid, lengths, "right")
    layout = STA.layout(grid)
    at = layout.inverse
    window = calls.state.plans.plan(layout, 2, torch.device("cpu")).to_mask(2)[:, :, at][:, :, :, at]
    pairs = visible[:, None, :, None] & visible[:, None, None]
    attend(calls, q, k, v, visible)
    (record,) = calls.state.call_stats.records.values()
    kept = float((window & pairs).double().mean(1).sum()) / float(pairs.sum())
    assert record.kept / record.known == pytest.approx(kept, rel=1e-9)


def test_what_groups_of_samples_measure_is_weighed_by_their_pairs_and_rows():
    """Two samples of 10 tokens and one of 20; a value that one of them lacks says nothing of the call."""

    def part(samples, tokens, density, recall, broken, probe=None):
        plan = SimpleNamespace(q_len=tokens, k_len=tokens, device_density=torch.tensor(density))
        values = {"recall": torch.tensor(recall), "broken": torch.tensor(broken), "probe": probe}
        planned = SimpleNamespace(plan=plan, **values)
        return SimpleNamespace(group=Group(torch.tensor(samples), None, 0), plan=plan, planned=planned)

    two, one = part([0, 2], 10, 0.5, 0.25, 1.0), part([1], 20, 0.125, 0.75, 2.0, torch.tensor(1.0))
    assert {name: float(value) for name, value in measured([two, one], 3).items()} == {
        "density": pytest.approx((200 * 0.5 + 400 * 0.125) / 600),
        "recall": pytest.approx((20 * 0.25 + 20 * 0.75) / 40),
        "broken": 3.0,
    }
    assert measured([one], 1) == {
        "density": one.plan.device_density, "recall": one.planned.recall, "probe": one.planned.probe,
        "broken": one.planned.broken,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (lambda grid: torch.ones(1, 1, grid.tokens, grid.tokens, dtype=torch.bool), "not one of keys alone"),
        (lambda grid: torch.randn(1, grid.tokens), "weighs keys"),
        (lambda grid: torch.arange(grid.tokens)[None] > 0, "hides video tokens"),
        (lambda grid: torch.ones(3, grid.tokens, dtype=torch.bool), "for 3 samples, the batch is 2"),
    ],
)
def test_other_masks_stay_dense_and_say_why(mask, reason):
    grid = Grid(3, 5, 7, text=7)
    calls = calls_over(grid)
    q, k, v = (torch.randn(2, grid.tokens, 2, 32) for _ in range(3))
    given = mask(grid)
    if given.shape[0] == 3:  # a stock dispatcher would refuse it too: only the reason is asked for
        assert reason in visible_keys(given, 2, grid.tokens)
        return
    attend(calls, q, k, v, given if given.ndim == 4 else given[:, None, None])
    (kind,) = [kind for _, kind in calls.state.call_stats.records]
    assert kind.kind == FALLBACK
    assert reason in kind.reason


def test_the_mask_is_read_once_a_forward(monkeypatch):
    grid = Grid(3, 5, 7, text=7)
    calls = calls_over(grid)
    q, k, v = (torch.randn(2, grid.tokens, 2, 32) for _ in range(3))
    visible = visible_of(grid, [2, 6], "right")
    read = []
    for place in ("runtime.attention_call", "masks.padding_mask"):
        name = f"tilewise.plugins.{place}.visible_keys"
        monkeypatch.setattr(name, lambda *args: read.append(1) or visible_keys(*args), raising=False)
    for _ in range(3):
        attend(calls, q, k, v, visible.view(2, -1))
    assert len(read) == 1
    calls.state.end()
    calls.state.begin(grid, torch.tensor(0))
    attend(calls, q, k, v, visible)
    assert len(read) == 2


def test_plans_of_many_prompt_lengths_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("tilewise.plugins.runtime.plan_cache.MAX_PLANS", 3)
    grid = Grid(3, 5, 7, text=7)
    calls = calls_over(grid)
    q, k, v = (torch.randn(1, grid.tokens, 2, 32) for _ in range(3))
    for n in range(1, 8):
        attend(calls, q, k, v, visible_of(grid, [n], "right"))
    assert len(calls.state.plans.plans) <= 3


def test_groups_are_slices_where_tokens_follow_each_other():
    grid = Grid(1, 2, 2, text=4)
    visible = torch.ones(3, 8, dtype=torch.bool)
    visible[1, 6:] = False
    visible[2, 5] = False
    found = groups_of(visible, grid, torch.device("cpu"))
    assert not isinstance(found, str)
    by_text = {group.text: group for group in found}
    assert by_text[4].tokens is None
    assert by_text[2].tokens == slice(0, 6)
    assert by_text[3].tokens.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert {group.text: group.samples.tolist() for group in found} == {4: [0], 2: [1], 3: [2]}
