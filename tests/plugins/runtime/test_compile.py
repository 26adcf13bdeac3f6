"""torch.compile of a patched denoiser: one graph for all steps, the same result, and nothing left when it is taken off."""

from __future__ import annotations

import shutil

import pytest
import tiny_wan
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch._dynamo.utils import counters

import tilewise
from tilewise.plugins.runtime import custom_ops as operators
from tilewise.plugins.runtime.attention_call import AttentionCalls, _triton_runs
from tilewise.plugins.runtime.call_stats import DENSE_LAYER, DENSE_STEP, FALLBACK, SPARSE

pytestmark = pytest.mark.compile

SMALL = tilewise.STA(window=(1, 1, 1), tile=(2, 3, 3))
ATTEND = torch.ops.tilewise.attend.default
BLOCKS = 2


class Counter:
    """A backend that counts graphs, and the attention calls in each."""

    def __init__(self, inner: str = "eager") -> None:
        self.inner = torch._dynamo.lookup_backend(inner)
        self.graphs: list[int] = []

    def __call__(self, module, inputs):
        self.graphs.append(sum(node.target in (ATTEND, torch.ops.tilewise.attend) for node in module.graph.nodes))
        return self.inner(module, inputs)

    @property
    def denoiser(self) -> list[int]:
        """Of the graphs that hold any."""
        return [calls for calls in self.graphs if calls]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    assert not counters["graph_break"]
    torch.compiler.reset()


@pytest.fixture
def model():
    return tiny_wan.tiny_transformer(num_layers=BLOCKS)


def inputs(timestep=500.0, frames=5, height=16, width=16, batch=1):
    generator = torch.Generator().manual_seed(frames * height * width)
    latents = torch.randn(batch, 4, frames, height, width, generator=generator)
    return latents, torch.full((batch,), timestep), torch.randn(batch, 16, tiny_wan.TEXT_DIM, generator=generator)


def compiled(model, how, backend):
    """Something to call in the model's place."""
    if how == "wrapped":
        return torch.compile(model, backend=backend, fullgraph=True)
    if how == "function":
        return torch.compile(lambda *args: model(*args), backend=backend, fullgraph=True)
    if how == "in place":
        model.compile(backend=backend, fullgraph=True)
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    elif how == "repeated blocks":
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
    else:
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
    return model


def calls_of(model):
    """What ran, without its seconds."""
    return [(r.layers, r.kind, r.calls, r.density, r.backend, r.reason, r.fused) for r in tilewise.summary(model).rows]


HOW = ["wrapped", "function", "in place", "forward", "repeated blocks", "each block"]
WHOLE = HOW[:4]
FEW = [
    "wrapped",
    "forward",
    "repeated blocks",
]  # one of each kind: the rest is compiled alike, and compiling takes long
STEPS = [inputs(999.0), inputs(900.0), inputs(500.0), inputs(10.0)]
SIZES = [inputs(999.0, 7, 18, 22), inputs(500.0, 7, 18, 22), inputs(500.0, 3, 20, 14), inputs(500.0)]


@pytest.mark.parametrize(("how", "backend"), [*((how, "eager") for how in FEW), (HOW[-1], "aot_eager")])
def test_one_graph_for_all_steps_and_one_more_for_other_sizes(model, how, backend):
    tilewise.patch(model, SMALL, steps=(0.25, 1), blocks="1:", strict=True)
    eager = [model(*args).sample for args in (*STEPS, *SIZES)]
    told = calls_of(model)
    assert {kind for _, kind, *_ in told} == {SPARSE, DENSE_STEP, DENSE_LAYER}

    tilewise.patch(model, SMALL, steps=(0.25, 1), blocks="1:", strict=True)
    counter = Counter(backend)
    call = compiled(model, how, counter)
    one = BLOCKS if how in WHOLE else 1  # attention calls in a graph
    for args, expected in zip(STEPS, eager, strict=False):
        torch.testing.assert_close(call(*args).sample, expected, atol=1e-5, rtol=1e-5)
        assert counter.denoiser == [one]
    graphs = len(counter.graphs)
    for args, expected in zip(SIZES, eager[len(STEPS) :], strict=True):
        torch.testing.assert_close(call(*args).sample, expected, atol=1e-5, rtol=1e-5)
        assert counter.denoiser == [one, one]
        assert len(counter.graphs) <= 2 * graphs  # hooks of what is compiled are small graphs of their own
    assert calls_of(model) == told


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("how", ["each block"])
def test_inductor(model, how):
    tilewise.patch(model, SMALL, steps=(0.25, 1), strict=True)
    eager = [model(*args).sample for args in STEPS[1:3]]
    told = calls_of(model)
    tilewise.patch(model, SMALL, steps=(0.25, 1), strict=True)
    counter = Counter("inductor")
    call = compiled(model, how, counter)
    for args, expected in zip(STEPS[1:3], eager, strict=True):
        torch.testing.assert_close(call(*args).sample, expected, atol=1e-4, rtol=1e-4)
    assert len(counter.denoiser) == 1
    assert calls_of(model) == told


@pytest.mark.parametrize("how", ["forward", "repeated blocks"])
def test_patched_and_unpatched_while_compiled(model, how):
    """Whatever was compiled before a patch comes or goes, and however, what is called next is right."""
    args = STEPS[2]
    eager = [model(*args).sample]
    for method in (SMALL, tilewise.STA(window=(2, 1, 2), tile=(2, 3, 3))):
        with tilewise.patched(model, method, steps=(0, 1)):
            eager.append(model(*args).sample)
    assert not torch.equal(eager[1], eager[2])

    call = compiled(model, how, "eager")
    stock = call(*args).sample
    torch.testing.assert_close(stock, eager[0], atol=1e-5, rtol=1e-5)
    for _ in range(2):
        tilewise.patch(model, SMALL, steps=(0, 1), strict=True)
        torch.testing.assert_close(call(*args).sample, eager[1], atol=1e-5, rtol=1e-5)
        tilewise.patch(model, tilewise.STA(window=(2, 1, 2), tile=(2, 3, 3)), steps=(0, 1), strict=True)
        torch.testing.assert_close(call(*args).sample, eager[2], atol=1e-5, rtol=1e-5)
        assert calls_of(model)[0][2] == BLOCKS
        tilewise.unpatch(model)
        assert torch.equal(call(*args).sample, stock)


@pytest.mark.parametrize("how", ["wrapped", "repeated blocks"])
def test_a_timestep_per_token_and_two_denoisers(how):
    """Wan2.2: each of the two denoisers has its graphs, well within Dynamo's limit of eight."""
    pipe = tiny_wan.tiny_pipeline(boundary_ratio=0.8)

    def latents():
        return pipe(
            "a red circle", height=64, width=64, num_frames=9, num_inference_steps=6, guidance_scale=3.0,
            max_sequence_length=16, output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    tilewise.patch(pipe, SMALL, steps=(0.25, 1), strict=True)
    expected, told = latents(), calls_of(pipe)
    tilewise.patch(pipe, SMALL, steps=(0.25, 1), strict=True)
    counter = Counter()
    for name in ("transformer", "transformer_2"):
        setattr(pipe, name, compiled(getattr(pipe, name), how, counter))
    torch.testing.assert_close(latents(), expected, atol=1e-5, rtol=1e-5)
    assert len(counter.denoiser) == 2
    assert calls_of(pipe) == told


def test_per_token_timesteps(model):
    latents, _, text = inputs()
    args = latents, torch.linspace(300, 500, 320)[None], text
    tilewise.patch(model, SMALL, steps=(0, 1), strict=True)
    eager = model(*args).sample
    torch.testing.assert_close(compiled(model, "wrapped", "aot_eager")(*args).sample, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["function", "each block"])
def test_the_dense_method_is_exact(model, how):
    """No reorder, stock attention: the same arithmetic as without the patch."""
    expected = [model(*args).sample for args in STEPS[:2]]
    tilewise.patch(model, "dense", steps=(0, 1), strict=True)
    counter = Counter()
    call = compiled(model, how, counter)
    for args, stock in zip(STEPS, expected, strict=False):
        assert torch.equal(call(*args).sample, stock)
    assert len(counter.denoiser) == 1
    assert calls_of(model) == [("0-1", DENSE_LAYER, 4, 1.0, "stock", "", False)]


class Ramp(WanAttnProcessor):
    """One that cannot be taken over, and counts on the model's own order."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return hidden_states * torch.linspace(0, 1, hidden_states.shape[1])[None, :, None]


def test_layers_that_are_left_alone_get_their_own_order(model):
    model.blocks[1].attn1.set_processor(Ramp())
    tilewise.patch(model, SMALL, steps=(0, 1))
    eager = model(*STEPS[2]).sample
    for how in ("wrapped", "each block"):
        call = compiled(model, how, "eager")
        torch.testing.assert_close(call(*STEPS[2]).sample, eager, atol=1e-5, rtol=1e-5)


def test_fallbacks_are_counted_and_strict_raises(model):
    model.double()
    args = tuple(x.double() for x in inputs())
    stock = model(*args).sample
    tilewise.patch(model, SMALL, steps=(0, 1))
    torch.testing.assert_close(compiled(model, "wrapped", "aot_eager")(*args).sample, stock)
    assert [(kind, calls) for _, kind, calls, *_ in calls_of(model)] == [(FALLBACK, BLOCKS)]
    tilewise.patch(model, SMALL, steps=(0, 1), strict=True)
    with pytest.raises(tilewise.FallbackError, match="float64"):
        compiled(model, "wrapped", "aot_eager")(*args)


@pytest.mark.parametrize("how", ["wrapped", "each block"])
def test_gradients_are_refused(model, how):
    tilewise.patch(model, SMALL, steps=(0, 1))
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"is for inference: call it under torch\.no_grad"):
        compiled(model, how, "eager")(*inputs())


@pytest.mark.parametrize("how", [None, "repeated blocks"])
def test_the_familys_fused_code_stands_in_and_is_counted(model, how, monkeypatch):
    """Forced onto the CPU, where fused operators compute their naive formulas; the kernels are for a GPU."""
    stock = model(*STEPS[2]).sample
    tilewise.patch(model, "dense")
    assert torch.equal(model(*STEPS[2]).sample, stock)  # not on a CPU by itself
    assert tilewise.summary(model).fused_calls == 0
    monkeypatch.setattr(AttentionCalls, "fused_here", lambda self, x: self.state.config.fuse)
    call = model if how is None else compiled(model, how, "eager")
    torch.testing.assert_close(call(*STEPS[2]).sample, stock, atol=1e-4, rtol=1e-4)
    tilewise.patch(model, "dense", steps=(0.25, 1))
    for args in STEPS[:3]:
        call(*args)
    report = tilewise.summary(model)
    assert (report.fused_calls, report.calls) == (3 * BLOCKS, 3 * BLOCKS)
    assert "fused kernels ran around 6 of 6 attention calls" in str(report)
    tilewise.patch(model, "dense", fuse=False)
    assert torch.equal(call(*STEPS[2]).sample, stock)
    assert tilewise.summary(model).fused_calls == 0
    assert "fused kernels" not in str(tilewise.summary(model))
    tilewise.unpatch(model)
    assert torch.equal(call(*STEPS[2]).sample, stock)


class Doubling(WanAttnProcessor):
    """Not the stock processor, but one that can be taken over."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q = attn.to_q(hidden_states).unflatten(2, (attn.heads, -1))
        return 2 * dispatch_attention_fn(q, q, q, backend=self._attention_backend).flatten(2)


@pytest.mark.parametrize("how", [None, "wrapped"])
def test_a_processor_of_another_kind_keeps_its_own_code(model, how, monkeypatch):
    """The fused code stands for exactly the stock processor."""
    model.blocks[1].attn1.set_processor(Doubling())
    stock = model(*STEPS[2]).sample
    monkeypatch.setattr(AttentionCalls, "fused_here", lambda self, x: True)
    tilewise.patch(model, "dense", steps=(0, 1))
    call = model if how is None else compiled(model, how, "eager")
    torch.testing.assert_close(call(*STEPS[2]).sample, stock, atol=1e-4, rtol=1e-4)
    assert calls_of(model) == [
        ("0", DENSE_LAYER, 1, 1.0, "stock", "", True), ("1", DENSE_LAYER, 1, 1.0, "stock", "", False)
    ]  # fmt: skip


def test_whether_triton_runs_is_known_when_the_graph_is_made():
    def function(x):
        return x + 1 if _triton_runs(x.device) else x - 1

    assert torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(1)) == -1


def test_a_processor_that_is_replaced_after_the_patch(model):
    """Seen when the next graph is made, which then has a break where calls are counted."""
    tilewise.patch(model, SMALL, steps=(0, 1))
    call = torch.compile(model, backend="eager")
    call(*STEPS[2])
    model.blocks[0].attn1.set_processor(Ramp())
    out = call(*STEPS[2]).sample
    assert "(it was set after the patch)" in tilewise.summary(model).skipped_layers["denoiser.blocks.0.attn1"]
    torch.testing.assert_close(out, model(*STEPS[2]).sample, atol=1e-5, rtol=1e-5)
    model.blocks[0].attn1.set_processor(WanAttnProcessor())  # one that can be taken over is, and costs one break too
    call(*STEPS[2])
    counters["graph_break"].clear()
    sparse = call(*STEPS[2]).sample
    assert not counters["graph_break"] and not tilewise.summary(model).skipped_layers
    torch.testing.assert_close(sparse, model(*STEPS[2]).sample, atol=1e-5, rtol=1e-5)


class TestOperators:
    @pytest.fixture
    def patch(self, model):
        tilewise.patch(model, SMALL, steps=(0, 1))
        model(*inputs())
        self.model = model
        return model._tilewise

    GRID = (5, 8, 8, 0, False, 0)

    def test_opcheck(self, patch):
        timestep = torch.tensor([500.0])
        torch.library.opcheck(operators.begin, (timestep, patch.handle, *self.GRID))
        ticket = operators.begin(timestep, patch.handle, *self.GRID)
        q, k, v = (torch.randn(2, 320, 2, 16) for _ in range(3))
        handle = self.model.blocks[0].attn1.processor.handle
        mask = torch.rand(1, 1, 320, 320) < 0.5
        for attn_mask, scale in ((None, None), (mask, 0.3)):
            args = (ticket, q, k, v, attn_mask, handle, 0.0, False, scale, False, "native", False)
            torch.library.opcheck(operators.attend, args)

    def test_a_graph_that_outlives_its_patch_says_so(self, model):
        handle = operators.handle_for(type("Owner", (), {})())
        with pytest.raises(tilewise.TilewiseError, match=r"patch that has been taken off: call torch\.compiler\.reset"):
            operators.begin(torch.tensor([500.0]), handle, *self.GRID)


@pytest.mark.gpu
class TestGPU:
    """Inductor, CUDA graphs and host synchronisation, in bfloat16 with the kernels of a GPU."""

    DENSE, SPARSE = 0, 3  # of four steps, the first with dense attention

    @pytest.fixture
    def pipe(self):
        pipe = tiny_wan.tiny_pipeline(num_layers=BLOCKS, num_attention_heads=4, attention_head_dim=64, ffn_dim=512)
        pipe.transformer.to("cuda", torch.bfloat16)
        pipe.scheduler.set_timesteps(4, device="cuda")
        tilewise.patch(pipe, tilewise.STA(window=(1, 1, 3)), steps=(0.25, 1), strict=True)
        return pipe

    def args(self, pipe, step, size=32):
        """A forward's arguments at a step of the schedule, which the scheduler then says is under way."""
        pipe.scheduler._step_index = step
        generator = torch.Generator().manual_seed(step)
        latents = torch.randn(1, 4, 9, size, size, generator=generator)
        text = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=generator)
        timestep = pipe.scheduler.timesteps[step : step + 1].clone()
        return latents.to("cuda", torch.bfloat16), timestep, text.to("cuda", torch.bfloat16)

    @staticmethod
    def close(out, expected):
        error = (out - expected).float().norm() / expected.float().norm()
        assert float(error) < 2e-2

    @pytest.mark.parametrize("fuse", [True, False], ids=["fused", "stock"])
    @pytest.mark.parametrize("how", ["wrapped", "repeated blocks"])
    def test_inductor(self, pipe, how, fuse):
        tilewise.patch(pipe, tilewise.STA(window=(1, 1, 3)), steps=(0.25, 1), strict=True, fuse=fuse)
        calls = [(self.DENSE, 32), (self.SPARSE, 32), (self.SPARSE, 48), (self.DENSE, 40)]
        expected = [pipe.transformer(*self.args(pipe, *at)).sample for at in calls]
        told = calls_of(pipe)
        assert {row[-1] for row in told} == {fuse}
        assert {row[4] for row in told} > {"stock"}
        tilewise.patch(pipe, tilewise.STA(window=(1, 1, 3)), steps=(0.25, 1), strict=True, fuse=fuse)
        counter = Counter("inductor")
        call = compiled(pipe.transformer, how, counter)
        for at, want in zip(calls, expected, strict=True):
            self.close(call(*self.args(pipe, *at)).sample, want)
        assert len(counter.denoiser) == 2
        assert calls_of(pipe) == told

    @pytest.mark.parametrize("how", ["wrapped", "repeated blocks"])
    def test_reduce_overhead_freezes_no_decision(self, pipe, how):
        """Inductor's CUDA graphs hold what lies between the decisions."""
        model = pipe.transformer
        dense, sparse = (model(*self.args(pipe, step)).sample.clone() for step in (self.DENSE, self.SPARSE))
        told = calls_of(pipe)
        tilewise.patch(pipe, tilewise.STA(window=(1, 1, 3)), steps=(0.25, 1), strict=True)
        if how == "wrapped":
            call = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        else:
            call = model
            model.compile_repeated_blocks(mode="reduce-overhead", fullgraph=True)
        rounds = 4  # a warm-up, a recording, and replays
        for step in (self.DENSE, self.SPARSE) * rounds:
            torch.compiler.cudagraph_mark_step_begin()
            self.close(call(*self.args(pipe, step)).sample, dense if step == self.DENSE else sparse)
        assert [(*row[:2], row[2] // rounds, *row[3:]) for row in calls_of(pipe)] == told
        from torch._inductor.cudagraph_trees import get_manager

        manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
        assert manager is not None
        assert any(manager.roots.values())
        assert not counters["inductor"]["cudagraph_skips"]

    @pytest.mark.parametrize("step", [DENSE, SPARSE], ids=["dense", "sparse"])
    @pytest.mark.parametrize("how", [None, "wrapped"])
    def test_captured_by_hand(self, pipe, how, step):
        """A CUDA graph of a whole forward holds that step's decision; replays work on new inputs."""
        model = pipe.transformer
        call = model if how is None else compiled(model, how, "inductor")
        inputs = self.args(pipe, step)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(*inputs).sample
        assert sum(row[2] for row in calls_of(pipe)) == 4 * BLOCKS  # a captured call is counted, replays are not
        inputs[0].copy_(torch.randn_like(inputs[0]))
        graph.replay()
        self.close(out, model(*inputs).sample)
        assert tilewise.summary(pipe).rows[0].seconds > 0

    def test_what_cannot_be_captured_says_so(self, pipe):
        model = pipe.transformer
        tilewise.patch(model, "sta", steps=(0, 1))
        inputs = self.args(pipe, self.SPARSE)
        torch.cuda.synchronize()

        def capture():
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                model(*inputs)

        with pytest.raises(tilewise.TilewiseError, match="run the denoiser once at this size first"):
            capture()

    @pytest.mark.parametrize("how", [None, "wrapped", "repeated blocks"])
    def test_no_host_synchronisation(self, pipe, how):
        call = pipe.transformer if how is None else compiled(pipe.transformer, how, "inductor")
        steps = [self.args(pipe, self.DENSE), self.args(pipe, self.SPARSE)]
        for _ in range(2):
            for inputs in steps:
                call(*inputs)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step, inputs in zip((self.DENSE, self.SPARSE), steps, strict=True):
                pipe.scheduler._step_index = step
                call(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert {kind for _, kind, *_ in calls_of(pipe)} == {DENSE_STEP, SPARSE}


@pytest.mark.parametrize("how", ["method", "blocks"])
@torch._dynamo.config.patch(recompile_limit=2)
def test_patching_forgets_compiled_code_of_the_denoiser_alone(model, how):
    """Something else that is compiled in the process stays so; and code of patches that are gone does not pile up until
    Dynamo's recompile limit, where it would give up without an error. That is 8: a lower one shows the same sooner."""
    from torch._dynamo.testing import CompileCounter

    stock, others = CompileCounter(), CompileCounter()
    given = inputs()

    def forward(module):
        with torch.no_grad():
            return module(*given, return_dict=False)[0]

    want = forward(model)
    tilewise.patch(model, SMALL, steps=(0, 1))
    sparse = forward(model)
    tilewise.unpatch(model)
    other = torch.compile(lambda x: x * 2 + 1, backend=others)
    other(torch.ones(3))
    if how == "method":
        model.compile(backend=stock)
    else:
        for block in model.blocks:
            block.compile(backend=stock)
    for _ in range(3):
        before = stock.frame_count
        with tilewise.patched(model, SMALL, steps=(0, 1)):
            torch.testing.assert_close(forward(model), sparse, atol=1e-5, rtol=1e-5)
        assert stock.frame_count > before  # compiled again, not given up
        torch.testing.assert_close(forward(model), want, atol=1e-5, rtol=1e-5)
        other(torch.ones(3))
    assert others.frame_count == 1
