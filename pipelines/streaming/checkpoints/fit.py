"""Put weights into a denoiser, after everything has been checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.streaming.checkpoints.lora import Change
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.text_format import counted

_NOT_USED = "norm_added_q"  # some checkpoints with an image encoder have it; diffusers has no use for it either


def check_fit(
    what: str, weights: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], files: Mapping[str, str]
) -> None:
    """Raises ModelError unless ``weights`` are the ``wanted`` ones, by names and sizes.

    files: the name that a weight has in the file, for the message.
    """
    missing = [name for name in wanted if name not in weights]
    extra = [files.get(name, name) for name in weights if name not in wanted and _NOT_USED not in name]
    sizes = [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    if not (missing or extra or sizes):
        return
    lines = [
        f"{counted(count, 'weight')} {text}: {_first(names, 4)}"
        for names, text in ((missing, "missing"), (extra, "too much"), (sizes, "of another size"))
        if (count := len(names))
    ]
    hint = ""
    if len(missing) == len(wanted):
        hint = ". None of its weights is one of a Wan denoiser"
    elif sizes and not (missing or extra):
        hint = ". It may be a checkpoint of another model size"
    elif any(".base_layer." in name or ".lora_" in name for name in wanted):
        hint = ". The pipeline has a LoRA loaded; take it off first (pipe.unload_lora_weights())"
    elif any(".to_qkv." in name for name in wanted):
        hint = ". The pipeline's projections are fused; load before fuse_qkv_projections()"
    raise ModelError(f"{what} does not fit the denoiser: {'; '.join(lines)}{hint}. Nothing was changed")


def check_changes(what: str, changes: Mapping[str, Change], wanted: Mapping[str, torch.Tensor]) -> None:
    """Raises ModelError unless every change of a LoRA has a weight of its size."""
    extra = [name for name in changes if name not in wanted]
    sizes = [
        f"{name} is {tuple(wanted[name].shape)}, its LoRA {change.shape}"
        for name, change in changes.items()
        if name in wanted and tuple(wanted[name].shape) != change.shape
    ]
    if extra or sizes:
        lines = [f"no weight {_first(extra, 4)} in the denoiser"] if extra else []
        lines += [_first(sizes, 4)] if sizes else []
        raise ModelError(f"the LoRA of {what} does not fit: {'; '.join(lines)}. Nothing was changed")


def check_writable(module: torch.nn.Module) -> None:
    """Raises ConfigError for a denoiser whose weights cannot be replaced in place."""
    for name, weight in module.named_parameters():
        if weight.is_meta:
            raise ConfigError(
                f"the weight {name} of the pipeline's denoiser is on the meta device; load the checkpoint before "
                "enable_sequential_cpu_offload()"
            )
        if not weight.is_floating_point() or type(weight) is not torch.nn.Parameter:
            raise ConfigError(
                f"the pipeline's denoiser is quantized ({name} is {type(weight).__name__} of {weight.dtype}); load the "
                "checkpoint into an ordinary pipeline and quantize it afterwards"
            )


@torch.no_grad()
def put(
    module: torch.nn.Module, weights: Mapping[str, torch.Tensor], changes: Mapping[str, Change], scale: float
) -> None:
    """Copies weights, with a LoRA added, into a module in place. Devices and dtypes stay the module's own."""
    own = module.state_dict()
    for name, weight in own.items():
        source = weights.get(name)
        if name in changes:
            before = weight if source is None else source.to(weight.device, torch.float32)
            weight.copy_(changes[name].added_to(before, scale))
        elif source is not None:
            weight.copy_(source)


def build(
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    changes: Mapping[str, Change],
    scale: float,
    dtype: torch.dtype,
    check: Callable[[Mapping[str, torch.Tensor]], None],
) -> Any:
    """A `WanTransformer3DModel` on the CPU; the parts that diffusers keeps in float32 stay so.

    check: called with the weights that the model wants, before any is read.
    """
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    with init_empty_weights(include_buffers=False):  # the rotary tables are buffers, and computed here
        model: Any = WanTransformer3DModel(**config)
    wanted = model.state_dict()
    check(wanted)
    exact = set(model._keep_in_fp32_modules or ())
    filled = {}
    for name in wanted:
        kind = torch.float32 if exact & set(name.split(".")) else dtype
        source = weights[name]
        if name in changes:
            source = changes[name].added_to(source.to(torch.float32), scale)
        filled[name] = source.to(kind, copy=True)  # not the file's own memory, which may go away
    model.load_state_dict(filled, assign=True)
    return model.eval()


def _first(names: Iterable[str], count: int) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
