"""Dynamic methods inside the window of a KV cache: what they choose, what comes out, what is counted and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import tilewise
from tests.helpers.tiny_wan import tiny_transformer
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.kernels.selection.select import GOLDEN
from tilewise.plugins.methods.base import DynamicMethod, Method, Planned
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.dynamic import map_method
from tilewise.plugins.methods.xattention import XAttention
from tilewise.plugins.runtime.observers import ObservedCall
from tilewise.plugins.runtime.sparse_call import Group, Part, choose, run_part
from tilewise.plugins.streaming.causal_denoiser import CausalDenoiser
from tilewise.plugins.streaming.kv_cache import KVCache
from tilewise.plugins.streaming.sparse_window import SparseWindow, choose_chunk_tile

C, H, W = 2, 5, 6  # a ragged grid for tiles of (2, 2, 3)
TILE = (2, 2, 3)
CHUNK = Layout(Grid(C, H, W), TILE)
CPU = torch.device("cpu")
SCALE = 0.3
TEXT = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
TURNS = [(0,), (0, 1), (0, 1, 2, 3), (0, 3, 1, 2, 4), (0, 2, 3, 1, 4)]


def tensors(order: tuple[int, ...], seed: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(query of the newest chunk, keys and values of the window) with 4 query and 2 key heads."""
    generator = torch.Generator().manual_seed(seed)
    S, tokens = CHUNK.grid.tokens, CHUNK.grid.tokens * len(order)
    query = 2 * torch.randn(batch, S, 4, 16, generator=generator)
    key, value = (torch.randn(batch, tokens, 2, 16, generator=generator) for _ in range(2))
    return query, key, value


def plan_call(method: DynamicMethod, window: WindowKeys, *qkv: torch.Tensor) -> Planned:
    return method.plan_call(window.chunk, *qkv, SCALE, {}, 0, window)


def rows_of(layout: Layout, chunks: int) -> list[slice]:
    """The rows of each block of a window's memory: those of a chunk, again and again."""
    return [
        slice(chunk * layout.grid.tokens + start, chunk * layout.grid.tokens + start + n)
        for chunk in range(chunks)
        for start, n in zip(layout.block_start.tolist(), layout.block_rows.tolist(), strict=True)
    ]


def blocks(mask: torch.Tensor, chunks: int) -> torch.Tensor:
    """(…, Nq, Nk) of a mask of tokens in which all of a block see the same."""
    found = torch.stack([mask[..., rows.start, :] for rows in rows_of(CHUNK, 1)], -2)
    return torch.stack([found[..., rows.start] for rows in rows_of(CHUNK, chunks)], -1)


def naive_logits(query: torch.Tensor, key: torch.Tensor, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, s²) of the draft, (B, H, Nq, Nk) float64, one pair of blocks at a time."""
    queries, keys = rows_of(CHUNK, 1), rows_of(CHUNK, chunks)
    logits = torch.zeros(len(query), 4, len(queries), len(keys), dtype=torch.float64)
    spread = torch.zeros_like(logits)
    for b, h in ((b, h) for b in range(len(query)) for h in range(4)):
        for i, own in enumerate(queries):
            mean = query[b, own, h].double().mean(0)
            for j, other in enumerate(keys):
                there = key[b, other, h // 2].double()
                s2 = float(SCALE**2 * (mean**2 * there.var(0, unbiased=False)).sum())
                limit = 2 * math.log(len(there))
                term = s2 / 2 if s2 <= limit else math.sqrt(s2 * limit) - limit / 2
                logits[b, h, i, j] = SCALE * float(mean @ there.mean(0)) + math.log(len(there)) + term
                spread[b, h, i, j] = s2
    return logits, spread


def naive_rows(logits: torch.Tensor, kept: int, target: dict[str, float]) -> torch.Tensor:
    """Row by row: the kept chunks and itself first, then the best until it is enough."""
    Nq, Nk = logits.shape[-2:]
    rows = [rows.stop - rows.start for rows in rows_of(CHUNK, Nk // Nq)]
    found = torch.zeros(logits.shape, dtype=torch.bool)
    for b, h, i in ((b, h, i) for b in range(len(logits)) for h in range(4) for i in range(Nq)):
        mass = logits[b, h, i].softmax(-1).tolist()
        weight = mass if "recall" in target else [n / sum(rows) for n in rows]
        aim = target["recall"] if "recall" in target else target["density"] - (i * GOLDEN % 1) / Nk
        chosen = [j for j in range(Nk) if j < kept * Nq or j == Nk - Nq + i]
        total = sum(weight[j] for j in chosen)
        for j in sorted(set(range(Nk)) - set(chosen), key=lambda j: -mass[j]):
            if total >= aim:
                break
            chosen.append(j)
            total += weight[j]
        found[b, h, i, chosen] = True
    return found


@pytest.mark.parametrize("turn", TURNS, ids=str)
@pytest.mark.parametrize("target", [{"density": 0.37}, {"recall": 0.6}], ids=str)
def test_the_choice_is_the_naive_one(turn, target):
    """By the formula in float64 at every turn of the ring; density and recall are what comes of it."""
    window = WindowKeys(CHUNK, turn, kept=min(1, len(turn) - 1))
    qkv = tensors(turn, len(turn), batch=2)
    found = plan_call(Draft(**target, safety=1.0, each=False, compensate=False), window, *qkv)
    logits, _ = naive_logits(*qkv[:2], len(turn))
    wanted = naive_rows(logits, window.kept, target)
    assert torch.equal(blocks(found.plan.to_mask(4), len(turn)), wanted)
    q_rows, k_rows = CHUNK.block_rows.double(), CHUNK.block_rows.double().repeat(len(turn))
    density = torch.einsum("bhij,i,j->", wanted.double(), q_rows, k_rows) / (8 * q_rows.sum() * k_rows.sum())
    recall = ((logits.softmax(-1) * wanted).sum(-1) * q_rows).sum(-1).mean() / q_rows.sum()
    assert found.plan.device_density is not None and found.recall is not None
    assert float(found.plan.device_density) == pytest.approx(float(density), rel=1e-5)
    assert float(found.recall) == pytest.approx(float(recall), rel=1e-4)


@pytest.mark.parametrize("method", [Draft(density=0.3, probe=7), XAttention(density=0.3, probe=7, stride=4)], ids=str)
def test_skipped_blocks_are_their_means(method):
    """The output is one softmax over the keys that are kept and a row for each block that is not; the probe's recall is exact."""
    turn = (0, 3, 1, 2, 4)
    window = WindowKeys(CHUNK, turn, kept=1)
    qkv = tensors(turn, 7)
    found = plan_call(method, window, *qkv)
    part = Part(Group(None, None, 0), CHUNK, found, choose(qkv, found.plan, None)[0])
    out = run_part(qkv, part, SCALE)
    query, key, value = (x.double().transpose(1, 2) for x in qkv)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    mask = found.plan.to_mask(4)
    scores = SCALE * query @ key.transpose(2, 3)
    kept = blocks(mask, len(turn))
    assert kept[..., : CHUNK.blocks].all() and not kept.all()
    _, s2 = naive_logits(*qkv[:2], len(turn))
    log_n = CHUNK.block_rows.double().log().repeat(len(turn))
    term = torch.where(s2 <= 2 * log_n, s2 / 2, (2 * s2 * log_n).sqrt() - log_n)
    bias = (log_n + term).masked_fill(kept, -torch.inf)
    means = [torch.stack([x[:, :, rows].mean(2) for rows in rows_of(CHUNK, len(turn))], 2) for x in (key, value)]
    of_query = torch.repeat_interleave(CHUNK.block_rows)
    summaries = SCALE * query @ means[0].transpose(2, 3) + bias[:, :, of_query]
    weights = torch.cat([scores.masked_fill(~mask, -torch.inf), summaries], -1).softmax(-1)
    wanted = (weights @ torch.cat([value, means[1]], 2)).transpose(1, 2)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
    at = (torch.arange(7) * 2 + 1) * CHUNK.grid.tokens // 14
    assert found.probe is not None
    assert float(found.probe) == pytest.approx(float((scores.softmax(-1) * mask).sum(-1)[:, :, at].mean()), rel=1e-4)


STA, NEIGHBORS = tilewise.STA(window=(2, 3, 1)), tilewise.Neighborhood(window=(5, 3, 4))
SAME = {
    "recall": Draft(recall=0.5, safety=1.0, tile=TILE),
    "top k": Draft(density=0.3, select="topk", always=("neighbours",), tile=TILE),
    "first frame": Draft(recall=0.4, each=False, always=("first-frame", "self"), tile=TILE, compensate=False),
    "antidiagonals": XAttention(recall=0.6, stride=4, tile=TILE),
    "in tiles": Draft(recall=0.5, safety=1.0, tile=TILE, within=STA),
    "in tokens": Draft(recall=0.3, safety=1.0, tile=TILE, within=NEIGHBORS, always=()),
    "training size": XAttention(recall=0.3, safety=1.0, stride=4, tile=TILE, within=tilewise.Inward(native=(3, 3))),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 2, 0, 3), (0, 2, 1, 3)], ids=str)
def test_the_plan_is_that_of_the_whole_clip(name, order):
    """Rows of the newest chunk of a clip that attends to itself choose as they do over a window, wherever its keys lie."""
    method, window = SAME[name], WindowKeys(CHUNK, order)
    whole, S = window.layout, CHUNK.grid.tokens
    generator = torch.Generator().manual_seed(3)
    query, key, value = (2 * torch.randn(1, whole.grid.tokens, n, 16, generator=generator) for n in (4, 2, 2))
    clip = method.plan_call(whole, query, key, value, SCALE, {}, 0)
    in_memory = torch.cat([torch.arange(S) + S * chunk for chunk in order])
    found = plan_call(method, window, query[:, -S:], key[:, in_memory], value[:, in_memory])
    mask = clip.plan.to_mask(4)[:, :, -S:, in_memory]
    assert torch.equal(found.plan.to_mask(4), mask)
    assert not mask.all() and mask.any(-1).all()
    assert float(found.plan.device_density) == pytest.approx(float(mask.double().mean()), rel=1e-5)
    if clip.compensation is not None:
        bias = clip.compensation.bias[:, :, -CHUNK.blocks :][..., window.in_time]
        torch.testing.assert_close(found.compensation.bias, bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["head", "shared"])
def test_pairs_that_compete_with_each_other_reach_the_density(rule):
    window = WindowKeys(CHUNK, (0, 2, 1, 3), kept=1)
    found = plan_call(Draft(density=0.45, select=rule), window, *tensors(window.order, 5))
    assert float(found.plan.device_density) == pytest.approx(0.45, abs=0.03)
    assert found.plan.to_mask(4)[..., : CHUNK.grid.tokens].all()


@pytest.mark.parametrize(("order", "kept"), [((0, 2, 1), 0), ((1, 0, 2), 1), ((0, 0, 2), 0), ((0, 1), 3)])
def test_orders_that_cannot_be(order, kept):
    with pytest.raises(ValueError, match="order must have each"):
        WindowKeys(CHUNK, order, kept)
    with pytest.raises(ValueError, match="must divide a chunk"):
        WindowKeys(Layout(Grid(3, H, W), TILE), (0, 1))


# ── through a denoiser ───────────────────────────────────────────────────────────────────────────────────────────────


def velocities(method: Method | str, cache: KVCache, frames: int, seen: list[ObservedCall] | None = None, **kwargs):
    model = tilewise.patch(tiny_transformer(3), method, steps=(0.0, 1.0), **kwargs)
    if seen is not None:
        model._tilewise.state.observers.append(seen.append)
    video = torch.randn(1, 4, frames, 2 * H, 2 * W, generator=torch.Generator().manual_seed(2))
    out = []
    with torch.no_grad(), CausalDenoiser(model, cache, grid=Grid(C, H, W)) as causal:
        for first in range(0, frames, C):
            causal.begin()
            out.append(causal(video[:, :, first : first + C], torch.full((1,), 200.0), TEXT))
            causal.commit()
    return torch.cat(out, 2), model


@pytest.mark.parametrize("policy", ["fixed", "ema", "dual_ema", "adaptive"])
def test_a_density_of_one_is_dense(policy):
    cache = KVCache(window=6, sink=C, policy=policy)
    dense, _ = velocities("dense", cache, 16)
    sparse, model = velocities(Draft(density=1.0, min_tokens=0), cache, 16)
    assert (sparse - dense).abs().max() < 1e-4 * dense.abs().max()
    assert {row.kind for row in tilewise.summary(model).rows} == {"sparse"}


@pytest.mark.parametrize("method", ["draft", "xattention"])
@pytest.mark.parametrize("policy", ["fixed", "dual_ema"])
def test_calls_are_counted_and_sink_and_memory_are_kept(method, policy):
    """At every turn of the ring."""
    cache = KVCache(window=8, sink=C, policy=policy)
    kind = Draft if method == "draft" else XAttention
    seen: list[ObservedCall] = []
    sparse, model = velocities(kind(density=0.5, tile=TILE, min_tokens=0), cache, 20, seen)
    dense, _ = velocities("dense", cache, 20)
    assert 1e-3 < (sparse - dense).abs().mean() / dense.abs().mean() < 0.1
    report = tilewise.summary(model)
    assert {row.kind for row in report.rows} == {"sparse"} and not report.fallbacks
    masks = [call.plan.to_mask(2) for call in seen if call.plan is not None]
    pairs = [mask.double().mean() * mask[0, 0].numel() for mask in masks]
    assert report.density == pytest.approx(float(sum(pairs)) / sum(mask[0, 0].numel() for mask in masks), rel=1e-5)
    assert all(0.5 < row.recall <= 1 for row in report.rows)
    tokens, sizes = H * W, {call.key.shape[1] // (H * W) for call in seen}
    assert max(sizes) == 8 + (2 * C if policy == "dual_ema" else 0)
    for call, mask in zip(seen, masks, strict=True):
        memory = max(0, call.key.shape[1] - 8 * tokens)
        assert mask[..., : memory + C * tokens].all()
        assert call.layout is None and call.draft is not None
        assert call.draft.shape[2:] == (CHUNK.blocks, CHUNK.blocks * call.key.shape[1] // (C * tokens))


def test_what_a_choice_does_not_look_at_does_not_tell_turns_apart():
    """One CUDA graph serves all turns, unless the method asks where in time a block stands."""
    turns = [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 4, 5, 2, 3, 6, 7]
    for always, alike in ((("self",), True), (("self", "neighbours"), False)):
        window = SparseWindow(Draft(always=always), Grid(C, H, W), KVCache(window=8, sink=C), 0)
        assert (window.keys(turns[0], False) is window.keys(turns[1], False)) == alike
        assert (window.turn(turns[0]) == window.turn(turns[1])) == alike
        assert window.keys(turns[1], False).order == ((0, 1, 2, 3) if alike else (0, 2, 1, 3))


@dataclass(frozen=True)
class Whole(DynamicMethod):
    """Plans for equally many queries and keys alone."""

    name: ClassVar[str] = "whole"

    def layout(self, grid: Grid) -> Layout:
        return Layout(grid, TILE)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (Draft(refresh=2, min_tokens=0), "refresh=2 keeps a choice for 2 steps"),
        (Whole(), "the method whole does not plan for more keys than queries"),
        (XAttention(tile=(1, 1, 1), min_tokens=0), "cuts 6×5×6 into 180 blocks"),
        (Draft(tile=(4, 2, 2), min_tokens=0), "do not divide a chunk"),
    ],
    ids=str,
)
def test_what_cannot_be_sparse_is_dense_and_counted(method, reason, monkeypatch):
    monkeypatch.setattr(map_method, "MAX_BLOCKS", 150)
    cache = KVCache(window=6)
    dense, _ = velocities("dense", cache, 8)
    got, model = velocities(method, cache, 8)
    assert torch.equal(got, dense)
    assert any(reason in found for found in tilewise.summary(model).fallbacks)
    with pytest.raises(tilewise.FallbackError, match=reason):
        velocities(method, cache, 8, strict=True)


@pytest.mark.parametrize("threshold", ["method", "patch"])
def test_windows_with_few_keys_are_dense_and_short(threshold):
    """The number of keys decides: here of the second chunk on."""
    least = 2 * C * H * W
    method = Draft(density=0.3, min_tokens=least if threshold == "method" else 0)
    _, model = velocities(method, KVCache(window=6), 8, strict=True, min_tokens=least if threshold == "patch" else None)
    kinds = {row.kind: row.calls for row in tilewise.summary(model).rows}
    assert kinds == {"short": 2, "sparse": 6}


def test_no_kernel_takes_a_call_in_8_bits_on_a_cpu():
    with pytest.raises(tilewise.FallbackError, match="not in int8: Triton kernels need a CUDA device, not cpu"):
        velocities(Draft(min_tokens=0), KVCache(window=6), 4, strict=True, precision="int8")


def test_whole_chunks_stay_when_the_ring_is_flushed():
    """Rows are in tile order, of which a frame is no part."""
    model = tilewise.patch(tiny_transformer(3), Draft(density=0.4, min_tokens=0), steps=(0.0, 1.0))
    video = torch.randn(1, 4, 5 * C, 2 * H, 2 * W, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), CausalDenoiser(model, KVCache(window=8, sink=C), grid=Grid(C, H, W)) as causal:
        for first in range(0, 4 * C, C):
            causal.begin()
            causal(video[:, :, first : first + C], torch.full((1,), 200.0), TEXT)
            causal.commit()
        causal.flush(1)
        assert causal.slots.frames == [0, 1, 6, 7]
        causal.begin()
        assert causal.keys().order == (0, 1, 2)


@pytest.mark.parametrize(
    ("shape", "fewest"), [((3, 30, 52), 0.0), ((2, 8, 8), 16.0), ((2, 16, 16), 10.7), ((1, 4, 4), 9.0)]
)
def test_a_small_window_has_smaller_tiles(shape, fewest):
    tile = choose_chunk_tile(shape, fewest)
    count = math.prod(-(-n // t) for n, t in zip(shape, tile, strict=True))
    assert math.prod(tile) <= 16 or count >= fewest


@pytest.mark.gpu
@pytest.mark.parametrize("method", [Draft(density=0.3), Draft(recall=0.7), XAttention(density=0.3)], ids=str)
def test_planning_waits_for_nothing_on_a_gpu(method):
    """And it captures into a CUDA graph, which chooses anew at every replay."""
    chunk = Layout(Grid(3, 30, 52), (3, 6, 7))
    window = WindowKeys(chunk, (0, 2, 3, 1, 4), kept=1)
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(1, n, 4, 64, generator=generator).to("cuda", torch.bfloat16)
        for n in (chunk.grid.tokens, window.layout.grid.tokens, window.layout.grid.tokens)
    ]

    def attend() -> torch.Tensor:
        found = method.plan_call(chunk, *qkv, 0.125, {}, 0, window)
        return run_part(tuple(qkv), Part(Group(None, None, 0), chunk, found, choose(qkv, found.plan, None)[0]), 0.125)

    attend()
    torch.cuda.set_sync_debug_mode("error")
    try:
        wanted = attend()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for x in qkv:
        x.mul_(-1.5)
    graph.replay()
    first = out.clone()
    for x in qkv:
        x.div_(-1.5)
    graph.replay()
    assert not torch.equal(first, out)
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), scale=0.125)
    # Of random keys, 0.3 of the pairs and the means of the others leave 0.72 of the output as error; a wrong row, over 1.
    assert (out - dense.transpose(1, 2)).abs().mean() < 0.9 * dense.abs().mean()
