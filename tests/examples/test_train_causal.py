"""The recipe of the causal mode: its data, its attention against a mask, its sampler against its training, its command line."""

import itertools
import json
import re
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import tilewise  # noqa: E402
from examples.train_demo_model import checkpoints  # noqa: E402
from examples.train_demo_model.__main__ import main  # noqa: E402
from examples.train_demo_model.captions import caption  # noqa: E402
from examples.train_demo_model.causal import streamed  # noqa: E402
from examples.train_demo_model.causal.attention import Layout, Rotation, Window, rotate  # noqa: E402
from examples.train_demo_model.causal.card import causal_card  # noqa: E402
from examples.train_demo_model.causal.clips import NEVER, Clips, draw_scenes, draw_sequences  # noqa: E402
from examples.train_demo_model.causal.lora import add_lora, lora_parameters, shrink  # noqa: E402
from examples.train_demo_model.causal.measures import borders, measure_changes, measure_clips  # noqa: E402
from examples.train_demo_model.causal.paths import change_colours, continuing_scenes  # noqa: E402
from examples.train_demo_model.causal.sampler import ChunkSampler, noise_levels, own_processor  # noqa: E402
from examples.train_demo_model.config import tiny  # noqa: E402
from examples.train_demo_model.denoiser_training import build_denoiser  # noqa: E402
from examples.train_demo_model.render import render, to_frames  # noqa: E402
from examples.train_demo_model.scenes import sample_scenes  # noqa: E402
from tests.helpers.tiny_wan import tiny_pipeline  # noqa: E402
from tilewise.pipelines.quality.demo_world import MOTIONS  # noqa: E402
from tilewise.pipelines.streaming.recipe import CausalRecipe  # noqa: E402
from tilewise.plugins.streaming.kv_cache import KVCache  # noqa: E402

GRID, WIDTH = (3, 2, 3), 32  # tokens of a chunk (latent frames, rows, columns), of the text's states


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    model = build_denoiser(tiny()).double().eval()
    add_lora(model, 3, 1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def _inputs(rows, seed=2):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, rows, 4, GRID[0], 2 * GRID[1], 2 * GRID[2], generator=generator, dtype=torch.float64)
    text = torch.randn(2, rows, 5, WIDTH, generator=generator, dtype=torch.float64)
    timestep = torch.rand(2, rows, generator=generator, dtype=torch.float64) * 1000
    return latents, timestep, text


def _run(model, latents, timestep, text):
    with torch.no_grad():
        out = model(latents.flatten(0, 1), timestep.flatten(), text.flatten(0, 1), return_dict=False)[0]
    return out.unflatten(0, (2, -1))


@pytest.mark.parametrize("window", [Window(3, 1), Window(5, 1), Window(2, 0), Window(4, 2)])
def test_layout_is_attention_under_a_mask(window):
    """Against one dense attention for each chunk over all tokens, its keys turned to where they stand for that chunk."""
    generator = torch.Generator().manual_seed(0)
    model = build_denoiser(tiny())
    rotation = Rotation(model, *GRID)
    layout = Layout(rotation, 4, (0, 0, 2, 4, 3), window)
    tokens, head = GRID[0] * GRID[1] * GRID[2], 16
    query, plain, value = torch.randn(3, 2, 9, tokens, 2, head, generator=generator, dtype=torch.float64)

    def turned(x, chunks):
        grid = torch.cartesian_prod(torch.arange(GRID[0]), torch.arange(GRID[1]), torch.arange(GRID[2]))
        sizes = (head - 2 * (2 * (head // 6)), 2 * (head // 6), 2 * (head // 6))
        rows = []
        for part, chunk in zip(x.unbind(1), chunks, strict=True):
            places = grid + torch.tensor([chunk * GRID[0], 0, 0])
            angle = torch.cat(
                [
                    places[:, axis, None] * (10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size))
                    for axis, size in enumerate(sizes)
                ],
                1,
            )
            complex_part = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
            factor = torch.polar(torch.ones_like(angle), angle)[:, None]
            rows.append(torch.view_as_real(complex_part * factor).flatten(-2))
        return torch.stack(rows, 1)

    own = [*range(4), 0, 0, 2, 4, 3]
    out = layout(rotate(query, layout.own), rotate(plain, layout.own), value, plain)
    for row, number in enumerate(own):
        ring = [c for c in range(4) if max(window.sink, number - (window.window - window.sink - 1)) <= c < number]
        sink = [c for c in range(window.sink) if c < number]
        oldest = ring[0] if ring else number
        stand = {c: c + max(0, oldest - len(sink)) for c in sink} | {c: c for c in ring}
        seen = [*stand, row]
        keys = turned(plain[:, seen], [*stand.values(), number]).flatten(1, 2)
        expected = F.scaled_dot_product_attention(
            turned(query[:, [row]], [number]).flatten(1, 2).transpose(1, 2),
            keys.transpose(1, 2),
            value[:, seen].flatten(1, 2).transpose(1, 2),
        )
        torch.testing.assert_close(out[:, row], expected.transpose(1, 2), atol=1e-5, rtol=1e-5)  # float32 tables


def test_first_chunk_alone_is_the_stock_denoiser(denoiser):
    latents, timestep, text = _inputs(1)
    expected = _run(denoiser, latents, timestep, text)
    processor = own_processor(denoiser)
    processor.layout = Layout(Rotation(denoiser, *GRID), 0, (0,), Window(3, 1))
    torch.testing.assert_close(_run(denoiser, latents, timestep, text), expected, atol=1e-6, rtol=1e-5)


def test_sampler_sees_what_training_showed(denoiser):
    """A pass over the next chunk against the cache equals the noisy chunk of one forward over the whole sequence."""
    window, rotation = Window(3, 1), Rotation(denoiser, *GRID)
    latents, timestep, text = _inputs(6 + 6)
    timestep[:, :6], timestep[:, 6:] = 0, 700
    processor = own_processor(denoiser)
    processor.layout = Layout(rotation, 6, range(1, 7), window)
    expected = _run(denoiser, latents, timestep, text)[:, 6:]
    with ChunkSampler(denoiser, window, rotation, levels=[0.7], autocast=nullcontext) as sampler:
        for number in range(7):
            if number:
                found = sampler.velocity(latents[:, 5 + number], 0.7, text[:, 5 + number])
                torch.testing.assert_close(found, expected[:, number - 1].float(), atol=2e-5, rtol=1e-4)
            if number < 6:
                sampler.give(latents[:, number], text[:, number])
    assert denoiser.blocks[0].attn1.processor is processor


def test_recache_is_a_new_start_behind_the_sink(denoiser):
    window, rotation = Window(3, 1), Rotation(denoiser, *GRID)
    latents, _, text = _inputs(8)
    chunks = {number: latents[:, number] for number in range(8)}

    def velocity(after_change):
        with ChunkSampler(denoiser, window, rotation, levels=[0.7], autocast=nullcontext) as sampler:
            if after_change:
                for number in range(6):
                    sampler.give(chunks[number], text[:, 0])
                sampler.recache(chunks, text[:, 1])
            else:  # the sink with the old text, then only the window's one chunk with the new one
                sampler.give(chunks[0], text[:, 0])
                sampler.give(chunks[5], text[:, 1])
            return sampler.velocity(chunks[7], 0.7, text[:, 1])

    torch.testing.assert_close(velocity(True), velocity(False), atol=1e-5, rtol=1e-5)


def test_lora_is_what_peft_loads(denoiser, tmp_path):
    """The file's names are those that diffusers takes; the stock model with it computes the same."""
    pytest.importorskip("peft")
    latents, timestep, text = (x.float() for x in _inputs(1))
    model = denoiser.float()
    expected = _run(model, latents, timestep, text)
    checkpoints.save(tmp_path / "lora.safetensors", lora_parameters(model))
    stock = build_denoiser(tiny())
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith((".up", ".down"))}
    stock.load_state_dict(weights)
    assert not torch.allclose(_run(stock, latents, timestep, text), expected, atol=1e-3)
    stock.load_lora_adapter(checkpoints.load(tmp_path / "lora.safetensors")[0], prefix="transformer")
    torch.testing.assert_close(_run(stock, latents, timestep, text), expected, atol=2e-4, rtol=1e-3)


def test_shrink_keeps_the_largest_singular_values():
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(6, 20, generator=generator), torch.randn(14, 6, generator=generator)
    tensors = {"x.lora_A.weight": down, "x.lora_B.weight": up}
    values = torch.linalg.svdvals(up.double() @ down.double()).square()
    for rank in (2, 5, 6):
        small, lost = shrink(tensors, rank)
        assert small["x.lora_A.weight"].shape == (rank, 20) and small["x.lora_B.weight"].shape == (14, rank)
        assert lost == pytest.approx(float(values[rank:].sum() / values.sum()), abs=1e-5)
        gone = up.double() @ down.double() - small["x.lora_B.weight"].double() @ small["x.lora_A.weight"].double()
        assert float(gone.square().sum() / values.sum()) == pytest.approx(lost)


def test_streamed_clips_change_their_prompt_after_the_frames_asked_for():
    pipe = tiny_pipeline()
    recipe = CausalRecipe(chunk=1, window=4, sink=1, height=32, width=48, fps=8, timesteps=(1000.0,))
    pipe.transformer._tilewise_recipe = recipe.to_dict()
    args = (pipe, "a red circle", "a blue circle", 6, 1, KVCache(4, 1), 3)
    clip, change = streamed._clip(*args)
    assert change == 4 and clip.shape == (2 * (change + streamed.AFTER) - 1, 32, 48, 3)
    with tilewise.stream(pipe, "a red circle", cache=KVCache(4, 1), seed=3) as video:
        one = np.concatenate([next(video).frames for _ in range(5)])
    assert (clip[:7] == one[:7]).all() and (clip[7:9] != one[7:9]).any()


def test_streams_are_measured_kept_and_on_the_card(tmp_path, monkeypatch):
    """Of perfect clips everything is right; clips that are there are not made again."""
    made = []

    def perfect(pipe, before, after, frames, chunk, cache, seed):
        made.append((cache.policy, before))
        number = 5
        length = 6 * (number + streamed.AFTER) - 1
        scenes = continuing_scenes(512, 8, frames=length, two_objects=0.0)
        row = int(np.flatnonzero(scenes["motion0"] == MOTIONS.index("left"))[0])
        one = {key: values[row : row + 1] for key, values in scenes.items()}
        changed, new = change_colours(one, 5, np.array([6 * number - 1]))
        texts[:] = caption(one, 0)[0], caption(new, 0)[0]
        return (to_frames(render(changed, height=64)) * 255).round().astype(np.uint8)[0], number

    texts = ["", ""]
    perfect(None, "", "", 29, 3, KVCache(12, 3), 0)
    made.clear()
    recipe = CausalRecipe(chunk=3, window=12, sink=3)
    monkeypatch.setattr(streamed, "_clip", perfect)
    monkeypatch.setattr(streamed, "load_pipeline", lambda *_, **__: None)
    monkeypatch.setattr(streamed.tilewise, "load_causal_checkpoint", lambda *_: (None, recipe))
    monkeypatch.setattr(streamed, "held_out_prompts", lambda *_: ([texts[0]] * 64, None))
    monkeypatch.setattr(streamed, "recoloured", lambda *_: [texts[1]] * 64)
    command = ["stream-causal", "--run", str(tmp_path), "--device", "cpu", "--frames", "29", "--prompts", "1"]
    assert main([*command, "--seconds", "-1"]) == 0 and not made
    assert main([*command, "--policies", "fixed,ema"]) == 0
    assert main([*command, "--policies", "fixed,ema"]) == 0
    assert made == [("fixed", texts[0]), ("ema", texts[0])]
    report = json.loads((tmp_path / "stream_evaluation.json").read_text())["policies"]
    assert all(report["ema"][key] == 1.0 for key in ("clips", "kept", "moving", "border_steps"))
    assert report["ema"]["change"] == {"colour": 1.0, "new_colour": 1.0, "colour_later": 1.0, "goes_on": 1.0}

    folder = tmp_path / "model" / "causal"
    assert causal_card(tmp_path / "model") == ""
    shutil.copytree(ROOT / "pipelines" / "demo_model" / "causal", folder)
    shutil.copy(tmp_path / "stream_evaluation.json", folder)
    card = causal_card(tmp_path / "model")
    assert "| measure | goal | fixed | ema |" in card and "| object and background kept | 90 % | 100% | 100% |" in card
    assert "earlier runs: 1,493 steps" in card
    (folder / "evaluation.json").unlink()
    assert "own sampler" not in causal_card(tmp_path / "model")


def test_paths_begin_like_the_short_clips_and_never_stop():
    short = sample_scenes(400, 3)
    long = continuing_scenes(400, 3, frames=200, two_objects=0.15)
    for slot, key in itertools.product(range(2), ("x", "y", "radius")):
        begun = np.abs(long[f"{key}{slot}"][:, :12] - short[f"{key}{slot}"][:, :12])
        assert begun.max() < 0.1, key  # growing turns earlier than a short clip ends
        assert np.median(begun) < 1e-6
    motion = np.array(MOTIONS)[long["motion0"]]
    moves = np.abs(np.diff(np.stack([long[f"{key}0"] for key in ("x", "y", "radius")]), axis=2)).sum(0)
    assert (moves[:, 150:].sum(1) > 0.3).all()
    assert (np.abs(long["x0"]) + long["radius0"]).max() < 1.2
    straight = np.isin(motion, ("left", "right", "up", "down"))
    assert np.ptp(np.maximum(moves, moves.max(1, keepdims=True) * 0.99)[straight], axis=1).max() < 0.05


def test_colours_change_at_a_frame_and_so_do_captions():
    scenes = continuing_scenes(40, 4, frames=9, two_objects=0.3)
    changed, after = change_colours(scenes, 5, np.full(40, 5))
    differs = (after["colour0"] != scenes["colour0"]) | (after["background"] != scenes["background"])
    assert differs.all()
    assert (after["colour0"] != after["background"]).all()
    before, video = render(scenes, height=32), render(changed, height=32)
    assert torch.equal(video[:, :, :5], before[:, :, :5])
    assert torch.equal(video[:, :, 5:], render(after, height=32)[:, :, 5:])
    assert all(caption(scenes, row)[0] != caption(after, row)[0] for row in range(40))


def test_sequences_have_the_caption_of_what_they_show():
    sizes = replace(tiny().causal, chunks=4, clip_chunks=9, changes=0.6)
    count = 30
    _, _, change = draw_scenes(sizes, (1, 2), count, 53)
    assert 5 < (change < NEVER).sum() < 28
    # A latent tells its clip and chunk, a text its clip and state.
    latents = torch.stack(torch.meshgrid(torch.arange(count), torch.arange(9), indexing="ij"), -1).float()
    latents = latents[..., None, None, None]
    text = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(count), indexing="ij"), -1).float()[
        :, :, None, None
    ]
    clips = Clips(latents, text, torch.from_numpy(change))
    found = draw_sequences(clips, sizes, 500, torch.Generator().manual_seed(0))
    clip, chunk = found.clean.flatten(2).unbind(-1)
    assert (clip == clip[:, :1]).all()
    assert (chunk[:, 0] == 0).all()
    assert (chunk[:, 1:].diff(dim=1) == 1).all()
    assert 0.3 < (chunk[:, 1] == 1).float().mean() < 0.8
    late = chunk >= clips.change[clip.long()]
    shown = found.text(found.noisy_late)[:, :, 0]
    assert torch.equal(shown[..., 1], clip)
    assert torch.equal(shown[..., 0], late.float())
    context = found.text(found.clean_late)[:, :, 0, 0]
    assert (context >= late.float()).all()
    assert (context[:, 0] == 0).all()  # the sink keeps the caption that it was made with
    assert not found.weight[(context > late.float())].any()
    assert not found.weight[:, 1][chunk[:, 1] > 1].any()
    assert found.weight[(chunk[:, 1] == 1) & (context == late.float()).all(1)].all()
    after = chunk - clips.change[clip.long()]
    assert torch.equal(found.changed, (after >= 0) & (after < 2)) and found.changed.any()
    part = found.rows(slice(3, 5))
    assert torch.equal(part.changed, found.changed[3:5])
    assert torch.equal(part.text(part.noisy_late), found.text(found.noisy_late)[3:5])


def test_measures_know_perfect_clips_and_broken_ones():
    scenes = continuing_scenes(64, 8, frames=58, two_objects=0.0)
    rows = [int(np.flatnonzero(scenes["motion0"] == MOTIONS.index(name))[0]) for name in ("left", "up", "circling")]
    scenes = {key: values[rows] for key, values in scenes.items()}
    prompts = [caption(scenes, row)[0] for row in range(3)]
    video = (to_frames(render(scenes, height=64)) * 255).round().astype(np.uint8)
    perfect = measure_clips(prompts, list(video))
    assert all(perfect[key] == 1.0 for key in ("kept", "moving", "border_steps", "inner_steps", "pattern", "alone"))
    assert max(perfect["drift"]) < 2
    broken = video.copy()
    broken[:, 30:] = broken[:, 30:31]
    assert measure_clips(prompts, list(broken))["moving"] == 0.0
    jumping = np.concatenate([video[:, :5], video[:, 20:]], 1)
    assert measure_clips(prompts, list(jumping))["border_steps"] < 1.0
    assert measure_clips(prompts[1:] + prompts[:1], list(video))["kept"] < 1.0
    changed, after = change_colours(scenes, 5, np.full(3, borders(58, 3)[3]))
    new = [caption(after, row)[0] for row in range(3)]
    video = (to_frames(render(changed, height=64)) * 255).round().astype(np.uint8)
    right = measure_changes(prompts, new, list(video), 4)
    assert (right["colour"], right["goes_on"]) == (1.0, 1.0)
    assert measure_changes(prompts, new, list(video), 6)["colour"] == 1.0
    assert measure_changes(prompts, new, list(video), 1)["colour"] == 0.0
    assert right["new_colour"] == 1.0 and measure_changes(prompts, new, list(video), 1)["new_colour"] == 0.0
    shapes = ("circle", "square", "triangle", "star")
    turned = [re.sub("|".join(shapes), lambda m: shapes[(shapes.index(m[0]) + 1) % 4], text) for text in new]
    other = measure_changes(prompts, turned, list(video), 4)
    assert (other["colour"], other["new_colour"]) == (0.0, 1.0)


def test_noise_levels_are_shifted():
    assert noise_levels([1000.0, 750.0, 500.0], 3.0) == pytest.approx([1.0, 0.9, 0.75])


def test_command_trains_writes_and_continues(tmp_path, capsys):
    model = ROOT / "pipelines" / "demo_model"
    command = [
        "causal",
        "--run",
        str(tmp_path),
        "--model",
        str(model),
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    assert main([*command, "--stop-after-minutes", "0", "--evaluate-seconds", "0"]) == 3
    assert main([*command, "--evaluate-seconds", "0"]) == 0
    assert "continuing at step" in capsys.readouterr().out
    tensors, _ = checkpoints.load(tmp_path / "causal_lora.safetensors")
    assert len(tensors) == 2 * 8 * 10
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in tensors.values())
    assert tensors["transformer.blocks.0.attn1.to_q.lora_A.weight"].shape == (4, 256)
    assert tensors["transformer.blocks.7.ffn.net.2.lora_B.weight"].abs().max() > 0
    training = json.loads((tmp_path / "causal_training.json").read_text())
    assert training["steps"] == 4
    other = tmp_path / "other"
    again = [str(other) if part == str(tmp_path) else part for part in command]
    lora = ["--from-lora", str(tmp_path / "causal_lora.safetensors")]
    assert main([*again, *lora, "--stop-after-minutes", "0", "--evaluate-seconds", "0"]) == 3
    begun, _ = checkpoints.load(other / "causal_lora.safetensors")
    before = json.loads((other / "causal_training.json").read_text())["before"]
    assert [(run["steps"], run["rank"]) for run in before] == [(4, 4)] and "history" not in before[0]
    assert all(torch.equal(begun[name], tensor) for name, tensor in tensors.items())
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert (recipe["chunk"], recipe["window"], recipe["sink"]) == (3, 9, 3)
    evaluate = ["evaluate-causal", "--evaluate-seconds", "0", *command[1:]]
    assert main(evaluate) == 0
    report = json.loads((tmp_path / "causal_evaluation.json").read_text())
    assert list(report["settings"]) == ["recipe"]
    assert report["change"]["clips"] == 2
    assert (tmp_path / "causal.png").exists()
