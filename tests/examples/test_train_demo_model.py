"""The demo model's recipe, every stage of its command line, with a tiny preset."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from examples.train_demo_model import checkpoints, scoring  # noqa: E402
from examples.train_demo_model.__main__ import main  # noqa: E402
from examples.train_demo_model.captions import build_tokenizer, captions_and_labels  # noqa: E402
from examples.train_demo_model.config import Config, tiny  # noqa: E402
from examples.train_demo_model.denoiser_training import _DenoiserTrainee, encode_text  # noqa: E402
from examples.train_demo_model.evaluation import HALVES, held_out_prompts  # noqa: E402
from examples.train_demo_model.loop import Limits, Run, train  # noqa: E402
from examples.train_demo_model.muon import orthogonalise  # noqa: E402
from examples.train_demo_model.objective import NoisePlan, draw_plan, flow_loss, noised  # noqa: E402
from examples.train_demo_model.render import render  # noqa: E402
from examples.train_demo_model.scenes import HELD_OUT, sample_scenes, take  # noqa: E402
from examples.train_demo_model.text_training import build_text_encoder, tokenize  # noqa: E402
from examples.train_demo_model.whole_clip_vae import WholeClipVae, build_vae  # noqa: E402
from tilewise.plugins import presets  # noqa: E402

TINY = ["--preset", "tiny", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that went through everything, by the command line."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["all", "--run", str(folder), *TINY, "--to", str(folder / "model")]) == 0
    return folder


@pytest.mark.parametrize("arguments", [{}, {"torch_dtype": torch.float32}])
def test_exported_folder_is_a_stock_pipeline(finished, arguments):
    from diffusers import WanPipeline

    folder = finished / "model"
    pipe = WanPipeline.from_pretrained(folder, local_files_only=True, **arguments)
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vae.dtype} == {torch.float32}
    prompt = "a red circle moving right on a blue background"
    frames = pipe(prompt, height=32, width=32, num_frames=5, num_inference_steps=2, guidance_scale=6.0).frames
    assert frames.shape == (1, 5, 32, 32, 3)
    assert not list(folder.rglob("*.bin"))
    assert not list(folder.rglob("*.p*kl"))
    card = (folder / "README.md").read_text()
    report = json.loads((finished / "evaluation.json").read_text())
    assert f"{report['vae_psnr']['mean']:.1f} dB" in card
    dense = report["methods"]["dense"]
    assert set(dense["scores"]) >= {"colour", "shape", "count", "motion", "background"}
    assert list(dense["halves"]) == list(HALVES)
    training = json.loads((folder / "training.json").read_text())
    assert list(training["stages"]) == ["text", "vae", "denoiser", "decoder"]
    assert training["stages"]["denoiser"]["steps"] == 6
    assert training["stages"]["denoiser"]["metrics"].keys() >= {"whole", "attributes"}
    assert (training["torch"], "held_out_psnr" in training["stages"]["decoder"]) == (torch.__version__, True)
    native = json.loads((folder / "tilewise.json").read_text())
    assert native == {
        **{"height": 32, "width": 32, "frames": 5, "steps": 2, "guidance": 3.0, "fps": 8},
        **{
            "max_sequence_length": 32,
            "world": "shapes",
            "highres_strength": 0.5,
            "highres_flow_shift": 3.0,
            "one_shape": True,
            "clean_frames": 2,
        },
    }
    index = json.loads((folder / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    assert (finished / "evaluation.png").exists()


def test_finished_stages_are_skipped(finished, capsys):
    before = (finished / "vae.safetensors").stat().st_mtime_ns
    assert main(["vae", "--run", str(finished), *TINY]) == 0
    assert "already done" in capsys.readouterr().out
    assert (finished / "vae.safetensors").stat().st_mtime_ns == before


def _score(folder, work, *arguments):
    options = ["--prompts", "3", "--batch", "2", "--device", "cpu", "--threads", "1", "--work", str(work)]
    assert main(["score", "--model", str(folder), *options, *arguments]) == 0
    return json.loads((folder / "evaluation.json").read_text())


def test_score_compares_methods_and_continues(finished, tmp_path, capsys, monkeypatch):
    folder, work = tmp_path / "model", tmp_path / "work"
    shutil.copytree(finished / "model", folder)
    kept = json.loads((folder / "evaluation.json").read_text())
    first = _score(folder, work, "--methods", "dense")
    assert list(first["methods"]) == ["dense"]
    assert {key: first[key] for key in ("vae_psnr", "continuation")} == {
        key: kept[key] for key in ("vae_psnr", "continuation")
    }

    # A window without a far field: on a grid as small as this one, means of tiles are exact.
    window = {"method": {"name": "sta", "density": 0.2}, "steps": (0.25, 1.0), "blocks": "1:"}
    monkeypatch.setitem(presets.PRESETS, "sta-fast", window)
    # Killed between two batches of the second method: the first method stays, and so does the finished batch.
    honest = scoring.generate_clips

    def killed(pipe, prompts, *, first, **arguments):
        if first:
            raise _KilledError
        return honest(pipe, prompts, first=first, **arguments)

    monkeypatch.setattr(scoring, "generate_clips", killed)
    with pytest.raises(_KilledError):
        _score(folder, work, "--methods", "dense,sta-fast")
    monkeypatch.setattr(scoring, "generate_clips", honest)
    assert json.loads((folder / "evaluation.json").read_text()) == first
    capsys.readouterr()
    both = _score(folder, work, "--methods", "dense,sta-fast")
    said = capsys.readouterr().out
    assert "dense is already scored" in said
    assert "sta-fast 2/3, kept from before" in said
    assert both["methods"]["dense"] == first["methods"]["dense"]
    fast = both["methods"]["sta-fast"]
    assert 0 < fast["density"] < 1
    assert fast["psnr_to_dense"]["min"] <= fast["psnr_to_dense"]["mean"] < 99
    assert list(fast["halves"]) == list(HALVES)
    assert set(fast["wrong"]) <= set(held_out_prompts(3)[0])
    assert fast["command"].startswith("python -m examples.train_demo_model score --model")
    assert both["protocol"].items() >= {"prompts": 3, "steps": 2, "guidance": 3.0, "text_tokens": 32}.items()
    monkeypatch.setattr(scoring, "generate_clips", None)  # everything is there: nothing is generated
    assert _score(folder, work, "--methods", "dense,sta-fast") == both
    monkeypatch.setattr(scoring, "generate_clips", honest)
    again = _score(folder, work, "--methods", "dense", "--again")["methods"]
    assert again["dense"]["scores"] == first["methods"]["dense"]["scores"]
    other = _score(folder, work, "--methods", "dense", "--steps", "1")
    assert (list(other["methods"]), other["vae_psnr"]) == (["dense"], kept["vae_psnr"])


def test_card_is_rendered_from_the_folder_alone(finished, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(finished / "model", folder)
    card = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    assert main(["card", "--model", str(folder)]) == 0
    assert (folder / "README.md").read_text() == card
    assert "| dense | 1.00 |" in card
    for name in ("evaluation.json", "training.json"):
        (folder / name).unlink()
    assert main(["card", "--model", str(folder)]) == 0
    card = (folder / "README.md").read_text()
    assert "not scored yet" in card
    assert "Not recorded." in card


def test_held_out_prompts_are_two_balanced_halves():
    texts, scenes = held_out_prompts(64)
    assert len(set(texts)) == 64
    triple = HELD_OUT[scenes["shape0"], scenes["colour0"], scenes["motion0"]]
    assert triple.tolist() == [False] * 32 + [True] * 32
    for half in (scenes["motion0"][:32], scenes["motion0"][32:]):
        assert np.bincount(half).tolist() == [4] * 8
    assert [len(held_out_prompts(count)[0]) for count in (1, 2, 5)] == [1, 2, 5]


def _copy_inputs(source: Path, target: Path) -> Run:
    for name in ("text.safetensors", "vae.safetensors"):
        tensors, facts = checkpoints.load(source / name)
        checkpoints.save(target / name, tensors, facts)
    return Run(target, torch.device("cpu"))


class _KilledError(Exception):
    pass


def test_a_killed_denoiser_continues_as_if_nothing_had_happened(finished, tmp_path):
    config, limits = tiny(), Limits(steps=8, checkpoint_seconds=0.0)
    whole = _DenoiserTrainee(_copy_inputs(finished, tmp_path / "whole"), config)
    whole.prepare()
    assert train(whole.run, "denoiser", whole, limits)

    run = _copy_inputs(finished, tmp_path / "killed")
    first = _DenoiserTrainee(run, config)
    first.prepare()
    honest = first.step

    def step(number, horizon):
        if number == 5:
            raise _KilledError
        return honest(number, horizon)

    first.step = step
    with pytest.raises(_KilledError):
        train(run, "denoiser", first, limits)
    second = _DenoiserTrainee(run, config)
    second.prepare()
    assert train(run, "denoiser", second, limits)
    expected, actual = whole.state(), second.state()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


def test_stopping_keeps_the_schedule_and_packing_keeps_the_state(finished, tmp_path):
    folder = tmp_path / "stopped"
    _copy_inputs(finished, folder)
    command = ["denoiser", "--run", str(folder), *TINY, "--steps", "7"]
    assert main([*command, "--stop-after-minutes", "0"]) == 3
    _, facts = checkpoints.load(folder / "denoiser.state.safetensors")
    assert (facts["step"], facts["horizon"]) == (0, 7)

    packed, elsewhere = tmp_path / "packed", tmp_path / "elsewhere"
    paths = checkpoints.pack(folder / "denoiser.state.safetensors", packed, megabytes=0.1)
    assert len(paths) > 2
    assert max(path.stat().st_size for path in paths) < 0.2e6
    _copy_inputs(finished, elsewhere)
    assert main(["unpack", "--run", str(elsewhere), "--from", str(packed), *TINY]) == 0
    before, after = (checkpoints.load(f / "denoiser.state.safetensors")[0] for f in (folder, elsewhere))
    assert set(before) - set(after) == {name for name in before if name.startswith("muon.")}
    for name in after:
        torch.testing.assert_close(before[name].float(), after[name].float(), rtol=1e-2, atol=1e-2)
    assert main([*command[:2], str(elsewhere), *command[3:]]) == 0
    paths[0].unlink()
    with pytest.raises(FileNotFoundError, match="shards"):
        checkpoints.unpack(packed, elsewhere)


def test_time_budget_shortens_the_schedule(tmp_path):
    class Sleeper:
        def state(self):
            return {"x": torch.zeros(1)}

        def load(self, tensors):
            pass

        def step(self, step, horizon):
            import time

            time.sleep(0.005)
            return {"horizon": torch.tensor(float(horizon))}

    run = Run(tmp_path, torch.device("cpu"))
    assert train(run, "sleep", Sleeper(), Limits(steps=10_000, minutes=0.01), skip=2, measure=10)
    facts = json.loads((tmp_path / "sleep.log.json").read_text())
    assert facts["step"] == facts["horizon"] < 150
    assert facts["seconds"] < 2


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_whole_clip_vae_is_the_stock_chunk_loop(frames):
    torch.manual_seed(0)
    vae = build_vae(Config()).eval()
    video = torch.rand(1, 3, frames, 32, 48) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()
        decoded = vae.decode(latents).sample
        whole = WholeClipVae(vae)
        mean, _ = whole.encode(video)
        pixels = whole.decode(latents).clamp(-1, 1)
        again = whole.close().decode(latents).sample
    assert latents.shape == (1, 12, (frames - 1) // 2 + 1, 8, 12)
    torch.testing.assert_close(mean, latents, rtol=0, atol=1e-4)
    torch.testing.assert_close(pixels, decoded, rtol=0, atol=1e-4)
    assert torch.equal(again, decoded)


def test_text_is_encoded_as_the_stock_pipeline_does():
    from diffusers import WanPipeline

    tokenizer = build_tokenizer()
    encoder = build_text_encoder(tiny().text, len(tokenizer)).eval()
    pipe = WanPipeline(tokenizer, encoder, None, None)
    texts = ["a red circle moving right on a blue background", ""]
    with torch.no_grad():
        stock, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=40, device="cpu")
        ours = encode_text(encoder, *tokenize(tokenizer, texts, "cpu"))
    torch.testing.assert_close(stock[:, :32], ours, rtol=1e-4, atol=1e-5)
    assert not stock[:, 32:].any()
    assert not stock[1, 1:].any()  # the empty prompt is one end token


def test_captions_fit_the_tokenizer():
    tokenizer = build_tokenizer()
    texts, _ = captions_and_labels(sample_scenes(2000, 1, two_objects=0.5), 2)
    ids = tokenizer(texts).input_ids
    assert max(map(len, ids)) <= 32
    assert 0 < sum(tokenizer.unk_token_id in row for row in ids) < 300
    assert len(tokenizer) < 96


def test_held_out_combinations_are_never_sampled_for_training():
    train_scenes, test_scenes = (sample_scenes(3000, 3, held_out=mode) for mode in ("exclude", "only"))
    for slot in "01":
        names = (f"shape{slot}", f"colour{slot}", f"motion{slot}")
        assert not HELD_OUT[tuple(train_scenes[name] for name in names)].any()
        assert HELD_OUT[tuple(test_scenes[name] for name in names)].all()
    assert not (train_scenes["background"] == train_scenes["colour0"]).any()


def test_rendering_is_the_same_scene_at_any_size():
    scenes = sample_scenes(3, 4, frames=5, two_objects=0.5)
    small, large = render(scenes, height=32), render(scenes, height=128)
    reduced = torch.nn.functional.avg_pool3d(large, (1, 4, 4))
    assert (small - reduced).abs().mean() < 0.02
    assert torch.equal(render(take(scenes, slice(1, 2)), height=32)[0], small[1])
    assert render(scenes, height=32, width=48).shape == (3, 3, 5, 32, 48)


def test_orthogonalise_evens_out_singular_values():
    x = orthogonalise(torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.4
    assert values.max() < 1.4


def test_clean_prefix_frames_are_conditions_and_not_targets():
    sizes = replace(Config().denoiser, max_prefix=3)
    plan = draw_plan(64, 9, sizes, torch.Generator().manual_seed(0), per_frame=True)
    clean = plan.sigma == 0
    assert clean.any()
    assert clean.sum(1).max() <= 3
    assert plan.timestep(4).shape == (64, 36)
    latents, noise = torch.randn(64, 2, 9, 4, 4), torch.randn(64, 2, 9, 4, 4)
    x = noised(latents, noise, plan)
    pick = clean[:, None, :, None, None].expand_as(x)
    assert torch.equal(x[pick], latents[pick])
    velocity = torch.where(pick, torch.full_like(x, 1e6), noise - latents)
    assert flow_loss(velocity, latents, noise, plan) == 0
    shared = draw_plan(8, 9, sizes, torch.Generator().manual_seed(1), per_frame=False)
    assert isinstance(shared, NoisePlan)
    assert shared.timestep(4).shape == (8,)
