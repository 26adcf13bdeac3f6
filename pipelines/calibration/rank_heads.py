"""Which heads to guide by: HeadHunter (arXiv 2506.10978, §3.3), a greedy search over the heads that ``soft-pag`` perturbs.

In each round every head that is left is tried beside those that were chosen before: clips of all prompts are made so and scored,
and the heads with the best mean score are chosen too.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.quality.content_detection import analyse
from tilewise.pipelines.quality.content_score import parse_prompt, score
from tilewise.plugins.additions.soft_pag import SoftPAG
from tilewise.plugins.config import select_blocks
from tilewise.plugins.errors import ConfigError, unknown
from tilewise.plugins.models.common.denoisers import denoisers_of
from tilewise.plugins.models.common.registry import attention_layers
from tilewise.plugins.text_format import counted

Score: TypeAlias = Callable[[NDArray[np.uint8], str], float]
"""A clip's score, the higher the better, from its frames, uint8 (T, H, W, 3), and its prompt."""

LUMA = np.array([0.299, 0.587, 0.114])


def brightness(frames: NDArray[np.uint8], prompt: str) -> float:
    """Mean luma, in [0, 1]."""
    return float((frames @ LUMA).mean() / 255)


def contrast(frames: NDArray[np.uint8], prompt: str) -> float:
    """Standard deviation of the luma within a frame, mean over frames."""
    return float((frames @ LUMA).std(axis=(1, 2)).mean() / 255)


def detector(frames: NDArray[np.uint8], prompt: str) -> float:
    """Share of what a prompt of the demo model's world says that the clip shows."""
    told = [right for right in score(analyse(frames), parse_prompt(prompt)).values() if right is not None]
    return sum(told) / len(told) if told else math.nan


SCORES: Mapping[str, Score] = {"brightness": brightness, "contrast": contrast, "detector": detector}


def score_function(text: str) -> Score:
    """A score by name, or a function of your own as MODULE:FUNCTION or FILE.py:FUNCTION.

    Raises:
        ConfigError: for a name that there is not, or a module or function that cannot be imported.
    """
    if text in SCORES:
        return SCORES[text]
    source, colon, name = text.rpartition(":")
    if not colon or not source or not name:
        raise unknown("score", text, [*SCORES, "FILE.py:FUNCTION"])
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        function = getattr(module, name)
    except (ImportError, OSError, AttributeError, SyntaxError) as error:
        raise ConfigError(f"score: {text} cannot be imported: {error}") from error
    if not callable(function):
        raise ConfigError(f"score: {text} is no function; it is called with frames, uint8 (T, H, W, 3), and the prompt")
    found: Score = function
    return found


def checked(value: Any, name: str) -> float:
    """What a score function returned. Raises ConfigError for anything but a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"score: {name} returned {value!r}, not a finite number")
    return number


@dataclasses.dataclass(frozen=True)
class Round:
    """One round. before: the mean score without the heads that it tries. scores: with each of them, best first."""

    before: float
    scores: dict[str, float]
    chosen: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A finished search. heads: that were chosen, in this order. rounds: what they were chosen by."""

    rounds: tuple[Round, ...]

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(head for one in self.rounds for head in one.chosen)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"heads": list(self.heads), "rounds": [dataclasses.asdict(one) for one in self.rounds]}


def candidates(pipe: Any, blocks: str) -> list[str]:
    """All heads of the chosen blocks of a pipeline's denoiser, as ``soft-pag`` names them. blocks: such as "5:9" or "0,3".

    Raises:
        ConfigError: for several denoisers, or blocks that select none.
    """
    denoisers = denoisers_of(pipe)
    if len(denoisers) != 1:
        raise ConfigError(f"rank-heads serves pipelines with one denoiser, and this one has {', '.join(denoisers)}")
    ((name, denoiser),) = denoisers.items()
    heads = {layer.block: layer.heads for layer in attention_layers(denoiser, name)}
    found = [
        f"{block}.{head}" for block in select_blocks(blocks, max(heads) + 1) for head in range(heads.get(block, 0))
    ]
    if not found:
        raise ConfigError(f"blocks {blocks!r} select none of the {len(heads)} blocks of {name}")
    return found


def with_heads(settings: GenerateSettings, addition: SoftPAG, heads: Sequence[str]) -> GenerateSettings:
    """The settings of a clip that is guided by some heads; none: as they are."""
    if not heads:
        return settings
    add = [*settings.method.additions, dataclasses.replace(addition, heads=tuple(heads))]
    return dataclasses.replace(settings, method=dataclasses.replace(settings.method, add=add))


def tries(heads: int, rounds: int, keep: int) -> int:
    """How many sets of heads a search makes clips with, that of none included.

    Raises:
        ConfigError: for fewer heads than are to be chosen.
    """
    if rounds < 1 or keep < 1 or rounds * keep > heads:
        raise ConfigError(
            f"{counted(rounds, 'round')} that choose {keep} each cannot be: there are {counted(heads, 'head')}"
        )
    joint = rounds - 1 if keep > 1 else 0  # of heads that were chosen at once, and not tried together
    return 1 + joint + sum(heads - keep * number for number in range(rounds))


def rank_heads(
    jobs: Sequence[GenerateSettings],
    make: Callable[[GenerateSettings], float],
    heads: Sequence[str],
    addition: SoftPAG,
    *,
    rounds: int = 1,
    keep: int = 1,
    lowest: bool = False,
    tried: Callable[[int, int], None] = lambda done, total: None,
) -> Ranking:
    """Search among ``heads``.

    Args:
        jobs: a clip each. make: makes one and gives its score. addition: u and scale of the guidance.
        rounds, keep: how many rounds there are, and how many heads each chooses. lowest: the lower a score the better.
        tried: called as tried(done, total) after each set of heads.

    Raises:
        ConfigError: see ``tries``.
    """
    total = tries(len(heads), rounds, keep)
    done = 0

    def mean(chosen: Sequence[str]) -> float:
        nonlocal done
        found = float(np.mean([make(with_heads(settings, addition, chosen)) for settings in jobs]))
        done += 1
        tried(done, total)
        return found

    before, chosen, found = mean(()), tuple[str, ...](), []
    for number in range(rounds):
        scores = {head: mean([*chosen, head]) for head in heads if head not in chosen}
        best = sorted(scores, key=lambda head: scores[head] if lowest else -scores[head])
        found.append(Round(before, {head: scores[head] for head in best}, tuple(best[:keep])))
        chosen += found[-1].chosen
        if number + 1 < rounds:
            before = scores[best[0]] if keep == 1 else mean(chosen)
    return Ranking(tuple(found))
