"""The world that the bundled demo model draws: coloured shapes that move over a patterned background."""

from __future__ import annotations

COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.67, 0.24),
    "blue": (0.16, 0.31, 0.86),
    "yellow": (0.94, 0.86, 0.20),
    "purple": (0.55, 0.24, 0.75),
    "orange": (0.96, 0.55, 0.12),
    "white": (0.96, 0.96, 0.96),
    "black": (0.08, 0.08, 0.08),
}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("left", "right", "up", "down", "circling", "growing", "shrinking", "bouncing")
PATTERNS = ("plain", "striped", "checkered", "gradient")


def second_colour(colour):  # an array of numpy or torch
    """The other end of a striped, checkered or gradient background: the same hue, washed out towards grey."""
    return 0.6 * colour + 0.2
