"""Cases of the web page's jobs, made by several processes, for ``forked_ranks.py``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.parallel.ranks import Ranks
from tilewise.pipelines.parallel.world import World
from tilewise.plugins.config import resolve
from tilewise.plugins.methods.draft import Draft
from tilewise.ui.web.common.safety import RefusedError
from tilewise.ui.web.jobs.clips import Studio
from tilewise.ui.web.jobs.fit import check_fits
from tilewise.ui.web.jobs.job import Job
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.jobs.shared_clips import SharedClips

DRAFT = resolve(Draft(min_tokens=0), steps=(0, 1), strict=True)
ALL_HEADS = resolve(Draft(select="shared", min_tokens=0), steps=(0, 1), strict=True)
CLIP = GenerateSettings("a red circle", "", "demo", DRAFT, 64, 64, 5, 2, 3.0, 0, 8)


def page(split: Any) -> tuple[torch.Tensor, Any]:
    """Jobs of a page: clips, one that is cancelled, one that fails in all processes, and one of a tab for one process."""
    if not split:
        return serve(Models(["demo"], "cpu"))
    shared = SharedClips(Ranks(World(dist.get_rank(), dist.get_world_size())), "context")
    models = Models(["demo"], "cpu", shared=shared)
    if not shared.ranks.first:
        told = []
        whole = shared.load
        shared.load = lambda load: (told.append("loaded"), whole(load))[1]  # type: ignore[method-assign]
        shared.follow(models)
        return torch.zeros(1), told
    try:
        return serve(models)
    finally:
        shared.close()


def serve(models: Models) -> tuple[torch.Tensor, Any]:
    said: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        studio = Studio(models, Path(folder))

        def work(values: Mapping[str, Any], job: Job) -> dict[str, Any]:
            settings = GenerateSettings.from_dict(values["settings"])
            check_fits(models, settings)
            if values.get("cancelled"):
                report = job.report

                def step(phase: str, done: int, total: int, all_left: float | None = None) -> None:
                    report(phase, done, total, all_left)
                    if (phase, done) == ("denoise", 1):
                        job.cancel()

                job.report = step  # type: ignore[method-assign]
            return {"clip": studio.name(studio.clip(settings, job))}

        job_queue = JobQueue(9, refuses=lambda kind: models.shared and models.shared.refuses(kind))
        for kind in ("generate", "compare"):
            job_queue.register(kind, work)
        usual, other = CLIP.to_dict(), {**CLIP.to_dict(), "seed": 1}
        jobs = {
            name: job_queue.submit("generate", name, {"settings": settings, "cancelled": name == "cancelled"})
            for name, settings in {
                "clip": usual,
                "cancelled": other,
                "fails": {**usual, "method": ALL_HEADS.to_dict()},
                "cache": {**usual, "method": resolve("sta", cache="sea").to_dict()},
                "again": other,
            }.items()
            if models.shared is not None or name in ("clip", "again")
        }
        try:
            job_queue.submit("compare", "", {"settings": CLIP.to_dict()}).join(30)
        except RefusedError as error:
            said["refused"] = str(error)
        for name, job in jobs.items():
            said[name] = [job.join(30), job.error]
        made = [studio.find(jobs[name].result["clip"]).run for name in ("clip", "again")]
        said["run"] = {key: made[0].get(key) for key in ("gpus", "parallel")}
        said["frames"] = [run["frames_sha256"] for run in made]
        said["files"] = len([*Path(folder).rglob("*.mp4")])
        job_queue.close()
    return torch.zeros(1), said


def cases() -> dict[str, Callable[..., Any]]:
    run: Any = page
    run.ranks = (2,)
    return {"row: page": run}
