"""torch.compile(fullgraph=True) of patched denoisers that are given ``attention_kwargs``, as for the scale of a LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import family_checks
import peft
import pytest
import test_cogvideox
import test_flux
import test_hunyuan_video
import test_ltx
import test_qwen_image
import test_sd3
import tiny_wan
import torch

import tilewise
from tilewise.plugins.runtime.call_stats import SPARSE

pytestmark = pytest.mark.compile


def wan_with_lora() -> tuple[Any, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 12, 12, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=generator),
    }
    model = tiny_wan.tiny_transformer(num_layers=1)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return model, inputs


def hunyuan() -> tuple[Any, dict[str, Any]]:
    model = test_hunyuan_video.tiny(num_layers=1, num_single_layers=1)
    return model, test_hunyuan_video.inputs(None, (3, 10, 22), (9, 4))


def cogvideox() -> tuple[Any, dict[str, Any]]:
    model = test_cogvideox.denoiser(num_layers=1)
    return model, test_cogvideox.inputs(model, (4, 8, 6))


CASES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "flux": lambda: (test_flux.tiny(num_layers=1, num_single_layers=1), test_flux.inputs(7, 11)),
    "sd3": lambda: (test_sd3.tiny(), test_sd3.inputs(8, 10)),
    "qwen": lambda: (test_qwen_image.tiny(), test_qwen_image.inputs((1, 7, 11))),
    "hunyuan": hunyuan,
    "wan with lora": wan_with_lora,
    "ltx": lambda: (test_ltx.ltx(num_layers=1), test_ltx.inputs(test_ltx.GRIDS[1])),
    "cogvideox": cogvideox,
}


@pytest.mark.parametrize(
    ("case", "given"), [*((case, {"scale": 0.7}) for case in CASES), ("flux", {}), ("wan with lora", {})], ids=str
)
def test_one_graph(case, given):
    model, inputs = CASES[case]()
    name = "joint_attention_kwargs" if case in ("flux", "sd3") else "attention_kwargs"
    plain = family_checks.forward(model, inputs)
    tilewise.patch(model, family_checks.SMALL, steps=(0, 1), strict=True)
    eager = family_checks.forward(model, inputs | {name: dict(given)})
    assert not torch.allclose(eager, plain)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        out = compiled(**inputs, **{name: dict(given)}, return_dict=False)[0]
    torch.compiler.reset()
    torch.testing.assert_close(out, eager, atol=1e-5, rtol=1e-5)
    summary = tilewise.summary(model)
    assert {row.kind for row in summary.rows} == {SPARSE}
    assert summary.calls == 2 * len(family_checks.tilewise_layers(model))
