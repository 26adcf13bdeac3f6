"""Streaming on a GPU: kernels over the window, captured graphs, decoding beside denoising, flat memory, no waiting."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import tilewise
from tests.helpers.causal_reference import with_list_caches
from tests.helpers.tiny_wan import tiny_pipeline, tiny_transformer
from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.streaming.causal_denoiser import CausalDenoiser
from tilewise.plugins.streaming.kv_cache import KVCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
C, H, W = 3, 16, 26  # 1,248 tokens a chunk; the window is long enough for the kernel that dense calls take


def denoiser(dtype: torch.dtype = torch.bfloat16, **config) -> torch.nn.Module:
    return tiny_transformer(3, attention_head_dim=128, **config).to("cuda", dtype)


def velocities(
    model, chunks: int, cache: KVCache, *, graph: bool, seed: int = 1
) -> tuple[torch.Tensor, CausalDenoiser]:
    dtype, out = model.proj_out.weight.dtype, []
    video = torch.randn(1, 4, C * chunks, 2 * H, 2 * W, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2)).to("cuda", dtype)
    with torch.no_grad(), CausalDenoiser(model, cache, grid=Grid(C, H, W), cuda_graph=graph) as causal:
        for part in video.split(C, 2):
            causal.begin()
            for timestep in (900.0, 300.0):
                x = torch.randn_like(part) if timestep > 500 else part
                found = causal(x, torch.full((1,), timestep, device="cuda"), text)
            out.append(found)
            causal.commit()
    return torch.cat(out, 2).float().cpu(), causal


def test_bf16_equals_the_reference_to_rounding():
    cache = KVCache(window=12, sink=3)
    got, _ = velocities(tilewise.patch(denoiser(), "dense"), 6, cache, graph=False)
    model = denoiser(torch.float32).cpu().double()
    caches = with_list_caches(model, H, W)
    video = torch.randn(1, 4, C * 6, 2 * H, 2 * W, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2)).double()
    wanted = []
    with torch.no_grad():
        for first in range(0, 18, C):
            own, kept = list(range(first, first + C)), list(range(min(3, first)))
            ring = list(range(max(len(kept), first - 6), first))
            oldest = ring[0] if ring else first
            at = {f: f for f in [*ring, *own]} | {i: oldest - len(kept) + i for i in kept}
            for one in caches:
                one.see(at, own)
            part = video[:, :, first : first + C].bfloat16().double()
            wanted.append(model(part, torch.full((1,), 300.0), text, return_dict=False)[0])
    reference = torch.cat(wanted, 2).float()
    assert (got - reference).norm() / reference.norm() < 0.03


CAPTURED = {
    "dense": "dense",
    "sta": tilewise.STA(window=(1, 3, 3), tile=(3, 4, 8)),
    "draft": Draft(density=0.4, min_tokens=0),
    "draft in a window": Draft(recall=0.8, always=("neighbours",), within=tilewise.STA(window=(2, 3, 3)), min_tokens=0),
}


@pytest.mark.parametrize(
    ("name", "storage"), [*((name, "model") for name in CAPTURED), ("dense", "fp8"), ("sta", "fp8")]
)
def test_a_captured_graph_gives_the_same_bits(name, storage):
    method = CAPTURED[name]
    cache = KVCache(window=12, sink=3, storage=storage)
    model = tilewise.patch(denoiser(), method, steps=(0.0, 1.0))
    plain, _ = velocities(model, 9, cache, graph=False)
    captured, causal = velocities(model, 9, cache, graph=True)
    assert causal.graphs.refused == "" and causal.graphs.replays >= 9
    assert torch.equal(plain, captured)


@pytest.mark.parametrize("storage", ["model", "fp8"])
def test_steady_chunks_wait_for_nothing_and_take_no_memory(storage):
    model = tilewise.patch(denoiser(), "dense")
    part = torch.randn(1, 4, C, 2 * H, 2 * W, device="cuda", dtype=torch.bfloat16)
    at, text = torch.full((1,), 300.0, device="cuda"), torch.randn(1, 6, 32, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), CausalDenoiser(model, KVCache(12, 3, storage=storage), grid=Grid(C, H, W)) as causal:

        def chunk() -> None:
            causal.begin()
            for _ in range(3):
                causal(part, at, text)
            causal.commit()

        for _ in range(12):
            chunk()
        torch.cuda.synchronize()
        gc.collect()  # what other tests left
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(400):  # 1,200 latent frames
                chunk()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before and causal.next_frame == 412 * C


def test_a_far_frame_is_as_exact_as_a_near_one():
    model = tilewise.patch(denoiser(), "dense")
    near, _ = velocities(model, 6, KVCache(window=12, sink=3), graph=False)
    outs = []
    video = torch.randn(1, 4, C * 6, 2 * H, 2 * W, generator=torch.Generator().manual_seed(1)).to(
        "cuda", torch.bfloat16
    )
    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2)).to("cuda", torch.bfloat16)
    with torch.no_grad(), CausalDenoiser(model, KVCache(window=12, sink=3), grid=Grid(C, H, W)) as causal:
        causal.reset(10**6)
        for part in video.split(C, 2):
            causal.begin()
            outs.append(causal(part, torch.full((1,), 300.0, device="cuda"), text))
            causal.commit()
    far = torch.cat(outs, 2).float().cpu()
    assert (far - near).norm() / near.norm() < 0.02


@pytest.mark.parametrize("decode_device", [None, "cpu"])
def test_frames_come_to_the_host_as_a_whole_decode_gives_them(decode_device):
    pipe = tiny_pipeline().to("cuda")
    recipe = CausalRecipe(chunk=2, window=6, sink=2, height=64, width=64, fps=8, timesteps=(1000, 500))
    with tilewise.stream(
        pipe, "a red circle", recipe=recipe, seconds=4, max_sequence_length=16, decode_device=decode_device
    ) as video:
        chunks = list(video)
    assert pipe.vae.device.type == "cuda"
    latents = torch.cat([chunk.latents for chunk in chunks], 2)
    frames = np.concatenate([chunk.frames for chunk in chunks])
    with torch.no_grad():
        whole = pipe.vae.decode(latents, return_dict=False)[0]
    wanted = ((whole[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).cpu().numpy()[: len(frames)]
    assert np.abs(frames.astype(int) - wanted).max() <= 1
