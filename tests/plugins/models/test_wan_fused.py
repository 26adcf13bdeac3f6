"""Wan's block with fused kernels: stock to rounding in every variant, beside LoRA, hooks and offloading, and gone when removed.

The operators compute their naive formulas here (test_fused_kernels.py compares those with the kernels): this is about the
wiring, with a state of the test's own that lets it run on a CPU."""

from __future__ import annotations

import copy
import types

import pytest
import tiny_wan
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, _FBC_LEADER_BLOCK_HOOK
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformerBlock,
    dispatch_attention_fn,
)
from tiny_wan import tiny_transformer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.plugins.hooks.forward_override import override_forward
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.models.fused.wan import fuse_blocks, wan_self_attention
from tilewise.plugins.runtime import attention_call, sparse_call
from tilewise.plugins.runtime.attention_call import AttentionCalls
from tilewise.plugins.runtime.call_planner import CallPlanner

GRID = (5, 8, 8)
SEQUENCE = 5 * 8 * 8


class Everywhere:
    """The state that a patch is to its family: here fused kernels run on a CPU too."""

    on = True

    def fused_here(self, x: torch.Tensor) -> bool:
        return self.on


class FusedProcessor(WanAttnProcessor):
    """As the patch's processor does it: the fused function, and the stock processor where that returns None."""

    def __init__(self, original, expect=True):
        self.original, self.expect = original, expect

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        arguments = (attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        out = wan_self_attention(self.original, dispatch_attention_fn, *arguments)
        assert (out is not None) == self.expect
        return self.original(*arguments) if out is None else out


def fuse(model, expect=True, state=None):
    """Put both parts on; returns a function that takes them off."""
    handles = family_of(model).fuse(model, state or Everywhere())
    for block in model.blocks:
        block.attn1.set_processor(FusedProcessor(block.attn1.processor, expect))

    def remove():
        for handle in handles:
            handle.remove()
        for block in model.blocks:
            block.attn1.set_processor(block.attn1.processor.original)

    return remove


class Operators(TorchDispatchMode):
    """Counts the calls of tilewise's operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tilewise":
            name = function._schema.name.split("::")[1]
            self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


ALL = {"residual_norm": 4, "qk_norm_rope": 1, "linear_gelu": 1}  # a block


def inputs(model, seed=0, batch=2, per_token=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    image = model.config.image_dim is not None
    call = {
        "hidden_states": torch.randn(batch, model.config.in_channels, 5, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 512 if image else 16, tiny_wan.TEXT_DIM, generator=generator),
    }
    if image:
        call["encoder_hidden_states_image"] = torch.randn(batch, 5, tiny_wan.IMAGE_DIM, generator=generator)
    call = {name: x.to(dtype) for name, x in call.items()}
    shape = (batch, SEQUENCE) if per_token else (batch,)
    return {**call, "timestep": torch.rand(shape, generator=generator) * 1000}


@torch.no_grad()
def run(model, **options):
    return model(**inputs(model, **options)).sample


def counted(model, **options):
    with Operators() as seen:
        out = run(model, **options)
    return out, seen.calls


def close(got, want):
    torch.testing.assert_close(
        got, want, atol=1e-5, rtol=1e-5
    )  # on outputs of size 5: sums of a hundred float32 roundings


def state_of(module):
    """Everything that could be left behind."""
    return {
        name: (
            sorted(m.__dict__),
            [list(h) for h in (m._forward_hooks, m._forward_pre_hooks)],
            id(getattr(m, "processor", 0)),
        )
        for name, m in module.named_modules()
    }


VARIANTS = {
    "Wan2.1": {},
    "a timestep per token": {"per_token": True},
    "no norm before cross-attention": {"cross_attn_norm": False},
    "that and per token": {"cross_attn_norm": False, "per_token": True},
    "image to video": {"image": True},
    "fused projections": {"fused": True},
    "one sample, head dim 32": {"batch": 1, "attention_head_dim": 32},
}


def variant(options):
    options = dict(options)
    calls = {key: options.pop(key) for key in ("per_token", "batch") if key in options}
    fused, image = options.pop("fused", False), options.pop("image", False)
    model = tiny_wan.tiny_pipeline(image=True, **options).transformer if image else tiny_wan.tiny_transformer(**options)
    if fused:
        model.fuse_qkv_projections()
    return model, calls


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_stock_to_rounding(options):
    model, call = variant(options)
    before = state_of(model)
    stock = run(model, **call)
    remove = fuse(model)
    out, calls = counted(model, **call)
    close(out, stock)
    assert calls == {name: 2 * count for name, count in ALL.items()}
    remove()
    assert torch.equal(run(model, **call), stock)
    assert state_of(model) == before


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_bfloat16_is_no_further_from_the_truth_than_stock(options):
    model, call = variant(options)
    model.to(torch.bfloat16)
    for name, module in model.named_modules():  # as from_pretrained loads them
        if name == "rope" or name.rsplit(".")[-1] in ("time_embedder", "norm1", "norm2", "norm3"):
            module.float()
    for block in model.blocks:
        block.scale_shift_table.data = block.scale_shift_table.data.float()
    stock = run(model, dtype=torch.bfloat16, **call)
    exact = copy.deepcopy(model).double()
    arguments = inputs(model, dtype=torch.bfloat16, **call)
    with torch.no_grad():
        truth = exact(**{name: x.double() for name, x in arguments.items()}).sample
    fuse(model)
    ours = run(model, dtype=torch.bfloat16, **call)
    errors = [(x.double() - truth).square().mean().sqrt().item() for x in (ours, stock)]
    assert errors[0] < 1.1 * errors[1]
    assert (ours - stock).double().square().mean().sqrt() < errors[1]  # nearer to stock than stock is to the truth


def test_where_the_state_says_no_it_is_stock():
    model = tiny_wan.tiny_transformer()
    stock = run(model)
    state = Everywhere()
    handles = fuse_blocks(model, state)
    state.on = False
    out, calls = counted(model)
    assert torch.equal(out, stock)
    assert calls == {}
    state.on = True
    assert counted(model)[1] == {"residual_norm": 8, "linear_gelu": 2}
    assert len(handles) == 2


# ── submodules that are not as expected ──────────────────────────────────────────────────────────────────────────────


class LowRank(nn.Module):
    """What an adapter library puts in the place of a Linear: the layer inside, its weight shown as its own."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


PLACES = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "ffn.net.0.proj", "ffn.net.2"]


@pytest.mark.parametrize("place", PLACES)
def test_adapters_are_called(place):
    model = tiny_wan.tiny_transformer()
    plain = run(model)
    torch.manual_seed(1)
    for block in model.blocks:
        block.set_submodule(place, LowRank(block.get_submodule(place)))
    stock = run(model)
    assert (stock - plain).abs().max() > 1e-2
    fuse(model)
    out, calls = counted(model)
    close(out, stock)
    without = {"linear_gelu"} if place == "ffn.net.0.proj" else set()
    assert calls == {name: 2 * count for name, count in ALL.items() if name not in without}


HOOKED = {
    "norm1": {"residual_norm": 3}, "norm2": {}, "norm3": {}, "attn1": {}, "attn2": {}, "ffn": {"linear_gelu": 0},
    "ffn.net.0": {"linear_gelu": 0}, "ffn.net.0.proj": {"linear_gelu": 0}, "ffn.net.2": {}, "attn1.to_out.0": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward"])
@pytest.mark.parametrize("place", HOOKED)
def test_hooked_modules_are_called(place, kind):
    """Hooks and replaced forwards, on any submodule, do what they do in the stock block; the other parts stay fused."""
    model = tiny_wan.tiny_transformer()
    plain = run(model)
    for block in model.blocks:
        module = block.get_submodule(place)
        if kind == "hook":
            module.register_forward_hook(lambda module, args, output: output * 1.5)
        elif kind == "pre-hook":
            module.register_forward_pre_hook(lambda module, args: (args[0].sin(), *args[1:]))
        else:
            module.forward = lambda *args, own=module.forward: own(*args) * 1.5
    stock = run(model)
    assert (stock - plain).abs().max() > 1e-3
    fuse(model)
    out, calls = counted(model)
    close(out, stock)
    expected = {**ALL, **HOOKED[place]}
    assert calls == {name: 2 * count for name, count in expected.items() if count}


@pytest.mark.parametrize("place", ["attn1.norm_q", "attn1.norm_k"])
def test_hooked_query_norms_leave_the_attention_to_stock(place):
    model = tiny_wan.tiny_transformer()
    for block in model.blocks:
        block.get_submodule(place).register_forward_hook(lambda module, args, output: output * 1.5)
    stock = run(model)
    fuse(model, expect=False)
    close(run(model), stock)


class OtherNorm(FP32LayerNorm):
    def forward(self, x):
        return super().forward(x) * 1.5


@pytest.mark.parametrize("place", ["norm1", "norm2", "norm3"])
def test_other_norms_are_called(place):
    model = tiny_wan.tiny_transformer()
    for block in model.blocks:
        block.set_submodule(place, OtherNorm(32, 1e-6, elementwise_affine=place != "norm1"))
    stock = run(model)
    fuse(model)
    close(run(model), stock)


def test_a_block_of_ones_own_is_left_alone():
    model = tiny_wan.tiny_transformer()
    model.blocks[0].forward = lambda hidden, *args: hidden * 2
    stock = run(model)
    before = state_of(model)
    handles = fuse_blocks(model, Everywhere())
    assert len(handles) == 1
    close(run(model), stock)
    handles[0].remove()
    assert state_of(model) == before


# ── what the self-attention function passes on, and refuses ──────────────────────────────────────────────────────────


def attention_inputs(S=6):
    model = tiny_wan.tiny_transformer(num_layers=1)
    angle = torch.rand(1, S, 1, 16)
    return model.blocks[0], torch.randn(2, S, 32), (angle.cos(), angle.sin())


@torch.no_grad()
def test_attention_options_are_passed_on():
    block, x, rotary = attention_inputs()
    stock = block.attn1.processor
    stock._attention_backend = "native"
    mask = torch.rand(1, 1, 6, 6) < 0.5
    mask |= torch.eye(6, dtype=torch.bool)
    seen = {}

    def dispatch(query, key, value, **options):
        seen.update(options, shapes=(query.shape, key.shape, value.shape))
        return dispatch_attention_fn(query, key, value, **options)

    out = wan_self_attention(stock, dispatch, block.attn1, x, None, mask, rotary)
    close(out, stock(block.attn1, x, None, mask, rotary))
    assert seen.pop("shapes") == ((2, 6, 2, 16),) * 3
    assert seen.pop("attn_mask") is mask
    assert seen == {"dropout_p": 0.0, "is_causal": False, "backend": "native", "parallel_config": None}
    close(wan_self_attention(stock, dispatch, block.attn1, x), stock(block.attn1, x))


def test_attention_that_it_cannot_stand_in_for():
    block, x, rotary = attention_inputs()
    text = torch.randn(2, 4, 32)

    def refused(attn=block.attn1, hidden=x, text=None, rotary=rotary, processor=block.attn1.processor):
        with Operators() as seen:
            out = wan_self_attention(processor, lambda *a, **k: 1 / 0, attn, hidden, text, None, rotary)
        return out is None and not seen.calls

    assert refused(attn=block.attn2, text=text, rotary=None)
    assert refused(text=text)
    assert refused(processor=FusedProcessor(None))
    assert refused(rotary=torch.cat(rotary))
    assert refused(rotary=(rotary[0][:, :3], rotary[1][:, :3]))
    assert refused(rotary=tuple(t.double() for t in rotary))
    assert refused(hidden=x.to("meta"))
    image = tiny_wan.tiny_pipeline(image=True).transformer.blocks[0]
    assert refused(attn=image.attn2, text=text)
    block.attn1.norm_q.to("meta")
    assert refused()
    block.attn1.norm_q = nn.RMSNorm(16)
    assert refused()


# ── in any order with what else replaces a forward ───────────────────────────────────────────────────────────────────


def sequential_offload(model):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    cpu_offload(model, torch.device("cpu"))
    assert model.blocks[0].scale_shift_table.device.type == "meta"
    return lambda: remove_hook_from_module(model, recurse=True)


def group_offload(level):
    def put_on(model):
        options = {"num_blocks_per_group": 1} if level == "block_level" else {}
        apply_group_offloading(
            model, torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=level, **options
        )

        def take_off():
            for module in model.modules():
                for name in list(getattr(getattr(module, "_diffusers_hook", None), "hooks", {})):
                    module._diffusers_hook.remove_hook(name, recurse=False)

        return take_off

    return put_on


def block_hooks(model):
    """Two layers of hooks around a block: diffusers' registry inside accelerate's."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    from diffusers.hooks import HookRegistry
    from diffusers.hooks import ModelHook as DiffusersHook

    class Twice(DiffusersHook):
        def new_forward(self, module, *args, **kwargs):
            return 2 * self.fn_ref.original_forward(*args, **kwargs)

    class Half(ModelHook):
        def post_forward(self, module, output):
            return output / 2

    for block in model.blocks:
        HookRegistry.check_if_exists_or_initialize(block).register_hook(Twice(), "twice")
        add_hook_to_module(block, Half())

    def take_off():
        for block in model.blocks:
            remove_hook_from_module(block)
            block._diffusers_hook.remove_hook("twice")

    return take_off


HOOKS = {
    "accelerate, weights on meta": sequential_offload,
    "diffusers, groups of blocks": group_offload("block_level"),
    "diffusers, leaves": group_offload("leaf_level"),
    "both, nested": block_hooks,
}


@pytest.mark.parametrize("put_on", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("order", ["fuse, hook, unhook, unfuse", "fuse, hook, unfuse, unhook", "hook, fuse, unhook, unfuse",
                                   "hook, fuse, unfuse, unhook"])  # fmt: skip
def test_hooks_in_any_order(put_on, order):
    model = tiny_wan.tiny_transformer()
    stock = run(model)
    removers = {}
    for step in order.split(", "):
        if step == "fuse":
            removers["unfuse"] = fuse(model)
            for block in model.blocks:  # offloaded norms are the stock processor's to read
                block.attn1.processor.__class__ = Lenient
        elif step == "hook":
            removers["unhook"] = put_on(model)
        else:
            removers.pop(step)()
        out, calls = counted(model)
        close(out, stock)
        if "unfuse" in removers:
            assert calls["residual_norm"] == 8  # inside whatever hooks there are
        else:
            assert calls == {}
    assert torch.equal(run(model), stock)
    for block in model.blocks:
        for module in block.modules():
            assert getattr(module.__dict__.get("forward"), "__func__", None) in (None, type(module).forward)


class Lenient(FusedProcessor):
    def __call__(self, attn, *args, **kwargs):
        out = wan_self_attention(self.original, dispatch_attention_fn, attn, *args, **kwargs)
        return self.original(attn, *args, **kwargs) if out is None else out


@pytest.mark.parametrize("first", ["cache", "fuse"])
def test_first_block_cache_before_and_after(first):
    """The cache skips whole blocks; what it runs is fused."""
    model = tiny_wan.tiny_transformer(num_layers=3)
    config = FirstBlockCacheConfig(threshold=1e9)

    def twice():
        with model.cache_context("cond"), Operators() as seen:
            outs = [run(model, seed=seed) for seed in (0, 1)]
        model._reset_stateful_cache()
        return outs, seen.calls

    model.enable_cache(config)
    stock, calls = twice()
    assert calls == {}
    if first == "fuse":
        model.disable_cache()
        remove = fuse(model)
        model.enable_cache(config)
    else:
        remove = fuse(model)
    outs, calls = twice()
    for out, want in zip(outs, stock, strict=True):
        close(out, want)
    assert calls["residual_norm"] == 4 * (3 + 1)  # all blocks, then the first alone
    remove()
    outs, calls = twice()
    assert calls == {}
    assert all(torch.equal(out, want) for out, want in zip(outs, stock, strict=True))
    model.disable_cache()
    for block in model.blocks:
        assert not {_FBC_BLOCK_HOOK, _FBC_LEADER_BLOCK_HOOK} & set(block._diffusers_hook.hooks)
        assert getattr(block.__dict__["forward"], "__func__", None) is type(block).forward


def test_layerwise_casting_keeps_its_weights():
    """fp8 storage: a Linear's weight is only right during its own forward."""
    model = tiny_wan.tiny_transformer()
    apply_layerwise_casting(
        model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("norm", "condition", "patch")
    )
    assert model.blocks[0].ffn.net[0].proj.weight.dtype == torch.float8_e4m3fn
    stock = run(model)
    fuse(model)
    out, calls = counted(model)
    close(out, stock)
    assert calls == {"residual_norm": 8, "qk_norm_rope": 2}


def test_a_wrapper_of_somebody_elses_passes_through_after_removal():
    model = tiny_wan.tiny_transformer()
    stock = run(model)
    handles = fuse_blocks(model, Everywhere())
    block = model.blocks[0]
    block.forward = lambda *args, own=block.forward: own(*args)
    assert counted(model)[1]["residual_norm"] == 8
    for handle in handles:
        handle.remove()
        assert handle.state is None
    out, calls = counted(model)
    assert torch.equal(out, stock)
    assert calls == {}
    assert "forward" in block.__dict__  # the wrapper stays whose it is


def test_override_keeps_the_signature_and_is_exact():
    import inspect

    module = nn.Linear(3, 3)
    stock, before = inspect.signature(module.forward), sorted(module.__dict__)
    handle = override_forward(module, lambda override, input: override.stock(input) * override.state, 2.0)
    x = torch.randn(2, 3)
    assert torch.equal(module(x), 2 * nn.functional.linear(x, module.weight, module.bias))
    assert inspect.signature(module.forward) == stock
    assert override_forward(module, lambda override, x: x, None) is None  # it is replaced already
    handle.remove()
    assert sorted(module.__dict__) == before
    handle.remove()  # harmless


# ── compiled ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.compile
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_compiled_in_one_graph(options):
    model, call = variant(options)
    fuse(model)
    eager = run(model, **call)
    torch.compiler.reset()
    # AOTAutograd takes twice as long, and what it needs of the kernels is the same in each variant.
    backend = "aot_eager" if options in list(VARIANTS.values())[:2] else "eager"
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    close(run_compiled(compiled, model, **call), eager)


@torch.no_grad()
def run_compiled(compiled, model, **options):
    return compiled(**inputs(model, **options)).sample


@pytest.mark.compile
def test_blocks_share_one_compiled_graph():
    model = tiny_wan.tiny_transformer(num_layers=5)
    fuse(model)
    eager = run(model)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    close(run(model), eager)
    assert counter.frame_count == 1
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert {name: sum(name in target for target in targets) for name in ALL} == ALL


# ── as part of a patch ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"expand_timesteps": True}, {"boundary_ratio": 0.8}], ids=str)
def test_a_patched_pipeline(options, monkeypatch):
    """The whole pipeline, reordered into tiles with a full window, with fused kernels throughout."""
    monkeypatch.setattr(AttentionCalls, "fused_here", lambda self, x: self.state.config.fuse)
    pipe = tiny_wan.tiny_pipeline(**options)

    def latents():
        return pipe(
            "a red circle moving right", num_inference_steps=2, guidance_scale=3.0, output_type="latent", height=64,
            width=64, num_frames=9, max_sequence_length=16, generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    stock = latents()
    before = state_of(pipe.transformer)
    for method in ("dense", tilewise.STA(window=(99, 99, 99), tile=(2, 3, 3))):
        tilewise.patch(pipe, method, steps=(0, 1), strict=True)
        with Operators() as seen:
            torch.testing.assert_close(latents(), stock, atol=1e-4, rtol=1e-4)
        assert seen.calls["residual_norm"] == 4 * 8  # two steps, two prompts, two blocks
        assert seen.calls["qk_norm_rope"] == 8
        assert tilewise.summary(pipe).fused_calls == 8
    tilewise.unpatch(pipe)
    assert torch.equal(latents(), stock)
    assert state_of(pipe.transformer) == before


# ── fused kernels that stay off are reported ─────────────────────────────────────────────────────────────────────────


def another_processor(model):
    def call(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        query, key, value = (p(hidden_states).unflatten(2, (attn.heads, -1)) for p in (attn.to_q, attn.to_k, attn.to_v))
        return attn.to_out[0](dispatch_attention_fn(query, key, value).flatten(2))

    # A class of the same name, as a release or a fork with other code would have it.
    kind = type("WanAttnProcessor", (WanAttnProcessor,), {"__call__": rebound(call)})
    model.blocks[1].attn1.set_processor(kind())
    found = f"WanAttnProcessor of {__name__}, not diffusers' WanAttnProcessor"
    return f"1 of 2 blocks: the processor of self-attention is a {found}"


def rebound(call):
    """With the dispatcher among its globals, where processors have it."""
    return types.FunctionType(
        call.__code__, {"dispatch_attention_fn": dispatch_attention_fn}, call.__name__, call.__defaults__
    )


def another_attention(model):
    for block in model.blocks:
        block.attn1.__class__ = type("MyAttention", (WanAttention,), {})
    return "2 of 2 blocks: self-attention is a MyAttention, not diffusers' WanAttention"


def another_forward(model):
    class MyBlock(WanTransformerBlock):
        def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb) + 1

    model.blocks[0].__class__ = MyBlock
    return "1 of 2 blocks: the block is a MyBlock, not diffusers' WanTransformerBlock"


def replaced_forward(model):
    stock = model.blocks[1].forward
    model.blocks[1].forward = lambda *args, **kwargs: stock(*args, **kwargs)
    return "1 of 2 blocks: the block's forward was replaced"


@pytest.mark.parametrize("alter", [another_processor, another_attention, another_forward, replaced_forward])
def test_fused_kernels_that_stay_off_are_reported(alter):
    model = tiny_transformer(num_layers=2)
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4}
    assert not tilewise.explain(model, **size, method="sta").notes
    says = f"denoiser: fused kernels are off in {alter(model)}"
    told = tilewise.explain(model, **size, method="sta")
    assert [note for note in told.notes if note.startswith(says)] and says in str(told)
    assert not tilewise.explain(model, **size, method=tilewise.resolve("sta", fuse=False)).notes
    with tilewise.patched(model, "sta"):
        found = tilewise.summary(model)
    assert len(found.notes) == 1 and found.notes[0].startswith(says)
    assert says in str(found) and found.to_dict()["notes"] == list(found.notes)
    with tilewise.patched(model, "sta", fuse=False):
        assert tilewise.summary(model).notes == ()


@pytest.mark.parametrize("fuse", [True, False])
def test_nothing_is_reported_of_the_stock_model(fuse):
    model = tiny_transformer(num_layers=2)
    with tilewise.patched(model, "sta", fuse=fuse):
        assert tilewise.summary(model).notes == ()
        told = tilewise.explain(model, height=64, width=64, frames=9, num_inference_steps=4)
        assert told.notes == []


# ── in a patched denoiser: queries and keys come out of the kernel in tile order ─────────────────────────────────────


@pytest.fixture
def reorders(monkeypatch):
    """Fused kernels on a CPU; the numbers of tensors that each call reorders beside them."""
    seen: list[int] = []
    plain = attention_call.reorder_tokens

    def counting(tensors, order):
        seen.append(len(tensors))
        return plain(tensors, order)

    monkeypatch.setattr(AttentionCalls, "fused_here", lambda *_: True)
    for module in (attention_call, sparse_call):
        monkeypatch.setattr(module, "reorder_tokens", counting)
    return seen


@pytest.mark.parametrize("method", [tilewise.STA(window=(1, 3, 1), tile=(2, 3, 3)), tilewise.Draft(0.5, min_tokens=0)])
@pytest.mark.parametrize("blocks", [":", "1:"])
def test_queries_and_keys_are_made_in_tile_order(reorders, monkeypatch, method, blocks):
    model = tiny_wan.tiny_transformer()
    with tilewise.patched(model, method, steps=(0, 1), blocks=blocks, strict=True, fuse=False):
        want = run(model)
    reorders.clear()
    with tilewise.patched(model, method, steps=(0, 1), blocks=blocks, strict=True):
        run(model)  # plans are made, for which all three are reordered once
        reorders.clear()
        close(run(model), want)
    assert reorders == [1, 1] * (2 if blocks == ":" else 1)  # the value, and the output back


def test_a_call_that_falls_back_gets_them_back_in_the_models_order(reorders, monkeypatch):
    model = tiny_wan.tiny_transformer()
    stock = run(model)

    def unsupported(*args, **kwargs):
        raise UnsupportedPlanError("for this test")

    monkeypatch.setattr(CallPlanner, "choose_backends", unsupported)
    with tilewise.patched(model, tilewise.STA(window=(1, 3, 1), tile=(2, 3, 3)), steps=(0, 1)):
        close(run(model), stock)
        assert list(tilewise.summary(model).fallbacks) == ["for this test"]
