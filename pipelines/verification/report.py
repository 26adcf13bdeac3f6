"""The report of a verification: JSON that can be sent to others, and the check of one that was sent in."""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tilewise import __version__
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError

FORMAT = 1
METRICS = ("psnr", "ssim", "temporal", "lpips")
PHASES = ("denoise", "total")
RANGES = {"psnr": (0.0, math.inf), "ssim": (-1.0, 1.0), "temporal": (0.0, 510.0), "lpips": (0.0, math.inf)}


def make_report(
    settings: GenerateSettings, revision: str | None, machine: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """JSON values only.

    settings: of any of the pairs; prompt and seed are each pair's. revision: of the model, None where it is not known.
    """
    common = settings.to_dict()
    for name in ("prompt", "negative", "seed", "tilewise", "model", "method"):
        common.pop(name)
    return {
        "format": FORMAT,
        "tilewise": __version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": {"name": settings.model, "revision": revision},
        "method": settings.method.to_dict(),
        "settings": common,
        "machine": dict(machine),
        "summary": summarise(pairs),
        "pairs": [dict(pair) for pair in pairs],
    }


def summarise(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation, least and most of each measure over the pairs that have it, and of the speed-ups.

    A speed-up is the seconds of the dense clip ÷ those of the sparse one. "shown": of what the prompts say, the share that a
    detector found, for models that it knows.
    """
    found: dict[str, Any] = {"pairs": len(pairs), "identical": sum(pair["psnr"] is None for pair in pairs)}
    for name in METRICS:
        found[name] = _spread([pair[name] for pair in pairs if pair[name] is not None])
    for phase in PHASES:
        found[f"speedup_{phase}"] = _spread([speedup(pair, phase) for pair in pairs])
    for name in ("density", "cost"):
        found[name] = _spread([pair[name] for pair in pairs])
    found["fallbacks"] = sum(sum(pair["fallbacks"].values()) for pair in pairs)
    for which in ("dense", "sparse"):
        verdicts = [value for pair in pairs for value in (pair["content"][which] or {}).values() if value is not None]
        found[f"shown_{which}"] = sum(verdicts) / len(verdicts) if verdicts else None
    return found


def speedup(pair: Mapping[str, Any], phase: str) -> float:
    """Seconds of the dense clip ÷ those of the sparse one, in "denoise" or "total"."""
    return float(pair["seconds"]["dense"][phase] / max(pair["seconds"]["sparse"][phase], 1e-9))


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "n": len(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
    }


def check_report(report: Any) -> None:
    """Refuse what is no report, or one whose figures do not belong together: its summary is computed again from its pairs.

    Raises:
        ConfigError: with everything that is wrong. What was measured cannot be checked without the model.
    """
    wrong = _wrong(report)
    if wrong:
        raise ConfigError("this is no report of tilewise verify:\n" + "\n".join(f"  {one}" for one in wrong[:20]))


def _wrong(report: Any) -> list[str]:
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        return [f"it has no format {FORMAT}"]
    kinds = {"tilewise": str, "date": str, "model": dict, "method": dict, "settings": dict, "machine": dict}
    wrong = [f"{name} is missing" for name, kind in kinds.items() if not isinstance(report.get(name), kind)]
    if isinstance(sizes := report.get("settings"), dict):
        sizes_given = ("height", "width", "frames", "steps")
        wrong += [
            f"settings: {name} is no whole number" for name in sizes_given if not isinstance(sizes.get(name), int)
        ]
    pairs = report.get("pairs")
    if not isinstance(pairs, list) or not pairs:
        return [*wrong, "there are no pairs"]
    for number, pair in enumerate(pairs, 1):
        wrong += [f"pair {number}: {text}" for text in _wrong_pair(pair)]
    if wrong:
        return wrong
    try:
        Config.from_dict(report["method"])
    except ConfigError as error:
        wrong.append(f"method: {error}")
    told = [(pair["prompt"], pair["negative"], pair["seed"]) for pair in pairs]
    if len(set(told)) < len(told):
        wrong.append("a prompt and seed are there twice")
    wrong += _unequal("summary", report.get("summary"), summarise(pairs))
    return wrong


def _wrong_pair(pair: Any) -> list[str]:
    if not isinstance(pair, dict):
        return ["is no object"]
    wrong = [f"{name} is no text" for name in ("prompt", "negative") if not isinstance(pair.get(name), str)]
    if not isinstance(pair.get("seed"), int):
        wrong.append("seed is no whole number")
    wrong += [
        f"{name} is no number in its range"
        for name in METRICS
        if name not in pair or not (pair[name] is None or _within(pair[name], *RANGES[name]))
    ]
    wrong += [
        f"{name} is no number of at least 0"
        for name in ("density", "cost")
        if not _within(pair.get(name), 0.0, math.inf)
    ]
    seconds = pair.get("seconds")
    for which in ("dense", "sparse"):
        clip = seconds.get(which) if isinstance(seconds, dict) else None
        if not isinstance(clip, dict) or not all(_within(clip.get(phase), 0.0, math.inf) for phase in PHASES):
            wrong.append(f"the seconds of the {which} clip are missing")
    if not isinstance(pair.get("fallbacks"), dict) or not all(isinstance(n, int) for n in pair["fallbacks"].values()):
        wrong.append("fallbacks are missing")
    content = pair.get("content")
    if not isinstance(content, dict) or not all(isinstance(content.get(w), dict | None) for w in ("dense", "sparse")):
        wrong.append("content is missing")
    return wrong


def _within(value: Any, low: float, high: float) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
    )


def _unequal(name: str, told: Any, found: Any) -> list[str]:
    """Where two trees of numbers differ."""
    if isinstance(found, dict):
        if not isinstance(told, dict) or set(told) != set(found):
            return [f"{name} does not have the entries {', '.join(sorted(found))}"]
        return [text for key in found for text in _unequal(f"{name}.{key}", told[key], found[key])]
    if found is None or told is None:
        return [] if told is found else [f"{name} is {told}, and the pairs give {found}"]
    if not isinstance(told, int | float) or not math.isclose(told, found, rel_tol=1e-6, abs_tol=1e-9):
        return [f"{name} is {told}, and the pairs give {found:g}"]
    return []
