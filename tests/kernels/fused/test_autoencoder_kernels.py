"""The kernels of video autoencoders against PyTorch's own operators in float64: the CPU path, the same checks for Triton in its
CPU interpreter, and what compiles ahead of time for a GPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.fused.test_fused_kernels import check_code, compiled, poisoned, rounded_once
from tilewise.kernels.fused.rms_norm_silu import add_in_place, rms_norm_silu
from tilewise.kernels.fused.upsample_nearest import upsample_nearest

pytestmark = pytest.mark.interpreted
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


def oracle(s: torch.Tensor, weight: torch.Tensor, silu: bool = True) -> torch.Tensor:
    n = F.normalize(s.double(), dim=-1) * s.shape[-1] ** 0.5 * weight.double()
    return F.silu(n) if silu else n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", ["", "bias", "residual", "bias residual"])
@pytest.mark.parametrize(("S", "C"), [(1, 3), (37, 96), (5, 40), (3, 384)])
def test_rms_norm_silu(S, C, given, dtype):
    x, residual = (poisoned(torch.randn(2, S, C).to(dtype) * 3) for _ in range(2))
    weight, bias = 1 + 0.3 * torch.randn(C), torch.randn(C).to(dtype)
    parts = {name: part for name, part in (("bias", bias), ("residual", residual)) if name in given}
    s = (x.double() + sum(part.double() for part in parts.values())).to(dtype)
    before = x.clone()
    n = rms_norm_silu(x, weight, **parts)
    assert n.is_contiguous() and torch.equal(x, before)
    rounded_once(n, oracle(s, weight))
    rounded_once(rms_norm_silu(x, weight, silu=False, **parts), oracle(s, weight, False))

    room = torch.full((2, S + 5, C), torch.nan, dtype=dtype)
    assert rms_norm_silu(x, weight, out=room[:, 2:-3], keep_sum=True, **parts).data_ptr() == room[:, 2:].data_ptr()
    assert torch.equal(room[:, 2:-3], n) and room[:, :2].isnan().all() and room[:, -3:].isnan().all()
    rounded_once(x, before.double() + sum(part.double() for part in parts.values()))
    x.copy_(before)
    rounded_once(add_in_place(x, **parts), before.double() + sum(part.double() for part in parts.values()))


def test_zeros_and_large_values():
    """The norm of nothing is nothing, as ``F.normalize`` has it; a sum of squares past float16 is none past float32."""
    x = torch.zeros(1, 2, 64, dtype=torch.float16)
    x[0, 1] = 300
    n = rms_norm_silu(x, torch.ones(64))
    assert torch.equal(n[0, 0], torch.zeros(64, dtype=torch.float16))
    rounded_once(n[0, 1], F.silu(torch.ones(64).double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(("T", "H", "W", "C"), [(1, 1, 1, 3), (3, 5, 7, 24), (2, 3, 2, 384)])
def test_upsample_nearest(T, H, W, C, frames, dtype):
    x = torch.randn(2, T, H, W, frames * C).to(dtype)
    images = x.view(2, T, H, W, frames, C).permute(0, 1, 4, 5, 2, 3).reshape(-1, C, H, W)
    want = F.interpolate(images.float(), scale_factor=2, mode="nearest-exact").to(dtype)
    got = upsample_nearest(x, frames)
    assert got.is_contiguous()
    assert torch.equal(got, want.view(2, frames * T, C, 2 * H, 2 * W).permute(0, 1, 3, 4, 2))


@pytest.mark.skipif(INTERPRETED, reason="runs once, in the ordinary process")
class TestEntryPoints:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": torch.ones(5, 32)}, ValueError, r"must be \(B, S, C\)"),
            ({"x": torch.ones(1, 32, 5).transpose(1, 2)}, ValueError, "contiguous channels"),
            ({"x": torch.ones(1, 5, 32).double()}, TypeError, "float64"),
            ({"weight": torch.ones(31)}, ValueError, r"weight must be \(32,\)"),
            ({"bias": torch.ones(1, 32)}, ValueError, r"bias must be \(32,\)"),
            ({"residual": torch.ones(1, 4, 32)}, ValueError, r"residual must be \(1, 5, 32\)"),
            ({"residual": torch.ones(1, 5, 32, device="meta")}, ValueError, "one device"),
            ({"out": torch.ones(1, 5, 32).half()}, TypeError, "out must have x's dtype"),
        ],
    )
    def test_bad_rms_norm_silu(self, change, error, message):
        arguments = {"x": torch.ones(1, 5, 32), "weight": torch.ones(32)} | change
        with pytest.raises(error, match=message):
            rms_norm_silu(**arguments)

    @pytest.mark.parametrize(
        ("x", "frames", "error", "message"),
        [
            (torch.ones(1, 2, 3, 4), 1, ValueError, r"must be \(B, T, H, W, frames·C\)"),
            (torch.ones(1, 2, 3, 4, 5), 2, ValueError, "frames=2"),
            (torch.ones(1, 2, 3, 4, 5).transpose(2, 3), 1, ValueError, "contiguous"),
            (torch.ones(1, 2, 3, 4, 5).long(), 1, TypeError, "int64"),
        ],
    )
    def test_bad_upsample_nearest(self, x, frames, error, message):
        with pytest.raises(error, match=message):
            upsample_nearest(x, frames)


@pytest.mark.compile
@pytest.mark.skipif(INTERPRETED, reason="runs once, in the ordinary process")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels", [96, 384])
class TestAheadOfTime:
    @pytest.mark.parametrize("absent", ["bias residual", "bias", "weight out", ""], ids=lambda x: f"no {x}")
    def test_rms_norm_silu(self, channels, absent, capability):
        pytest.importorskip("triton")
        from tilewise.kernels.fused.triton_rms_norm_silu import launch_config, rms_norm_silu_kernel

        config = launch_config(channels)
        warps = config.pop("num_warps")
        constants = {"C": channels, "KEEP_SUM": absent != "bias residual", "SILU": True, **config}
        constants |= {f"{name}_ptr": None for name in absent.split()}
        kernel = compiled(rms_norm_silu_kernel, constants, "bf16", capability, warps)
        check_code(kernel)

    @pytest.mark.parametrize("frames", [1, 2])
    def test_upsample_nearest(self, channels, frames, capability):
        pytest.importorskip("triton")
        from tilewise.kernels.fused.triton_upsample_nearest import launch_config, upsample_nearest_kernel

        config = launch_config(channels)
        warps = config.pop("num_warps")
        kernel = compiled(upsample_nearest_kernel, {"K": frames, "C": channels, **config}, "bf16", capability, warps)
        check_code(kernel)
