"""Draw the picture of docs/high-resolution.md: the native clip scaled up, the stock model at twice the side, and two paths there.

python -m examples.draw_high_resolution docs/images/highres.png          some minutes on a CPU
"""

import argparse

import numpy as np
from PIL import Image

import tilewise
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.loading.load import load_pipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", help="a .png file")
parser.add_argument("--prompt", default="a yellow star moving right on a blue striped background")
parser.add_argument("--side", type=int, default=256)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--frames", type=int)
options = parser.parse_args()

pipe = load_pipeline("demo")
size = {"height": options.side, "width": options.side, "steps": options.steps, "frames": options.frames}
dense = generate(pipe, resolve_settings(pipe, options.prompt, method="dense", **size))
made = tilewise.highres(pipe, options.prompt, **size)

middle = len(dense.frames) // 2
native = Image.fromarray(made.native.frames[middle]).resize((options.side, options.side), Image.Resampling.BICUBIC)
pictures = [np.asarray(native), dense.frames[middle], made.clip.frames[middle]]
gap = np.full((options.side, 8, 3), 255, np.uint8)
row = np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)
Image.fromarray(row).save(options.out, optimize=True)
print(options.out)
