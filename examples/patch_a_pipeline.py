"""Patch a stock diffusers pipeline in one call, see what ran, take the patch off again.

python examples/patch_a_pipeline.py                                        the bundled demo model, on any machine
python examples/patch_a_pipeline.py Wan-AI/Wan2.1-T2V-1.3B-Diffusers       a real checkpoint, on a GPU
"""

import argparse

import torch

import tilewise
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.pipelines.media.files import check_writable
from tilewise.pipelines.media.video import write_video

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="demo", help="demo, a local diffusers folder, or a hub id")
parser.add_argument("--prompt", default="a red circle moving right on a blue background")
parser.add_argument("--steps", type=int, help="denoising steps; default: what the model is meant for")
parser.add_argument("--out", default="outputs/patched.mp4")
options = parser.parse_args()

pipe = load_pipeline(options.model)  # any diffusers pipeline will do: WanPipeline.from_pretrained(…) as well
native = model_defaults(pipe)
size = {"height": native.height, "width": native.width}
steps = options.steps or native.steps

print(
    tilewise.explain(pipe, **size, frames=native.num_frames, num_inference_steps=steps, method="sta-balanced")
)  # runs nothing
tilewise.patch(pipe, "sta-balanced")
frames = pipe(
    options.prompt,
    **size,
    num_frames=native.num_frames,
    num_inference_steps=steps,
    guidance_scale=native.guidance,
    generator=torch.Generator().manual_seed(0),
).frames[0]
print(tilewise.summary(pipe))
tilewise.unpatch(pipe)

print(f"wrote {write_video(check_writable(options.out), frames, native.fps)}")
