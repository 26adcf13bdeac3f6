"""Step caches that a patch puts on: against stock with the same diffusers hook, at borders, in branches, counted and undone."""

from __future__ import annotations

import copy
import threading

import diffusers
import pytest
import test_cogvideox as cogvideox
import test_easyanimate as easyanimate
import test_flux as flux
import test_flux2 as flux2
import test_hunyuan_video as hunyuan_video
import test_hunyuan_video15 as hunyuan_video15
import test_kandinsky5 as kandinsky5
import test_ltx as ltx
import test_mochi as mochi
import test_wan_vace as vace
import tiny_wan
import torch
from diffusers import hooks
from every_family import IMAGE, VIDEO, pixels, run
from family_checks import FULL, tilewise_layers, traces

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.diffusers_compat import step_cache_hooks
from tilewise.plugins.guidance.dual_path import two_paths
from tilewise.plugins.patching import patches_of
from tilewise.plugins.runtime.attention_call import AttentionCalls
from tilewise.plugins.streaming.causal_denoiser import CausalDenoiser
from tilewise.plugins.streaming.kv_cache import KVCache

STEPS = 8
RATIOS = [1.0, 1.01, 1.02, 0.98, 1.0, 1.0, 0.99, 1.0]
ATTENTION = [r"blocks\.[0-9]+\.attn1"]
# What a patch is given, and what stock is given for the same.
CACHES = {
    "first-block:threshold=0.6": lambda: hooks.FirstBlockCacheConfig(threshold=0.6),
    "taylor:taylor_factors_dtype=float32": lambda: hooks.TaylorSeerCacheConfig(
        taylor_factors_dtype=torch.float32, cache_identifiers=ATTENTION
    ),
    "taylor:use_lite_mode=true": lambda: hooks.TaylorSeerCacheConfig(use_lite_mode=True),
    f"mag:mag_ratios={','.join(map(str, RATIOS))}": lambda: hooks.MagCacheConfig(
        num_inference_steps=STEPS, mag_ratios=RATIOS
    ),
    "sea:threshold=20": lambda: hooks.SeaCacheConfig(threshold=20),
}


def pipeline():
    pipe = tiny_wan.tiny_pipeline(num_layers=3)
    pipe.transformer.requires_grad_(False)
    return pipe


def call(pipe, *, steps: int = STEPS, guidance: float = 3.0, **more) -> torch.Tensor:
    return pipe(
        "a red circle", height=64, width=64, num_frames=5, num_inference_steps=steps, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0), output_type="latent", max_sequence_length=16, **more,
    ).frames  # fmt: skip


def counted(pipe) -> tuple[int, int]:
    (row,) = tilewise.summary(pipe).cache
    return row.reused, row.forwards


@pytest.fixture(scope="module")
def uncached():
    return call(pipeline())


@pytest.mark.parametrize("text", list(CACHES))
def test_is_stock_with_the_same_hook(text, uncached):
    pipe = pipeline()
    pipe.transformer.enable_cache(CACHES[text]())
    want = call(pipe)
    assert float((want - uncached).abs().max()) > 1e-2, "the cache must matter"

    pipe = pipeline()
    before = traces(pipe.transformer)
    for method, tolerance in (("dense", 0.0), (FULL, 2e-2 if "lite" in text else 2e-5)):
        tilewise.patch(pipe, method, steps=(0, 1), cache=text)
        torch.testing.assert_close(call(pipe), want, atol=tolerance, rtol=tolerance)
        reused, forwards = counted(pipe)
        assert forwards == 2 * STEPS and 0 < reused < forwards
        assert f"{reused} of {forwards} forwards reused" in str(tilewise.summary(pipe, reset=True))
        assert counted(pipe) == (0, 0)
        foretold = tilewise.explain(pipe, height=64, width=64, frames=5, num_inference_steps=STEPS)
        if text.startswith(("first", "sea")):
            assert foretold.reused_steps is None and "depends on the activations" in str(foretold)
        else:
            assert foretold.reused_steps == foretold.to_dict()["reused_steps"] == reused // 2
        tilewise.unpatch(pipe)
        assert traces(pipe.transformer).keys() == before.keys()
        assert all(traces(pipe.transformer)[name] == before[name] for name in before), "a trace is left"
    assert torch.equal(call(pipe), uncached)


@pytest.mark.parametrize("text", [*list(CACHES)[:2], *list(CACHES)[3:]])
def test_under_fused_kernels(text, monkeypatch):
    """As on a GPU: fused blocks, here by the kernels' naive formulas, reuse the same steps as stock ones."""
    pipe = pipeline()
    tilewise.patch(pipe, "dense", fuse=False, cache=text)
    want, before = call(pipe, guidance=1.0), counted(pipe)
    monkeypatch.setattr(AttentionCalls, "fused_here", lambda self, x: True)
    tilewise.patch(pipe, "dense", cache=text)
    torch.testing.assert_close(call(pipe, guidance=1.0), want, atol=1e-4, rtol=1e-4)
    summary = tilewise.summary(pipe)
    assert counted(pipe) == before and before[0] and summary.fused_calls == summary.calls > 0


def test_pyramid_attention_is_stocks_where_there_is_one_branch():
    pipe = pipeline()
    pipe.transformer.enable_cache(
        hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
        )
    )
    want = call(pipe, guidance=1.0)
    pipe = pipeline()
    tilewise.patch(pipe, "dense", cache="pab")
    assert torch.equal(call(pipe, guidance=1.0), want)
    reused = counted(pipe)[0]
    assert reused == tilewise.explain(pipe, height=64, width=64, frames=5, num_inference_steps=STEPS).reused_steps > 0
    assert tilewise.summary(pipe).cache[0].skipped == 3 * reused  # three blocks


def test_pyramid_attention_keeps_branches_apart():
    """Stock would give the unconditional forward the conditional one's attention. Here each is as if it ran alone: with the same
    prompt in both, guidance changes nothing."""
    pipe = pipeline()
    given = "pab:spatial_attention_timestep_skip_range=0,1000"
    embeds = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=torch.Generator().manual_seed(1))
    same = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds}

    def sample(**more):
        return pipe(
            height=64, width=64, num_frames=5, num_inference_steps=4, generator=torch.Generator().manual_seed(0),
            output_type="latent", **more,
        ).frames  # fmt: skip

    tilewise.patch(pipe, "dense", cache=given)
    alone = sample(prompt_embeds=embeds, guidance_scale=1.0)
    torch.testing.assert_close(sample(**same, guidance_scale=3.0), alone, atol=1e-5, rtol=1e-5)
    assert counted(pipe) == (2 + 4, 4 + 8)


def test_nothing_is_reused_across_the_border():
    """With a threshold that always reuses, the first step computes, and the first sparse one; each in both branches."""
    pipe = pipeline()
    tilewise.patch(pipe, FULL, steps=(0.5, 1), cache="first-block:threshold=1000", strict=True)
    computed: list[int] = []
    block = pipe.transformer.blocks[2].attn2  # runs where the block does
    handle = block.register_forward_hook(lambda *_: computed.append(pipe.scheduler.step_index or 0))
    call(pipe)
    handle.remove()
    assert computed == [0, 0, 4, 4]
    assert counted(pipe) == (2 * STEPS - 4, 2 * STEPS)
    kinds = {row.kind for row in tilewise.summary(pipe).rows}
    assert kinds == {"sparse", "dense step"}


@pytest.mark.parametrize("text", ["taylor", "taylor:disable_cache_after_step=7", f"mag:mag_ratios={'1,' * 7}1", "pab"])
@pytest.mark.parametrize("border", [0.25, 0.5])
def test_the_border_is_foretold(text, border):
    pipe = pipeline()
    tilewise.patch(pipe, FULL, steps=(border, 1), cache=text)
    foretold = tilewise.explain(pipe, height=64, width=64, frames=5, num_inference_steps=STEPS)
    call(pipe, guidance=1.0)
    assert counted(pipe) == (foretold.reused_steps, STEPS)
    assert f"step {int(border * STEPS)} reuses nothing" in str(foretold)


@pytest.mark.parametrize("text", ["taylor", "pab", "mag:mag_ratios=1,1,1,1", "first-block"])
def test_fewer_steps_than_it_needs(text):
    """One step runs as without a cache, and it is said that nothing can be reused, where that is known before."""
    pipe = pipeline()
    dense = call(pipe, steps=1, guidance=1.0)
    tilewise.patch(pipe, "dense", cache=text)
    foretold = tilewise.explain(pipe, height=64, width=64, frames=5, num_inference_steps=1)
    assert torch.equal(call(pipe, steps=1, guidance=1.0), dense)
    assert counted(pipe) == (0, 1)
    assert ("reuses nothing in 1 step: give more steps" in str(foretold)) == (text != "first-block")


@pytest.mark.parametrize("text", ["taylor:cache_interval=2", f"mag:mag_ratios={'1,' * 14}1", "pab"])
def test_a_solver_that_calls_twice_a_step(text):
    """Heun calls the denoiser at 2n − 1 timesteps, each a step to the cache."""
    pipe = pipeline()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    tilewise.patch(pipe, FULL, steps=(0.5, 1), cache=text)
    foretold = tilewise.explain(pipe, height=64, width=64, frames=5, num_inference_steps=STEPS)
    call(pipe, guidance=1.0)
    assert counted(pipe) == (foretold.reused_steps, 2 * STEPS - 1) and foretold.reused_steps


def test_two_denoisers_are_foretold():
    pipe = tiny_wan.tiny_pipeline(num_layers=3, boundary_ratio=0.8)
    tilewise.patch(pipe, "dense", cache="taylor:cache_interval=3:disable_cache_before_step=1")
    foretold = tilewise.explain(pipe, height=64, width=64, frames=5, num_inference_steps=STEPS).reused_steps
    call(pipe, guidance=1.0)
    rows = tilewise.summary(pipe).cache
    assert [row.denoiser for row in rows] == ["transformer", "transformer_2"]
    assert sum(row.forwards for row in rows) == STEPS and all(row.forwards for row in rows)
    assert sum(row.reused for row in rows) == foretold > 0


def test_a_cancelled_run_leaves_nothing_behind():
    pipe = pipeline()
    tilewise.patch(pipe, "dense", cache="first-block:threshold=1000")
    want = call(pipe)

    def stop(pipe, step, timestep, kwargs):
        if step == 2:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        call(pipe, guidance=1.0, callback_on_step_end=stop)
    assert torch.equal(call(pipe), want)


class TestAPipelineThatSetsNoContext:
    """Wan's video-to-video does not say which branch a forward is."""

    def run(self, pipe):
        latents = torch.randn(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        return pipe(
            latents=latents, prompt_embeds=self.text(3), negative_prompt_embeds=self.text(4), height=64, width=64,
            num_inference_steps=STEPS, guidance_scale=3.0, strength=0.75, output_type="latent",
        ).frames  # fmt: skip

    def text(self, seed):
        return torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=torch.Generator().manual_seed(seed))

    def pipe(self):
        pipe = diffusers.WanVideoToVideoPipeline.from_pipe(pipeline())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def test_stock_fails(self):
        pipe = self.pipe()
        pipe.transformer.enable_cache(hooks.FirstBlockCacheConfig())
        with pytest.raises(ValueError, match="No cache context is set"):
            self.run(pipe)

    @pytest.mark.parametrize("text", ["first-block:threshold=0.6", "sea:threshold=20"])
    def test_branches_are_told_apart_by_their_order(self, text):
        pipe = self.pipe()
        names: list[str] = []
        stock = pipe.transformer.forward

        def named(*args, **kwargs):  # what a pipeline that does say would do
            names.append(("cond", "uncond")[len(names) % 2])
            step = 2 + (len(names) - 1) // 2  # the strength leaves the first two out
            sigma = float(pipe.scheduler.sigmas[step])
            where = {"step_index": step, "sigma": sigma, "num_inference_steps": STEPS}
            with pipe.transformer.cache_context(names[-1], **where):
                return stock(*args, **kwargs)

        pipe.transformer.enable_cache(CACHES[text]())
        stock = pipe.transformer.forward
        pipe.transformer.forward = named
        want = self.run(pipe)

        pipe = self.pipe()
        plain = self.run(pipe)
        tilewise.patch(pipe, "dense", cache=text)
        torch.testing.assert_close(self.run(pipe), want, atol=1e-6, rtol=1e-6)
        assert float((want - plain).abs().max()) > 1e-2
        assert counted(pipe)[1] == 12 and counted(pipe)[0] > 0


def test_a_pipeline_that_names_both_branches_alike():
    pipe = pipeline()
    tilewise.patch(pipe, "dense", cache="first-block:threshold=0.6")
    want = call(pipe)
    named = pipe.transformer.cache_context
    pipe.transformer.cache_context = lambda name, **where: named("cond", **where)
    assert torch.equal(call(pipe), want)


def inputs_of_wan(model):
    return {
        "hidden_states": torch.randn(1, 4, *pixels(VIDEO), generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=torch.Generator().manual_seed(1)),
    }


FAMILIES = {
    "Wan": (lambda: tiny_wan.tiny_transformer(num_layers=3), inputs_of_wan),
    "HunyuanVideo": (
        lambda: hunyuan_video.tiny(num_layers=2, num_single_layers=1),
        lambda m: hunyuan_video.inputs(None, pixels(VIDEO), (6,)),
    ),
    "LTX": (lambda: ltx.ltx(num_layers=3), lambda m: ltx.inputs(VIDEO)),
    "CogVideoX": (lambda: cogvideox.denoiser("1.5", num_layers=3), lambda m: cogvideox.inputs(m, VIDEO)),
    "Mochi": (lambda: mochi.denoiser(num_layers=3), lambda m: mochi.inputs(*VIDEO, prompts=(6, 6))),
    "VACE": (lambda: vace.denoiser(layers=3, vace_layers=(0,)), lambda m: vace.inputs(*VIDEO, scale=(0.7,))),
    "Flux": (lambda: flux.tiny(num_layers=2, num_single_layers=1), lambda m: flux.inputs(*IMAGE[1:])),
}


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("kind", ["first-block", "taylor", "mag", "pab"])
def test_families(family, kind):
    """A full window with a cache is stock with that cache, over steps whose latents drift."""
    make, inputs = FAMILIES[family]
    stock = make()
    ours = copy.deepcopy(stock)
    given = inputs(stock)
    drift = torch.randn(given["hidden_states"].shape, generator=torch.Generator().manual_seed(5))
    names = [layer.name for layer in tilewise_layers(stock)]
    text, config = {
        "first-block": ("first-block:threshold=100", hooks.FirstBlockCacheConfig(threshold=100)),
        "taylor": (
            "taylor:cache_interval=3:disable_cache_before_step=1:taylor_factors_dtype=float32",
            hooks.TaylorSeerCacheConfig(
                cache_interval=3, disable_cache_before_step=1, taylor_factors_dtype=torch.float32, cache_identifiers=names
            ),
        ),
        "mag": (
            "mag:mag_ratios=1,1.01,1.01,1.01:threshold=10:max_skip_steps=1:num_inference_steps=4",
            hooks.MagCacheConfig(threshold=10, max_skip_steps=1, num_inference_steps=4, mag_ratios=[1, 1.01, 1.01, 1.01]),
        ),
        "pab": (
            "pab",
            hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
            ),
        ),
    }[kind]  # fmt: skip

    def steps(model):
        found = []
        for step in range(4):
            # 500 stands for the step; a little less each time, so that none goes back.
            more = {"hidden_states": given["hidden_states"] + 0.3 * step * drift}
            with model.cache_context("cond"):
                found.append(run(model, given | more))
        return found

    uncached = steps(stock)
    stock.enable_cache(config)
    want = steps(stock)
    assert float((want[-1] - uncached[-1]).abs().max() + (want[2] - uncached[2]).abs().max()) > 1e-3
    before = traces(ours)
    tilewise.patch(ours, FULL, steps=(0, 1), cache=text, strict=True)
    for x, y in zip(steps(ours), want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    assert 0 < tilewise.summary(ours).cache[0].reused < 4
    assert {row.kind for row in tilewise.summary(ours).rows} == {"sparse"}
    tilewise.unpatch(ours)
    after = traces(ours)
    root = after.pop("")[0]  # the caller's cache_context leaves a registry there
    assert {*root} - {"_diffusers_hook"} == {*before.pop("")[0]} and after == before
    assert all(torch.equal(x, y) for x, y in zip(steps(ours), uncached, strict=True))


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "cache", "said"),
        [
            (lambda: easyanimate.denoiser(num_layers=1), "first-block", "no step caches in diffusers"),
            (lambda: hunyuan_video15.tiny(num_layers=2), "first-block", "HunyuanVideo15TransformerBlock"),
            (lambda: kandinsky5.denoiser(num_visual_blocks=2), "first-block", "name their hidden states otherwise"),
            (lambda: flux2.tiny(num_layers=1, num_single_layers=1), "first-block", "in different ways"),
            (lambda: tiny_wan.tiny_transformer(num_layers=1), "mag:mag_ratios=1,1", "it needs two"),
            (lambda: ltx.ltx(num_layers=2), "sea", "serves Wan's text-to-video"),
        ],
    )
    def test_a_model_without_support(self, make, cache, said):
        model = make()
        before = traces(model)
        with pytest.raises(tilewise.UnsupportedModelError, match=said):
            tilewise.patch(model, "dense", cache=cache)
        assert traces(model) == before and not tilewise.is_patched(model)

    def test_ratios_that_there_are_not(self):
        with pytest.raises(tilewise.ConfigError, match="mag:calibrate=true"):
            tilewise.patch(tiny_wan.tiny_transformer(), "dense", cache="mag")
        with tilewise.patched(flux.tiny(num_layers=2, num_single_layers=1), "dense", cache="mag:num_inference_steps=4"):
            pass  # diffusers has those of Flux

    def test_layers_that_there_are_not(self):
        model = tiny_wan.tiny_transformer()
        none = "pab:spatial_attention_block_skip_range=none:temporal_attention_block_skip_range=2"
        before = traces(model)
        with pytest.raises(tilewise.ConfigError, match="nothing would be reused"):
            tilewise.patch(model, "dense", cache=none)
        assert traces(model) == before
        tilewise.patch(model, "sta")
        with pytest.raises(tilewise.ConfigError, match="nothing would be reused"):
            tilewise.patch(model, "dense", cache=none)
        assert patches_of(model)["denoiser"].config.method.name == "sta"  # as before
        tilewise.unpatch(model)
        assert traces(model) == before

    @pytest.mark.parametrize("by", ["enable_cache", "apply"])
    def test_a_cache_that_is_on(self, by):
        model = tiny_wan.tiny_transformer(num_layers=3)
        if by == "enable_cache":
            model.enable_cache(hooks.TaylorSeerCacheConfig(use_lite_mode=True))
        else:
            hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig())
        before = traces(model)
        with pytest.raises(tilewise.ConfigError, match="a step cache already"):
            tilewise.patch(model, "dense", cache="first-block")
        assert traces(model) == before
        with tilewise.patched(model, "dense"):  # beside it, a patch goes on as before
            pass

    def test_a_patch_replaces_its_own(self):
        pipe = pipeline()
        tilewise.patch(pipe, "dense", cache="first-block")
        tilewise.patch(pipe, "dense", cache="taylor")
        assert tilewise.explain(pipe, height=64, width=64, frames=5, method="sta", steps=(0, 1)).reused_steps is None
        with tilewise.patched(pipe, "dense"):
            assert not pipe.transformer.is_cache_enabled
        assert isinstance(pipe.transformer._cache_config, hooks.TaylorSeerCacheConfig)
        tilewise.patch(pipe, tilewise.Config(tilewise.Dense(), cache="pab"), cache="none")
        assert not pipe.transformer.is_cache_enabled

    def test_two_paths_and_streams(self):
        model = tiny_wan.tiny_transformer(num_layers=3)
        tilewise.patch(model, FULL, cache="first-block")
        with (
            pytest.raises(tilewise.UnsupportedModelError, match="two paths: the step cache first-block"),
            two_paths(model),
        ):
            pass
        grid = Grid(1, 8, 8)
        with pytest.raises(tilewise.ConfigError, match="a stream takes no step cache"):
            CausalDenoiser(model, KVCache(window=3), grid=grid)

    def test_two_threads_at_once(self):
        model = tiny_wan.tiny_transformer(num_layers=3)
        tilewise.patch(model, "dense", cache="first-block")
        given = inputs_of_wan(model)
        errors: list[BaseException] = []

        def other():
            try:
                run(model, given)
            except tilewise.TilewiseError as error:
                errors.append(error)

        def meanwhile(*_):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

        handle = model.blocks[1].register_forward_pre_hook(meanwhile)
        run(model, given)
        handle.remove()
        assert len(errors) == 1 and "another thread" in str(errors[0])
        run(model, given)  # one after another they may
        other()
        assert len(errors) == 1

    def test_a_run_whose_steps_nobody_knows(self):
        model = tiny_wan.tiny_transformer(num_layers=3)
        tilewise.patch(model, "dense", cache="mag:mag_ratios=1,1")
        for _ in range(2):
            with pytest.raises(tilewise.TilewiseError, match="num_inference_steps"):
                run(model, inputs_of_wan(model))


def test_magcache_measures_the_ratios_that_it_takes(capsys):
    pipe = pipeline()
    plain = call(pipe)
    tilewise.patch(pipe, "dense", cache="mag:calibrate=true")
    assert torch.equal(call(pipe), plain)
    assert counted(pipe) == (0, 2 * STEPS)
    ratios = tilewise.summary(pipe).cache[0].mag_ratios
    assert len(ratios) == STEPS and ratios[0] == 1 and f"mag_ratios=1,{ratios[1]:.5g}" in str(tilewise.summary(pipe))
    assert capsys.readouterr().out == ""
    tilewise.patch(pipe, "dense", cache={"name": "mag", "mag_ratios": ratios, "threshold": 0.5})
    call(pipe)
    assert counted(pipe)[0] == 2 * tilewise.explain(
        pipe, height=64, width=64, frames=5, num_inference_steps=STEPS
    ).reused_steps  # fmt: skip


def test_a_deep_copy_has_a_cache_of_its_own():
    pipe = pipeline()
    tilewise.patch(pipe, "dense", cache="first-block:threshold=0.6")
    want = call(pipe)
    other = copy.deepcopy(pipe)
    assert torch.equal(call(other), want)
    assert counted(other) == counted(pipe) and other.transformer._cache_config is not pipe.transformer._cache_config
    tilewise.unpatch(other)
    assert not list(step_cache_hooks(other.transformer))
    assert torch.equal(call(pipe), want)


def test_hooks_of_accelerate_that_came_later_stay():
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipe = pipeline()
    calls: list[int] = []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return args, kwargs

    tilewise.patch(pipe, "dense", cache="first-block:threshold=1000")
    add_hook_to_module(pipe.transformer.blocks[1], Counting())
    call(pipe, steps=2, guidance=1.0)
    assert len(calls) == 2
    tilewise.unpatch(pipe)
    call(pipe, steps=2, guidance=1.0)
    assert len(calls) == 4


def test_a_users_cache_that_replaced_ours_stays():
    pipe = pipeline()
    tilewise.patch(pipe, "dense", cache="first-block")
    pipe.transformer.disable_cache()
    theirs = hooks.TaylorSeerCacheConfig(use_lite_mode=True)
    pipe.transformer.enable_cache(theirs)
    tilewise.unpatch(pipe)
    assert pipe.transformer._cache_config is theirs and list(step_cache_hooks(pipe.transformer))


@pytest.mark.compile
def test_a_compiled_denoiser():
    pipe, text = pipeline(), "first-block:threshold=0.6"
    tilewise.patch(pipe, FULL, steps=(0, 1), cache=text)
    want = call(pipe, steps=4, guidance=1.0)
    before = tilewise.summary(pipe).cache[0]
    tilewise.unpatch(pipe)
    torch.compiler.reset()
    pipe.transformer.compile(backend="eager")
    tilewise.patch(pipe, FULL, steps=(0, 1), cache=text)
    torch.testing.assert_close(call(pipe, steps=4, guidance=1.0), want, atol=1e-5, rtol=1e-5)
    assert tilewise.summary(pipe).cache[0] == before and before.reused
    torch.compiler.reset()
