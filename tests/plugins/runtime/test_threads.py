"""Threads that run one patched denoiser at the same time: each gets what it gets alone, and calls are counted once each."""

from __future__ import annotations

import copy
import gc
import threading
import time
import urllib.request
import weakref
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import family_checks
import pytest
import test_flux as flux
import test_hunyuan_framepack as framepack
import test_hunyuan_video as hunyuan
import test_qwen_image as qwen
import test_z_image as z_image
import tiny_wan
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from threads import Turns

import tilewise
from tilewise.plugins.guidance.dual_path import two_paths
from tilewise.plugins.methods.dynamic.step_memory import Memories
from tilewise.plugins.runtime.call_stats import SPARSE, CallKind, CallStats
from tilewise.plugins.runtime.plan_cache import LRU

TILE = (1, 4, 4)
KEEPS = tilewise.Draft(density=0.4, tile=TILE, min_tokens=0, refresh=3, drift=None)
METHODS = {
    "sta": tilewise.STA(window=(1, 1, 1), tile=(2, 3, 3)),
    "draft": tilewise.Draft(density=0.4, tile=TILE, min_tokens=0),
    "draft that keeps its choice": KEEPS,
    "xattention that keeps its choice": tilewise.XAttention(
        density=0.4, tile=TILE, min_tokens=0, refresh=2, drift=0.01
    ),
}
REQUESTS = (
    {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 3.0},
    {"height": 48, "width": 80, "num_frames": 5, "num_inference_steps": 6, "guidance_scale": 1.0},
)


def request(pipe, seed=0, **options):
    """What a server does: a pipeline of the same parts with a scheduler of its own."""
    own = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    own.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return own("a red circle", generator=generator, max_sequence_length=16, output_type="latent", **options).frames


def counted(*targets):
    """Calls by kind, and the token pairs of sparse ones that were kept."""
    calls, kept = {}, 0.0
    for row in [row for target in targets for row in target.rows]:
        calls[row.kind] = calls.get(row.kind, 0) + row.calls
        kept += row.density * row.pairs
    return calls, pytest.approx(kept)


@pytest.mark.parametrize("name", METHODS)
def test_two_requests_of_a_pipeline(tiny_pipe, name):
    alone, told = [], []
    for number, options in enumerate(REQUESTS):
        tilewise.patch(tiny_pipe, METHODS[name], steps=(0.25, 1))
        alone.append(request(tiny_pipe, number, **options))
        told.append(tilewise.summary(tiny_pipe))
    tilewise.patch(tiny_pipe, METHODS[name], steps=(0.25, 1))
    turns = Turns()
    with turns.at_every_module(tiny_pipe.transformer):
        together = turns.run(*(
            lambda number=number, options=options: request(tiny_pipe, number, **options)
            for number, options in enumerate(REQUESTS)
        ))  # fmt: skip
    assert turns.switches > 100
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got, want)
    assert counted(tilewise.summary(tiny_pipe)) == counted(*told)
    assert len(tiny_pipe.transformer._tilewise.state.memories) == 0


@pytest.mark.parametrize("name", METHODS)
def test_two_loops_over_a_denoiser_with_text_and_masks(name):
    """Text in the same sequence, of which a mask hides another part in each thread."""
    model = hunyuan.tiny(None)
    given = [hunyuan.inputs(None, (5, 14, 14), (9, 4)), hunyuan.inputs(None, (3, 10, 18), (6,))]

    def loop(number):
        found = dict(given[number])
        for timestep in (900.0, 700.0, 500.0, 300.0)[: 3 + number]:
            found["timestep"] = torch.full_like(found["timestep"], timestep)
            found["hidden_states"] = found["hidden_states"] - 0.1 * family_checks.forward(model, found)
        return found["hidden_states"]

    alone, told = [], []
    for number in range(2):
        tilewise.patch(model, METHODS[name], steps=(0.2, 1))
        alone.append(loop(number))
        told.append(tilewise.summary(model))
    tilewise.patch(model, METHODS[name], steps=(0.2, 1))
    turns = Turns()
    with turns.at_every_module(model):
        together = turns.run(lambda: loop(0), lambda: loop(1))
    assert turns.switches > 100
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got, want)
    assert counted(tilewise.summary(model)) == counted(*told)


OTHERS = {
    "flux": (flux, [(8, 10), (6, 7)]),
    "qwen image": (qwen, [((1, 8, 10),), ((1, 6, 7),)]),
    "z-image": (z_image, [(8, 10), (6, 7, (5, 6))]),
    "framepack": (framepack, [((3, 6, 8), (9, 4), (1, 2, 4)), ((2, 8, 6), (6,), (1, 2, 4))]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_forwards_of_two_sizes(name):
    """Of families with more than one stream of tokens, or token counts that their forward has to find."""
    family, sizes = OTHERS[name]
    model, given = family.tiny(), [family.inputs(*size) for size in sizes]
    tilewise.patch(model, METHODS["sta"], steps=(0, 1), strict=True)
    alone = [family_checks.forward(model, one) for one in given]
    turns = Turns()
    with turns.at_every_module(model):
        together = turns.run(*(lambda one=one: family_checks.forward(model, one) for one in given))
    for got, want in zip(together, alone, strict=True):  # Z-Image gives a list, an image each
        assert all(map(torch.equal, list(got), list(want)))


def test_a_run_within_a_run_has_memories_of_its_own(tiny_pipe):
    """Of the same denoiser, in the same thread, from a callback."""
    tilewise.patch(tiny_pipe, KEEPS, steps=(0, 1))
    alone = [request(tiny_pipe, number, **options) for number, options in enumerate(REQUESTS)]
    inner = []

    def call(pipe, step, timestep, tensors):
        if step == 1:
            inner.append(request(tiny_pipe, 1, **REQUESTS[1]))
        return tensors

    assert torch.equal(request(tiny_pipe, 0, **REQUESTS[0], callback_on_step_end=call), alone[0])
    assert torch.equal(inner[0], alone[1])


class StopError(Exception):
    """Raised in a callback, as who cancels a run does."""


def cancelled(pipe, **options):
    def stop(*_):
        raise StopError

    with pytest.raises(StopError):
        request(pipe, callback_on_step_end=stop, **options)


def maps():
    """Tensors of kept choices that are alive."""
    gc.collect()
    return sum(
        "kept" in entry and "tick" in entry for entry in gc.get_objects() if type(entry) is dict and "recall" in entry
    )


def test_a_pool_of_threads_runs_one_request_after_another(tiny_pipe):
    """Its threads live on: a cancelled run leaves nothing to the next one, and no memory."""
    tilewise.patch(tiny_pipe, KEEPS, steps=(0, 1))
    alone = [request(tiny_pipe, number, **options) for number, options in enumerate(REQUESTS)]

    def work(number):
        with torch.no_grad():
            if number % 3 == 2:
                return cancelled(tiny_pipe, **REQUESTS[0])
            return request(tiny_pipe, number % 3, **REQUESTS[number % 3])

    before = maps()
    with ThreadPoolExecutor(1) as pool:
        for number, got in enumerate(pool.map(work, (2, 0, 2, 1, 2))):
            assert got is None or torch.equal(got, alone[(2, 0, 2, 1, 2)[number]])
        assert maps() == before, "the timesteps of cancelled runs are gone, and with them what was kept"


def test_what_a_cancelled_run_kept_is_freed_with_its_thread_or_its_patch(tiny_pipe):
    """Where its scheduler lives on: the pipeline's own."""
    tilewise.patch(tiny_pipe, KEEPS, steps=(0, 1))
    before = maps()

    def stop(*_):
        raise StopError

    def run():
        with torch.no_grad(), pytest.raises(StopError):
            tiny_pipe("a red circle", max_sequence_length=16, callback_on_step_end=stop, **REQUESTS[0])

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
        assert maps() > before
    assert maps() == before
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
        tilewise.unpatch(tiny_pipe)
        assert maps() == before


def test_memories_of_a_run_are_gone_with_its_timesteps():
    memories, timesteps = Memories(), torch.zeros(7)
    memories.begin(0, timesteps)
    memories.now.of("layer")["map"] = kept = torch.zeros(3)
    seen = weakref.ref(kept)
    del kept
    assert seen() is not None and len(memories) == 1
    del timesteps
    assert seen() is None and len(memories) == 0


class Slow(int):
    """A number in whose addition another thread comes to run."""

    def __mul__(self, other):
        return Slow(int(self) * other)

    def __radd__(self, other):
        time.sleep(1e-4)
        return other + int(self)


def test_no_call_is_lost_in_the_counts():
    stats, tensor = CallStats(), SimpleNamespace(device=torch.device("cpu"), shape=(Slow(1), 8, 1, 4))

    def work(number):
        for n in range(30):
            with stats.record(n % 3, CallKind(SPARSE), tensor, tensor) as call:
                call.density, call.values = None, {"density": torch.tensor(0.5), "broken": torch.tensor(1.0)}

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    records = list(stats.records.values())
    assert [(record.calls, record.queries, record.pairs) for record in records] == [(40, 40 * 8, 40 * 64)] * 3
    assert [record.measurements.total("broken") for record in records] == [(40, 40)] * 3
    assert [record.kept_pairs() for record in records] == [(20 * 64, 40 * 64)] * 3


class Key:
    """Compared in Python, where threads may switch, as grids and layouts are."""

    def __init__(self, number):
        self.number = number

    def __hash__(self):
        return 0

    def __eq__(self, other):
        time.sleep(0)
        return self.number == other.number


def test_a_cache_that_threads_share_stays_small():
    cache = LRU(4)

    def work(first):
        return [cache.lookup(Key((first + n) % 7), lambda n=n: (first + n) % 7) == (first + n) % 7 for n in range(60)]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(found) for found in pool.map(work, range(4)))
    assert len(list(cache)) == len(cache) == 4


def test_a_processor_that_was_replaced_is_reported_by_one_thread():
    """Both find it at the same moment; its tokens must be brought into the model's own order once."""
    model = tiny_wan.tiny_transformer(num_layers=2)
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 4, 3, 8, 8, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=generator),
    }

    def replaced():
        tilewise.patch(model, METHODS["sta"], steps=(0, 1))
        # A subclass is not taken over.
        model.blocks[1].attn1.processor = type("Own", (WanAttnProcessor,), {})()

    replaced()
    alone = family_checks.forward(model, given)
    replaced()
    together, report = threading.Barrier(2), model._tilewise._replaced

    def both(layer):
        together.wait(20)
        report(layer)

    model._tilewise._replaced = both
    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(lambda _: family_checks.forward(model, given), range(2)):
            assert torch.equal(got, alone)
    assert torch.equal(family_checks.forward(model, given), alone)
    assert list(tilewise.summary(model).skipped_layers) == ["denoiser.blocks.1.attn1"]


def test_patching_while_another_thread_is_in_a_forward_is_refused(tiny_pipe):
    tilewise.patch(tiny_pipe, METHODS["sta"], steps=(0, 1))
    patch, alone = tiny_pipe.transformer._tilewise, request(tiny_pipe, **REQUESTS[0])
    turns = Turns()

    def others():
        with pytest.raises(
            tilewise.TilewiseError, match=r"patch: transformer is in a forward in another thread \(request 0\)"
        ):
            tilewise.patch(tiny_pipe, "dense")
        with pytest.raises(tilewise.TilewiseError, match="unpatch: transformer is in a forward"):
            tilewise.unpatch(tiny_pipe)
        with (
            pytest.raises(tilewise.TilewiseError, match="two paths: transformer is in a forward"),
            two_paths(tiny_pipe),
        ):
            pass
        return tiny_pipe.transformer._tilewise is patch

    with turns.at_every_module(tiny_pipe.transformer):
        got, untouched = turns.run(lambda: request(tiny_pipe, **REQUESTS[0]), others)
    assert untouched and torch.equal(got, alone)
    tilewise.unpatch(tiny_pipe)


def test_a_server_of_two_requests(tiny_pipe):
    """Each in a thread of the server, with its own scheduler. Tokenizers and Wan's VAE keep state: one thread at a time."""
    tilewise.patch(tiny_pipe, KEEPS, steps=(0.25, 1))
    lock, sizes = threading.Lock(), REQUESTS

    def clip(number):
        options = dict(sizes[number])
        own = type(tiny_pipe)(**{**tiny_pipe.components, "scheduler": copy.deepcopy(tiny_pipe.scheduler)})
        own.set_progress_bar_config(disable=True)
        with lock, torch.no_grad():
            text, negative = own.encode_prompt("a red circle", "blurry", max_sequence_length=16)
        latents = own(
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            generator=torch.Generator().manual_seed(number),
            output_type="latent",
            **options,
        ).frames
        with lock, torch.no_grad():
            return own.vae.decode(latents).sample.numpy().tobytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = clip(int(self.path[1:]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    alone = [clip(0), clip(1)]
    together, calls = threading.Barrier(2), threading.local()

    def meet(*_):
        calls.seen = getattr(calls, "seen", 0) + 1
        if calls.seen <= 4:
            together.wait(20)

    handle = tiny_pipe.transformer.blocks[1].register_forward_pre_hook(meet)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, ThreadPoolExecutor(3) as pool:
        pool.submit(server.serve_forever)
        try:
            answers = pool.map(
                lambda n: urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/{n}").read(), range(2)
            )
            assert list(answers) == alone
        finally:
            server.shutdown()
            handle.remove()
