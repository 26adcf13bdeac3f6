"""Draw the moving picture of the README: a clip of the bundled model, dense and with a method, from the same seed.

python -m examples.draw_before_after docs/images/before-after.webp          a minute on a CPU
"""

import argparse

from PIL import Image

from tilewise.pipelines.generation.compare import side_by_side
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.loading.load import load_pipeline

QUALITY = 50  # of WebP: with soft edges and noise a GIF of the same frames is nine times as large

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", help="a .webp file")
parser.add_argument("--prompt", default="a green star moving up on a white checkered background")
parser.add_argument("--method", default="sta-balanced", help="a method or preset")
parser.add_argument("--steps", type=int)
parser.add_argument("--frames", type=int)
parser.add_argument("--scale", type=int, default=2, help="how many times as large as the clip")
options = parser.parse_args()

pipe = load_pipeline("demo")
dense, sparse = (
    resolve_settings(pipe, options.prompt, method=method, steps=options.steps, frames=options.frames)
    for method in ("dense", options.method)
)
clips = [generate(pipe, settings).frames for settings in (dense, sparse)]
large = [clip.repeat(options.scale, axis=1).repeat(options.scale, axis=2) for clip in clips]
sheet = side_by_side(large[0], large[1], ("dense", options.method))
pictures = [Image.fromarray(frame) for frame in sheet]
duration = round(1000 / dense.fps)
pictures[0].save(
    options.out, "WEBP", save_all=True, append_images=pictures[1:], duration=duration, loop=0, quality=QUALITY, method=6
)
print(f"wrote {options.out}: dense left, {options.method} right")
