"""The same prompt and seed, dense and sparse: how much faster, and how close?

python examples/compare_with_dense.py --method sta-fast
"""

import argparse

from tilewise.pipelines.generation.compare import compare, side_by_side
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.media.files import check_writable
from tilewise.pipelines.media.video import write_video

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="demo")
parser.add_argument("--method", default="sta-balanced", help="a method or preset")
parser.add_argument("--prompt", default="a green star moving up on a white checkered background")
parser.add_argument("--steps", type=int)
parser.add_argument("--frames", type=int)
parser.add_argument("--out", default="outputs/side-by-side.mp4")
options = parser.parse_args()

pipe = load_pipeline(options.model)
settings = resolve_settings(
    pipe, options.prompt, model=options.model, method=options.method, steps=options.steps, frames=options.frames
)
result = compare(pipe, settings)

print(f"{options.method}: {result.speedup_words('denoise')} denoising, {result.speedup_words('total')} in all")
print(f"PSNR {result.psnr:.1f} dB, SSIM {result.ssim:.3f} against dense")
path = write_video(check_writable(options.out), side_by_side(result.dense.frames, result.sparse.frames), settings.fps)
print(f"wrote {path}: dense left, {options.method} right")
