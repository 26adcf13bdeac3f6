"""Wan through the checks that every family must pass."""

import family_checks
import pytest
import tiny_wan
import torch

import tilewise
from tilewise.kernels.plans.layout import Grid


@pytest.mark.parametrize(
    ("shape", "head_dim"), [((5, 16, 16), 16), ((3, 10, 22), 16), ((2, 10, 14), 8), ((2, 10, 14), 12)]
)
def test_wan(shape, head_dim):
    """Head dimensions below 16, too, as diffusers' own tests have them."""
    model = tiny_wan.tiny_transformer(attention_head_dim=head_dim).eval()
    generator = torch.Generator().manual_seed(0)
    t, h, w = shape
    inputs = {
        "hidden_states": torch.randn(2, 4, t, h, w, generator=generator),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 16, tiny_wan.TEXT_DIM, generator=generator),
    }
    grid = Grid(t, h // 2, w // 2)
    family_checks.full_window_is_dense(model, inputs, grid)
    family_checks.sparse_is_masked_stock(model, inputs, grid)
    if head_dim < 16:
        stock = family_checks.forward(model, inputs)
        for method in (tilewise.Draft(recall=1.0, min_tokens=0), tilewise.XAttention(density=1.0, min_tokens=0)):
            with tilewise.patched(model, method, steps=(0, 1), strict=True):
                torch.testing.assert_close(family_checks.forward(model, inputs), stock, atol=2e-5, rtol=2e-5)
        (row,) = tilewise.explain(model, height=128, width=128, frames=5, method="sta").rows
        assert "head dimension" not in row.backend_reason
