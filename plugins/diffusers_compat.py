"""Everything that tilewise uses of diffusers (and accelerate) that is no public API, one function or constant each; what step
caches need is in ``step_caches/diffusers_compat.py``.

Such names may change in any release. Each entry says which symbol it stands for, where it was seen, and what stops working when
it changes; tests/plugins/test_diffusers_compat.py has a test for each, which fails then. "0.42" is 0.42.1; the upper bound in
pyproject.toml is raised when the tests pass with a new release. Nothing here imports diffusers before it is called.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from tilewise.plugins.torch_compat import uncompiled


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside what ``torch.compile(model)`` and ``peft.get_peft_model(model, …)`` returned, in any order.

    ``PeftModel.forward`` calls the model as a module, so that its hooks run. Seen in PEFT 0.21. If it calls the model's
    ``forward`` instead, a patch inside a PeftModel is not told of forwards.
    """
    peft = sys.modules.get("peft")  # where it was never imported, nothing is its
    while True:
        inner = uncompiled(module)
        if peft is not None and isinstance(inner, peft.PeftModel):
            inner = inner.get_base_model()
        if inner is module:
            return module
        module = inner


def unsplit(module: Any) -> Any:
    """The module inside a ``SplitInferenceModule``, which runs it on a part of the batch at a time (FreeNoise).

    Not exported by diffusers; seen in ``pipelines.free_noise_utils`` in 0.42, with the inner one as ``module``. If it moves, the
    layers inside are not found after ``enable_free_noise_split_inference``.
    """
    from diffusers.pipelines.free_noise_utils import SplitInferenceModule

    while isinstance(module, SplitInferenceModule):
        module = module.module
    return module


# ── attention processors ──────────────────────────────────────────────────────────────────────────────────────────────

DISPATCH = "dispatch_attention_fn"
"""The global name by which processors call ``dispatch_attention_fn`` of ``diffusers.models.attention_dispatch``. Seen in 0.42.
Processors that call it otherwise cannot be taken over: their layers stay dense, and are reported."""


SAVED_PROCESSORS = "original_attn_processors"
"""The attribute in which a denoiser's ``fuse_qkv_projections`` keeps the processors that it replaces, by name, for
``unfuse_qkv_projections``. Seen in 0.42 on SD 3, CogVideoX and UNets. If it is renamed, unfusing after ``unpatch`` puts a
patch's processors on the layers; as it is off, they run stock."""


def call_with_sdpa(kind: type) -> Any:
    """The ``__call__`` that a processor class defines; for ``AttnProcessor`` that of ``AttnProcessor2_0``: the same attention in
    PyTorch's function instead of two products. UNets get an ``AttnProcessor`` from ``set_default_attn_processor``. Seen in 0.42.
    If it moves, patching fails."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    return (AttnProcessor2_0 if kind is AttnProcessor else kind).__dict__.get("__call__")


def dispatch_options(processor: Any) -> dict[str, Any]:
    """What a processor hands to the dispatcher besides tensors: its ``_attention_backend`` and ``_parallel_config``.

    Seen in 0.42 on most processors that call the dispatcher, those among them whose code a family repeats.
    ``set_attention_backend`` and ``enable_parallelism`` set them, where they are. Under other names that code raises
    ``AttributeError``.
    """
    return {"backend": processor._attention_backend, "parallel_config": processor._parallel_config}


class ContextParallel(NamedTuple):
    """What diffusers' ``ContextParallelConfig`` says once it is set up.

    ulysses, ring: the two degrees. rank: this process's number among those that a sequence is split over. group: their process
    group. anything: whether lengths are split that the degree does not divide (``ulysses_anything``, ``ring_anything``).
    """

    ulysses: int
    ring: int
    rank: int
    group: Any
    anything: bool


def context_parallel(holder: Any) -> ContextParallel | None:
    """How the tokens of a denoiser are split over processes, or None: from the ``_parallel_config`` that ``enable_parallelism``
    gives the denoiser and each of its processors, a ``ParallelConfig`` with a ``context_parallel_config``.

    holder: a denoiser, a processor, or such a config. Its ``_flattened_mesh`` is what diffusers' hooks split and gather over.
    Seen in 0.42. Under other names, a sharded denoiser would run as if each rank had all tokens.
    """
    found = _context_parallel_config(holder)
    if found is None:
        return None
    ulysses, ring, anything = parallel_degrees(holder)
    mesh = found._flattened_mesh
    return ContextParallel(ulysses, ring, mesh.get_local_rank(), mesh.get_group(), anything)


def _context_parallel_config(holder: Any) -> Any:
    return getattr(getattr(holder, "_parallel_config", holder), "context_parallel_config", None)


def is_sharded(holder: Any) -> bool:
    """Whether context parallelism is enabled for a denoiser or a processor: as ``context_parallel`` finds it, but without asking
    for process groups, which torch.compile cannot trace."""
    return _context_parallel_config(holder) is not None


def parallel_degrees(holder: Any) -> tuple[int, int, bool]:
    """(Ulysses degree, ring degree, whether any length may be split) of a holder that is sharded; see ``context_parallel``."""
    found = _context_parallel_config(holder)
    return found.ulysses_degree, found.ring_degree, found.ulysses_anything or found.ring_anything


RESOLVE_PARALLEL = "_resolve_parallel_config"
"""The method of a denoiser by which ``enable_parallelism`` sets a config up. Without an accelerator it divides by the number of
devices, which is 0. Seen in 0.42. If it is renamed, context parallelism cannot be enabled on a CPU."""


def set_up_on_cpu(denoiser: Any, config: Any) -> Any:
    """What ``ModelMixin._resolve_parallel_config`` does with a ``ContextParallelConfig``, for ranks on CPUs. Seen in 0.42."""
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    mesh = config.mesh or init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    whole = ParallelConfig(context_parallel_config=config)
    whole.setup(distributed.get_rank(), distributed.get_world_size(), torch.device("cpu"), mesh=mesh)
    denoiser._parallel_config = whole
    return whole


def split_input(axis: int, ndim: int, *, output: bool = False) -> Any:
    """An entry of a context parallel plan: a tensor with so many axes is split along one of them, before its module's forward or,
    where it is an ``output``, after. ``ContextParallelInput``, which diffusers does not export; seen in
    ``models._modeling_parallel`` in 0.42. If it moves, models without a plan in diffusers cannot be split."""
    from diffusers.models._modeling_parallel import ContextParallelInput

    return ContextParallelInput(split_dim=axis, expected_dims=ndim, split_output=output)


def gathered_output(axis: int, ndim: int) -> Any:
    """An entry of a context parallel plan: a module's output is put together along an axis.
    ``ContextParallelOutput``, as above."""
    from diffusers.models._modeling_parallel import ContextParallelOutput

    return ContextParallelOutput(gather_dim=axis, expected_dims=ndim)


def change_arguments(denoiser: nn.Module, change: Callable[[nn.Module, dict[str, Any]], None], name: str) -> None:
    """Have ``change`` called with the denoiser and the arguments of each forward, by parameter, before any
    hook of diffusers that is on by now.

    A ``ModelHook``, which ``HookRegistry`` puts around those registered before it. Seen in ``diffusers.hooks.hooks`` in 0.42. If
    it moves, context parallelism cannot be enabled on models with a timestep for each token.
    """
    from diffusers.hooks.hooks import HookRegistry, ModelHook

    parameters = [
        parameter for parameter in inspect.signature(type(denoiser).forward).parameters if parameter != "self"
    ]

    class Change(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            change(module, given)
            return (), given

    HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(Change(), name)


def wrap_forward(denoiser: nn.Module, run: Callable[..., Any], name: str) -> None:
    """Have forwards of a denoiser answered by ``run(stock, denoiser, args, kwargs)``. stock: the forward with all hooks of
    diffusers that are on by now.

    A ``ModelHook`` with ``new_forward``, which finds what it replaces as ``fn_ref.original_forward``. Seen in
    ``diffusers.hooks.hooks`` in 0.42. If it changes, CFG parallelism cannot be enabled.
    """
    from diffusers.hooks.hooks import HookRegistry, ModelHook

    class Wrap(ModelHook):
        wrapper = staticmethod(run)

        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            stock: Any = self.fn_ref.original_forward
            return run(stock, module, args, kwargs)

    HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(Wrap(), name)


def forward_wrapper(denoiser: nn.Module, name: str) -> Any:
    """The ``run`` that ``wrap_forward`` put on a denoiser under a name, or None."""
    return getattr(getattr(getattr(denoiser, "_diffusers_hook", None), "hooks", {}).get(name), "wrapper", None)


@contextmanager
def inside_split_hooks(denoiser: nn.Module) -> Iterator[None]:
    """Hooks that are put on modules of a denoiser in the ``with`` block run inside those of context parallelism, which are taken
    off before it, and put on again after it.

    ``ContextParallelSplitHook`` and ``ContextParallelGatherHook`` of ``diffusers.hooks.context_parallel``. Seen in 0.42. If they
    are renamed, step caches that come after context parallelism mix whole sequences and parts.
    """
    from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook

    off = []
    for module in denoiser.modules():
        registry: Any = None if module is denoiser else getattr(module, "_diffusers_hook", None)
        for name, hook in reversed(list(getattr(registry, "hooks", {}).items())):
            if isinstance(hook, ContextParallelGatherHook | ContextParallelSplitHook):
                registry.remove_hook(name, recurse=False)
                off.append((registry, hook, name))
    try:
        yield
    finally:
        for registry, hook, name in reversed(off):
            registry.register_hook(hook, name)


def gather_hooks(denoiser: nn.Module) -> Iterator[tuple[Any, list[int | None]]]:
    """The hooks by which context parallelism puts a denoiser's output together, and along which axis each of the outputs is
    gathered (None: it is not).

    ``ContextParallelGatherHook`` of ``diffusers.hooks.context_parallel``, with ``metadata``. Seen in 0.42. gloo gathers tensors
    of one size only, which the hook does not go by; if it is renamed, other lengths fail on a CPU.
    """
    from diffusers.hooks.context_parallel import ContextParallelGatherHook

    for module in denoiser.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            if isinstance(hook, ContextParallelGatherHook):
                outputs: Any = hook.metadata
                yield hook, [None if output is None else output.gather_dim for output in outputs]


def replace_post_forward(hook: Any, function: Callable[[nn.Module, Any], Any]) -> None:
    """Another ``post_forward(module, output)`` for a hook that is on a module: on the hook, for when it is put on anew, and in
    its ``fn_ref``, which is what runs. Seen in 0.42, as above."""
    hook.post_forward = hook.fn_ref.post_forward = function


def is_default_backend(backend: Any) -> bool:
    """Whether a dispatcher's ``backend`` argument, or diffusers' active backend where that is None, is PyTorch's own choice.

    ``attention_dispatch._AttentionBackendRegistry.get_active_backend()`` returns (name, function), and
    ``AttentionBackendName.NATIVE`` is a string enum. Seen in 0.42. If they change, dense attention in our kernel fails
    (``AttributeError``) or replaces a backend that was chosen.
    """
    from diffusers.models import attention_dispatch

    if backend is None:
        backend = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    return backend == attention_dispatch.AttentionBackendName.NATIVE


# ── hooks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def kept_forwards(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where hooks keep the forward that they wrap, as (object, attribute): the outermost first, the module itself not included.

    diffusers' ``HookRegistry`` is the module's ``_diffusers_hook``; its ``_fn_refs`` have ``forward`` and, for hooks with a
    forward of their own, ``original_forward``. Seen in 0.42. accelerate's ``add_hook_to_module`` uses ``_old_forward``, seen in
    1.15. If they change, blocks under hooks are not found, and run stock instead of fused: ``summary`` says so.
    """
    for reference in getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ()):
        yield reference, "original_forward"
        yield reference, "forward"
    yield module, "_old_forward"


STEP_CACHE_HOOKS = (
    "fbc_leader_block_hook", "fbc_block_hook", "taylorseer_cache", "mag_cache_leader_block_hook", "mag_cache_block_hook",
    "sea_cache_root", "sea_cache_leader_block", "sea_cache_block", "sea_cache_post_norm", "pyramid_attention_broadcast",
    "faster_cache_denoiser", "faster_cache_block",
)  # fmt: skip
"""Names under which diffusers' step caches register their hooks. Seen in 0.42. ``TextKVCache`` reuses nothing of another step."""


def step_cache_hooks(denoiser: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """The hooks of diffusers' step caches on a denoiser and its modules: (module, name, hook)."""
    for module in denoiser.modules():
        for name, hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).items():
            if name in STEP_CACHE_HOOKS:
                yield module, name, hook


def step_cache(denoiser: nn.Module) -> str | None:
    """Which library's step cache is enabled on a denoiser, or None.

    diffusers' ``CacheMixin`` has ``is_cache_enabled``, seen in 0.42; ``apply_first_block_cache`` and the like leave only their
    hooks. cache-dit 1.5 and ParaAttention 0.3 set ``_is_cached`` on the denoiser. If they change, ``highres`` starts with a cache
    that skips blocks, and fails at the first one that was skipped.
    """
    if getattr(denoiser, "is_cache_enabled", False):
        return "diffusers: disable_cache()"
    if any(True for _ in step_cache_hooks(denoiser)):
        return "hooks of diffusers"
    return "cache-dit or ParaAttention" if getattr(denoiser, "_is_cached", False) else None


# ── pipelines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def execution_device(pipe: Any, otherwise: torch.device) -> torch.device:
    """Where a pipeline runs its models, offloaded ones included: ``DiffusionPipeline._execution_device``.

    Seen in 0.42. ``otherwise``: for objects that have none. If it is renamed, an offloaded model's inputs are put on the CPU.
    """
    device: torch.device = getattr(pipe, "_execution_device", otherwise)
    return device


def current_timestep(pipe: Any) -> Any:
    """The timestep that a running pipeline is at, as its loop has it; None outside of a run or where it does not say.

    ``_current_timestep``, which most pipelines set in their loop. Seen in 0.42. Without it, the scheduler's count is used.
    """
    return getattr(pipe, "_current_timestep", None)


def timesteps_to_run(pipe: Any) -> int | None:
    """How many of the scheduler's timesteps a pipeline runs; None where it does not say.

    ``_num_timesteps``, which most pipelines set before their loop. Seen in 0.42. Without it, the steps of video-to-video count
    from 0 before the first ``scheduler.step``, and the end of a run that leaves timesteps out is not recognised.
    """
    return getattr(pipe, "_num_timesteps", None)


def holds_both_prompts(pipe: Any) -> bool:
    """Whether forwards of a pipeline's run hold the samples of the negative prompt, and behind them as many of the prompt: its
    ``do_classifier_free_guidance``. Seen in 0.42 on pipelines of UNets and of SD 3. Those that call the denoiser once for each
    prompt have no such attribute, or have batches of one. If it is renamed, all samples count as the prompt's.
    """
    return bool(getattr(pipe, "do_classifier_free_guidance", False))


def source_of(pipe: Any) -> str:
    """The folder or repository that a pipeline was loaded from, or "": ``_name_or_path`` in its config.

    ``from_pretrained`` sets it, seen in 0.42. If it is renamed, a model's ``tilewise.json`` is not found, and clips are labelled
    with the pipeline's class.
    """
    return str(getattr(getattr(pipe, "config", None), "_name_or_path", None) or "")


def is_enabled(guider: Any) -> bool:
    """Whether a guider guides: ``BaseGuidance._enabled``, seen in 0.42. If it is renamed, its guidance scale cannot be given."""
    return bool(getattr(guider, "_enabled", False))


def pack_latents(pipe: Any, *args: Any) -> torch.Tensor:
    """Latents as the pipeline's call takes them: ``_pack_latents`` of Flux, Qwen-Image and LTX, each with its own arguments.

    Seen in 0.42. If it changes, the second stage of ``highres`` fails for these pipelines.
    """
    return pipe._pack_latents(*args)


def unpack_latents(pipe: Any, *args: Any) -> torch.Tensor:
    """The way back: ``_unpack_latents``, see ``pack_latents``."""
    return pipe._unpack_latents(*args)


def kandinsky5_rope_scale(pipe: Any, height: int, width: int) -> tuple[float, ...]:
    """What Kandinsky 5 scales its positions with at a size in pixels: ``Kandinsky5T2VPipeline._get_scale_factor``.

    Seen in 0.42. If it changes, ``highres`` fails for this pipeline.
    """
    return tuple(pipe._get_scale_factor(height, width))


def flux2_mu(tokens: int, steps: int) -> float:
    """How far Flux.2 shifts its schedule: ``compute_empirical_mu`` of its pipeline's module, where it is no part of the API.

    Seen in 0.42. If it moves, ``highres`` fails for Flux.2.
    """
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return float(compute_empirical_mu(tokens, steps))


# ── models ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def another(found: Any, known: type) -> str:
    """How a report calls an object that is not of class ``known``, as in "a MyBlock, not diffusers' WanBlock"."""
    kind = type(found)
    where = f" of {kind.__module__}" if kind.__name__ == known.__name__ else ""
    whose = "PyTorch's" if known.__module__.startswith("torch.") else "diffusers'"
    return f"a {kind.__name__}{where}, not {whose} {known.__name__}"


class WanModules(NamedTuple):
    """The classes whose code ``models/fused/wan.py`` repeats in fused kernels. Any: their attributes are looked at."""

    block: Any
    attention: Any
    processor: Any
    layer_norm: Any
    feed_forward: Any
    gelu: Any


@cache
def wan_modules() -> WanModules:
    """``WanTransformerBlock``, ``WanAttention``, ``WanAttnProcessor``, ``FP32LayerNorm``, ``FeedForward`` and ``GELU``.

    Not exported by diffusers; seen in these modules in 0.42. Fused kernels stand in for these very classes: where a model has
    others, the stock code runs, and ``explain`` and ``summary`` say so. If the code of one changes and its name does not, fused
    kernels compute what it was: the tests compare them with it.
    """
    from diffusers.models.activations import GELU
    from diffusers.models.attention import FeedForward
    from diffusers.models.normalization import FP32LayerNorm
    from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock

    return WanModules(WanTransformerBlock, WanAttention, WanAttnProcessor, FP32LayerNorm, FeedForward, GELU)


class WanVaeModules(NamedTuple):
    """The classes whose code ``autoencoders/wan_fused.py`` repeats in fused kernels. Any: their attributes are looked at."""

    autoencoder: Any
    decoder: Any
    encoder: Any
    middle: Any
    up_block: Any
    residual_up_block: Any
    residual_down_block: Any
    residual_block: Any
    attention: Any
    resample: Any
    upsample: Any
    repeat: Any
    mean: Any
    norm: Any
    conv: Any


@cache
def wan_vae_modules() -> WanVaeModules:
    """``AutoencoderKLWan`` and the classes of its parts, in the order above.

    The parts are not exported by diffusers; seen in this module in 0.42. As for ``wan_modules``: where a VAE has others, the
    stock code runs, and ``summary`` says so.
    """
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    return WanVaeModules(
        wan.AutoencoderKLWan, wan.WanDecoder3d, wan.WanEncoder3d, wan.WanMidBlock, wan.WanUpBlock, wan.WanResidualUpBlock,
        wan.WanResidualDownBlock, wan.WanResidualBlock, wan.WanAttentionBlock, wan.WanResample, wan.WanUpsample, wan.DupUp3D,
        wan.AvgDown3D, wan.WanRMS_norm, wan.WanCausalConv3d,
    )  # fmt: skip


def wan_patches(x: torch.Tensor, size: int | None, *, inverse: bool) -> torch.Tensor:
    """``patchify``, or its inverse ``unpatchify``, of ``diffusers.models.autoencoders.autoencoder_kl_wan``, for a VAE's
    ``config.patch_size``. Seen in 0.42. If they move, streams of Wan 2.2 fail at their first chunk."""
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    patches: torch.Tensor = x if size is None else (wan.unpatchify if inverse else wan.patchify)(x, patch_size=size)
    return patches


def before_call(model: Any) -> None:
    """What diffusers' ``apply_forward_hook`` does before a VAE's ``decode`` and ``encode``: the ``pre_forward`` of accelerate's
    ``_hf_hook``, which loads an offloaded model. Seen in accelerate 1.15. If it is renamed, a stream whose VAE is offloaded fails
    at its first chunk."""
    hook: Any = getattr(model, "_hf_hook", None)
    if hasattr(hook, "pre_forward"):
        hook.pre_forward(model)


@cache
def hunyuan_video15_processor() -> type:
    """``HunyuanVideo15AttnProcessor2_0``, whose code ``models/hunyuan_video15.py`` repeats with another mask.

    Not exported by diffusers; seen in this module in 0.42. A model with another processor runs that one, with its mask over pairs
    of tokens, and ``explain`` and ``summary`` say so.
    """
    from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0

    return HunyuanVideo15AttnProcessor2_0


def apply_rotary(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], *, token_axis: int) -> torch.Tensor:
    """``x`` rotated by (cos, sin): ``diffusers.models.embeddings.apply_rotary_emb``, which processors import from there.

    Seen in 0.42. If it moves, HunyuanVideo 1.5 fails at its first attention call.
    """
    from diffusers.models import embeddings

    rotated: Any = embeddings.apply_rotary_emb
    out: torch.Tensor = rotated(x, tables, sequence_dim=token_axis)
    return out
