"""Two paths where text is part of the sequence: against two rows written out, each a stock forward with attention by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import family_checks
import pytest
import test_easyanimate
import test_flux
import test_hunyuan_video
import test_hunyuan_video15
import test_qwen_image
import test_sd3
import torch

import tilewise
from tilewise.kernels.attention.lse_merge import attend_with_lse, merge_attention
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError, TilewiseError, UnsupportedModelError
from tilewise.plugins.guidance.dual_path import two_paths
from tilewise.plugins.guidance.global_path import global_paths
from tilewise.plugins.methods.inward import Inward
from tilewise.plugins.patching import patches_of
from tilewise.plugins.runtime.call_stats import GLOBAL_PATH, SPARSE

METHOD = Inward(native=(4, 4), temperature=False)
TEXT = test_flux.TEXT


def hunyuan(latent, lengths):
    t, h, w = latent
    model, given = (
        test_hunyuan_video.tiny(),
        test_hunyuan_video.inputs(None, (t, 2 * h, 2 * w), lengths),
    )
    return model, given, Grid(t, h, w, text=test_hunyuan_video.PROMPT)


def hunyuan15(latent, prompts, glyphs):
    given = test_hunyuan_video15.inputs(latent, prompts, glyphs, image=True)
    return test_hunyuan_video15.tiny(), given, Grid(*latent, text=test_hunyuan_video15.TEXT)


def easyanimate(streams):
    model = test_easyanimate.denoiser(test_easyanimate.BLOCKS[streams])
    return model, test_easyanimate.inputs(2, 5, 7), test_easyanimate.expected(2, 5, 7)


def qwen(shape, mask):
    mask = None if mask is None else mask.expand(2, -1)
    given = test_qwen_image.inputs((1, *shape), mask=mask)
    return test_qwen_image.tiny(), given, Grid(1, *shape, text=TEXT, text_first=True)


CASES: dict[str, Callable[[], tuple[Any, dict[str, Any], Grid]]] = {
    "flux": lambda: (
        test_flux.tiny(), test_flux.inputs(8, 10), Grid(1, 8, 10, text=TEXT, text_first=True)
    ),
    "flux, native larger on one axis": lambda: (
        test_flux.tiny(), test_flux.inputs(3, 23, batch=1), Grid(1, 3, 23, text=TEXT, text_first=True)
    ),
    "hunyuan video": lambda: hunyuan((2, 5, 7), (9,)),
    "hunyuan video, prompts of two lengths": lambda: hunyuan((2, 5, 7), (9, 4)),
    "hunyuan video, one frame": lambda: hunyuan((1, 6, 9), (3, 3)),
    "hunyuan video 1.5": lambda: hunyuan15((2, 5, 7), (9,), (5,)),
    "hunyuan video 1.5, prompts of two lengths": lambda: hunyuan15((2, 5, 7), (9, 4), (0, 3)),
    "easyanimate": lambda: easyanimate("two streams"),
    "easyanimate, one stream after the first": lambda: easyanimate("one stream after the first"),
    "qwen image": lambda: qwen((8, 9), None),
    "qwen image, prompts of two lengths": lambda: qwen((7, 8), test_qwen_image.PADDED),
    "sd 3": lambda: (test_sd3.tiny(), test_sd3.inputs(8, 10), Grid(1, 8, 10, text=TEXT)),
    "sd 3.5, with a second attention": lambda: (
        test_sd3.tiny(**test_sd3.SD35), test_sd3.inputs(7, 9), Grid(1, 7, 9, text=TEXT)
    ),
}  # fmt: skip


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]()


@contextmanager
def attention_by(model: Any, tokens: tuple[int, ...], hand: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Stock processors whose calls over so many tokens go to ``hand(query, key, value, bias)``, (B, S, H, D) in float64, bias a
    broadcastable (B, H, 1, S)."""
    (layer, *_) = family_checks.tilewise_layers(model)
    module = type(layer.module.processor).__call__.__globals__
    names = type(layer.module.processor).__call__.__code__.co_names

    def written_out(query, key, value, attn_mask):
        bias = torch.zeros(1, 1, 1, key.shape[1], dtype=torch.float64)
        if attn_mask is not None:
            attn_mask = attn_mask if attn_mask.ndim == 4 else attn_mask[:, None, None]
            if attn_mask.shape[2] > 1:  # of pairs: hidden queries too, which nothing looks at
                attn_mask = attn_mask.any(2, keepdim=True)
            bias = bias.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else bias + attn_mask
        return hand(query.double(), key.double(), value.double(), bias).to(query.dtype)

    def dispatch(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        if query.shape[1] == key.shape[1] and key.shape[1] in tokens:
            return written_out(query, key, value, attn_mask)
        return stock(query, key, value, attn_mask, **options)

    class Functional:
        @staticmethod
        def scaled_dot_product_attention(q: Any, k: Any, v: Any, attn_mask: Any = None, **options: Any) -> Any:
            if q.shape[2] == k.shape[2] and k.shape[2] in tokens:
                return written_out(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask).transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, **options)

    stock = module.get("dispatch_attention_fn")
    replaced = {"dispatch_attention_fn": dispatch} if "dispatch_attention_fn" in names else {"F": Functional}
    with mock.patch.dict(module, replaced):
        yield


def scores(query, key):
    return torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5


def two_rows(model, inputs, grid, method=METHOD, told=None):
    """The window row's output, and what text told in each layer: scores and values of the full row's text."""
    layout = method.layout(grid)
    (layer, *_) = family_checks.tilewise_layers(model)
    at = layout.inverse
    window = method.plan(layout, layer.heads, torch.device("cpu")).to_mask(layer.heads)[:, :, at][:, :, :, at]
    text = slice(0, grid.text) if grid.text_first else slice(grid.video, None)
    picture = slice(grid.text, None) if grid.text_first else slice(0, grid.video)
    if told is None:
        told = []

        def full(query, key, value, bias):
            all_scores = scores(query, key) + bias
            told.append((all_scores[:, :, picture, text], value[:, text]))
            return torch.einsum("bhqk,bkhd->bqhd", all_scores.softmax(-1), value)

        with attention_by(model, (grid.tokens,), full):
            family_checks.forward(model, inputs)
    numbers = iter(range(len(told)))

    def windowed(query, key, value, bias):
        if query.shape[1] == grid.video:  # a second attention, over the picture alone
            own = scores(query, key).masked_fill(~window[:, :, picture, picture], -torch.inf)
            return torch.einsum("bhqk,bkhd->bqhd", own.softmax(-1), value)
        theirs, values = told[next(numbers)]
        own = (scores(query, key) + bias).masked_fill(~window, -torch.inf)
        out = torch.einsum("bhqk,bkhd->bqhd", own.softmax(-1), value)
        weights = torch.cat([own[:, :, picture, picture], theirs], -1).softmax(-1)
        both = torch.cat([value[:, picture], values], 1)
        out[:, picture] = torch.einsum("bhqk,bkhd->bqhd", weights, both)
        return out

    with attention_by(model, (grid.tokens, grid.video), windowed):
        return family_checks.forward(model, inputs), told


def at_another_time(inputs):
    later = dict(inputs)
    noise = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(9))
    later["hidden_states"] = inputs["hidden_states"] + 0.3 * noise
    later["timestep"] = inputs["timestep"] * 0.7
    return later


def test_refresh_and_reuse_are_the_two_rows(case):
    model, inputs, grid = case
    later = at_another_time(inputs)
    wanted, told = two_rows(model, inputs, grid)
    reused, _ = two_rows(model, later, grid, told=told)
    fresh, _ = two_rows(model, later, grid)
    stock, before = family_checks.forward(model, inputs), family_checks.traces(model)
    close = {"atol": 3e-5, "rtol": 3e-5}
    tilewise.patch(model, METHOD, steps=(0, 1), strict=True)
    alone = family_checks.forward(model, inputs)
    patched = family_checks.traces(model)
    layers = len(family_checks.tilewise_layers(model))
    with two_paths(model, refresh=2) as paths:
        torch.testing.assert_close(family_checks.forward(model, inputs), wanted, **close)
        summary = tilewise.summary(model)
        kinds = {kind: sum(row.calls for row in summary.rows if row.kind == kind) for kind in (SPARSE, GLOBAL_PATH)}
        # The last block's full path ends with what its text tells; its second attention, if it has one, comes after.
        assert kinds == {SPARSE: 2 * layers, GLOBAL_PATH: layers - 1}
        torch.testing.assert_close(family_checks.forward(model, later), reused, **close)
        assert vars(paths["denoiser"].counts) == {"refreshed": 1, "reused": 1, "unguided": 0}
        assert tilewise.summary(model).calls == summary.calls + layers
    with two_paths(model, refresh=1) as paths:
        for x, want in ((inputs, wanted), (later, fresh)):
            torch.testing.assert_close(family_checks.forward(model, x), want, **close)
        assert paths["denoiser"].cache.on_device == 0
    assert torch.equal(family_checks.forward(model, inputs), alone)
    assert family_checks.traces(model) == patched
    tilewise.unpatch(model)
    assert torch.equal(family_checks.forward(model, inputs), stock)
    assert family_checks.traces(model) == before
    for other in (alone, stock):
        assert (wanted - other).abs().max() > 1e-3
    assert (reused - fresh).abs().max() > 1e-3


def test_a_window_of_everything_is_not_dense():
    """The text still speaks as the full path hears it: equal in the first layer, where both paths have the same input."""
    model, inputs, grid = CASES["flux"]()
    whole = Inward(native=(99, 99), temperature=False)
    wanted, _ = two_rows(model, inputs, grid, whole)
    with tilewise.patched(model, whole, steps=(0, 1), strict=True), two_paths(model, refresh=1):
        torch.testing.assert_close(family_checks.forward(model, inputs), wanted, atol=3e-5, rtol=3e-5)
    # With everything in every window both paths do the same all along.
    torch.testing.assert_close(wanted, family_checks.forward(model, inputs), atol=3e-5, rtol=3e-5)


def test_temperature_holds_for_both_parts():
    model, inputs, grid = CASES["flux"]()
    plain, sharp = METHOD, Inward(native=(4, 4))
    out = {}
    for method in (plain, sharp):
        with tilewise.patched(model, method, steps=(0, 1), strict=True), two_paths(model, refresh=1):
            out[method] = family_checks.forward(model, inputs)
    factor = sharp.scale(sharp.layout(grid), 16) / 16**-0.5
    assert factor > 1
    with mock.patch(f"{__name__}.scores", lambda q, k: torch.einsum("bqhd,bkhd->bhqk", q, k) * 16**-0.5 * factor):
        wanted, _ = two_rows(model, inputs, grid)
    torch.testing.assert_close(out[sharp], wanted, atol=3e-5, rtol=3e-5)
    assert (out[sharp] - out[plain]).abs().max() > 1e-3


def test_guided_forwards_of_the_prompt_alone():
    model, inputs, _ = CASES["qwen image"]()
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].flip(1)}
    with tilewise.patched(model, METHOD, steps=(0, 1), strict=True):
        alone = family_checks.forward(model, other)
        with two_paths(model, refresh=2, guided="cond") as paths:
            family_checks.forward(model, inputs)
            torch.testing.assert_close(family_checks.forward(model, other), alone)
            assert vars(paths["denoiser"].counts) == {"refreshed": 1, "reused": 0, "unguided": 1}


def test_density_counts_what_text_tells():
    model, inputs, grid = CASES["hunyuan video"]()
    with tilewise.patched(model, METHOD, steps=(0, 1), strict=True):
        family_checks.forward(model, inputs)
        alone = tilewise.summary(model).density
    with tilewise.patched(model, METHOD, steps=(0, 1), strict=True), two_paths(model):
        family_checks.forward(model, inputs)
        assert tilewise.summary(model).density == pytest.approx(alone, rel=1e-6)
    assert grid.text


def test_what_cannot_be_is_refused():
    model, inputs, _ = CASES["flux"]()
    assert global_paths(model) == ("none", "dense")
    with tilewise.patched(model, METHOD, steps=(0, 1)):
        for path in ("draft", "pooled"):
            with pytest.raises(ConfigError, match="in the same sequence"), two_paths(model, global_path=path):
                pass
        assert next(iter(patches_of(model).values())).state.guide is None
        mask = torch.rand(2, 1, TEXT + 80, TEXT + 80) > 0.1
        given = {**inputs, "joint_attention_kwargs": {"attention_mask": mask}}
        with two_paths(model), pytest.raises(TilewiseError, match="cannot separate its text keys"):
            family_checks.forward(model, given)
    with (
        tilewise.patched(model, tilewise.Draft(density=0.5, min_tokens=0), steps=(0, 1)),
        pytest.raises(ConfigError, match="a method that has windows"),
        two_paths(model),
    ):
        pass


def test_what_changes_the_picture_between_blocks_is_refused():
    model, inputs, _ = CASES["flux"]()
    samples = [torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(1))]
    with tilewise.patched(model, METHOD, steps=(0, 1), strict=True):
        with two_paths(model), pytest.raises(UnsupportedModelError, match="controlnet_block_samples"):
            family_checks.forward(model, {**inputs, "controlnet_block_samples": samples})
        family_checks.forward(model, {**inputs, "controlnet_block_samples": samples})  # without a full path as ever


def test_a_refresh_that_failed_is_made_again():
    """At the second refresh: what it had put into the cache is not mixed with what was there."""
    model, inputs, grid = CASES["flux"]()
    later = at_another_time(inputs)
    wanted, _ = two_rows(model, later, grid)
    last = model.single_transformer_blocks[1].norm
    with tilewise.patched(model, METHOD, steps=(0, 1), strict=True), two_paths(model, refresh=2) as paths:
        family_checks.forward(model, inputs)
        family_checks.forward(model, inputs)
        with mock.patch.object(last, "forward", side_effect=RuntimeError("out of memory")), pytest.raises(RuntimeError):
            family_checks.forward(model, later)
        torch.testing.assert_close(family_checks.forward(model, later), wanted, atol=3e-5, rtol=3e-5)
        assert vars(paths["denoiser"].counts) == {"refreshed": 3, "reused": 1, "unguided": 0}


def test_one_pair_of_paths_at_a_time():
    model, inputs, _ = CASES["flux"]()
    with tilewise.patched(model, METHOD, steps=(0, 1), strict=True):
        with two_paths(model, refresh=1):
            guided = family_checks.forward(model, inputs)
            with pytest.raises(UnsupportedModelError, match="two paths already"), two_paths(model):
                pass
            assert torch.equal(family_checks.forward(model, inputs), guided)
        with two_paths(model):
            tilewise.patch(model, METHOD, steps=(0, 1))
            with pytest.raises(TilewiseError, match="patched anew"):
                family_checks.forward(model, inputs)
    tilewise.unpatch(model)


def test_layers_that_stay_dense_ask_for_nothing():
    """What text tells is made and kept for the layers that the method runs in, and the full path ends with the last of them."""
    model, inputs, _ = CASES["flux"]()
    with tilewise.patched(model, METHOD, steps=(0, 1), blocks="0:2", strict=True):
        alone = family_checks.forward(model, inputs)
        with two_paths(model, refresh=2) as paths:
            guided = family_checks.forward(model, inputs)
            kept = 80 * (32 * 4 + 2 * 4)  # of a layer and sample: tokens × (channels and heads, float32)
            assert paths["denoiser"].cache.on_device == 2 * 2 * kept
            torch.testing.assert_close(family_checks.forward(model, inputs), guided)
            calls = {row.kind: row.calls for row in tilewise.summary(model).rows}
            assert calls[GLOBAL_PATH] == 1  # of block 0; block 1 ends with what its text tells
    assert (guided - alone).abs().max() > 1e-3


def test_dense_steps_keep_for_later_ones():
    """The refresh falls into a dense step, the reuse into one that the method runs at."""
    model, inputs, _ = CASES["flux"]()
    with tilewise.patched(model, METHOD, steps=(0.5, 1.0)), two_paths(model, refresh=2) as paths:
        scheduled = [{**inputs, "timestep": torch.full((2,), t)} for t in (0.9, 0.3)]
        for given in scheduled:
            family_checks.forward(model, given)
        assert vars(paths["denoiser"].counts) == {"refreshed": 1, "reused": 1, "unguided": 0}


def test_large_scores_in_half_precision():
    query, key = (20 * torch.randn(1, 5, 2, 128, generator=torch.Generator().manual_seed(n)).half() for n in (0, 1))
    key[0, 0] = query[0, 0]  # a product of some 50 000, and twice that is over what float16 holds
    value = torch.randn(1, 5, 2, 128, generator=torch.Generator().manual_seed(2)).half()
    out, lse = attend_with_lse(2 * query, key, value, None)
    exact = torch.einsum("bqhd,bkhd->bhqk", 2 * query.double(), key.double()) * 128**-0.5
    torch.testing.assert_close(lse.double(), exact.logsumexp(-1), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(
        out.double(), torch.einsum("bhqk,bkhd->bqhd", exact.softmax(-1), value.double()), rtol=2e-3, atol=2e-3
    )


def test_parts_of_a_softmax_are_put_together(monkeypatch):
    monkeypatch.setattr("tilewise.kernels.attention.lse_merge.MAX_SCORES", 100)
    query, key, value = (torch.randn(2, n, 3, 8, generator=torch.Generator().manual_seed(n)) for n in (11, 17, 17))
    want, want_lse = attend_with_lse(query, key, value, 0.2)
    exact = (torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * 0.2).softmax(-1)
    torch.testing.assert_close(
        want.double(), torch.einsum("bhqk,bkhd->bqhd", exact, value.double()), atol=1e-5, rtol=1e-5
    )
    one, two = (attend_with_lse(query, key[:, part], value[:, part], 0.2) for part in (slice(5), slice(5, None)))
    got, lse = merge_attention(*one, *two)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(lse, want_lse)
    nothing = attend_with_lse(query, key[:, :0], value[:, :0], 0.2)
    torch.testing.assert_close(merge_attention(*one, *nothing)[0], one[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("queries", "keys", "width"), [(1000, 333, 128), (130, 1, 64), (257, 512, 80), (64, 0, 128)])
def test_few_keys_on_a_gpu(queries, keys, width, dtype):
    """Picture and text are slices of one sequence, as in a call."""
    whole = [torch.randn(2, queries + keys, 3, width, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    q, k, v = (x.to(dtype) for x in whole)
    want, want_lse = attend_with_lse(q[:, :queries].float(), k[:, queries:].float(), v[:, queries:].float(), None)
    q, k, v = (x.cuda() for x in (q, k, v))
    out, lse = attend_with_lse(q[:, :queries], k[:, queries:], v[:, queries:], None)
    assert out.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.cpu().float(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.cpu(), want_lse, atol=tolerance / 10, rtol=tolerance / 10)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flux", "hunyuan video, prompts of two lengths"])
def test_a_gpu_agrees_with_the_cpu(name):
    """The kernels, the spill to pinned memory and attention over text in pieces: refresh and reuse."""
    model, inputs, _ = CASES[name]()
    out = {}
    for device in ("cpu", "cuda"):
        model.to(device)
        first, later = ({key: x.to(device) for key, x in each.items()} for each in (inputs, at_another_time(inputs)))
        later["encoder_hidden_states"] = first["encoder_hidden_states"]  # the same tensor: the same text
        with (
            tilewise.patched(model, METHOD, steps=(0, 1), strict=True),
            two_paths(model, refresh=2, cache_bytes=0) as on,
        ):
            out[device] = [family_checks.forward(model, each).cpu() for each in (first, later)]
        assert on["denoiser"].counts.reused == 1
    torch.testing.assert_close(out["cuda"], out["cpu"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["flux", "hunyuan video, prompts of two lengths"])
def test_a_far_field_is_part_of_the_window_path(name):
    """With cells of one token nothing is approximated: a window of one tile gives what a window over the whole picture gives."""
    model, given, _ = CASES[name]()
    whole = tilewise.STA(window=(99, 99, 99), tile=(1, 3, 3))
    narrow = tilewise.STA(window=(1, 1, 1), tile=(1, 3, 3))
    cells = tilewise.STA(window=(1, 1, 1), tile=(1, 3, 3), far="cells", cell=(1, 1, 1))
    found = []
    for method in (whole, narrow, cells):
        with tilewise.patched(model, method, steps=(0, 1), strict=True), two_paths(model, refresh=1):
            found.append(family_checks.forward(model, given))
    assert (found[1] - found[0]).abs().max() > 1e-3
    torch.testing.assert_close(found[2], found[0], atol=2e-5, rtol=2e-5)
