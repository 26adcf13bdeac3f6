"""State that the whole process shares: what a test changes in it changes the tests after it.

An autouse fixture in ``conftest.py`` fails a test that leaves any of it changed, and puts it back. A test that must change some
uses ``monkeypatch``, or ``with global_state.restored():`` where a library changes it (``set_attention_backend`` of a diffusers
model sets a default for every model).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

import tilewise.plugins.methods.base
import tilewise.plugins.models.common.registry

# Set by pytest for each phase of a test, and by libraries when they are first used.
ENVIRONMENT_OF_OTHERS = (
    "PYTEST_",
    "TORCHINDUCTOR_",
    "_TORCHINDUCTOR_",
    "TRITON_CACHE",
    "TRITON_PTXAS",
    "KMP_",
    "MPL",
    "GRADIO_",
)


@dataclass(frozen=True)
class Setting:
    name: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]


def attribute(owner: Any, name: str, title: str) -> Setting:
    return Setting(title, lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(ENVIRONMENT_OF_OTHERS)}


def set_environment(values: dict[str, str]) -> None:
    for name in environment().keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


def registered(registry: dict[str, Any]) -> dict[str, Any]:
    """What tests registered: the project's own entries come by themselves, whenever they are first asked for."""

    def home(entry: Any) -> str:
        return (entry if isinstance(entry, type) else type(entry)).__module__

    return {k: v for k, v in registry.items() if not home(v).startswith("tilewise.")}


def set_registered(registry: dict[str, Any], values: dict[str, Any]) -> None:
    for name in registered(registry).keys() - values.keys():
        del registry[name]
    registry.update(values)


def set_config(config: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if getattr(config, name) != value:
            setattr(config, name, value)


def config(module: Any, title: str) -> Setting:
    return Setting(title, module.get_config_copy, lambda values: set_config(module, values))


def registry(entries: dict[str, Any], title: str) -> Setting:
    return Setting(title, lambda: registered(entries), lambda values: set_registered(entries, values))


def handler(number: signal.Signals) -> Setting:
    return Setting(
        f"handler of {number.name}", lambda: signal.getsignal(number), lambda value: signal.signal(number, value)
    )


SETTINGS = [
    attribute(_AttentionBackendRegistry, "_active_backend", "diffusers' active attention backend"),
    attribute(_AttentionBackendRegistry, "_checks_enabled", "diffusers' attention checks"),
    attribute(F, "scaled_dot_product_attention", "F.scaled_dot_product_attention"),
    Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("default device", torch.get_default_device, torch.set_default_device),
    Setting("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    Setting("number of threads", torch.get_num_threads, torch.set_num_threads),
    Setting("float32 matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    attribute(torch.backends.cudnn, "allow_tf32", "TF32 of cuDNN"),
    attribute(torch.backends.cudnn, "benchmark", "cuDNN's benchmark mode"),
    attribute(torch.backends.cudnn, "deterministic", "cuDNN's deterministic mode"),
    Setting("deterministic algorithms", torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    Setting("flash attention", torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    Setting(
        "memory-efficient attention",
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.enable_mem_efficient_sdp,
    ),
    Setting("math attention", torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    Setting("cuDNN attention", torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    config(torch._dynamo.config, "torch._dynamo.config"),
    registry(tilewise.plugins.methods.base._REGISTRY, "registered methods"),
    registry(tilewise.plugins.models.common.registry._FAMILIES, "registered families"),
    Setting("environment variables", environment, set_environment),
    Setting("working directory", os.getcwd, os.chdir),
    handler(signal.SIGINT),
    handler(signal.SIGTERM),
]


def snapshot() -> list[Any]:
    return [setting.get() for setting in SETTINGS]


def described(before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
        return ", ".join(f"{name} {before.get(name)!r} → {after.get(name)!r}" for name in names)
    return f"{before!r} → {after!r}"


def put_back(before: list[Any]) -> list[str]:
    """Restore what changed since the snapshot; what that was."""
    changed = []
    for setting, old in zip(SETTINGS, before, strict=True):
        new = setting.get()
        if new != old:
            changed.append(f"{setting.name}: {described(old, new)}")
            setting.set(old)
    return changed


@contextmanager
def restored() -> Iterator[None]:
    """What is changed inside is put back."""
    before = snapshot()
    try:
        yield
    finally:
        put_back(before)


def fail_if_changed(before: list[Any]) -> None:
    if changed := put_back(before):
        pytest.fail(
            "global state is left changed, which other tests would see:\n  " + "\n  ".join(changed) + "\n"
            "Use monkeypatch, or `with global_state.restored():`, for what is set.",
            pytrace=False,
        )
