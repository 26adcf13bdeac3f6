"""Every backend on a GPU, for queries and keys of two layouts."""

import pytest
import torch
from plan_cases import CHUNK_IDS, CHUNKS

from tilewise.kernels.attention.dispatch import block_sparse_attention, choose_backend
from tilewise.kernels.attention.dispatch_8bit import block_sparse_attention_8bit, unavailable_8bit
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.plans.dynamic_plan import dynamic_plan
from tilewise.kernels.plans.layout import Grid, Layout

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["gluon", "fa4", "triton"])
@pytest.mark.parametrize("case", CHUNKS, ids=CHUNK_IDS)
def test_every_backend(case, backend):
    q, k, v = case.tensors(torch.bfloat16, "cuda")
    plan = case.plan("cuda")
    try:
        choice = choose_backend(q, k, v, plan, backend)
    except UnsupportedPlanError as error:
        pytest.skip(str(error))
    out, lse = block_sparse_attention(q, k, v, plan, backend=choice, return_lse=True)
    want, want_lse = masked_attention(q, k, v, plan.to_mask(case.heads).cuda())
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("case", CHUNKS, ids=CHUNK_IDS)
def test_8_bits(case):
    if why := unavailable_8bit(torch.device("cuda"), "int8"):
        pytest.skip(why)
    q, k, v = case.tensors(torch.bfloat16, "cuda")
    plan = case.plan("cuda")
    out, lse = block_sparse_attention_8bit(q, k, v, plan, return_lse=True)
    want, want_lse = masked_attention(q, k, v, plan.to_mask(case.heads).cuda())
    assert float((out.double() - want).norm() / want.norm()) < 0.03
    torch.testing.assert_close(lse.double(), want_lse, atol=0.03, rtol=0)


def test_dynamic_plans():
    queries, keys = Layout(Grid(3, 20, 33, 40), (1, 8, 16)), Layout(Grid(9, 20, 33, 7, True), (1, 8, 16))
    kept = torch.rand(2, 3, queries.blocks, keys.blocks, device="cuda") < 0.2
    plan = dynamic_plan(queries, kept, key_layout=keys)
    want = dynamic_plan(queries, kept.cpu(), key_layout=keys)
    for name in ("index", "key_start", "ends"):
        assert torch.equal(getattr(plan, name).cpu(), getattr(want, name))
    torch.testing.assert_close(plan.device_density.cpu(), want.device_density)
