"""Two paths against two rows written out by hand, block by block; what is cached, reused and computed at all."""

from __future__ import annotations

import dataclasses
import gc

import family_cases
import pytest
import test_kandinsky5
import test_skyreels
import tiny_wan
import torch
from diffusers import LTXVideoTransformer3DModel
from every_family import CASES as EVERY_FAMILY

import tilewise
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError, TilewiseError, UnsupportedModelError
from tilewise.plugins.guidance.cross_attention_cache import CrossAttentionCache
from tilewise.plugins.guidance.dual_path import two_paths
from tilewise.plugins.guidance.pooled_attention import pooled_attention, pooling_of
from tilewise.plugins.methods.inward import Inward
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.runtime.call_stats import GLOBAL_PATH, SPARSE

METHOD = Inward(native=(4, 4), temperature=False)


def inputs(batch=1, frames=3, height=16, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, frames, height, width, generator=generator)
    return x, torch.randn(batch, 16, tiny_wan.TEXT_DIM, generator=generator)


def wan_attention(attn, x, context, rotary, mask):
    """WanAttention written out: projections, norms, rotation, masked softmax in float64."""
    q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
    q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (q, k, v))
    if rotary is not None:
        cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]

        def rotate(y):
            a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

        q, k = rotate(q), rotate(k)
    return attn.to_out[0](masked_attention(q, k, v, mask)[0].to(x.dtype).flatten(2))


def naive(model, x, timestep, text, mask, cross_given=None):
    """Two rows through every block, in raster order: returns the window row's output and the cross-attention of each block."""
    rotary = model.rope(x)
    h = model.patch_embedding(x).flatten(2).transpose(1, 2)
    f = h.clone()
    temb, proj, context, _ = model.condition_embedder(timestep, text, None, timestep_seq_len=None)
    crosses = []
    for number, block in enumerate(model.blocks):
        shift, scale, gate, shift2, scale2, gate2 = (block.scale_shift_table + proj.unflatten(1, (6, -1))).chunk(6, 1)

        def own(row, seen, block=block, shift=shift, scale=scale, gate=gate):
            n = block.norm1(row) * (1 + scale) + shift
            return row + wan_attention(block.attn1, n, n, rotary, seen) * gate

        def feed(row, cross, block=block, shift2=shift2, scale2=scale2, gate2=gate2):
            row = row + cross
            return row + block.ffn(block.norm3(row) * (1 + scale2) + shift2) * gate2

        if cross_given is None:
            f = own(f, None)
            cross = wan_attention(block.attn2, block.norm2(f), context, None, None)
            f = feed(f, cross)
        else:
            cross = cross_given[number]
        crosses.append(cross)
        h = feed(own(h, mask), cross)
    shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, 1)
    out = model.proj_out(model.norm_out(h) * (1 + scale) + shift)
    t, height, width = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
    out = out.reshape(len(x), t, height, width, 1, 2, 2, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return out.flatten(6, 7).flatten(4, 5).flatten(2, 3), crosses


def window_mask(grid, native):
    def axis(length, half):
        start = (torch.arange(length) - half).clamp(0, max(length - 2 * half - 1, 0))
        at = torch.arange(length)
        return (at >= start[:, None]) & (at <= start[:, None] + 2 * half)

    h, w = axis(grid.h, native[0] // 2), axis(grid.w, native[1] // 2)
    mask = h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
    return mask.expand(grid.t, grid.h, grid.w, grid.t, grid.h, grid.w).reshape(grid.tokens, grid.tokens)


@pytest.mark.parametrize(
    ("batch", "frames", "native"),
    [(1, 3, (4, 4)), (2, 3, (4, 4)), (1, 1, (4, 4)), (1, 3, (4, 9)), (1, 2, (11, 3)), (2, 1, (12, 2))],
    ids=["one", "batch", "one frame", "wider than the grid", "higher", "an image higher than the grid"],
)
def test_refresh_and_reuse_are_the_two_rows(batch, frames, native):
    model = tiny_wan.tiny_transformer()
    x, text = inputs(batch, frames)
    later = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    mask = window_mask(Grid(frames, 8, 6), native)
    first, then = torch.full((batch,), 900.0), torch.full((batch,), 700.0)
    with torch.no_grad():
        wanted, crosses = naive(model, x, first, text, mask)
        reused, _ = naive(model, later, then, text, mask, crosses)
        fresh, _ = naive(model, later, then, text, mask)
        stock = model(x, first, text).sample
        tilewise.patch(model, Inward(native=native, temperature=False), steps=(0, 1), strict=True)
        alone = model(x, first, text).sample
        with two_paths(model, refresh=2) as paths:
            torch.testing.assert_close(model(x, first, text).sample, wanted, atol=2e-5, rtol=2e-5)
            calls = tilewise.summary(model).calls
            torch.testing.assert_close(model(later, then, text).sample, reused, atol=2e-5, rtol=2e-5)
            assert tilewise.summary(model).calls == calls + 2  # the window path's layers and nothing else
            assert vars(paths["denoiser"].counts) == {"refreshed": 1, "reused": 1, "unguided": 0}
        with two_paths(model, refresh=1) as paths:
            for y, t, w in ((x, first, wanted), (later, then, fresh)):
                torch.testing.assert_close(model(y, t, text).sample, w, atol=2e-5, rtol=2e-5)
            assert paths["denoiser"].cache.on_device == 0  # nothing is kept that nobody asks for again
        assert torch.equal(model(x, first, text).sample, alone)
    assert (wanted - alone).abs().max() > 1e-3
    assert (reused - fresh).abs().max() > 1e-3
    assert (wanted - stock).abs().max() > 1e-3


def test_the_full_path_alone_is_stock():
    """Where the window sees everything both paths are the same, and the output is stock's."""
    model = tiny_wan.tiny_transformer()
    x, text = inputs()
    with torch.no_grad():
        stock = model(x, torch.tensor([500.0]), text).sample
        tilewise.patch(model, Inward(native=(99, 99)), steps=(0, 1), strict=True)
        with two_paths(model, refresh=1):
            torch.testing.assert_close(model(x, torch.tensor([500.0]), text).sample, stock, atol=2e-5, rtol=2e-5)


def test_no_row_is_computed_that_nobody_uses():
    model = tiny_wan.tiny_transformer(num_layers=3)
    ran = []
    for number, block in enumerate(model.blocks):
        block.ffn.register_forward_hook(lambda *_, n=number: ran.append(f"ffn {n}"))
        block.attn2.to_q.register_forward_hook(lambda *_, n=number: ran.append(f"cross {n}"))
    x, text = inputs()
    tilewise.patch(model, METHOD, steps=(0, 1))
    with torch.no_grad(), two_paths(model, refresh=2):
        model(x, torch.tensor([900.0]), text)
        # Both paths' feed-forward, but for the full path's last; the window path asks for no cross-attention.
        assert ran == ["cross 0", "ffn 0", "ffn 0", "cross 1", "ffn 1", "ffn 1", "cross 2", "ffn 2"]
        ran.clear()
        model(x, torch.tensor([800.0]), text)
        assert ran == ["ffn 0", "ffn 1", "ffn 2"]


def call(pipe, steps=4, prompt="a red circle", **options):
    return pipe(
        prompt, num_inference_steps=steps, guidance_scale=3.0, output_type="latent", max_sequence_length=16,
        generator=torch.Generator().manual_seed(0), **{"height": 64, "width": 48, "num_frames": 5, **options},
    ).frames  # fmt: skip


def test_branches_of_a_pipeline():
    """Guidance in two calls: each text has its own cache; a second clip starts anew and frees the first one's."""
    pipe = tiny_wan.tiny_pipeline()
    stock = call(pipe)
    tilewise.patch(pipe, METHOD, steps=(0, 1))
    with two_paths(pipe, refresh=3) as on:
        paths = on["transformer"]
        first = call(pipe)
        assert vars(paths.counts) == {"refreshed": 2 * 2, "reused": 2 * 2, "unguided": 0}  # steps 0 and 3, two texts
        size = paths.cache.on_device
        assert torch.equal(call(pipe), first)
        gc.collect()
        assert torch.equal(call(pipe), first)
        assert paths.cache.on_device == size
        call(pipe, height=32)
        with_uncond = paths.counts.refreshed
        embeds, negative = pipe.encode_prompt("a star", "a square", max_sequence_length=16)
        for _ in range(2):  # the same tensors: told apart by the schedule
            given = call(pipe, 2, None, prompt_embeds=embeds, negative_prompt_embeds=negative)
        assert paths.counts.refreshed == with_uncond + 2 * 2
        assert given.isfinite().all()
    assert paths.cache.on_device == 0
    with two_paths(pipe, refresh=2, guided="cond") as on:
        other = call(pipe)
        assert vars(on["transformer"].counts) == {"refreshed": 2, "reused": 2, "unguided": 4}
    assert (other - first).abs().max() > 1e-4
    rows = {row.kind for row in tilewise.summary(pipe).rows}
    assert rows == {SPARSE, GLOBAL_PATH}
    tilewise.unpatch(pipe)
    assert torch.equal(call(pipe), stock)


def test_two_denoisers():
    pipe = tiny_wan.tiny_pipeline(boundary_ratio=0.8)
    tilewise.patch(pipe, METHOD, steps=(0, 1))
    with two_paths(pipe, refresh=2) as on:
        call(pipe, 6)
    assert set(on) == {"transformer", "transformer_2"}
    assert all(paths.counts.refreshed for paths in on.values())


def test_a_timestep_per_token():
    pipe = tiny_wan.tiny_pipeline(expand_timesteps=True)
    tilewise.patch(pipe, METHOD, steps=(0, 1), strict=True)
    with two_paths(pipe, refresh=1):
        guided = call(pipe, 2)
    with two_paths(pipe, refresh=1, global_path="pooled", pool=(1, 1)):
        torch.testing.assert_close(call(pipe, 2), guided, atol=1e-4, rtol=1e-4)


def test_nothing_is_left_behind():
    model = tiny_wan.tiny_transformer()
    before = {
        name: (sorted(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks))
        for name, m in model.named_modules()
    }
    tilewise.patch(model, METHOD, steps=(0, 1))
    x, text = inputs()

    def interrupted():
        with torch.no_grad(), two_paths(model, global_path="pooled"):
            model(x, torch.tensor([900.0]), text)
            handle = model.blocks[1].attn2.to_q.register_forward_hook(
                lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            try:
                model(x, torch.tensor([950.0]), inputs(seed=3)[1])
            finally:
                handle.remove()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    tilewise.unpatch(model)
    after = {
        name: (sorted(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks))
        for name, m in model.named_modules()
    }
    assert after == before


# ── LTX: cross-attention with a mask ─────────────────────────────────────────────────────────────────────────────────


def test_ltx():
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=2,
        caption_channels=8,
    ).eval()  # fmt: skip
    x, text = torch.randn(1, 2 * 8 * 6, 4), torch.randn(1, 5, 8)
    arguments = {
        "encoder_hidden_states": text, "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]), "num_frames": 2,
        "height": 8, "width": 6, "return_dict": False,
    }  # fmt: skip
    seen = []
    with torch.no_grad():
        watch = model.transformer_blocks[1].attn2.register_forward_hook(lambda m, a, out: seen.append(out))
        stock = model(x, timestep=torch.tensor([900.0]), **arguments)[0]
        tilewise.patch(model, METHOD, steps=(0, 1), strict=True)
        order = METHOD.layout(Grid(2, 8, 6)).permutation
        alone = model(x, timestep=torch.tensor([900.0]), **arguments)[0]
        with two_paths(model, refresh=2) as paths:
            guided = model(x, timestep=torch.tensor([900.0]), **arguments)[0]
            # The window path was given what a dense forward computes there.
            torch.testing.assert_close(seen[-1], seen[0][:, order], atol=1e-5, rtol=1e-5)
            model(x, timestep=torch.tensor([800.0]), **arguments)
            assert torch.equal(seen[-1], seen[-2])
            assert paths["denoiser"].counts.reused == 1
        watch.remove()
    assert (guided - alone).abs().max() > 1e-4
    assert (guided - stock).abs().max() > 1e-4


# ── others with cross-attention: stock forwards with a mask by hand, and the full row's cross-attention put into the window's ──

OTHERS = {
    "skyreels": lambda: (test_skyreels.denoiser(), test_skyreels.inputs(3, 8, 6), "attn2"),
    "skyreels, a timestep a frame": lambda: (
        test_skyreels.denoiser(), test_skyreels.inputs(3, 8, 6, forcing=True), "attn2"
    ),
    "kandinsky 5": lambda: (
        test_kandinsky5.denoiser(), test_kandinsky5.inputs(3, 8, 6), "cross_attention"
    ),
}  # fmt: skip


def stock_rows(model, given, cross, crosses=None):
    """The window row's output, and each block's cross-attention in the full row."""
    modules = [module for name, module in model.named_modules() if name.split(".")[-1] == cross]
    mask, told = window_mask(Grid(3, 8, 6), (4, 4))[None, None], []
    if crosses is None:
        crosses = told
        watch = [m.register_forward_hook(lambda m, a, out: told.append(out)) for m in modules]
        model(**given)
        for handle in watch:
            handle.remove()
    put = [m.register_forward_hook(lambda m, a, out, x=x: x) for m, x in zip(modules, crosses, strict=True)]
    with family_cases.masked_attention(model, mask, 3 * 8 * 6) as calls:
        out = model(**given).sample
    for handle in put:
        handle.remove()
    assert len(calls) == len(modules)
    return out, crosses


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_the_two_rows(name):
    model, given, cross = OTHERS[name]()
    later = {**given, "timestep": given["timestep"] * 0.7}
    later["hidden_states"] = given["hidden_states"] + 0.3 * family_cases.noise(*given["hidden_states"].shape, seed=9)
    atol = 2e-3 if name == "kandinsky 5" else 5e-5  # which rounds queries and keys to bfloat16
    close = {"atol": atol, "rtol": atol}
    with torch.no_grad():
        wanted, crosses = stock_rows(model, given, cross)
        reused, _ = stock_rows(model, later, cross, crosses)
        fresh, _ = stock_rows(model, later, cross)
        stock = model(**given).sample
        tilewise.patch(model, METHOD, steps=(0, 1), strict=True)
        alone = model(**given).sample
        with two_paths(model, refresh=2) as paths:
            torch.testing.assert_close(model(**given).sample, wanted, **close)
            torch.testing.assert_close(model(**later).sample, reused, **close)
            assert vars(paths["denoiser"].counts) == {"refreshed": 1, "reused": 1, "unguided": 0}
        with two_paths(model, refresh=1):
            torch.testing.assert_close(model(**later).sample, fresh, **close)
        with two_paths(model, refresh=1, global_path="pooled", pool=(1, 1)):  # patches of one token are exact
            torch.testing.assert_close(model(**given).sample, wanted, **close)
        assert torch.equal(model(**given).sample, alone)
        tilewise.unpatch(model)
        assert torch.equal(model(**given).sample, stock)
    for one, other in ((wanted, alone), (wanted, stock), (reused, fresh)):
        assert (one - other).abs().max() > 10 * atol


# ── the pooled full path ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "grid", [Grid(2, 4, 6), Grid(2, 5, 3), Grid(1, 5, 4, text=3), Grid(2, 3, 3, text=2, text_first=True)]
)
def test_pooled_attention_is_exact_on_patches_of_equal_keys(grid):
    patches = pooling_of(grid, (2, 2), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, grid.tokens, 2, 8, generator=generator)
    k, v = (torch.randn(2, len(patches.count), 2, 8, generator=generator)[:, patches.of_token] for _ in range(2))
    wanted, _ = masked_attention(q, k, v, scale=0.4)
    torch.testing.assert_close(pooled_attention(q, k, v, patches, 0.4), wanted.float(), atol=1e-5, rtol=1e-5)
    # A patch is 2×2 tokens of one frame, and a text token is one by itself.
    video = patches.of_token[grid.video_start : grid.video_start + grid.video]
    assert len(video.unique()) == grid.t * -(-grid.h // 2) * -(-grid.w // 2)
    box = video.reshape(grid.shape)
    assert box[0, 0, 0] == box[0, 1, 1]
    assert box[0, 0, 0] != box[0, 2, 0]
    if grid.t > 1:
        assert box[0, 0, 0] != box[1, 0, 0]


def test_pooled_path_in_a_model():
    model = tiny_wan.tiny_transformer()
    x, text = inputs()
    tilewise.patch(model, METHOD, steps=(0, 1), strict=True)
    with torch.no_grad():
        outs = []
        for options in ({}, {"global_path": "pooled", "pool": (1, 1)}, {"global_path": "pooled", "pool": (4, 4)}):
            with two_paths(model, refresh=1, **options):
                outs.append(model(x, torch.tensor([500.0]), text).sample)
    torch.testing.assert_close(outs[1], outs[0], atol=2e-5, rtol=2e-5)  # patches of one token are exact
    assert (outs[2] - outs[0]).abs().max() > 1e-4


def test_pooled_patches_follow_the_grid():
    """They are kept from call to call, and another grid of as many tokens has others."""
    model = tiny_wan.tiny_transformer()
    tilewise.patch(model, METHOD, steps=(0, 1), strict=True)
    sizes = [(16, 12), (12, 16), (16, 12)]

    def forward(height, width):
        x, text = inputs(height=height, width=width)
        return model(x, torch.tensor([500.0]), text).sample

    with torch.no_grad():
        wanted = []
        for size in sizes:
            with two_paths(model, refresh=1, global_path="pooled", pool=(2, 2)):
                wanted.append(forward(*size))
        with two_paths(model, refresh=1, global_path="pooled", pool=(2, 2)):
            for size, out in zip(sizes, wanted, strict=True):
                assert torch.equal(forward(*size), out), size


def test_drafted_path_in_a_model():
    """A draft that keeps everything is dense attention; a quarter with its summary rows is not, and is near."""
    model = tiny_wan.tiny_transformer()
    x, text = inputs()
    tilewise.patch(model, METHOD, steps=(0, 1), strict=True)
    with torch.no_grad():
        outs = []
        for options, density in (({}, 1.0), ({"global_path": "draft"}, 1.0), ({"global_path": "draft"}, 0.25)):
            with two_paths(model, refresh=1, **options) as on:
                (paths,) = on.values()
                if paths.coarse is not None:
                    paths.coarse._draft = dataclasses.replace(paths.coarse._draft, density=density)
                outs.append(model(x, torch.tensor([500.0]), text).sample)
    torch.testing.assert_close(outs[1], outs[0], atol=2e-5, rtol=2e-5)
    away = (outs[2] - outs[0]).abs().max()
    assert 1e-5 < away < 0.3 * outs[0].abs().max()


def test_a_coarser_path_is_counted():
    """Of two blocks the first runs whole in the full path, and the second as far as its cross-attention."""
    x, text = inputs()
    for path, backend, density in (
        ("dense", "stock", 1.0),
        ("draft", "torch, draft", 0.5),
        ("pooled", "pooled", 0.25),
    ):
        model = tiny_wan.tiny_transformer()
        tilewise.patch(model, METHOD, steps=(0, 1), strict=True)
        with torch.no_grad(), two_paths(model, refresh=1, global_path=path):
            model(x, torch.tensor([500.0]), text)
        (row,) = (row for row in tilewise.summary(model).rows if row.kind == GLOBAL_PATH)
        assert (row.calls, row.backend) == (2, backend)
        assert row.density == density  # of the draft: so few blocks that each keeps at least a half
        assert "global path" in str(tilewise.summary(model))


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_cache_budgets():
    cache = CrossAttentionCache(device_bytes=2 * 64, host_bytes=64)
    value = [torch.full((4, 4), float(i)) for i in range(4)]
    for i in range(3):
        cache.put(("a", i), value[i])
    assert (cache.on_device, cache.on_host) == (128, 64)
    for i in range(3):
        assert torch.equal(cache.get(("a", i), torch.device("cpu")), value[i])
    assert cache.get(("b", 0), torch.device("cpu")) is None
    with pytest.raises(TilewiseError, match="the cross-attention cache is full"):
        cache.put(("a", 3), value[3])
    cache.put(("a", 2), value[3])  # in the place of what was there
    assert torch.equal(cache.get(("a", 2), torch.device("cpu")), value[3])
    cache.put(("a", 0), value[3])
    assert (cache.on_device, cache.on_host) == (128, 64)
    cache.drop("a")
    assert (cache.on_device, cache.on_host) == (0, 0)


def test_spilled_clip_is_the_same_clip():
    pipe = tiny_wan.tiny_pipeline()
    tilewise.patch(pipe, METHOD, steps=(0, 1))
    with two_paths(pipe, refresh=2):
        wanted = call(pipe)
    with two_paths(pipe, refresh=2, cache_bytes=0) as on:
        assert torch.equal(call(pipe), wanted)
        cache = on["transformer"].cache
        assert cache.on_device == 0
        assert cache.on_host > 0


def test_clips_of_one_step_are_guided_each():
    """The step is that of the clip before, and its prompt's forward is first in it all the same."""
    pipe = tiny_wan.tiny_pipeline()
    size = {"height": 64, "width": 48, "num_frames": 5, "max_sequence_length": 16, "output_type": "latent"}
    tilewise.patch(pipe, Inward(native=(4, 4)), steps=(0, 1))
    with two_paths(pipe, refresh=1, guided="cond") as paths:
        made = [
            pipe(
                "a star", **size, num_inference_steps=1, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)
            ).frames
            for _ in range(2)
        ]
    assert vars(paths["transformer"].counts) == {"refreshed": 2, "reused": 0, "unguided": 2}
    assert torch.equal(*made)


@pytest.mark.gpu
def test_spilled_tensors_come_back_on_a_gpu():
    device = torch.device("cuda")
    cache = CrossAttentionCache(device_bytes=8 << 20)
    for turn in range(3):
        values = [torch.full((1 << 20,), float(10 * turn + i), device=device) * 1.0 for i in range(6)]
        for i, value in enumerate(values):
            cache.put(("a", i), value)
        wanted = [float(value[0]) for value in values]
        del values, value
        filler = [torch.full((1 << 20,), -1.0, device=device) for _ in range(8)]  # what was freed is written over
        for i in range(6):
            cache.prefetch(("a", i + 1), device)
            got = cache.get(("a", i), device)
            assert bool((got == wanted[i]).all())
        del filler
    assert cache.on_device == 8 << 20
    assert cache.on_host == 16 << 20


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_refused():
    model = tiny_wan.tiny_transformer()
    with pytest.raises(ConfigError, match="patch the target first"), two_paths(model):
        pass
    tilewise.patch(model, "dense")
    with pytest.raises(ConfigError, match="patch the target first"), two_paths(model):
        pass
    tilewise.patch(model, METHOD)
    for options, match in (
        ({"refresh": 0}, "refresh must be"), ({"global_path": "none"}, "global_path must be one of dense, draft, pooled"),
        ({"guided": "uncond"}, "guided must be"), ({"pool": (0, 2)}, "pool must be"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match), two_paths(model, **options):
            pass
    model.blocks[0].attn2.forward = lambda *a, **k: None
    with pytest.raises(UnsupportedModelError, match="somebody else replaced"), two_paths(model):
        pass
    del model.blocks[0].attn2.forward
    with pytest.raises(UnsupportedModelError, match="compiled"), two_paths(torch.compile(model, backend="eager")):
        pass
    model.compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match="compiled"), two_paths(model):
        pass


def test_other_denoisers_are_refused():
    import test_mochi

    model = test_mochi.denoiser()
    tilewise.patch(model, METHOD)
    with pytest.raises(UnsupportedModelError, match="how its blocks are called has to be known"), two_paths(model):
        pass


def test_a_forward_without_a_grid_cannot_be_pooled(monkeypatch):
    """What a family refuses has no grid to pool over; the error says why the family refused."""
    model = tiny_wan.tiny_transformer(num_layers=2)
    monkeypatch.setattr(type(family_of(model)), "refuses", lambda *args: "for this test")
    tilewise.patch(model, METHOD, steps=(0, 1))
    latents, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 16, tiny_wan.TEXT_DIM)
    refused = pytest.raises(TilewiseError, match=r"for this test\. Use global_path='dense'")
    with two_paths(model, global_path="pooled"), torch.no_grad(), refused:
        model(latents, torch.tensor([500.0]), text, return_dict=False)


@pytest.mark.parametrize("kind", ["pooled", "draft"])
def test_a_coarse_path_does_not_run_under_a_torch_function_mode(kind):
    """As perturbed-attention guidance by hooks is: it would not see the path's attention."""

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    model = tiny_wan.tiny_transformer()
    tilewise.patch(model, METHOD, steps=(0, 1))
    latents, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 16, tiny_wan.TEXT_DIM)
    refused = pytest.raises(TilewiseError, match=f"{kind} cannot follow Mode")
    with two_paths(model, global_path=kind), torch.no_grad(), refused, Mode():
        model(latents, torch.tensor([500.0]), text, return_dict=False)


@pytest.mark.parametrize("when", ["before the patch", "after it", "within"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", ["Wan", "SD 3", "Flux, one stream", "HunyuanVideo, two streams"])
def test_both_paths_see_hooks_of_others_on_blocks(name, side, when):
    """Whole windows and a path that sees everything are stock, with whatever others add between the blocks."""
    if name == "Wan":
        model = tiny_wan.tiny_transformer(num_layers=3)
        latents, text = family_cases.noise(1, 4, 3, 8, 8), family_cases.noise(1, 16, tiny_wan.TEXT_DIM, seed=1)
        given = {"hidden_states": latents, "timestep": torch.tensor([500.0]), "encoder_hidden_states": text}
        block = model.blocks[0]
    else:
        model = EVERY_FAMILY[name].make()
        given = EVERY_FAMILY[name].inputs(model)
        block = getattr(model, "single_transformer_blocks" if name.endswith("one stream") else "transformer_blocks")[0]

    def change(x):
        return x + 0.3 * family_cases.noise(*x.shape[1:], seed=7) if isinstance(x, torch.Tensor) else x

    def enter(module, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def leave(module, args, output):
        return tuple(change(x) for x in output) if isinstance(output, tuple) else change(output)

    def put():
        if side == "input":
            return block.register_forward_pre_hook(enter, with_kwargs=True)
        return block.register_forward_hook(leave)

    with torch.no_grad():
        plain = model(**given, return_dict=False)[0]
        handle = put()
        want = model(**given, return_dict=False)[0]
        assert float((want - plain).abs().max()) > 1e-2
        if when != "before the patch":
            handle.remove()
        tilewise.patch(model, tilewise.STA(window=(99, 99, 99), tile=(2, 3, 3)), steps=(0, 1), strict=True)
        if when == "after it":
            put()
        with two_paths(model, refresh=1):
            if when == "within":
                put()
            torch.testing.assert_close(model(**given, return_dict=False)[0], want, atol=5e-5, rtol=5e-5)
