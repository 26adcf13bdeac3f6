"""What tilewise uses of diffusers, accelerate and PyTorch that is no public API: each test fails when its symbol changes."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types
from pathlib import Path
from typing import Any

import accelerate.hooks
import diffusers
import peft
import pytest
import torch
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from diffusers.hooks.hooks import HookRegistry, ModelHook
from diffusers.models._modeling_parallel import ParallelConfig
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin, SplitInferenceModule
from torch import nn

import tilewise
from tilewise.pipelines.latent_spaces.base import latent_spaces
from tilewise.pipelines.loading import load, model_defaults
from tilewise.plugins import diffusers_compat as compat
from tilewise.plugins import torch_compat
from tilewise.plugins.models.common.native_size import IN_THE_CODE
from tilewise.plugins.runtime.attention_request import AttentionRequest


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def module_of(name: str) -> Any:
    return sys.modules[getattr(diffusers, name).__module__]


def test_models_inside_what_wraps_them():
    lora = peft.LoraConfig(target_modules=["conv1"])
    model, other = tiny_unet(), tiny_unet()
    assert compat.unwrapped(model) is model
    wrapped = peft.get_peft_model(model, lora)
    assert compat.unwrapped(wrapped) is compat.unwrapped(torch.compile(wrapped)) is model
    assert compat.unwrapped(peft.get_peft_model(torch.compile(other), lora)) is other
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    wrapped(torch.zeros(1, 3, 8, 8), 1)
    assert calls == [1]


def test_modules_that_are_run_in_parts():
    module = nn.Linear(2, 2)
    assert compat.unsplit(SplitInferenceModule(SplitInferenceModule(module))) is compat.unsplit(module) is module
    assert f"{SplitInferenceModule.__name__}(" in inspect.getsource(
        AnimateDiffFreeNoiseMixin._enable_split_inference_attentions_
    )


# ── attention processors ──────────────────────────────────────────────────────────────────────────────────────────────

DISPATCHING = {  # a denoiser, and the processors beside it
    "CosmosTransformer3DModel": ["CosmosAttnProcessor2_0", "CosmosAttnProcessor2_5"],
    "FluxTransformer2DModel": ["FluxAttnProcessor"],
    "Flux2Transformer2DModel": ["Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"],
    "HunyuanVideoTransformer3DModel": ["HunyuanVideoAttnProcessor2_0"],
    "HunyuanVideo15Transformer3DModel": ["HunyuanVideo15AttnProcessor2_0"],
    "Kandinsky5Transformer3DModel": ["Kandinsky5AttnProcessor"],
    "LTXVideoTransformer3DModel": ["LTXVideoAttnProcessor"],
    "LTX2VideoTransformer3DModel": ["LTX2AudioVideoAttnProcessor"],
    "QwenImageTransformer2DModel": ["QwenDoubleStreamAttnProcessor2_0"],
    "SkyReelsV2Transformer3DModel": ["SkyReelsV2AttnProcessor"],
    "WanTransformer3DModel": ["WanAttnProcessor"],
    "ZImageTransformer2DModel": ["ZSingleStreamAttnProcessor"],
}


@pytest.mark.parametrize(("model", "name"), [(m, name) for m, names in DISPATCHING.items() for name in names])
def test_processors_look_the_dispatcher_up_by_its_name(model, name):
    module = module_of(model)
    call = getattr(module, name).__call__
    helpers = [getattr(module, n, None) for n in call.__code__.co_names]  # functions that ask on its behalf
    codes = [f.__code__ for f in [call, *helpers] if isinstance(f, types.FunctionType)]
    assert any(compat.DISPATCH in code.co_names for code in codes)
    assert getattr(module, compat.DISPATCH) is dispatch_attention_fn


def test_our_dispatcher_takes_what_the_stock_one_does():
    ours = [name for name in parameters(AttentionRequest) if name not in ("fused", "qk_order", "rank_order")]
    assert ours == parameters(dispatch_attention_fn)


def test_an_older_processor_has_a_like_that_calls_sdpa():
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    assert "scaled_dot_product_attention" not in AttnProcessor.__call__.__code__.co_names
    assert compat.call_with_sdpa(AttnProcessor) is AttnProcessor2_0.__call__ is compat.call_with_sdpa(AttnProcessor2_0)
    assert parameters(AttnProcessor.__call__) == parameters(AttnProcessor2_0.__call__)
    assert compat.call_with_sdpa(type("Own", (AttnProcessor2_0,), {})) is None


@pytest.mark.parametrize("model", ["UNet2DConditionModel", "SD3Transformer2DModel", "CogVideoXTransformer3DModel"])
def test_where_fusing_keeps_the_processors_that_it_replaces(model):
    assert compat.SAVED_PROCESSORS in getattr(diffusers, model).unfuse_qkv_projections.__code__.co_names


@pytest.mark.parametrize("processor", [compat.wan_modules().processor, compat.hunyuan_video15_processor()])
def test_options_of_a_processor(processor):
    processor = processor()
    assert compat.dispatch_options(processor) == {"backend": None, "parallel_config": None}
    assert set(compat.dispatch_options(processor)) <= set(parameters(dispatch_attention_fn))
    assert not compat.is_sharded(processor)
    assert compat.context_parallel(processor) is None
    config = diffusers.ContextParallelConfig(ulysses_degree=2, ulysses_anything=True)
    processor._parallel_config = ParallelConfig(context_parallel_config=config)
    assert compat.is_sharded(processor)
    assert compat.parallel_degrees(processor) == (2, 1, True)


def test_entries_of_a_context_parallel_plan():
    given, made = compat.split_input(1, 3, output=True), compat.gathered_output(2, 4)
    assert (given.split_dim, given.expected_dims, given.split_output) == (1, 3, True)
    assert (made.gather_dim, made.expected_dims) == (2, 4)
    split = diffusers.WanTransformer3DModel._cp_plan["blocks.0"]["hidden_states"]
    assert type(split) is type(given)


def test_arguments_are_changed_before_hooks_that_were_there():
    class Model(nn.Module):
        def forward(self, x, y=2):
            return x, y

    class Doubles(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return args, {name: 2 * value for name, value in kwargs.items()}

    model = Model()
    HookRegistry.check_if_exists_or_initialize(model).register_hook(Doubles(), "doubles")
    compat.change_arguments(model, lambda _, given: given.update(x=given["x"] + 1), "first")
    assert model(1, y=5) == (4, 10)


def test_a_forward_is_wrapped_around_hooks_that_were_there():
    class Model(nn.Module):
        def forward(self, x, y=2):
            return x, y

    class Doubles(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return args, {name: 2 * value for name, value in kwargs.items()}

    def run(stock, denoiser, args, kwargs):
        assert denoiser is model
        return stock(*args, y=kwargs["y"] + 1)

    model = Model()
    assert compat.forward_wrapper(model, "run") is None
    HookRegistry.check_if_exists_or_initialize(model).register_hook(Doubles(), "doubles")
    compat.wrap_forward(model, run, "run")
    assert model(1, y=5) == (1, 12)
    assert compat.forward_wrapper(model, "run") is run


def test_hooks_are_put_inside_those_of_context_parallelism():
    block, split = nn.Linear(2, 2), ContextParallelSplitHook({}, None)
    registry = HookRegistry.check_if_exists_or_initialize(block)
    registry.register_hook(split, "split")
    compat.replace_post_forward(split, lambda module, output: output + 1)
    with compat.inside_split_hooks(nn.Sequential(block)):
        assert not registry.hooks
        registry.register_hook(ModelHook(), "other")
    assert list(registry.hooks) == ["other", "split"]
    x = torch.ones(1, 2)
    assert torch.equal(block(x), nn.functional.linear(x, block.weight, block.bias) + 1)


def test_how_context_parallelism_is_set_up():
    assert callable(getattr(diffusers.ModelMixin, compat.RESOLVE_PARALLEL))
    assert "_flattened_mesh" in vars(diffusers.ContextParallelConfig(ring_degree=2))
    source = inspect.getsource(diffusers.hooks.context_parallel)
    assert "_flattened_mesh" in source
    assert "self.metadata" in source and "fn_ref" in inspect.getsource(HookRegistry)


def test_the_backend_that_a_model_is_given_arrives():
    model = tiny_wan()
    with attention_backend("native"):  # set_attention_backend changes the active backend too; this puts it back
        model.set_attention_backend("_native_math")
    options = [compat.dispatch_options(block.attn1.processor) for block in model.blocks]
    assert options and all(not compat.is_default_backend(option["backend"]) for option in options)


def test_the_default_backend():
    with attention_backend("native"):
        assert compat.is_default_backend(None)
    assert compat.is_default_backend("native")
    assert not compat.is_default_backend("_native_math")
    with attention_backend("_native_math"):
        assert not compat.is_default_backend(None)
        assert compat.is_default_backend("native")


# ── hooks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Wraps(ModelHook):
    """Around the module's own forward."""


class Replaces(ModelHook):
    """With a forward of its own, which calls the one that it found."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs)


@pytest.mark.parametrize("hook", [Wraps, Replaces])
def test_forwards_under_hooks_of_diffusers(hook):
    module = nn.Linear(2, 2)
    stock = module.forward
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook(), "test")
    assert module.forward != stock
    holder, name = next((h, n) for h, n in compat.kept_forwards(module) if getattr(h, n, None) == stock)
    setattr(holder, name, lambda x: x + 1)  # what is put there is what runs
    torch.testing.assert_close(module(torch.zeros(1, 2)), torch.ones(1, 2))


def test_forwards_under_hooks_of_accelerate():
    module = nn.Linear(2, 2)
    stock = module.forward
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    assert module.forward != stock
    holder, name = next((h, n) for h, n in compat.kept_forwards(module) if getattr(h, n, None) == stock)
    setattr(holder, name, lambda x: x + 1)
    torch.testing.assert_close(module(torch.zeros(1, 2)), torch.ones(1, 2))


# ── pipelines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Empty(diffusers.DiffusionPipeline):
    """A pipeline with one part."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.register_modules(unet=unet)


def test_where_a_pipeline_runs_its_models():
    pipe = Empty(tiny_unet())
    assert compat.execution_device(pipe, torch.device("meta")) == torch.device("cpu")
    accelerate.hooks.add_hook_to_module(pipe.unet, accelerate.hooks.AlignDevicesHook(execution_device="meta"))
    assert torch.device(compat.execution_device(pipe, torch.device("cpu"))) == torch.device("meta")
    assert compat.execution_device(object(), torch.device("meta")) == torch.device("meta")


@pytest.mark.parametrize(
    "name",
    ["WanPipeline", "WanVideoToVideoPipeline", "FluxPipeline", "CogVideoXPipeline", "LTXPipeline"],
)
def test_what_a_pipeline_says_of_its_run(name):
    pipeline = getattr(diffusers, name)
    code = pipeline.__call__.__wrapped__.__code__
    assert {"_current_timestep", "_num_timesteps"} <= set(code.co_names)
    pipe = types.SimpleNamespace(_current_timestep=torch.tensor(500), _num_timesteps=4)
    assert (compat.current_timestep(pipe), compat.timesteps_to_run(pipe)) == (torch.tensor(500), 4)
    assert compat.current_timestep(object()) is compat.timesteps_to_run(object()) is None


def test_where_a_pipeline_was_loaded_from(tmp_path):
    scheduler = diffusers.DDIMScheduler()
    diffusers.DDIMPipeline(unet=tiny_unet(), scheduler=scheduler).save_pretrained(tmp_path)
    assert compat.source_of(diffusers.DDIMPipeline.from_pretrained(tmp_path)) == str(tmp_path)
    assert compat.source_of(object()) == ""


@pytest.mark.parametrize(
    "name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "AnimateDiffPipeline"]
)
def test_whether_forwards_hold_both_prompts(name):
    guided = getattr(diffusers, name).do_classifier_free_guidance
    for scale in (1.0, 3.0):
        unet = types.SimpleNamespace(config=types.SimpleNamespace(time_cond_proj_dim=None))
        pipe = types.SimpleNamespace(_guidance_scale=scale, unet=unet)
        pipe.do_classifier_free_guidance = guided.fget(pipe)
        assert compat.holds_both_prompts(pipe) is (scale > 1)
    assert not compat.holds_both_prompts(None)


def test_whether_a_guider_guides():
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    assert compat.is_enabled(guider)
    guider.disable()
    assert not compat.is_enabled(guider)


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline"])
def test_image_latents_are_packed(name):
    pipe, latents = getattr(diffusers, name), torch.randn(2, 4, 6, 8)
    packed = compat.pack_latents(pipe, latents, 2, 4, 6, 8)
    assert packed.shape == (2, 12, 16)
    unpacked = compat.unpack_latents(pipe, packed, 48, 64, 8)
    torch.testing.assert_close(unpacked.view(latents.shape), latents)


def test_video_latents_are_packed():
    latents = torch.randn(2, 4, 3, 6, 8)
    packed = compat.pack_latents(diffusers.LTXPipeline, latents, 1, 1)
    assert packed.shape == (2, 3 * 6 * 8, 4)
    torch.testing.assert_close(compat.unpack_latents(diffusers.LTXPipeline, packed, 3, 6, 8, 1, 1), latents)


def test_how_kandinsky_scales_positions():
    pipe = object.__new__(diffusers.Kandinsky5T2VPipeline)
    inside, outside = (compat.kandinsky5_rope_scale(pipe, side, side) for side in (512, 2048))
    assert len(inside) == 3 and inside != outside


def test_how_flux2_shifts_its_schedule():
    assert compat.flux2_mu(256, 50) != compat.flux2_mu(4096, 50) != compat.flux2_mu(4096, 4)


def test_class_names_that_tables_go_by_exist():
    names = {name for classes in tilewise.supported_models().values() for name in classes}
    names |= {*latent_spaces()}
    names |= {*IN_THE_CODE, *model_defaults.STRENGTHS, *model_defaults.LEAST_STEPS, *load.FLOAT32_VAES}
    assert not [name for name in names if not hasattr(diffusers, name)]


# ── models ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_wans_modules():
    model, known = tiny_wan(), compat.wan_modules()
    block: Any = model.blocks[0]
    assert type(block) is known.block
    assert parameters(known.block.forward) == ["self", "hidden_states", "encoder_hidden_states", "temb", "rotary_emb"]
    assert type(block.attn1) is type(block.attn2) is known.attention
    assert type(block.attn1.processor) is known.processor
    assert parameters(known.processor.__call__) == [
        "self", "attn", "hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb",
    ]  # fmt: skip
    assert type(block.norm1) is type(block.norm2) is type(block.norm3) is known.layer_norm
    assert type(block.ffn) is known.feed_forward
    assert type(block.ffn.net[0]) is known.gelu
    assert block.ffn.net[0].approximate == "tanh"


def test_the_modules_of_wans_autoencoder():
    kinds = compat.wan_vae_modules()
    assert kinds.autoencoder is diffusers.AutoencoderKLWan
    for residual in (False, True):
        vae = kinds.autoencoder(
            base_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], is_residual=residual
        )
        found = {type(module) for part in (vae.encoder, vae.decoder) for module in part.modules()}
        expected = {kinds.repeat, kinds.mean, kinds.residual_up_block, kinds.residual_down_block}
        assert expected <= found if residual else kinds.up_block in found
        assert set(kinds[1:]) - expected - {kinds.up_block} <= found
    x = torch.randn(1, 3, 2, 4, 6)
    assert compat.wan_patches(x, None, inverse=False) is x
    patches = compat.wan_patches(x, 2, inverse=False)
    assert patches.shape == (1, 12, 2, 2, 3)
    assert torch.equal(compat.wan_patches(patches, 2, inverse=True), x)


def test_what_happens_before_a_call_of_an_offloaded_autoencoder():
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1], num_res_blocks=1, temperal_downsample=[])
    compat.before_call(vae)
    loaded = []

    class Loads(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            loaded.append(module)
            return args, kwargs

    accelerate.hooks.add_hook_to_module(vae, Loads())
    compat.before_call(vae)
    with torch.no_grad():
        vae.decode(torch.zeros(1, 4, 1, 2, 2))
    assert loaded == [vae, vae]


def test_hunyuan_video15s_processor():
    assert parameters(compat.hunyuan_video15_processor().__call__) == [
        "self", "attn", "hidden_states", "encoder_hidden_states", "attention_mask", "image_rotary_emb",
    ]  # fmt: skip


def test_rotary_embedding():
    x, angle = torch.randn(1, 3, 2, 4), torch.tensor([0.0, torch.pi / 2, torch.pi])[:, None].expand(3, 4)
    out = compat.apply_rotary(x, (angle.cos(), angle.sin()), token_axis=1)
    torch.testing.assert_close(out[:, 0], x[:, 0])
    torch.testing.assert_close(out[:, 2], -x[:, 2])
    quarter = torch.stack([-x[:, 1, :, 1], x[:, 1, :, 0], -x[:, 1, :, 3], x[:, 1, :, 2]], dim=-1)
    torch.testing.assert_close(out[:, 1], quarter)


# ── PyTorch ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_modules_forward_hooks():
    module = nn.Linear(2, 2)
    names = {name for name, value in vars(module).items() if "forward" in name and "hooks" in name}
    assert names == {*torch_compat.FORWARD_HOOKS}
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *args: None)
        assert torch_compat.has_forward_hooks(module)
        handle.remove()
        assert not torch_compat.has_forward_hooks(module)


@pytest.mark.compile
def test_compiled_modules():
    module = nn.Linear(2, 2)
    wrapped = torch.compile(module)
    assert torch_compat.is_compiled_module(wrapped) and torch_compat.uncompiled(wrapped) is module
    assert not torch_compat.is_compiled_module(module) and torch_compat.uncompiled(module) is module
    assert not torch_compat.runs_compiled(module)
    in_place, by_forward = nn.Linear(2, 2), nn.Linear(2, 2)
    in_place.compile()
    by_forward.forward = torch.compile(by_forward.forward)
    assert torch_compat.runs_compiled(in_place) and torch_compat.runs_compiled(by_forward)


def test_marked_constant_as_pytorch_marks_it():
    def ours() -> None: ...

    def theirs() -> None: ...

    assert torch_compat.constant_in_graphs(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs)) != {}


@pytest.mark.compile
def test_a_function_outside_graphs():
    traced: list[bool] = []

    @torch_compat.outside_graphs
    def looks(x: torch.Tensor) -> torch.Tensor:
        traced.append(torch.compiler.is_compiling())
        return x + 1

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: looks(x * 2) * 3, backend=backend)
    for value in (1.0, 2.0):
        assert compiled(torch.tensor(value)) == (2 * value + 1) * 3
    assert traced == [False, False] and len(graphs) == 2


@pytest.mark.compile
def test_what_the_tracer_looks_at():
    seen = []

    class Looked:
        @property
        def __class__(self):
            seen.append(torch_compat.is_tracing())
            return Looked

    looked = Looked()
    assert looked.__class__ is Looked and seen == [False]
    torch.compile(lambda x: x + isinstance(looked, Looked), backend="eager")(torch.zeros(1))
    assert seen[-1], "Dynamo does not go by __class__ any more"


def test_modes_that_may_answer_attention():
    class Mode(torch.overrides.TorchFunctionMode):
        pass

    assert torch_compat.overriding_mode() is None
    with torch.device("cpu"):
        assert torch_compat.overriding_mode() is None
        with Mode():
            assert torch_compat.overriding_mode() == "Mode"


def test_whether_a_backward_pass_runs():
    seen = []
    x = torch.zeros(1, requires_grad=True)
    x.register_hook(lambda gradient: seen.append(torch_compat.in_backward()))
    (2 * x).sum().backward()
    assert seen == [True] and not torch_compat.in_backward()


def test_a_tensors_version():
    x = torch.zeros(2)
    before = torch_compat.version_of(x)
    x += 1
    assert before is not None and torch_compat.version_of(x) == before + 1
    with torch.inference_mode():
        assert torch_compat.version_of(torch.zeros(2)) is None


def tiny_wan() -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=1,
        rope_max_seq_len=32, cross_attn_norm=True,
    )  # fmt: skip


def tiny_unet() -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )


PRIVATE = re.compile(
    r"""[."'](_diffusers_hook|_fn_refs|_old_forward|_execution_device|_name_or_path|_current_timestep|_num_timesteps|_pack_latents"""
    r"""|_unpack_latents|_get_scale_factor|_AttentionBackendRegistry|_pack_history_states|_prepare_sequence|_orig_mod"""
    r"""|_compiled_call_impl|CompileContext|_current_graph_task_id|_len_torch_function_stack|_torchdynamo_orig_callable|_forward_hooks|_forward_pre_hooks)\b|compute_empirical_mu"""
)


def test_private_names_are_used_nowhere_else():
    root = Path(__file__).resolve().parents[2]
    for room in ("kernels", "plugins", "pipelines", "ui"):
        for path in (root / room).rglob("*.py"):
            if path.name in ("diffusers_compat.py", "torch_compat.py"):
                continue
            tree = ast.parse(path.read_text("utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                    node.body = node.body[1:]  # what documentation mentions is no use of it
            found = PRIVATE.findall(ast.unparse(tree))
            assert not found, f"{path.relative_to(root)} uses {found}; add what it needs to plugins/diffusers_compat.py"
