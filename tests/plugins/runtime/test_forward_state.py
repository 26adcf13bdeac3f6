"""What a forward leaves behind, whichever way it ends, and what a dense call gets."""

from __future__ import annotations

import pytest
import tiny_wan
import torch

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.config import resolve
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.runtime.attention_call import AttentionCalls
from tilewise.plugins.runtime.attention_request import AttentionRequest
from tilewise.plugins.runtime.forward_state import ForwardState
from tilewise.plugins.runtime.step_index import StepIndex

STA = tilewise.STA(window=(1, 1, 1), tile=(1, 2, 2))


def inputs(frames: int = 3):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, frames, 8, 8, generator=generator)
    return latents, torch.tensor([500.0]), torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=generator)


def test_a_forward_that_fails_leaves_nothing_behind():
    model = tiny_wan.tiny_transformer(num_layers=2)
    with torch.no_grad():
        tilewise.patch(model, STA, steps=(0, 1))
        want = model(*inputs(), return_dict=False)[0]

        def fail(*args):
            raise RuntimeError("for this test")

        handle = model.blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="for this test"):
            model(*inputs(), return_dict=False)
        assert model._tilewise.state.forward.layout is None
        handle.remove()
        assert torch.equal(model(*inputs(), return_dict=False)[0], want)


@pytest.mark.parametrize("training", [True, False])
def test_a_denoiser_in_training_mode_is_refused(training):
    model = tiny_wan.tiny_transformer(num_layers=1).train(training)
    tilewise.patch(model, STA, steps=(0, 1))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            if training:
                with pytest.raises(tilewise.TilewiseError, match="is for inference"):
                    model(*inputs(), return_dict=False)
            else:
                model(*inputs(), return_dict=False)  # only a backward pass would fail


@pytest.mark.parametrize("shape", ["S S", "B 1 1 S", "B 1 S S", "B H S S"])
@pytest.mark.parametrize("steps", [(0, 0), (0, 1)])
def test_a_dense_call_is_stock_with_its_mask(shape, steps):
    """On a dense step; and on a sparse one, where a mask over pairs of tokens falls back to dense."""
    grid = Grid(2, 4, 6)
    sizes = {"S": grid.tokens, "B": 2, "H": 2, "1": 1}
    mask = torch.rand([sizes[name] for name in shape.split()])
    layer = AttentionLayer("blocks.0.attn", torch.nn.Identity(), 0, 2, 16)
    state = ForwardState(
        "transformer", resolve(STA, steps=steps), StepIndex(lambda: None, layer.module), [layer], {0}, True
    )
    state.begin(grid, torch.tensor(0))

    def stock(query, key, value, attn_mask=None, *_, **__):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2)

    qkv = [torch.randn(2, grid.tokens, 2, 16) for _ in range(3)]
    out = AttentionCalls(state, torch.tensor(0)).answer(0, AttentionRequest(*qkv, mask), stock)
    assert torch.equal(out, stock(*qkv, mask))
