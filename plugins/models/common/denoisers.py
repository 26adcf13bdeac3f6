"""The denoisers of a pipeline, inside whatever wraps them."""

from __future__ import annotations

from typing import Any

from torch import nn

from tilewise.plugins.diffusers_compat import unwrapped
from tilewise.plugins.errors import UnsupportedModelError
from tilewise.plugins.models.common.registry import family_of, supported_models

DENOISERS = ("transformer", "transformer_2", "unet")
ATTRIBUTE = "_tilewise"  # what a patch adds to a denoiser, besides the COPIER for copy.deepcopy


def denoisers_of(target: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by attribute name, or the module itself as "denoiser"; inside what wraps them (torch.compile,
    PEFT).

    Raises:
        UnsupportedModelError: if there is none, or one that no family serves.
    """
    denoisers = find_denoisers(target)
    if not denoisers:
        raise UnsupportedModelError(
            f"{type(target).__name__} has no denoiser: none of {', '.join(DENOISERS)} is a module. Give a diffusers pipeline, "
            "or the denoiser itself"
        )
    for name, module in denoisers.items():
        if family_of(module) is None:
            served = "; ".join(f"{family}: {', '.join(classes)}" for family, classes in supported_models().items())
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}, which no family adapter serves (served: {served}). Nothing was "
                "patched. To add it, subclass tilewise.Family (see tilewise.plugins.models.wan) and call tilewise.register_family"
            )
    return denoisers


def find_denoisers(target: Any) -> dict[str, nn.Module]:
    """``denoisers_of`` a target that may have none, or some that no family serves."""
    found = {name: getattr(target, name, None) for name in DENOISERS}
    denoisers = {name: unwrapped(module) for name, module in found.items() if isinstance(module, nn.Module)}
    if isinstance(target, nn.Module) and (not denoisers or family_of(unwrapped(target)) is not None):
        denoisers = {"denoiser": unwrapped(target)}
    return denoisers
