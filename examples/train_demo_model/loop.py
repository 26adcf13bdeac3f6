"""The training loop that every stage shares: planning to a time budget, checkpoints, resuming, logging."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from . import checkpoints


def device_name(device: torch.device) -> str:
    """What the machine calls it, for the records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0] if names else platform.processor() or platform.machine()})"


class Trainee(Protocol):
    """What a stage brings: its state as tensors, and one step. All randomness of a step must follow from its number."""

    def state(self) -> checkpoints.Tensors: ...

    def load(self, tensors: checkpoints.Tensors) -> None: ...

    def step(self, step: int, horizon: int) -> Mapping[str, torch.Tensor]: ...


@dataclass(frozen=True)
class Limits:
    """How long to train: at most `steps`, fewer when `minutes` does not suffice for them.

    `stop_after` only interrupts: it ends this invocation with a checkpoint and leaves the schedule as it was.
    """

    steps: int
    minutes: float | None = None
    stop_at: float | None = None  # time.monotonic() value
    checkpoint_seconds: float = 60.0


@dataclass
class Run:
    """The folder that holds everything of one training run, and where to compute."""

    folder: Path
    device: torch.device
    seed: int = 0
    compile: bool = False
    started: float = field(default_factory=time.monotonic)

    def path(self, name: str) -> Path:
        return self.folder / name

    def say(self, *words: Any) -> None:
        print(f"[{time.monotonic() - self.started:7.1f}s]", *words, flush=True)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def generator(self, *key: int) -> torch.Generator:
        """Random numbers that depend on the run's seed and on `key` alone."""
        mixed = self.seed + 1
        for part in key:
            mixed = (mixed * 1_000_003 + part + 12_345) % (2**63 - 1)
        return torch.Generator(self.device).manual_seed(mixed)

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU; plain fp32 on a CPU, where bf16 is only slower."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


def train(
    run: Run, stage: str, trainee: Trainee, limits: Limits, *, skip: int = 5, measure: int = 30, replan: bool = False
) -> bool:
    """Train to the end of the schedule (True), or to the time to stop (False). Continues from a checkpoint if there is one.

    With a time budget, the number of steps is fixed once: after `skip` steps, from the time that the next `measure` took. Where
    steps do not all take the same time, `replan` fixes it anew with every line of the log.
    """
    state_path = run.path(f"{stage}.state.safetensors")
    step, horizon, planned, spent, history = 0, limits.steps, limits.minutes is None, 0.0, []
    if state_path.exists():
        tensors, facts = checkpoints.load(state_path, run.device)
        trainee.load(tensors)
        step, horizon, planned, spent = (facts[key] for key in ("step", "horizon", "planned", "seconds"))
        history = facts["history"]
        run.say(f"{stage}: continuing at step {step} of {horizon}")
    begun = time.monotonic()
    first = step
    last_save = last_log = begun
    window: list[Mapping[str, torch.Tensor]] = []
    measure_from: float | None = None

    def checkpoint() -> None:
        facts = {
            "stage": stage,
            "step": step,
            "horizon": horizon,
            "planned": planned,
            "seconds": spent + time.monotonic() - begun,
            "history": history,
            "device": device_name(run.device),
            "torch": torch.__version__,
        }
        checkpoints.save(state_path, trainee.state(), facts)
        checkpoints.write_json(run.path(f"{stage}.log.json"), facts)

    while step < horizon:
        now = time.monotonic()
        if limits.stop_at is not None and now > limits.stop_at:
            checkpoint()
            run.say(f"{stage}: stopped at step {step} of {horizon}, as asked; run the same command again to continue")
            return False
        if not planned and limits.minutes is not None:
            if step - first == skip:
                run.sync()
                measure_from = time.monotonic()
            elif step - first == skip + measure and measure_from is not None:
                run.sync()
                per_step = (time.monotonic() - measure_from) / measure
                left = limits.minutes * 60 - spent - (time.monotonic() - begun)
                horizon = max(step + 1, min(limits.steps, step + int(left / per_step)))
                planned = True
                run.say(f"{stage}: {per_step * 1e3:.1f} ms a step, so {horizon} steps in {limits.minutes:g} minutes")
        window.append(trainee.step(step, horizon))
        step += 1
        if now - last_log > 15 or step == horizon:
            means = {}
            for key in sorted({key for metrics in window for key in metrics}):
                values = [metrics[key].float() for metrics in window if key in metrics]
                means[key] = round(float(torch.stack(values).mean()), 5)
            window.clear()
            last_log = time.monotonic()
            history.append({"step": step, "seconds": round(spent + last_log - begun, 1), **means})
            if replan and planned and limits.minutes is not None and step < horizon and len(history) > 1:
                before = history[-2]
                pace = (history[-1]["seconds"] - before["seconds"]) / max(1, step - before["step"])
                left = limits.minutes * 60 - history[-1]["seconds"]
                horizon = max(step + 1, min(limits.steps, step + int(left / pace)))
            run.say(stage, f"{step}/{horizon}", " ".join(f"{key} {value:g}" for key, value in means.items()))
        if now - last_save > limits.checkpoint_seconds:
            checkpoint()
            last_save = time.monotonic()
    run.sync()
    checkpoint()
    return True


def warmup_then(step: int, warmup: int, factor: float) -> float:
    """`factor`, ramped up over the first `warmup` steps."""
    return min(1.0, (step + 1) / max(1, warmup)) * factor
