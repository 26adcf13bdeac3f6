"""Plans in FlashAttention-4's form are the plans: its lists, padding and mask are walked as its kernel walks them.

The kernel itself needs a Hopper or Blackwell GPU; what it does at the edges (only the list's last entry is cut off at the end of
the sequence, missing rows of the last block are read as zeros, table indices are wrapped there) is done here the same way.
"""

from dataclasses import replace

import pytest
import torch
from plan_cases import CHUNK_IDS, CHUNKS, Case
from torch.library import opcheck

from tilewise.kernels.attention.backends.fa4 import _pad, fa4_forward, fa4_op, fa4_unavailable, fa4_unsupported
from tilewise.kernels.attention.backends.fa4_tables import PADDING, ROWS, Fa4Tables, make_tables, seen
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.plans.block_plan import BlockPlan, dense_plan, plan_from_block_map
from tilewise.kernels.plans.layout import Grid, Layout

CASES = [
    Case("aligned", Grid(4, 16, 16), (2, 8, 8), ((1, 2, 1),), block=128),
    Case("aligned, tiles of 3 blocks", Grid(6, 16, 16), (6, 8, 8), ((1, 1, 2),), block=128),
    Case("aligned, windows of heads", Grid(4, 16, 16), (2, 8, 8), ((1, 2, 1), (2, 1, 1)), head_set=(1, 0, 1), heads=3, block=128),
    Case("aligned, a window a head", Grid(4, 16, 16), (2, 8, 8), ((1, 2, 1), (2, 1, 1), (9, 9, 9)), heads=3, block=128),
    Case("aligned, text last", Grid(4, 16, 16, text=40), (2, 8, 8), ((1, 1, 1),), block=128),
    Case("aligned, token window", Grid(4, 16, 16), (2, 8, 8), ((3, 9, 7),), unit="token", block=128),
    Case(
        "aligned, token window, text last", Grid(4, 16, 16, text=77), (2, 8, 8), ((3, 9, 7), (1, 16, 3)),
        unit="token", block=128,
    ),
    Case("short last tile, token window", Grid(1, 1, 500), (1, 1, 128), ((1, 1, 201),), unit="token", block=128),
    Case("ragged", Grid(6, 10, 12), (6, 5, 4), ((1, 1, 2),), block=128),
    Case("ragged borders", Grid(4, 23, 17), (4, 8, 8), ((1, 2, 1),), block=128),
    Case("ragged, text first", Grid(6, 10, 12, text=101, text_first=True), (6, 5, 4), ((1, 2, 1),), block=128),
    Case("ragged, token window", Grid(6, 10, 12), (6, 5, 4), ((6, 7, 5),), unit="token", block=128),
    Case(
        "ragged, token windows of heads, text", Grid(6, 10, 12, text=110), (6, 5, 4), ((6, 7, 5), (3, 3, 11)),
        unit="token", head_set=(1, 1, 0), heads=3, block=128,
    ),
    Case("ragged, strided token window", Grid(6, 10, 12), (6, 5, 4), ((4, 5, 6),), unit="token", stride=(2, 5, 4), block=128),
    Case("one short block", Grid(2, 7, 8), (2, 7, 8), ((1, 1, 1),), block=128),
]  # fmt: skip
IDS = [case.name for case in CASES]


def pair_case() -> BlockPlan:
    """Tiles of two blocks, an even number of them, and a short tile of text without a partner."""
    return Case("pairs", Grid(4, 16, 16, text=30), (4, 8, 8), ((1, 2, 1),), block=128).plan()


def walk(plan: BlockPlan, tables: Fa4Tables, heads: int) -> torch.Tensor:
    """(P, heads, Sq, Sk) int: how often FA4 would add each key to each query."""
    Sq = plan.q_len if tables.q_source is None else len(tables.q_source)
    Sk = plan.k_len if tables.k_source is None else len(tables.k_source)
    P, Nm = tables.full_count.shape[0], -(-Sq // tables.q_rows)
    room = -(-Sk // ROWS) * ROWS
    counts = torch.zeros(P, heads, Nm * tables.q_rows, room, dtype=torch.int32)
    assert tables.full_count.shape[2] == tables.mask_index.shape[2] == Nm
    for p in range(P):
        for head in range(heads):
            h = head if tables.full_count.shape[1] > 1 else 0
            for m in range(Nm):
                rows = torch.arange(m * tables.q_rows, (m + 1) * tables.q_rows)
                for count, index, masked in (
                    (tables.full_count, tables.full_index, False),
                    (tables.mask_count, tables.mask_index, True),
                ):
                    listed = index[p, h, m, : int(count[p, h, m])].tolist()
                    for block in listed:
                        keys = torch.arange(block * ROWS, (block + 1) * ROWS)
                        at_end = block == listed[-1]  # FA4 begins there, and cuts off only there
                        visible = torch.ones(len(rows), ROWS, dtype=torch.bool)
                        if masked:
                            wrap = (rows % Sq, keys % Sk) if at_end else (rows, keys)
                            visible = mask(tables, head, *wrap)
                        if at_end:
                            visible = visible & (keys < Sk) & (rows < Sq)[:, None]
                        counts[p, head, rows[:, None], keys] += visible.int()
    assert not counts[:, :, :Sq, Sk:].any(), "keys beyond the sequence were used"
    counts = counts[:, :, :Sq, :Sk]
    if tables.q_place is not None:
        counts = counts[:, :, tables.q_place]
    if tables.k_padding is not None and tables.k_source is not None:
        assert not counts[..., tables.k_padding].any(), "padding was used"
        kept = torch.ones(Sk, dtype=torch.bool)
        kept[tables.k_padding] = False
        counts = counts[..., kept]
    return counts


def mask(tables: Fa4Tables, head: int, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What ``mask_function`` compiles to."""
    assert tables.key_encoding is not None
    key = tables.key_encoding[keys][None]
    if tables.row_encoding is None:
        return (key != PADDING).expand(len(rows), -1)
    g = 0 if tables.head_set is None else int(tables.head_set[head])
    first, last = tables.row_encoding[g][:, rows][..., None]
    inside = seen(key, first, last)
    return inside | (key < 0) if tables.has_text else inside


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_lists_padding_and_mask_are_the_plan(case):
    plan = case.plan()
    tables = make_tables(plan)
    assert isinstance(tables, Fa4Tables), tables
    assert torch.equal(walk(plan, tables, case.heads), plan.to_mask(case.heads).int())
    assert (tables.q_source is None) == ("ragged" not in case.name)
    assert all(x.dtype == torch.int32 for x in tables[:4])


@pytest.mark.parametrize("case", CHUNKS, ids=CHUNK_IDS)
def test_queries_of_another_layout(case):
    plan = case.plan()
    tables = make_tables(plan)
    assert isinstance(tables, Fa4Tables), tables
    assert torch.equal(walk(plan, tables, case.heads), plan.to_mask(case.heads).int())


@pytest.mark.parametrize(
    "case", [c for c in CASES if "ragged" in c.name], ids=[c.name for c in CASES if "ragged" in c.name]
)
def test_padded_copies_hold_the_rows_and_zeros(case):
    plan = case.plan()
    tables = make_tables(plan)
    x = torch.randn(2, plan.q_len, 2, 4)
    padded = _pad(x, tables.q_source, tables.q_padding)
    assert padded.shape == (2, len(plan.q_rows) * ROWS, 2, 4)
    assert torch.equal(padded[:, tables.q_place], x)
    assert not padded[:, tables.q_padding].any()
    assert len(tables.q_padding) + plan.q_len == padded.shape[1]


def test_attention_through_the_tables():
    """Numbers, too: padded tensors, keys masked with the tables' mask, output gathered back."""
    case = next(c for c in CASES if c.name == "ragged, token windows of heads, text")
    plan = case.plan()
    tables = make_tables(plan)
    q, k, v = case.tensors(torch.float64)
    k, v = k[:, :, :1], v[:, :, :1]
    padded_q = _pad(q, tables.q_source, tables.q_padding)
    padded_k, padded_v = (_pad(x, tables.k_source, tables.k_padding) for x in (k, v))
    full = torch.zeros(1, case.heads, padded_q.shape[1], padded_k.shape[1], dtype=torch.bool)
    kept = torch.ones(full.shape[-1], dtype=torch.bool)
    kept[tables.k_padding] = False
    full[:, :, tables.q_place[:, None], kept.nonzero().flatten()] = walk(plan, tables, case.heads).bool()
    out, lse = masked_attention(padded_q, padded_k, padded_v, full)
    expected, expected_lse = masked_attention(q, k, v, plan.to_mask(case.heads))
    assert torch.allclose(out[:, tables.q_place], expected)
    assert torch.allclose(lse[:, :, tables.q_place], expected_lse)


def test_lists_of_samples_and_rows_without_keys():
    layout = Layout(Grid(4, 16, 16), (2, 8, 8))
    maps = torch.rand(2, 3, layout.blocks, layout.blocks, generator=torch.Generator().manual_seed(0)) < 0.4
    maps[:, :, 1] = False
    plan = plan_from_block_map(layout, maps)
    tables = make_tables(plan)
    counts = walk(plan, tables, 3)
    assert torch.equal(counts, plan.to_mask(3).int())
    assert not counts[:, :, ROWS : 2 * ROWS].any()


def test_query_blocks_in_pairs():
    plan = pair_case()
    tables = make_tables(plan, pairs=True)
    assert isinstance(tables, Fa4Tables)
    assert tables.q_rows == 2 * ROWS
    assert tables.full_count.shape[2] == (len(plan.q_rows) + 1) // 2
    assert torch.equal(walk(plan, tables, 2), plan.to_mask(2).int())
    odd = Case("odd tiles", Grid(6, 16, 16), (6, 8, 8), ((1, 1, 1),), block=128).plan()
    assert "two by two" in make_tables(odd, pairs=True)


def test_a_dense_plan_needs_no_mask():
    plan = dense_plan(Layout(Grid(4, 16, 16), (2, 8, 8)))
    tables = make_tables(plan)
    assert tables.key_encoding is None
    assert not tables.mask_count.any()
    assert torch.equal(walk(plan, tables, 1), torch.ones(1, 1, 1024, 1024, dtype=torch.int32))


def test_the_mask_is_the_intervals_for_every_coordinate():
    generator = torch.Generator().manual_seed(1)
    case = Case("large", Grid(2, 511, 4), (2, 16, 4), ((1, 200, 3),), unit="token", block=128)
    plan = case.plan()
    tables = make_tables(plan)
    rows = torch.randint(0, plan.q_len, (300,), generator=generator)
    keys = torch.randint(0, plan.k_len, (400,), generator=generator)
    expected = plan.visible(0, rows, keys)
    assert bool((plan.ends[0, 0, :, 2] > plan.ends[0, 0, :, 1]).all()), "every row must be tested"
    assert torch.equal(mask(tables, 0, rows, keys), expected)
    only_padding = tables._replace(key_encoding=torch.full((1,), PADDING, dtype=torch.int32))
    assert not mask(only_padding, 0, rows, torch.zeros(1, dtype=torch.long)).any()


def test_refusals_say_why():
    ragged = Case("small blocks", Grid(4, 12, 12), (2, 6, 6), ((1, 1, 1),), block=128).plan()
    assert "1.78 × the sequence" in make_tables(ragged)
    wide = Case("wide", Grid(1, 1, 1024), (1, 1, 128), ((1, 1, 301),), unit="token", block=128).plan()
    assert "beyond 510" in make_tables(wide)
    few = dense_plan(Layout(Grid(4, 16, 16), (2, 8, 8)))
    two_sets = {"index": few.index.expand(1, 2, -1, -1), "ends": few.ends.expand(1, 2, -1, -1)}
    many = replace(few, **two_sets, head_set=torch.zeros(1 << 22, dtype=torch.int32), _cache={})
    assert "GiB" in make_tables(many)
    gap = replace(wide, k_start=wide.k_start + 1, _cache={})
    assert "consecutive" in make_tables(gap)


def test_a_short_block_outside_of_the_intervals_is_refused():
    """FA4's masked list has one mask: intervals that do not hold for a short block listed as visible would hide it."""
    case = next(c for c in CASES if c.name == "ragged, token window")
    plan = case.plan()
    position = int(plan.ends[0, 0, 0, 1])
    assert make_tables(plan).key_encoding is not None
    ends = plan.ends.clone()
    ends[0, 0, 0, 1] = position + 1  # its first partial block, now said to be wholly visible
    assert "outside of the intervals" in make_tables(replace(plan, ends=ends, _cache={}))


def test_tables_are_made_once_and_misfits_are_cheap():
    plan = CASES[0].plan()
    q = torch.zeros(1, plan.q_len, 2, 64, dtype=torch.bfloat16)
    assert fa4_unsupported(q, q, q, plan) is None
    (tables,) = plan._cache.values()
    assert fa4_unsupported(q, q, q, plan) is None
    assert next(iter(plan._cache.values())) is tables
    assert "16-bit" in fa4_unsupported(q.float(), q.float(), q.float(), plan)
    wide = torch.zeros(1, plan.q_len, 2, 136, dtype=torch.bfloat16)
    assert "136" in fa4_unsupported(wide, wide, wide, plan)
    narrow = wide[..., :8]
    assert "8 is not a multiple of 8 from 16" in fa4_unsupported(narrow, narrow, narrow, plan)
    ragged = Case("small blocks", Grid(4, 12, 12), (2, 6, 6), ((1, 1, 1),), block=128).plan()
    small = torch.zeros(1, ragged.q_len, 2, 64, dtype=torch.bfloat16)
    assert "1.78" in fa4_unsupported(small, small, small, ragged)
    with pytest.raises(ValueError, match=r"fa4_forward.*1\.78"):
        fa4_forward(small, small, small, ragged, 0.1)


def test_missing_on_a_cpu():
    assert "NVIDIA GPU" in fa4_unavailable(torch.device("cpu"))


def test_the_operators_shapes_without_a_gpu():
    plan = next(c for c in CASES if c.name == "ragged, token window").plan()
    made = make_tables(plan)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        tables = [torch.empty_like(x, device="cuda") if isinstance(x, torch.Tensor) else x for x in made]
        q = torch.empty(2, plan.q_len, 4, 64, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(2, plan.k_len, 2, 64, dtype=torch.bfloat16, device="cuda")
        out, lse = fa4_op(q, k, k, *tables, 0.125)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((2, 4, plan.q_len), torch.float32)


@pytest.mark.gpu
def test_opcheck():
    if why := fa4_unavailable(torch.device("cuda")):
        pytest.skip(why)
    plan = next(c for c in CASES if c.name == "ragged, token window").plan("cuda")
    q = torch.randn(1, plan.q_len, 2, 64, dtype=torch.bfloat16, device="cuda")
    opcheck(fa4_op, (q, q, q, *make_tables(plan), 0.125))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_against_the_reference(case, dtype):
    """On a Hopper GPU: no worse than twice the error of PyTorch's arithmetic in the same type."""
    if why := fa4_unavailable(torch.device("cuda")):
        pytest.skip(why)
    case = replace(case, head_dim=64)
    plan = case.plan("cuda")
    q, k, v = case.tensors(dtype, "cuda")
    if case.heads != case.kv_heads:
        k, v = k[:, :, :1], v[:, :, :1]
    if why := fa4_unsupported(q, k, v, plan):
        pytest.skip(why)
    out, lse = fa4_forward(q, k, v, plan, 0.125)
    seen_by = plan.to_mask(case.heads).cuda()
    expected, expected_lse = masked_attention(q, k, v, seen_by, dtype=torch.float64)
    rounded, _ = masked_attention(q, k, v, seen_by, dtype=dtype)
    assert (out - expected).abs().max() <= 2 * (rounded - expected).abs().max() + 1e-3
    assert torch.allclose(lse.double(), expected_lse, atol=1e-2)
