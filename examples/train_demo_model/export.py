"""Stage `export`: the trained parts as a plain diffusers folder, with a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

from . import checkpoints
from .config import Config
from .denoiser_training import build_denoiser
from .loop import Run
from .model_card import write_card
from .text_training import build_text_encoder, build_tokenizer
from .vae_training import load_vae

MAX_MEGABYTES = 24
TOKENIZER_CLASS = "PreTrainedTokenizerFast"


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
    scheduler = scheduler or str(scores.get("scheduler", "unipc"))
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
    _name_tokenizer(temporary)
    write_native(config, temporary / "tilewise.json")
    checkpoints.write_json(temporary / "training.json", training_facts(run, config))
    if scores:
        checkpoints.write_json(temporary / "evaluation.json", scores)
    write_card(temporary)
    for file in temporary.rglob("*.safetensors"):
        file.chmod(0o644)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    run.say(f"export: {folder}, {total:.1f} MB of weights, scheduler {scheduler}")


def _name_tokenizer(folder: Path) -> None:
    """Name the tokenizer's class as transformers 4 does; 5 knows it under that name too, but writes another."""
    index = folder / "model_index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({**values, "tokenizer": ["transformers", TOKENIZER_CLASS]}, indent=2) + "\n")
    own = folder / "tokenizer" / "tokenizer_config.json"
    values = json.loads(own.read_text())
    own.write_text(json.dumps({**values, "tokenizer_class": TOKENIZER_CLASS}, indent=2) + "\n")


def write_native(config: Config, path: Path) -> None:
    """tilewise.json: the arguments of a call for which the model was made."""
    values = {
        "height": config.clip.size,
        "width": config.clip.size,
        "frames": config.clip.frames,
        "steps": config.evaluation.steps,
        "guidance": config.evaluation.guidance,
        "fps": config.evaluation.fps,
        "max_sequence_length": config.evaluation.text_tokens,
        "world": "shapes",
        # Of `tilewise.highres`: the paper's noise level leaves a model as small as this little of the native layout.
        "highres_strength": 0.5,
        "highres_flow_shift": config.denoiser.sample_shift,
        "one_shape": True,  # of squares alone
        "clean_frames": config.denoiser.max_prefix,
    }
    path.write_text(json.dumps(values, indent=2) + "\n")


def training_facts(run: Run, config: Config) -> dict[str, Any]:
    """What the stages' logs in the run's folder say."""
    stages: dict[str, Any] = {}
    machines: dict[str, None] = {}
    versions: dict[str, None] = {}
    for stage in ("text", "vae", "denoiser", "decoder"):
        log = run.path(f"{stage}.log.json")
        if not log.exists():
            continue
        facts = json.loads(log.read_text())
        last = facts["history"][-1] if facts["history"] else {}
        metrics = {key: value for key, value in last.items() if key not in ("step", "seconds")}
        stages[stage] = {"steps": facts["step"], "minutes": round(facts["seconds"] / 60, 1), "metrics": metrics}
        result = run.path(f"{stage}.json")
        measured = json.loads(result.read_text()) if result.exists() else {}
        for key, name in (("psnr", "held_out_psnr"), ("held_out_accuracy", "held_out_accuracy")):
            if key in measured:
                stages[stage][name] = measured[key]
        machines[facts.get("device", "not recorded")] = None
        versions[facts.get("torch", "not recorded")] = None
    return {
        "preset": config.name,
        "device": ", ".join(machines),
        "torch": ", ".join(versions),
        "minutes": round(sum(stage["minutes"] for stage in stages.values()), 1),
        "stages": stages,
    }
