"""Read files of weights. Nothing in a file can run code: safetensors, or tensors alone from a pickle."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.loading.model_folder import check_safetensors, is_lfs_pointer

PICKLES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *PICKLES)


def read_weights(files: tuple[Path, ...]) -> dict[str, Any]:
    """What the files hold: names and tensors on the CPU, or containers of such. Tensors stay on disk until they are used.

    Raises ModelError for a file that is damaged, or that holds Python objects.
    """
    read: dict[str, Any] = {}
    for file in files:
        for name, value in _read_file(file).items():
            if name in read:
                raise ModelError(f"{file} holds {name}, which another file of the checkpoint holds too")
            read[name] = value
    return read


def _read_file(file: Path) -> Mapping[str, Any]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        check_safetensors(file)
        return load_file(file)
    if is_lfs_pointer(file):
        raise ModelError(f"{file} is damaged or incomplete: it is a Git LFS pointer; run `git lfs pull`")
    try:
        # The older format of torch.save is no zip archive and cannot be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file} was not read: it is damaged, or holds Python objects besides tensors, which can run code "
            f"({_reason(error)}). Save its tensors alone, as safetensors, where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{file} is damaged or incomplete: {_reason(error)}") from error
    if not isinstance(content, Mapping):
        raise ModelError(f"{file} holds a {type(content).__name__}, not names and tensors")
    return content


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [f"{type(error).__name__}, too short"]
    return lines[0][:200]
