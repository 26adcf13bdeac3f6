"""Agent attention: merging and both softmaxes against loops over tokens, the two phases of a run, and undo."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from family_checks import forward, traces
from test_raunet import inputs_of, run
from tiny_unets import tiny_pipe, tiny_unet

import tilewise
from tilewise.plugins.additions.agent_attention import AgentAttention, Merging, targets_at
from tilewise.plugins.models.common.registry import family_of


def groups(x: torch.Tensor, size: tuple[int, int], region: int, places: torch.Tensor, count: int) -> list[list[int]]:
    """The tokens of one sample (N, C) that are one after merging: lists of tokens, each with its target first."""
    h, w = size
    targets = []
    for i in range(h // region):
        for j in range(w // region):
            place = int(places[i, j])
            targets.append((i * region + place // region) * w + j * region + place % region)
    found = {target: [target] for target in targets}
    likeness = {}
    for token in set(range(h * w)) - set(targets):
        cosines = [float(torch.cosine_similarity(x[token], x[target], dim=0)) for target in targets]
        likeness[token] = max(cosines), targets[cosines.index(max(cosines))]
    order = sorted(likeness, key=lambda token: -likeness[token][0])
    for token in order[:count]:
        found[likeness[token][1]].append(token)
    return [*([token] for token in order[count:]), *found.values()]


def means(x: torch.Tensor, of: list[list[int]]) -> torch.Tensor:
    return torch.stack([x[group].mean(0) for group in of])


@pytest.mark.parametrize(("size", "region"), [((8, 12), 4), ((7, 9), 2), ((10, 6), 4)])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_merging(size, region, share):
    x, y = torch.randn(2, 2, size[0] * size[1], 6, generator=torch.Generator().manual_seed(0))
    places = targets_at(0, 1, 2, size, region)
    merging, count = Merging(x, size, region, places), int(x.shape[1] * share)
    merged = merging.merge(y, count)
    back = merging.unmerge(merged, count)
    for sample in range(2):
        of = groups(x[sample], size, region, places, count)
        want = means(y[sample], of)
        torch.testing.assert_close(merged[sample].sort(0).values, want.sort(0).values)
        for group, mean in zip(of, want, strict=True):
            torch.testing.assert_close(back[sample][group], mean.expand(len(group), -1))


def plain(unet: Any, inputs: dict[str, Any], step: int, early: bool, ratio: float = 0.4) -> torch.Tensor:
    """The UNet's forward with merged tokens, through agents or not, sample by sample."""
    layers = [layer for layer in family_of(unet).layers(unet) if layer.downsample == 0]
    size = tuple(inputs["sample"].shape[-2:])
    entered: list[torch.Tensor] = []
    handles = []

    def seen(module: Any, args: tuple, kwargs: Any) -> None:
        entered[:] = [args[0] if args else kwargs["hidden_states"]]

    def attention(layer: Any) -> Any:
        attn, region = layer.module, 4 if early else 2
        places = targets_at(0, step, layer.block, size, region)

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (attn.heads, -1)).transpose(0, 1)

        def run(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            outs = []
            for x, y in zip(entered[0], hidden, strict=True):
                of = groups(x, size, region, places, int(len(x) * ratio))
                left = means(y, of)
                q, k, v = heads(attn.to_q(left)), heads(attn.to_k(left)), heads(attn.to_v(left))
                d = q.shape[-1]
                if early:
                    agents = heads(attn.to_q(means(y, groups(x, size, region, places, int(len(x) * 0.95)))))
                    gathered = (agents @ k.transpose(1, 2) * d**-0.5).softmax(-1) @ v
                    out = (q @ agents.transpose(1, 2) * d**-0.15).softmax(-1) @ gathered + 0.075 * v
                else:
                    out = (q @ k.transpose(1, 2) * d**-0.5).softmax(-1) @ v
                out = attn.to_out[0](out.transpose(0, 1).flatten(1))
                whole = torch.empty_like(y)
                for group, value in zip(of, out, strict=True):
                    whole[group] = value
                outs.append(whole)
            return torch.stack(outs)

        return run

    try:
        for layer in layers:
            block = unet.get_submodule(layer.name.removesuffix(".attn1"))
            handles.append(block.register_forward_pre_hook(seen, with_kwargs=True))
            layer.module.forward = attention(layer)
        return forward(unet, inputs)
    finally:
        for layer in layers:
            del layer.module.forward
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("early", [True, False], ids=["agents", "merged"])
def test_forward_is_the_plain_one(early):
    unet, inputs = tiny_unet(), inputs_of(16, 10)
    before, stock = traces(unet), forward(unet, inputs)
    tilewise.patch(unet, "dense", add=AgentAttention(steps=float(early)))
    got = forward(unet, inputs)
    told = "5 calls through agents, 0 over" if early else "0 calls through agents, 5 over merged"
    assert any(told in note for note in tilewise.summary(unet).notes)
    tilewise.unpatch(unet)
    assert torch.equal(forward(unet, inputs), stock) and traces(unet) == before
    want = plain(unet, inputs, round((1 - 0.999) * 1000), early)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert float((want - stock).abs().max()) > 1e-3


def test_pipelines_have_agents_in_the_first_steps():
    pipe = tiny_pipe(tiny_unet())
    stock = run(pipe, "text", 128)
    tilewise.patch(pipe, "dense", add="agent + raunet")
    out = run(pipe, "text", 128)
    notes = tilewise.summary(pipe).notes
    assert any("agent: 10 calls through agents, 15 over merged tokens" in note for note in notes), notes  # 2 of 5 steps
    assert torch.equal(run(pipe, "text", 128), out) and torch.equal(run(copy.deepcopy(pipe), "text", 128), out)
    with tilewise.patched(pipe, "dense", add="agent:seed=1"):
        assert not torch.equal(run(pipe, "text", 128), out)
    tilewise.unpatch(pipe)
    assert torch.equal(run(pipe, "text", 128), stock) and not torch.allclose(out, stock, atol=1e-4)


def test_what_cannot_be_is_refused(tiny_pipe):
    with pytest.raises(tilewise.UnsupportedModelError, match="agent merges tokens of a UNet2DConditionModel"):
        tilewise.patch(tiny_pipe, "dense", add="agent")
    for method in ("sta", "draft", "hidiffusion"):
        with pytest.raises(tilewise.ConfigError, match="merging leaves a part that is no grid"):
            tilewise.patch(tiny_unet(), method, add="agent")
    wrong = {"ratio=0.8": "from 0 to 0.75", "agent_ratio=0.3": "at least ratio", "seed=-1": "at least 0"}
    for add, said in ((f"agent:{option}", said) for option, said in wrong.items()):
        with pytest.raises(tilewise.ConfigError, match=said):
            tilewise.resolve("dense", add=add)
