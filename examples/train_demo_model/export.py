"""Stage `export`: the trained parts as a plain diffusers folder, with a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

from . import checkpoints
from .config import Config
from .denoiser_training import build_denoiser
from .loop import Run
from .model_card import model_card
from .text_training import build_text_encoder, build_tokenizer
from .vae_training import load_vae

MAX_MEGABYTES = 24


def build_scheduler(name: str, shift: float) -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
    """The two flow-matching solvers that Wan pipelines use."""
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )


def build_pipeline(run: Run, config: Config, scheduler: str = "unipc", *, ema: bool = True) -> WanPipeline:
    """A stock pipeline from what the stages left in the run's folder.

    Before the denoiser is finished, its last checkpoint serves, so that progress can be looked at.
    """
    finished = run.path("denoiser.safetensors")
    path = finished if finished.exists() else run.path("denoiser.state.safetensors")
    tensors, _ = checkpoints.load(path, run.device)
    prefix = "ema." if path != finished and ema else ""
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(config.text, len(tokenizer))
    text_encoder.load_state_dict(checkpoints.under(f"{prefix}text", tensors))
    denoiser = build_denoiser(config)
    denoiser.load_state_dict(checkpoints.under(f"{prefix}model", tensors))
    vae, _ = load_vae(run, config)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae,
        scheduler=build_scheduler(scheduler, config.denoiser.sample_shift),
        transformer=denoiser.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(run.device)


def export(run: Run, config: Config, folder: Path, scheduler: str | None = None) -> None:
    """Write the folder under a temporary name, check it, and put it in place."""
    evaluation = run.path("evaluation.json")
    scores = json.loads(evaluation.read_text()) if evaluation.exists() else {}
    scheduler = scheduler or scores.get("scheduler", "unipc")
    pipe = build_pipeline(run, config, scheduler).to("cpu", torch.float16)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.save_pretrained(temporary, safe_serialization=True)
    # The weights are stored in half precision and meant to be computed with in single precision. transformers follows
    # the configuration's dtype and diffusers defaults to single, so this line is what makes the two agree when the
    # folder is loaded without a dtype.
    text_config = temporary / "text_encoder" / "config.json"
    values = json.loads(text_config.read_text())
    values.pop("torch_dtype", None)
    checkpoints.write_json(text_config, {**values, "dtype": "float32"})
    sizes = {
        part.name: sum(file.stat().st_size for file in part.glob("*.safetensors")) / 1e6
        for part in sorted(temporary.iterdir())
        if part.is_dir()
    }
    total = sum(sizes.values())
    if total > MAX_MEGABYTES:
        raise ValueError(f"the weights take {total:.1f} MB, more than {MAX_MEGABYTES}: {sizes}")
    parameters = {
        name: sum(parameter.numel() for parameter in getattr(pipe, name).parameters())
        for name in ("transformer", "vae", "text_encoder")
    }
    logs = {}
    for stage in ("text", "vae", "denoiser", "decoder"):
        log = run.path(f"{stage}.log.json")
        if log.exists():
            logs[stage] = json.loads(log.read_text())
    (temporary / "README.md").write_text(model_card(config, scores, parameters, total, logs, scheduler))
    if scores:
        checkpoints.write_json(temporary / "evaluation.json", scores)
    for file in temporary.rglob("*.safetensors"):
        file.chmod(0o644)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    run.say(f"export: {folder}, {total:.1f} MB of weights, scheduler {scheduler}")
