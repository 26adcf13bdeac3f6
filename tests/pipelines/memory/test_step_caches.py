"""What a step cache keeps is part of a clip's memory: the estimate against the tensors that the hooks really hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_wan
import torch

import tilewise
from tilewise.pipelines.generation.resolve import explain_settings, resolve_settings
from tilewise.pipelines.memory import fit
from tilewise.pipelines.memory.estimate import cache_bytes, estimate_memory
from tilewise.pipelines.memory.fit import check_fit
from tilewise.plugins.diffusers_compat import step_cache_hooks
from tilewise.plugins.step_caches.diffusers_compat import state_managers, states_of

SIZE = {"height": 64, "width": 64, "frames": 5, "steps": 6}
CACHES = (
    "first-block:threshold=1000",
    "taylor:taylor_factors_dtype=float32:disable_cache_before_step=2",
    "mag:mag_ratios=1,1",
    "sea:threshold=1000",
    "pab:spatial_attention_timestep_skip_range=0,1000:cross_attention_block_skip_range=2",
)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)


def held(model: torch.nn.Module) -> int:
    managers = {id(m): m for _, _, hook in step_cache_hooks(model) for m in state_managers(hook)}
    found = {
        tensor.untyped_storage().data_ptr(): tensor.nbytes
        for manager in managers.values()
        for state in states_of(manager)
        for tensor in tensors(vars(state))
    }
    return sum(found.values())


@pytest.mark.parametrize("text", CACHES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_estimate_is_what_is_held(text, guidance):
    pipe = tiny_wan.tiny_pipeline(num_layers=3)
    settings = resolve_settings(
        pipe, "a star", method=tilewise.resolve("dense", cache=text), guidance=guidance, max_sequence_length=16, **SIZE
    )
    explanation = explain_settings(pipe, settings)
    told = cache_bytes(pipe, settings, explanation.rows[0].tokens, torch.float32)
    most = 0

    def look(pipe, step, timestep, kwargs):
        nonlocal most
        most = max(most, held(pipe.transformer))
        return kwargs

    with tilewise.patched(pipe, settings.method):
        pipe("a star", height=64, width=64, num_frames=5, num_inference_steps=6, guidance_scale=guidance, output_type="latent",
             max_sequence_length=16, callback_on_step_end=look)  # fmt: skip
        assert held(pipe.transformer) == 0  # the end of a run frees it
    assert most == pytest.approx(told, rel=0.25)  # SeaCache keeps its filtered latents too
    stock = resolve_settings(pipe, "a star", method="dense", guidance=guidance, max_sequence_length=16, **SIZE)
    both = [estimate_memory(pipe, one, explanation, torch.float32, decode=False).denoise for one in (settings, stock)]
    assert both[0] - both[1] == told


def test_what_does_not_fit_says_what_the_cache_keeps(monkeypatch):
    monkeypatch.setattr(fit, "device_bytes", lambda device: 1000)
    pipe = tiny_wan.tiny_pipeline(num_layers=3)
    settings = resolve_settings(pipe, "a star", method=tilewise.resolve("dense", cache="pab"), **SIZE)
    with pytest.raises(tilewise.ConfigError, match=r"the step cache pab keeps about"):
        check_fit(pipe, settings, explain_settings(pipe, settings), torch.float32, torch.device("cpu"))
