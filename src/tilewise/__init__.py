"""tilewise: training-free attention plugins for diffusers pipelines."""

__version__ = "0.1.0"
