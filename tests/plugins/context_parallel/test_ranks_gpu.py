"""Split over two GPUs as on one: fused kernels, the Hopper kernel, 8 bits, NCCL, a whole clip."""

from __future__ import annotations

import gpu_cases
import gpu_ranks
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, and there are {torch.cuda.device_count()}"
    ),
]


@pytest.fixture(scope="module")
def found():
    return gpu_ranks.run_cases("gpu_cases", 2)


@pytest.mark.parametrize("name", gpu_cases.cases())
def test_two_gpus_equal_one(found, name):
    """To rounding in bfloat16: matrix products over other numbers of rows need not sum in the same order. Where scores are all
    but equal, that changes which blocks are chosen."""
    assert found[name]["error"] is not None, found[name]["said"]
    assert found[name]["error"] <= (0.1 if "draft" in name or "auto" in name else 0.02)
    for said in found[name]["said"]:
        assert ("sparse" in said["kinds"]) == ("dense" not in name)
        if name.startswith("Wan"):
            assert said["fused"] == said["calls"]
