"""``tilewise.stream`` on bidirectional pipelines: the first window is the stock clip, the others go on from its latents."""

from __future__ import annotations

import gc
import threading
import weakref

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import tilewise
from tests.helpers.tiny_conditioned import save, without_ftfy
from tests.helpers.tiny_wan import tiny_pipeline
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.streaming import stream as stream_module
from tilewise.pipelines.streaming.state import StreamState
from tilewise.pipelines.streaming.windows.plan import window_space
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.pipelines.streaming.windows.refused import WHY
from tilewise.pipelines.streaming.windows.spaces import window_spaces
from tilewise.pipelines.streaming.windows.ways.base import way_named, ways

RED, BLUE = "a red circle moving left", "a blue square moving right"
SIZE = {"height": 32, "width": 32, "steps": 2, "max_sequence_length": 16}

pytestmark = pytest.mark.filterwarnings("ignore:.*latent frames.*:UserWarning")


@pytest.fixture(scope="module")
def pipe():
    """Wan 2.2 TI2V-5B's kind: a timestep per token. It has run once, so that what a call leaves on it is there."""
    made = tiny_pipeline(expand_timesteps=True)
    stock_clip(made, 0)
    return made


@pytest.fixture(scope="module")
def plain():
    """Wan 2.1's kind, and two denoisers as in Wan 2.2 A14B."""
    return tiny_pipeline(boundary_ratio=0.9)


def stream(pipe, prompt=RED, **kwargs):
    return tilewise.stream(pipe, prompt, **{**SIZE, "window": 5, "overlap": 2, "fps": 8, **kwargs})


def stock_clip(pipe, seed: int) -> np.ndarray:
    """What the pipeline itself makes of the first window's settings."""
    video = pipe(
        RED, "", 32, 32, 9, 2, generator=torch.Generator().manual_seed(seed), max_sequence_length=16, output_type="np"
    ).frames[0]
    return (video * 255).round().astype(np.uint8)


def trace_of(pipe) -> list[str]:
    parts = [pipe, pipe.scheduler, *(m for part in pipe.components.values() if isinstance(part, torch.nn.Module)
                                     for m in part.modules())]  # fmt: skip
    return [
        f"{type(part).__name__} {sorted(vars(part))} {len(getattr(part, '_forward_pre_hooks', ()))}"
        f" {type(getattr(part, 'processor', None)).__name__}"
        for part in parts
    ]


@pytest.mark.parametrize("way", ["prefix", "renoised"])
def test_the_first_window_is_the_stock_clip(pipe, way):
    wanted = stock_clip(pipe, seed=5)
    before = trace_of(pipe)
    with stream(pipe, way=way, seed=5) as video:
        assert video.recipe.way == way and (video.recipe.window, video.recipe.overlap) == (5, 2)
        chunks = [next(video) for _ in range(3)]
    held = 0 if way == "prefix" else 2 * 2
    assert [len(chunk.frames) for chunk in chunks] == [9 - held, 6, 6]
    assert [chunk.first_latent for chunk in chunks] == [0, 5 - held // 2, 8 - held // 2]
    assert np.abs(chunks[0].frames.astype(int) - wanted[: 9 - held]).max() <= 1
    assert (chunks[0].frames == wanted[: 9 - held]).mean() > 0.99
    assert trace_of(pipe) == before
    assert np.array_equal(stock_clip(pipe, seed=5), wanted)


def test_prefix_tells_the_denoiser_that_the_tail_is_clean(pipe):
    """The forwards of the second window have the first one's last latents in front, at timestep 0."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with stream(pipe, way="prefix") as video:
        tail = next(video).latents[:, :, -2:]
        handle = pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((kwargs["hidden_states"].clone(), kwargs["timestep"].clone())),
            with_kwargs=True,
        )
        second = next(video)
        handle.remove()
    assert len(seen) == 4  # two steps with guidance
    for latents, timestep in seen:
        assert torch.equal(latents[:, :, :2], tail) and timestep.shape == (1, 5 * 16)
        assert (timestep[:, :32] == 0).all() and (timestep[:, 32:] == timestep[0, -1]).all() and timestep[0, -1] > 0
    assert second.latents.shape[2] == 3 and not torch.equal(seen[0][0][:, :, 2:], seen[-1][0][:, :, 2:])


def test_noise_on_the_prefix(pipe):
    seen: list[torch.Tensor] = []
    with stream(pipe, way="prefix", prefix_noise=0.25) as video:
        tail = next(video).latents[:, :, -2:]
        handle = pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.extend(
                [kwargs["hidden_states"][:, :, :2].clone(), kwargs["timestep"][0, :32]]
            ),
            with_kwargs=True,
        )
        next(video)
        handle.remove()
    assert all((timestep == 250).all() for timestep in seen[1::2])
    noise = (seen[0] - 0.75 * tail) / 0.25
    assert 0.7 < noise.std() < 1.3 and torch.allclose(seen[0], seen[-2])


def test_renoised_holds_the_tail_at_the_windows_noise_level(plain):
    """Both denoisers see (1 − σ)·tail + σ·noise in the first column, and the video ends on what the windows share."""
    seen: list[torch.Tensor] = []
    handles = [
        one.register_forward_pre_hook(lambda _, a, k: seen.append(k["hidden_states"].clone()), with_kwargs=True)
        for one in (plain.transformer, plain.transformer_2)
    ]
    try:
        with stream(plain, overlap=2, guidance=1.0, steps=3) as video:
            assert video.recipe.way == "renoised"
            first = next(video)
            del seen[:]
            second = next(video)
            last = video.source._last
            sigmas = plain.scheduler.sigmas[:3]
    finally:
        for handle in handles:
            handle.remove()
    assert first.latents.shape[2] == second.latents.shape[2] == 3
    tail, noise = second.latents[:, :, :1], seen[0][:, :, :1]  # the column that is held whole
    assert len(seen) == 3 and sigmas[0] == 1
    for latents, sigma in zip(seen, sigmas, strict=True):
        assert torch.allclose(latents[:, :, :1], (1 - sigma) * tail + sigma * noise, atol=1e-5)
    assert torch.equal(last[:, :, :3], second.latents) and last.shape[2] == 5


def test_the_ways_are_matrices():
    sigmas = [1.0, 0.6, 0.0]
    prefix = way_named("prefix").matrix(sigmas, 4, 2, 0.1)
    assert prefix.tolist() == torch.tensor([[0.1, 0.1, 1, 1], [0.1, 0.1, 0.6, 0.6], [0, 0, 0, 0]]).tolist()
    diagonal = way_named("diagonal").matrix([1.0, 0.9, 0.6, 0.3, 0.0], 4, 2)
    assert diagonal.tolist() == torch.tensor([[0, 0, 0.3, 0.6]]).expand(5, 4).tolist()
    renoised = way_named("renoised")
    assert renoised.matrix(sigmas, 3, 1).tolist() == torch.tensor(sigmas)[:, None].expand(3, 3).tolist()
    assert renoised.shares(4).tolist() == [1, 0.75, 0.5, 0.25]
    assert all(way.name == name for name, way in ways().items())


@pytest.mark.parametrize("way", ["prefix", "renoised"])
def test_all_frames_come_once_and_memory_is_flat(pipe, way):
    """Each latent frame is emitted once, in order, and what is kept does not grow."""
    kept, tensors = [], []
    with stream(pipe, way=way, seconds=41 / 8) as video:
        chunks = []
        for chunk in video:
            chunks.append((chunk.first_frame, len(chunk.frames), chunk.first_latent, chunk.latents.shape[2]))
            kept.append(sum(tensor.numel() for tensor in video.state_dict().tensors.values()))
            tensors.append(weakref.ref(chunk.latents))
            del chunk
            gc.collect()
    assert sum(count for _, count, _, _ in chunks) == 41
    ends = [(first + count, latent + t) for first, count, latent, t in chunks]
    assert [(first, latent) for first, _, latent, _ in chunks[1:]] == ends[:-1]
    assert len(set(kept[1:])) == 1
    assert sum(ref() is not None for ref in tensors) <= 2


def test_diagonal_takes_each_frame_of_a_queue_down_by_itself(pipe):
    """FIFO with two parts and lookahead, as plain code over the denoiser has it; the first window is the stock clip."""
    options = {"way": "diagonal", "window": 5, "overlap": 2, "steps": 6, "guidance": 1.0, "seed": 4}
    with pytest.warns(UserWarning, match="the way diagonal is experimental"):
        video = stream(pipe, **options)
    with video:
        chunks = [next(video)]
        sigmas = pipe.scheduler.sigmas.tolist()
        chunks += [next(video) for _ in range(2)]
        assert video.source.view()["levels"][0] == pytest.approx([0, 0, sigmas[5], sigmas[4], sigmas[3]])
    text = pipe.encode_prompt(RED, do_classifier_free_guidance=False, max_sequence_length=16)[0]

    def velocity(frames: torch.Tensor, levels: list[float]) -> torch.Tensor:
        timestep = torch.tensor(levels).repeat_interleave(16)[None] * 1000
        with torch.no_grad():
            return pipe.transformer(frames, timestep, text, return_dict=False)[0]

    generator = torch.Generator().manual_seed(4)
    first = torch.randn(chunks[0].latents.shape, generator=generator)  # the first window's noise
    assert first.shape[2] == 5
    done, passed = chunks[0].latents.clone(), [0] * 6
    queue = torch.randn(1, 4, 6, 8, 8, generator=generator)
    while done.shape[2] < 11:
        before = torch.cat([done, queue], 2)
        levels = [0.0] * done.shape[2] + [sigmas[count] for count in passed]
        for part in (0, 3):
            end = done.shape[2] + part + 3
            if all(count == 0 for count in passed[: part or 1]) and part:
                continue
            found = velocity(before[:, :, end - 5 : end], levels[end - 5 : end])
            for frame in range(part, part + 3):
                if frame == 0 or passed[frame - 1] > passed[frame]:
                    by = sigmas[passed[frame] + 1] - sigmas[passed[frame]]
                    queue[:, :, frame] += by * found[:, :, 2 + frame - part]
        passed = [count + (frame == 0 or passed[frame - 1] > count) for frame, count in enumerate(passed)]
        if passed[0] == 6:
            done = torch.cat([done, queue[:, :, :1]], 2)
            queue = torch.cat([queue[:, :, 1:], torch.randn(1, 4, 1, 8, 8, generator=generator)], 2)
            passed = [*passed[1:], 0]
    got = torch.cat([chunk.latents for chunk in chunks], 2)
    torch.testing.assert_close(got, done, atol=1e-4, rtol=1e-4)
    assert not pipe.transformer._forward_pre_hooks and not tilewise.is_patched(pipe)


def test_adain_brings_statistics_back(pipe):
    def drift(adain: float) -> float:
        with stream(pipe, way="prefix", adain=adain, seed=1) as video:
            parts = [next(video).latents for _ in range(5)]
        mean = [part.mean((0, 2, 3, 4)) for part in parts]
        return float((mean[-1] - mean[0]).abs().max())

    assert drift(1.0) < 1e-4 < drift(0.5) < drift(0.0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_later_windows_attend_to_earlier_ones_and_the_memory_is_told(pipe, guidance):
    """A second window sees the first one's keys; what is kept is as large as ``explain_stream`` says, and does not grow."""
    options = {"way": "prefix", "seed": 2, "guidance": guidance}
    with stream(pipe, **options) as video:
        plain = [next(video).frames for _ in range(2)]
    earlier = {"sink": 2, "previous": 1}
    with stream(pipe, **options, **earlier) as video:
        found, sizes = [], []
        for _ in range(3):
            found.append(next(video).frames)
            sizes.append(video.cache_bytes["total"])
        assert pipe.transformer._tilewise.state.earlier is not None
    assert np.array_equal(found[0], plain[0]) and not np.array_equal(found[1], plain[1])
    told = tilewise.explain_stream(pipe, window=5, overlap=2, height=32, width=32, steps=2, **{
        name: value for name, value in {**options, **earlier}.items() if name != "seed"})  # fmt: skip
    assert sizes[1:] == [told.memory.cache] * 2 and "keys of earlier windows: 3 latent frames, " in str(told)
    assert not tilewise.is_patched(pipe)
    with tilewise.patched(pipe, "dense", cache="first-block"), pytest.raises(tilewise.ConfigError, match="step cache"):
        stream(pipe, **options, **earlier)


@pytest.mark.parametrize("how", ["recache", "flush", "blend"])
def test_a_prompt_changes_at_a_window(pipe, how):
    plain = [chunk.frames for chunk in stream(pipe, way="prefix", seconds=25 / 8)]
    texts: list[torch.Tensor] = []
    with stream(pipe, way="prefix", seconds=25 / 8) as video:
        got = [next(video)]
        handle = pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: texts.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        video.set_prompt(BLUE, how, over=2)
        got += list(video)
        handle.remove()
    assert [chunk.prompt for chunk in got] == [RED] + [BLUE] * (len(got) - 1)
    assert np.array_equal(got[0].frames, plain[0]) and (got[1].frames != plain[1]).mean() > 0.05
    red, blue = (
        pipe.encode_prompt(p, do_classifier_free_guidance=False, max_sequence_length=16)[0] for p in (RED, BLUE)
    )
    assert torch.allclose(texts[0], torch.lerp(red, blue, 0.5) if how == "blend" else blue, atol=1e-5)
    assert torch.allclose(texts[4], blue)


@pytest.mark.parametrize("way", ["prefix", "renoised", "diagonal"])
def test_the_state_goes_on_bit_for_bit(pipe, way, tmp_path):
    earlier = {"sink": 2, "previous": 1} if way == "prefix" else {}
    steps = {"steps": 3} if way == "diagonal" else {}
    options = {"way": way, "seconds": 31 / 8, "seed": 3, "adain": 0.5, **earlier, **steps}
    with stream(pipe, **options) as video:
        next(video)
        video.set_prompt(BLUE, "blend", over=3)
        next(video)
        video.set_prompt("a green star", "flush", at=20 / 8)
        video.state_dict().save(tmp_path / "state.safetensors")
        if earlier:
            with pytest.raises(tilewise.ConfigError, match="save the whole state"):
                video.state_dict(small=True)
        wanted = np.concatenate([chunk.frames for chunk in video])
    with stream(pipe, **options) as video:
        video.load_state_dict(StreamState.load(tmp_path / "state.safetensors"))
        got = list(video)
    assert np.array_equal(np.concatenate([chunk.frames for chunk in got]), wanted)
    assert [chunk.prompt for chunk in got][0 :: len(got) - 1] == [BLUE, "a green star"]
    with stream(pipe, **{**options, "adain": 0.25}) as other, pytest.raises(tilewise.ConfigError, match="recipe"):
        other.load_state_dict(StreamState.load(tmp_path / "state.safetensors"))


def test_a_picture_comes_first(pipe):
    picture = np.full((32, 32, 3), (200, 40, 90), np.uint8)
    with stream(pipe, way="prefix", image=picture) as video:
        first = next(video)
    still = pipe.vae.decode(first.latents[:, :, :1], return_dict=False)[0]
    wanted = ((still[0, :, 0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
    assert len(first.frames) == 9 and np.abs(first.frames[0] - wanted.detach().numpy()).max() <= 1


def test_a_sparse_method_sees_the_window_as_its_grid(pipe):
    method = tilewise.STA(window=(1, 1, 1), tile=(2, 2, 2))
    with stream(pipe, way="prefix", method=method) as video:
        next(video)
        next(video)
        report = tilewise.summary(pipe)
    assert report.density < 1 and {row.kind for row in report.rows} >= {"sparse"} and not report.fallbacks
    assert not tilewise.is_patched(pipe)


def test_a_close_and_an_error_in_the_middle_of_a_window(pipe):
    before = trace_of(pipe)
    video = stream(pipe, way="prefix")
    next(video)
    in_forward, go_on, ended = threading.Event(), threading.Event(), []

    def hold(*_):
        in_forward.set()
        go_on.wait(30)

    handle = pipe.transformer.blocks[1].register_forward_pre_hook(hold)
    reader = threading.Thread(target=lambda: ended.append(list(video)))
    reader.start()
    assert in_forward.wait(30)
    closer = threading.Thread(target=video.close)
    closer.start()
    go_on.set()
    closer.join(30)
    reader.join(30)
    handle.remove()
    assert ended == [[]] and trace_of(pipe) == before
    handle = pipe.transformer.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        next(stream(pipe, way="renoised"))
    handle.remove()
    assert trace_of(pipe) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 5}, "leaves nothing new in a window of 5"),
        ({"overlap": 0}, "no window goes on"),
        ({"overlap": -1}, "overlap must be a whole number"),
        ({"window": 2.5}, "window must be a whole number"),
        ({"way": "sideways"}, "way to go on"),
        ({"adain": 2}, "adain must be from 0 to 1"),
        ({"way": "renoised", "prefix_noise": 0.1}, "prefix_noise is of the way prefix"),
        ({"way": "renoised", "image": np.zeros((32, 32, 3), np.uint8)}, "leave the image out"),
        ({"chunk": 3}, "give window and overlap"),
        ({"cache": tilewise.KVCache(window=6)}, "give window and overlap"),
        ({"height": 30}, "height"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"way": "diagonal"}, "a queue of 2 steps is not in parts of 3 new latent frames; give 3 steps"),
        ({"way": "diagonal", "steps": 3, "sink": 1}, "by the way diagonal its frames are at many"),
        ({"way": "diagonal", "steps": 3, "strength": 0.5}, "changes no video"),
        ({"way": "diagonal", "steps": 3, "prefix_noise": 0.1}, "prefix_noise is of the way prefix"),
        ({"sink": 6}, "a sink of 6 latent frames is longer than the first window, 5"),
        ({"sink": -1}, "sink must be a whole number"),
        ({"previous": 4}, "give at most 3"),
        ({"guidance": 1.0, "negative": "blurry"}, "no guidance"),
        ({"recipe": tilewise.CausalRecipe()}, "window is of windows"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(pipe, options, message):
    before = trace_of(pipe)
    with pytest.raises(tilewise.ConfigError, match=message):
        stream(pipe, **options)
    assert trace_of(pipe) == before


def test_a_prefix_that_nobody_trained_is_warned_of(pipe, plain):
    with pytest.warns(UserWarning, match=r"2 latent frames is longer than the 1 that WanTransformer3DModel"):
        stream(pipe, way="prefix").close()
    with pytest.warns(UserWarning, match="nothing says that these weights"):
        stream(plain, way="prefix").close()


def test_defaults_by_what_the_model_says(pipe, plain):
    for one, way, overlap in ((pipe, "prefix", 1), (plain, "renoised", 2)):
        with tilewise.stream(one, RED, height=32, width=32, window=5) as video:
            assert (video.recipe.way, video.recipe.overlap, video.recipe.steps) == (way, overlap, 50)
    recipe = WindowRecipe("renoised", 5, 1, 2, 1.0, 8, 32, 32)
    with tilewise.stream(plain, RED, recipe=recipe, overlap=3) as video:
        assert video.recipe == recipe.replace(overlap=3)


def test_condition_begins_each_window_with_the_last_frame(monkeypatch):
    """Of an image-to-video model; each window is the stock clip of that picture."""
    without_ftfy(monkeypatch)
    pipe = tiny_pipeline(image=True)
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    seen: list[np.ndarray] = []
    preprocess = pipe.video_processor.preprocess
    monkeypatch.setattr(
        pipe.video_processor,
        "preprocess",
        lambda image, **k: (seen.append(np.asarray(image)), preprocess(image, **k))[1],
    )
    with stream(pipe, image=picture, overlap=None, seconds=25 / 8) as video:
        assert (video.recipe.way, video.recipe.overlap) == ("condition", 1)
        chunks = [next(video)]
        state = video.state_dict()
        chunks += list(video)
    assert [len(chunk.frames) for chunk in chunks] == [9, 8, 8] and [c.latents.shape[2] for c in chunks] == [5, 5, 5]
    assert [chunk.first_frame for chunk in chunks] == [0, 9, 17]
    for given, wanted in zip(seen, [picture, chunks[0].frames[-1], chunks[1].frames[-1]], strict=True):
        assert np.array_equal(given, wanted)
    generator = torch.Generator().manual_seed(0)
    for chunk, given in zip(chunks[:2], seen, strict=False):
        clip = pipe(
            Image.fromarray(given), RED, "", 32, 32, 9, 2, generator=generator, max_sequence_length=16, output_type="np"
        ).frames[0]
        wanted = (clip * 255).round()[-len(chunk.frames) :]
        assert np.abs(chunk.frames - wanted).max() <= 1
    with stream(pipe, image=picture, overlap=None, seconds=25 / 8) as video:
        video.load_state_dict(state)
        assert np.array_equal(np.concatenate([c.frames for c in video]), np.concatenate([c.frames for c in chunks[1:]]))
    for options, message in (
        ({}, "give an image"),
        ({"image": picture, "overlap": 2}, "overlap must be 1"),
    ):
        with pytest.raises(tilewise.ConfigError, match=message):
            stream(pipe, **{"overlap": None, **options})
    with pytest.raises(tilewise.UnsupportedModelError, match="each window begins with a picture"):
        stream(pipe, way="renoised", image=picture)


@pytest.mark.parametrize("kind", sorted(WHY))
def test_pipelines_that_one_might_look_for_say_what_stands_in_the_way(kind):
    assert hasattr(diffusers, kind) and kind not in window_spaces()
    pipe = object.__new__(getattr(diffusers, kind))
    with pytest.raises(
        tilewise.UnsupportedModelError, match=rf"{kind} goes none of the ways \(.*\): .*{WHY[kind][:20]}"
    ):
        window_space(pipe)


def test_vace_begins_each_window_with_the_last_frames(monkeypatch, tmp_path):
    """Of the video that it is conditioned on the first frames are kept, and the rest is made: the stock call with those."""
    without_ftfy(monkeypatch)
    pipe = load_pipeline(save(tmp_path / "vace", "vace"))
    with stream(pipe, seconds=21 / 8, guidance=5.0) as video:
        assert (video.recipe.way, video.recipe.overlap) == ("condition", 2)
        chunks = [next(video)]
        state = video.state_dict()
        chunks += list(video)
    assert [len(chunk.frames) for chunk in chunks] == [9, 6, 6] and [c.first_frame for c in chunks] == [0, 9, 15]
    generator, grey = torch.Generator().manual_seed(0), Image.new("RGB", (32, 32), (128, 128, 128))
    size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}
    tail: list[Image.Image] = []
    for chunk in chunks[:2]:
        given = {
            "video": [*tail, *[grey] * (9 - len(tail))],
            "mask": [Image.new("L", (32, 32), 0 if i < len(tail) else 255) for i in range(9)],
        } if tail else {}  # fmt: skip
        clip = pipe(RED, "", generator=generator, output_type="np", **size, **given).frames[0]
        wanted = (clip * 255).round()[-len(chunk.frames) :]
        assert np.abs(chunk.frames - wanted).max() <= 1
        tail = [Image.fromarray(frame) for frame in chunk.frames[-3:]]
    with stream(pipe, seconds=21 / 8, guidance=5.0) as video:
        video.load_state_dict(state)
        assert np.array_equal(np.concatenate([c.frames for c in video]), np.concatenate([c.frames for c in chunks[1:]]))
    start = np.zeros((32, 32, 3), np.uint8)
    with stream(pipe, image=start) as video:  # a picture to begin with
        assert not np.array_equal(next(video).frames, chunks[0].frames)


def test_windows_beside_their_decoding_are_the_same(pipe, monkeypatch):
    """As on a GPU: a thread makes the next window while one is read, so that a new prompt comes a window later."""
    with stream(pipe, way="prefix", seconds=21 / 8) as video:
        wanted = [next(video), next(video)]
        video.set_prompt(BLUE)
        wanted += list(video)
    before = trace_of(pipe)
    monkeypatch.setattr(stream_module, "runs_beside", lambda device, recipe: True)
    with stream(pipe, way="prefix", seconds=21 / 8) as video:
        got = [next(video)]
        video.finish_under_way()
        video.set_prompt(BLUE)
        state = video.state_dict()
        got += list(video)
    assert [chunk.prompt for chunk in got] == [RED, RED, BLUE] == [chunk.prompt for chunk in wanted]
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(got, wanted, strict=True))
    with stream(pipe, way="prefix", seconds=21 / 8) as video:
        video.load_state_dict(state)
        assert all(np.array_equal(a.frames, b.frames) for a, b in zip(list(video), wanted[1:], strict=True))
    with stream(pipe, way="prefix") as video:  # closed while a window is made
        next(video)
    assert trace_of(pipe) == before and list(video) == []
    handle = pipe.transformer.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        next(stream(pipe, way="prefix"))
    handle.remove()
    assert not tilewise.is_patched(pipe) and not pipe.transformer._forward_pre_hooks


@pytest.mark.gpu
def test_windows_on_a_gpu_are_decoded_beside_the_next_one():
    pipe = tiny_pipeline().to("cuda")
    with stream(pipe, way="renoised", seconds=33 / 8) as video:
        assert video._worker is not None
        chunks = list(video)
    assert sum(len(chunk.frames) for chunk in chunks) == 33
    latents = torch.cat([chunk.latents for chunk in chunks], 2)
    whole = video.source.sampler.space.decode(pipe, latents)
    got = np.concatenate([chunk.frames for chunk in chunks])
    assert np.abs(got - (whole * 255).round()).max() <= 4
