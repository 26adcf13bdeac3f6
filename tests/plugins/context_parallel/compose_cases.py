"""Cases of what runs beside context parallelism, or says why not, for ``forked_ranks.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import family_cases_split
import tiny_wan
import torch
import wan_cases

import tilewise
from tilewise.pipelines.calibration.profile import profile_run
from tilewise.plugins.methods.auto import Auto
from tilewise.plugins.methods.calibrated import Calibrated, HeadTable
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.inward import Inward
from tilewise.plugins.methods.published.delta import Delta
from tilewise.plugins.models.common.fingerprint import Fingerprint

SIZE = {"height": 64, "width": 80, "num_frames": 9, "num_inference_steps": 4}
MAG = "mag:num_inference_steps=3:retention_ratio=0:threshold=10:mag_ratios=1,1,1"
BLOCK = "first-block:threshold=1000"
SMALL = tilewise.STA(window=(3, 1, 3), tile=(1, 2, 3))
STA = wan_cases.METHODS["sta"]


def said(target: Any) -> dict[str, Any]:
    found = tilewise.summary(target)
    return {"kinds": sorted({row.kind for row in found.rows}), "calls": found.calls, "text": str(found)}


def clip(split: Any, method: Any = STA, **options: Any) -> tuple[torch.Tensor, Any]:
    """A whole run of a pipeline, with guidance."""
    pipe = tiny_wan.tiny_pipeline(num_attention_heads=4)
    if split:
        split(pipe)
    tilewise.patch(pipe, method, **options)
    out = pipe("a red circle", generator=torch.Generator().manual_seed(0), output_type="latent", **SIZE).frames
    return out, said(pipe)


def auto_of_a_batch(split: Any, heads: int) -> tuple[torch.Tensor, Any]:
    """Two samples, whose budgets are their own, and heads that the ranks do not share evenly; ``auto`` under ``delta``."""
    model = tiny_wan.tiny_transformer(num_attention_heads=heads)
    if split:
        split(model)
    method = Delta(base=Auto(**wan_cases.SELECTING, every=1), every=8)
    tilewise.patch(model, method, steps=(0, 1), strict=True)
    given = wan_cases.inputs((5, 6, 8))
    out = [model(**given | {"timestep": torch.tensor([t, t])}, return_dict=False)[0] for t in (500.0, 400.0)]
    return torch.stack(out), said(model)


def two_denoisers(split: Any) -> tuple[torch.Tensor, Any]:
    pipe = tiny_wan.tiny_pipeline(num_attention_heads=4, boundary_ratio=0.9)
    tilewise.patch(pipe, STA, steps=(0, 1))
    if split:
        split(pipe)
    out = pipe("a red circle", generator=torch.Generator().manual_seed(0), output_type="latent", **SIZE).frames
    return out, said(pipe)


def calibrated(split: Any) -> tuple[torch.Tensor, Any]:
    model = tiny_wan.tiny_transformer(num_attention_heads=4)
    table = HeadTable(Fingerprint.of(model), (("0121", "2210"), ("1012", "0000")))
    base = Draft(tile=(1, 4, 4), min_tokens=0)
    method = Calibrated(base=base, densities=(0.2, 0.5, 1.0), noise=(0.4,), tables=(table,))
    if split:
        split(model)
    tilewise.patch(model, method, steps=(0, 1), strict=True)
    return model(**wan_cases.inputs((5, 6, 8)), return_dict=False)[0], said(model)


def compiled(split: Any) -> tuple[torch.Tensor, Any]:
    model = tiny_wan.tiny_transformer(num_attention_heads=4, num_layers=1)
    tilewise.patch(model, STA, steps=(0, 1), strict=True)
    if split:
        split(model)
    model.compile_repeated_blocks(backend="eager")
    return model(**wan_cases.inputs((5, 6, 8)), return_dict=False)[0], said(model)


def two_paths(split: Any, first: bool = False) -> tuple[torch.Tensor, Any]:
    """Forwards of which every second one reuses the global path. first: it is on before the denoiser is split."""
    model = tiny_wan.tiny_transformer(num_attention_heads=4)
    if split and not first:
        split(model)
    tilewise.patch(model, Inward(native=(4, 4)), steps=(0, 1))
    given = wan_cases.inputs((5, 6, 8))
    with tilewise.two_paths(model, refresh=2) as paths:
        if split and first:
            split(model)
        out = [model(**given | {"timestep": torch.tensor([t, t])}, return_dict=False)[0] for t in (500.0, 400.0, 300.0)]
        counts = paths["denoiser"].counts
        kept = paths["denoiser"].cache.on_device
    return torch.stack(out), said(model) | {"paths": [counts.refreshed, counts.reused], "kept": kept}


def two_paths_pooled(split: Any) -> Any:
    if split:
        model = tilewise.patch(split(tiny_wan.tiny_transformer()), Inward(native=(4, 4)))
        with tilewise.two_paths(model, global_path="pooled"):
            pass


def two_paths_of_joint_text(split: Any) -> Any:
    if split:
        model, _ = family_cases_split.FAMILIES["HunyuanVideo"]()
        with tilewise.two_paths(tilewise.patch(split(model), SMALL)):
            pass


def highres(split: Any, global_path: str = "none") -> tuple[torch.Tensor, Any]:
    pipe = tiny_wan.tiny_pipeline(num_attention_heads=4)
    if split:
        split(pipe)
    made = tilewise.highres(
        pipe, "a red circle", height=80, width=64, native=(64, 64), frames=5, steps=2, global_path=global_path
    )
    summary = made.clip.summary
    kinds = sorted({row.kind for row in summary.rows})
    return torch.from_numpy(made.frames).float(), {"kinds": kinds, "calls": summary.calls, "text": str(summary)}


def caches(
    split: Any, make: Callable[[], tuple[Any, dict[str, Any]]], cache: str, *, first: bool = False
) -> tuple[torch.Tensor, Any]:
    """Three forwards of a denoiser, of which later ones reuse. first: patched before it is split."""
    model, given = make()
    if split and not first:
        split(model)
    tilewise.patch(model, SMALL, steps=(0, 1), min_tokens=0, cache=cache)
    if split and first:
        split(model)
    out = []
    for number in range(3):
        timestep = torch.full_like(given["timestep"], 900 - 100 * number)
        call = {**given, "timestep": timestep, "hidden_states": given["hidden_states"] * (1 + number / 8)}
        out.append(model(**call, return_dict=False)[0])
    found = tilewise.summary(model)
    return torch.stack(out), said(model) | {"skipped": sum(row.skipped for row in found.cache)}


def wan_of_four_blocks() -> tuple[Any, dict[str, Any]]:
    return tiny_wan.tiny_transformer(num_attention_heads=4, num_layers=3), wan_cases.inputs((5, 6, 8))


def threshold_between(split: Any) -> tuple[torch.Tensor, Any]:
    """A threshold between what each rank would decide by its own tokens: 0.29 and 0.89, and 0.59 by all."""
    model, given = wan_of_four_blocks()
    if split:
        split(model)
    tilewise.patch(model, SMALL, steps=(0, 1), min_tokens=0, cache="first-block:threshold=0.75")
    hidden = given["hidden_states"].clone()
    out = [model(**given, return_dict=False)[0]]
    hidden[:, :, 3:] *= -1
    later = {**given, "hidden_states": hidden, "timestep": given["timestep"] - 100}
    out.append(model(**later, return_dict=False)[0])
    return torch.stack(out), said(model) | {"skipped": sum(row.skipped for row in tilewise.summary(model).cache)}


def with_measuring_cache(split: Any) -> Any:
    if split:
        tilewise.patch(split(tiny_wan.tiny_transformer()), STA, cache="mag:calibrate=true:num_inference_steps=4")


def with_measuring_cache_before(split: Any) -> Any:
    if split:
        model = tilewise.patch(tiny_wan.tiny_transformer(), STA, cache="mag:calibrate=true:num_inference_steps=4")
        split(model)(**wan_cases.inputs((5, 6, 8)))


def with_sea_cache(split: Any) -> Any:
    if split:
        tilewise.patch(split(tiny_wan.tiny_transformer()), STA, cache="sea")


def stream(split: Any) -> Any:
    if split:
        tilewise.stream(split(tiny_wan.tiny_pipeline()), "a red circle")


def calibrate(split: Any) -> Any:
    if split:
        profile_run(split(tiny_wan.tiny_pipeline()), None, Draft(), (0.5,), None)  # type: ignore[arg-type]


def cases() -> dict[str, Callable[..., Any]]:
    runs: dict[str, Any] = {
        "a clip": clip,
        "two denoisers": two_denoisers,
        "calibrated": calibrated,
        "compiled": compiled,
        "highres": highres,
        "highres, global path": functools.partial(highres, global_path="dense"),
        "two paths": two_paths,
        "two paths, split within": functools.partial(two_paths, first=True),
        "cache pab": functools.partial(clip, cache="pab"),
        "cache taylor": functools.partial(clip, cache="taylor"),
        "cache mag": functools.partial(caches, make=wan_of_four_blocks, cache=MAG),
        "cache mag, patched first": functools.partial(caches, make=wan_of_four_blocks, cache=MAG, first=True),
        "cache first-block": functools.partial(caches, make=wan_of_four_blocks, cache=BLOCK),
        "cache first-block, patched first": functools.partial(caches, make=wan_of_four_blocks, cache=BLOCK, first=True),
        "cache first-block, threshold between ranks": threshold_between,
        **{
            f"cache first-block, {name}": functools.partial(caches, make=family_cases_split.FAMILIES[name], cache=BLOCK)
            for name in ("CogVideoX", "LTX-Video")
        },
        "auto": functools.partial(clip, method=Auto(**wan_cases.SELECTING, every=2), steps=(0, 1)),
        "auto, uneven heads": functools.partial(auto_of_a_batch, heads=5),
        "draft of several steps": functools.partial(
            clip, method=Draft(**wan_cases.SELECTING, refresh=2, drift=None), steps=(0, 1)
        ),
    }
    refused: dict[str, Any] = {
        f"error: {run.__name__}": run
        for run in (
            with_sea_cache,
            with_measuring_cache,
            with_measuring_cache_before,
            two_paths_pooled,
            two_paths_of_joint_text,
            stream,
            calibrate,
        )
    }
    for run in [*runs.values(), *refused.values()]:
        run.ranks = (2,)
    return runs | refused
