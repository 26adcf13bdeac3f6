"""Load pipelines: the bundled demo model, a folder, or the hub. Errors are found before weights are read."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.loading.device import resolve_device, resolve_dtype
from tilewise.pipelines.loading.loras import merge_loras
from tilewise.pipelines.loading.model_folder import check_folder, find_model
from tilewise.pipelines.loading.offload import check_offload
from tilewise.pipelines.loading.offload import offload as apply_offload

# They lose detail below float32, and their pipelines decode in the VAE's own type. Not all do: Flux, for one, hands over its
# latents as they are.
FLOAT32_VAES = ("AutoencoderKLWan",)
HUB_TIMEOUT = 10.0  # seconds until we say that the hub does not answer


def load_pipeline(
    model: str | Path = "demo",
    *,
    device: str = "auto",
    dtype: str = "auto",
    parts: Mapping[str, Any] | None = None,
    pipeline_class: str = "DiffusionPipeline",
    offload: str = "none",
    loras: Sequence[str] = (),
) -> Any:
    """A diffusers pipeline on its device, ready to run and to patch.

    model: "demo", a diffusers folder, or a hub id (org/name; needs the network the first time).
    device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", ...
    dtype: "auto" (float32 on a CPU, bfloat16 otherwise), "float32", "bfloat16" or "float16"; of all parts but the VAEs of
    FLOAT32_VAES.
    parts: components that are there already; the model's own are not read, nor need they be there.
    pipeline_class: of diffusers, where it is not the one that the model names.
    loras: "PATH" or "PATH:WEIGHT" each, merged into the weights (`loras.py`).
    offload: "none", "model", "group" or "sequential": weights that are not at work stay in host memory (`offload.py`).

    Raises ModelError (missing, damaged, no network), DeviceError (not on this machine), ConfigError (no such dtype, no GPU
    to keep weights off).
    """
    where = resolve_device(device)
    kind = resolve_dtype(dtype, where)
    check_offload(offload, where)
    parts = dict(parts or {})
    source = _check_source(model, tuple(parts))
    import diffusers

    loader = getattr(diffusers, pipeline_class)
    with _loading(f"could not load the model {model}"):
        index = {name: value for name, value in loader.load_config(str(source)).items() if name not in parts}
    _check_classes(model, index if loader is diffusers.DiffusionPipeline else index | {"_class_name": pipeline_class})
    # Explicit for all parts: a file in float16 would otherwise stay so on a CPU, and parts would disagree.
    _, vae = index.get("vae") or (None, None)
    dtypes = {"default": kind, **({"vae": torch.float32} if vae in FLOAT32_VAES else {})}
    with _loading(f"could not load the model {model}"):
        # Left out and put in afterwards: diffusers looks up the classes that the model names for parts that it is handed.
        pipe = loader.from_pretrained(str(source), dtype=dtypes, **dict.fromkeys(parts))
    pipe.register_modules(**parts)
    merge_loras(pipe, loras)
    apply_offload(pipe, offload, where)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_skeleton(model: str | Path = "demo") -> Any:
    """The pipeline of a model without its weights: parts on the meta device, and no text encoder or tokenizer.

    Enough for `tilewise.explain` and for sizes; it cannot generate. Reads (or downloads) only the configs.
    Raises ModelError as `load_pipeline` does.
    """
    import diffusers

    source = str(_check_source(model))
    refused = f"could not read the configs of {model}"
    with _loading(refused):
        index = diffusers.DiffusionPipeline.load_config(source)
    _check_classes(model, index)
    parts: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(value, list | tuple):
            parts[name] = value
        elif value[0] != "diffusers":
            parts[name] = None
        else:
            part_class = getattr(diffusers, value[1])
            is_module = issubclass(part_class, torch.nn.Module)
            with _loading(refused), torch.device("meta" if is_module else "cpu"):
                parts[name] = part_class.from_config(part_class.load_config(source, subfolder=name))
    with _loading(refused):
        pipe = getattr(diffusers, index["_class_name"])(**parts)
    pipe.register_to_config(_name_or_path=source)
    return pipe


def cast_skeleton(skeleton: Any, dtype: torch.dtype) -> Any:
    """A skeleton of its own with the types that `load_pipeline` would give its parts: what memory is planned by."""
    for part in skeleton.components.values():
        if isinstance(part, torch.nn.Module):
            kind = torch.float32 if type(part).__name__ in FLOAT32_VAES else dtype
            for parameter in part.parameters():
                parameter.data = parameter.data.to(kind)
    return skeleton


def _check_source(model: str | Path, without: Collection[str] = ()) -> Path | str:
    source = find_model(model)
    if isinstance(source, Path):
        check_folder(source, without)
        return source
    return _check_hub(source)


def _check_hub(model_id: str) -> str:
    """Asks the hub for the model; without an answer, a copy in the local cache will do."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    missing = f"there is no local folder {model_id}, and"
    try:
        HfApi().model_info(model_id, timeout=HUB_TIMEOUT)
        return model_id
    except RepositoryNotFoundError as error:  # also for gated ones
        raise ModelError(
            f"{missing} the hub has no public model {model_id} (private and gated ones need a login)"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{missing} {model_id} is no hub id: {_first_line(error)}") from error
    except Exception as error:  # the HTTP library behind huggingface_hub, and so its errors, changes between versions
        reason = _first_line(error)
    try:
        return snapshot_download(model_id, local_files_only=True)
    except OSError as error:
        raise ModelError(
            f"{missing} the hub cannot be reached, nor is {model_id} in the local cache: {reason}"
        ) from error


@contextlib.contextmanager
def _loading(refused: str) -> Iterator[None]:
    """Around one call of a library with a model's files: what it raises about those becomes a ModelError.

    An AttributeError is none of that. Names of classes are checked before, so it is a bug, here or there.
    """
    try:
        yield
    except pickle.UnpicklingError as error:  # whose own text is advice to switch the check off
        raise ModelError(
            f"{refused}: a weight file of it (.bin) is damaged, or a pickle of other things than tensors, which could run any "
            "program when it is loaded. Take the model as .safetensors"
        ) from error
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
        raise ModelError(f"{refused}: {_first_line(error)}") from error


def _check_classes(model: str | Path, index: Mapping[str, Any]) -> None:
    """Raises ModelError for a class of a model_index.json that the installed diffusers does not have."""
    import diffusers

    parts = [value[1] for value in index.values() if isinstance(value, list | tuple) and value[:1] == ["diffusers"]]
    for name in (index["_class_name"], *parts):
        if isinstance(name, str) and not hasattr(diffusers, name):
            raise ModelError(f"could not load the model {model}: diffusers {diffusers.__version__} has no class {name}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:400]
