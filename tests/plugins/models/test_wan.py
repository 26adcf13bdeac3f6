"""Wan through the checks that every family must pass."""

import family_checks
import pytest
import tiny_wan
import torch

from tilewise.kernels.plans.layout import Grid


@pytest.mark.parametrize("shape", [(5, 16, 16), (3, 10, 22)])
def test_wan(shape):
    model = tiny_wan.tiny_transformer().eval()
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
