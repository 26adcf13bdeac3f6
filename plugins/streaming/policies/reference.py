"""``reference``: the first frames, a reference image's, stand ahead of the chunk under way (Knot Forcing).

The picture runs towards the reference instead of away from it. Its position is always that of the frames after the chunk.
"""

from __future__ import annotations

from tilewise.plugins.streaming.policies.base import Event, Kept, register


@register("reference", ahead=True)
def reference(kept: Kept, event: Event) -> None:
    """Keys and values stay as they are: called for no event."""
