"""Offloading: the same clip by other ways of keeping weights, and what is refused."""

from __future__ import annotations

import accelerate
import numpy as np
import pytest
import torch
from causal_checkpoints import save_lora

import tilewise
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.loading import load
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.loading.loras import resolve_lora
from tilewise.pipelines.loading.offload import OFFLOADS, check_offload, offload


@pytest.mark.parametrize("kind", ["model", "group", "sequential"])
def test_an_offloaded_pipeline_makes_the_same_clips(tiny_pipe_dir, tmp_path, kind):
    """Of one stage and of two, with a LoRA in its weights. From the CPU to the CPU, as there is no GPU: the hooks are those of a
    GPU. Those of "sequential" take weights from files here: accelerate keeps none off a CPU in its memory."""
    lora = save_lora(tmp_path / "style.safetensors", 1)
    pipe = load_pipeline(tiny_pipe_dir, device="cpu", loras=[f"{lora}:0.5"])
    method = tilewise.resolve(tilewise.STA(window=(1, 2, 2)), steps=(0.0, 1.0))
    settings = resolve_settings(
        pipe,
        "a red circle",
        method=method,
        height=64,
        width=64,
        frames=5,
        steps=1,
        guidance=1.0,
        max_sequence_length=16,
    )

    def both():
        large = tilewise.highres(pipe, "a red circle", height=80, width=64, frames=5, steps=2)
        return generate(pipe, settings), large.native, large.clip

    plain = both()
    if kind == "sequential":
        for name in ("transformer", "vae"):
            accelerate.disk_offload(getattr(pipe, name), tmp_path / name, execution_device=torch.device("cpu"))
            assert {weight.device.type for weight in getattr(pipe, name).parameters()} == {"meta"}
    else:
        offload(pipe, kind, torch.device("cpu"))
    assert [name for name in ("_hf_hook", "_diffusers_hook") if hasattr(pipe.transformer, name)]
    for clip, same in zip(both(), plain, strict=True):
        assert np.abs(clip.frames.astype(int) - same.frames).max() <= 1  # by the rounding of tensors that lie elsewhere
        assert clip.summary is None or clip.summary.fallbacks == {}
        assert clip.settings.lora == (resolve_lora(f"{lora}:0.5"),)


def test_every_way_is_one_of_diffusers(tiny_pipe, monkeypatch):
    calls = []
    for name in ("enable_model_cpu_offload", "enable_group_offload", "enable_sequential_cpu_offload", "to"):
        monkeypatch.setattr(type(tiny_pipe), name, lambda self, *args, _name=name, **given: calls.append(_name))
    for kind in OFFLOADS:
        offload(tiny_pipe, kind, torch.device("cuda"))
    assert calls == ["to", "enable_model_cpu_offload", "enable_group_offload", "enable_sequential_cpu_offload"]


def test_a_model_is_loaded_by_way_of_offloading(tiny_pipe_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(load, "resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(
        load, "apply_offload", lambda pipe, kind, where: asked.append((pipe.device.type, kind, str(where)))
    )
    load_pipeline(tiny_pipe_dir, dtype="float32", offload="group")
    assert asked == [("cpu", "group", "cuda:0")]


def test_what_cannot_be_offloaded(tiny_pipe, monkeypatch):
    with pytest.raises(tilewise.ConfigError, match="runs on the CPU"):
        check_offload("sequential", torch.device("cpu"))
    with pytest.raises(tilewise.ConfigError, match="unknown way of offloading 'disk'"):
        check_offload("disk", torch.device("cuda"))
    monkeypatch.setattr(type(tiny_pipe), "model_cpu_offload_seq", None)
    with pytest.raises(tilewise.UnsupportedModelError, match="part by part"):
        offload(tiny_pipe, "model", torch.device("cpu"))
