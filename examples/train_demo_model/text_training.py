"""Stage `text`: teach the text encoder to say what a caption says, before any picture is involved.

A denoiser alone is a slow teacher of language: trained end to end for half an hour, it still confuses the object's colour
with the background's. A classifier on the encoder's states needs a minute to make every state say which is which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from . import checkpoints
from .captions import ATTRIBUTES, NOT_SAID, build_tokenizer, captions_and_labels
from .config import Config, TextConfig
from .loop import Limits, Run, train, warmup_then
from .scenes import sample_scenes

CAPTION_TOKENS = 32  # the longest caption has 26


def build_text_encoder(config: TextConfig, vocabulary: int) -> UMT5EncoderModel:
    """A small stock UMT5 encoder. Captions are short, so distances are resolved finely and end early."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=math.ceil(vocabulary / 32) * 32,
            d_model=config.width,
            d_kv=config.width // config.heads,
            d_ff=config.d_ff,
            num_layers=config.layers,
            num_heads=config.heads,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


class AttributeHead(torch.nn.Module):
    """Names a caption's attributes from the encoder's states: from their mean, and from each token's state alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, sum(ATTRIBUTES.values()))

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the pooled states (B, answers) and of the single tokens (B, tokens, answers)."""
        weight = mask[..., None].to(states.dtype)
        pooled = (states * weight).sum(1) / weight.sum(1)
        return self.linear(pooled), self.linear(states)

    def loss(self, states: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy over attributes, pooled and per token."""
        pooled, single = self(states, mask)
        token_labels = torch.where(mask[..., None].bool(), labels[:, None], NOT_SAID)
        answers = list(ATTRIBUTES.values())
        total = states.new_zeros(())
        for index, (a, b) in enumerate(zip(pooled.split(answers, -1), single.split(answers, -1), strict=True)):
            total = total + _said_loss(a, labels[:, index])
            total = total + 0.5 * _said_loss(b.flatten(0, 1), token_labels[..., index].flatten())
        return total / len(ATTRIBUTES)

    @torch.no_grad()
    def accuracy(self, states: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Share of right answers from the pooled states, by attribute."""
        logits = self(states, mask)[0].split(list(ATTRIBUTES.values()), -1)
        result = {}
        for index, (name, values) in enumerate(zip(ATTRIBUTES, logits, strict=True)):
            said = labels[:, index] != NOT_SAID
            result[name] = round(float((values.argmax(-1) == labels[:, index])[said].float().mean()), 4)
        return result


def _said_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the labels that are said; zero, not NaN, when none is."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=NOT_SAID, reduction="sum")
    return total / (labels != NOT_SAID).sum().clamp(min=1)


def tokenize(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, padded to one length so that compiled graphs keep their shapes."""
    batch = tokenizer(texts, padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt")
    return batch.input_ids.to(device), batch.attention_mask.to(device)


class _TextTrainee:
    def __init__(self, run: Run, config: Config) -> None:
        self.run, self.config = run, config.text
        self.tokenizer = build_tokenizer()
        torch.manual_seed(run.seed)
        self.encoder = build_text_encoder(config.text, len(self.tokenizer)).to(run.device)
        self.head = AttributeHead(config.text.width).to(run.device)
        parameters = [*self.encoder.parameters(), *self.head.parameters()]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=config.text.lr, betas=(0.9, 0.98), weight_decay=0.01)
        # Two objects in half of the captions: the harder sentences deserve more practice than the clips' share.
        scenes = sample_scenes(config.text.captions, (run.seed, 11), two_objects=0.4)
        texts, labels = captions_and_labels(scenes, (run.seed, 12))
        self.ids, self.mask = tokenize(self.tokenizer, texts, run.device)
        self.labels = torch.from_numpy(labels).to(run.device)

    def state(self) -> checkpoints.Tensors:
        return {
            **checkpoints.prefixed("encoder", self.encoder.state_dict()),
            **checkpoints.prefixed("head", self.head.state_dict()),
            **checkpoints.prefixed("adam", checkpoints.adam_state(self.optimizer)),
        }

    def load(self, tensors: checkpoints.Tensors) -> None:
        self.encoder.load_state_dict(checkpoints.under("encoder", tensors))
        self.head.load_state_dict(checkpoints.under("head", tensors))
        checkpoints.load_adam_state(self.optimizer, checkpoints.under("adam", tensors))

    def step(self, step: int, horizon: int) -> Mapping[str, torch.Tensor]:
        factor = warmup_then(step, 100, 0.5 + 0.5 * math.cos(math.pi * step / horizon))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor
        index = torch.randint(
            len(self.ids), (self.config.batch,), generator=self.run.generator(1, step), device=self.run.device
        )
        ids, mask = self.ids[index], self.mask[index]
        loss = self.head.loss(self.encoder(ids, mask).last_hidden_state, mask, self.labels[index])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return {"loss": loss.detach()}


def train_text(run: Run, config: Config, limits: Limits) -> bool:
    """Run the stage; writes `text.safetensors` (encoder and head) and `text.json` (held-out accuracy)."""
    trainee = _TextTrainee(run, config)
    if not train(run, "text", trainee, limits):
        return False
    accuracy = held_out_accuracy(run, trainee.encoder, trainee.head, trainee.tokenizer)
    run.say("text: held-out accuracy", accuracy)
    weights = {name: tensor for name, tensor in trainee.state().items() if not name.startswith("adam.")}
    checkpoints.save(run.path("text.safetensors"), weights)
    checkpoints.write_json(run.path("text.json"), {"held_out_accuracy": accuracy})
    return True


def held_out_accuracy(
    run: Run, encoder: UMT5EncoderModel, head: AttributeHead, tokenizer: PreTrainedTokenizerFast, count: int = 2000
) -> dict[str, float]:
    """Accuracy on captions of held-out combinations, a third of them with two objects."""
    scenes = sample_scenes(count, (run.seed, 13), two_objects=0.33, held_out="only")
    texts, labels = captions_and_labels(scenes, (run.seed, 14))
    ids, mask = tokenize(tokenizer, texts, run.device)
    with torch.no_grad():
        states = encoder(ids, mask).last_hidden_state
    return head.accuracy(states, mask, torch.from_numpy(labels).to(run.device))


def load_text(run: Run, config: Config) -> tuple[UMT5EncoderModel, AttributeHead, PreTrainedTokenizerFast]:
    """The pre-trained encoder, its head and the tokenizer."""
    tokenizer = build_tokenizer()
    tensors, _ = checkpoints.load(run.path("text.safetensors"), run.device)
    encoder = build_text_encoder(config.text, len(tokenizer)).to(run.device)
    encoder.load_state_dict(checkpoints.under("encoder", tensors))
    head = AttributeHead(config.text.width).to(run.device)
    head.load_state_dict(checkpoints.under("head", tensors))
    return encoder, head, tokenizer
