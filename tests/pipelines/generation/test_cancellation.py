"""A run that is asked to stop ends before the next block, and leaves the pipeline as it was."""

from __future__ import annotations

import threading
import time

import pytest
import tiny_wan
import torch
from torch import nn

import tilewise
from tilewise.pipelines.generation.cancellation import Cancelled, cancellable
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.plugins.torch_compat import uncompiled

LAYERS = 4
PROMPT = "a red circle moving right"
WHERE = {
    "text encoder": lambda pipe: pipe.text_encoder.encoder.block[0],
    "block": lambda pipe: pipe.transformer.blocks[1],
    "decoder": lambda pipe: pipe.vae.decoder,
}


@pytest.fixture
def pipe():
    return tiny_wan.tiny_pipeline(num_layers=LAYERS)


def settings_for(pipe, method: str = "dense", **more):
    size = {"height": 32, "width": 32, "frames": 5, "steps": 2, "guidance": 1.0, "max_sequence_length": 16}
    return resolve_settings(pipe, PROMPT, method=method, **{**size, **more})


def counted(modules: list[nn.Module]) -> tuple[list[int], list]:
    """What each module was called at, and the hooks that tell."""
    calls: list[int] = []
    handles = [m.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, m in enumerate(modules)]
    return calls, handles


def hooks_on(pipe) -> int:
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for part in parts for m in part.modules())


@pytest.mark.parametrize("method", ["dense", "sta"])
@pytest.mark.parametrize("where", WHERE)
def test_the_next_block_is_not_begun(pipe, where, method):
    settings = settings_for(pipe, method)
    stop = threading.Event()
    at = WHERE[where](pipe).register_forward_hook(lambda *_: stop.set())
    calls, handles = counted([*pipe.text_encoder.encoder.block, *pipe.transformer.blocks, pipe.vae.decoder])
    before = hooks_on(pipe)
    with pytest.raises(Cancelled), cancellable(pipe, stop.is_set):
        generate(pipe, settings)
    decoder = 1 + LAYERS
    assert calls == {"text encoder": [0], "block": [0, 1, 2], "decoder": [0, *[1, 2, 3, 4] * 2, decoder]}[where]
    assert hooks_on(pipe) == before
    assert not tilewise.is_patched(pipe)
    for handle in (at, *handles):
        handle.remove()


def test_a_slow_model_stops_within_two_seconds_from_another_thread(pipe):
    """A step takes 4 s here, a block 1."""
    for block in pipe.transformer.blocks:
        block.register_forward_pre_hook(lambda *_: time.sleep(1.0))
    stop = threading.Event()
    asked: list[float] = []

    def press() -> None:
        asked.append(time.perf_counter())
        stop.set()

    timer = threading.Timer(0.2, press)
    timer.start()
    with pytest.raises(Cancelled), cancellable(pipe, stop.is_set):
        generate(pipe, settings_for(pipe))
    assert time.perf_counter() - asked[0] < 2.0
    timer.join()


def test_a_vae_of_another_kind_is_asked_between_its_layers(pipe):
    from diffusers import AutoencoderKLCogVideoX

    pipe.vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4,
        down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2,
    )  # fmt: skip
    first, *rest = pipe.vae.decoder.up_blocks
    stop = threading.Event()
    first.resnets[0].register_forward_hook(lambda *_: stop.set())
    calls, _ = counted([first.resnets[0], first.resnets[1], *rest])
    with torch.no_grad(), pytest.raises(Cancelled), cancellable(pipe, stop.is_set):
        pipe.vae.decode(torch.zeros(1, 4, 1, 4, 4))
    assert calls == [0]


def compile_whole(pipe) -> None:
    pipe.transformer.compile(backend="eager")


def compile_wrapped(pipe) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compile_blocks(pipe) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager")


@pytest.mark.compile
@pytest.mark.parametrize(
    ("compiled", "asked"), [(compile_whole, 2), (compile_wrapped, 2), (compile_blocks, 2 + 2 * LAYERS)]
)
def test_compiled_code_holds_no_hook_and_is_asked_outside(pipe, compiled, asked):
    """asked: how often about the denoiser, in two steps."""
    compiled(pipe)
    settings = settings_for(pipe)
    questions: list[bool] = []
    others = 1 + 2 + 3  # before all, the text encoder and its block, the decoder at each latent frame
    with torch.compiler.set_stance("force_eager"):  # compiling takes seconds, and is not what is asked here
        with cancellable(pipe, lambda: questions.append(True) or False):
            generate(pipe, settings)
            denoiser = uncompiled(pipe.transformer)
            inside = denoiser.blocks if compiled is compile_blocks else denoiser
            assert not any(module._forward_pre_hooks for module in inside.modules())
        assert len(questions) == others + asked
        stop = threading.Event()
        with pytest.raises(Cancelled), cancellable(pipe, stop.is_set):
            generate(pipe, settings, lambda phase, done, total: stop.set() if phase == "denoise" and done else None)
        questions.clear()
        generate(pipe, settings)
    assert not questions


@pytest.mark.gpu
def test_python_does_not_run_ahead_of_the_gpu():
    """Blocks of 20 ms or so: without a limit, all 40 are queued before the first is done."""
    pipe = tiny_wan.tiny_pipeline(num_layers=40, num_attention_heads=8, attention_head_dim=128, ffn_dim=4096).to("cuda")
    settings = settings_for(pipe, height=512, width=512, frames=17, steps=2)
    stop = threading.Event()
    begun: list[float] = []

    def press(*_) -> None:
        stop.set()
        begun.append(time.perf_counter())

    generate(pipe, settings)  # kernels are loaded
    torch.cuda.synchronize()
    pipe.transformer.blocks[20].register_forward_pre_hook(press)
    start = time.perf_counter()
    with pytest.raises(Cancelled), cancellable(pipe, stop.is_set):
        generate(pipe, settings)
    torch.cuda.synchronize()
    end = time.perf_counter()
    # Half of the step was before: four blocks' worth at most comes after.
    assert end - begun[0] < 0.3 * (begun[0] - start)
