"""The plan of memory: what is counted, what gives in which order, and what is refused with numbers."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_wan
import torch

from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.latent_spaces.base import tiled
from tilewise.pipelines.memory import plan as memory_plan
from tilewise.pipelines.memory.plan import MemoryPlan, check_plan, host_bytes, plan_memory, vae_bytes
from tilewise.pipelines.memory.units import parse_bytes
from tilewise.plugins.errors import ConfigError, UnsupportedModelError

GRID = Grid(5, 32, 48)


def plan(pipe, limit=None, refresh=2, branches=2):
    return plan_memory(
        pipe, GRID, height=256, width=384, frames=9, refresh=refresh, branches=branches, limit=limit
    )  # fmt: skip


def test_what_is_counted():
    pipe = tiny_wan.tiny_pipeline()
    found = plan(pipe)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
    assert found.weights == sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    assert found.cache == 2 * 2 * GRID.tokens * 32 * 4  # branches × layers × tokens × channels × bytes
    assert plan(pipe, branches=1).cache == found.cache // 2
    assert plan(pipe, refresh=1).cache == 0
    assert found.cache_on_device == found.cache
    assert found.fits
    assert not found.vae_tiling
    assert found.peak == max(found.denoise, found.decode)


def test_the_cache_is_as_large_as_planned():
    import tilewise
    from tilewise.plugins.guidance.dual_path import two_paths
    from tilewise.plugins.methods.inward import Inward

    pipe = tiny_wan.tiny_pipeline()
    tilewise.patch(pipe, Inward(native=(8, 8)), steps=(0, 1))
    with two_paths(pipe, refresh=2) as paths:
        pipe("a star", height=256, width=384, num_frames=9, num_inference_steps=1, guidance_scale=3.0, max_sequence_length=16,
             output_type="latent")  # fmt: skip
        assert paths["transformer"].cache.on_device == plan(pipe).cache


def test_the_vae_estimate_is_what_a_decode_or_an_encode_holds(monkeypatch):
    """Run in the open on the CPU: the live tensors there are those of the meta run, but for what convolutions pad: rough."""
    from tilewise.pipelines.memory.estimate import _LiveTensors

    pipe, held = tiny_wan.tiny_pipeline(), {}
    for name, shape in (("decode", (1, 4, 5, 16, 16)), ("encode", (1, 3, 9, 64, 64))):
        with torch.no_grad(), _LiveTensors() as live:
            getattr(pipe.vae, name)(torch.randn(shape))
        held[name] = live.peak
    assert vae_bytes(pipe, 64, 64, 9) == pytest.approx(max(held.values()), rel=0.3)
    assert vae_bytes(pipe, 128, 128, 9) > 3 * vae_bytes(pipe, 64, 64, 9)
    for name, other in (("decode", "encode"), ("encode", "decode")):
        with monkeypatch.context() as alone:
            alone.setattr(memory_plan, f"{other}_peak", lambda *args: 0)
            assert vae_bytes(pipe, 64, 64, 9) == pytest.approx(held[name], rel=0.3)


def test_what_gives_and_in_which_order():
    pipe = tiny_wan.tiny_pipeline()

    def denoising(limit=None):  # so small a picture that decoding does not count
        return plan_memory(pipe, GRID, height=16, width=16, frames=1, refresh=2, branches=2, limit=limit)

    free = denoising()
    tight = denoising(free.denoise - free.cache // 2)
    assert tight.cache_on_device == free.cache // 2
    assert tight.on_host == free.cache - free.cache // 2
    assert tight.fits
    assert "in host memory" in str(tight)
    assert "host memory" not in str(free)
    # The VAE gives first: a decode that does not fit is made of tiles, where they are smaller than the clip.
    large = plan_memory(pipe, GRID, height=512, width=1024, frames=9, refresh=1, branches=1)
    small = plan_memory(pipe, GRID, height=512, width=1024, frames=9, refresh=1, branches=1, limit=large.decode - 1)
    assert small.vae_tiling
    assert small.vae < large.vae
    assert "the VAE in tiles" in str(small)


def test_the_host_is_not_counted_twice():
    """A pipeline on the CPU has all that is free for itself, or what it is given, and beside it only the rest."""
    pipe = tiny_wan.tiny_pipeline()
    alone = plan(pipe)
    assert alone.host_limit < 10**8  # other processes may have freed some since
    assert plan(pipe, 10**9).host_limit == pytest.approx(alone.limit - 10**9, abs=2e9)  # of the moment
    assert plan(pipe, 10**15).host_limit == 0


def test_a_control_group_limits_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_plan, "CGROUP", tmp_path)
    free = host_bytes()
    for most, left in (("max", free), ("1000000", 400_000)):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text("600000\n")
        assert host_bytes() == pytest.approx(left, abs=0 if most != "max" else 2e9)


def test_a_pipeline_whose_user_tiles_its_vae_keeps_its_tiles():
    pipe = tiny_wan.tiny_pipeline()
    size = {"height": 512, "width": 1024, "frames": 9, "refresh": 1, "branches": 1}
    assert not plan_memory(pipe, GRID, **size).vae_tiling
    pipe.vae.enable_tiling()
    assert plan_memory(pipe, GRID, **size).vae_tiling
    with tiled(pipe.vae, False):
        assert pipe.vae.use_tiling


def test_the_native_stages_decode_is_planned_for():
    pipe = tiny_wan.tiny_pipeline()
    size = {"height": 768, "width": 768, "frames": 1, "refresh": 1, "branches": 1, "full_path": False}
    native = vae_bytes(pipe, 512, 512, 1)
    weights = plan_memory(pipe, GRID, **size).weights
    for room, tiles in ((native, False), (native - 1, True)):
        found = plan_memory(pipe, GRID, **size, native=(512, 512), limit=weights + room)
        assert found.vae_tiling
        assert found.native_tiling is tiles
        assert found.decode <= weights + room


def test_an_offloaded_pipeline_runs_elsewhere(monkeypatch):
    """Its parts lie on the CPU, one at a time on the device."""
    pipe = tiny_wan.tiny_pipeline()
    whole = plan(pipe).weights
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda"), raising=False)
    monkeypatch.setattr(memory_plan, "device_bytes", lambda device: {"cuda": 10**12, "cpu": 10**6}[device.type])
    found = plan(pipe)
    assert found.limit == 10**12
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
    assert found.weights == max(sum(p.numel() * p.element_size() for p in part.parameters()) for part in parts) < whole
    assert not found.offload


def test_modules_that_are_brought_one_by_one():
    """Sequential offload: on the device is one layer at a time, and there is no more to offload."""
    import accelerate

    pipe = tiny_wan.tiny_pipeline()
    whole = plan(pipe).weights
    largest = max(p.numel() * p.element_size() for part in (pipe.transformer, pipe.vae, pipe.text_encoder)
                  for p in part.parameters())  # fmt: skip
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        accelerate.cpu_offload(part, torch.device("cpu"))
    assert pipe.device.type == "meta"
    assert largest <= plan(pipe).weights < 2 * largest < whole / 2
    tight = plan(pipe, limit=1000)
    assert not tight.fits and not tight.offload
    # The skeleton of a pipeline is on "meta" too, and will have all of it where it runs.
    skeleton = plan_memory(
        pipe, GRID, height=256, width=384, frames=9, refresh=2, branches=2, device=torch.device("cpu")
    )
    assert skeleton.weights >= whole


def test_a_model_that_keeps_parts_in_float32_is_planned_as_it_computes(tmp_path):
    """Loaded in bfloat16, Wan has its modulation in float32 still; a skeleton has not. Stored in 8 bits it computes in 16."""
    from tilewise.pipelines.loading.load import cast_skeleton, load_pipeline, load_skeleton

    tiny_wan.tiny_pipeline().save_pretrained(tmp_path / "tiny")
    loaded = load_pipeline(tmp_path / "tiny", device="cpu", dtype="bfloat16")
    assert {p.dtype for p in loaded.transformer.parameters()} == {torch.bfloat16, torch.float32}
    found = plan(loaded)
    skeleton = cast_skeleton(load_skeleton(tmp_path / "tiny"), torch.bfloat16)
    ahead = plan_memory(
        skeleton, GRID, height=256, width=384, frames=9, refresh=2, branches=2, device=torch.device("cpu")
    )
    assert (found.cache, found.activations) == (ahead.cache, ahead.activations)
    assert found.cache == 2 * 2 * GRID.tokens * 32 * 2
    loaded.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert plan(loaded).activations == found.activations


@pytest.mark.compile
def test_vaes_that_are_compiled_or_tiny():
    from diffusers import AutoencoderTiny
    from test_models import flux

    pipe = tiny_wan.tiny_pipeline()
    whole = plan(pipe).vae
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    assert plan(pipe).vae == whole
    pipe, _ = flux()
    pipe.vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                               num_decoder_blocks=(1, 1))  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="own VAE: a AutoencoderTiny encodes to no distribution"):
        plan_memory(pipe, Grid(1, 8, 8), height=64, width=64, frames=1, refresh=1, branches=1)


def test_refusals_have_numbers():
    pipe = tiny_wan.tiny_pipeline()
    found = plan(pipe, 1000)
    assert not found.fits
    with pytest.raises(ConfigError, match=r"a clip of nothing does not fit: denoising needs [\d.]+ GiB.*weights"):
        check_plan(found, "a clip of nothing")
    base = MemoryPlan(100, 10, 1, 1, 50, 0, 5, 5, False, False)
    with pytest.raises(ConfigError, match=r"host memory; refresh=1 keeps none"):
        check_plan(base, "this")
    with pytest.raises(ConfigError, match="decoding needs"):
        check_plan(dataclasses.replace(base, cache=0, vae=1000), "this")
    check_plan(dataclasses.replace(base, cache=0), "this")
    with pytest.raises(ConfigError, match="denoising needs"):  # where keeping no cache would not help
        check_plan(dataclasses.replace(base, activations=1000), "this")


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("500M", 5 * 10**8), (1234, 1234), ("0.5k", 500)]
)
def test_sizes_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["much", "", "-1GB", 0, True, "3 XB", None, float("nan")])
def test_bad_sizes_of_memory(text):
    with pytest.raises(ConfigError, match="a size of memory"):
        parse_bytes(text)
