"""The table of methods: its bound is the exact one, every row keeps what it says, and one command makes it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from chosen_blocks import tensors

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import dynamic, method_table, quality, render  # noqa: E402
from tilewise.kernels.plans.layout import Grid  # noqa: E402
from tilewise.plugins.methods.base import DynamicMethod  # noqa: E402


def test_the_oracle_goes_by_the_exact_mass():
    grid = Grid(2, 6, 9, text=5)
    method = method_table.OracleBlocks(density=0.3, tile=(1, 4, 4))
    layout = method.layout(grid)
    q, k, _ = tensors(grid)
    keys = k.repeat_interleave(2, 2).transpose(1, 2).double()
    exact = (0.25 * q.transpose(1, 2).double() @ keys.transpose(2, 3)).softmax(-1)
    blocks = [slice(a, a + n) for a, n in zip(layout.block_start.tolist(), layout.block_rows.tolist(), strict=True)]
    wanted = torch.stack([torch.stack([exact[:, :, i, j].sum(-1).mean(-1) for j in blocks], -1) for i in blocks], -2)
    torch.testing.assert_close(method.draft(layout, q, k, 0.25).logits.exp(), wanted.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_rows_keep_as_many_pairs(density):
    grid = Grid(4, 16, 32)
    q, k, v = tensors(grid, batch=1, key_heads=4)
    for name, method in method_table.table(density).items():
        layout = method.layout(grid)
        if not isinstance(method, DynamicMethod):
            assert method.plan(layout, 4, torch.device("cpu")).density <= max(density, 0.25), name
            continue
        planned = method.plan_call(layout, q, k, v, 0.25, {}, 0)
        assert (planned.compensation is not None) == name.endswith(method_table.MEANS), name
        extra = planned.around.pairs if planned.around else 0.0
        assert float(planned.plan.device_density) + extra == pytest.approx(density, abs=0.04), name


def test_one_command_makes_the_table(tmp_path, capsys):
    quality.main(
        device="cpu",
        densities="0.5",
        only="^(draft, means|delta of draft)$",
        table=True,
        tiny=True,
        out=tmp_path,
    )
    (path,) = tmp_path.glob("*-tiny.json")
    result = json.loads(path.read_text())
    (rows,) = result["sections"].values()
    assert [row["variant"] for row in rows] == ["draft, means", "delta of draft"]
    delta = rows[-1]
    assert delta["cost"] > delta["density"]
    text = render.tables(result, ["methods"], header=False)
    assert "| delta of draft |" in text
    assert f"{delta['cost']:.3f} ·" in text
    assert "draft, means +0.00 ± 0.00 dB" in capsys.readouterr().out


def test_the_planners_of_the_literature_are_timed():
    names = {row.method for row in dynamic.ROWS if row.grid == dynamic.SHAPES[0][0]}
    assert {
        "sol",
        "moba",
        "hip",
        "flexprefill",
        "dhsa",
        "less-is-more",
        "duo",
        "svg2",
        "routing",
        "hyper",
        "delta",
    } <= names
    wanted = [row for row in dynamic.TINY if row.method in ("svg2", "delta")][:2]
    for found in dynamic.run(torch.device("cpu"), 0.001, wanted):
        assert found["parts"]["around"] > 0
        assert found["ms"] > 0
