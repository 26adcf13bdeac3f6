"""What a method is: a layout of the tokens and a plan over its blocks. A new method is a new file in this folder."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import nn

import tilewise.plugins.methods
import tilewise.plugins.methods.published
from tilewise.kernels.attention.block_compensation import BlockCompensation
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.plugins.errors import ConfigError, unknown
from tilewise.plugins.methods.head_part import HeadPart
from tilewise.plugins.models.common.family import AttentionLayer

if TYPE_CHECKING:
    from tilewise.plugins.runtime.forward_state import ForwardState

_REGISTRY: dict[str, type[Method]] = {}


@dataclasses.dataclass(frozen=True)
class Method:
    """Base class: a frozen dataclass whose fields are the method's options (JSON values only).

    A subclass is decorated with ``@register``, sets ``name`` and gives ``layout`` and ``plan``. Both are pure: the same
    arguments give the same answer, which is why the patch may keep it for all layers and steps.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    """Where the method comes from: a paper with its number on arXiv, or "this project"."""
    use: ClassVar[str] = ""
    """What it is for, in half a sentence."""
    made_by: ClassVar[str | None] = None
    """The command that makes this method's options, where nobody writes them by hand; it is not listed among the methods."""
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of options of which at most one may be given: whoever sets one takes the others back."""

    def layout(self, grid: Grid) -> Layout | None:
        """Token order for a grid. None: the method leaves every attention call dense."""
        raise NotImplementedError

    def map_layout(self, grid: Grid, layer: AttentionLayer, step: int | None) -> Layout | None:
        """Token order of a layer with a feature map of its own, as in UNets. Default: ``layout`` of the map.

        grid: the map. step: of the denoising schedule, only given where ``needs_step``. None: the call is dense.
        """
        return self.layout(grid)

    @property
    def needs_step(self) -> bool:
        """Whether ``map_layout`` goes by the denoising step."""
        return False

    def plan(self, layout: Layout, heads: int, device: torch.device) -> BlockPlan:
        """The key blocks that each query block sees, for a layer with ``heads`` heads.

        Raises:
            ConfigError: if the options do not fit this grid or number of heads.
        """
        raise NotImplementedError

    def window_plan(self, keys: WindowKeys, heads: int, device: torch.device) -> BlockPlan:
        """The plan of a stream's chunk over the keys of its window, of whose chunks some are seen whole whatever the method says.

        Raises:
            ConfigError: see ``plan``.
        """
        return keys.plan(with_tile(self, keys.chunk.tile).plan(keys.layout, heads, device))

    def scale(self, layout: Layout, head_dim: int) -> float | None:
        """What queries times keys are multiplied with, in the method's calls and in a global path beside them; None: as the model
        has it."""
        return None

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        """The method with what it needs to know about a denoiser filled in, such as its training size. Default: as it is.

        Called for each denoiser when ``target``, a pipeline or the denoiser itself, is patched or explained.

        Raises:
            ConfigError: if the denoiser does not say what the method needs, or the method does not fit it.
        """
        return self

    def put_on(self, state: ForwardState, denoiser: nn.Module, handles: list[Any]) -> Callable[[], str | None] | None:
        """Put on a denoiser what the method reads beside its own calls. Default: nothing.

        state: of the patch. handles: get each change as soon as it is made, with ``remove()``; see ``Addition`` for what they may
        be. Returns what says in one line for ``summary`` what was read.

        Raises:
            ConfigError: where it cannot be read.
        """
        return None

    @property
    def follows_runs(self) -> bool:
        """Whether what ``put_on`` put on goes by the step and the branch of forwards."""
        return False

    def check(self, heads: int) -> None:
        """Refuse, before anything runs, options that do not fit a layer with ``heads`` heads.

        Raises:
            ConfigError: saying what would fit.
        """

    def refuses_window(self) -> str | None:
        """Why calls over the window of a KV cache cannot run, or None."""
        return None

    def of_heads(self, heads: Sequence[int]) -> Self:
        """The method for some of a layer's heads, as a process has them that shares the layer with others. Default: as it is."""
        return self

    def head_costs(self) -> tuple[float, ...] | None:
        """The work of each of a layer's heads, in any unit, by which they are dealt to processes; None: they are equal, or only a
        call decides."""
        return None

    def refuses_some_heads(self) -> str | None:
        """Why a call over some of a layer's heads cannot choose as the call over all of them does, or None."""
        return None

    def refuses_some_samples(self) -> str | None:
        """Why a call over some samples of a batch cannot choose as the call over all of them does, or None."""
        return None

    def describe(self, layout: Layout) -> dict[str, Any]:
        """What ``explain`` says about the method on this layout, beyond grid, tile and density."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self)}

    def brief(self) -> dict[str, Any]:
        """The options that a line has room for. Default: all."""
        return self.to_dict()


class Around:
    """What a dynamic method does to a call beside its plan, before and after the plan runs.

    Attributes:
        pairs: token pairs that it computes itself ÷ all.
        moves_tokens: whether the plan's tokens are not in the layout's order, so that it says nothing about places.
    """

    pairs: float = 0.0
    moves_tokens: bool = False

    def before(
        self, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the plan is run over, from query (B, S, H, D), key and value (B, S, Hk, D) in the layout's order."""
        return qkv

    def after(
        self, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], out: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """The call's output (B, S, H, D) in the layout's order, from what the plan gave. qkv: as ``before`` got them."""
        return out


@dataclasses.dataclass(frozen=True)
class Planned:
    """What a dynamic method decided for one attention call. All tensors are on the call's device: nothing is waited for.

    Attributes:
        plan: the key blocks that each query block sees.
        compensation: summary rows of those that it does not, to be merged into the output; None: they are left out.
        draft: (B, H, Nq, Nk) float32, the expected share of attention mass of each pair of blocks; for pictures, None if there
            is none.
        recall: () float32, attention mass that the plan keeps by the method's own estimate, mean over queries and heads.
        probe: the same, measured exactly on some queries; None if that was not asked for.
        broken: () float32, number of lists that keep everything because the draft was not finite there.
        around: what is done before and after the plan runs; None: nothing.
    """

    plan: BlockPlan
    compensation: BlockCompensation | None = None
    draft: torch.Tensor | None = None
    recall: torch.Tensor | None = None
    probe: torch.Tensor | None = None
    broken: torch.Tensor | None = None
    around: Around | None = None


class DynamicMethod(Method):
    """A method whose plan depends on the queries and keys of the call. It gives ``plan_call`` in place of ``plan``.

    What it keeps from one step to the next it keeps in ``memory``: a dictionary for one layer and branch (conditional and
    unconditional forwards each have one), empty at the first call of a run, and whenever the shape of the call changes.
    """

    def plan_call(
        self,
        layout: Layout,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        memory: dict[str, Any],
        tick: int,
        window: WindowKeys | None = None,
    ) -> Planned:
        """What a call sees: query (B, S, H, D), key and value (B, S, Hk, D) in the layout's order.

        Must not wait for the device. tick: counts the denoising steps; it is only true where ``keeps_memory``. window: keys and
        values are those of the window of a KV cache, (B, Sk, Hk, D) in its order; given only where ``refuses_window`` is None.
        """
        raise NotImplementedError

    def at(self, layer: int, noise: float | None) -> DynamicMethod | None:
        """The method of a layer's calls at a noise level; None: they are dense. Default: this one, everywhere.

        layer: its number among the self-attention layers of the denoiser. noise: from 1, noise alone, to 0, the clip; it is only
        given where ``needs_noise``.
        """
        return self

    def in_run(
        self, layer: AttentionLayer, shared: Callable[[], dict[str, Any]], part: HeadPart | None = None
    ) -> DynamicMethod:
        """The method of a layer's calls within a run; only asked where ``keeps_memory``. Default: this one.

        shared: gives what is kept as ``memory`` is, one dictionary for all layers of a branch. part: which heads of the layer its
        calls are over, if not all.
        """
        return self

    @property
    def needs_noise(self) -> bool:
        """Whether ``at`` goes by the noise level."""
        return False

    @property
    def keeps_memory(self) -> bool:
        """Whether ``memory`` is used at all: only then are steps and branches told apart."""
        return False

    @property
    def heads_alike(self) -> bool:
        """Whether each head keeps the same share of its pairs. Default: they may differ, and only a call knows."""
        return False

    @property
    def remembers_heads(self) -> bool:
        """Whether what is kept in ``memory`` is of the heads of a call, which must then be the same at each step. Default: yes,
        where anything is kept."""
        return self.keeps_memory

    def expected_density(self, layout: Layout, heads: int, window: WindowKeys | None = None) -> float:
        """Kept ÷ all token pairs, as far as it is known before anything runs; nan if only a call decides. window: the keys, where
        they are those of a KV cache."""
        return math.nan

    def expected_cost(self, layout: Layout, heads: int) -> float:
        """The same, with the pairs of a query and a mean that stands for keys. Default: there are none."""
        return self.expected_density(layout, heads)

    def refuses_call(self, layout: Layout) -> str | None:
        """Why a call over this layout cannot run, or None. It falls back to dense, counted."""
        return None

    def refuses_window(self) -> str | None:
        """Why calls over the window of a KV cache cannot run, or None. Default: ``plan_call`` knows nothing of it."""
        return f"the method {self.name} does not plan for more keys than queries"

    @property
    def depends_on_time(self) -> bool:
        """Whether a plan over a window depends on which of its chunks is where in memory, beyond what is kept in any case."""
        return True

    def stays_dense(self, tokens: int, device: torch.device) -> str | None:
        """Why a call with so many keys is dense on purpose, as it would not be faster; or None."""
        return None


AnyMethod = TypeVar("AnyMethod", bound=Method)
M = TypeVar("M", bound=type[Method])


@lru_cache(maxsize=1024)
def _of_heads(method: Method, heads: range | tuple[int, ...]) -> Method:
    return method.of_heads(heads)


def of_heads(method: AnyMethod, heads: range | tuple[int, ...] | None) -> AnyMethod:
    """``Method.of_heads``, made once; None: all heads."""
    return method if heads is None else _of_heads(method, heads)  # type: ignore[return-value]


def with_tile(method: AnyMethod, tile: tuple[int, int, int]) -> AnyMethod:
    """The method with the tile of a layout that it did not choose itself, if it counts in tiles. Such a layout has no cells."""
    names = {field.name for field in dataclasses.fields(method)}
    if "tile" not in names:
        return method
    changed: dict[str, Any] = {"tile": tile, **({"far": None, "cell": None} if "cell" in names else {})}
    return dataclasses.replace(method, **changed)


def register(cls: M) -> M:
    """Class decorator: makes a method known by its name."""
    _REGISTRY[cls.name] = cls
    return cls


@cache
def _import_all() -> None:
    for package in (tilewise.plugins.methods, tilewise.plugins.methods.published):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def methods() -> list[str]:
    """Names of all methods whose options can be written by hand."""
    _import_all()
    return sorted(name for name, cls in _REGISTRY.items() if cls.made_by is None)


@dataclasses.dataclass(frozen=True)
class About:
    """A method in a line. what: the first line of its class's docstring; the others: see ``Method``."""

    name: str
    what: str
    source: str
    use: str


def about_methods() -> list[About]:
    """Every method whose options can be written by hand, by name."""
    found = []
    for name in methods():
        cls = _REGISTRY[name]
        what = (cls.__doc__ or "").strip().partition("\n")[0]
        found.append(About(name, what, cls.source, cls.use))
    return found


def method_class(name: str) -> type[Method]:
    """The class of a method by its name.

    Raises:
        ConfigError: unknown name.
    """
    _import_all()
    if name not in _REGISTRY:
        raise unknown("method", name, methods())
    return _REGISTRY[name]


def make_method(name: str, options: dict[str, Any] | None = None) -> Method:
    """A method from its name and options.

    Raises:
        ConfigError: unknown name or option, or a value that cannot be; the message lists what can.
    """
    cls = method_class(name)
    valid = [f.name for f in dataclasses.fields(cls)]
    for option in options or {}:
        if option not in valid:
            raise unknown(f"option of method {name!r}:", option, valid)
    try:
        return cls(**(options or {}))
    except TypeError as error:
        raise ConfigError(f"method {name!r}: {error}") from error
