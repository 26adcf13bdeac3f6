"""The portable kernels compile ahead of time for chips that are not here, fit them, and keep everything in registers.

A few instances of every chip, in turn, so that each head dimension is there; ``python -m examples.list_tiles`` compiles all.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from examples import units  # noqa: E402
from examples.list_tiles import rows_of_page  # noqa: E402
from tilewise.kernels.attention import ahead_of_time, tuned  # noqa: E402
from tilewise.kernels.attention.ahead_of_time import (  # noqa: E402
    Compiled,
    Instance,
    compile_instance,
    compiled,
    dtypes_of,
    instances,
    single,
)
from tilewise.kernels.attention.backends.tiles import HEAD_DIMS, TILES, Tile, no_tile, tile_of  # noqa: E402
from tilewise.kernels.attention.backends.triton import launch_config  # noqa: E402
from tilewise.kernels.attention.backends.triton_8bit import launch_config as launch_config_8bit  # noqa: E402
from tilewise.kernels.attention.dispatch_8bit import HEAD_DIMS as EIGHT_BIT_HEAD_DIMS  # noqa: E402
from tilewise.kernels.chips import CHIPS  # noqa: E402

pytestmark = pytest.mark.compile

PAGE = ROOT / "docs/tiles.md"
# Mostly with partial blocks, which need most registers, and of each chip one or two head dimensions.
SOME = [
    *(("triton", "sm_80", 128, True), ("triton", "sm_80", 64, False), ("triton", "sm_86", 256, True)),
    *(("triton", "sm_89", 128, True), ("triton", "sm_89", 96, False), ("triton", "sm_90", 128, True)),
    *(("triton", "sm_90", 128, False), ("triton", "sm_90", 256, True), ("triton", "sm_100", 128, True)),
    *(("triton", "sm_100", 64, False), ("triton", "sm_120", 128, True), ("triton", "sm_120", 96, True)),
    *(("triton", "gfx942", 128, True), ("triton", "gfx1100", 64, True)),
    *(("triton-8bit", "sm_80", 128, False), ("triton-8bit", "sm_86", 64, True), ("triton-8bit", "sm_89", 128, True)),
    *(
        ("triton-8bit", "sm_90", 128, False),
        ("triton-8bit", "sm_100", 128, False),
        ("triton-8bit", "sm_120", 128, True),
    ),
]
FP8 = ("triton-8bit", "sm_89", 128, False)


def instance_of(kernel: str, chip: str, head_dim: int, intervals: bool, dtype: str = "") -> Instance:
    facts = CHIPS[chip]
    tile = tile_of(kernel, facts, head_dim, intervals)
    return Instance(kernel, facts, head_dim, intervals, tile, dtype or dtypes_of(kernel, facts)[0])


@pytest.mark.parametrize("some", SOME, ids=lambda some: " ".join(map(str, some)))
def test_compiles_without_spills_as_the_page_says(some):
    instance = instance_of(*some)
    found = compile_instance(instance)
    assert found.wrong(instance) is None
    # Products by the chip's own instructions, not by an older one's; Blackwell has no int8 ones of its own.
    want = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma", "gfx1100": "wmma"}
    assert found.product == ("mma" if instance.dtype == "int8" and some[1] == "sm_100" else want.get(some[1], "mma"))
    # Another version of Triton may need a few registers more or less.
    said = rows_of_page(PAGE.read_text("utf-8"))[str(instance)]
    assert said.shared == pytest.approx(found.shared, abs=1024) and abs(said.registers - found.registers) <= 24


@pytest.mark.parametrize(
    ("some", "dtype", "products"),
    [
        (("triton-8bit", "sm_80", 128, False), "int8", ["mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8"]),
        (FP8, "fp8", ["mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8", "e4m3.e4m3"]),
        (("triton-8bit", "sm_90", 128, False), "int8", ["wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"]),
    ],
    ids=["sm_80 int8", "sm_89 fp8", "sm_90 int8"],
)
def test_eight_bits_are_multiplied_as_such(some, dtype, products):
    ptx = compiled(instance_of(*some, dtype)).asm["ptx"]
    assert all(product in ptx for product in products)


def test_the_page_has_every_instance_and_each_is_good():
    said = rows_of_page(PAGE.read_text("utf-8"))
    there = list(instances())
    assert {str(instance) for instance in there} == said.keys(), "python -m examples.list_tiles > docs/tiles.md"
    assert [why for instance in there if (why := said[str(instance)].wrong(instance))] == []
    chips = {(instance.kernel, instance.chip.name, instance.head_dim, instance.intervals) for instance in there}
    for kernel, (chip, facts), head_dim, intervals in itertools.product(TILES, CHIPS.items(), HEAD_DIMS, (False, True)):
        none = no_tile(kernel, facts, head_dim)
        assert (none is None) == ((kernel, chip, head_dim, intervals) in chips)
        # All but: where every tile spills; in 8 bits, other head dimensions, and AMD.
        eight = kernel == "triton-8bit" and (head_dim not in EIGHT_BIT_HEAD_DIMS or chip.startswith("gfx"))
        assert (none is not None) == (eight or (chip, head_dim) == ("gfx1100", 256))


def test_the_page_computes_with_these_tiles():
    assert units.table() in PAGE.read_text("utf-8"), "python -m examples.list_tiles > docs/tiles.md"
    a100, rtx = units.CARDS[0], units.CARDS[4]
    assert units.clocks(a100, 64, 8) == (2048, 512, 704, 2048)  # 128 × 64 × 128 × 4 / 2048, and so on
    assert units.clocks(rtx, 32, 8) == (8192, 512, 480, 2048)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (Compiled(128, 100 * 1024, 0, "mma"), "takes 100.0 KiB of shared memory, a block has 99"),
        (Compiled(255, 48 * 1024, 8, "mma"), "spills 8 bytes of a thread"),
        (Compiled(128, 48 * 1024, 0, ""), "uses no matrix instruction"),
    ],
)
def test_what_must_not_be_shipped_is_told(found, why):
    assert why in found.wrong(Instance("triton", CHIPS["sm_89"], 128, False, Tile(128, 32, 2, 8)))


@pytest.mark.parametrize(
    ("tile", "taken", "chip", "blocks"),
    [
        (Tile(128, 32, 2, 8), Compiled(196, 48 * 1024, 0, "mma"), "sm_89", 1),  # by registers
        (Tile(64, 32, 3, 4), Compiled(128, 16 * 1024, 0, "mma"), "sm_89", 4),  # by registers
        (Tile(64, 32, 3, 4), Compiled(64, 24 * 1024, 0, "mma"), "sm_89", 4),  # by shared memory: 25 KiB each of 100
        (Tile(64, 32, 3, 8), Compiled(24, 1024, 0, "mma"), "sm_89", 6),  # by threads
        (Tile(64, 32, 3, 8), Compiled(24, 1024, 0, "mma"), "sm_80", 8),
    ],
)
def test_occupancy_is_the_least_of_three(tile, taken, chip, blocks):
    assert taken.blocks(Instance("triton", CHIPS[chip], 128, False, tile)) == blocks


def test_head_dims_below_the_narrowest_product_compile():
    """tl.dot takes no less than 16 channels, which only a compiler minds: the interpreter takes any number."""
    instance = Instance("triton", CHIPS["sm_80"], 8, True, tile_of("triton", CHIPS["sm_80"], 8, True))
    assert compile_instance(instance).wrong(instance) is None


def test_single_precision_compiles_and_fits():
    """Exact fp32 products run without matrix units and may spill; they must fit all the same."""
    instance = single("sm_80", 128)
    found = compile_instance(instance)
    assert found.wrong(instance) is None and found.product == ""


def test_the_launch_goes_by_the_table_and_by_what_was_tuned():
    chip = CHIPS["sm_89"]
    usual = launch_config(128, 128, 2, False, chip)
    assert usual == {"BLOCK_D": 128, "BLOCK_M": 128, "BLOCK_N": 32, "num_stages": 2, "num_warps": 8}
    assert launch_config(40, 32, 2, True, chip) == {
        "BLOCK_D": 64, "BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 3, "num_warps": 4,
    }  # fmt: skip
    eight = {"BLOCK_M": 64, "BLOCK_N": 64, "STAGES": 2, "num_warps": 4}
    assert (
        launch_config_8bit(128, 64, False, chip, "int8") == eight
    )  # no more rows than a block of the plan has room for
    hopper = [launch_config_8bit(128, 128, False, CHIPS["sm_90"], dtype) for dtype in ("int8", "fp8")]
    assert [config.get("maxnreg") for config in hopper] == [
        168,
        None,
    ]  # three programs on a multiprocessor; e4m3 would spill
    tiles = {("triton", 128, False): (128, 64, 2, 8), ("triton", 128, True): (256, 256, 9, 8)}
    try:
        tuned.use({"cuda:0": ("sm_89", tuned.TunedKernels(tiles))})
        assert launch_config(128, 128, 2, False, chip)["BLOCK_N"] == 64
        assert launch_config(128, 128, 2, True, chip)["BLOCK_N"] == 32  # no tile of the table: it was never compiled
        assert launch_config(128, 128, 2, False, CHIPS["sm_86"]) == usual
        assert launch_config_8bit(128, 128, False, chip, "int8")["BLOCK_N"] == 64  # another kernel's
    finally:
        tuned.use({})


def test_registers_and_stack_are_read_from_what_was_assembled(tmp_path):
    """A kernel that cannot but spill is seen to."""
    ptx = tmp_path / "spill.ptx"
    words = [f"%r{i}" for i in range(300)]
    loads = "".join(f"ld.global.volatile.u32 {word}, [%p+{4 * i}];\n" for i, word in enumerate(words))
    stores = "".join(f"st.global.volatile.u32 [%p+{4 * i}], {word};\n" for i, word in enumerate(words))
    ptx.write_text(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 a) {\n"
        f".reg .u32 %r<300>;\n.reg .u64 %p;\nld.param.u64 %p, [a];\n{loads}bar.sync 0;\n{stores}ret;\n}}\n"
    )
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    cubin = tmp_path / "spill.cubin"
    subprocess.run([ptxas, "--gpu-name=sm_80", ptx, "-o", cubin], check=True)
    registers, stack = ahead_of_time.cubin_usage(cubin.read_bytes())
    assert registers >= 250 and stack > 0
