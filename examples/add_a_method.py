"""Add a method: which key blocks does a query block see? Here: those of its own frame slab, and those of the first one.

A method is a frozen dataclass with a layout (token order) and a plan (block map). Everything else, the kernel, the patch, the
schedule, ``explain`` and ``summary``, comes with it.
"""

import argparse
from dataclasses import dataclass
from typing import ClassVar

import torch

import tilewise
from tilewise.kernels.plans.block_plan import BlockPlan, plan_from_block_map
from tilewise.kernels.plans.layout import Grid, Layout, cached_layout
from tilewise.pipelines.loading.load import load_pipeline


@tilewise.register
@dataclass(frozen=True)
class FirstFrame(tilewise.Method):
    """Each slab of ``frames`` latent frames sees itself and the first slab: appearance is anchored, motion is local."""

    frames: int = 3

    name: ClassVar[str] = "first-frame"

    def layout(self, grid: Grid) -> Layout:
        return cached_layout(grid, (self.frames, 4, 8))

    def plan(self, layout: Layout, heads: int, device: torch.device) -> BlockPlan:
        slab = layout.block_tile[:, 0].to(device)
        sees = (slab[:, None] == slab[None, :]) | (slab[None, :] == 0)
        return plan_from_block_map(layout, sees[None, None])


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

pipe = load_pipeline("demo")
tilewise.patch(pipe, FirstFrame(frames=3), steps=(0.3, 1.0))  # or by name, with its defaults: "first-frame"
pipe(
    "a blue square growing on a yellow background",
    height=128,
    width=128,
    num_frames=17,
    num_inference_steps=options.steps,
)
print(tilewise.summary(pipe))
