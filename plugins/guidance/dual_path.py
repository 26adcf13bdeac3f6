"""Two paths through a patched denoiser: the window path makes the picture, the global path tells it what the rest shows.

FreeSwim (arXiv 2511.14712, §3.3). Past its training size, a model under window attention draws well but each window by itself:
objects come up twice. So in every block both paths' cross-attention uses the output of the global path's query:

    global path     f ← f + SelfAttention_all(f);     c = CrossAttention(f, text);   f ← f + c;   f ← f + FFN(f)
    window path   h ← h + SelfAttention_window(h);                                 h ← h + c;   h ← h + FFN(h)

Both start from the same latents; only h reaches the output, and f is dropped. At a *refresh* each block runs f before h. In the
steps between two refreshes c comes from a cache, layer by layer, and f is not computed at all.

Where text is part of the sequence and there is no cross-attention (HunyuanVideo, Flux, Qwen-Image and others), what text gives
within the one attention takes c's place: ``joint_text``.

No row is computed that nobody uses: f does not run past the last cross-attention, h computes no cross-attention of its own, and
with ``refresh=1`` nothing is kept. What the paper's code does in one doubled batch is here two calls of each block, so any batch
size works, and the memory is that of one hidden state more.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tilewise.plugins.errors import ConfigError, TilewiseError, UnsupportedModelError
from tilewise.plugins.guidance.coarse_global_path import CoarseGlobalPath
from tilewise.plugins.guidance.cross_attention_cache import CrossAttentionCache
from tilewise.plugins.guidance.global_path import GlobalPath, check_denoisers
from tilewise.plugins.hooks.forward_override import ForwardOverride, override_forward
from tilewise.plugins.models.common.denoisers import ATTRIBUTE
from tilewise.plugins.models.common.registry import streams_of
from tilewise.plugins.patching import denoisers_of, patches_of
from tilewise.plugins.runtime.other_threads import refuse_while_running
from tilewise.plugins.runtime.patched_denoiser import Patch

Guided = Literal["all", "cond"]
# What adds to hidden states between two blocks, or leaves blocks out.
BETWEEN = (
    "controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states", "skip_layers",
)  # fmt: skip


@dataclass
class Counts:
    """Forwards by what they did: both paths, the window path with cached cross-attention, the window path by itself."""

    refreshed: int = 0
    reused: int = 0
    unguided: int = 0


@dataclass(eq=False)
class _Branch:
    """One text that a thread denoises with: the prompt or the negative prompt. thread: the thread's ``_Forward.thread``."""

    text: weakref.ref
    thread: weakref.ref
    run: Callable[[], Any] = lambda: None  # its timesteps
    forwards: int = 0
    step: int = -1
    shape: tuple[int, ...] = ()


class _Thread:
    """Lives as long as a thread does."""


class _Forward(threading.local):
    """What one forward goes by. Each thread has its own: two threads may run one denoiser at the same time.

    Attributes:
        branch: of this forward; None: its cross-attention is its own.
        refreshing: whether the global path runs. in_full: whether it is what runs just now.
        full: the global path's streams: picture, and text where that is one too.
        handed: from the global path's layer to the window path's.
        at: the block that is under way.
        step, run: the last forward's, and its run's timesteps.
    """

    def __init__(self) -> None:
        self.thread = _Thread()
        self.step = -1
        self.run: Callable[[], Any] = lambda: None
        self.at = 0
        self.reset()

    def reset(self) -> None:
        self.branch: _Branch | None = None
        self.refreshing = self.in_full = False
        self.full: tuple[torch.Tensor, ...] | None = None
        self.handed: tuple[torch.Tensor, ...] | None = None


class _Enough(Exception):  # noqa: N818 - no error: the way out of a block that has done its part
    """The global path has given its last cross-attention; nothing after it is used."""


class TwoPaths:
    """The two paths of one patched denoiser. ``two_paths`` puts them on; ``remove()`` takes them off without a trace."""

    def __init__(
        self, patch: Patch, denoiser: nn.Module, refresh: int, global_path: str, guided: str, pool: tuple[int, int],
        cache: CrossAttentionCache,
    ) -> None:  # fmt: skip
        streams = streams_of(denoiser)
        assert streams is not None  # checked before
        self.streams = streams
        self.patch, self.refresh, self.guided = patch, refresh, guided
        self.cache = cache
        self.counts = Counts()
        self.blocks: list[Any] = [block for name in self.streams.blocks for block in getattr(denoiser, name)]
        self._branches: list[_Branch] = []
        self._lock = threading.Lock()  # of branches and counts
        self._forward = _Forward()
        # The last block that asks for anything of the global path.
        self._last = max(patch.state.selected, default=-1) if streams.joint else len(self.blocks) - 1
        self.coarse = None if global_path == "dense" else CoarseGlobalPath(patch, global_path, pool)
        self._handles: list[Any] = []
        try:
            self._install(denoiser)
        except BaseException:
            self.remove()
            raise

    def _install(self, denoiser: nn.Module) -> None:
        self._handles.append(denoiser.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(denoiser.register_forward_hook(self._end, always_call=True))
        if self.streams.joint:
            if self.patch.state.guide is not None:
                raise UnsupportedModelError(f"two paths: {self.patch.name} has two paths already; end those first")
            self.patch.state.guide = self
        for number, block in enumerate(self.blocks):
            if not self.streams.joint:
                cross = override_forward(getattr(block, self.streams.cross), _cross_attention, self)
                if cross is None:
                    raise UnsupportedModelError(
                        f"two paths: the cross-attention of block {number} of {type(denoiser).__name__} has a forward that "
                        "somebody else replaced; take that off first"
                    )
                self._handles.append(cross)
            # First of all hooks: it takes the block's arguments as others' hooks find them, for both paths.
            before = self._block_hook(number)
            self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            if self.coarse is not None:
                attention = override_forward(getattr(block, self.streams.own), _coarse_self_attention, self)
                if attention is None:
                    raise UnsupportedModelError(
                        f"two paths: the self-attention of block {number} has a forward that somebody else replaced"
                    )
                self._handles.append(attention)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.patch.state.guide is self:
            self.patch.state.guide = None
        self._forward = _Forward()  # of every thread
        for branch in self._branches:
            self.cache.drop(branch)
        self._branches.clear()

    # ── a forward ────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if getattr(denoiser, ATTRIBUTE, None) is not self.patch:
            raise TilewiseError(
                f"two paths: {self.patch.name} was patched anew within them; patch first, and then add the global path"
            )
        if self.streams.joint and (between := _between_blocks(denoiser, args, kwargs)):
            raise UnsupportedModelError(
                f"two paths: the forward of {self.patch.name} was given {between}, which changes the picture between blocks, "
                "where the global path would not see it"
            )
        text = args[self.streams.text] if len(args) > self.streams.text else kwargs["encoder_hidden_states"]
        latents = args[0] if args else kwargs["hidden_states"]
        at = self.patch.state.steps.of(self.patch.family.timestep(args, kwargs))
        step, run = at.step, (lambda: None) if at.run is None else weakref.ref(at.run)
        forward = self._forward
        # A scheduler makes its timesteps anew for each run: two clips of one step are two.
        first_in_step = step != forward.step or at.run is not forward.run()
        forward.step, forward.run = step, run
        forward.reset()
        if self.guided == "cond" and not first_in_step:
            self._count("unguided")
            return
        branch = self._branch_of(text)
        # Earlier in the schedule than before, another run or size: a new clip with the same text.
        if step < branch.step or at.run is not branch.run() or branch.shape != tuple(latents.shape):
            branch.forwards, branch.run, branch.shape = 0, run, tuple(latents.shape)
        branch.step = step
        forward.branch = branch
        forward.refreshing = branch.forwards % self.refresh == 0
        branch.forwards += 1
        self._count("refreshed" if forward.refreshing else "reused")
        if not forward.refreshing:
            self._prefetch(branch, 0, latents.device)

    def _end(self, denoiser: nn.Module, args: tuple, output: Any) -> None:
        forward = self._forward
        # It failed: of what it refreshed, some is new and some is old.
        if output is None and forward.branch is not None:
            forward.branch.forwards = 0
        forward.reset()

    def _count(self, what: str) -> None:
        with self._lock:
            setattr(self.counts, what, getattr(self.counts, what) + 1)

    def _branch_of(self, text: torch.Tensor) -> _Branch:
        """This thread's branch of a text, told by the tensor itself: pipelines give the same one at every step."""
        thread = self._forward.thread
        with self._lock:
            for branch in [b for b in self._branches if b.text() is None or b.thread() is None]:
                self._branches.remove(branch)
                self.cache.drop(branch)
            found = next((b for b in self._branches if b.text() is text and b.thread() is thread), None)
            if found is None:
                found = _Branch(weakref.ref(text), weakref.ref(thread))
                self._branches.append(found)
            return found

    def _block_hook(self, number: int) -> Any:
        names = (self.streams.hidden, "encoder_hidden_states")[: 1 + self.streams.joint]

        def before(block: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            forward = self._forward
            forward.at = number
            if not forward.refreshing or forward.in_full or number > self._last:
                return
            if number:
                full, forward.full = forward.full, None
            else:
                full = tuple(args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
            assert full is not None
            named = {name: x for name, x in zip(names, full, strict=True) if name in kwargs}
            args, kwargs = (*full[: len(names) - len(named)], *args[len(names) - len(named) :]), {**kwargs, **named}
            del full, named
            forward.in_full = True
            try:
                with self.patch.state.global_path():
                    out = block(*args, **kwargs)  # with the hooks of others, which change what goes from block to block
                out = out if isinstance(out, tuple) else (out,)
                forward.full = out[::-1] if self.streams.text_first else out
            except _Enough:
                pass
            finally:
                forward.in_full = False

        return before

    def _cross(self, override: ForwardOverride, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        if self._forward.branch is None:
            return override.stock(*args, **kwargs)
        if self._forward.in_full:
            out = override.stock(*args, **kwargs)
            self._hand((out,))
            return out
        hidden = args[0] if args else kwargs["hidden_states"]
        return self._handed_over(hidden.device)[0]

    @property
    def keeps(self) -> bool:
        return self.refresh > 1

    @property
    def _values(self) -> int:
        """Tensors that a global path's layer gives: the cross-attention's output, or the text partial and its log-sum-exp."""
        return 2 if self.streams.joint else 1

    def _hand(self, values: tuple[torch.Tensor, ...]) -> None:
        """From the global path's layer to the window path's, and into the cache."""
        forward = self._forward
        forward.handed = values
        if self.keeps:
            for place, value in enumerate(values):
                self.cache.put((forward.branch, self._values * forward.at + place), value)
        if forward.at == self._last:
            raise _Enough

    def _handed_over(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """What the global path's layer gave, just now or at the last refresh."""
        forward = self._forward
        if forward.refreshing:
            given, forward.handed = forward.handed, None
        else:
            at = self._values * forward.at
            found = [self.cache.get((forward.branch, at + place), device) for place in range(self._values)]
            given = tuple(x for x in found if x is not None)
            self._prefetch(forward.branch, forward.at + 1, device)
        if given is None or len(given) < self._values:
            raise TilewiseError(
                f"two paths: block {forward.at} of {self.patch.name} has no output of the global path; its blocks did not all "
                "run at the last refresh. Step caches that skip blocks cannot be used together with two paths"
            )
        return given

    def _prefetch(self, branch: Any, number: int, device: torch.device) -> None:
        for place in range(self._values if number <= self._last else 0):
            self.cache.prefetch((branch, self._values * number + place), device)

    # ── text in the sequence: what a ``joint_text.TextGuide`` does ───────────────────────────────────────────────

    def keep(self, partial: tuple[torch.Tensor, torch.Tensor]) -> None:
        if self._forward.in_full:
            self._hand(partial)

    def given(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self._forward.branch is None or self._forward.in_full:
            return None
        out, lse = self._handed_over(device)
        return out, lse


def _between_blocks(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str:
    """The argument of a forward that changes what goes from one block to the next, or ""."""
    given = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
    return next((name for name in BETWEEN if given.get(name) is not None), "")


def _cross_attention(override: ForwardOverride, *args: Any, **kwargs: Any) -> torch.Tensor:
    if override.state is None:
        return override.stock(*args, **kwargs)
    return override.state._cross(override, args, kwargs)


def _coarse_self_attention(override: ForwardOverride, *args: Any, **kwargs: Any) -> torch.Tensor:
    if override.state is None:
        return override.stock(*args, **kwargs)
    paths = override.state
    if not paths._forward.in_full:
        return override.stock(*args, **kwargs)
    return paths.coarse.layer(override, args, kwargs)


@contextmanager
def two_paths(
    target: Any,
    *,
    refresh: int = 2,
    global_path: GlobalPath = "dense",
    guided: Guided = "all",
    pool: tuple[int, int] = (2, 2),
    cache_bytes: int | None = None,
    host_bytes: int | None = None,
) -> Iterator[dict[str, TwoPaths]]:
    """``with two_paths(pipe): …``: add the global path to a pipeline that is patched with a window method.

    Args:
        target: a pipeline or denoiser, patched with a window method, "inward" for instance.
        refresh: the global path runs at every so many forwards of a branch; in between its cross-attention is reused. 1: always.
        global_path: how the global path attends to itself. "dense": to every token; the only way where text is part of the
            sequence. "draft": to the quarter of the token pairs that a draft of its own attention map asks for, and one row for
            each block that it leaves out (the method "draft"). "pooled": to the means of small patches.
        guided: which forwards the global path guides. "all", or "cond": the first of each step alone, which in diffusers'
            pipelines is the prompt's, and not the negative prompt's (as the paper's cached code does). Where guidance runs as
            one batch, both are in that first forward.
        pool: patch (h, w) in tokens for "pooled".
        cache_bytes: most bytes of the cache on the device, for each denoiser and all threads that run it; what is over goes to
            pinned host memory. None: no limit.
        host_bytes: most bytes there. None: no limit.

    Yields:
        ``TwoPaths`` by denoiser name, whose ``counts`` say what ran. On exit they are taken off and their caches are freed.

    Raises:
        ConfigError: options that cannot be, a target that is not patched or with a method that leaves all attention dense.
        UnsupportedModelError: another denoiser than those served, or one that is compiled or skips blocks.
        TilewiseError: where another thread is in a forward of a denoiser, on entry or on exit. Threads may run the pipeline
            within the block.
    """
    if not isinstance(refresh, int) or isinstance(refresh, bool) or refresh < 1:
        raise ConfigError(f"two paths: refresh must be a whole number of at least 1, got {refresh!r}")
    for name, value, valid in (
        ("global_path", global_path, ("dense", "draft", "pooled")),
        ("guided", guided, ("all", "cond")),
    ):
        if value not in valid:
            raise ConfigError(f"two paths: {name} must be one of {', '.join(valid)}, got {value!r}")
    if len(pool) != 2 or min(pool) < 1:
        raise ConfigError(f"two paths: pool must be two sizes of at least 1, (h, w) in tokens, got {pool!r}")
    patches = patches_of(target)
    if not patches or not all(patch.sparse for patch in patches.values()):
        raise ConfigError(
            "two paths: patch the target first with a window method, such as tilewise.patch(pipe, 'inward')"
        )
    denoisers = denoisers_of(target)
    check_denoisers(target, {name: patch.config for name, patch in patches.items()}, global_path)
    refuse_while_running("two paths", denoisers)
    on: dict[str, TwoPaths] = {}
    try:
        for name, patch in patches.items():
            cache = CrossAttentionCache(cache_bytes, host_bytes)
            on[name] = TwoPaths(patch, denoisers[name], refresh, global_path, guided, pool, cache)
        yield on
    finally:
        for paths in on.values():
            paths.remove()
        refuse_while_running("two paths were taken off", denoisers)
