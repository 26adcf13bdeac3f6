"""The recipe of a causal checkpoint: noise levels by hand, JSON, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction

import pytest

from tilewise.pipelines.streaming.checks import cache_of
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.streaming.kv_cache import KVCache


def warped(timestep: int, shift: int) -> float:
    """The shifted noise level in exact arithmetic."""
    level = Fraction(timestep, 1000)
    return float(shift * level / (1 + (shift - 1) * level))


def test_self_forcing_noise_levels():
    """The default's, as the training scheduler tabulates them: 1000, 937.5, 833.3, 625."""
    assert CausalRecipe().sigmas() == pytest.approx((1.0, 0.9375, 5 / 6, 0.625), abs=1e-15)


@pytest.mark.parametrize("shift", [1, 3, 8, 12])
def test_warp_in_exact_arithmetic(shift):
    steps = (999, 801, 640, 333, 7)
    recipe = CausalRecipe(timesteps=steps, shift=shift)
    assert recipe.sigmas() == pytest.approx([warped(t, shift) for t in steps], rel=1e-15)
    assert recipe.sigmas(first=True) == recipe.sigmas()


def test_unwarped_timesteps_are_noise_levels_and_the_last_zero_is_dropped():
    recipe = CausalRecipe(timesteps=(1000, 757, 522, 0), warp=False, shift=8)
    assert recipe.timesteps == (1000.0, 757.0, 522.0)
    assert recipe.sigmas() == (1.0, 0.757, 0.522)


def test_the_first_chunk_has_its_own_length_and_passes():
    recipe = CausalRecipe(chunk=1, first_chunk=4, timesteps=(1000,), first_timesteps=[1000, 500, 0])
    assert recipe.sigmas() == (1.0,)
    assert recipe.sigmas(first=True) == pytest.approx((1.0, warped(500, 5)), rel=1e-15)
    assert [recipe.chunk_length(i) for i in range(3)] == [4, 1, 1]


def test_json_and_back():
    recipe = CausalRecipe(
        name="mine", chunk=2, first_chunk=3, timesteps=(900, 10.5), first_timesteps=(1000, 3), warp=False, shift=2,
        context_noise=20, window=9, sink=2, memory=1, sink_position="absolute", policy="ema", solver="unipc",
        guidance=3, boundary=0.875, fps=24, height=704, width=1280,
    )  # fmt: skip
    assert CausalRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert hash(recipe) == hash(recipe.replace())
    assert CausalRecipe.from_dict({"chunk": 1}) == CausalRecipe(chunk=1)
    assert recipe.context_sigma() == 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 2}, "window of 2 latents is shorter than a chunk of 3"),
        ({"first_chunk": 22}, "shorter than a chunk of 22"),
        ({"sink": 19}, "sink of 19 latents and a chunk of 3 do not fit into a window of 21.*may have 18"),
        ({"sink": 9, "first_chunk": 13}, "sink of 9 latents and a chunk of 13 .* may have 8"),
        ({"chunk": 0}, "chunk must be a whole number from 1 on, not 0"),
        ({"chunk": 1.5}, "chunk must be a whole number"),
        ({"sink": -1}, "sink must be a whole number from 0 on"),
        ({"timesteps": (1000, 500, 500)}, "must fall from pass to pass, not 1000, 500, 500"),
        ({"timesteps": (250, 500)}, "must fall"),
        ({"timesteps": (1001,)}, "at most 1000"),
        ({"timesteps": (500, 0, 0)}, "above 0"),
        ({"timesteps": (0,)}, "no denoising pass"),
        ({"timesteps": 1000}, "list of numbers"),
        ({"first_timesteps": ()}, "first_timesteps has no denoising pass"),
        ({"sink_position": "clampd"}, "Did you mean 'clamped'"),
        ({"solver": "ddim"}, "unknown solver 'ddim'"),
        ({"shift": 0}, "shift must be above 0"),
        ({"shift": float("nan")}, "shift must be a number, not nan"),
        ({"timesteps": (float("nan"),)}, "above 0"),
        ({"context_noise": 1000}, "context_noise is a timestep"),
        ({"guidance": 0}, "guidance must be 1"),
        ({"boundary": 875}, "divided by 1000"),
        ({"warp": "yes"}, "warp must be true or false"),
        ({"policy": ""}, "policy must be a word"),
        ({"chunks": 3}, "Did you mean 'chunk'"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        CausalRecipe().replace(**changes)


def test_it_reads_well():
    text = str(CausalRecipe(name="mine", chunk=1, first_timesteps=(1000, 900), sink=3, boundary=0.875))
    assert text.splitlines()[0] == "causal recipe mine"
    assert "1 latent frame\n" in text and "sink 3 (clamped)" in text
    assert "1000, 750, 500, 250  (σ 1.000, 0.938, 0.833, 0.625)" in text
    assert "first chunk    1000, 900" in text


def test_importing_it_brings_in_no_torch():
    code = "import sys, tilewise.pipelines.streaming.recipe; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(("window", "sink", "chunk"), [(6, 2, 2), (4, 2, 2), (4, 3, 2), (9, 3, 6), (9, 4, 6)])
def test_recipe_and_cache_count_alike(window, sink, chunk):
    """Sink and chunk are inside the window, what the policy keeps in memory is on top: one takes what the other does."""
    cache = KVCache(window, sink, 2 * chunk, policy="dual_ema")
    fields = {"window": window, "sink": sink, "chunk": chunk, "memory": 2 * chunk, "policy": "dual_ema"}
    if sink + chunk <= window:
        cache.check_chunk(chunk)
        assert cache_of(CausalRecipe(**fields)) == cache
        return
    with pytest.raises(ConfigError, match="does not fit in a window"):
        cache.check_chunk(chunk)
    with pytest.raises(ConfigError, match="do not fit into a window"):
        CausalRecipe(**fields)
