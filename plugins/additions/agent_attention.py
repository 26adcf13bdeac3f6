"""``agent``: attention of Stable Diffusion over merged tokens, through few agents in the first steps (arXiv 2312.08874, §5.4).

Of the tokens of the finest map a share r is merged into others, as in ToMe (arXiv 2303.17604): one token of each s × s region,
drawn at random, is a target; of the others those most like a target (cosine of the block's input) become part of the mean of the
target that they are most like. Self-attention runs over the tokens that are left, and each merged token gets its target's output.

    first steps       s = 4, and agents A: the tokens that are left where a larger share is merged
                      O = softmax(Q Aᵀ · d^(−0.15)) softmax(A Kᵀ · d^(−0.5)) V + 0.075 · V
    later steps       s = 2, softmax attention over the merged tokens

Queries of agents are made from their means, with the layer's own weights. Published for 512² pixels: r 0.4, of agents 0.95, and
the first 20 of 50 steps.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from tilewise.plugins.additions.base import Addition, Report, place_in_run, register_addition
from tilewise.plugins.errors import ConfigError, UnsupportedModelError
from tilewise.plugins.hooks.forward_override import ForwardOverride, override_forward
from tilewise.plugins.methods.base import Method
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.torch_compat import outside_graphs

SERVED = "UNet2DConditionModel"
EARLY, LATE = 4, 2  # sides of the regions
SHARPNESS, SHORTCUT = 0.3, 0.075  # of the second softmax's scale; of V in the output


@register_addition
@dataclass(frozen=True)
class AgentAttention(Addition):
    """Agent attention over merged tokens.

    Args:
        ratio: share of the tokens that is merged, in [0, 0.75]. agent_ratio: the same for the agents, in [ratio, 1].
        steps: share of the run's steps with agents, from the first.
        seed: of the targets; with the same seed a layer has the same ones at the same step.

    Raises:
        ConfigError: for values that cannot be, or another method than dense.
    """

    ratio: float = 0.4
    agent_ratio: float = 0.95
    steps: float = 0.4
    seed: int = 0

    name: ClassVar[str] = "agent"

    def __post_init__(self) -> None:
        self._number("ratio", 0, 0.75)
        self._number("agent_ratio", 0, 1)
        self._number("steps", 0, 1)
        self._whole("seed", 0)
        if self.agent_ratio < self.ratio:
            raise ConfigError(
                "agent: agents are fewer than the tokens that are left: agent_ratio must be at least ratio, got "
                f"{self.agent_ratio} and {self.ratio}"
            )

    def check(self, name: str, denoiser: nn.Module, method: Method, beside: Sequence[str]) -> None:
        if not any(cls.__name__ == SERVED for cls in type(denoiser).__mro__):
            raise UnsupportedModelError(
                f"agent merges tokens of a {SERVED} (Stable Diffusion); {name} is a {type(denoiser).__name__}. Nothing was "
                "changed"
            )
        if method.name != "dense":
            raise ConfigError(
                f"agent: {method.name} selects among the tokens of a whole map, of which merging leaves a part that is no grid. "
                "Use one of the two: method dense with agent, or the method alone"
            )
        for layer in _finest(denoiser):
            odd = [
                n
                for n in ("spatial_norm", "group_norm", "norm_q", "norm_k")
                if getattr(layer.module, n, None) is not None
            ]
            if odd or getattr(layer.module, "residual_connection", False):
                raise UnsupportedModelError(
                    f"agent: {layer.name} has {', '.join(odd) or 'a residual connection'}, which Stable Diffusion has not"
                )

    def put_on(self, state: Any, denoiser: nn.Module, handles: list[Any]) -> Report:
        return _Running(self, state).put_on(denoiser, handles)


class Merging:
    """Which tokens of a map are merged into which: for (B, N, C) tensors of its tokens.

    Args:
        x: (B, N, C), by which tokens are compared. size: (h, w) with h · w = N. region: side s.
        places: (h // s, w // s) int64, the target's place in each region, 0 … s² − 1.
    """

    def __init__(self, x: torch.Tensor, size: tuple[int, int], region: int, places: torch.Tensor) -> None:
        h, w = size
        rows = torch.arange(h // region)[:, None] * region + places // region
        columns = torch.arange(w // region) * region + places % region
        targets = (rows * w + columns).reshape(-1)
        others = torch.ones(h * w, dtype=torch.bool)
        others[targets] = False
        self.targets, self.others = targets.to(x.device), others.nonzero().flatten().to(x.device)
        unit = F.normalize(x.float(), dim=-1)
        likeness = unit[:, self.others] @ unit[:, self.targets].transpose(1, 2)
        best, self.target_of = likeness.max(-1)  # (B, others)
        self.order = best.argsort(dim=-1, descending=True, stable=True)  # those most like a target first

    def merge(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """(B, N − count, C): the tokens that are left, then the targets."""
        count = min(count, len(self.others))
        source, target = x[:, self.others], x[:, self.targets]
        merged, kept = self.order[:, :count], self.order[:, count:]

        def wide(at: torch.Tensor) -> torch.Tensor:
            return at[..., None].expand(-1, -1, x.shape[-1])

        into = wide(self.target_of.gather(1, merged))
        means = target.scatter_reduce(1, into, source.gather(1, wide(merged)), "mean")
        return torch.cat([source.gather(1, wide(kept)), means], 1)

    def unmerge(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """(B, N, C) from what ``merge`` left: merged tokens have their target's value."""
        count = min(count, len(self.others))
        merged, kept = self.order[:, :count], self.order[:, count:]
        own, targets = x[:, : kept.shape[1]], x[:, kept.shape[1] :]
        out = x.new_empty(x.shape[0], len(self.others) + len(self.targets), x.shape[-1])
        out[:, self.targets] = targets
        batch = torch.arange(len(x), device=x.device)[:, None]
        out[batch, self.others[kept]] = own
        out[batch, self.others[merged]] = targets[batch, self.target_of.gather(1, merged)]
        return out


def targets_at(seed: int, step: int, layer: int, size: tuple[int, int], region: int) -> torch.Tensor:
    """(h // s, w // s) int64: the place of each region's target, the same on every device."""
    drawn = random.Random(f"{seed}/{step}/{layer}").getrandbits(63)
    generator = torch.Generator("cpu").manual_seed(drawn)
    return torch.randint(region**2, (size[0] // region, size[1] // region), generator=generator)


class _Forward(threading.local):
    """What one forward goes by. step: of the run; early: whether it has agents. map: (h, w) of the transformer under way.
    tokens: of the block under way, by which they are compared."""

    def __init__(self) -> None:
        self.step, self.early = 0, False
        self.map = (1, 1)
        self.tokens: torch.Tensor | None = None


class _Running:
    """The changes of one UNet."""

    def __init__(self, addition: AgentAttention, state: Any) -> None:
        self.addition, self.state = addition, state
        self.forward = _Forward()
        self.lock = threading.Lock()
        self.calls = {"agents": 0, "merged": 0}

    def put_on(self, unet: nn.Module, handles: list[Any]) -> Report:
        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._begin(module, args, kwargs)

        def end(*_: Any) -> None:
            self.forward.tokens = None

        handles.append(unet.register_forward_pre_hook(outside_graphs(begin), with_kwargs=True))
        handles.append(unet.register_forward_hook(outside_graphs(end), always_call=True))
        transformers = set()
        for layer in _finest(unet):
            block = layer.name.removesuffix(".attn1")
            transformer = block.rsplit(".transformer_blocks.", 1)[0]
            if transformer not in transformers:
                transformers.add(transformer)
                hook = outside_graphs(self._seen())
                handles.append(unet.get_submodule(transformer).register_forward_pre_hook(hook, with_kwargs=True))
            hook = outside_graphs(self._entered())
            handles.append(unet.get_submodule(block).register_forward_pre_hook(hook, with_kwargs=True))
            override = override_forward(layer.module, outside_graphs(self._attention(layer.block)), True)
            if override is None:
                raise UnsupportedModelError(
                    f"agent: the forward of {layer.name} was replaced by somebody else; take that off"
                )
            handles.append(override)
        return self.report

    def report(self) -> str | None:
        """For ``summary``."""
        done = self.calls
        return (
            f"agent: {done['agents']} calls through agents, {done['merged']} over merged tokens"
            if any(done.values())
            else None
        )

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        step, steps = place_in_run(self.state, module, args, kwargs)
        self.forward.step, self.forward.early = step, step < self.addition.steps * steps

    def _seen(self) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.forward.map = (hidden.shape[-2], hidden.shape[-1])

        return before

    def _entered(self) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.forward.tokens = args[0] if args else kwargs["hidden_states"]

        return before

    def _attention(self, number: int) -> Callable[..., Any]:
        def run(override: ForwardOverride, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            forward, addition = self.forward, self.addition
            tokens, size = forward.tokens, forward.map
            region = EARLY if forward.early else LATE
            if override.state is None or tokens is None or min(size) < region or not addition.ratio:
                return override.stock(hidden_states, *args, **kwargs)
            places = targets_at(addition.seed, forward.step, number, size, region)
            merging, count = Merging(tokens, size, region, places), int(tokens.shape[1] * addition.ratio)
            left = merging.merge(hidden_states, count)
            agents = (
                merging.merge(hidden_states, int(tokens.shape[1] * addition.agent_ratio)) if forward.early else left
            )
            if 2 * agents.shape[1] < left.shape[1]:
                out, how = through_agents(override.module, left, agents), "agents"
            else:
                out, how = override.stock(left, *args, **kwargs), "merged"
            with self.lock:
                self.calls[how] += 1
            return merging.unmerge(out, count)

        return run


def through_agents(attn: Any, x: torch.Tensor, agents: torch.Tensor) -> torch.Tensor:
    """Self-attention of x (B, N, C) through agents (B, n, C), with a layer's projections."""

    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    query, key, value, agent = heads(attn.to_q(x)), heads(attn.to_k(x)), heads(attn.to_v(x)), heads(attn.to_q(agents))
    scale = query.shape[-1] ** -0.5
    gathered = F.scaled_dot_product_attention(agent, key, value, scale=scale)
    out = F.scaled_dot_product_attention(query, agent, gathered, scale=scale**SHARPNESS)
    out = (out + SHORTCUT * value).transpose(1, 2).flatten(2)
    return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def _finest(denoiser: nn.Module) -> list[AttentionLayer]:
    """The self-attention layers of the finest level that has any."""
    family = family_of(denoiser)
    layers = [] if family is None else family.layers(denoiser)
    finest = min((layer.downsample or 0 for layer in layers), default=0)
    return [layer for layer in layers if (layer.downsample or 0) == finest]
