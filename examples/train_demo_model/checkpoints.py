"""Tensors and facts on disk: one safetensors file with JSON in its header, written atomically. No pickles."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def save(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any] | None = None) -> None:
    """Write to a temporary name and rename, so that a file under its own name is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # safetensors refuses tensors that share memory (tied embeddings), hence the copies.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(plain, temporary, metadata={"facts": json.dumps(facts or {}), "format": "pt"})
    temporary.chmod(0o644)
    os.replace(temporary, path)


def load(path: Path, device: torch.device | str = "cpu") -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the facts of one file."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        facts = json.loads((file.metadata() or {}).get("facts", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (not a dict)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Every name with `prefix.` before it."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors whose names begin with `prefix.`, without it."""
    start = prefix + "."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def adam_state(optimizer: torch.optim.Optimizer) -> Tensors:
    """An Adam optimizer's state as named tensors (hyper-parameters are not state: the configuration has them)."""
    return {
        f"{index}.{key}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def load_adam_state(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Put `adam_state` back."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def pack(source: Path, folder: Path, megabytes: float = 14.0) -> list[Path]:
    """Split a checkpoint into small shards for carrying to another machine.

    Weights stay as they are, their moving average goes as fp16, Adam's moments go as bf16, and Muon's momentum, which takes
    twenty steps to build up, is left out: a resumed run is then no longer bit-identical, but as good.
    """
    tensors, facts = load(source)
    small: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("ema.") and tensor.is_floating_point():
            tensor = tensor.half()
        elif name.startswith("muon."):
            continue
        elif name.startswith("adam.") and tensor.ndim > 0:
            tensor = tensor.bfloat16()
        small[name] = tensor
    shards: list[Tensors] = [{}]
    size = 0
    for name, tensor in small.items():
        if size + tensor.nbytes > megabytes * 1e6 and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    paths = []
    for index, shard in enumerate(shards):
        path = folder / f"{source.name.removesuffix('.safetensors')}.{index:02d}-of-{len(shards):02d}.safetensors"
        save(path, shard, facts)
        paths.append(path)
    return paths


def unpack(folder: Path, target_folder: Path) -> list[Path]:
    """Join what `pack` wrote back into checkpoints."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*-of-*.safetensors")):
        groups.setdefault(path.name.rsplit(".", 2)[0], []).append(path)
    written = []
    for name, paths in groups.items():
        expected = int(paths[0].name.rsplit(".", 2)[1].split("-of-")[1])
        if len(paths) != expected:
            raise FileNotFoundError(f"{name}: {len(paths)} of {expected} shards in {folder}")
        tensors: Tensors = {}
        facts: dict[str, Any] = {}
        for path in paths:
            part, facts = load(path)
            tensors.update({key: value.float() if value.is_floating_point() else value for key, value in part.items()})
        target = target_folder / f"{name}.safetensors"
        save(target, tensors, facts)
        written.append(target)
    return written
