"""The 8-bit Hopper kernel compiles without a GPU: 8-bit wgmma, operands that stay where they are, everything in registers."""

import re

import pytest
import torch
from ahead_of_time import compile_for, report, usage
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from tilewise.kernels.attention import triton_quantize
from tilewise.kernels.attention.backends.hopper_8bit import _descriptor, hopper_8bit_kernel, launch_config
from tilewise.kernels.attention.dispatch_8bit import BLOCK
from tilewise.kernels.attention.quantize import VALUES

pytestmark = pytest.mark.compile

TYPES = {"int8": "i8", "fp8": "fp8e4nv"}
FLOATS = ["lse_ptr", "q_facts", "kv_scales", "v_facts", "bias"]
PLAN = ["q_start", "q_rows", "k_rows", "index", "key_start", "ends", "head_set", "key_encoding", "row_encoding"]
PLAN += ["mean_index", "mean_ends"]


def compiled(precision: str, head_dim: int, intervals: bool, heads: bool, means: bool):
    constants = {
        "D": head_dim, "BLOCK_N": BLOCK, "SHARED_SET": not heads, "HAS_HEAD_SET": heads, "HAS_INTERVALS": intervals,
        "HAS_MEANS": means,
        "O_SHARED": gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2), **launch_config(head_dim),
    }  # fmt: skip
    # As the launch describes them: one block of each is enough to see its type, piece and layout.
    rows = {
        "q_desc": _descriptor(torch.empty(BLOCK, head_dim, dtype=torch.int8), 64),
        "k_desc": _descriptor(torch.empty(BLOCK, head_dim, dtype=torch.int8), BLOCK),
        "v_desc": _descriptor(torch.empty(head_dim, BLOCK, dtype=VALUES[precision][0]), head_dim),
    }
    signature, attributes = {}, {}
    for position, name in enumerate(hopper_8bit_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in rows:
            dtype = TYPES[precision] if name == "v_desc" else "i8"
            signature[name] = f"tensordesc<{dtype}{rows[name].block_shape},{rows[name].layout!r}>"
        elif name == "out_ptr":
            signature[name] = "*bf16"
        elif name in (*FLOATS, *PLAN):
            signature[name] = "*fp32" if name in FLOATS else "*i32"
        else:
            signature[name] = "fp32" if name in ("scale", "even_bias") else "i32"
        if signature[name].startswith("*") or name.startswith("stride_o"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(hopper_8bit_kernel, signature, constants, attributes)
    return compile_for(source, 90, num_warps=4)


@pytest.mark.parametrize(
    ("precision", "head_dim", "intervals", "heads", "means"),
    [
        ("int8", 128, False, False, True),
        ("int8", 128, True, True, False),
        ("int8", 64, True, True, True),
        ("fp8", 128, False, False, True),
    ],
)
def test_compiles(precision, head_dim, intervals, heads, means):
    kernel = compiled(precision, head_dim, intervals, heads, means)
    ptx = kernel.asm["ptx"]
    assert kernel.metadata.shared <= 227 * 1024
    assert f"wgmma.mma_async.sync.aligned.m64n{BLOCK}k32.s32.s8.s8" in ptx
    values = {"int8": "s32.s8.s8", "fp8": "f32.e4m3.e4m3"}[precision]
    # Scores read both operands from shared memory (descriptors); values take the weights from four registers.
    assert re.search(rf"m64n{head_dim}k32\.{re.escape(values)} \{{[^}}]*\}}, \{{%r\d+,%r\d+,%r\d+,%r\d+\}}", ptx)
    assert "setmaxnreg" in ptx  # the consumers take the producer's registers
    assert "st.shared.b8" not in ptx  # the weights are not exchanged through memory
    used = usage(kernel)
    # The interval test keeps a few loop-invariant addresses in local memory; the accumulators stay in registers.
    assert used["spill stores"] <= (64 if intervals else 0), used
    assert "serialized" not in report(kernel), report(kernel)


@pytest.mark.parametrize(
    ("name", "precision"), [("queries", "int8"), ("keys", "int8"), ("values", "int8"), ("values", "fp8")]
)
def test_quantization_compiles(name, precision):
    kernel = getattr(triton_quantize, f"quantize_{name}_kernel")
    dtype, largest = VALUES[precision]
    constants = {"D": 128, "R": BLOCK, "INTEGER": dtype == torch.int8, "LARGEST": largest}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = {
        "starts": "*i32",
        "rows": "*i32",
        "heads": "i32",
        "group": "i32",
        "scale": "fp32",
        "first": "i32",
        "blocks": "i32",
    }
    types |= {f"{name[0]}_ptr": "*bf16", "out": f"*{TYPES[precision]}"}
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        else:
            signature[argument] = types.get(argument, "i32" if argument.startswith("stride") else "*fp32")
        if signature[argument].startswith("*") or argument.startswith("stride"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    done = compile_for(source, 90, num_warps=4)
    assert usage(done)["spill stores"] == 0, usage(done)
    assert "st.global.v4" in done.asm["ptx"]  # whole rows of bytes, transposed or not
