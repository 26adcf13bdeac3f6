"""A stream that somebody watches: its prompt changes on the way, and its settings make the same frames again."""

from __future__ import annotations

import functools

import pytest
from causal_checkpoints import save_causal_pipeline

from tilewise.pipelines.generation.cancellation import Cancelled
from tilewise.pipelines.loading.load import load_skeleton
from tilewise.pipelines.media.video import read_settings
from tilewise.pipelines.streaming.preparation import load, prepare, stream_of
from tilewise.pipelines.streaming.record import Audience, record
from tilewise.pipelines.streaming.settings import StreamSettings

RED, BLUE = "a red circle moving left", "a blue square moving right"
RECIPE = {"chunk": 2, "window": 6, "sink": 2, "height": 32, "width": 48, "fps": 8, "timesteps": [1000, 500]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_causal_pipeline(tmp_path_factory.mktemp("causal") / "m", RECIPE))


def audience(videos: list, pieces: list, shown) -> Audience:
    return Audience(videos.append, functools.partial(shown, videos), pieces.append)


@pytest.mark.parametrize("method", ["dense", "sta"])
def test_a_prompt_that_was_changed_while_it_was_made_is_made_again(model, method, tmp_path):
    def change(videos, chunk) -> None:
        if chunk.first_frame == 3:
            videos[0].set_prompt(BLUE, "flush")
        if chunk.first_frame == 11:
            videos[0].close()  # as somebody does who has gone

    skeleton = load_skeleton(model)
    work = prepare(skeleton, RED, StreamSettings(seconds=100.0, prompt_change="flush"), model=model, method=method)
    pipe = load(work, device="cpu", dtype="float32")
    pieces: list[bytes] = []
    made = record(pipe, work, tmp_path / "a.mp4", {}, audience=audience([], pieces, change), beside=False)
    assert made.frames == 15 and (made.summary is None) == (method == "dense") and len(pieces) > 2
    told = read_settings(tmp_path / "a.mp4")
    options, recipe = stream_of(told["run"]["stream"])
    assert options.prompts() == [(7 / 8, BLUE)] and told["prompt"] == RED and told["frames"] == 15
    again = prepare(skeleton, told["prompt"], options, model=model, method=method, recipe=recipe)
    assert record(pipe, again, tmp_path / "b.mp4", {}, beside=False).frames_sha256 == made.frames_sha256


def test_a_stream_that_is_closed_before_its_first_frames_leaves_no_file(model, tmp_path):
    work = prepare(load_skeleton(model), RED, StreamSettings(seconds=1.0), model=model)
    pipe = load(work, device="cpu", dtype="float32")
    gone = Audience(lambda video: video.close(), lambda chunk: None, lambda piece: None)
    with pytest.raises(Cancelled):
        record(pipe, work, tmp_path / "a.mp4", {}, audience=gone)
    assert not list(tmp_path.iterdir())
