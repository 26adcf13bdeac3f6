"""``fixed``: the first frames of the stream stay, whatever comes (StreamingLLM, arXiv 2309.17453, §3.2)."""

from __future__ import annotations

from tilewise.plugins.streaming.policies.base import Event, Kept, register


@register("fixed", needs_sink=False)
def fixed(kept: Kept, event: Event) -> None:
    """Nothing changes: called for no event."""
