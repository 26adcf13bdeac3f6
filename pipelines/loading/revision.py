"""Revision of a model: the hub's commit, or a fingerprint of a folder's files.

A fingerprint covers the configuration files of the parts whole, and of weight files the header and samples: each tensor's
first, middle and last 256 bytes, or evenly spaced blocks where there are no tensors to be seen. Training or merging anything
into a model changes it, and it takes a second where hashing 28 GB takes a minute. It does not depend on where the folder lies
or on when it was written.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.loading.load import HUB_TIMEOUT
from tilewise.pipelines.loading.model_folder import find_model

WHOLE = 8 * 2**20  # bytes up to which a file is hashed whole
SAMPLE = 256
BLOCKS, BLOCK = 1024, 4096
SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".bin")
TOP = (
    "model_index.json",
    "tilewise.json",
)  # what else lies beside the parts tells about the model, and decides nothing


def model_revision(model: str | Path) -> str:
    """ "hub:<40 hex digits>" or "folder:<64 hex digits>". Raises ModelError if there is no such model."""
    source = find_model(model)
    if isinstance(source, Path):
        return f"folder:{fingerprint(source)}"
    return f"hub:{_hub_commit(source)}"


def fingerprint(folder: Path) -> str:
    """SHA-256 over names and (samples of) contents of a model folder's files."""
    digest = hashlib.sha256()
    try:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and _counts(path, folder))
        for file in files:
            _add(digest, file.relative_to(folder).as_posix(), file)
    except OSError as error:
        raise ModelError(f"cannot read the model {folder}: {error}") from error
    return digest.hexdigest()


def weights_fingerprint(paths: Sequence[Path]) -> str:
    """SHA-256 over (samples of) files of weights, or of all those in folders; not over where they lie.

    Raises ModelError for a path that cannot be read."""
    digest = hashlib.sha256()
    try:
        for path in paths:
            files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            for file in files:
                _add(digest, file.relative_to(path).as_posix() if path.is_dir() else "", file)
    except OSError as error:
        raise ModelError(f"cannot read weights: {error}") from error
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, file: Path) -> None:
    """Hash a file's name, size and (samples of) contents."""
    size = file.stat().st_size
    digest.update(f"{name}\0{size}\0".encode())
    with file.open("rb") as stream:
        for piece in _samples(stream, size, file.suffix):
            digest.update(piece)


def _counts(path: Path, folder: Path) -> bool:
    return path.name in TOP if path.parent == folder else path.suffix in SUFFIXES


def _samples(stream: BinaryIO, size: int, suffix: str) -> Iterator[bytes]:
    if size <= WHOLE:
        yield stream.read()
        return
    places = [max(0, size - BLOCK) * i // (BLOCKS - 1) for i in range(BLOCKS)]
    length = BLOCK
    if suffix == ".safetensors":
        count = struct.unpack("<Q", stream.read(8))[0]
        header = stream.read(min(count, size))
        yield header
        try:
            tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
            spans = [(8 + count + start, 8 + count + end) for start, end in (t["data_offsets"] for t in tensors)]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # damaged: loading will say so; the evenly spaced blocks do for now
        else:
            places = sorted({max(a, b) for s, e in spans for a, b in ((s, s), (s, (s + e) // 2), (s, e - SAMPLE))})
            length = SAMPLE
    for place in places:
        stream.seek(place)
        yield stream.read(length)


def _hub_commit(model_id: str) -> str:
    from huggingface_hub import HfApi, snapshot_download

    try:
        commit = HfApi().model_info(model_id, timeout=HUB_TIMEOUT).sha
        if commit:
            return commit
    except Exception:  # as in loading: without an answer, the copy in the local cache is what will be loaded
        pass
    try:
        return Path(snapshot_download(model_id, local_files_only=True)).name
    except OSError as error:
        raise ModelError(
            f"the hub does not tell which revision of {model_id} it has, and there is none here"
        ) from error
