"""Stage `denoiser`: flow matching on cached latents, the text encoder learning along."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from transformers import UMT5EncoderModel

from . import checkpoints
from .config import Config
from .latents import Dataset, build_dataset
from .loop import Limits, Run, train, warmup_then
from .muon import Muon
from .objective import draw_plan, flow_loss, noised
from .text_training import load_text, tokenize


def build_denoiser(config: Config) -> WanTransformer3DModel:
    """A small stock Wan transformer, its residual branches started small and its output at zero."""
    sizes = config.denoiser
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        in_channels=config.vae.z_dim,
        out_channels=config.vae.z_dim,
        text_dim=config.text.width,
        freq_dim=sizes.freq_dim,
        ffn_dim=sizes.ffn,
        num_layers=sizes.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )
    for block in model.blocks:
        for linear in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            torch.nn.init.normal_(linear.weight, std=0.005)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def encode_text(encoder: UMT5EncoderModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """States as the stock pipeline makes them: zero after the last word."""
    states = encoder(ids, mask).last_hidden_state
    return states * mask[..., None].to(states.dtype)


class _DenoiserTrainee:
    def __init__(self, run: Run, config: Config) -> None:
        self.run, self.config, self.sizes = run, config, config.denoiser
        self.text, self.head, self.tokenizer = load_text(run, config)
        torch.manual_seed(run.seed + 2)
        self.model = build_denoiser(config).to(run.device)
        self.ema_model = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.ema_text = copy.deepcopy(self.text).requires_grad_(False).eval()
        self.parameters = [*self.model.parameters(), *self.text.parameters()]
        self.ema_parameters = [*self.ema_model.parameters(), *self.ema_text.parameters()]
        matrices = {n: p for n, p in self.model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
        others = [p for n, p in self.model.named_parameters() if n not in matrices]
        self.muon = Muon(matrices.values())
        # One optimizer for everything else; `scale` keeps each group's rate relative to the schedule.
        self.adam = torch.optim.AdamW(
            [
                {"params": others, "scale": self.sizes.adam_lr},
                {"params": [*self.text.parameters(), *self.head.parameters()], "scale": self.sizes.text_lr},
            ],
            lr=self.sizes.adam_lr,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=run.device.type == "cuda",
        )
        self.empty_ids, self.empty_mask = tokenize(self.tokenizer, [""], run.device)
        self.data: Dataset | None = None

    def prepare(self) -> None:
        """The slow part, only when there is something left to train: data, compilation."""
        self.data = build_dataset(self.run, self.config, self.tokenizer, count=self.sizes.clips, key=31)
        if self.run.device.type == "cuda":
            choose_attention(self.run, self.config)
        if self.run.compile:
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        self._warm_up()

    def _warm_up(self) -> None:
        """Run every kind of step once without updating anything, so that compiling is not counted as training time."""
        for per_frame in (False, True):
            for length in self.sizes.text_lengths:
                begun = time.monotonic()
                for _ in range(2):
                    loss, _ = self._loss(0, per_frame=per_frame, length=length)
                    loss.backward()
                    self._clear_gradients()
                    self.run.sync()
                    first, begun = time.monotonic() - begun, time.monotonic()
                again = first
                self.run.say(f"graph per_frame={per_frame} text={length}: forward and backward {again * 1e3:.0f} ms")

    def state(self) -> checkpoints.Tensors:
        return {
            **checkpoints.prefixed("model", self.model.state_dict()),
            **checkpoints.prefixed("text", self.text.state_dict()),
            **checkpoints.prefixed("head", self.head.state_dict()),
            **checkpoints.prefixed("ema.model", self.ema_model.state_dict()),
            **checkpoints.prefixed("ema.text", self.ema_text.state_dict()),
            **checkpoints.prefixed("muon", self.muon.state()),
            **checkpoints.prefixed("adam", checkpoints.adam_state(self.adam)),
        }

    def load(self, tensors: checkpoints.Tensors) -> None:
        for name, module in (
            ("model", self.model),
            ("text", self.text),
            ("head", self.head),
            ("ema.model", self.ema_model),
            ("ema.text", self.ema_text),
        ):
            module.load_state_dict(checkpoints.under(name, tensors))
        self.muon.load(checkpoints.under("muon", tensors))
        checkpoints.load_adam_state(self.adam, checkpoints.under("adam", tensors))

    def _clear_gradients(self) -> None:
        for parameter in (*self.parameters, *self.head.parameters()):
            parameter.grad = None

    def _loss(self, step: int, *, per_frame: bool, length: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert self.data is not None
        sizes, data, device = self.sizes, self.data, self.run.device
        generator = self.run.generator(4, step)
        rows = torch.randint(len(data.latents), (sizes.batch,), generator=generator, device=device)
        variant = torch.randint(data.ids.shape[1], (sizes.batch,), generator=generator, device=device)
        latents = data.latents[rows].float()
        noise = torch.randn(latents.shape, generator=generator, device=device)
        plan = draw_plan(sizes.batch, latents.shape[2], sizes, generator, per_frame=per_frame)
        drop = torch.rand((sizes.batch, 1), generator=generator, device=device) < sizes.text_dropout
        ids, mask, labels = data.ids[rows, variant], data.mask[rows, variant], data.labels[rows, variant]
        labels = torch.where(drop, -100, labels)
        ids, mask = torch.where(drop, self.empty_ids, ids), torch.where(drop, self.empty_mask, mask)
        tokens_per_frame = latents.shape[3] * latents.shape[4] // 4
        with self.run.autocast():
            text = encode_text(self.text, ids, mask)
            named = self.head.loss(text, mask, labels)
            padded = F.pad(text, (0, 0, 0, length - text.shape[1]))
            noisy = noised(latents, noise, plan)
            timestep = plan.timestep(tokens_per_frame)
            if device.type == "cuda":
                noisy, padded = noisy.bfloat16(), padded.bfloat16()
            velocity = self.model(noisy, timestep, padded, return_dict=False)[0]
        loss = flow_loss(velocity, latents, noise, plan)
        kind = "per_frame" if per_frame else "whole"
        return loss + sizes.attribute_weight * named, {kind: loss.detach(), "attributes": named.detach()}

    def step(self, step: int, horizon: int) -> Mapping[str, torch.Tensor]:
        sizes = self.sizes
        host = torch.Generator().manual_seed(self.run.seed * 6007 + step)
        dice = torch.rand(2, generator=host).tolist()
        length = sizes.text_lengths[int(dice[1] * len(sizes.text_lengths))]
        loss, metrics = self._loss(step, per_frame=dice[0] < sizes.per_frame, length=length)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        progress = step / horizon
        decay = min(1.0, (1 - progress) / (1 - sizes.decay_from))
        factor = warmup_then(step, sizes.warmup, decay)
        self.muon.step(sizes.muon_lr * factor)
        for group in self.adam.param_groups:
            group["lr"] = group["scale"] * factor
        self.adam.step()
        self._clear_gradients()
        with torch.no_grad():
            keep = min(sizes.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.ema_parameters, self.parameters, 1 - keep)
        return metrics


def choose_attention(run: Run, config: Config) -> None:
    """Time PyTorch's two fused attention kernels on this model's shape and leave the faster one switched on."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    sizes = config.denoiser
    tokens = ((config.clip.frames - 1) // 2 + 1) * (config.clip.size // 8) ** 2
    seconds = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        x = torch.randn(sizes.batch, tokens, sizes.heads, sizes.head_dim, device=run.device, dtype=torch.bfloat16)
        x = x.transpose(1, 2).requires_grad_()
        try:
            with sdpa_kernel(backend):
                for trial in range(8):
                    if trial == 3:
                        run.sync()
                        begun = time.monotonic()
                    F.scaled_dot_product_attention(x, x, x).sum().backward()
                run.sync()
            seconds[name] = (time.monotonic() - begun) / 5
        except RuntimeError as error:
            run.say(f"attention: {name} does not run here ({str(error)[:80]})")
    if seconds.get("cudnn", 1.0) < 0.9 * seconds.get("flash", 1.0):
        torch.backends.cuda.enable_flash_sdp(False)
    run.say("attention:", {name: f"{value * 1e3:.1f} ms" for name, value in seconds.items()})


def train_denoiser(run: Run, config: Config, limits: Limits) -> bool:
    """Run the stage; writes `denoiser.safetensors`: the EMA weights of denoiser and text encoder."""
    trainee = _DenoiserTrainee(run, config)
    trainee.prepare()
    if not train(run, "denoiser", trainee, limits, skip=20, measure=80):
        return False
    weights = {
        **checkpoints.prefixed("model", trainee.ema_model.state_dict()),
        **checkpoints.prefixed("text", trainee.ema_text.state_dict()),
        **checkpoints.prefixed("head", trainee.head.state_dict()),
    }
    checkpoints.save(run.path("denoiser.safetensors"), weights)
    return True
