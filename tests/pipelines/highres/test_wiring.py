"""What highres is asked for and what it plans arrive where they act: at the VAE, the denoiser, the cache, the pipeline."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_wan
import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image
from torch.nn.functional import interpolate

import tilewise
from tilewise.pipelines.highres import two_stages as stages
from tilewise.pipelines.highres.preparation import prepare
from tilewise.pipelines.highres.settings import HighresSettings
from tilewise.pipelines.highres.two_stages import highres
from tilewise.pipelines.latent_spaces.base import latent_space, tiled
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.plugins.guidance.cross_attention_cache import CrossAttentionCache
from tilewise.plugins.guidance.dual_path import two_paths
from tilewise.plugins.guidance.global_path import global_paths
from tilewise.plugins.guidance.rope_scaling import ntk, riflex, yarn
from tilewise.ui.cli.app import app

PROMPT = "a red circle"
PAGE = Path(__file__).parents[3] / "docs/high-resolution.md"


@pytest.fixture(scope="module")
def pipe(tiny_pipe_dir):
    pipe = WanPipeline.from_pretrained(tiny_pipe_dir)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(pipe, **options):
    given = {"height": 128, "width": 96, "native": (64, 64), "frames": 5, "steps": 4, **options}
    return highres(pipe, PROMPT, **given)


@pytest.fixture
def seen(pipe, monkeypatch):
    """What the denoiser and the VAE are given and give, call by call; and whether the VAE was in tiles."""
    seen = SimpleNamespace(forwards=[], outputs=[], decoded=[], pictures=[], encoded=[], tiling=[])

    def forward(model, args, given, output):
        assert not args
        seen.forwards.append(given)
        seen.outputs.append(output[0])

    def decode(latents, **options):
        pictures = whole_decode(latents, **options)
        seen.decoded.append(latents)
        seen.pictures.append(pictures[0])
        seen.tiling.append(("decode", pipe.vae.use_tiling))
        return pictures

    def encode(video):
        seen.encoded.append(video)
        seen.tiling.append(("encode", pipe.vae.use_tiling))
        return whole_encode(video)

    whole_decode, whole_encode = pipe.vae.decode, pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "decode", decode)
    monkeypatch.setattr(pipe.vae, "encode", encode)
    handle = pipe.transformer.register_forward_hook(forward, with_kwargs=True)
    yield seen
    handle.remove()


# ── what the second stage begins with ────────────────────────────────────────────────────────────────────────────────


def enlarged(frames, height, width, how):
    """(1, 3, T, H, W) in 0 … 1, by the libraries' own words."""
    if how != "lanczos":
        return torch.stack(
            [interpolate(frame, (height, width), mode=how, align_corners=False) for frame in frames.unbind(2)], 2
        )
    planes = frames[0].flatten(0, 1).numpy()
    large = [np.asarray(Image.fromarray(x, "F").resize((width, height), Image.Resampling.LANCZOS)) for x in planes]
    return torch.from_numpy(np.stack(large)).view(1, 3, -1, height, width)


def clean_start(pipe, seen, height, width, how):
    """The native stage's clip at the target's size, as latents."""
    native, pixels = seen.decoded[0], (seen.pictures[0] / 2 + 0.5).clamp(0, 1)
    if how == "latent":
        frames = [
            interpolate(x, (height // 4, width // 4), mode="bicubic", align_corners=False) for x in native.unbind(2)
        ]
        return torch.stack(frames, 2)
    with torch.no_grad():
        return type(pipe.vae).encode(pipe.vae, enlarged(pixels, height, width, how).clamp(0, 1) * 2 - 1)[0].mode()


def noise_of(forward, clean):
    """The noise in what a denoiser is given: x = (1 − σ) clean + σ noise."""
    sigma = forward["timestep"].flatten()[0] / 1000
    return (forward["hidden_states"] - (1 - sigma) * clean) / sigma


FEW = {"steps": 3, "strength": 0.7, "flow_shift": 1.0, "guidance": 1.0}  # forwards 0, 1, 2; and from σ = 0.5: 3, 4


def test_the_clip_is_upscaled_as_asked(pipe, seen):
    """The noise is the same whichever way the clip is upscaled: so it is what is left when the right clip is taken off."""
    noise, clean = {}, {}
    for how in ("bicubic", "bilinear", "lanczos", "latent"):
        for calls in vars(seen).values():
            calls.clear()
        make(pipe, upscale=how, **FEW)
        assert len(seen.encoded) == (how != "latent")
        clean[how] = clean_start(pipe, seen, 128, 96, how)
        noise[how] = noise_of(seen.forwards[3], clean[how])
    for how in ("bilinear", "lanczos", "latent"):
        torch.testing.assert_close(noise[how], noise["bicubic"], atol=1e-4, rtol=0)
    assert all((clean[a] - clean[b]).abs().max() > 1e-3 for a in clean for b in clean if a != b)


def test_the_second_stage_has_noise_of_its_own(pipe, seen):
    make(pipe, height=64, width=64, **FEW)
    first = seen.forwards[0]["hidden_states"].flatten()
    second = noise_of(seen.forwards[3], clean_start(pipe, seen, 64, 64, "bicubic")).flatten()
    assert first.std() == pytest.approx(1, abs=0.1)
    assert second.std() == pytest.approx(1, abs=0.1)
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.1


# ── what the denoiser is given ───────────────────────────────────────────────────────────────────────────────────────


def test_the_prompt_is_guided_and_the_negative_prompt_is_not(pipe, seen):
    """Each forward again, by itself: the prompt's with both paths, the negative prompt's in its window alone."""
    made = make(pipe, negative="a blue square", guided="cond", refresh=1)
    with torch.no_grad():
        prompt, negative = pipe.encode_prompt(PROMPT, "a blue square", max_sequence_length=16)
    size = seen.forwards[-1]["hidden_states"].shape
    target = [x for x in zip(seen.forwards, seen.outputs, strict=True) if x[0]["hidden_states"].shape == size]
    assert len(target) == 2 * 2
    tilewise.patch(pipe.transformer, made.clip.settings.method)
    try:
        for given, output in target:
            guided = torch.equal(given["encoder_hidden_states"], prompt)
            assert guided or torch.equal(given["encoder_hidden_states"], negative)
            with torch.no_grad():
                alone = pipe.transformer(**given)[0]
                with two_paths(pipe.transformer, refresh=1):
                    both = pipe.transformer(**given)[0]
            torch.testing.assert_close(output, both if guided else alone, atol=1e-5, rtol=1e-5)
            assert (both - alone).abs().max() > 1e-3
    finally:
        tilewise.unpatch(pipe.transformer)


RULES = {None: None, "ntk": ntk, "yarn": yarn, "riflex": riflex}


@pytest.mark.parametrize("rope_time", [None, "ntk", "yarn", "riflex"])
@pytest.mark.parametrize("rope", [None, "ntk", "yarn"])
def test_rotary_frequencies(pipe, rope, rope_time):
    """What the target's attention turns by: the rule's frequencies on the axes that are longer than the model's own."""
    given = []
    handle = pipe.transformer.blocks[0].attn1.register_forward_pre_hook(lambda m, args: given.append(args[3]))
    try:
        make(pipe, height=64, frames=13, steps=2, strength=0.5, guidance=1.0, rope=rope, rope_time=rope_time)
    finally:
        handle.remove()
    lengths, native = (7, 8, 12), (5, 8, 8)  # 64×96 and 13 frames; 64×64 and 9, in tokens
    rules = (RULES[rope_time], RULES[rope], RULES[rope])
    angles = []
    for axis, (channels, rule) in enumerate(zip((8, 4, 4), rules, strict=True)):
        theta = 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        if rule is not None and lengths[axis] > native[axis]:
            theta = rule(theta, native[axis], lengths[axis])
        shape = [1, 1, 1, channels // 2]
        shape[axis] = lengths[axis]
        angle = torch.arange(lengths[axis])[:, None] * theta
        angles.append(angle.view(shape).expand(*lengths, channels // 2))
    wanted = torch.cat(angles, -1).flatten(0, 2)
    cos, sin = (x[0, :, 0] for x in given[-1])
    torch.testing.assert_close(cos[:, 0::2], wanted.cos().float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[:, 1::2], wanted.sin().float(), atol=1e-5, rtol=0)


# ── defaults ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_docs_say_the_defaults():
    rows = [re.split(r" \| ", line.strip("| ")) for line in PAGE.read_text("utf-8").splitlines() if "| `" in line]
    told = {name: default for names, _, default in rows for name in re.findall(r"`(\w+)`", names)}
    pipe = tiny_wan.tiny_pipeline()  # without a tilewise.json: as any Wan
    options = HighresSettings().for_model(model_defaults(pipe), global_paths(pipe))
    assert told["strength"] == f"the model's, or {options.strength}"
    assert told["refresh"] == str(options.refresh)
    assert told["global_path"] == f"{options.global_path}; none where text is part of the sequence"
    assert told["guided"] == options.guided
    assert f"for Wan {options.flow_shift:g}," in told["flow_shift"]
    assert (told["precision"], options.precision) == ("16 bits", None)
    assert (told["max_memory"], options.max_memory) == ("what is free", None)
    assert (told["rope"], told["rope_time"], options.rope, options.rope_time) == ("none", "none", None, None)


def test_the_help_says_the_defaults():
    command = typer.main.get_command(app).commands["generate"]
    shown = {parameter.name: parameter.show_default for parameter in command.params}
    for name in ("refresh", "guided", "upscale"):
        assert shown[name] == str(getattr(HighresSettings(), name))


def test_a_run_by_default(pipe, seen):
    """7 of 10 steps, at a shift of 9; the prompt guided, anew at every fifth."""
    made = make(pipe, steps=10, height=80, width=64, frames=1)
    assert made.forwards == {"refreshed": 2, "reused": 5, "unguided": 7}
    schedule = FlowMatchEulerDiscreteScheduler(shift=9.0)
    schedule.set_timesteps(10)
    ran = torch.cat([given["timestep"] for given in seen.forwards])[2 * 10 :: 2]
    torch.testing.assert_close(ran, schedule.timesteps[3:])


# ── what the plan of memory asks for ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("boundary", [None, 0.7], ids=["one denoiser", "two denoisers"])
def test_a_small_limit_moves_the_cache_to_the_host(monkeypatch, boundary):
    """As much as was planned stays on the device, and the clip is the same to the bit."""
    caches, most = [], {"device": 0, "host": 0}
    put = CrossAttentionCache.put

    def watched(self, *given):
        put(self, *given)
        if not any(self is cache for cache in caches):
            caches.append(self)
        most["device"] = max(most["device"], sum(cache.on_device for cache in caches))
        most["host"] = max(most["host"], sum(cache.on_host for cache in caches))

    monkeypatch.setattr(CrossAttentionCache, "put", watched)
    # Many tokens and a small VAE: denoising takes more than decoding. Two steps of the target on each side of the boundary.
    pipe = tiny_wan.tiny_pipeline(num_layers=4, patch_size=(1, 1, 1), boundary_ratio=boundary)
    pipe.vae = tiny_wan.tiny_vae(base_dim=2)
    options = {"native": (48, 48), "height": 64, "width": 64, "steps": 6, "guidance": 3.0, "flow_shift": 3.0}
    free = make(pipe, **options)
    assert most == {"device": free.plan.cache, "host": 0}
    caches.clear()
    most.update(device=0)
    tight = make(pipe, **options, max_memory=free.plan.denoise - free.plan.cache // 2)
    assert len(caches) == 1 + (boundary is not None)
    assert 0 < most["device"] <= tight.plan.cache_on_device == free.plan.cache - free.plan.cache // 2
    assert most["host"] == free.plan.cache - most["device"]
    assert np.array_equal(tight.frames, free.frames)


def planned(pipe, **changes):
    """A clip's work, with a plan that asks for more than is needed here."""
    shared = {"frames": 1, "steps": 2, "guidance": 1.0}
    work = prepare(pipe, PROMPT, 80, 64, None, "dense", HighresSettings(), shared)
    return dataclasses.replace(work, plan=dataclasses.replace(work.plan, **changes))


@pytest.mark.parametrize("wanted", [True, False])
def test_parts_go_off_the_device_before_anything_runs(pipe, monkeypatch, wanted):
    """And come back after everything has."""
    told = []
    monkeypatch.setattr("tilewise.pipelines.memory.limits.possible", lambda pipe: ["offload"])  # as on a GPU
    monkeypatch.setattr(pipe, "enable_model_cpu_offload", lambda device: told.append(f"off {device}"))
    monkeypatch.setattr(pipe, "remove_all_hooks", lambda: told.append("back"))
    monkeypatch.setattr(pipe, "to", lambda device: told.append(f"to {device}"))
    stages.make(pipe, planned(pipe, offload=wanted), lambda phase, *_: told.append(phase))
    phases = ["native: denoise", "native: decode", "upscale", "denoise", "decode"]
    assert list(dict.fromkeys(told)) == (["off cpu", *phases, "back", "to cpu"] if wanted else phases)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_targets_vae_runs_in_tiles(pipe, seen, wanted):
    stages.make(pipe, planned(pipe, vae_tiling=wanted))
    assert seen.tiling[1:] == [("encode", wanted), ("decode", wanted)]
    assert not pipe.vae.use_tiling


# ── the VAE in tiles ─────────────────────────────────────────────────────────────────────────────────────────────────


def seam(away, heights, widths):
    """How much more a picture's error jumps where tiles meet than elsewhere: the worse of both directions, 1 for no more."""
    found = []
    for axis, places in ((1, heights), (2, widths)):
        jumps = np.abs(np.diff(away, axis=axis)).mean((0, 3 - axis, 3))
        there = np.isin(np.arange(1, away.shape[axis]), places)
        found.append(jumps[there].mean() / jumps[~there].mean())
    return max(found)


def test_tiles_are_put_together_without_seams():
    """The trained demo model, one frame of 320×448 in 2×3 tiles. From the whole decode they are at most 0.040 away, of colours
    0 … 1, and 0.00009 in the mean; pieces decoded by themselves and pasted 0.33 and 0.00096, with 46 times the jumps at borders.
    """
    from tilewise.pipelines.loading.load import load_pipeline

    pipe = load_pipeline("demo", device="cpu")
    space = latent_space(pipe)
    y, x = np.mgrid[0:320, 0:448] / 320
    frames = np.full((1, 320, 448, 3), (0.16, 0.31, 0.86), np.float32)
    frames[0][np.hypot(y - 0.5, x - 0.6) < 0.3] = (0.86, 0.16, 0.16)
    latents = space.encode(pipe, frames)
    whole = space.decode(pipe, latents)
    with tiled(pipe.vae, True):
        high, wide = pipe.vae.tile_sample_stride_height, pipe.vae.tile_sample_stride_width
        tiles = space.decode(pipe, latents)
    heights, widths = range(high, 320, high), range(wide, 448, wide)
    assert heights and widths
    rows = [[space.decode(pipe, z) for z in row.split(wide // 4, -1)] for row in latents.split(high // 4, -2)]
    pasted = np.concatenate([np.concatenate(row, 2) for row in rows], 1)
    away = np.abs(tiles - whole)
    assert 0 < away.max() < 0.08
    assert away.mean() < 0.0002
    assert seam(tiles - whole, heights, widths) < 3
    assert seam(pasted - whole, heights, widths) > 10
