"""The text of the exported folder's README.md."""

from __future__ import annotations

from typing import Any

from tilewise.pipelines.clip_content import COLOURS, MOTIONS, PATTERNS, SHAPES

from .config import Config


def model_card(
    config: Config,
    scores: dict[str, Any],
    parameters: dict[str, int],
    megabytes: float,
    logs: dict[str, Any],
    scheduler: str,
) -> str:
    """What the model is, what it can and cannot do, and how it scored."""
    millions = {name: f"{count / 1e6:.1f} M" for name, count in parameters.items()}
    training = ", ".join(
        f"{stage} {log['step']:,} steps in {log['seconds'] / 60:.1f} min" for stage, log in logs.items()
    )
    size, frames = config.clip.size, config.clip.frames
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
tags: [wan, toy, text-to-video]
---

# The demo model: coloured shapes that move

A text-to-video model of the Wan architecture, small enough to ship with a repository and to run on a CPU. It was trained
from scratch on procedurally rendered clips, and it knows one small world: one or two coloured shapes that move over a
patterned background. It exists so that attention methods can be tried and measured on a *trained* model without a
download. It is not useful for anything else.

- Transformer {millions["transformer"]}, VAE {millions["vae"]} (4× in space, 2× in time, {config.vae.z_dim} channels),
  text encoder {millions["text_encoder"]}; {megabytes:.1f} MB of fp16 weights. Stock diffusers and transformers classes.
- Native size: {frames} frames of {size}×{size}. Other sizes run, with less quality.
- Colours: {", ".join(COLOURS)}. Shapes: {", ".join(SHAPES)}.
- Motions: {", ".join(MOTIONS)}. Backgrounds: {", ".join(PATTERNS)}, in the same colours.
- It also takes one timestep per token, with clean first frames as a condition: it can continue a clip.

```python
import torch
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("{"pipelines/demo_model"}", torch_dtype=torch.float32)
prompt = "a red circle moving right on a blue striped background"
frames = pipe(prompt, height={size}, width={size}, num_frames={frames}, num_inference_steps=20, guidance_scale=6.0).frames[0]
```

## Measured
{_measured(config, scores)}

## Training
Data, code and seeds: `examples/train_demo_model/`. Training: {training or "not recorded"}.
Scheduler: {scheduler}, shift {config.denoiser.sample_shift:g}. A tenth of all (shape, colour, motion) triples was kept out
of training; the prompts above are drawn from those only.

## Limits
Only the words of its small vocabulary mean anything to it. Two objects are harder for it than one. The scores are from
an automatic detector (`tilewise.pipelines.clip_content`), which is itself not perfect.
"""


def _measured(config: Config, scores: dict[str, Any]) -> str:
    if not scores:
        return "Not evaluated."
    lines = [
        f"{scores['prompts']} prompts of combinations never seen in training, dense attention, {scores['steps']} steps, "
        f"guidance {scores['guidance']:g}; share of clips for which the detector found what the prompt said:",
        "",
        "| attribute | share |",
        "| --- | --- |",
    ]
    lines += [f"| {name.replace('_', ' ')} | {value:.1%} |" for name, value in scores["scores"].items()]
    vae = scores["vae_psnr"]
    lines += ["", f"VAE reconstruction of unseen clips: {vae['mean']:.1f} dB on average, {vae['min']:.1f} dB at worst."]
    if scores.get("continuation"):
        c = scores["continuation"]
        lines.append(
            f"Continuing a clip from {config.evaluation.prefix_frames} clean latent frames: the object's centre is off by "
            f"{c['centre_error_px']:.1f} px on average (a frozen last frame: {c['frozen_error_px']:.1f} px)."
        )
    return "\n".join(lines)
