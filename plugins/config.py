"""What to run, where, and when: ``Config`` joins a method with its schedule. Presets (``presets.py``) are named configs."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from tilewise.kernels.attention.dispatch_8bit import VALUES as PRECISIONS
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.additions.base import Addition, AddLike, additions
from tilewise.plugins.errors import ConfigError, unknown
from tilewise.plugins.methods.base import DynamicMethod, Method, make_method, methods
from tilewise.plugins.methods.option_text import option_types, parse_value
from tilewise.plugins.presets import PRESETS
from tilewise.plugins.schedule.steps import Steps, checked_steps, runs_at
from tilewise.plugins.step_caches.options import CacheLike, StepCache, step_cache
from tilewise.plugins.tuning.in_use import least_tokens

DEFAULT_STEPS = (0.25, 1.0)
DEFAULT_BLOCKS = ":"
MOST_BLOCKS = 1000  # characters: models have tens of blocks
# Tokens of a feature map below which reordering and the launches cost more than sparse attention saves (SDXL at
# 1024² has 4096 in its largest).
MIN_MAP_TOKENS = 4096


# Options that every method has (dense has DENSE_OPTIONS), as command lines call them; ``steps`` is the number of denoising steps
# there.
SHARED_OPTIONS: Mapping[str, Any] = {
    "steps_sparse": tuple[float, float] | str,
    "blocks": str,
    "strict": bool,
    "fuse": bool,
    "precision": str | None,
    "dense_precision": str | None,
    "min_tokens": int | None,
    "vae": bool,
    "cache": str | None,
    "add": str | None,
    "keep": str | None,
}
KEEP: Mapping[str, tuple[int, int]] = {"condition": (1, 0), "ends": (1, 1)}
"""What ``keep`` names: how many latent frames at the begin and at the end of a clip."""
DENSE_OPTIONS = ("cache", "add")  # those that dense has too


def option_words(method: Method) -> str:
    """The options of a method, for messages."""
    if method.name == "dense":
        return f"Its only ones are {' and '.join(DENSE_OPTIONS)}: attention is dense at every step and in every block"
    own = option_types(type(method))
    shared = [name for name in SHARED_OPTIONS if name not in own]
    return f"Its options: {', '.join(own)}; of every sparse method: {', '.join(shared)}"


def select_blocks(text: str, count: int) -> list[int]:
    """The block numbers that a ``blocks`` text selects among ``count``, in order. Numbers out of range select nothing.

    Raises:
        ConfigError: if the text cannot be read.
    """
    chosen: set[int] = set()
    for item in str(text).split(","):
        try:
            parts = [int(p) if p.strip() else None for p in item.split(":")]
            if len(parts) > 3 or (len(parts) == 1 and parts[0] is None):
                raise ValueError
            if len(parts) == 1:
                assert parts[0] is not None
                chosen |= {parts[0] % count} if -count <= parts[0] < count else set()
            else:
                chosen |= set(range(count)[slice(*parts)])
        except ValueError as error:
            raise ConfigError(
                f"blocks: cannot read {text!r}; use slices and numbers such as ':', '2:', ':-1' or '0,3:9'"
            ) from error
    return sorted(chosen)


@dataclass(frozen=True)
class Config:
    """A method and where it runs.

    Args:
        method: the method with its options.
        steps: (from, to) as fractions of the denoising schedule; outside it attention is dense. Step i of n runs the method
            if from ≤ i/n < to. Or a slice of step numbers: "1:" leaves the first step dense, however many there are. The first
            steps settle the layout of the clip and are best left dense.
        blocks: which transformer blocks run it: a Python slice, index, or comma-separated list of them ("2:", ":-1", "0,3:9").
        strict: raise ``FallbackError`` where an attention call cannot run the method, instead of running it dense and saying so.
        fuse: run norms, rotary embedding, modulation and gates in exact fused kernels, where the model's family has them, on a
            GPU that Triton serves and under ``torch.no_grad()``; and, on a Hopper GPU, the attention that stays dense in our
            kernel if no other diffusers backend was chosen. False: the stock code.
        precision: "int8" or "fp8": the method's attention calls with 8-bit products, for head dimensions 64 and 128, on GPUs of
            compute capability 8.0 or later ("fp8": 8.9) (dispatch_8bit.py). About 2 % ("int8") and 3.6 % ("fp8") relative error
            of a call on unit-variance inputs. Calls that cannot run so run in 16 bits, and ``summary`` says why. None: the
            model's own 16 bits.
        dense_precision: the same for the self-attention of steps and layers that the method leaves dense, on a Hopper GPU. Calls
            that cannot run so run in 16 bits, with the reason, with ``strict`` too: they are dense as they should be.
        min_tokens: attention calls over fewer tokens stay dense, and ``summary`` counts them as "short". None: 4096 for layers
            with a feature map of their own (UNets; with ``strict``, such a layer is an error until a number is given), no limit
            for others; or what ``tilewise tune`` measured on this machine. Dynamic methods have one of their own beside it.
        vae: a pipeline's ``AutoencoderKLWan`` decodes and encodes in exact fused kernels too, on a GPU that Triton serves and
            under ``torch.no_grad()``. False: it stays stock.
        cache: a step cache of diffusers that runs beside the method, dense included: "first-block", "taylor", "mag", "sea" or
            "pab", the same with options as in "first-block:threshold=0.1", or an object with "name" and options
            (step_caches/options.py). None, or "none": none.
        add: what else is put on the denoiser with the patch (additions/): a name such as "raunet", with options as in
            "broadway:alpha=0.6", several joined by " + ", an object with "name" and options, or a list of them. None: nothing.
        keep: latent frames that see all and that all see, whatever the method selects: "condition", the first one, which an
            image-to-video model is given; "ends", the first and the last one. They are handled as text in the same sequence is.
            Reference images that are part of the sequence are kept in any case. None: the method's selection alone.

    Raises:
        ConfigError: for a range that is not 0 ≤ from ≤ to ≤ 1, or a text that cannot be read.
    """

    method: Method
    steps: Steps = DEFAULT_STEPS
    blocks: str = DEFAULT_BLOCKS
    strict: bool = False
    fuse: bool = True
    precision: str | None = None
    min_tokens: int | None = None
    vae: bool = True
    cache: CacheLike | None = None
    keep: str | None = None
    add: AddLike | None = None
    dense_precision: str | None = None

    def __post_init__(self) -> None:
        steps = checked_steps(self.steps)
        if not isinstance(self.blocks, str) or not isinstance(self.strict, bool):
            raise ConfigError(
                f"blocks must be a string and strict true or false, got {self.blocks!r} and {self.strict!r}"
            )
        for name in ("fuse", "vae"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if len(self.blocks) > MOST_BLOCKS:
            raise ConfigError(
                f"blocks has {len(self.blocks):,} characters, at most {MOST_BLOCKS:,} are taken; write ranges such as 0:40, not "
                "each number"
            )
        for name in ("precision", "dense_precision"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or value not in PRECISIONS):
                raise unknown(name, value, PRECISIONS)
        least = self.min_tokens
        if least is not None and (isinstance(least, bool) or not isinstance(least, int) or least < 0):
            raise ConfigError(f"min_tokens must be a whole number of at least 0, got {least!r}")
        if self.keep is not None and (not isinstance(self.keep, str) or self.keep not in KEEP):
            raise unknown("keep", self.keep, KEEP)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "cache", step_cache(self.cache))
        object.__setattr__(self, "add", additions(self.add) or None)
        select_blocks(self.blocks, 1)

    def runs_at(self, step: int, total: int) -> bool:
        """Whether the method runs at step ``step`` of ``total``, counted from 0."""
        return runs_at(self.steps, step, total)

    @property
    def precision_of_dense(self) -> str | None:
        """The 8-bit precision of attention that stays dense; of all attention where the method itself is "dense"."""
        return self.dense_precision or (self.precision if self.method.name == "dense" else None)

    def too_few(self, tokens: int, own_map: bool, device: torch.device | None = None) -> str | None:
        """Why an attention call over so many tokens stays dense, or None. own_map: over a feature map, not the
        denoiser's token sequence. device: where it runs, for what was tuned there; None: without."""
        least, tuned = self.min_tokens, ""
        # A dynamic method asks for itself (``DynamicMethod.stays_dense``): it may have a limit of its own.
        if least is None and device is not None and not isinstance(self.method, DynamicMethod):
            least = least_tokens(self.method.name, device)
            tuned = "" if least is None else ", as tuned here"
        if least is None:
            least = MIN_MAP_TOKENS if own_map else 0
        return f"{tokens} tokens, fewer than min_tokens={least}{tuned}" if tokens < least else None

    def kept(self, grid: Grid) -> Grid:
        """The grid that the method selects in: without the latent frames of ``keep``, whose tokens count as text at its side.

        As it is, where no other frame would be left.
        """
        first, last = KEEP[self.keep] if self.keep is not None else (0, 0)
        if first + last == 0 or grid.t <= first + last:
            return grid
        frame = grid.h * grid.w
        before = grid.video_start + first * frame
        after = grid.text - grid.video_start + last * frame
        text_first = grid.text_first or not grid.text  # most of these tokens stand before
        opposite = after if text_first else before
        return Grid(grid.t - first - last, grid.h, grid.w, before + after, text_first, opposite)

    @property
    def is_stock(self) -> bool:
        """Whether nothing but exact attention is asked for: the method is dense, with no step cache and no addition."""
        beside = (self.cache, self.add, self.precision_of_dense)
        return self.method.name == "dense" and all(one is None for one in beside)

    @property
    def label(self) -> str:
        """The method, and the step cache and additions if there are any, in a few words."""
        cache = () if self.step_cache is None else (self.step_cache.name,)
        return " + ".join([self.method.name, *cache, *(one.name for one in self.additions)])

    @property
    def step_cache(self) -> StepCache | None:
        """``cache`` as it was read."""
        return step_cache(self.cache)

    @property
    def additions(self) -> tuple[Addition, ...]:
        """``add`` as it was read."""
        return additions(self.add)

    @property
    def option_types(self) -> Mapping[str, Any]:
        """Name → type of the options that `with_options` takes."""
        own = option_types(type(self.method))
        if self.method.name == "dense":
            return {**own, **{name: SHARED_OPTIONS[name] for name in DENSE_OPTIONS}}
        return {**SHARED_OPTIONS, **own}

    def with_options(self, options: Mapping[str, Any]) -> Config:
        """This config with other options: its method's, and SHARED_OPTIONS where the method has none of that name.

        What excludes an option that is given, as a density does a window, goes back to its default.

        options: by name. Text is read by the option's type, as on a command line; other values are taken as they are.

        Raises:
            ConfigError: for an option that there is not, with those that there are, or a value that cannot be.
        """
        own, kinds = option_types(type(self.method)), self.option_types
        given: dict[str, Any] = {}
        for name, value in options.items():
            if name not in kinds:
                raise ConfigError(f"method {self.method.name!r} has no option {name!r}. {option_words(self.method)}")
            given[name] = (
                parse_value(f"{name} of {self.method.name}", value, kinds[name]) if isinstance(value, str) else value
            )
        changed = {name: given.pop(name) for name in list(given) if name not in own}
        if "steps_sparse" in changed:
            changed["steps"] = changed.pop("steps_sparse")
        for group in self.method.exclusive:
            if any(given.get(name) is not None for name in group):
                given |= {name: None for name in group if name not in given}
        return dataclasses.replace(self, method=dataclasses.replace(self.method, **given), **changed)

    def prepare(self, target: Any, denoiser: nn.Module) -> Config:
        """This config, with what its method and additions need to know about ``denoiser`` filled in; see ``Method.prepare``."""
        add = [one.prepare(target, denoiser) for one in self.additions]
        return dataclasses.replace(self, method=self.method.prepare(target, denoiser), add=add)

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method.to_dict(),
            "steps": self.steps if isinstance(self.steps, str) else list(self.steps),
            "blocks": self.blocks,
            "strict": self.strict,
            "fuse": self.fuse,
            "precision": self.precision,
            "min_tokens": self.min_tokens,
            "vae": self.vae,
            **({} if self.step_cache is None else {"cache": self.step_cache.to_dict()}),
            **({} if self.keep is None else {"keep": self.keep}),
            **({} if self.dense_precision is None else {"dense_precision": self.dense_precision}),
            **({} if self.add is None else {"add": [one.to_dict() for one in self.additions]}),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Config:
        """A config from a dictionary as ``to_dict`` returns it. ``method`` may be just a name.

        Raises:
            ConfigError: for unknown keys or values.
        """
        if not isinstance(data, Mapping) or "method" not in data:
            raise ConfigError("a config is a JSON object with the key 'method'")
        valid = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in valid:
                raise unknown("config key", key, valid)
        method = data["method"]
        if isinstance(method, str):
            method = {"name": method}
        if not isinstance(method, dict) or not isinstance(method.get("name"), str):
            raise ConfigError(f"config: method must be a name, or an object with the key 'name', got {method!r}")
        options = {key: value for key, value in method.items() if key != "name"}
        rest = {key: value for key, value in data.items() if key != "method"}
        return cls(make_method(method["name"], options), **rest)


MethodLike: TypeAlias = str | Method | Config


def presets() -> dict[str, Config]:
    """Named configs, of each method from most faithful to fastest."""
    return {name: Config.from_dict(data) for name, data in PRESETS.items()}


def resolve(
    method: MethodLike,
    *,
    steps: Steps | None = None,
    blocks: str | None = None,
    strict: bool | None = None,
    fuse: bool | None = None,
    precision: str | None = None,
    min_tokens: int | None = None,
    vae: bool | None = None,
    cache: CacheLike | None = None,
    keep: str | None = None,
    add: AddLike | None = None,
    dense_precision: str | None = None,
) -> Config:
    """The config for a method name, preset name, ``.json`` file, method object or config, with the given options on top.

    Raises:
        ConfigError: unknown name, or an option that cannot be.
        OSError: if the file cannot be read.
    """
    if isinstance(method, Config):
        config = method
    elif isinstance(method, Method):
        config = Config(method)
    elif isinstance(method, str):
        if method in PRESETS:
            config = Config.from_dict(PRESETS[method])
        elif method in methods():
            config = Config(make_method(method))
        elif method.lower().endswith(".json"):
            config = load_config(method)
        else:
            raise unknown("method or preset", method, [*methods(), *PRESETS])
    else:
        raise ConfigError(f"method must be a name, a preset, a method object or a Config, got {type(method).__name__}")
    given: dict[str, Any] = {
        "steps": steps, "blocks": blocks, "strict": strict, "fuse": fuse, "precision": precision,
        "min_tokens": min_tokens, "vae": vae, "cache": cache, "keep": keep, "add": add,
        "dense_precision": dense_precision,
    }  # fmt: skip
    return dataclasses.replace(config, **{key: value for key, value in given.items() if value is not None})


def save_config(config: MethodLike, path: str | os.PathLike[str]) -> None:
    """Write a config as JSON, atomically: the file is complete or unchanged."""
    path = Path(path)
    text = json.dumps(resolve(config).to_dict(), indent=2) + "\n"
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # after the rename there is none left


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read a config file, written by ``save_config`` or by hand.

    Raises:
        ConfigError: not JSON, or keys or values that cannot be, with the file's name.
        OSError: if the file cannot be read.
    """
    try:
        return Config.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON file: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
