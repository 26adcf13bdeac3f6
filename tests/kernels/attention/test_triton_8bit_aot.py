"""The portable 8-bit kernel compiles without a GPU: 8-bit products, weights that stay where they are, everything in registers."""

import pytest
from test_triton_aot import PLAN, SHARED_KIB, ptxas_usage

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from tilewise.kernels.attention.backends.triton_8bit import forward_8bit_kernel, launch_config  # noqa: E402

pytestmark = pytest.mark.compile

BYTES = {"int8": "*i8", "fp8": "*fp8e4nv"}
FLOATS = ["q_facts", "kv_scales", "v_facts", "lse_ptr"]


def compiled(capability: int, precision: str, head_dim: int, block: int, intervals: bool):
    config = launch_config(block, divmod(capability, 10))
    warps = config.pop("num_warps")
    constants = {
        "D": head_dim, "BLOCK": block, "SHARED_SET": False, "HAS_HEAD_SET": False, "HAS_INTERVALS": intervals,
        "INTERPRETED": False, **config,
    }  # fmt: skip
    types = {"q_ptr": "*i8", "k_ptr": "*i8", "v_ptr": BYTES[precision], "out_ptr": "*bf16", "scale": "fp32"}
    types |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(PLAN, "*i32")
    signature, attributes = {}, {}
    for position, name in enumerate(forward_8bit_kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name].startswith("*") or name.startswith("stride_o"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(forward_8bit_kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": config["STAGES"]}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("capability", "precision", "head_dim", "block", "intervals"),
    [
        (80, "int8", 128, 128, False),
        (80, "int8", 64, 128, True),
        (89, "fp8", 128, 128, False),
        (90, "int8", 128, 128, False),
        (90, "int8", 128, 64, True),
    ],
)
def test_compiles_without_spills(capability, precision, head_dim, block, intervals, tmp_path):
    kernel = compiled(capability, precision, head_dim, block, intervals)
    ptx = kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED_KIB[90 if capability == 90 else 80] * 1024
    if capability == 90:
        assert f"wgmma.mma_async.sync.aligned.m64n{block}k32.s32.s8.s8" in ptx
    else:
        assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8" in ptx
        if precision == "fp8":
            assert "e4m3.e4m3" in ptx
    usage = ptxas_usage(ptx, capability, tmp_path)
    assert usage["spill stores"] == usage["spill loads"] == 0, usage
