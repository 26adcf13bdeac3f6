"""The demo world's language: captions for scenes, and the word-level tokenizer that reads them."""

from __future__ import annotations

import re

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tilewise.pipelines.quality.demo_world import COLOURS, MOTIONS, PATTERNS, SHAPES

from .scenes import Scenes

COLOUR_NAMES = tuple(COLOURS)
SHAPE_WORDS = {
    "circle": ("circle", "circle", "circle", "ball"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
MOTION_PHRASES = {
    "left": ("moving left", "moving left", "moving to the left", "sliding left", "going left", "moves left"),
    "right": ("moving right", "moving right", "moving to the right", "sliding right", "going right", "moves right"),
    "up": ("moving up", "moving up", "rising", "moving upwards", "going up", "moves up"),
    "down": ("moving down", "moving down", "falling", "moving downwards", "going down", "moves down"),
    "circling": ("circling", "circling", "moving in a circle", "moving in circles"),
    "growing": ("growing", "growing", "getting bigger", "grows"),
    "shrinking": ("shrinking", "shrinking", "getting smaller", "shrinks"),
    "bouncing": ("bouncing", "bouncing", "bouncing up and down", "bounces"),
}
PATTERN_PHRASES = {
    "plain": ("{} background", "{} background", "{} background", "plain {} background", "solid {} background"),
    "striped": ("{} striped background", "striped {} background"),
    "checkered": ("{} checkered background", "checkered {} background", "{} checkerboard background"),
    "gradient": ("{} gradient background", "{} gradient background", "{} gradient"),
}
TEMPLATES = (
    "a {o} {m} on a {b}",
    "a {o} {m} on a {b}",
    "a {o} {m} on a {b}",
    "{o} {m} on {b}",
    "{o} {m}, {b}",
    "a video of a {o} {m} on a {b}",
    "a {b} with a {o} {m}",
    "the {o} is {m} on a {b}",
    "a {o} is {m} over a {b}",
    "a {o} {m} in front of a {b}",
    "a clip of a {o} {m} on a {b}",
    "an animation showing a {o} {m} on a {b}",
)
# Shorter prompts than the full sentence: something is left open, and the model may choose it.
OPEN_TEMPLATES = (("a {o} {m}", "b"), ("{o} {m}", "b"), ("a {o} on a {b}", "m"), ("{o}, {b}", "m"))
# People add words that mean nothing here. A few training captions hold one, so that the unknown-word token is known.
UNKNOWN_WORD = "little"

# What the text encoder is asked to name, and how many answers there are. The second object's have one more: "none".
ATTRIBUTES = {
    "colour0": len(COLOUR_NAMES),
    "shape0": len(SHAPES),
    "motion0": len(MOTIONS),
    "background": len(COLOUR_NAMES),
    "pattern": len(PATTERNS),
    "colour1": len(COLOUR_NAMES) + 1,
    "shape1": len(SHAPES) + 1,
    "motion1": len(MOTIONS) + 1,
}
NOT_SAID = -100  # cross entropy's ignore_index


def caption(scenes: Scenes, row: int, rng: np.random.Generator | None = None) -> tuple[str, set[str]]:
    """A caption for one scene, and the attributes it leaves open. Without `rng`, the plainest full sentence."""

    def choose(options: tuple[str, ...]) -> str:
        return options[0] if rng is None else options[int(rng.random() * len(options))]

    def object_words(slot: int) -> str:
        colour, shape = COLOUR_NAMES[scenes[f"colour{slot}"][row]], SHAPES[scenes[f"shape{slot}"][row]]
        extra = f"{UNKNOWN_WORD} " if rng is not None and rng.random() < 0.04 else ""
        return f"{extra}{colour} {choose(SHAPE_WORDS[shape])}"

    def motion_words(slot: int) -> str:
        return choose(MOTION_PHRASES[MOTIONS[scenes[f"motion{slot}"][row]]])

    background = choose(PATTERN_PHRASES[PATTERNS[scenes["pattern"][row]]]).format(
        COLOUR_NAMES[scenes["background"][row]]
    )
    open_attributes: set[str] = set()
    motion = motion_words(0)
    if scenes["two"][row]:
        template = choose(TEMPLATES)
        motion += f" and a {object_words(1)} {motion_words(1)}"
    elif rng is not None and rng.random() < 0.08:
        template, left_out = OPEN_TEMPLATES[int(rng.random() * len(OPEN_TEMPLATES))]
        open_attributes = {"b": {"background", "pattern"}, "m": {"motion0"}}[left_out]
    else:
        template = choose(TEMPLATES)
    text = template.format(o=object_words(0), m=motion, b=background)
    text = re.sub(r"\bis (moves|grows|shrinks|bounces)\b", r"\1", text)
    return re.sub(r"\ba orange\b", "an orange", text), open_attributes


def captions_and_labels(scenes: Scenes, seed: int | tuple[int, ...]) -> tuple[list[str], np.ndarray]:
    """One varied caption per scene, with its attribute labels (rows × ATTRIBUTES; NOT_SAID where left open)."""
    rng = np.random.default_rng(seed)
    labels = attribute_labels(scenes)
    names = list(ATTRIBUTES)
    texts = []
    for row in range(len(scenes["two"])):
        text, open_attributes = caption(scenes, row, rng)
        texts.append(text)
        for name in open_attributes:
            labels[row, names.index(name)] = NOT_SAID
    return texts, labels


def attribute_labels(scenes: Scenes) -> np.ndarray:
    """The right answers for every attribute of every scene."""
    columns = []
    for name, answers in ATTRIBUTES.items():
        values = scenes[name]
        columns.append(np.where(scenes["two"], values, answers - 1) if name.endswith("1") else values)
    return np.stack(columns, 1).astype(np.int64)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the language above. (Sub-word ones split colour names and make binding harder.)"""
    phrases = [*COLOUR_NAMES, *PATTERNS, *TEMPLATES, *(template for template, _ in OPEN_TEMPLATES)]
    for table in (SHAPE_WORDS, MOTION_PHRASES, PATTERN_PHRASES):
        for options in table.values():
            phrases.extend(options)
    words = sorted({word for phrase in phrases for word in re.findall(r"[a-z]+|,", re.sub(r"{.?}", " ", phrase))})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words, "."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
