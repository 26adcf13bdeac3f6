"""The Hopper kernel compiles without a GPU: warp-specialised wgmma, within a multiprocessor's shared memory, in registers."""

import pytest
import torch
from ahead_of_time import compile_for, report, usage
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from tilewise.kernels.attention.backends.hopper import BLOCK, as_rows, hopper_kernel, launch_config

pytestmark = pytest.mark.compile

PLAN = ["q_start", "q_rows", "k_rows", "index", "key_start", "ends", "head_set", "key_encoding", "row_encoding"]
MEANS = ["mean_index", "mean_ends"]


def compiled(dtype: str, head_dim: int, intervals: bool, heads: bool, means: bool):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    constants = {
        "D": head_dim, "BLOCK_N": BLOCK, "SHARED_SET": not heads, "HAS_HEAD_SET": heads, "HAS_INTERVALS": intervals,
        "HAS_MEANS": means, **launch_config(head_dim),
    }  # fmt: skip
    signature, attributes = {}, {}
    for position, name in enumerate(hopper_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_desc"):
            signature[name] = f"tensordesc<{dtype}[{64 if name == 'q_desc' else BLOCK}, {head_dim}],{layout!r}>"
        elif name == "out_ptr":
            signature[name] = f"*{dtype}"
        elif name in ("lse_ptr", "bias"):
            signature[name] = "*fp32"
        elif name in PLAN + MEANS:
            signature[name] = "*i32"
        else:
            signature[name] = "fp32" if name in ("scale", "even_bias") else "i32"
        if signature[name].startswith("*") or name.startswith("stride_o"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(hopper_kernel, signature, constants, attributes)
    return compile_for(source, 90, num_warps=4)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "intervals", "heads", "means"),
    [
        ("bf16", 128, False, False, False),
        ("bf16", 128, False, False, True),
        ("bf16", 128, True, False, False),
        ("bf16", 128, True, True, True),
        ("bf16", 64, False, True, False),
        ("fp16", 64, True, False, True),
        ("fp16", 128, False, False, False),
    ],
)
def test_compiles(dtype, head_dim, intervals, heads, means):
    kernel = compiled(dtype, head_dim, intervals, heads, means)
    assert kernel.metadata.shared <= 227 * 1024
    assert "wgmma" in kernel.asm["ptx"]
    assert "setmaxnreg" in kernel.asm["ptx"]  # the consumers take the producer's registers
    used = usage(kernel)
    # The interval test keeps a few loop-invariant addresses in local memory; the accumulators stay in registers.
    assert used["spill stores"] <= (64 if intervals else 0), used
    # ptxas says so where it puts a wait behind every wgmma: half of the speed would be gone without any other sign.
    assert "serialized" not in report(kernel), report(kernel)


def test_only_what_the_copy_engine_cannot_read_is_copied():
    fused = torch.randn(2, 10, 3 * 4 * 64, dtype=torch.bfloat16)
    for x in (
        fused[..., :256].unflatten(2, (4, 64)),
        fused[..., 256:512].unflatten(2, (4, 64)),
        fused[:1, 3:, :64].unflatten(2, (1, 64)),
    ):
        assert as_rows(x) is x
    heads_first = torch.randn(2, 4, 10, 64, dtype=torch.bfloat16).transpose(1, 2)
    odd = torch.randn(1, 10 * 64 + 1, dtype=torch.bfloat16)[:, 1:].view(1, 10, 1, 64)
    gap = torch.randn(2, 12, 4, 64, dtype=torch.bfloat16)[:, :10]
    for x in (heads_first, odd, gap):
        copy = as_rows(x)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
        assert torch.equal(copy, x)
