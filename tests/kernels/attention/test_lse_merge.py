"""Attention over a few keys chooses a kernel where one takes it, and plain attention where none does."""

import pytest
import torch

from tilewise.kernels.attention import lse_merge
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.plans.block_plan import plan_of_all


def test_only_an_unsupported_plan_means_plain_attention():
    q, k, v = (torch.randn(1, n, 2, 16) for n in (20, 7, 7))
    plan = plan_of_all(20, 7, q.device)
    assert lse_merge._choice(q, k, v, plan).backend == "torch"
    assert lse_merge._choice(q.double(), k.double(), v.double(), plan) is None
    with pytest.raises(ValueError, match="the plan is for 20 queries and 7 keys") as caught:
        lse_merge._choice(q, k[:, :5], v[:, :5], plan)
    assert not isinstance(caught.value, UnsupportedPlanError)
