"""Cases of CFG parallelism for ``forked_ranks.py``: two processes with a branch of guidance each, and four, where
two share a branch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import compose_cases
import every_family
import family_cases_split
import test_hunyuan_video15
import test_ltx
import test_qwen_image
import test_unet
import tiny_wan
import torch
import torch.distributed as dist
import wan_cases
from diffusers import LTXPipeline

import tilewise
from benchmarks import context_parallel
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.sta import STA

MAG = "mag:mag_ratios=1,1,1,1,1,1,1,1"
DRAFT = Draft(**wan_cases.SELECTING)
SMALL = STA(window=(3, 1, 3), tile=(1, 2, 3))
CIRCLE = {"prompt": "a red circle", "output_type": "latent", **compose_cases.SIZE}


def said(target: Any, calls: Any) -> dict[str, Any]:
    return compose_cases.said(target) | {
        "seen": [(call.step, call.branch) for call in calls],
        "reused": sum(row.reused for row in tilewise.summary(target).cache),
    }


def clip(
    split: Any, method: Any, *, first: bool = False, options: dict[str, Any] | None = None, **build: Any
) -> tuple[torch.Tensor, Any]:
    """A whole run of a pipeline that calls its denoiser twice a step. first: patched before it is split."""
    pipe = tiny_wan.tiny_pipeline(num_attention_heads=4, **build)
    if split and not first:
        split(pipe)
    tilewise.patch(pipe, method, **(options or {}))
    if split and first:
        split(pipe)
    with tilewise.watch(pipe, layers=[0]) as calls:
        out = pipe(generator=torch.Generator().manual_seed(0), **CIRCLE).frames
    return out, said(pipe, calls)


def highres(split: Any) -> tuple[torch.Tensor, Any]:
    """With the global path, which one branch alone has."""
    pipe = tiny_wan.tiny_pipeline(num_attention_heads=4)
    if split:
        split(pipe)
    size = {"height": 80, "width": 64, "native": (64, 64), "frames": 5, "steps": 4}
    made = tilewise.highres(pipe, "a red circle", **size)
    kinds = sorted({row.kind for row in made.clip.summary.rows})
    return torch.from_numpy(made.frames).float(), {"kinds": kinds, "calls": made.clip.summary.calls}


def unpatched(split: Any) -> tuple[torch.Tensor, Any]:
    pipe = tiny_wan.tiny_pipeline(num_attention_heads=4)
    if split:
        split(pipe)
    out = [pipe(generator=torch.Generator().manual_seed(seed), **CIRCLE).frames for seed in (0, 1)]
    return torch.cat(out), None


def pipeline(split: Any, make: Callable[[], Any], run: Callable[[Any], torch.Tensor]) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(0)  # of the biases that a builder leaves as they are drawn
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    if split:
        split(pipe)
    tilewise.patch(pipe, SMALL, min_tokens=0)
    with tilewise.watch(pipe, layers=[0]) as calls:
        out = run(pipe)
    return out, said(pipe, calls)


def qwen_image(pipe: Any) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    text, width = test_qwen_image.TEXT, test_qwen_image.TEXT_DIM
    return pipe(
        prompt_embeds=torch.randn(2, text, width, generator=noise), prompt_embeds_mask=test_qwen_image.PADDED.long(),
        negative_prompt_embeds=torch.randn(2, 3, width, generator=noise),
        negative_prompt_embeds_mask=torch.ones(2, 3, dtype=torch.long), true_cfg_scale=3.0, height=144, width=176,
        num_inference_steps=2, generator=noise, output_type="latent",
    ).images  # fmt: skip


def ltx(pipe: Any) -> torch.Tensor:
    noise, mask = torch.Generator().manual_seed(0), torch.ones(1, test_ltx.TEXT)
    embeds = {name: torch.randn(1, test_ltx.TEXT, 16, generator=noise) for name in ("prompt", "negative_prompt")}
    return pipe(
        **{f"{name}_embeds": value for name, value in embeds.items()}, prompt_attention_mask=mask,
        negative_prompt_attention_mask=mask, height=96, width=96, num_frames=17, num_inference_steps=2, generator=noise,
        output_type="latent",
    ).frames  # fmt: skip


def unet(kind: str) -> tuple[Any, dict[str, Any]]:
    """Of two samples: the second has other noise and another prompt. AnimateDiff's prompts have a row for each frame."""
    torch.manual_seed(0)
    given = test_unet.inputs_of(kind, 12, 10)
    if len(given["sample"]) == 1:
        whole = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.ndim}
        given |= {name: torch.cat([value, value if "ids" in name else -value]) for name, value in whole.items()}
    return test_unet.KINDS[kind](), given


def batched(
    split: Any, make: Callable[[], tuple[Any, dict[str, Any]]], method: Any = SMALL
) -> tuple[torch.Tensor, Any]:
    """Two forwards of a denoiser whose pipelines have both branches in a batch."""
    model, given = make()
    if split:
        split(model)
    tilewise.patch(model, method, steps=(0, 1), min_tokens=0)
    out = torch.stack([every_family.run(model, given) for _ in range(2)])
    return out, compose_cases.said(model)


def of_family(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    case = every_family.CASES[name]
    model = case.make()
    return model, case.inputs(model)


def benchmark(split: Any) -> Any:
    """A row of ``benchmarks.context_parallel``, over the processes that are there."""

    class Joined(context_parallel.Ranks):
        def __init__(self) -> None:
            self.device = torch.device("cpu")
            self.rank, self.count = dist.get_rank(), dist.get_world_size()

    if split:
        work = next(work for work in context_parallel.TINY if work.guided)
        return None, context_parallel.run_work(work, Joined(), 1, "dense|STA")
    return None


def guidance_off(split: Any) -> Any:
    if split:
        split(pipe := tiny_wan.tiny_pipeline())
        pipe(guidance_scale=1.0, **CIRCLE)


def odd_batch(split: Any) -> Any:
    if split:
        model, given = family_cases_split.FAMILIES["CogVideoX"]()
        given = {name: value[:1] if name != "image_rotary_emb" else value for name, value in given.items()}
        every_family.run(split(model), given)


def drift(split: Any) -> Any:
    if split:
        model, given = family_cases_split.FAMILIES["LTX-Video"]()
        method = Draft(density=0.5, tile=(1, 2, 2), min_tokens=0, refresh=2)
        every_family.run(tilewise.patch(split(model), method, steps=(0, 1), strict=True), given)


def cfg_twice(split: Any) -> Any:
    if split:
        split(split(tiny_wan.tiny_transformer()))


def cfg_after_a_cache(split: Any) -> Any:
    if split:
        split(tilewise.patch(tiny_wan.tiny_pipeline(), SMALL, cache="sea"))


def cfg_stream(split: Any) -> Any:
    if split:
        tilewise.stream(split(tiny_wan.tiny_pipeline()), "a red circle")


BATCHED = ("CogVideoX 1.5", "Mochi", "Allegro", "EasyAnimate", "SD 3", "Z-Image", "LTX-2")
PIPELINES: dict[str, Any] = {
    "Qwen-Image": functools.partial(pipeline, make=test_qwen_image.pipeline, run=qwen_image),
    "HunyuanVideo 1.5": functools.partial(
        pipeline, make=test_hunyuan_video15.pipeline, run=test_hunyuan_video15.generate
    ),
    "LTX-Video": functools.partial(pipeline, make=lambda: test_ltx.pipeline(LTXPipeline), run=ltx),
}


def cases() -> dict[str, Callable[..., Any]]:
    sta = wan_cases.METHODS["sta"]
    reusing = Draft(**wan_cases.SELECTING, refresh=2)
    runs: dict[str, Any] = {
        "clip": functools.partial(clip, method=sta, first=True),
        "dense clip": functools.partial(clip, method="dense"),
        "draft of several steps": functools.partial(clip, method=reusing, options={"steps": (0, 1)}),
        "two denoisers": functools.partial(clip, method=DRAFT, boundary_ratio=0.9),
        **{
            f"cache {name}": functools.partial(clip, method=sta, options={"cache": name})
            for name in (
                "pab",
                "taylor:cache_interval=2:disable_cache_before_step=1",
                "first-block:threshold=1000",
                MAG,
            )
        },
        "unpatched": unpatched,
        "highres": highres,
        **{f"pipeline, {name}": run for name, run in PIPELINES.items()},
        **{f"batch, {name}": functools.partial(batched, make=functools.partial(of_family, name)) for name in BATCHED},
        "batch, cache": functools.partial(
            compose_cases.caches, make=family_cases_split.FAMILIES["LTX-Video"], cache="first-block:threshold=1000"
        ),
        **{
            f"batch, UNet {name}": functools.partial(batched, make=functools.partial(unet, name))
            for name in test_unet.KINDS
        },
    }
    found = {f"CFG {name}": run for name, run in runs.items()}
    for run in found.values():
        run.ranks = (2,)
    for name, run in (
        ("CFG clip of halves", functools.partial(clip, method=DRAFT)),
        ("CFG batch of halves", functools.partial(batched, make=family_cases_split.FAMILIES["LTX-Video"])),
    ):
        run.ranks = (4,)  # type: ignore[attr-defined]
        found[name] = run
    for run in (guidance_off, odd_batch, drift, cfg_twice, cfg_after_a_cache, cfg_stream, benchmark):
        run.ranks = (2,)  # type: ignore[attr-defined]
        found[f"{'row' if run is benchmark else 'error'}: {run.__name__}"] = run
    for run in found.values():
        run.cfg = True
    return found
