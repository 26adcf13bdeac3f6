"""What a family is: the adapter by which tilewise reads one group of diffusers denoisers.

A new family is a subclass of ``Family`` in a file of its own in ``plugins/models/``, or anywhere in your own code, given to
``register_family`` (``registry.py``).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.models.common.fp8_linears import fuse_fp8_linears
from tilewise.plugins.models.common.rotary import Rotary


class UnreadableGridError(TilewiseError):
    """The model takes these inputs, but the family cannot read a token grid from them. Raised by ``Family.grid``; the forward
    then runs as if ``Family.refuses`` had returned the message."""


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention layer of a denoiser: the module whose ``processor`` is replaced.

    block: number of the transformer block it belongs to, which ``blocks="2:"`` selects by.
    downsample: None: the layer attends over the denoiser's token sequence. A number n (a UNet's level): over a feature map of its
        own, whose height and width are the grid's divided by 2**n (rounded up).
    """

    name: str
    module: nn.Module
    block: int
    heads: int
    head_dim: int
    downsample: int | None = None

    def grid(self, grid: Grid) -> Grid:
        """The layer's own grid in a forward over ``grid``."""
        if self.downsample is None:
            return grid
        return dataclasses.replace(grid, h=-(-grid.h >> self.downsample), w=-(-grid.w >> self.downsample))


@dataclass(frozen=True)
class Size:
    """The output that a pipeline is asked for: pixels and frames."""

    height: int
    width: int
    frames: int

    @property
    def num_frames(self) -> int:
        """``frames`` by its old name, until the next release."""
        return self.frames


@dataclass(frozen=True)
class Streams:
    """How a denoiser's blocks are called: what ``two_paths`` needs to run a second path through them.

    The blocks take ``hidden`` and, with text in the same sequence, ``encoder_hidden_states``, first or by name.

    blocks: attributes with the blocks, in order. text: position of the text among the forward's arguments.
    joint: image and text share one attention, and a block returns both; otherwise it has cross-attention to the text.
    text_first: whether it returns the text first.
    own, cross: a block's self-attention, and its cross-attention to the text, where it has one. hidden: its first parameter.
    """

    blocks: tuple[str, ...]
    text: int
    joint: bool = False
    text_first: bool = False
    own: str = "attn1"
    cross: str = "attn2"
    hidden: str = "hidden_states"


class FusedState(Protocol):
    """What a family's fused code asks at each call."""

    def fused_here(self, x: torch.Tensor) -> bool:
        """Whether fused kernels may run on hidden states like ``x``: enabled, on a device that has them, without gradients."""


class Family(ABC):
    """Base class: how tilewise reads one group of denoisers. Stateless: one instance serves all of them.

    A subclass sets ``name`` and ``classes`` and defines the abstract methods. The other methods are optional: they default to
    "nothing of that kind".
    """

    name: str
    classes: tuple[str, ...]  # class names of the denoisers
    # Where the default ``layers`` finds self-attention: attributes of the denoiser with its blocks, in order, and of a block.
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    attention: ClassVar[str] = "attn1"
    streams: ClassVar[Mapping[str, Streams]] = {}  # by class name: the denoisers that ``two_paths`` can run
    # Whether each layer makes its attention mask anew from what the forward was given: masks of one shape are then equal within a
    # forward, and one of them is read, not one a layer.
    masks_per_layer: ClassVar[bool] = False
    # Whether attention calls of one forward are over different numbers of text tokens, which the values of a mask decide.
    text_per_sample: ClassVar[bool] = False
    # Whether text tokens, as ``Grid`` has them, come in one tensor with the video: context parallelism splits the two together.
    one_tensor: ClassVar[bool] = False
    # Parameters of the forward that may have a value for each token, in some calls, along their second axis.
    per_token: ClassVar[tuple[str, ...]] = ()
    # Whether only a patched denoiser runs under ``context_parallel_plan``: its stock processors exchange nothing, or bring masks
    # over the whole sequence.
    split_needs_patch: ClassVar[bool] = False
    # Whether its pipelines give both branches of classifier-free guidance to one forward, as two halves of its batch. Otherwise
    # they call the denoiser once for each.
    guidance_in_batch: ClassVar[bool] = False
    # Whether the text of its cross-attention is the tokens of the prompt by the pipeline's ``tokenizer``, in their order from the
    # first on: no template stands before them.
    prompt_tokens: ClassVar[bool] = False
    # Parameters of the forward that may hold a row for each frame of each sample along their first axis.
    per_frame: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        """The token grid of a forward call, from its arguments.

        Raises:
            UnreadableGridError: if the arguments hold no grid, although the model may run on them.
        """

    @abstractmethod
    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The timestep argument of a forward call: any shape; where tokens differ, the noisiest counts."""

    def layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        """The self-attention layers over the grid, in order: by default, one in each block of ``stacks``."""
        config: Any = denoiser.config
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        blocks = [(f"{stack}.{i}", block) for stack in self.stacks for i, block in enumerate(getattr(denoiser, stack))]
        return [
            AttentionLayer(f"{name}.{self.attention}", getattr(block, self.attention), number, heads, head_dim)
            for number, (name, block) in enumerate(blocks)
        ]

    def temporal_layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        """Attention layers over the frames of each place, in order, where the model has them beside those over places. Methods
        leave them as they are; additions may change them. Default: none."""
        return []

    @abstractmethod
    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        """The grid that a pipeline call of this size leads to.

        Raises:
            ConfigError: for a size that the model does not take unchanged, naming the nearest one that it does.
        """

    # ── optional ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def refuses(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
        """Why a forward call cannot be sparse, or None.

        A refused call runs stock, and is counted as a fallback; ``strict`` raises. ``grid`` is not called for it. torch.compile
        traces this method: it may look at the config and at which arguments are given, not at the values of tensors. Where
        those decide, ``grid`` raises ``UnreadableGridError``; in a compiled denoiser that is an error.
        """
        return None

    def rotary(self, denoiser: nn.Module) -> Rotary | str:
        """How keys turn with their position, which a KV cache needs to write and move them; or why this denoiser cannot run
        with one (plugins/streaming/)."""
        return f"the family {self.name} does not say how its positions are offset (Family.rotary)"

    def clean_frames(self, denoiser: nn.Module, pipe: Any) -> int | str:
        """With how many clean latent frames in front of noisy ones the weights were trained, as far as the pipeline's config
        says; 0: nothing is said of it. Or why this denoiser cannot have a timestep for each latent frame."""
        return f"the family {self.name} does not say how a latent frame has a timestep of its own (Family.clean_frames)"

    def with_lead_timesteps(
        self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any], lead: torch.Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a forward, with other timesteps of the first latent frames. Only where ``clean_frames`` is a number.

        lead: (k,) float32, from 0 (clean) to 1000, one for each of them; the others keep the forward's own.
        """
        raise NotImplementedError

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        """Which tensors context parallelism splits and gathers, as diffusers' ``enable_parallelism`` takes it for ``cp_plan``; or
        why this denoiser's sequence cannot be split. Default: the model's own.

        Text and picture of one attention are split each by itself, and so that their tensors are ``Grid``'s: what stands with the
        text, and the picture with the tokens on its other side.
        """
        return getattr(denoiser, "_cp_plan", None) or "diffusers has no plan to split its sequence"

    def on_split(self, denoiser: nn.Module, share: Callable[[int], range]) -> None:
        """Called once context parallelism is enabled by ``context_parallel_plan``, for what no plan can say. Default: nothing.

        share: gives this rank's tokens of a sequence of so many.
        """
        return

    def whole_attention(self, denoiser: nn.Module) -> list[nn.Module]:
        """Modules with attention over tokens that each rank has all of under ``context_parallel_plan``. Default: none."""
        return []

    def hooks(self, denoiser: nn.Module) -> list[Any]:
        """Register hooks that the family needs on a patched denoiser, as to make a mask once a forward and not once a layer.

        torch.compile traces them: they must not branch on the denoising step. Do not register them on Linear layers: a LoRA that
        is loaded later would wrap them. Returns the handles, each with ``remove()``.
        """
        return []

    def replace_processor(self, layer: AttentionLayer) -> Callable[..., Any] | None:
        """A function to run in place of the layer's stock processor in every call, or None to run the stock one.

        For a stock processor that prepares its attention call in a way that no kernel can take. Called as ``function(processor,
        dispatch, attn, …)``: the stock processor, a function with the signature of diffusers' ``dispatch_attention_fn``, and
        the processor's own arguments. ``layer.module.processor`` is still the stock one when this is asked.
        """
        return None

    def self_attention(self, layer: AttentionLayer) -> Callable[..., torch.Tensor | None] | None:
        """A fused function to run in place of the layer's stock processor where ``FusedState.fused_here`` allows it, or None.

        Called as ``replace_processor``'s is, with ``order`` besides: (S,) int64, the token order in which to give query and key
        to ``dispatch``, the value in the model's own; None: all three in that. Where it cannot run it returns None, before it
        called anything.
        """
        return None

    def fuse(self, denoiser: nn.Module, state: FusedState) -> list[Any]:
        """Put fused forwards on a denoiser's modules, exact to rounding, which ask ``state`` at each call whether to run.

        Returns the handles, each with ``remove()``. Here: on linear layers in fp8.
        """
        return list(fuse_fp8_linears(denoiser, state))

    def notes(self, denoiser: nn.Module, *, fuse: bool, dense: Collection[str]) -> list[str]:
        """What ``explain`` and ``summary`` say about a denoiser, patched or not: where code that this family would run in place
        of the stock one stays off, as the model has other code than the family knows.

        fuse: whether fused kernels are wanted. dense: names of layers that keep their own processor, which is reported already.
        """
        return []
