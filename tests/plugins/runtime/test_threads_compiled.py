"""Threads that run one compiled patched denoiser: each gets what it gets alone, whatever compiles beside it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_wan
import torch
from threads import Turns

import tilewise
from tilewise.plugins.runtime.attention_call import AttentionCalls

pytestmark = pytest.mark.compile

STA = tilewise.STA(window=(1, 1, 1), tile=(2, 3, 3))
KEEPS = tilewise.Draft(density=0.4, tile=(1, 4, 4), min_tokens=0, refresh=3, drift=None)
SIZES = ((5, 16, 16), (3, 20, 12))


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


@torch.no_grad()  # a mode of each thread
def loop(model, number):
    """A denoising loop over latents of a size, and with a number of steps, of its own."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(1, 4, *SIZES[number], generator=generator)
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=generator)
    for timestep in torch.linspace(999, 10, 3 + number):
        x = x - 0.1 * model(x, timestep[None], text).sample
    return x


def compiled(model, how, backend):
    if how == "whole":
        model.compile(backend=backend, fullgraph=True)
    else:
        model.compile_repeated_blocks(backend=backend, fullgraph=True)


def eager_of(model, method):
    """What each loop gives alone, and the calls of both."""
    tilewise.patch(model, method, steps=(0.25, 1), strict=True)
    alone = [loop(model, number) for number in range(2)]
    calls = tilewise.summary(model).calls
    tilewise.patch(model, method, steps=(0.25, 1), strict=True)
    return alone, calls


@pytest.mark.parametrize(
    ("how", "backend", "method"), [("whole", "eager", STA), ("whole", "aot_eager", KEEPS), ("blocks", "eager", KEEPS)]
)
def test_compiled_in_one_thread_and_run_in_two(how, backend, method, monkeypatch):
    model = tiny_wan.tiny_transformer(num_layers=2)
    alone, calls = eager_of(model, method)
    compiled(model, how, backend)
    for number in range(2):
        torch.testing.assert_close(loop(model, number), alone[number])
    turns, answer = Turns(), AttentionCalls.answer

    def in_turns(*args):
        turns.hand_over()
        out = answer(*args)
        turns.hand_over()
        return out

    monkeypatch.setattr(AttentionCalls, "answer", in_turns)
    for got, want in zip(turns.run(lambda: loop(model, 0), lambda: loop(model, 1)), alone, strict=True):
        torch.testing.assert_close(got, want)
    assert turns.switches > 20
    assert tilewise.summary(model).calls == 2 * calls


@pytest.mark.parametrize(("how", "method"), [("whole", KEEPS), ("blocks", STA)])
def test_two_threads_make_the_first_call(how, method):
    model = tiny_wan.tiny_transformer(num_layers=2)
    alone, calls = eager_of(model, method)
    compiled(model, how, "eager")
    together = threading.Barrier(2)

    def first(number):
        together.wait(20)
        return loop(model, number)

    with ThreadPoolExecutor(2) as pool:
        for got, want in zip(pool.map(first, range(2)), alone, strict=True):
            torch.testing.assert_close(got, want)
    assert tilewise.summary(model).calls == calls


def test_another_model_compiles_while_two_threads_run():
    """PyTorch says in every thread that something compiles. Only what is traced may go by that."""
    model, other = tiny_wan.tiny_transformer(num_layers=2), torch.nn.Linear(2, 2)
    alone, calls = eager_of(model, STA)
    turns, seen = Turns(3), []

    def backend(graph, inputs):
        while len(seen) < 2:
            assert torch.compiler.is_compiling()
            turns.hand_over()
        return graph.forward

    def run(number):
        for _ in range(5 * number):  # so that the two are in other layers
            turns.hand_over()
        try:
            return loop(model, number)
        finally:
            seen.append(number)

    with turns.at_every_module(model):
        found = turns.run(lambda: torch.compile(other, backend=backend)(torch.ones(2)), lambda: run(0), lambda: run(1))
    for got, want in zip(found[1:], alone, strict=True):
        assert torch.equal(got, want)
    assert tilewise.summary(model).calls == calls
