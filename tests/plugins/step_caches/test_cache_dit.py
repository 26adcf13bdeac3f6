"""Step caches of other libraries: they keep hidden states from one step to the next, and stand between the blocks.

cache-dit compares hidden states before the first block and after it, and adds what the rest of the blocks did at an earlier step
(``Fn`` blocks at the front always run, ``Bn`` at the back).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import test_cogvideox as cogvideox
import test_ltx as ltx
import test_mochi as mochi
import tiny_wan
import torch
from every_family import pixels, run
from family_checks import FULL

import tilewise
from tilewise.plugins.guidance.dual_path import two_paths
from tilewise.plugins.runtime.call_stats import SPARSE

cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed: pip install -e '.[dev]'")

VIDEO = (4, 5, 8)
STEPS = 4
MODELS = {
    "Wan": (
        lambda: tiny_wan.tiny_transformer(num_layers=3),
        lambda m: {
            "hidden_states": torch.randn(1, 4, *pixels(VIDEO), generator=torch.Generator().manual_seed(0)),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=torch.Generator().manual_seed(1)),
        },
    ),
    "LTX": (lambda: ltx.ltx(num_layers=3), lambda m: ltx.inputs(VIDEO)),
    "CogVideoX": (lambda: cogvideox.denoiser("1.5", num_layers=3), lambda m: cogvideox.inputs(m, VIDEO)),
    "Mochi": (lambda: mochi.denoiser(num_layers=3), lambda m: mochi.inputs(*VIDEO, prompts=(6, 6))),
}


def enable(model: torch.nn.Module) -> None:
    """Every step after the first reuses what the blocks after the first one did."""
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=100.0, num_inference_steps=STEPS
    )  # fmt: skip
    cache_dit.enable_cache(model, cache_config=config)


def steps(model: torch.nn.Module, given: dict[str, Any]) -> list[torch.Tensor]:
    """Outputs of several steps whose latents drift, so that what is reused is not what would be computed."""
    first = given["hidden_states"]
    drift = torch.randn(first.shape, generator=torch.Generator().manual_seed(5))
    return [run(model, given | {"hidden_states": first + 0.3 * step * drift}) for step in range(STEPS)]


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_cache_outside_the_blocks(name, patched_first):
    make, inputs = MODELS[name]
    stock = make()
    model = copy.deepcopy(stock)
    given = inputs(stock)
    uncached = steps(stock, given)
    enable(stock)
    want = steps(stock, given)
    assert float((want[-1] - uncached[-1]).abs().max()) > 1e-2, "the cache must matter"

    for step in ("patch", "cache") if patched_first else ("cache", "patch"):
        if step == "patch":
            tilewise.patch(model, FULL, steps=(0, 1), strict=True)
        else:
            enable(model)
    ours = steps(model, given)
    for step, (x, y) in enumerate(zip(ours, want, strict=True)):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4, msg=lambda text, step=step: f"step {step}: {text}")
    summary = tilewise.summary(model)
    assert {row.kind for row in summary.rows} == {SPARSE}
    assert sum(row.calls for row in summary.rows) < STEPS * 3 * (
        2 if name == "Mochi" else 1
    )  # the cache did skip blocks
    tilewise.unpatch(model)
    cache_dit.refresh_context(model, num_inference_steps=STEPS)
    for x, y in zip(steps(model, given), want, strict=True):
        torch.testing.assert_close(x, y, atol=0, rtol=0)


def test_two_paths_refuse_it():
    """The global path runs blocks of its own, which a cache would not run at every step."""
    make, _ = MODELS["Wan"]
    model = make()
    enable(model)
    tilewise.patch(model, FULL)
    with pytest.raises(tilewise.UnsupportedModelError, match=r"step cache .* \(cache-dit"), two_paths(model):
        pass
    cache_dit.disable_cache(model)
    with two_paths(model):
        pass


def test_it_is_recognised():
    model = MODELS["Wan"][0]()
    enable(model)
    with pytest.raises(tilewise.ConfigError, match=r"a step cache already \(cache-dit or ParaAttention\)"):
        tilewise.patch(model, FULL, cache="first-block")
    tilewise.patch(model, FULL)
    told = str(tilewise.summary(model))
    assert (
        "denoiser: a step cache is on that was enabled beside the patch (cache-dit" in told
        and "first sparse step" in told
    )
    notes = tilewise.explain(model, height=80, width=128, frames=9, num_inference_steps=4).notes
    assert [note for note in notes if note in told and "a step cache is on" in note]
    cache_dit.disable_cache(model)
    assert "step cache" not in str(tilewise.summary(model))
