"""Every tile of the table for this GPU gives the same attention when it is launched; `tilewise tune` runs, and is read."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tilewise.kernels.attention import tuned
from tilewise.kernels.attention.backends.tiles import HEAD_DIMS, TILES, no_tile, tiles_of
from tilewise.kernels.attention.dispatch import block_sparse_attention
from tilewise.kernels.attention.dispatch_8bit import block_sparse_attention_8bit
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.chips import chip_of
from tilewise.kernels.plans.layout import Grid, cached_layout
from tilewise.kernels.plans.window import window_plan
from tilewise.plugins.tuning import in_use
from tilewise.plugins.tuning.record import file_of

pytestmark = pytest.mark.gpu
GRID = Grid(5, 18, 22, 77)  # ragged at every border, with text


@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kernel", TILES)
def test_every_tile_computes_the_same(kernel, head_dim, partial):
    device = torch.device("cuda", 0)
    chip = chip_of(device)
    if why := no_tile(kernel, chip, head_dim):
        pytest.skip(why)
    unit, window = ("token", (5, 9, 11)) if partial else ("tile", (1, 3, 3))
    plan = window_plan(cached_layout(GRID, (5, 5, 5)), [window], unit=unit, device=device)
    assert (plan.row_encoding is not None) == partial
    q, k, v = (torch.randn(2, GRID.tokens, 3, head_dim, device=device, dtype=torch.bfloat16) for _ in range(3))
    want, want_lse = masked_attention(q, k, v, plan.to_mask(3).to(device), dtype=torch.float32)
    tolerance = 1e-2 if kernel == "triton" else 3.5e-2
    run = block_sparse_attention if kernel == "triton" else block_sparse_attention_8bit
    before = tuned.use({})
    try:
        for tile in tiles_of(kernel, chip, head_dim, partial):
            choices = tuned.TunedKernels({(kernel, head_dim, partial): tile})
            tuned.use({tuned.device_key(device): (chip.name, choices)})
            out, lse = run(q, k, v, plan, backend="triton", return_lse=True)
            assert float((out.float() - want).norm() / want.norm()) < tolerance, tile
            torch.testing.assert_close(lse, want_lse, atol=5e-2, rtol=1e-2)
    finally:
        tuned.use(before)


def test_tune_runs_and_is_read(monkeypatch, tmp_path):
    from tilewise.ui.cli.app import app

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    device = torch.device("cuda", 0)
    words = ["tune", "--shape", "5x30x52:12x128", "--seconds", "0.05", "--max-spread", "100", "--device", "cuda"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(file_of(device).read_text())
    assert found["chip"] == chip_of(device).name and found["tiles"] and found["min_tokens"].keys() == {"sta", "draft"}
    assert not [row for row in found["measured"] if row["wrong"]]
    try:
        in_use.load()
        assert in_use.in_use(device) is not None
        assert tuned.tile("triton", chip_of(device).name, 128, False) is not None
    finally:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
        in_use.load()
