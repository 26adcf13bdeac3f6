"""What a patch keeps on the device: bounded, the hottest kept, and gone with the patch."""

from __future__ import annotations

import gc
import io
import weakref

import pytest
import tiny_wan
import torch

import tilewise
from tilewise.plugins.runtime.plan_cache import LRU

METHODS = {
    "sta": tilewise.STA(window=(1, 1, 1), tile=(1, 2, 2)),
    "neighborhood": tilewise.Neighborhood(window=(1, 3, 3), dilation=(1, 2, 2)),
    "draft": tilewise.Draft(density=0.5, tile=(1, 2, 2), always=("self", "neighbours"), min_tokens=0),
    "draft within a window": tilewise.Draft(
        density=0.5, tile=(1, 2, 2), within=tilewise.STA(window=(1, 3, 3)), min_tokens=0
    ),
    "xattention": tilewise.XAttention(density=0.5, tile=(1, 2, 2), min_tokens=0),
}


def test_the_entry_that_was_used_longest_ago_is_forgotten():
    cache, made = LRU(3), []
    for key in ("a", "b", "c", "a", "d", "a"):
        cache.lookup(key, lambda key=key: made.append(key) or key.upper())
    assert made == ["a", "b", "c", "d"]
    assert list(cache) == ["c", "d", "a"]
    assert cache.used("b") is None and cache.used("c") == "C"


def run(model):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 5, 16, 16, generator=generator)
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=generator)
    with torch.no_grad():
        model(latents, torch.tensor([500.0]), text, return_dict=False)


@pytest.mark.parametrize("name", METHODS)
def test_no_tensor_of_a_plan_outlives_the_patch(name, monkeypatch):
    """On a GPU these tensors are device memory; a cache of a module would hold them for as long as the process lives."""
    model = tiny_wan.tiny_transformer(num_layers=2)
    run(model)  # what PyTorch and diffusers keep of a first forward
    gc.collect()
    before = {id(x) for x in gc.get_objects() if isinstance(x, torch.Tensor)}
    tilewise.patch(model, METHODS[name], steps=(0, 1), strict=True)
    run(model)
    plans = [weakref.ref(x) for x in gc.get_objects() if isinstance(x, torch.Tensor) and id(x) not in before]
    assert len(plans) > 10
    tilewise.unpatch(model)
    gc.collect()
    left = [x() for x in plans if x() is not None]
    assert not [tuple(x.shape) for x in left if x.numel() > 64], "tensors are kept after unpatch"


def test_saving_a_patched_module_says_what_to_do():
    model = tiny_wan.tiny_transformer(num_layers=2)
    tilewise.patch(model, METHODS["sta"])
    with pytest.raises(tilewise.TilewiseError, match="unpatch first"):
        torch.save(model, io.BytesIO())
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights)
    tilewise.unpatch(model)
    torch.save(model, io.BytesIO())
