"""Find the files of a checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.loading.model_folder import read_json
from tilewise.pipelines.loading.weight_files import SUFFIXES

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint.

    transformers: for each denoiser the files of its weights; none where there is a LoRA alone.
    lora: a LoRA beside the weights, found in the same folder.
    configs: config.json of each denoiser, where there is one.
    """

    transformers: tuple[tuple[Path, ...], ...]
    lora: Path | None = None
    configs: tuple[Path, ...] = ()


def find_checkpoint(path: Path) -> CheckpointFiles:
    """The files of a checkpoint at a path: one file, a folder of shards, a transformer folder or a whole pipeline.

    Raises ModelError if there is nothing, or if a folder leaves open which file is meant.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ModelError(f"{path} is no checkpoint: its name ends in none of {', '.join(SUFFIXES)}")
        return CheckpointFiles(((path,),))
    if not path.is_dir():
        raise ModelError(f"there is no causal checkpoint {path}")
    if (path / "transformer").is_dir():
        folders = [path / name for name in ("transformer", "transformer_2") if (path / name).is_dir()]
        found = [_weights_in(folder) for folder in folders]
        configs = tuple(file for folder in folders if (file := folder / "config.json").is_file())
        return CheckpointFiles(tuple(files for files, _ in found), configs=configs)
    weights, lora = _weights_in(path)
    config = path / "config.json"
    return CheckpointFiles((weights,), lora, (config,) if config.is_file() else ())


def _weights_in(folder: Path) -> tuple[tuple[Path, ...], Path | None]:
    """The weight files of one denoiser in a folder, and a LoRA file beside them."""
    if index := next(iter(sorted(folder.glob("*.safetensors.index.json"))), None):
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        for name in names:
            if not (folder / name).is_file():
                raise ModelError(f"the checkpoint is incomplete: there is no file {folder / name}")
        return tuple(folder / name for name in names), None
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in SUFFIXES)
    loras = [file for file in files if "lora" in file.stem.lower()]
    weights = [file for file in files if file not in loras]
    if any(file.suffix == ".safetensors" for file in weights):  # beside the same weights as a .bin
        weights = [file for file in weights if file.suffix != ".bin"]
    shards = all(_SHARD.search(file.stem) for file in weights)
    if not weights or (len(weights) > 1 and not shards) or len(loras) > 1:
        named = ", ".join(file.name for file in files[:6]) + (", …" if len(files) > 6 else "")
        raise ModelError(
            f"the folder {folder} does not say which checkpoint is meant; give one of its files ({named})"
            if files
            else f"the folder {folder} holds no checkpoint ({', '.join('*' + s for s in SUFFIXES)})"
        )
    return tuple(weights), loras[0] if loras else None
