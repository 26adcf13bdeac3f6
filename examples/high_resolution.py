"""A clip at twice the size that the model was trained at: native, dense at that size, and by two stages, side by side.

python examples/high_resolution.py --height 256 --width 256
"""

import argparse
import dataclasses

import numpy as np

import tilewise
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.highres.upscale import upscale_frames
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.media.files import check_writable
from tilewise.pipelines.media.video import write_video
from tilewise.pipelines.quality.coherence import coherence
from tilewise.plugins.config import resolve

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="demo")
parser.add_argument("--prompt", default="a red circle moving right on a blue striped background")
parser.add_argument("--height", type=int, default=256)
parser.add_argument("--width", type=int, default=256)
parser.add_argument("--steps", type=int)
parser.add_argument("--frames", type=int)
parser.add_argument("--refresh", type=int, default=5, help="the full path runs every so many steps")
parser.add_argument(
    "--no-dense", action="store_true", help="leave out the stock pipeline at the target size, which is slow"
)
parser.add_argument("--out", default="outputs/high-resolution.mp4")
options = parser.parse_args()

pipe = load_pipeline(options.model)
out = check_writable(options.out)
made = tilewise.highres(
    pipe, options.prompt, height=options.height, width=options.width, steps=options.steps, frames=options.frames,
    refresh=options.refresh,
)  # fmt: skip
native = made.native.frames
panels = [upscale_frames(native / np.float32(255), options.height, options.width), made.frames / np.float32(255)]
print(made.plan)
print(f"two stages: {made.clip.seconds['total']:.1f} s after {made.native.seconds['total']:.1f} s, {made.coherence}")
if not options.no_dense:
    dense = generate(pipe, dataclasses.replace(made.clip.settings, method=resolve("dense")))
    print(f"dense: {dense.seconds['total']:.1f} s, {coherence(dense.frames, native)}")
    panels.insert(1, dense.frames / np.float32(255))
write_video(out, (np.concatenate(panels, 2) * 255).round().astype(np.uint8), made.clip.settings.fps)
print(f"wrote {out}: native scaled up, {'' if options.no_dense else 'dense, '}two stages")
