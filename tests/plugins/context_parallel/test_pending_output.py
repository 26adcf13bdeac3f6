"""An output that is given out before it is there: views may be taken, its values not be read before they are written."""

from __future__ import annotations

import pytest
import torch
import wan_cases

import tilewise
from tilewise.plugins.context_parallel.enable_cfg import check_cfg
from tilewise.plugins.context_parallel.pending_output import PendingOutput, Promise


@pytest.fixture
def values():
    return torch.zeros(2, 6)


@pytest.fixture
def promise():
    return Promise("not yet there")


@pytest.fixture
def pending(values, promise):
    return PendingOutput.of(values, promise)


def test_views_see_what_is_written_later(values, promise, pending):
    views = [
        pending[:, 1:4],
        pending.view(3, 4)[0],
        pending.t(),
        *pending.chunk(2),
        pending.to(torch.float32),
        pending[0],
    ]
    assert all(isinstance(view, PendingOutput) for view in views)
    assert (pending.shape, pending.dtype, pending.ndim, len(pending), pending.is_contiguous()) == (
        (2, 6), torch.float32, 2, 2, True,
    )  # fmt: skip
    values.copy_(torch.arange(12.0).view(2, 6))
    promise.kept = True
    found = views[0] + 1
    assert type(found) is torch.Tensor and found.tolist() == [[2, 3, 4], [8, 9, 10]]
    assert float(views[-1].sum()) == 15 and pending.tolist()[1][0] == 6
    assert torch.equal(torch.cat([pending, pending]), torch.arange(12.0).view(2, 6).repeat(2, 1))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x + 1, lambda x: 2 * x, lambda x: x.float() * 1, lambda x: x.to(torch.float64), lambda x: x[0, 0].item(),
        lambda x: bool(x.any()), lambda x: x.tolist(), lambda x: torch.cat([x, x]), lambda x: x.mul_(2), lambda x: x.clone(),
        lambda x: x[:, :3].contiguous(), lambda x: torch.stack([x]), lambda x: x.numpy(), lambda x: torch.zeros(2, 6).add_(x),
        lambda x: torch.where(torch.ones(2, 6, dtype=torch.bool), x, 0), lambda x: float(x[0, 0]),
    ],
)  # fmt: skip
def test_reading_it_before_is_an_error(pending, read):
    with torch.no_grad(), pytest.raises(tilewise.TilewiseError, match="not yet there"):
        read(pending)


def test_cfg_parallel_needs_processes():
    with pytest.raises(tilewise.ConfigError, match=r"CFG parallelism needs one process a GPU: .*torchrun"):
        tilewise.enable_cfg_parallel(wan_cases.tiny_wan.tiny_transformer())
    with pytest.raises(tilewise.ConfigError, match=r"an even number of processes, .* not 3"):
        check_cfg("denoiser", wan_cases.tiny_wan.tiny_transformer(), 3)
    with pytest.raises(tilewise.ConfigError, match="over 3 ranks: each needs a head, and denoiser has 2"):
        check_cfg("denoiser", wan_cases.tiny_wan.tiny_transformer(), 6)
