"""Attention in parts: which path computes one, and that parts merge exactly."""

import pytest
import torch

from tilewise.kernels.attention import lse_merge
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.plans.block_plan import dense_plan_of_lengths
from tilewise.kernels.plans.layout import Grid, Layout


def test_only_an_unsupported_plan_means_plain_attention():
    q, k, v = (torch.randn(1, n, 2, 16) for n in (20, 7, 7))
    plan = dense_plan_of_lengths(20, 7, q.device)
    assert lse_merge._choice(q, k, v, plan).backend == "torch"
    assert lse_merge._choice(q.double(), k.double(), v.double(), plan) is None
    with pytest.raises(ValueError, match="the plan is for 20 queries and 7 keys") as caught:
        lse_merge._choice(q, k[:, :5], v[:, :5], plan)
    assert not isinstance(caught.value, UnsupportedPlanError)


def test_the_plan_is_kept_with_a_layout():
    layout, device = Layout(Grid(1, 4, 5), (1, 2, 2)), torch.device("cpu")
    plan = lse_merge._plan(20, 7, device, layout)
    assert lse_merge._plan(20, 7, device, layout) is plan
    assert lse_merge._plan(20, 8, device, layout).k_len == 8
    assert lse_merge._plan(20, 7, device, None) is not plan


@pytest.mark.parametrize("scale", [None, 0.3])
def test_grouped_queries(scale):
    q, k, v = (torch.randn(2, n, h, 16) for n, h in ((20, 6), (7, 2), (7, 2)))
    out, lse = lse_merge.attend_with_lse(q, k, v, scale)
    want, want_lse = masked_attention(q, k, v, scale=scale)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


def test_parts_merge_exactly_where_rows_see_one_part_or_none(monkeypatch):
    monkeypatch.setattr(lse_merge, "MAX_SCORES", 100)  # several chunks
    q, k, v = (torch.randn(1, n, 2, 16) for n in (20, 9, 9))
    mask = torch.rand(1, 1, 20, 9) < 0.5
    mask[:, :, 3, :4], mask[:, :, 4, 4:], mask[:, :, 5] = False, False, False
    one, two = (
        [x.float() for x in masked_attention(q, k[:, p], v[:, p], mask[..., p])] for p in (slice(4), slice(4, 9))
    )
    want, want_lse = masked_attention(q, k, v, mask)
    into = torch.full_like(q, torch.nan)
    out, lse = lse_merge.merge_attention(*one, *two, into=into)
    assert out is into
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
