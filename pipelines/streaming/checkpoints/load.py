"""Load a causal checkpoint into a stock Wan pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.loading.device import resolve_device, resolve_dtype
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.loading.model_folder import check_safetensors, read_json
from tilewise.pipelines.loading.weight_files import read_weights
from tilewise.pipelines.streaming.checkpoints.containers import unwrap
from tilewise.pipelines.streaming.checkpoints.files import find_checkpoint
from tilewise.pipelines.streaming.checkpoints.fit import build, check_changes, check_fit, check_writable, put
from tilewise.pipelines.streaming.checkpoints.known import choose_recipe, recognise
from tilewise.pipelines.streaming.checkpoints.lora import Change, lora_changes
from tilewise.pipelines.streaming.checkpoints.sizes import config_of
from tilewise.pipelines.streaming.checkpoints.wan_names import diffusers_names
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.plugins.diffusers_compat import unwrapped
from tilewise.plugins.errors import ConfigError, UnsupportedModelError

RECIPE_ATTRIBUTE = "_tilewise_recipe"
PARTS = ("transformer", "transformer_2")


@dataclass(frozen=True)
class _Denoiser:
    """The weights of one denoiser by diffusers' names (none where a LoRA comes alone), and the changes of a LoRA."""

    what: str
    weights: Mapping[str, torch.Tensor]
    in_file: Mapping[str, str]  # diffusers' name → the file's
    changes: Mapping[str, Change]

    def check(self, wanted: Mapping[str, torch.Tensor]) -> None:
        if self.weights:
            check_fit(self.what, self.weights, wanted, self.in_file)
        check_changes(self.what, self.changes, wanted)


def load_causal_checkpoint(
    path: str | Path,
    pipe: Any = None,
    *,
    base: str | Path | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    recipe: str | CausalRecipe | Mapping[str, Any] | None = None,
    ema: bool | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **changes: Any,
) -> tuple[Any, CausalRecipe]:
    """A stock Wan pipeline with the weights of a causal checkpoint, and the recipe that it makes video by.

    path: a .safetensors or .pt file, a folder of shards, or a diffusers folder (of the denoiser or a whole pipeline), with
    Wan's own names or diffusers'. A LoRA alone goes onto the weights of ``pipe`` or ``base``; it is merged.
    pipe: a WanPipeline whose denoiser gets the weights, in place. Without one a pipeline is built from ``base``, or from
    path if that is a whole pipeline.
    base: a diffusers folder or hub id of the same architecture, for the text encoder and the VAE.
    lora, lora_scale: a LoRA file on top, and its weight. A folder may hold one beside the checkpoint.
    recipe: name of a published recipe, a CausalRecipe or its fields. By default <file>.recipe.json or recipe.json beside
    the file, then what the file's name says. ``changes`` are fields of the recipe (`chunk=1`).
    ema: averaged weights or not, where a file has both; by default what its authors sample with.
    device, dtype: of a pipeline that is built, as for `tilewise generate`; a given one keeps its own.

    The recipe is kept on the denoisers too. Everything is checked before a weight is replaced.

    Raises ModelError for a file that is missing, damaged, unsafe to read, or does not fit, with the weights that are missing,
    too much or of other sizes; ConfigError for a recipe that is unknown or contradicts itself, and where no pipeline is
    given; UnsupportedModelError for a pipeline that is not Wan's.
    """
    path = Path(path).expanduser()
    _check_target(pipe, base, device, dtype)
    files = find_checkpoint(path)
    known = recognise(path, len(files.transformers), _channels(pipe))
    denoisers = []
    for paths in files.transformers:
        contents = unwrap(read_weights(paths), ema=ema, prefer_ema=known is not None and known.averaged)
        denoisers.append(_denoiser(path, contents.weights, contents.lora))
    lora_file = Path(lora).expanduser() if lora is not None else files.lora
    if lora_file is not None:
        denoisers = _with_lora(denoisers, lora_file)
    latents = _channels(pipe) or _latents(denoisers[0].weights)
    known = recognise(path, len(denoisers), latents)
    chosen = choose_recipe(path, recipe, changes, known)

    alone = not denoisers[0].weights
    if pipe is not None:
        chosen = _with_boundary(chosen, len(denoisers), pipe.config)
        _put(pipe, denoisers, lora_scale)
    else:
        root = _root(path, base, alone)
        chosen = _with_boundary(chosen, len(denoisers), _index(root))
        if alone:
            pipe = load_pipeline(root, device=device or "auto", dtype=dtype or "auto")
            _put(pipe, denoisers, lora_scale)
        else:
            pipe = _build(root, files.configs, denoisers, lora_scale, device or "auto", dtype or "auto")
    for module in _modules(pipe):
        setattr(module, RECIPE_ATTRIBUTE, chosen.to_dict())
    return pipe, chosen


def merge_lora(pipe: Any, file: str | Path, weight: float = 1.0) -> None:
    """Merges a LoRA of any published layout into the weights of a pipeline with one Wan denoiser, on top of what is in them.

    Raises ModelError for a file that is missing, none, or for other weights; nothing was changed then.
    """
    bare = _Denoiser(str(file), {}, {}, {})
    _put(pipe, _with_lora([bare], Path(file).expanduser()), weight)


def recipe_of_checkpoint(
    path: str | Path, pipe: Any, *, lora: str | Path | None = None, recipe: str | CausalRecipe | None = None
) -> CausalRecipe:
    """The recipe that ``load_causal_checkpoint(path, pipe, …)`` would choose. pipe: also one without weights.

    Only names, and the headers of safetensors files, are read. Raises what can be raised before weights are read.
    """
    path = Path(path).expanduser()
    _check_target(pipe, None, None, None)
    files = find_checkpoint(path)
    _check_count(len(files.transformers), len(_modules(pipe)))
    lora_file = files.lora if lora is None else Path(lora).expanduser()
    if lora_file is not None and not lora_file.is_file():
        raise ModelError(f"there is no LoRA file {lora_file}")
    for file in [*itertools.chain(*files.transformers), *([] if lora_file is None else [lora_file])]:
        if file.suffix == ".safetensors":
            check_safetensors(file)
    known = recognise(path, len(files.transformers), _channels(pipe))
    return _with_boundary(choose_recipe(path, recipe, {}, known), len(files.transformers), pipe.config)


def _check_target(pipe: Any, base: Any, device: str | None, dtype: str | None) -> None:
    if pipe is None:
        return
    if base is not None:
        raise ConfigError("load_causal_checkpoint: give a pipeline or base=, not both")
    if device is not None or dtype is not None:
        raise ConfigError(
            "load_causal_checkpoint: a given pipeline keeps its device and dtype; change them with pipe.to(...)"
        )
    from diffusers import WanTransformer3DModel

    for module in _modules(pipe):
        if not isinstance(module, WanTransformer3DModel):
            raise UnsupportedModelError(
                f"causal checkpoints are of Wan's architecture; the denoiser of this {type(pipe).__name__} is "
                f"{type(module).__name__}, not WanTransformer3DModel"
            )


def _denoiser(path: Path, weights: Mapping[str, torch.Tensor], lora: Mapping[str, torch.Tensor]) -> _Denoiser:
    if not weights and not lora:
        raise ModelError(f"{path} holds no weights")
    in_file = diffusers_names(weights)
    return _Denoiser(str(path), {name: weights[old] for name, old in in_file.items()}, in_file, lora_changes(lora))


def _with_lora(denoisers: list[_Denoiser], file: Path) -> list[_Denoiser]:
    """The LoRA of a file on top. Raises ModelError if the file is none, or the checkpoint brings one already."""
    if not file.is_file():
        raise ModelError(f"there is no LoRA file {file}")
    contents = unwrap(read_weights((file,)))
    if contents.weights or not contents.lora:
        raise ModelError(f"{file} is no LoRA: it has no matrices lora_A and lora_B, or lora_down and lora_up")
    if len(denoisers) > 1:
        raise ModelError(f"the checkpoint has two denoisers, and {file} does not say which one it is for")
    only = denoisers[0]
    if only.changes:
        raise ModelError(f"{only.what} has a LoRA of its own; load {file} in a second call")
    return [_Denoiser(only.what, only.weights, only.in_file, lora_changes(contents.lora))]


def _put(pipe: Any, denoisers: list[_Denoiser], scale: float) -> None:
    modules = _modules(pipe)
    _check_count(len(denoisers), len(modules))
    for denoiser, module in zip(denoisers, modules, strict=True):
        check_writable(module)
        denoiser.check(module.state_dict())
    for denoiser, module in zip(denoisers, modules, strict=True):
        put(module, denoiser.weights, denoiser.changes, scale)


def _build(
    root: str | Path, configs: tuple[Path, ...], denoisers: list[_Denoiser], scale: float, device: str, dtype: str
) -> Any:
    """A pipeline around denoisers that are built from their weights."""
    import diffusers

    kind = resolve_dtype(dtype, resolve_device(device))
    index = _index(root)
    _check_count(len(denoisers), len([name for name in PARTS if (index.get(name) or [None])[0]]) or len(denoisers))
    own = configs[0] if configs else Path(root).expanduser() / "transformer" / "config.json"
    similar = read_json(own) if own.is_file() else None
    parts = {
        name: build(config_of(one.weights, similar), one.weights, one.changes, scale, kind, one.check)
        for name, one in zip(PARTS, denoisers, strict=False)
    }
    # A conversion may name a pipeline of another library, and so may its parts; the stock one does as well.
    pipeline_class = index.get("_class_name", "")
    if not hasattr(diffusers, pipeline_class or "WanPipeline"):
        pipeline_class = "WanPipeline"
    return load_pipeline(
        root, device=device, dtype=dtype, parts=parts, pipeline_class=pipeline_class or "DiffusionPipeline"
    )


def _check_count(have: int, wanted: int) -> None:
    if have != wanted:
        words = {1: "one denoiser", 2: "two denoisers"}
        raise ModelError(
            f"the checkpoint has {words[have]}, the pipeline has {words[wanted]}. A checkpoint of two is a folder with "
            "transformer/ and transformer_2/. Nothing was changed"
        )


def _modules(pipe: Any) -> list[Any]:
    """The denoisers of a pipeline, out of what torch.compile and PEFT wrap around them."""
    parts = [part for name in PARTS if (part := getattr(pipe, name, None)) is not None]
    if not parts:
        raise UnsupportedModelError(f"causal checkpoints need a Wan pipeline; {type(pipe).__name__} has no transformer")
    return [unwrapped(part) for part in parts]


def _channels(pipe: Any) -> int | None:
    return None if pipe is None else _modules(pipe)[0].config.in_channels


def _latents(weights: Mapping[str, torch.Tensor]) -> int | None:
    patch = weights.get("patch_embedding.weight")
    return None if patch is None else int(patch.shape[1])


def _root(path: Path, base: str | Path | None, alone: bool) -> str | Path:
    """Where the rest of a pipeline comes from. Raises ConfigError if nothing says so."""
    if base is not None:
        return base
    if (path / "model_index.json").is_file():
        return path
    raise ConfigError(
        f"{path} holds {'a LoRA' if alone else 'the denoiser'} alone: give a pipeline to load it into "
        "(load_causal_checkpoint(path, pipe)) or base=, a diffusers folder or hub id of the same Wan model, for the text "
        "encoder and the VAE"
    )


def _index(root: str | Path) -> dict[str, Any]:
    file = Path(root).expanduser() / "model_index.json"
    return read_json(file) if file.is_file() else {}


def _with_boundary(recipe: CausalRecipe, denoisers: int, config: Mapping[str, Any]) -> CausalRecipe:
    """The recipe with the pipeline's own boundary between two denoisers, where it names none."""
    if denoisers == 1 or recipe.boundary is not None:
        return recipe
    if (boundary := config.get("boundary_ratio")) is None:
        raise ConfigError(
            f"the recipe {recipe.name} and the pipeline do not say which of two denoisers runs when; give boundary=0.875, "
            "or what noise level the checkpoint was trained with"
        )
    return recipe.replace(boundary=boundary)
