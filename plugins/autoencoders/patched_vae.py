"""A patched ``AutoencoderKLWan``: its own ``decode`` and ``encode`` run the fused forward of ``wan_fused.py``.

Forwards of four modules are replaced and nothing else: those of the decoder and the encoder, which the stock code calls for each
latent with a feature cache of its own (each tile's, where tiling is on), and of the two 1×1 convolutions between them and the
latents, which take a whole clip at once. The latter go latent by latent, so that a stream, which does not have the whole clip,
gives the same bits. Slicing, tiling, offloading and the hooks of other libraries stay as they are.

Where the fused forward would not compute what the stock one does, or on a device where it is no faster, the stock one runs.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from tilewise.plugins.autoencoders import wan_checks
from tilewise.plugins.autoencoders.wan_fused import FusedPass
from tilewise.plugins.diffusers_compat import another, unwrapped, wan_vae_modules
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.hooks.deepcopy import COPIER, STATE, copy_without, shallow_state
from tilewise.plugins.hooks.forward_override import ForwardOverride, override_forward
from tilewise.plugins.torch_compat import runs_compiled

ATTRIBUTE = "_tilewise"  # what a patch adds to a VAE, besides those for copies


class Kind(NamedTuple):
    """What calls of a patched VAE's decoder or encoder are counted by."""

    what: str  # "decoder" or "encoder"
    reason: str  # why the stock code ran; "" where the fused did

    @property
    def fused(self) -> bool:
        return not self.reason


class VaePatch:
    """What is put on one VAE, and how often its decoder and encoder ran fused."""

    name = "vae"

    def __init__(self, vae: Any) -> None:
        self.calls: Counter[Kind] = Counter()
        self.lock = threading.Lock()
        self.left_alone: dict[str, str] = {}  # modules that run the stock code in any case → why
        self._handles: list[ForwardOverride] = []
        kinds = wan_vae_modules()
        try:
            self._put_on("decoder", vae.decoder, kinds.decoder, _run_part)
            self._put_on("encoder", vae.encoder, kinds.encoder, _run_part)
            self._put_on("post_quant_conv", vae.post_quant_conv, kinds.conv, _convolve_latents)
            self._put_on("quant_conv", vae.quant_conv, kinds.conv, _convolve_latents)
        except BaseException:
            self.remove(vae)
            raise
        setattr(vae, ATTRIBUTE, self)
        setattr(vae, COPIER, functools.partial(_copied, self, vae))
        setattr(vae, STATE, functools.partial(shallow_state, self, vae))

    def _put_on(self, name: str, module: Any, kind: Any, function: Any) -> None:
        if type(module) is not kind:
            self.left_alone[name] = f"it is {another(module, kind)}"
        elif any(map(runs_compiled, module.modules())):
            self.left_alone[name] = "it is compiled"
        elif (override := override_forward(module, function, self)) is not None:
            self._handles.append(override)
        else:
            self.left_alone[name] = "something else replaced its forward"

    def remove(self, vae: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name in (ATTRIBUTE, COPIER, STATE):
            vae.__dict__.pop(name, None)

    @property
    def handles(self) -> list[ForwardOverride]:
        return list(self._handles)

    def __reduce__(self) -> Any:
        raise TilewiseError(
            "a patched VAE cannot be pickled or saved with torch.save, nor its pipeline: its forwards belong to the patch. Call "
            "tilewise.unpatch first, or save the weights alone with save_pretrained or state_dict"
        )

    def count(self, what: str, reason: str | None) -> None:
        with self.lock:
            self.calls[Kind(what, reason or "")] += 1


def vae_of(target: Any) -> nn.Module | None:
    """The ``AutoencoderKLWan`` of a pipeline, inside what wraps it; None where it has another, or none."""
    vae = getattr(target, "vae", None)
    if isinstance(target, nn.Module) or not isinstance(vae, nn.Module):
        return None
    vae = unwrapped(vae)
    return vae if isinstance(vae, wan_vae_modules().autoencoder) else None


def patch_on(vae: nn.Module | None) -> VaePatch | None:
    """The patch of a VAE, if there is one."""
    return None if vae is None else vae.__dict__.get(ATTRIBUTE)


@contextmanager
def fused_vae(target: Any) -> Iterator[None]:
    """``with fused_vae(pipe): …``: a pipeline's ``AutoencoderKLWan`` alone is patched for the length of a block, if it is not."""
    vae = vae_of(target)
    added = None if vae is None or patch_on(vae) is not None else vae
    if added is not None:
        VaePatch(added)
    try:
        yield
    finally:
        patch = patch_on(added)  # another one, where something patched the pipeline in the block
        if added is not None and patch is not None:
            patch.remove(added)


def _run_part(override: ForwardOverride, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of ``WanDecoder3d`` and ``WanEncoder3d``."""
    if override.state is None or torch.compiler.is_compiling():
        return override.stock(x, *args, **kwargs)
    module: Any = override.module
    decodes = type(module) is wan_vae_modules().decoder
    cache, index = kwargs.get("feat_cache"), kwargs.get("feat_idx")
    if args or cache is None or index != [0]:
        reason: str | None = "it is called without a feature cache"
    else:
        reason = wan_checks.why_stock(module, x)
    override.state.count("decoder" if decodes else "encoder", reason)
    if reason is not None or cache is None or index is None:
        return override.stock(x, *args, **kwargs)
    fused = FusedPass(cache, bool(kwargs.get("first_chunk")))
    out = fused.decode(module, x) if decodes else fused.encode(module, x)
    index[0] = fused.next
    return out


def _convolve_latents(override: ForwardOverride, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of a 1×1 convolution: one latent frame at a time, as streams have them."""
    alone = args or kwargs or x.ndim != 5 or x.shape[2] < 2 or torch.is_grad_enabled()
    if override.state is None or alone or torch.compiler.is_compiling() or not wan_checks.fuses_on(x.device):
        return override.stock(x, *args, **kwargs)
    return torch.cat([override.stock(latent) for latent in x.split(1, 2)], 2)


def _copied(patch: VaePatch, vae: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What ``copy.deepcopy(vae, memo)`` gives: patched alike, with counts of its own."""
    memo[id(patch)] = patch  # overrides that know it are copied, and removed
    copied = copy_without(vae, patch.handles, {ATTRIBUTE, COPIER, STATE}, memo)
    VaePatch(copied)
    return copied
