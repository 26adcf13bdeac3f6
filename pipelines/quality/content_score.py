"""How much of its prompt a clip of the demo model's world shows.

`parse_prompt` turns a prompt in the world's language into the terms of `content_detection.analyse`; `score` compares the two.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment

from tilewise.pipelines.quality.content_detection import ClipContent, DetectedObject
from tilewise.pipelines.quality.demo_world import COLOURS, SHAPES

TOLD_APART = 2  # objects of one colour that `analyse` finds at most
ATTRIBUTES = ("colour", "shape", "count", "motion", "background_colour", "background_pattern", "background")


@dataclass(frozen=True)
class ExpectedObject:
    """One object of a prompt; None is what the prompt does not say."""

    colour: str | None = None
    shape: str | None = None
    motion: str | None = None


@dataclass(frozen=True)
class ExpectedContent:
    """What a prompt asks for. unread: its words that mean nothing here, so that there may be more objects than were read; among
    them the plural of a shape without a number."""

    objects: tuple[ExpectedObject, ...] = field(default=())
    background_colour: str | None = None
    background_pattern: str | None = None
    unread: tuple[str, ...] = field(default=(), compare=False)


_SHAPE_WORDS = {**{name: name for name in SHAPES}, **{name + "s": name for name in SHAPES}}
_SHAPE_WORDS |= dict.fromkeys(("ball", "disc", "disk", "balls", "discs", "disks"), "circle")
_SHAPE_WORDS |= dict.fromkeys(("box", "cube", "boxes", "cubes"), "square")
_MOTION_WORDS = {
    "left": ("left", "leftwards"),
    "right": ("right", "rightwards"),
    "up": ("up", "upwards", "upward", "rising", "rises"),
    "down": ("down", "downwards", "downward", "falling", "falls"),
    "circling": ("circling", "orbiting"),
    "growing": ("growing", "grows", "bigger", "larger"),
    "shrinking": ("shrinking", "shrinks", "smaller"),
    "bouncing": ("bouncing", "bounces"),
}
_PATTERN_WORDS = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "stripes", "stripy"),
    "checkered": ("checkered", "checkerboard", "chequered", "checked"),
    "gradient": ("gradient",),
}
_NUMBER_WORDS = {
    word: number
    for number, words in enumerate(
        (
            ("one", "single", "a", "an"), ("two", "pair", "couple", "both"), ("three",), ("four",), ("five",), ("six",),
            ("seven",), ("eight",), ("nine",), ("ten",),
        ),
        1,
    )
    for word in words
}  # fmt: skip
# Words without a meaning of their own here: they add no object and take none away.
_FILLERS = frozenset(
    (
        "the", "of", "on", "in", "over", "with", "and", "is", "are", "to", "at", "from", "by", "it", "its", "there", "this",
        "that", "while", "as", "front", "video", "clip", "animation", "picture", "image", "scene", "showing", "shows", "show",
        "move", "moves", "moving", "sliding", "slides", "goes", "going", "gets", "getting", "into", "little", "small", "tiny",
        "big", "large", "bright", "dark", "very", "slowly", "quickly", "smoothly", "side", "across", "frame",
    )
)  # fmt: skip
_MEANING = {
    **{word: ("colour", word) for word in COLOURS},
    **{word: ("shape", shape) for word, shape in _SHAPE_WORDS.items()},
    **{word: ("motion", motion) for motion, words in _MOTION_WORDS.items() for word in words},
    **{word: ("pattern", pattern) for pattern, words in _PATTERN_WORDS.items() for word in words},
    **{word: ("number", str(number)) for word, number in _NUMBER_WORDS.items()},
    "background": ("background", ""),
}


def parse_prompt(text: str) -> ExpectedContent:
    """What a prompt in the demo world's language asks for. Missing attributes are None, unknown words are `unread`."""
    text = re.sub(r"\bin (a circle|circles)\b", "circling", text.lower())
    text = re.sub(r"\b(?:(?:bouncing|bounces) )?up and down\b", "bouncing", text)
    said = [word if word.isalpha() else _digits(word) for word in re.findall(r"[^\W_]+", text)]
    unread = [word for word in said if word not in _MEANING and word not in _FILLERS]
    words = [_MEANING[word] for word in said if word in _MEANING]
    plurals = [word.endswith("s") for word in said if word in _MEANING]
    objects: list[dict[str, str]] = []
    background: dict[str, str] = {}
    pending: dict[str, str] = {}
    for index, (kind, value) in enumerate(words):
        following = words[index + 1][0] if index + 1 < len(words) else None
        if kind == "shape":
            told = {"colour": pending.pop("colour", None), "shape": value, "motion": pending.pop("motion", None)}
            count = int(pending.pop("number", "0"))
            if count < 2 and plurals[index]:
                unread.append(f"{value}s")  # how many is not said
            # One dict for all of them: what is said of "two squares" later is said of both.
            objects += [{key: word for key, word in told.items() if word}] * max(1, count)
        elif kind == "motion":
            waiting = [thing for thing in objects if "motion" not in thing]
            (waiting[-1] if waiting else pending).setdefault("motion", value)
        elif kind == "background":
            background = {
                "pattern": "plain",
                **{key: pending.pop(key) for key in ("colour", "pattern") if key in pending},
            }
        else:
            if kind == "colour" and "colour" in pending and not objects:  # "a red thing on blue": a shape not known
                objects.append({"colour": pending["colour"]})
            pending[kind] = value
            if value == "gradient" and following != "background":  # "a blue gradient" is a background by itself
                background = {key: pending.pop(key) for key in ("colour", "pattern") if key in pending}
    pending.pop("number", None)
    if not background:
        background = {key: pending[key] for key in ("colour", "pattern") if key in pending}
    return ExpectedContent(
        tuple(ExpectedObject(**thing) for thing in objects),
        background.get("colour"),
        background.get("pattern"),
        tuple(dict.fromkeys(unread)),
    )


def _digits(word: str) -> str:
    """ "two" for "2"; other words that are not letters alone as they are."""
    return next(
        (name for name, number in _NUMBER_WORDS.items() if word == str(number) and name not in ("a", "an")), word
    )


def score(content: ClipContent, expected: ExpectedContent) -> dict[str, bool | None]:
    """Which attributes are as expected; None where nothing was expected. With two objects, both must be right.

    The count is None, unknown, where the prompt may ask for more than was read, and for more objects of one colour than the
    detector tells apart.
    """
    result: dict[str, bool | None] = dict.fromkeys(ATTRIBUTES)
    if expected.objects and not expected.unread:
        alike = Counter(thing.colour for thing in expected.objects)
        most = sum(min(number, TOLD_APART) for number in alike.values())  # that the detector can find
        result["count"] = (
            None if content.count == most < len(expected.objects) else content.count == len(expected.objects)
        )
    wanted = expected.objects
    chosen = _assign(wanted, content.objects[: len(wanted) + 4])
    result.update({key: _all_right(wanted, chosen, key) for key in ("colour", "shape", "motion")})
    colour, pattern = expected.background_colour, expected.background_pattern
    result["background_colour"] = None if colour is None else content.background_colour == colour
    result["background_pattern"] = None if pattern is None else content.background_pattern == pattern
    said = [right for right in (result["background_colour"], result["background_pattern"]) if right is not None]
    result["background"] = all(said) if said else None
    return result


def _assign(wanted: tuple[ExpectedObject, ...], found: tuple[DetectedObject, ...]) -> list[DetectedObject | None]:
    """For each wanted object the found one that it is judged by: the assignment with the most right, in polynomial time.

    The most prominent objects come first in `found`: where several assignments are equally right, the first wanted object
    gets the most prominent one it can have, then the second, and so on.
    """
    # Objects are told apart by their colour; the rest breaks ties.
    weights = {"colour": 10, "shape": 2, "motion": 1}
    value = np.array(
        [[sum(w * _matches(want, have, key) for key, w in weights.items()) for have in found] for want in wanted], int
    ).reshape(len(wanted), len(found))
    chosen: list[DetectedObject | None] = []
    free = list(range(len(found)))
    best = _most(value)
    for row in range(len(wanted)):
        taken = None
        for column in free:
            others = _most(value[np.ix_(range(row + 1, len(wanted)), [other for other in free if other != column])])
            if value[row, column] + others == best:
                taken, best = column, others
                free.remove(column)
                break
        chosen.append(None if taken is None else found[taken])  # none: its rivals need every object that is left
    return chosen


def _most(value: np.ndarray) -> int:
    """The largest sum over pairs of a row and a column of its own."""
    return int(value[linear_sum_assignment(value, maximize=True)].sum())


def _matches(want: ExpectedObject, have: DetectedObject | None, key: str) -> bool:
    value = getattr(want, key)
    return value is not None and have is not None and getattr(have, key) == value


def _all_right(wanted: tuple[ExpectedObject, ...], chosen: list[DetectedObject | None], key: str) -> bool | None:
    said = [(want, have) for want, have in zip(wanted, chosen, strict=True) if getattr(want, key) is not None]
    return all(_matches(want, have, key) for want, have in said) if said else None
