"""The detector against rendered ground truth: it must know what is in a clip without being told."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from tilewise.pipelines.quality.content_detection import ClipContent, DetectedObject, analyse
from tilewise.pipelines.quality.content_score import ExpectedContent, ExpectedObject, parse_prompt, score
from tilewise.pipelines.quality.demo_world import COLOURS

ROOT = str(Path(__file__).parents[3])
if ROOT not in sys.path:
    sys.path.append(ROOT)

from examples.train_demo_model.captions import captions_and_labels  # noqa: E402
from examples.train_demo_model.evaluation import mean_scores  # noqa: E402
from examples.train_demo_model.render import render, to_frames  # noqa: E402
from examples.train_demo_model.scenes import sample_scenes, take  # noqa: E402


def rendered(count, seed, *, size=128, two_objects=0.0):
    """Clips as uint8 frames with captions, one at a time."""
    scenes = sample_scenes(count, seed, two_objects=two_objects, held_out="any")
    if two_objects:
        scenes = take(scenes, scenes["two"])
    texts, _ = captions_and_labels(scenes, seed)
    for row, text in enumerate(texts):
        clip = to_frames(render(take(scenes, slice(row, row + 1)), height=size))[0]
        yield text, clip


def degraded(clip, rng):
    """Blur and noise, worse than a 32 dB codec."""
    blur = 0.9 * clip.shape[1] / 128
    soft = ndimage.gaussian_filter(clip, (0, blur, blur, 0))
    return np.clip(soft + rng.normal(0, 0.025, clip.shape), 0, 1)


def as_bytes(clip):
    return (clip * 255).round().astype(np.uint8)


def results_of(clips):
    results = [score(analyse(clip), parse_prompt(text)) for text, clip in clips]
    return mean_scores(results)


@pytest.mark.slow
def test_single_objects():
    means = results_of((text, as_bytes(clip)) for text, clip in rendered(40, 101))
    assert min(value for key, value in means.items() if key != "everything") >= 0.98, means


@pytest.mark.slow
def test_single_objects_blurred_and_noisy():
    rng = np.random.default_rng(0)
    means = results_of((text, degraded(clip, rng)) for text, clip in rendered(16, 102))
    assert min(value for key, value in means.items() if key != "everything") >= 0.98, means


@pytest.mark.slow
def test_larger_frames():
    means = results_of((text, as_bytes(clip)) for text, clip in rendered(4, 103, size=256))
    assert min(means.values()) == 1.0, means


@pytest.mark.slow
def test_two_objects():
    means = results_of((text, as_bytes(clip)) for text, clip in rendered(24, 104, two_objects=1.0))
    assert min(value for key, value in means.items() if key != "everything") >= 0.9, means


def test_track_follows_the_object():
    scenes = sample_scenes(12, 105, two_objects=0.0, held_out="any")
    video = to_frames(render(scenes))
    for row in range(12):
        shape = int(scenes["shape0"][row])
        track = analyse(video[row]).objects[0].track
        centre = np.stack([scenes["x0"][row], scenes["y0"][row]], 1)
        inside = np.abs(centre).max(1) + 1.2 * scenes["radius0"][row] < 1
        if shape < 2 and inside.any():  # the centre of mass of a circle or a square is its centre
            assert np.abs(track[inside, :2] - centre[inside]).max() < 0.02


@pytest.mark.parametrize("kind", ["noise", "grey", "plain", "one pixel", "one frame", "nan"])
def test_no_object(kind):
    frames = {
        "noise": np.random.default_rng(0).random((5, 64, 64, 3)),
        "grey": np.full((5, 64, 64, 3), 0.5),
        "plain": np.broadcast_to(np.array(COLOURS["blue"]), (5, 64, 64, 3)),
        "one pixel": np.zeros((2, 1, 1, 3), np.uint8),
        "one frame": np.full((1, 32, 32, 3), 200, np.uint8),
        "nan": np.full((3, 16, 16, 3), np.nan),
    }[kind]
    content = analyse(frames)
    assert content.objects == ()
    assert content.count == 0
    if kind == "plain":
        assert (content.background_colour, content.background_pattern) == ("blue", "plain")
    assert score(content, parse_prompt("a red circle"))["colour"] is False


def test_wrong_input_shape():
    with pytest.raises(ValueError, match="frames, height, width, 3"):
        analyse(np.zeros((3, 5, 64, 64)))


@pytest.mark.parametrize(
    ("text", "objects", "colour", "pattern"),
    [
        ("a red circle moving right on a blue background", [("red", "circle", "right")], "blue", "plain"),
        ("A RED CIRCLE, moving to the right; blue striped background!", [("red", "circle", "right")], "blue", "striped"),
        ("a checkered green background with an orange star rising", [("orange", "star", "up")], "green", "checkered"),
        ("white ball moving in a circle, black gradient", [("white", "circle", "circling")], "black", "gradient"),
        ("the black box is bouncing up and down on a red gradient background", [("black", "square", "bouncing")], "red",
         "gradient"),
        ("a yellow triangle getting smaller and a purple star moves left over a solid white background",
         [("yellow", "triangle", "shrinking"), ("purple", "star", "left")], "white", "plain"),
        ("a little red circle", [("red", "circle", None)], None, None),
        ("a star growing", [(None, "star", "growing")], None, None),
        ("something on a blue background", [], "blue", "plain"),
        ("", [], None, None),
    ],
)  # fmt: skip
def test_parse_prompt(text, objects, colour, pattern):
    wanted = ExpectedContent(tuple(ExpectedObject(*values) for values in objects), colour, pattern)
    assert parse_prompt(text) == wanted


def seen(*colours):
    objects = tuple(DetectedObject(colour, "square", "left", 1.0, np.zeros((9, 3))) for colour in colours)
    return ClipContent(objects, "white", "plain")


@pytest.mark.parametrize(
    ("text", "colours", "count"),
    [
        ("two blue squares moving left", ["blue"], False),  # drawn as one
        ("two blue squares moving left", ["blue", "blue"], True),
        ("2 blue boxes and a red square", ["blue", "blue", "red"], True),
        ("a pair of red squares", ["red"], False),
        ("one blue square", ["blue"], True),
        ("three blue squares", ["blue", "blue"], None),  # of one colour, more than are told apart
        ("three blue squares", ["blue"], False),
        ("blue squares", ["blue"], None),  # how many is not said
        ("several blue squares", ["blue", "blue"], None),
        ("a blue square and a dog", ["blue"], None),
        ("a blue square 🐕 犬", ["blue"], None),
        ("a zebra", [], None),
    ],
)
def test_counts_are_read_or_unknown(text, colours, count):
    result = score(seen(*colours), parse_prompt(text))
    assert result["count"] is count
    if count is not None and "three" not in text:
        assert result["colour"] is count
        assert result["shape"] is count


def test_what_is_said_of_two_is_said_of_both():
    parsed = parse_prompt("two red squares growing on white")
    assert parsed.objects == (ExpectedObject("red", "square", "growing"),) * 2


def test_every_training_caption_is_understood():
    from examples.train_demo_model.captions import ATTRIBUTES, NOT_SAID
    from tilewise.pipelines.quality.demo_world import MOTIONS, PATTERNS, SHAPES

    scenes = sample_scenes(800, 106, two_objects=0.3, held_out="any")
    texts, labels = captions_and_labels(scenes, 107)
    tables = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS}
    for text, row in zip(texts, labels, strict=True):
        answers = dict(zip(ATTRIBUTES, row.tolist(), strict=True))
        parsed = parse_prompt(text)
        assert parsed.unread == ()
        found = {"background": parsed.background_colour, "pattern": parsed.background_pattern}
        wanted = {
            "background": None if answers["background"] == NOT_SAID else tuple(COLOURS)[answers["background"]],
            "pattern": None if answers["pattern"] == NOT_SAID else PATTERNS[answers["pattern"]],
        }
        for slot in range(2):
            for kind, table in tables.items():
                answer = answers[f"{kind}{slot}"]
                said = answer != NOT_SAID and answer < len(table)
                wanted[f"{kind}{slot}"] = table[answer] if said else None
                thing = parsed.objects[slot] if slot < len(parsed.objects) else ExpectedObject()
                found[f"{kind}{slot}"] = getattr(thing, kind)
        assert found == wanted, text


def thing(colour, shape=None, motion=None):
    return DetectedObject(colour, shape, motion, 1.0, np.zeros((1, 3)))


@pytest.mark.parametrize(
    ("wanted", "found", "colour", "shape", "motion"),
    [
        ("a blue star and a red circle", [("red", "circle"), ("blue", "star")], True, True, None),
        # Told apart by colour, even where the shapes would fit better the other way round.
        ("a blue star and a red circle", [("blue", "circle"), ("red", "star")], True, False, None),
        ("a red circle and a red circle moving up", [("red", "circle", "up"), ("red", "circle")], True, True, True),
        # The only red object is needed by the second; the first must do with none.
        ("a circle and a red star", [("red", "circle")], True, False, None),
        ("a red circle and a red circle", [("red", "circle")], False, False, None),
        ("a red circle", [("blue", "circle"), ("green", "star"), ("red", "square")], True, False, None),
        ("a red circle", [], False, False, None),
    ],
)
def test_each_wanted_object_is_judged_by_the_one_that_fits_best(wanted, found, colour, shape, motion):
    content = ClipContent(tuple(thing(*values) for values in found), None, None)
    result = score(content, parse_prompt(wanted))
    assert (result["colour"], result["shape"], result["motion"]) == (colour, shape, motion)


def test_long_prompts_are_scored_at_once():
    content = ClipContent((thing("red", "circle", "up"), thing("blue", "star", "left")), "white", "plain")
    begin = time.perf_counter()
    result = score(content, parse_prompt("a red circle moving up and a blue star and " * 50))
    assert time.perf_counter() - begin < 1
    assert (result["count"], result["colour"]) == (False, False)


def test_score_says_none_where_nothing_was_asked_and_false_where_it_is_wrong():
    text, clip = next(rendered(1, 108))
    content = analyse(clip)
    right = score(content, parse_prompt("a square"))
    assert right["colour"] is None
    assert right["background"] is None
    swapped = ExpectedContent((ExpectedObject(content.background_colour),), content.objects[0].colour)
    result = score(content, swapped)
    assert result["colour"] is False
    assert result["background_colour"] is False
    assert score(content, parse_prompt(text))["count"] is True
