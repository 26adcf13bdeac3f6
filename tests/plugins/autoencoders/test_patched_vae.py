"""``tilewise.patch`` takes a pipeline's Wan VAE along: the same frames, counted, and off again without a trace."""

from __future__ import annotations

import copy
import gc

import pytest
import tiny_wan
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import AutoencoderKLWan
from family_checks import traces

import tilewise
from tests.plugins.autoencoders.test_wan_fused import random_gains
from tilewise.plugins.autoencoders import wan_checks
from tilewise.plugins.autoencoders.patched_vae import VaePatch
from tilewise.plugins.autoencoders.streaming import streaming_decoder, streaming_encoder
from tilewise.plugins.autoencoders.wan_fused import FusedPass
from tilewise.plugins.summary import VaeRow


@pytest.fixture
def pipe():
    pipe = tiny_wan.tiny_pipeline()
    random_gains(pipe.vae).clear_cache()  # sets attributes, as the first decode does
    return pipe


@pytest.fixture
def fused_on_the_cpu(monkeypatch):
    monkeypatch.setattr(wan_checks, "fuses_on", lambda device: True)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def latents(frames: int = 3, size: tuple[int, int] = (4, 6), batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, frames, *size)


def decoded(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    return vae.decode(z, return_dict=False)[0]


def encoded(vae: AutoencoderKLWan, frames: torch.Tensor) -> torch.Tensor:
    return vae.encode(frames).latent_dist.mode()


def test_on_a_cpu_the_stock_code_runs_and_is_counted(pipe):
    z = latents()
    before, want = traces(pipe.vae), decoded(pipe.vae, z)
    again = encoded(pipe.vae, want)
    tilewise.patch(pipe, "dense")
    assert not tilewise.summary(pipe).vae
    assert torch.equal(decoded(pipe.vae, z), want) and torch.equal(encoded(pipe.vae, want), again)
    reason = "no fused kernels on cpu"
    report = tilewise.summary(pipe)
    assert report.vae == (VaeRow("decoder", 3, False, reason), VaeRow("encoder", 2, False, reason))
    assert f"vae.decoder: 3 calls, stock code ({reason})" in str(report)
    assert report.to_dict()["vae"][0] == {"part": "decoder", "calls": 3, "fused": False, "reason": reason}
    tilewise.unpatch(pipe)
    assert traces(pipe.vae) == before


def test_a_vae_that_was_replaced_since_is_restored(pipe):
    before, old = traces(pipe.vae), pipe.vae
    tilewise.patch(pipe, "dense")
    pipe.vae = tiny_wan.tiny_vae(3)
    new = traces(pipe.vae)
    assert traces(old) != before
    tilewise.unpatch(pipe)
    assert traces(old) == before and traces(pipe.vae) == new

    other = tiny_wan.tiny_pipeline()
    tilewise.patch(pipe, "dense")
    other.vae = pipe.vae
    pipe.vae = old
    tilewise.patch(other, "dense")  # the VAE is this pipeline's now, and so is what is on it
    tilewise.unpatch(pipe)
    assert traces(old) == before and traces(other.vae) != new
    tilewise.unpatch(other)
    assert traces(other.vae) == new


def test_a_vae_that_is_gone_does_no_harm(pipe):
    tilewise.patch(pipe, "dense")
    pipe.vae = None
    gc.collect()
    tilewise.unpatch(pipe)
    assert not tilewise.is_patched(pipe)


@pytest.mark.usefixtures("fused_on_the_cpu")
class TestFused:
    def test_frames_and_latents_of_stock_and_the_bits_of_a_stream(self, pipe):
        z = latents(batch=2)
        want = decoded(pipe.vae, z)
        again = encoded(pipe.vae, want)
        before, stock = traces(pipe.vae), copy.deepcopy(pipe.vae)
        tilewise.patch(pipe, "dense")
        frames = decoded(pipe.vae, z)
        torch.testing.assert_close(frames, want, rtol=0, atol=1e-5)
        moments = encoded(pipe.vae, want)
        torch.testing.assert_close(moments, again, rtol=0, atol=1e-5)
        assert tilewise.summary(pipe).vae == (VaeRow("decoder", 3, True), VaeRow("encoder", 2, True))
        for vae in (pipe.vae, stock):  # one by way of the patch, one without it
            decoder, encoder = streaming_decoder(vae), streaming_encoder(vae)
            assert torch.equal(torch.cat([decoder.decode(part) for part in z.split([1, 2], 2)], 2), frames)
            assert torch.equal(encoder.encode(want), moments)
        tilewise.unpatch(pipe)
        assert traces(pipe.vae) == before
        assert torch.equal(decoded(pipe.vae, z), want) and torch.equal(encoded(pipe.vae, want), again)

    def test_tiles_have_a_cache_each(self, pipe):
        z = latents(size=(12, 20))
        whole = decoded(pipe.vae, z)
        pipe.vae.enable_tiling(32, 32, 24, 24)
        want = decoded(pipe.vae, z)
        assert not torch.equal(want, whole)
        tilewise.patch(pipe, "dense")
        torch.testing.assert_close(decoded(pipe.vae, z), want, rtol=0, atol=1e-5)
        (row,) = tilewise.summary(pipe).vae
        assert row.fused and row.calls == 3 * 2 * 4

    def test_slices(self, pipe):
        z = latents(batch=2)
        want = decoded(pipe.vae, z)
        pipe.vae.enable_slicing()
        tilewise.patch(pipe, "dense")
        torch.testing.assert_close(decoded(pipe.vae, z), want, rtol=0, atol=1e-5)
        assert tilewise.summary(pipe).vae == (VaeRow("decoder", 6, True),)

    def test_a_clip_through_the_pipeline(self, pipe):
        def run():
            return pipe(
                "a red circle", num_inference_steps=1, output_type="pt", generator=torch.Generator().manual_seed(0),
                height=64, width=64, num_frames=5, max_sequence_length=16,
            ).frames  # fmt: skip

        want = run()
        with tilewise.patched(pipe, "dense"):
            torch.testing.assert_close(run(), want, rtol=0, atol=1e-4)
            assert tilewise.summary(pipe).vae == (VaeRow("decoder", 3, True),)
        assert torch.equal(run(), want)

    def test_gradients_run_stock(self, pipe):
        tilewise.patch(pipe, "dense")
        z = latents().requires_grad_()
        with torch.enable_grad():
            decoded(pipe.vae, z).sum().backward()
        assert z.grad is not None and z.grad.abs().sum() > 0
        assert tilewise.summary(pipe).vae == (VaeRow("decoder", 3, False, "gradients are enabled"),)

    def test_training_mode_and_other_modules_run_stock(self, pipe):
        z, frames = latents(), torch.rand(1, 3, 1, 16, 16)
        tilewise.patch(pipe, "dense")
        pipe.vae.train()
        decoded(pipe.vae, z)
        pipe.vae.eval()
        pipe.vae.encoder.conv_out = torch.nn.utils.parametrizations.weight_norm(pipe.vae.encoder.conv_out)
        encoded(pipe.vae, frames)
        decoder, encoder = tilewise.summary(pipe).vae
        assert decoder == VaeRow("decoder", 3, False, "it is in training mode")
        assert not encoder.fused and "conv_out is" in encoder.reason

    def test_other_decoders_are_left_alone_and_reported(self, pipe):
        class Mine(type(pipe.vae.decoder)):
            pass

        pipe.vae.decoder.__class__ = Mine
        before = traces(pipe.vae)
        tilewise.patch(pipe, "dense")
        decoded(pipe.vae, latents())
        report = tilewise.summary(pipe)
        assert not report.vae
        assert "vae.decoder runs stock code: it is a Mine, not diffusers' WanDecoder3d" in report.notes
        tilewise.unpatch(pipe)
        assert traces(pipe.vae) == before

    def test_hooks_of_others_run_around_it_and_come_and_go(self, pipe):
        z, seen = latents(), []
        want = decoded(pipe.vae, z)

        class Sees(ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                seen.append(module)
                return args, kwargs

        add_hook_to_module(pipe.vae.decoder, Sees())
        tilewise.patch(pipe, "dense")
        torch.testing.assert_close(decoded(pipe.vae, z), want, rtol=0, atol=1e-5)
        assert seen == [pipe.vae.decoder] * 3 and tilewise.summary(pipe).vae[0].fused
        remove_hook_from_module(pipe.vae.decoder)
        decoded(pipe.vae, z)
        assert tilewise.summary(pipe).vae == (VaeRow("decoder", 6, True),)
        add_hook_to_module(pipe.vae.decoder, Sees())
        tilewise.unpatch(pipe)
        assert torch.equal(decoded(pipe.vae, z), want)

    def test_a_failure_in_mid_clip_leaves_nothing_behind(self, pipe, monkeypatch):
        z = latents()
        tilewise.patch(pipe, "dense")
        want = decoded(pipe.vae, z)
        with monkeypatch.context() as patch:
            patch.setattr(FusedPass, "_upsample", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                decoded(pipe.vae, z)
        assert torch.equal(decoded(pipe.vae, z), want)


def test_it_can_be_left_out_and_saved(pipe, tmp_path):
    before = traces(pipe.vae)
    tilewise.patch(pipe, "dense", vae=False)
    assert traces(pipe.vae) == before
    config = tilewise.Config(tilewise.STA(), vae=False)
    tilewise.save_config(config, tmp_path / "config.json")
    assert tilewise.load_config(tmp_path / "config.json") == config
    tilewise.patch(pipe, config)
    assert traces(pipe.vae) == before
    tilewise.patch(pipe, config, vae=True)
    assert traces(pipe.vae) != before
    with tilewise.patched(pipe, "sta", vae=False):
        assert traces(pipe.vae) == before
    assert traces(pipe.vae) != before
    with pytest.raises(tilewise.ConfigError, match="vae must be true or false, got 1"):
        tilewise.patch(pipe, "dense", vae=1)


def test_a_patch_that_fails_puts_the_earlier_one_back(pipe, monkeypatch):
    tilewise.patch(pipe, "sta")
    before = traces(pipe.vae)
    real, results = VaePatch._put_on, iter([None, 1 / 2])

    def fails_once(*args):
        return real(*args) if next(results, None) is None else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(VaePatch, "_put_on", fails_once)
        with pytest.raises(ZeroDivisionError):
            tilewise.patch(pipe, "dense", vae=True)
    assert tilewise.summary(pipe).method["method"]["name"] == "sta"
    assert traces(pipe.vae) == before


def test_pipelines_without_it_and_bare_denoisers(pipe):
    before = traces(pipe.vae)
    tilewise.patch(pipe.transformer, "dense")
    assert traces(pipe.vae) == before
    vae, pipe.vae = pipe.vae, None
    tilewise.unpatch(tilewise.patch(pipe, "dense"))
    assert traces(vae) == before


@pytest.mark.usefixtures("fused_on_the_cpu")
@pytest.mark.parametrize("alone", [True, False])
def test_a_copy_is_patched_by_itself(pipe, alone):
    z = latents()
    before = traces(pipe.vae)
    tilewise.patch(pipe, "dense")
    want, on = decoded(pipe.vae, z), traces(pipe.vae)
    other = copy.deepcopy(pipe)
    if alone:
        other.vae = copy.deepcopy(pipe.vae)
    assert traces(pipe.vae) == on
    assert sorted(other.vae.__dict__) == sorted(pipe.vae.__dict__)
    with torch.no_grad():
        other.vae.decoder.conv_in.weight.zero_()
    assert not torch.equal(decoded(other.vae, z), want) and torch.equal(decoded(pipe.vae, z), want)
    assert tilewise.summary(pipe).vae == (VaeRow("decoder", 6, True),)
    assert tilewise.summary(other).vae == (VaeRow("decoder", 3, True),)
    tilewise.unpatch(other)
    assert {name: found[0] for name, found in traces(other.vae).items()} == {n: f[0] for n, f in before.items()}
    with pytest.raises(tilewise.TilewiseError, match="shallow copy of vae"):
        copy.deepcopy(copy.copy(pipe.vae))


@pytest.mark.usefixtures("fused_on_the_cpu")
@pytest.mark.compile
def test_compiled_before_and_after(pipe):
    z = latents(frames=1)
    want = decoded(pipe.vae, z)
    tilewise.patch(pipe, "dense")
    pipe.vae.decoder.compile(backend="eager")
    torch.testing.assert_close(decoded(pipe.vae, z), want, rtol=0, atol=1e-5)
    tilewise.unpatch(pipe)
    torch.testing.assert_close(decoded(pipe.vae, z), want, rtol=0, atol=1e-5)
    tilewise.patch(pipe, "dense")
    torch.testing.assert_close(decoded(pipe.vae, z), want, rtol=0, atol=1e-5)
    assert "vae.decoder runs stock code: it is compiled" in tilewise.summary(pipe).notes
