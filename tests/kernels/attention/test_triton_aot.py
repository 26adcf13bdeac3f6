"""The Triton kernel compiles ahead of time for Ampere and Hopper, without a GPU, and keeps everything in registers."""

import pytest
from ahead_of_time import compile_for, usage
from triton.compiler import ASTSource

from tilewise.kernels.attention.backends.triton import forward_kernel, launch_config

pytestmark = pytest.mark.compile

POINTERS = {"q_ptr": "io", "k_ptr": "io", "v_ptr": "io", "out_ptr": "io", "lse_ptr": "*fp32"}
PLAN = ["q_start", "q_rows", "k_rows", "index", "key_start", "ends", "head_set", "key_encoding", "row_encoding"]


# What a block may take: on Hopper all of it; the other rules also serve consumer GPUs (sm_86, sm_89, sm_120).
SHARED_KIB = {80: 99, 90: 227}


def compiled(capability: int, dtype: str, head_dim: int, intervals: bool):
    itemsize = 4 if dtype == "fp32" else 2
    config = launch_config(head_dim, 128, itemsize, intervals, large_memory=capability == 90)
    constants = {
        "D": head_dim, "BLOCK_D": config["BLOCK_D"], "BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"],
        "BLOCK": 128, "SHARED_SET": True, "HAS_HEAD_SET": False, "HAS_INTERVALS": intervals,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    signature, attributes = {}, {}
    for position, name in enumerate(forward_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = POINTERS[name].replace("io", f"*{dtype}")
        elif name in PLAN:
            signature[name] = "*i32"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        # As at run time: tensors are 16-byte aligned and strides are multiples of 16 elements.
        if signature[name].startswith("*") or name.startswith("stride_"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(forward_kernel, signature=signature, constexprs=constants, attrs=attributes)
    return compile_for(source, capability, num_warps=config["num_warps"], num_stages=config["num_stages"])


@pytest.mark.parametrize("intervals", [False, True])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("bf16", 64), ("bf16", 96), ("bf16", 128), ("fp16", 128), ("fp16", 256)]
)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_spills(capability, dtype, head_dim, intervals):
    kernel = compiled(capability, dtype, head_dim, intervals)
    assert kernel.metadata.shared <= SHARED_KIB[capability] * 1024
    if capability == 90:
        assert "wgmma" in kernel.asm["ptx"]  # Hopper's own matrix instructions, not Ampere's
    used = usage(kernel)
    assert used["spill stores"] == used["spill loads"] == 0, used


@pytest.mark.parametrize("capability", [80, 90])
def test_head_dims_below_the_narrowest_product_compile(capability):
    """tl.dot takes no less than 16 channels, which only a compiler minds: the interpreter takes any number."""
    kernel = compiled(capability, "bf16", 8, intervals=True)
    used = usage(kernel)
    assert used["spill stores"] == used["spill loads"] == 0, used


@pytest.mark.parametrize(("head_dim", "capability"), [(64, 80), (128, 80), (256, 90)])
def test_single_precision_compiles_and_fits(capability, head_dim):
    """Exact fp32 products run without matrix units and may spill; they must fit all the same."""
    kernel = compiled(capability, "fp32", head_dim, intervals=True)
    assert kernel.metadata.shared <= SHARED_KIB[capability] * 1024
