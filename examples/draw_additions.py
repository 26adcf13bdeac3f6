"""Draw what each addition changes: the pictures of docs/additions.md.

    python -m examples.draw_additions docs/images

Every picture is computed by the addition's own code, on maps and frequencies that are made up.
"""

import argparse
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from examples.draw_methods import GAP, LABEL, PAPER, QUERY, SEEN, TILE, UNSEEN
from tilewise.plugins.additions.agent_attention import EARLY, LATE, Merging, targets_at
from tilewise.plugins.additions.broadway import BroadWay
from tilewise.plugins.additions.raunet import RAUNet
from tilewise.plugins.additions.riflex import intrinsic, riflex

STEPS, SIDE = 50, 192  # denoising steps; pixels of a map's side
Box = tuple[int, int, int, int]


def canvas(
    labels: list[str], height: int = SIDE, width: int = SIDE
) -> tuple[Image.Image, ImageDraw.ImageDraw, list[Box]]:
    """A row of empty maps with labels above, and where they are."""
    picture = Image.new("RGB", (len(labels) * (width + GAP) + GAP, height + LABEL + GAP), PAPER)
    pen, boxes = ImageDraw.Draw(picture), []
    for place, label in enumerate(labels):
        left = GAP + place * (width + GAP)
        pen.text((left, 3), label, fill=TILE)
        boxes.append((left, LABEL, left + width, LABEL + height))
    return picture, pen, boxes


def shade(share: float) -> tuple[int, int, int]:
    """From the colour of what is not seen to that of what is."""
    part = min(max(share, 0.0), 1.0)
    return tuple(round(a + part * (b - a)) for a, b in zip(UNSEEN, SEEN, strict=True))  # type: ignore[return-value]


def paint(pen: ImageDraw.ImageDraw, box: Box, map_: torch.Tensor, most: float) -> None:
    """A map (rows, columns), where ``most`` is the darkest."""
    rows, columns = map_.shape
    wide, high = (box[2] - box[0]) / columns, (box[3] - box[1]) / rows
    for r in range(rows):
        for c in range(columns):
            corner = box[0] + c * wide, box[1] + r * high
            end = box[0] + (c + 1) * wide - 1, box[1] + (r + 1) * high - 1
            pen.rectangle((*corner, *end), fill=shade(float(map_[r, c]) / most))


def raunet() -> Image.Image:
    """Side of the maps of SD 1.5's levels at each step, for 1024 and for 2048 pixels; red: the side in training."""
    picture, pen, boxes = canvas(
        ["stock, 1024x1024", "raunet, 1024x1024", "stock, 2048x2048", "raunet, 2048x2048"], 120, 220
    )
    for place, box in enumerate(boxes):
        latents = 128 if place < 2 else 256
        addition = RAUNet(variant="sd")
        high = (box[3] - box[1]) / 4
        for step in range(STEPS):
            conv, level = (
                addition.coarse((latents, latents), step, STEPS, False, False) if place % 2 else (False, False)
            )
            sides = [latents, latents >> (1 + conv), latents >> (2 + conv + level), latents >> (3 + conv + level)]
            left = box[0] + step * (box[2] - box[0]) / STEPS
            for row, side in enumerate(sides):
                bottom = box[1] + (row + 1) * high - 3
                part = (high - 8) * side / (latents >> row)
                pen.rectangle((left, bottom - part, left + (box[2] - box[0]) / STEPS - 1, bottom), fill=SEEN)
        for row in range(4):
            line = box[1] + (row + 1) * high - 3 - (high - 8) * min(1.0, 64 / latents)
            pen.line((box[0], line, box[2], line), fill=QUERY)
    return picture


def curves(native: int = 21, length: int = 42) -> Image.Image:
    """The cosine of the frequency that turns round within the training length, over the latent frames of a longer clip."""
    theta = 10_000.0 ** (-torch.arange(0, 44, 2, dtype=torch.float64) / 44)
    at = intrinsic(theta, native)
    picture, pen, boxes = canvas(["the model's: it begins anew", "riflex: it does not turn round"], 120, 340)
    for box, own in zip(boxes, (theta, riflex(theta, native, length)), strict=True):
        pen.rectangle(box, outline=UNSEEN)
        width, height = box[2] - box[0], box[3] - box[1]
        end = box[0] + width * native / length
        pen.line((end, box[1], end, box[3]), fill=QUERY)
        points = []
        for x in range(width + 1):
            value = math.cos(float(own[at]) * x / width * length)
            points.append((box[0] + x, box[1] + height / 2 - value * (height / 2 - 6)))
        pen.line(points, fill=SEEN, width=2)
    return picture


def broadway(frames: int = 16) -> Image.Image:
    """A temporal map that stays in place, the second block's, and what becomes of the first."""
    apart = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
    own = (-((apart / 4.0) ** 2)).exp() + 0.1 * torch.rand(frames, frames, generator=torch.Generator().manual_seed(0))
    coarse = (-apart / 2.0).exp()
    own, coarse = (one / one.sum(-1, keepdim=True) for one in (own, coarse))
    changed = BroadWay().enhanced(own[None, None, None], coarse[None, None, None], slice(None))[0, 0, 0]
    picture, pen, boxes = canvas(["A, of a finer block", "A1, of the second block", "A after both changes"])
    for box, one in zip(boxes, (own, coarse, changed), strict=True):
        paint(pen, box, one, float(changed.max()))
    return picture


def agent(side: int = 32) -> Image.Image:
    """A map with an object: agents of an early step, and what is merged at a later one."""
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side * 2 - 1] * 2, indexing="ij")
    inside = (x + 0.2) ** 2 + (y - 0.1) ** 2 < 0.3
    noise = 0.2 * torch.randn(side * side, 8, generator=torch.Generator().manual_seed(0))
    tokens = (noise + torch.where(inside.reshape(-1, 1), 1.0, -1.0) * torch.linspace(-1, 1, 8))[None]
    picture, pen, boxes = canvas(["tokens", "agents, first 40 % of the steps", "left after merging, later"])
    paint(pen, boxes[0], inside.float(), 1.0)
    for box, region, ratio in zip(boxes[1:], (EARLY, LATE), (0.95, 0.4), strict=True):
        merging = Merging(tokens, (side, side), region, targets_at(0, 0, 0, (side, side), region))
        left = torch.ones(side * side)
        left[merging.others[merging.order[0, : int(side * side * ratio)]]] = 0.0
        paint(pen, box, left.view(side, side), 1.0)
    return picture


def soft_pag(tokens: int = 24) -> Image.Image:
    """A head's map A, and (1 − u) A + u I."""
    apart = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
    own = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(1)) + 2 * (-apart / 3.0).exp()
    own = own / own.sum(-1, keepdim=True)
    picture, pen, boxes = canvas(["A: the head as it is", "u = 0.5", "u = 1: the identity (PAG)"])
    for box, u in zip(boxes, (0.0, 0.5, 1.0), strict=True):
        paint(pen, box, (1 - u) * own + u * torch.eye(tokens), 0.3)
    return picture


PICTURES = {"raunet": raunet, "riflex": curves, "broadway": broadway, "agent": agent, "soft-pag": soft_pag}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw().save(folder / f"addition-{name}.webp", lossless=True)
        print(folder / f"addition-{name}.webp")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
