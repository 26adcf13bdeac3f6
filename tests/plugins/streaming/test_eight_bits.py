"""A cache in 8 bits: rounding by its formula, as a naive cache that is quantized row by row, in about half of the memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tilewise
from tests.helpers.causal_reference import ListCache, ListProcessor, tables, turn
from tests.helpers.tiny_wan import tiny_transformer
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.streaming.causal_denoiser import CausalDenoiser
from tilewise.plugins.streaming.kv_cache import KVCache
from tilewise.plugins.streaming.policies.base import policies
from tilewise.plugins.streaming.storage import EightBitRows, exponent_of, power_of_two

H, W, C = 3, 4, 2  # tokens, latent frames of a chunk
SPARSE = tilewise.STA(window=(1, 1, 1), tile=(C, 3, 2))
HEAD = 16
TIME = HEAD - 2 * (2 * (HEAD // 6))  # channels that turn with time
TEXT = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def naive(x: torch.Tensor) -> torch.Tensor:
    """Rows (…, D) through 8 bits and back, one number at a time: a binary point that holds the largest within 448, and 3 bits
    behind the first one, or steps of 2⁻⁹."""
    out = torch.empty_like(x)
    for row, to in zip(x.reshape(-1, x.shape[-1]).tolist(), out.view(-1, x.shape[-1]), strict=True):
        largest = max(map(abs, row))
        e = math.ceil(math.log2(largest / 448)) if largest else 0
        for i, number in enumerate(row):
            scaled = float(torch.tensor(number).float()) / 2.0**e
            step = 2.0 ** max(-9, math.floor(math.log2(abs(scaled))) - 3) if scaled else 1.0
            to[i] = round(scaled / step) * step * 2.0**e
    return out


def rows_of(x: torch.Tensor, groups: list[slice]) -> EightBitRows:
    """(rows, H, D) in a store of its own."""
    store = EightBitRows((1, 1, 1, *x.shape), groups, x.dtype, "cpu")
    store.write(slice(0, x.shape[0]), x[None, None, None])
    return store


def random_rows(rows: int = 24, seed: int = 0) -> torch.Tensor:
    """(rows, 2, 32) float32 of very different sizes, with a row of zeros and one at the border of two exponents."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, 32, generator=generator) * 10.0 ** torch.randint(-6, 6, (rows, 2, 1), generator=generator)
    x[0, 0], x[1, 0, 0] = 0, 448 * 2.0**5
    return x


def test_rows_are_rounded_as_the_formula_says():
    x = random_rows()
    groups = [slice(0, 10), slice(10, 32)]
    store = rows_of(x, groups)
    found = store.read(slice(0, 24), torch.float32)[0, 0, 0]
    assert torch.equal(found, torch.cat([naive(x[..., group]) for group in groups], -1))
    for group in groups:
        part, got = x[..., group], found[..., group]
        unit = power_of_two(exponent_of(part.abs().amax(-1)))[..., None]
        assert ((got - part).abs() <= torch.maximum(part.abs() / 16, unit / 1024)).all()
    assert torch.equal(store.read(slice(0, 24), torch.bfloat16)[0, 0, 0].float(), found)  # nothing is lost there
    again = rows_of(found, groups)
    assert torch.equal(again.read(slice(0, 24), torch.float32)[0, 0, 0], found)


def test_a_group_of_channels_is_written_without_the_others():
    x, groups = random_rows(), [slice(0, 10), slice(10, 32)]
    store = rows_of(x, groups)
    before = store.read(slice(0, 24), torch.float32)
    store.write(slice(4, 8), 1e3 * x[None, None, None, :4, :, :10], slice(0, 10))
    after = store.read(slice(0, 24), torch.float32)
    assert torch.equal(after[..., 10:], before[..., 10:])
    assert torch.equal(after[0, 0, 0, 4:8, :, :10], naive(1e3 * x[:4, :, :10]))
    store.move(slice(4, 6), slice(20, 22))
    assert torch.equal(store.read(slice(20, 22), torch.float32), after[:, :, :, 4:6])


def test_the_error_of_attention_is_within_the_bound_of_rounding():
    """|o' − o| ≤ max b_v + (e^(2η) − 1) · max |v|, keys off by b_k, values by b_v, logits by η = Σ_d |q_d| · b_kd / √D."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, n, 1, HEAD, generator=generator) for n in (8, 40, 40))
    whole = [slice(0, HEAD)]
    off, read = [], []
    for x, groups in ((key, [slice(0, TIME), slice(TIME, HEAD)]), (value, whole)):
        read.append(torch.stack([rows_of(one, groups).read(slice(0, 40), torch.float32)[0, 0, 0] for one in x]))
        unit = [power_of_two(exponent_of(x[..., g].abs().amax(-1)))[..., None].expand_as(x[..., g]) for g in groups]
        off.append(torch.maximum(x.abs() / 16, torch.cat(unit, -1) / 1024))

    def attend(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, keys, values)))

    error = (attend(*read) - attend(key, value)).abs()
    logits = torch.einsum("bqhd,bkhd->bhqk", query.abs(), off[0]).amax(-1, keepdim=True) / HEAD**0.5
    bound = off[1].amax((1, 2, 3))[:, None, None, None] + torch.expm1(2 * logits) * value.abs().max()
    assert (error <= bound).all() and 1e-3 < error.max() < 0.2


class EightBitProcessor(ListProcessor):
    """Earlier frames are seen in 8 bits as they were written; one that was moved has its channels of t turned anew."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        cache = self.cache
        for name in set(cache.positions) - set(cache.new):
            key, value, written, where = cache.stored[name]  # type: ignore[attr-defined]
            if (at := cache.positions[name]) != where:
                moved = naive(self.of_time(self.of_time(written[..., :TIME], -name), at))
                key = torch.cat([moved, key[..., TIME:]], -1)
                cache.stored[name] = key, value, written, at  # type: ignore[attr-defined]
            full = tables([at], self.height, self.width, HEAD)
            cache.frames[name] = turn(key, full[0], -full[1]), value
        out = super().__call__(attn, hidden_states, *args, **kwargs)
        for name in cache.new:
            key, value = cache.frames[name]
            key = turn(key, *tables([name], self.height, self.width, HEAD))
            key = torch.cat([naive(key[..., :TIME]), naive(key[..., TIME:])], -1)
            cache.stored[name] = key, naive(value), key, name  # type: ignore[attr-defined]
        return out

    def of_time(self, x: torch.Tensor, at: int) -> torch.Tensor:
        """(B, tokens, H, TIME) turned by the angles of a frame."""
        cos, sin = tables([abs(at)], self.height, self.width, HEAD)
        half = TIME // 2
        return turn(x, cos[:, :half], sin[:, :half] if at >= 0 else -sin[:, :half])


def clip(frames: int) -> torch.Tensor:
    return torch.randn(1, 4, frames, 2 * H, 2 * W, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def run(model: Any, video: torch.Tensor, cache: KVCache, **options: Any) -> tuple[torch.Tensor, CausalDenoiser]:
    out, dtype = [], next(model.parameters()).dtype
    with CausalDenoiser(model, cache, grid=Grid(C, H, W), **options) as causal:
        for first in range(0, video.shape[2], C):
            causal.begin()
            part = video[:, :, first : first + C].to(dtype)
            causal(torch.randn_like(part), torch.full((1,), 900.0), TEXT.to(dtype))  # a pass that must not stay
            out.append(causal(part, torch.zeros(1), TEXT.to(dtype)))
            causal.commit()
    return torch.cat(out, 2), causal


@torch.no_grad()
@pytest.mark.parametrize("position", ["clamped", "absolute"])
def test_a_stream_equals_a_naive_cache_in_8_bits(position):
    video, plain, caches = clip(10), tiny_transformer(5).double(), []
    for block in plain.blocks:
        caches.append(ListCache())
        caches[-1].stored = {}
        block.attn1.set_processor(EightBitProcessor(caches[-1], H, W))
    wanted = []
    for first in range(0, 10, C):
        own = list(range(first, first + C))
        kept = list(range(min(C, first)))
        ring = list(range(max(C, first - 2), first)) if first >= C else []
        oldest = ring[0] if ring else first
        at = {frame: frame for frame in [*kept, *ring, *own]}
        if position == "clamped":
            at.update({frame: max(frame, oldest - len(kept) + frame) for frame in kept})
        for cache in caches:
            cache.see(at, own)
        wanted.append(plain(video[:, :, first : first + C], torch.zeros(1), TEXT, return_dict=False)[0])
    cache = KVCache(6, C, sink_position=position, storage="fp8")
    got, _ = run(tilewise.patch(tiny_transformer(5).double(), "dense"), video, cache)
    assert (got - torch.cat(wanted, 2)).abs().max() < 1e-9
    exact, _ = run(tilewise.patch(tiny_transformer(5).double(), "dense"), video, KVCache(6, C, sink_position=position))
    assert 1e-4 < (got - exact).norm() / exact.norm() < 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "method"), [*((name, "dense") for name in policies()), ("dual_ema", SPARSE), ("adaptive", SPARSE)]
)
def test_every_policy_in_half_of_the_memory(name, method):
    """bfloat16, five layers in two lanes: what one is brought back to is a tenth of all."""
    model = tilewise.patch(tiny_transformer(5, num_layers=5).bfloat16(), method, steps=(0.0, 1.0))
    found = {}
    for storage in ("model", "fp8"):
        found[storage], causal = run(model, clip(10), KVCache(8, C, policy=name, storage=storage), lanes=2)
        plan = causal.cache_plan()
        assert causal.nbytes == plan.total
        found["bytes", storage] = plan
        assert not tilewise.summary(model).fallbacks
    plain, small = found["bytes", "model"], found["bytes", "fp8"]
    assert small.frames / plain.frames == pytest.approx(
        (2 * HEAD + 3) / (4 * HEAD)
    )  # 35 / 64; of 128 channels 259 / 512
    assert small.one_layer == plain.frames // 10 and small.masters == plain.masters
    error = (found["fp8"] - found["model"]).float().norm() / found["model"].float().norm()
    assert 1e-4 < error < 0.1


@torch.no_grad()
def test_the_state_goes_on_bit_for_bit_and_frames_are_forgotten():
    video, cache = clip(14), KVCache(6, C, policy="dual_ema", storage="fp8")
    model = tilewise.patch(tiny_transformer(5), "dense")

    def going_on(causal: CausalDenoiser) -> torch.Tensor:
        out = []
        for first in range(8, 14, C):
            causal.begin()
            out.append(causal(video[:, :, first : first + C].float(), torch.zeros(1), TEXT.float()))
            causal.commit()
            if first == 8:
                causal.new_shot()
                causal.flush(C)
        return torch.cat(out, 2)

    with CausalDenoiser(model, cache, grid=Grid(C, H, W)) as causal:
        for first in range(0, 8, C):
            causal.begin()
            causal(video[:, :, first : first + C].float(), torch.zeros(1), TEXT.float())
            causal.commit()
        plain, tensors = causal.state_dict()
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        wanted = going_on(causal)
    assert {"key", "key_exponents", "value", "value_exponents"} <= set(tensors)
    with CausalDenoiser(model, cache, grid=Grid(C, H, W)) as causal:
        causal.load_state_dict(plain, tensors)
        assert torch.equal(going_on(causal), wanted)
        assert causal.drop_ring() == [10, 11, 12, 13] and causal.slots.ring == []
    with (
        CausalDenoiser(model, KVCache(6, C, policy="dual_ema"), grid=Grid(C, H, W)) as other,
        pytest.raises(tilewise.ConfigError, match="fp8"),
    ):
        other.load_state_dict(plain, tensors)
    with pytest.raises(tilewise.ConfigError, match="storage must be one of model, fp8"):
        KVCache(storage="int4")
