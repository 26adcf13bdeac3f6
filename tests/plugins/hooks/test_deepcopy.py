"""copy.deepcopy of what is patched: the copy is patched alike and shares nothing with the original."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import test_flux
import test_hunyuan_framepack
import test_unet
import test_z_image
import tiny_wan
import torch
from diffusers import FirstBlockCacheConfig
from family_checks import traces

import tilewise
from tilewise.plugins.torch_compat import FORWARD_HOOKS

SMALL = tilewise.STA(window=(1, 1, 1), tile=(2, 3, 3))


def latents(pipe: Any, steps: int = 4) -> torch.Tensor:
    return pipe(
        "a red circle moving right", num_inference_steps=steps, guidance_scale=3.0, output_type="latent",
        generator=torch.Generator().manual_seed(0), height=64, width=64, num_frames=9, max_sequence_length=16,
    ).frames  # fmt: skip


def on_modules(model: torch.nn.Module) -> dict[str, Any]:
    """What is on a denoiser, by module: names of attributes, numbers of hooks, classes of processors."""
    return {
        name: (
            sorted(m.__dict__),
            [len(getattr(m, hooks)) for hooks in FORWARD_HOOKS],
            type(getattr(m, "processor", None)).__name__,
        )
        for name, m in model.named_modules()
    }


def denoiser(kind: str) -> tuple[Any, dict[str, Any]]:
    if kind == "unet":
        return test_unet.unet_2d(), test_unet.inputs_of("2d", 12, 20)
    if kind == "flux":
        return test_flux.tiny(), test_flux.inputs(7, 11)
    if kind == "z_image":
        return test_z_image.tiny(), test_z_image.inputs(7, 11)
    given = test_hunyuan_framepack.inputs((3, 10, 12), (7,), (1, 2, 5))
    return test_hunyuan_framepack.tiny(), given


def output(model: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**given, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


@pytest.fixture(autouse=True)
def every_level(monkeypatch):
    monkeypatch.setattr("tilewise.plugins.config.MIN_MAP_TOKENS", 1)


@pytest.mark.parametrize("kind", ["unet", "flux", "z_image", "framepack"])
def test_a_copied_denoiser_is_patched_by_itself(kind):
    model, given = denoiser(kind)
    bare, stock = traces(model), output(model, given)
    tilewise.patch(model, SMALL, steps=(0, 1), strict=True)
    sparse, before = output(model, given), traces(model)
    assert not torch.equal(sparse, stock)
    copied = copy.deepcopy(model)
    assert traces(model) == before and on_modules(copied) == on_modules(model)
    assert torch.equal(output(copied, given), sparse)
    assert tilewise.summary(copied).calls == tilewise.summary(model).calls  # each counts its own one forward
    # Whichever of the two is unpatched, the other stays as it is.
    tilewise.unpatch(copied)
    assert torch.equal(output(copied, given), stock) and torch.equal(output(model, given), sparse)
    again = copy.deepcopy(copy.deepcopy(model))
    tilewise.unpatch(model)
    assert traces(model) == bare
    assert torch.equal(output(model, given), stock) and torch.equal(output(again, given), sparse)
    assert on_modules(tilewise.unpatch(again)) == on_modules(model) == on_modules(copied)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_copied_pipeline(tiny_pipe, fuse):
    stock = latents(tiny_pipe)
    tilewise.patch(tiny_pipe, SMALL, steps=(0.5, 1), fuse=fuse)
    sparse = latents(tiny_pipe)
    other = copy.deepcopy(tiny_pipe)
    assert other.transformer is not tiny_pipe.transformer and tilewise.is_patched(other)
    assert other.transformer._tilewise.state.pipe() is other  # its own scheduler counts its steps
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(2)
    assert torch.equal(latents(tiny_pipe), sparse)
    changed = latents(other)
    assert not torch.equal(changed, sparse)
    tilewise.unpatch(tiny_pipe)
    assert torch.equal(latents(tiny_pipe), stock) and torch.equal(latents(other), changed)
    assert on_modules(tilewise.unpatch(other).transformer) == on_modules(tiny_pipe.transformer)


def test_both_denoisers_of_a_pipeline():
    pipe = tiny_wan.tiny_pipeline(boundary_ratio=0.8)
    tilewise.patch(pipe, SMALL, steps=(0, 1))
    sparse, other = latents(pipe), copy.deepcopy(pipe)
    tilewise.unpatch(pipe)
    assert torch.equal(latents(other), sparse)
    assert {row.denoiser for row in tilewise.summary(other).rows} == {"transformer", "transformer_2"}


def offload(pipe: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, torch.device("cpu"))


@pytest.mark.parametrize("first", ["patch", "feature"])
@pytest.mark.parametrize("name", ["first block cache", "sequential offload"])
def test_with_hooks_of_others_on_it(tiny_pipe, name, first):
    """Deep copies of hooked modules belong to diffusers and accelerate: as good as without a patch, no better."""

    def feature() -> None:
        if name == "first block cache":
            tiny_pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))  # on, and never skips
        else:
            offload(tiny_pipe)

    for act in (feature, lambda: tilewise.patch(tiny_pipe, SMALL, steps=(0, 1)))[:: 1 if first == "feature" else -1]:
        act()
    sparse = latents(tiny_pipe)
    if name == "first block cache":
        other = copy.deepcopy(tiny_pipe.transformer)
        assert tilewise.is_patched(other) and not tilewise.is_patched(tilewise.unpatch(other))
    else:
        other = copy.deepcopy(tiny_pipe)
        assert torch.equal(latents(other), sparse)
    assert torch.equal(latents(tiny_pipe), sparse)


def test_a_module_alone_is_refused(tiny_pipe):
    tilewise.patch(tiny_pipe, SMALL)
    block = tiny_pipe.transformer.blocks[0]
    with pytest.raises(tilewise.TilewiseError, match="Copy the whole denoiser or pipeline"):
        copy.deepcopy(block)
    copy.deepcopy(tilewise.unpatch(tiny_pipe).transformer.blocks[0])


def test_a_shallow_copy_is_not_taken_for_the_original(tiny_pipe):
    tilewise.patch(tiny_pipe, SMALL)
    shallow = copy.copy(tiny_pipe.transformer)
    assert shallow.blocks is tiny_pipe.transformer.blocks and tilewise.is_patched(shallow)
    for alike in (shallow, copy.copy(shallow)):
        with pytest.raises(tilewise.TilewiseError, match="shallow copy"):
            copy.deepcopy(alike)
    copy.deepcopy(copy.copy(tilewise.unpatch(tiny_pipe).transformer))
