"""What all additions share: how they are named, saved, combined, and where there are none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny_unets import tiny_unet

import tilewise
from tilewise.plugins.additions.base import additions, additions_text, all_additions
from tilewise.plugins.additions.raunet import RAUNet


@pytest.mark.parametrize("value", [None, "none", "", " None ", (), []])
def test_no_addition(value):
    config = tilewise.resolve("dense", add=value)
    assert config.add is None and config.is_stock and "add" not in config.to_dict() and additions_text(()) == "none"


def test_ways_to_say_it_are_one():
    want = (RAUNet(t1=0.5),)
    for value in (
        "raunet:t1=0.5",
        {"name": "raunet", "t1": 0.5},
        RAUNet(t1=0.5),
        [RAUNet(t1=0.5)],
        '{"name": "raunet", "t1": 0.5}',
    ):
        assert additions(value) == want
    config = tilewise.resolve("sta", add="raunet:t1=0.5")
    assert tilewise.Config.from_dict(config.to_dict()) == config == tilewise.resolve(config)
    assert additions(additions_text(config.additions)) == want and config.label == "sta + raunet"
    assert tilewise.resolve(config, add="none").add is None and not config.is_stock
    assert tilewise.resolve("dense").with_options({"add": "raunet:t1=5e-1"}).additions == want


@pytest.mark.parametrize("name", list(all_additions()))
def test_every_addition_is_read_back_as_it_was_written(name):
    (made,) = additions(name)
    assert additions(made.to_dict()) == additions(str(made)) == (made,)


def test_a_failing_addition_leaves_the_earlier_patch(monkeypatch):
    unet = tiny_unet()
    tilewise.patch(unet, "dense")
    hooks = len(unet._forward_pre_hooks)

    def broken(self, state, denoiser, handles):
        handles.append(denoiser.register_forward_pre_hook(lambda *_: None))
        raise RuntimeError("no")

    monkeypatch.setattr(RAUNet, "put_on", broken)
    with pytest.raises(RuntimeError, match="no"):
        tilewise.patch(unet, "dense", add="raunet")
    assert len(unet._forward_pre_hooks) == hooks and tilewise.is_patched(unet)


def test_not_under_context_parallelism():
    unet = tiny_unet()
    unet._parallel_config = SimpleNamespace(context_parallel_config=object())
    with pytest.raises(tilewise.UnsupportedModelError, match="an addition changes forwards of whole sequences"):
        tilewise.patch(unet, "dense", add="raunet")
