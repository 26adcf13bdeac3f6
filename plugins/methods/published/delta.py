"""``delta``: a few queries, answered densely, correct what sparse attention shifts (Delta attention, arXiv 2505.11254).

    groups of ``every`` queries of the video, m the one in the middle of query s's group:

    out[s] = sparse[s] + dense[m] − sparse[m]

What sparse attention leaves out changes the outputs of neighbouring queries alike, so that the difference of one serves its
group. It goes on top of any method, and costs 1 / ``every`` of dense attention, which counts in ``cost``. In the paper m is the
first query of a run of tokens in text; here groups are runs in the token order, neighbours in the video. Text queries see
everything anyway.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import Around, DynamicMethod, Method, Planned, make_method, of_heads, register
from tilewise.plugins.methods.dynamic.options import whole_number
from tilewise.plugins.methods.head_part import HeadPart
from tilewise.plugins.models.common.family import AttentionLayer

if TYPE_CHECKING:
    from tilewise.plugins.runtime.forward_state import ForwardState

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@register
@dataclass(frozen=True)
class Delta(DynamicMethod):
    """Another method, corrected by dense attention of every n-th query.

    Args:
        base: the method that is corrected, or its dictionary; any but dense, those of UNets alone, and itself. Default: draft.
        every: n, at least 2; the paper uses 64.

    Raises:
        ConfigError: for values that cannot be.
    """

    base: Any = None
    every: int = 64

    name: ClassVar[str] = "delta"
    source: ClassVar[str] = "Delta attention, arXiv 2505.11254"
    use: ClassVar[str] = "closing the gap that low densities leave, on top of another method"

    def __post_init__(self) -> None:
        whole_number(self, "every", 2)
        base = {"name": "draft"} if self.base is None else self.base
        if isinstance(base, Mapping):
            base = make_method(str(base.get("name")), {key: value for key, value in base.items() if key != "name"})
        if not isinstance(base, Method) or isinstance(base, Delta) or base.name == "dense" or base.needs_step:
            raise ConfigError(
                f"delta: base must be a sparse method such as draft or sta, got {getattr(base, 'name', base)!r}"
            )
        object.__setattr__(self, "base", base)

    # ── what the base says ───────────────────────────────────────────────────────────────────────────────────────

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        return dataclasses.replace(self, base=self.base.prepare(target, denoiser))

    def put_on(self, state: ForwardState, denoiser: nn.Module, handles: list[Any]) -> Callable[[], str | None] | None:
        found: Callable[[], str | None] | None = self.base.put_on(state, denoiser, handles)
        return found

    @property
    def follows_runs(self) -> bool:
        return bool(self.base.follows_runs)

    def check(self, heads: int) -> None:
        self.base.check(heads)

    def layout(self, grid: Grid) -> Layout | None:
        found: Layout | None = self.base.layout(grid)
        return found

    def scale(self, layout: Layout, head_dim: int) -> float | None:
        found: float | None = self.base.scale(layout, head_dim)
        return found

    def of_heads(self, heads: Sequence[int]) -> Self:
        return dataclasses.replace(self, base=of_heads(self.base, tuple(heads)))

    def head_costs(self) -> tuple[float, ...] | None:
        found: tuple[float, ...] | None = self.base.head_costs()
        return found

    def refuses_some_heads(self) -> str | None:
        found: str | None = self.base.refuses_some_heads()
        return found

    def refuses_window(self) -> str | None:
        return "its corrections are of one sequence, and not of a KV cache beside it"

    def at(self, layer: int, noise: float | None) -> DynamicMethod | None:
        base = self.base.at(layer, noise) if isinstance(self.base, DynamicMethod) else self.base
        return None if base is None else _with_base(self, base)

    def in_run(
        self, layer: AttentionLayer, shared: Callable[[], dict[str, Any]], part: HeadPart | None = None
    ) -> DynamicMethod:
        return dataclasses.replace(self, base=self.base.in_run(layer, shared, part))

    @property
    def heads_alike(self) -> bool:
        return not isinstance(self.base, DynamicMethod) or self.base.heads_alike

    def refuses_some_samples(self) -> str | None:
        found: str | None = self.base.refuses_some_samples()
        return found

    @property
    def needs_noise(self) -> bool:
        return isinstance(self.base, DynamicMethod) and self.base.needs_noise

    @property
    def keeps_memory(self) -> bool:
        return isinstance(self.base, DynamicMethod) and self.base.keeps_memory

    @property
    def remembers_heads(self) -> bool:
        return isinstance(self.base, DynamicMethod) and self.base.remembers_heads

    def refuses_call(self, layout: Layout) -> str | None:
        return self.base.refuses_call(layout) if isinstance(self.base, DynamicMethod) else None

    def stays_dense(self, tokens: int, device: torch.device) -> str | None:
        return self.base.stays_dense(tokens, device) if isinstance(self.base, DynamicMethod) else None

    def expected_density(self, layout: Layout, heads: int, window: WindowKeys | None = None) -> float:
        if isinstance(self.base, DynamicMethod):
            return self.base.expected_density(layout, heads)
        return float(self.base.plan(layout, heads, torch.device("cpu")).density)

    def expected_cost(self, layout: Layout, heads: int) -> float:
        if isinstance(self.base, DynamicMethod):
            cost = self.base.expected_cost(layout, heads)
        else:
            cost = float(self.base.plan(layout, heads, torch.device("cpu")).cost)
        return cost + correction(layout, self.every, torch.device("cpu")).pairs

    def describe(self, layout: Layout) -> dict[str, Any]:
        return {"base": self.base.name, **self.base.describe(layout), "every": self.every}

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "base": self.base.to_dict(), "every": self.every}

    # ── a call ───────────────────────────────────────────────────────────────────────────────────────────────────

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
        if isinstance(self.base, DynamicMethod):
            planned = self.base.plan_call(layout, query, key, value, scale, memory, tick)
        else:
            planned = _static(self.base, layout, query.shape[2], query.device)
        around = correction(layout, self.every, query.device)
        if planned.around is not None:
            around = dataclasses.replace(around, inner=planned.around, pairs=around.pairs + planned.around.pairs,
                                         moves_tokens=planned.around.moves_tokens)  # fmt: skip
        return dataclasses.replace(planned, around=around)


@dataclass(frozen=True)
class Correction(Around):
    """at: (P,) int64, layout positions of the queries that are answered densely. group: (S,) int64, the number of each query's
    among them; P for text. inner: what the base does around its plan."""

    at: torch.Tensor
    group: torch.Tensor
    pairs: float = 0.0
    moves_tokens: bool = False
    inner: Around | None = None

    def before(self, qkv: QKV) -> QKV:
        return qkv if self.inner is None else self.inner.before(qkv)

    def after(self, qkv: QKV, out: torch.Tensor, scale: float | None) -> torch.Tensor:
        if self.inner is not None:
            out = self.inner.after(qkv, out, scale)
        query, key, value = (x.transpose(1, 2) for x in (qkv[0][:, self.at], *qkv[1:]))
        grouped = query.shape[1] != key.shape[1]
        dense = scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped).transpose(1, 2)
        shift = torch.cat([dense - out[:, self.at], torch.zeros_like(out[:, :1])], 1)
        return out + shift[:, self.group]


def correction(layout: Layout, every: int, device: torch.device) -> Correction:
    """The groups of the video's queries in the layout's order, as equal as they can be with at most ``every``."""

    def make() -> Correction:
        grid = layout.grid
        first, groups = grid.text if grid.text_first else 0, -(-grid.video // every)
        edges = torch.arange(groups + 1) * grid.video // groups + first
        group = torch.full((grid.tokens,), groups)
        group[first : first + grid.video] = torch.arange(groups).repeat_interleave(edges.diff())
        with torch.inference_mode(False):
            return Correction(((edges[:-1] + edges[1:]) // 2).to(device), group.to(device), groups / grid.tokens)

    return layout.cached(("delta", every, device), make)


@functools.lru_cache(maxsize=1024)
def _with_base(method: Delta, base: Method) -> Delta:
    return method if base is method.base else dataclasses.replace(method, base=base)


def _static(method: Method, layout: Layout, heads: int, device: torch.device) -> Planned:
    """The plan of a static method, made once."""

    def make() -> Planned:
        with torch.inference_mode(False):
            plan = method.plan(layout, heads, device)
            return Planned(
                dataclasses.replace(plan, device_density=torch.tensor(plan.density, device=device), _cache={})
            )

    return layout.cached(("delta base", method, heads, device), make)
