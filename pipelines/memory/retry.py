"""Run something within the available memory: again with one more measure where it does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from tilewise.pipelines.memory.limits import free_memory, is_out_of_memory, possible, saving

T = TypeVar("T")


def within_memory(
    pipe: Any,
    make: Callable[[], T],
    measures: Sequence[str] = (),
    *,
    retry: bool = False,
    taken: Collection[str] = (),
    note: Callable[[str], None] = lambda text: None,
) -> tuple[T, list[str], int]:
    """What `make` makes with these measures of `limits` in force, those that sufficed, and how often it was tried again.

    retry: where memory does not suffice, try again with one measure more, until none is left. taken: measures that `make` takes
    by itself. note: told of each.

    Raises what `make` raises, and ConfigError for a measure that the pipeline cannot take.
    """
    tried, retries = list(measures), 0
    while True:
        try:
            with saving(pipe, tried):
                return make(), tried, retries
        except Exception as error:
            left = [measure for measure in possible(pipe) if measure not in (*tried, *taken)]
            if not (retry and is_out_of_memory(error) and left):
                raise
        # Here the error is gone, and with it what its traceback kept on the GPU.
        free_memory()
        retries += 1
        tried = [*tried, left[0]]
        note(f"out of GPU memory; trying again with {' and '.join(tried)}")
