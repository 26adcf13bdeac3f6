"""Token pairs that a window leaves in each listed pair of blocks."""

import pytest
import torch
from plan_cases import Case
from torch.utils._python_dispatch import TorchDispatchMode

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.methods.dynamic import windowed_selection


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("windows", [((3, 7, 5),), ((1, 9, 4), (4, 3, 12))])
def test_pairs_are_counted_some_rows_at_a_time(monkeypatch, windows):
    monkeypatch.setattr(windowed_selection, "CHUNK", 300)
    case = Case("window", Grid(6, 14, 15, text=9), (3, 5, 6), windows, unit="token", block=128)
    plan = case.plan()
    seen = plan.to_mask(2)[0, : plan.sets].double()
    of_block = torch.nn.functional.one_hot(torch.repeat_interleave(plan.q_rows.long())).double()  # (S, N)
    pairs = torch.einsum("gqk,qi,kj->gij", seen, of_block, of_block)
    listed = torch.arange(plan.index.shape[-1]) < plan.ends[0, ..., 2:]
    want = torch.where(listed, pairs.gather(-1, plan.index[0].long()), 0)
    with LargestTensor() as largest:
        bounds = windowed_selection.bounds_of(plan)
    assert torch.equal(bounds.pairs.double(), want)
    assert largest.numel < plan.q_len * plan.index.shape[-1] / 2
