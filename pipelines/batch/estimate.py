"""Estimate the time and disk space of a batch before it runs, from earlier measurements.

    floating-point operations of one denoiser forward = 2 P S + sum over layers of 4 S^2 D w

P parameters, S tokens (of a layer's own grid, where a denoiser has several), D = heads x head dim, w the share of token pairs
that is computed (1 where dense). Text, normalisation and the VAE are left out: the rate that the count is divided by is that of
whole clips.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tilewise.pipelines.batch.job import Job
from tilewise.pipelines.batch.manifest import spent
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.device import device_name
from tilewise.pipelines.streaming.windows.explain import WindowExplanation
from tilewise.plugins.explain import Explanation
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of
from tilewise.plugins.text_format import counted

BYTES_PER_PIXEL = 0.1  # of H.264 at CRF 16; ours to err on the large side: 0.04 on the bundled model's plain shapes
MATMUL_SHARE = 0.4  # of the speed of a large matrix product that a whole denoiser reaches


@dataclasses.dataclass(frozen=True)
class Estimate:
    """seconds: of all jobs one after another, on one device. bytes: of their files. basis: where the numbers come from."""

    seconds: float
    bytes: float
    basis: str


def denoising_flop(pipe: Any, settings: GenerateSettings, explanation: Explanation) -> float:
    """Operations of all denoising steps. `pipe` may be a skeleton. With several denoisers, steps count as shared equally.

    Steps that a step cache reuses count without what it skips, where `explain` foretells how many those are; spread evenly over
    dense and sparse ones.
    """
    cache = settings.method.step_cache
    dense = sparse = reused = 0.0
    denoisers = denoisers_of(pipe)
    rows = iter(explanation.rows)
    for denoiser in denoisers.values():
        family = family_of(denoiser)
        assert family is not None
        layers = family.layers(denoiser)
        # One row for each size of grid in a denoiser, in the order in which `explain` meets them.
        level = {downsample: next(rows) for downsample in dict.fromkeys(layer.downsample for layer in layers)}
        tokens = max((row.tokens for row in level.values()), default=0)
        linear = 2.0 * sum(weight.numel() for weight in denoiser.parameters()) * tokens
        dense += linear
        sparse += linear
        if cache is not None and cache.skips != "blocks":
            skipped = sum(weight.numel() for layer in layers for weight in layer.module.parameters())
            reused += linear - 2.0 * skipped * tokens
        for layer in layers:
            row = level[layer.downsample]
            full = 4.0 * row.tokens**2 * layer.heads * layer.head_dim
            dense += full
            # A dynamic method knows what it will compute by its density at best, and by a recall not at all: then as dense.
            work = next((share for share in (row.work, row.density) if not math.isnan(share)), 1.0)
            sparse += full * work if layer.block in _chosen(row.sparse_blocks) else full
    dense, sparse, reused = (flop / len(denoisers) for flop in (dense, sparse, reused))
    passes = 2 if settings.guidance > 1 else 1
    computed = dense * explanation.dense_steps + sparse * explanation.sparse_steps
    share = (explanation.reused_steps or 0) / max(1, explanation.dense_steps + explanation.sparse_steps)
    return passes * (computed * (1 - share) + reused * share * (explanation.dense_steps + explanation.sparse_steps))


def windows_flop(pipe: Any, settings: GenerateSettings, explanation: WindowExplanation) -> float:
    """Operations of a stream of windows. settings: of the whole video."""
    more = max(0, settings.frames - explanation.frames)
    return (1 + math.ceil(more / explanation.new)) * denoising_flop(pipe, settings, explanation.window)


def estimate(jobs: Sequence[Job], earlier: Iterable[Mapping[str, Any]], device: torch.device) -> Estimate:
    """Time and disk for jobs on a device of this machine.

    earlier: lines of manifests. Clips made with the same device and dtype give seconds per operation and bytes per pixel;
    without any, a matrix product is timed for a fraction of a second, and the result is rough.
    """
    if not jobs:
        return Estimate(0.0, 0.0, "nothing to make")
    lines = [line for line in earlier if line.get("status") == "done"]
    name = device_name(device)
    dtypes = {job.dtype for job in jobs}
    similar = [line for line in lines if line["run"]["device_name"] == name and line["run"]["dtype"] in dtypes]
    rates = [spent(line, "total") / line["run"]["batch"]["flop"] for line in similar]
    if rates:
        rate = statistics.median(rates)
        basis = f"{counted(len(rates), 'clip')} made here before"
    else:
        rate = 1 / (MATMUL_SHARE * _matmul_speed(device, getattr(torch, min(dtypes))))
        basis = f"no clip made here before: rough, from a matrix product timed on {name}"
    sizes = [line["bytes"] / (line["height"] * line["width"] * line["frames"]) for line in lines]
    per_pixel = statistics.median(sizes) if sizes else BYTES_PER_PIXEL
    pixels = sum(job.settings.frames * sum(height * width for height, width in job.sizes) for job in jobs)
    return Estimate(rate * sum(job.flop for job in jobs), per_pixel * pixels, basis)


def _chosen(ranges: str) -> set[int]:
    """The block numbers of "0-3,5"."""
    chosen: set[int] = set()
    for word in filter(None, ranges.split(",")):
        low, _, high = word.partition("-")
        chosen |= set(range(int(low), int(high or low) + 1))
    return chosen


def _matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, best of a few."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
