"""Timing, as ``tilewise tune`` does it: medians of many runs, spread shown."""

from __future__ import annotations

from tilewise.pipelines.tuning.timing import L2_BYTES, Timing, measure

__all__ = ["L2_BYTES", "Timing", "measure"]
