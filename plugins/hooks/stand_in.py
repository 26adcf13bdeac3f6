"""Processors that stand in for stock ones: how model families find the stock processor of a layer."""

from __future__ import annotations

from typing import Any


class StandIn:
    """Base class of the processors that a patch puts in place of stock ones."""

    original: Any  # the stock processor


def is_stand_in(processor: Any) -> bool:
    """Whether a processor belongs to a patch."""
    return isinstance(processor, StandIn)


def stock_processor(processor: Any) -> Any:
    """The stock processor that ``processor`` stands in for, or ``processor`` itself where it is nobody's."""
    return processor.original if isinstance(processor, StandIn) else processor
