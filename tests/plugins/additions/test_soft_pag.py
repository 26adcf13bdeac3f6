"""SoftPAG: the guided output against attention matrices written out, in UNets, SD 3 and Flux; guidance of pipelines; undo."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import test_flux
import test_sd3
import torch
from family_checks import forward, traces
from test_raunet import inputs_of, run
from tiny_unets import tiny_pipe, tiny_unet

import tilewise
from tilewise.plugins.additions.soft_pag import SoftPAG
from tilewise.plugins.hooks.attention_rebinding import DISPATCH
from tilewise.plugins.models.common.registry import family_of

TEXT = test_flux.TEXT


@contextlib.contextmanager
def matrices(model: Any, weights: dict[int, torch.Tensor], rows: slice) -> Iterator[None]:
    """Self-attention of a stock model by its whole matrix, (1 − u) A + u I in the rows and heads of ``weights``. Layers are told
    apart by their order."""
    layers = family_of(model).layers(model)
    module: Any = sys.modules[type(layers[0].module.processor).__module__]
    by_dispatch = DISPATCH in type(layers[0].module.processor).__call__.__code__.co_names
    holder, name = (module, DISPATCH) if by_dispatch else (torch.nn.functional, "scaled_dot_product_attention")
    stock, calls = getattr(holder, name), [0]

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        axis = 1 if by_dispatch else 2
        if query.shape[axis] != key.shape[axis]:  # of text
            return stock(query, key, value, *args, **kwargs)
        number = calls[0]
        calls[0] += 1
        if number not in weights:
            return stock(query, key, value, *args, **kwargs)
        if by_dispatch:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        A = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        u = torch.zeros(A.shape[1], A.shape[2], 1)
        u[:, rows] = weights[number][:, None, None]
        out = ((1 - u) * A + u * torch.eye(A.shape[-1])) @ value
        return out.transpose(1, 2) if by_dispatch else out

    with mock.patch.object(holder, name, attention):
        yield
    assert calls[0] == len(layers)


def unet() -> tuple[Any, dict[str, Any], slice]:
    return tiny_unet(), inputs_of(16, 24), slice(None)


def sd3() -> tuple[Any, dict[str, Any], slice]:
    return test_sd3.tiny(**test_sd3.SD35, num_layers=3), test_sd3.inputs(6, 8), slice(0, 48)


def flux() -> tuple[Any, dict[str, Any], slice]:
    return test_flux.tiny(), test_flux.inputs(6, 8), slice(TEXT, None)


CASES = [
    (unet, ("mid",), {6: [1, 1]}), (unet, ("0.1", "14"), {0: [0, 1], 14: [1, 1]}), (sd3, ("0.1",), {0: [0, 1], 1: [0, 1]}),
    (sd3, ("mid", "2"), {2: [1, 1], 3: [1, 1]}), (flux, ("0", "2.1"), {0: [1, 1], 2: [0, 1]}),
]  # fmt: skip


@pytest.mark.parametrize(("make", "heads", "chosen"), CASES)
@pytest.mark.parametrize("u", [1.0, 0.3])
def test_output_is_moved_away_from_the_perturbed_one(make, heads, chosen, u):
    model, inputs, rows = make()
    before, stock = traces(model), forward(model, inputs)
    addition = SoftPAG(heads=heads, scale=2.0, u=u)
    weights = {number: u * torch.tensor(of, dtype=torch.float32) for number, of in chosen.items()}
    found = addition.weights(model)
    assert found.keys() == weights.keys() and all(torch.equal(found[n], weights[n]) for n in weights)
    tilewise.patch(model, "dense", add=addition)
    got = forward(model, inputs)
    assert any("soft-pag: 1 forwards guided by" in note for note in tilewise.summary(model).notes)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, got)
    tilewise.unpatch(model)
    assert torch.equal(forward(model, inputs), stock) and traces(model) == before
    with matrices(model, weights, rows):
        weak = forward(model, inputs)
    torch.testing.assert_close(got, stock + 2.0 * (stock - weak), atol=2e-4, rtol=2e-4)
    assert float((stock - weak).abs().max()) > 1e-3


@pytest.mark.parametrize("add", ["soft-pag:scale=2:u=0.5", "soft-pag:scale=2:u=0.5 + raunet:t1=1"])
def test_in_a_guided_pipeline_it_is_added_to_the_guidance(add):
    """ε = n + g (p − n) + s (p − p'), p' of the prompt's half alone; the step's output is compared, by hand."""
    pipe = tiny_pipe(tiny_unet())
    stock = run(pipe, "text", 160)
    seen = []

    def record(module: Any, args: tuple, kwargs: Any, out: Any) -> None:
        seen.append((args, kwargs, out[0]))

    tilewise.patch(pipe, "dense", add=add)
    handle = pipe.unet.register_forward_hook(record, with_kwargs=True)
    changed = run(pipe, "text", 160)
    handle.remove()
    assert torch.equal(run(copy.deepcopy(pipe), "text", 160), changed)
    tilewise.unpatch(pipe)
    assert torch.equal(run(pipe, "text", 160), stock) and not torch.allclose(changed, stock, atol=1e-4)
    args, kwargs, got = seen[0]
    inputs = {"sample": args[0], "timestep": args[1], "encoder_hidden_states": kwargs["encoder_hidden_states"]}
    half = {key: value[1:] if value.ndim else value for key, value in inputs.items()}
    with tilewise.patched(pipe, "dense", add="raunet:t1=1") if "raunet" in add else contextlib.nullcontext():
        both, prompt = forward(pipe.unet, inputs), forward(pipe.unet, half)
    negative, positive = both.chunk(2)
    with tilewise.patched(pipe, "dense", add=add):
        alone = forward(pipe.unet, half)  # one sample: no negative prompt in the batch, so that it is p + s (p − p')
    g = 7.5
    want = negative + g * (positive - negative) + (alone - prompt)
    ours = got.chunk(2)[0] + g * (got.chunk(2)[1] - got.chunk(2)[0])
    torch.testing.assert_close(ours, want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "method", [tilewise.STA(window=(1, 1, 2), tile=(1, 4, 4)), tilewise.Draft(density=0.5, min_tokens=1)]
)
def test_sparse_methods_run_in_both_forwards(method):
    model, inputs, _ = unet()
    with tilewise.patched(model, method, steps=(0, 1), min_tokens=1):
        plain = forward(model, inputs)
        once = tilewise.summary(model).calls
    with tilewise.patched(model, method, steps=(0, 1), min_tokens=1, add="soft-pag"):
        out = forward(model, inputs)
        report = tilewise.summary(model)
    assert report.calls == 2 * once and not report.fallbacks and report.ran
    assert out.isfinite().all() and not torch.allclose(out, plain, atol=1e-4)


def test_what_cannot_be_is_refused(tiny_pipe):
    model = tiny_unet()
    for add, said in (
        ("soft-pag:heads=99", "there is no block 99; they go from 0 to 15"),
        ("soft-pag:heads=0.64", "block 0 has 2 heads, so there is no 0.64"),
        ("soft-pag + broadway", "serves|broadway"),
        ("soft-pag + agent", "agent does not ask the layers' processors"),
    ):
        with pytest.raises(tilewise.TilewiseError, match=said):
            tilewise.patch(model, "dense", add=add)
    wrong = {"heads=a": "named BLOCK.HEAD", "u=0": "u must be above 0", "u=2": "from 0 to 1"}
    for add, said in ((f"soft-pag:{option}", said) for option, said in wrong.items()):
        with pytest.raises(tilewise.ConfigError, match=said):
            tilewise.resolve("dense", add=add)
    with pytest.raises(tilewise.UnsupportedModelError, match="soft-pag serves"):
        tilewise.patch(tiny_pipe, "dense", add="soft-pag")
    with pytest.raises(tilewise.ConfigError, match="give refresh=1"):
        tilewise.patch(model, tilewise.Draft(density=0.5, refresh=2), add="soft-pag")
    assert not tilewise.is_patched(model)


def test_not_beside_a_global_path():
    model = test_flux.tiny()
    tilewise.patch(model, tilewise.STA(window=(1, 3, 3)), add="soft-pag")
    with pytest.raises(tilewise.ConfigError, match="two paths: soft-pag runs 2 forwards"), tilewise.two_paths(model):
        pass
