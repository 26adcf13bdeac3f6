"""torch.autocast with float32 weights: norms leave queries and keys in float32 where values have the dtype of autocast."""

from __future__ import annotations

from typing import Any

import family_checks
import pytest
import test_hunyuan_video
import test_sd3
import tiny_wan
import torch

import tilewise
from tilewise.plugins.patching import patches_of
from tilewise.plugins.runtime.call_stats import FALLBACK, SPARSE


def wan_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 4, 3, 12, 12, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=generator),
    }


CASES = {
    "sd3.5": lambda: (test_sd3.tiny(**test_sd3.SD35), test_sd3.inputs(8, 10)),
    "hunyuan": lambda: (test_hunyuan_video.tiny(), test_hunyuan_video.inputs(None, (3, 10, 22), (9, 4))),
    "wan": lambda: (tiny_wan.tiny_transformer(), wan_inputs()),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", list(CASES))
def test_calls_stay_sparse_and_are_those_of_stock(case, dtype):
    model, inputs = CASES[case]()
    exact = family_checks.forward(model, inputs)
    with torch.autocast("cpu", dtype):
        stock = family_checks.forward(model, inputs)
        with tilewise.patched(model, family_checks.FULL, steps=(0, 1), strict=True):
            ours = family_checks.forward(model, inputs)
            assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE}
        with tilewise.patched(model, family_checks.FULL, steps=(0, 0)):
            dense = family_checks.forward(model, inputs)
    rounding = float((stock - exact).abs().max())
    assert rounding > 0, "autocast must be on"
    torch.testing.assert_close(ours, stock, atol=rounding, rtol=0)
    torch.testing.assert_close(dense, stock, atol=rounding, rtol=0)


def test_scores_are_not_rounded_again():
    """What our kernels keep in float32 on purpose stays in float32."""
    model, inputs = CASES["sd3.5"]()
    tilewise.patch(model, tilewise.Draft(density=0.5), steps=(0, 1), strict=True)
    seen = []
    (patch,) = patches_of(model).values()
    patch.state.observers.append(lambda call: seen.append((torch.is_autocast_enabled("cpu"), call.query.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        family_checks.forward(model, inputs)
    assert set(seen) == {(False, torch.bfloat16)}


def test_without_autocast_mixed_dtypes_are_an_error_as_in_stock():
    model, inputs = CASES["wan"]()
    values = model.blocks[0].attn1.to_v
    handle = values.register_forward_hook(lambda module, args, out: out.bfloat16())
    with pytest.raises(RuntimeError, match="dtype"):
        family_checks.forward(model, inputs)
    tilewise.patch(model, family_checks.FULL, steps=(0, 1))
    with pytest.raises(RuntimeError, match="dtype"):
        family_checks.forward(model, inputs)
    handle.remove()
    tilewise.unpatch(model)


@pytest.mark.compile
def test_compiled():
    model, inputs = CASES["sd3.5"]()
    with tilewise.patched(model, family_checks.FULL, steps=(0, 1), strict=True), torch.autocast("cpu", torch.bfloat16):
        eager = family_checks.forward(model, inputs)
        with torch.no_grad():
            out = torch.compile(model, backend="eager", fullgraph=True)(**inputs, return_dict=False)[0]
        assert FALLBACK not in {row.kind for row in tilewise.summary(model).rows}
        torch.testing.assert_close(out, eager, atol=1e-2, rtol=1e-2)
    torch.compiler.reset()
