"""Each addition on a GPU in 16 bits gives what it gives on the CPU in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import tilewise
from tests.helpers.tiny_unets import tiny_unet

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
# 64 channels and 2 heads: a head dimension that the kernels take.
WIDE: dict[str, Any] = {"block_out_channels": (64, 64, 64), "norm_num_groups": 8}
CASES = {
    "hidiffusion": ("hidiffusion", "raunet:t1=1"),
    "both changes": ("hidiffusion", "raunet:t1=1:t2=1"),
    "sta": (tilewise.STA(window=(1, 3, 3), tile=(1, 8, 8)), "raunet:t1=1"),
    "guidance": ("dense", "soft-pag:heads=0.1,mid:u=0.5"),
    "guidance, sparse": (tilewise.STA(window=(1, 3, 3), tile=(1, 8, 8)), "soft-pag:u=0.5"),
    "agents": ("dense", "agent:steps=1"),
    "merged": ("dense", "agent:steps=0"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_same_on_a_gpu(case):
    method, add = CASES[case]
    model = tiny_unet("sdxl", **WIDE)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(2, 4, 96, 80, generator=generator), "timestep": torch.tensor(999),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=generator),
    }  # fmt: skip
    outs = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float16)):
        unet = copy.deepcopy(model).to(device, dtype)
        given = {name: x.to(device, dtype) if x.is_floating_point() else x.to(device) for name, x in inputs.items()}
        before = [len(module._forward_pre_hooks) for module in unet.modules()]
        with torch.no_grad(), tilewise.patched(unet, method, steps=(0, 1), min_tokens=1, add=add):
            outs.append(unet(**given, return_dict=False)[0].float().cpu())
            assert not tilewise.summary(unet).fallbacks
        assert [len(module._forward_pre_hooks) for module in unet.modules()] == before
    error = float((outs[1] - outs[0]).norm() / outs[0].norm())
    assert error < 0.02, f"{case}: relative error {error:.1e}"
