"""Stage `causal`: a LoRA that turns the finished denoiser into a causal few-step one.

Teacher forcing over chunks of latents with a noise level of their own, flow matching as before. Three additions:

- The first chunk, which nothing precedes, is trained more often and learns guidance into its velocity: the target is moved by the
  difference that the text makes (model guidance, arXiv 2502.12154).
- A change of colour between two chunks comes with a new caption. The two chunks after it learn guidance away from the old one:
  what came before shows the old colour, and the text alone says otherwise.
- In the second half of training, chunks see before them what the model itself made of the same clip, so that it learns to go back
  to the clip instead of drifting on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from torch import nn

from .. import checkpoints
from ..config import CausalConfig, Config
from ..loop import Limits, Run, device_name, train, warmup_then
from ..model_card import read_json
from ..objective import draw_sigma
from .attention import ChunkAttention, Layout, Rotation, Window
from .clips import Clips, Sequences, build_clips, draw_sequences
from .lora import add_lora, load_lora, lora_parameters
from .sampler import ChunkSampler, noise_levels, own_processor

STAGE = "causal"
FIRST = 2  # noisy copies of the first chunk with their caption, and as many without one


class CausalTrainee:
    """The denoiser with its LoRA, the clips, and one step of training."""

    def __init__(self, run: Run, config: Config, model: Path, lora: Path | None = None) -> None:
        self.run, self.sizes, self.size = run, config.causal, config.clip.size
        self.pipe = load_pipeline(model, run.device)
        self.denoiser: nn.Module = self.pipe.transformer
        if lora is None:
            add_lora(self.denoiser, self.sizes.rank, run.seed + 5)
        else:
            load_lora(self.denoiser, checkpoints.load(lora, run.device)[0])
        self.parameters = list(lora_parameters(self.denoiser).values())
        self.ema = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.sizes.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=run.device.type == "cuda"
        )
        grid = self.size // 8
        self.rotation = Rotation(self.denoiser, self.sizes.chunk, grid, grid)
        self.processor: ChunkAttention = own_processor(self.denoiser)
        n = self.sizes.chunks
        self.noisy = (*[0] * (2 * FIRST), *range(1, n))
        self.layouts = {
            (window, sink): Layout(self.rotation, n - 1, self.noisy, Window(window, sink))
            for window, sink, _ in self.sizes.windows
        }
        self.levels = torch.tensor(noise_levels(self.sizes.timesteps, self.sizes.shift), device=run.device)
        with torch.no_grad():
            empty = self.pipe.tokenizer("", padding="max_length", max_length=32, return_tensors="pt").to(run.device)
            states = self.pipe.text_encoder(empty.input_ids, empty.attention_mask).last_hidden_state
            self.unsaid = states[0] * empty.attention_mask[0, :, None]
        self.clips: Clips | None = None
        self.pool: tuple[Sequences, tuple[int, int]] | None = None

    def prepare(self) -> None:
        """The slow part: clips, compilation."""
        self.clips = build_clips(self.run, self.sizes, self.size, self.pipe)
        if self.run.compile:
            self._compile()

    def _compile(self) -> None:
        begun = time.monotonic()
        self.denoiser.compile_repeated_blocks(dynamic=False)  # type: ignore[operator]
        try:
            for window in self.layouts:
                self._warm_up(window)
        except Exception as error:  # whatever the compiler raises, training goes on without it
            self.run.say(
                f"causal: torch.compile failed, going on without it: {type(error).__name__}: {str(error)[:200]}"
            )
            for block in self.denoiser.get_submodule("blocks"):  # type: ignore[union-attr]
                block._compiled_call_impl = None
            self._warm_up(next(iter(self.layouts)))
        self.run.say(f"causal: warmed up in {time.monotonic() - begun:.1f} s")

    def _warm_up(self, window: tuple[int, int]) -> None:
        assert self.clips is not None
        sequences = draw_sequences(self.clips, self.sizes, self.sizes.batch, self.run.generator(70))
        self._loss(sequences, window, self.run.generator(71), 1.0)[0].backward()
        self._clear()
        self.run.sync()

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> checkpoints.Tensors:
        names = lora_parameters(self.denoiser)
        return {
            **checkpoints.prefixed("lora", {name: tensor.detach() for name, tensor in names.items()}),
            **checkpoints.prefixed("ema", dict(zip(names, self.ema, strict=True))),
            **checkpoints.prefixed("adam", checkpoints.adam_state(self.optimizer)),
        }

    @torch.no_grad()
    def load(self, tensors: checkpoints.Tensors) -> None:
        for name, parameter, kept in zip(lora_parameters(self.denoiser), self.parameters, self.ema, strict=True):
            parameter.copy_(tensors[f"lora.{name}"])
            kept.copy_(tensors[f"ema.{name}"])
        checkpoints.load_adam_state(self.optimizer, checkpoints.under("adam", tensors))

    def step(self, step: int, horizon: int) -> Mapping[str, torch.Tensor]:
        sizes, progress = self.sizes, step / horizon
        generator = self.run.generator(6, step)
        if progress < sizes.rollouts_from:
            assert self.clips is not None
            window = self._draw_window(step)
            sequences = draw_sequences(self.clips, sizes, sizes.batch, generator)
        else:
            place = step % sizes.rollout_steps
            if place == 0 or self.pool is None:
                window = self._draw_window(step)
                self.pool = self._rollout(window, generator), window
            whole, window = self.pool
            each = sizes.rollout_pool // sizes.rollout_steps
            sequences = whole.rows(slice(place * each, place * each + each))
        self._blur_context(sequences, generator)
        ramp = min(1.0, max(0.0, (progress - sizes.guidance_from) / 0.15))
        loss, metrics = self._loss(sequences, window, generator, ramp)
        loss.backward()
        metrics["gradient"] = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        decay = min(1.0, (1 - progress) / (1 - sizes.decay_from))
        for group in self.optimizer.param_groups:
            group["lr"] = sizes.lr * warmup_then(step, sizes.warmup, decay)
        self.optimizer.step()
        self._clear()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - min(sizes.ema, (1 + step) / (10 + step)))
        return metrics

    def _draw_window(self, step: int) -> tuple[int, int]:
        shares = torch.tensor([share for *_, share in self.sizes.windows])
        generator = torch.Generator().manual_seed(self.run.seed * 6011 + step)
        window, sink, _ = self.sizes.windows[int(torch.multinomial(shares, 1, generator=generator))]
        return window, sink

    def _blur_context(self, sequences: Sequences, generator: torch.Generator) -> None:
        """A little noise on what chunks see before them, in half of the sequences; its timestep stays 0."""
        context = sequences.context
        count = len(context)
        level = self.sizes.context_noise * torch.rand((2, count), generator=generator, device=context.device)
        sigma = torch.where(level[0] * 2 < self.sizes.context_noise, level[1], 0.0)[:, None, None, None, None, None]
        noise = torch.randn(context.shape, generator=generator, device=context.device)
        sequences.context = (1 - sigma) * context + sigma * noise

    def _draw_sigmas(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(B, noisy chunks): the levels of sampling and any others, for every chunk alone."""
        sizes, shape = self.sizes, (count, len(self.noisy))
        device = self.run.device
        sigma = draw_sigma(shape, sizes.shift, generator)
        pick = torch.randint(len(self.levels), shape, generator=generator, device=device)
        on_grid = torch.rand(shape, generator=generator, device=device) < sizes.grid_share
        on_grid[:, : 2 * FIRST] = False  # the first chunk has more passes than the others
        return torch.where(on_grid, self.levels[pick], sigma)

    def _loss(
        self, sequences: Sequences, window: tuple[int, int], generator: torch.Generator, guidance: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        clean, device = sequences.clean, self.run.device
        count, n = clean.shape[:2]
        numbers = torch.tensor(self.noisy, device=device)
        target = clean[:, numbers]
        sigma = self._draw_sigmas(count, generator)
        noise = torch.randn(target.shape, generator=generator, device=device)
        said, unsaid = slice(0, FIRST), slice(FIRST, 2 * FIRST)
        sigma[:, unsaid], noise[:, unsaid] = sigma[:, said], noise[:, said]  # pairs that differ in the text alone
        level = sigma[:, :, None, None, None, None]
        noisy = (1 - level) * target + level * noise
        timestep = torch.cat([torch.zeros((count, n - 1), device=device), sigma * 1000], 1)
        self.processor.layout = self.layouts[window]
        latents = torch.cat([sequences.context[:, :-1], noisy], 1)

        def predict(late: torch.Tensor) -> torch.Tensor:
            text = sequences.text(torch.cat([sequences.clean_late[:, :-1], late[:, numbers]], 1))
            text[:, n - 1 + FIRST : n - 1 + 2 * FIRST] = self.unsaid
            with self.run.autocast():
                output = self.denoiser(
                    latents.flatten(0, 1), timestep.flatten(), text.flatten(0, 1), return_dict=False
                )[0]
            return output.unflatten(0, (count, -1))[:, n - 1 :].float()

        velocity = predict(sequences.noisy_late)
        wanted = noise - target
        if guidance > 0:
            sizes = self.sizes
            wanted[:, said] += guidance * sizes.guidance_weight * (velocity[:, said] - velocity[:, unsaid]).detach()
            with torch.no_grad():
                unchanged = predict(torch.zeros_like(sequences.noisy_late))
            away = guidance * sizes.change_guidance * sequences.changed[:, numbers]
            wanted += away[:, :, None, None, None, None] * (velocity - unchanged).detach()
        error = (velocity - wanted).square().mean((2, 3, 4, 5))
        weight = sequences.weight[:, numbers].clone()
        weight[:, said], weight[:, unsaid] = 1.0, 0.3
        loss = (error * weight).sum() / weight.sum()
        later = weight[:, 2 * FIRST :]
        metrics = {
            "first": error[:, said].mean().detach(),
            "later": ((error[:, 2 * FIRST :] * later).sum() / later.sum().clamp(min=1)).detach(),
        }
        return loss, metrics

    def _rollout(self, window: tuple[int, int], generator: torch.Generator) -> Sequences:
        """Sequences whose context is, from some chunk on, the model's own."""
        assert self.clips is not None
        sequences = draw_sequences(self.clips, self.sizes, self.sizes.rollout_pool, generator)
        clean, late = sequences.clean, sequences.clean_late
        count, n = clean.shape[:2]
        draw = torch.rand(count, generator=generator, device=clean.device)
        own_from = sequences.first + (draw * (n - 1 - sequences.first)).long()
        made = [clean[:, 0]]
        with self.sampler(window) as sampler:
            sampler.give(clean[:, 0], sequences.text(late[:, :1])[:, 0])
            for number in range(1, n - 1):
                text = sequences.text(sequences.noisy_late[:, number : number + 1])[:, 0]
                own = sampler.make(clean[:, number].shape, text, generator)
                keep = (number < own_from)[:, None, None, None, None]
                made.append(torch.where(keep, clean[:, number], own))
                sampler.give(made[-1], sequences.text(late[:, number : number + 1])[:, 0])
        sequences.context = torch.stack([*made, clean[:, -1]], 1)
        return sequences

    def sampler(self, window: tuple[int, int]) -> ChunkSampler:
        """A sampler with the recipe's noise levels for every chunk."""
        return ChunkSampler(
            self.denoiser,
            Window(*window),
            self.rotation,
            levels=noise_levels(self.sizes.timesteps, self.sizes.shift),
            solver=self.sizes.solver,
            autocast=self.run.autocast,
        )


def load_pipeline(model: Path, device: torch.device) -> WanPipeline:
    """The finished model in float32, frozen."""
    pipe = WanPipeline.from_pretrained(model, torch_dtype=torch.float32, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False).eval()
    return pipe


def train_causal(run: Run, config: Config, limits: Limits, model: Path, lora: Path | None = None) -> bool:
    """Run the stage; writes `causal_lora.safetensors` (the averaged LoRA, bf16), `recipe.json` and `causal_training.json`.

    With `lora`, a file that an earlier run wrote or `shrink-causal` cut, training begins with its weights and its rank.
    """
    trainee = CausalTrainee(run, config, model, lora)
    trainee.prepare()
    finished = train(run, STAGE, trainee, limits, skip=10, measure=30, replan=True)
    write_lora(run, config, trainee, lora)
    return finished


def write_lora(run: Run, config: Config, trainee: CausalTrainee, begun_with: Path | None = None) -> None:
    """What is shipped, and how it was made."""
    names = lora_parameters(trainee.denoiser)
    tensors = {name: kept.bfloat16() for name, kept in zip(names, trainee.ema, strict=True)}
    checkpoints.save(run.path("causal_lora.safetensors"), tensors)
    checkpoints.write_json(run.path("recipe.json"), recipe(config.causal))
    log = run.path(f"{STAGE}.log.json")
    facts = read_json(log)
    assert trainee.clips is not None
    checkpoints.write_json(
        run.path("causal_training.json"),
        {
            "preset": config.name,
            "device": device_name(run.device),
            "torch": torch.__version__,
            "steps": facts.get("step"),
            "minutes": round(facts.get("seconds", 0.0) / 60, 2),
            "clips": len(trainee.clips.latents),
            "rank": len(next(iter(lora_parameters(trainee.denoiser).values()))),
            **({} if begun_with is None else _begun_with(begun_with)),
            "history": facts.get("history", []),
        },
    )


def _begun_with(lora: Path) -> dict[str, Any]:
    """Which weights a run began with, and the runs that made them as far as files beside them tell."""
    facts = next(
        (
            read_json(path)
            for name in ("causal_training.json", "training.json")
            if (path := lora.with_name(name)).exists()
        ),
        None,
    )
    before = [] if facts is None else [*facts.pop("before", []), {k: v for k, v in facts.items() if k != "history"}]
    return {"begun_with": hashlib.sha256(lora.read_bytes()).hexdigest()[:12], "before": before}


def recipe(sizes: CausalConfig) -> dict[str, Any]:
    """How the LoRA makes video: the fields of `tilewise.pipelines.streaming.recipe.CausalRecipe`."""
    window, sink, _ = sizes.windows[0]
    first = [1000 * (1 - step / sizes.first_steps) for step in range(sizes.first_steps)]
    return {
        "name": "demo-causal",
        "chunk": sizes.chunk,
        "timesteps": list(sizes.timesteps),
        "first_timesteps": [round(value, 3) for value in first],
        "warp": True,
        "shift": sizes.shift,
        "context_noise": 0.0,
        "window": window * sizes.chunk,
        "sink": sink * sizes.chunk,
        "sink_position": "clamped",
        "policy": "fixed",
        "guidance": 1.0,
        "solver": sizes.solver,
        "fps": 8,
        "height": 128,
        "width": 128,
    }


def with_average(trainee: CausalTrainee) -> None:
    """Let the denoiser compute with the averaged LoRA, as shipped (rounded to bf16)."""
    with torch.no_grad():
        for parameter, kept in zip(trainee.parameters, trainee.ema, strict=True):
            parameter.copy_(kept.bfloat16())
