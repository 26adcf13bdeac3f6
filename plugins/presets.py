"""The presets: named configs, for each method from the most faithful to the fastest, as ``Config.from_dict`` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Chosen on the bundled demo model, by whole clips (benchmarks/presets.py). The first steps are the most sensitive, so every
# preset leaves some dense; windows have a far field, without which the backgrounds of clips lose their patterns.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "sta-quality": {"method": {"name": "sta", "density": 0.4, "far": "cells"}, "steps": (0.4, 1.0), "blocks": ":"},
    "sta-balanced": {"method": {"name": "sta", "density": 0.4, "far": "tiles"}, "steps": (0.2, 1.0), "blocks": "1:"},
    "sta-fast": {"method": {"name": "sta", "density": 0.4, "far": "tiles"}, "steps": (0.15, 1.0), "blocks": ":"},
    "draft-quality": {"method": {"name": "draft", "density": 0.5}, "steps": (0.25, 1.0), "blocks": "1:"},
    "draft-balanced": {"method": {"name": "draft", "density": 0.25}, "steps": (0.2, 1.0), "blocks": ":"},
    "draft-fast": {"method": {"name": "draft", "density": 0.15}, "steps": (0.15, 1.0), "blocks": "1:"},
    "auto-quality": {"method": {"name": "auto", "density": 0.25}, "steps": (0.25, 1.0), "blocks": ":"},
    "auto-balanced": {"method": {"name": "auto", "density": 0.15}, "steps": (0.2, 1.0), "blocks": ":"},
    "auto-fast": {"method": {"name": "auto", "density": 0.15}, "steps": (0.15, 1.0), "blocks": ":"},
    # For models that need 8 steps or fewer: no later step makes up for what one leaves out, so that each keeps more. Its dense
    # calls are a large part of so few steps: in 8 bits, where they run.
    "draft-few-steps": {
        "method": {"name": "draft", "density": 0.6, "compensate": True},
        "steps": (0.25, 1.0),
        "blocks": "1:",
        "dense_precision": "int8",
    },
    # UNets past their training size (HiDiffusion, arXiv 2311.17528): both halves of the paper, at its thresholds.
    "hidiffusion": {
        "method": {"name": "shifted-windows"},
        "steps": (0.0, 1.0),
        "blocks": ":",
        "add": [{"name": "raunet"}],
    },
}
