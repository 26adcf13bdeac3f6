"""Stage `score`: what is left of an exported model's clips under attention methods. Writes its evaluation.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

import tilewise
from tilewise.pipelines.quality.metrics import psnr

from . import checkpoints
from .evaluation import contact_sheet, environment, generate_clips, held_out_prompts, judge, report_of
from .model_card import read_json, weight_files, write_card

DENSE = "dense"
# Measured otherwise than by this stage (by `evaluate`, or by hand): stays in the file.
KEPT = ("scheduler", "vae_psnr", "continuation", "guidance_comparison")
IDENTICAL = 99.0  # dB; JSON has no infinity


def score_folder(
    folder: Path,
    methods: Sequence[str],
    *,
    device: torch.device,
    count: int = 64,
    batch: int = 4,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    work: Path = Path("runs/score"),
    again: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Score `methods` (dense attention first, always) on the same prompts and noise.

    The file is written after every method; methods that it already has for the same protocol are skipped. Every batch
    of clips is kept under `work`, so that a killed invocation continues there, and so that methods which are added later
    can be compared with the dense clips. `again` uses neither.
    """
    protocol = _protocol(folder, count, seed, steps, guidance)
    path = folder / "evaluation.json"
    before = read_json(path)
    report: dict[str, Any] = {"protocol": protocol, "methods": {}}
    if before.get("protocol") == protocol:
        report["methods"] = before["methods"]
    elif before.get("methods"):
        print("score: the file's scores are of another protocol or other weights, and are replaced", flush=True)
    report |= {key: before[key] for key in KEPT if key in before}
    names = list(dict.fromkeys([DENSE, *methods]))
    missing = [name for name in names if again or name not in report["methods"]]
    for name in names:
        if name not in missing:
            print(f"score: {name} is already scored", flush=True)
    if missing:
        prompts, _ = held_out_prompts(count, seed)
        scorer = _Scorer(folder, prompts, protocol, device, batch, work)
        for name in missing:  # a wrong name should not be found out after an hour
            if name != DENSE:
                with tilewise.patched(scorer.pipe, name, strict=True):
                    pass
        dense: np.ndarray | None = None
        for name in names:
            if name not in missing and name != DENSE:
                continue
            clips, facts = scorer.clips(name, fresh=again)
            if name == DENSE:
                dense = clips
            if name not in missing:
                continue
            assert dense is not None
            result: dict[str, Any] = {**facts, **report_of(judge(prompts, clips))}
            if name != DENSE:
                values = [min(psnr(clip, other), IDENTICAL) for clip, other in zip(clips, dense, strict=True)]
                result["psnr_to_dense"] = {"mean": round(float(np.mean(values)), 2), "min": round(min(values), 2)}
            report["methods"][name] = {**result, "batch": batch, **environment(device), "command": command}
            checkpoints.write_json(path, report)
            write_card(folder)
            print(f"score: {name}", result["scores"], result.get("psnr_to_dense", ""), flush=True)
    write_card(folder)
    return report


def _protocol(folder: Path, count: int, seed: int, steps: int | None, guidance: float | None) -> dict[str, Any]:
    native = read_json(folder / "tilewise.json")
    digest = hashlib.sha256()
    for file in weight_files(folder):
        digest.update(file.read_bytes())
    return {
        "prompts": count,
        "steps": native["steps"] if steps is None else steps,
        "guidance": float(native["guidance"] if guidance is None else guidance),
        "seed": seed,
        "text_tokens": native["max_sequence_length"],
        "height": native["height"],
        "width": native["width"],
        "frames": native["frames"],
        "scheduler": read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"],
        "dtype": "float32",
        "weights": digest.hexdigest()[:12],
    }


class _Scorer:
    """Makes the clips of a method, batch by batch, and keeps each batch in a file."""

    def __init__(
        self, folder: Path, prompts: list[str], protocol: dict[str, Any], device: torch.device, batch: int, work: Path
    ) -> None:
        self.folder, self.prompts, self.protocol, self.device, self.batch = folder, prompts, protocol, device, batch
        key = json.dumps([protocol, batch, device.type, torch.__version__], sort_keys=True)
        self.work = work / hashlib.sha256(key.encode()).hexdigest()[:12]
        self.work.mkdir(parents=True, exist_ok=True)
        self._pipe: Any = None

    @property
    def pipe(self) -> Any:
        """Loaded when the first clip has to be made."""
        if self._pipe is None:
            self._pipe = WanPipeline.from_pretrained(self.folder, torch_dtype=torch.float32, local_files_only=True)
            self._pipe.to(self.device)
            self._pipe.set_progress_bar_config(disable=True)
        return self._pipe

    def clips(self, name: str, *, fresh: bool) -> tuple[np.ndarray, dict[str, Any]]:
        """All clips of one method; its measured density and how long generating took."""
        starts = list(range(0, len(self.prompts), self.batch))
        files = {start: self.work / f"{name.replace('/', '_')}.{start:04d}.npz" for start in starts}
        if fresh:
            for file in files.values():
                file.unlink(missing_ok=True)
        if any(not file.exists() for file in files.values()):
            method = contextlib.nullcontext() if name == DENSE else tilewise.patched(self.pipe, name, strict=True)
            with method:
                for start in starts:
                    self._make(name, start, files[start])
        parts = []
        seconds = 0.0
        facts: dict[str, Any] = {}
        for file in files.values():
            with np.load(file, allow_pickle=False) as kept:
                parts.append(kept["clips"])
                batch_facts = json.loads(str(kept["facts"]))
            seconds += batch_facts.pop("seconds")
            facts = batch_facts  # every call has the same shape, so every batch has the same density
        clips = np.concatenate(parts)
        contact_sheet(clips, self.work / f"{name.replace('/', '_')}.png")
        return clips, {**facts, "seconds": round(seconds, 1)}

    def _make(self, name: str, start: int, file: Path) -> None:
        stop = min(start + self.batch, len(self.prompts))
        if file.exists():
            print(f"score: {name} {stop}/{len(self.prompts)}, kept from before", flush=True)
            return
        begun = time.monotonic()
        arguments = {key: self.protocol[key] for key in ("steps", "guidance", "seed", "height", "width", "frames")}
        tokens = self.protocol["text_tokens"]
        clips = generate_clips(
            self.pipe, self.prompts[start:stop], first=start, max_sequence_length=tokens, **arguments
        )
        facts: dict[str, Any] = {"density": 1.0, "seconds": time.monotonic() - begun}
        if name != DENSE:
            ran = tilewise.summary(self.pipe)
            facts |= {"density": round(ran.density, 4), "overall_density": round(ran.overall_density, 4)}
            facts["config"] = ran.method
        temporary = file.with_name(file.name + ".tmp")
        with temporary.open("wb") as stream:
            np.savez_compressed(stream, clips=clips, facts=np.array(json.dumps(facts)))
        os.replace(temporary, file)
        print(f"score: {name} {stop}/{len(self.prompts)}, {facts['seconds']:.1f} s", flush=True)
