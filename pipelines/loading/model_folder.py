"""Find a model and check that its folder is complete, in milliseconds, before its weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tilewise.pipelines.errors import ModelError

# Beside the code, so that it is found in a checkout, through the links of an editable install, and in a wheel alike.
DEMO_FOLDER = Path(__file__).parents[1] / "demo_model"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHTS = ("*.safetensors", "*.bin")


def find_model(model: str | Path) -> Path | str:
    """A local folder as a Path, or a hub id (org/name) as a str.

    model: "demo" (the bundled model), a folder, or a hub id. A folder wins over a hub id of the same name, not over the bundled
    model: a folder called demo is "./demo", or a Path.
    Raises ModelError if it is none of them.
    """
    if model == "demo":
        if DEMO_FOLDER.is_dir():
            return DEMO_FOLDER
        raise ModelError(f"the bundled demo model is not here: there is no folder {DEMO_FOLDER}")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"the model {model} is a file; a diffusers folder (with model_index.json) is wanted")
    if HUB_ID.fullmatch(str(model)):
        return str(model)
    raise ModelError(f"there is no model folder {model}; give 'demo', a diffusers folder, or a hub id such as org/name")


def check_folder(folder: Path, without: Collection[str] = ()) -> dict[str, Any]:
    """Looks whether a diffusers folder can be loaded, apart from the parts ``without``; returns its model_index.json.

    Checks that every part named there exists, that JSON files parse, that weight files are complete by their headers,
    and that no shard is missing. Reads no weights. Raises ModelError with the first file that is wrong and why.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelError(f"{folder} is no diffusers model: it has no model_index.json")
    index = read_json(index_file)
    if not isinstance(index.get("_class_name"), str):
        raise ModelError(f"{index_file} names no pipeline class (_class_name)")
    for name, value in index.items():
        is_part = isinstance(value, list) and len(value) == 2 and not name.startswith("_")
        if name not in without and is_part and all(isinstance(word, str) for word in value):
            _check_part(folder / name)
    return index


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelError, naming the file, if it cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: a JSON object was expected, not {type(value).__name__}")
    return value


def _check_part(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"the model is incomplete: there is no folder {folder}")
    for file in sorted(folder.glob("*.json")):
        content = read_json(file)
        if file.name.endswith(".index.json"):
            for shard in sorted(set(content.get("weight_map", {}).values())):
                if not (folder / shard).is_file():
                    raise ModelError(f"the model is incomplete: there is no file {folder / shard}")
    # Models have a config.json; schedulers, tokenizers and processors name theirs otherwise and have no weights.
    if (folder / "config.json").is_file() and not any(file for kind in WEIGHTS for file in folder.glob(kind)):
        raise ModelError(f"the model is incomplete: {folder} holds no weights ({' or '.join(WEIGHTS)})")
    for file in sorted(folder.glob("*.safetensors")):
        check_safetensors(file)


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what Git LFS leaves in place of one that was not downloaded."""
    with file.open("rb") as stream:
        return stream.read(32).startswith(b"version https://git-lfs")


def check_safetensors(file: Path) -> None:
    """Raises ModelError if a file is no complete safetensors file, by its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass  # opening compares the header with the file's length
    except (SafetensorError, OSError) as error:
        reason = "it is a Git LFS pointer; run `git lfs pull`" if is_lfs_pointer(file) else str(error)
        raise ModelError(f"{file} is damaged or incomplete: {reason}") from error
