"""Threads that take turns: one runs at a time, and hands over at every module that it calls, so that forwards really interleave.

turns = Turns(2)
with turns.at_every_module(model):
    first, second = turns.run(lambda: …, lambda: …)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

TIMEOUT = 60.0


class Turns:
    """Turns of ``count`` threads. switches: how often one handed over to another."""

    def __init__(self, count: int = 2) -> None:
        self.switches = 0
        self._changed = threading.Condition()
        self._left = list(range(count))
        self._turn = 0
        self._own = threading.local()

    def hand_over(self, *_: Any) -> None:
        """Let the next thread run until it hands over too; nothing outside of ``run``."""
        number = getattr(self._own, "number", None)
        if number is None:
            return
        with self._changed:
            if len(self._left) > 1:
                self._pass_from(number)
                self.switches += 1
            self._await(number)

    def run(self, *work: Callable[[], Any]) -> list[Any]:
        """What each function returned, each called in a thread of its own; raises what one of them raised."""
        found: list[Any] = [None] * len(work)
        failed: list[BaseException] = []

        def call(number: int) -> None:
            self._own.number = number
            try:
                with self._changed:
                    self._await(number)
                with torch.no_grad():  # a mode of each thread
                    found[number] = work[number]()
            except BaseException as error:
                failed.append(error)
            finally:
                with self._changed:
                    self._pass_from(number)
                    self._left.remove(number)

        threads = [
            threading.Thread(target=call, args=(number,), name=f"request {number}") for number in range(len(work))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return found

    @contextmanager
    def at_every_module(self, model: torch.nn.Module) -> Iterator[None]:
        """Threads hand over before each module of ``model`` that they call."""
        handles = [module.register_forward_pre_hook(self.hand_over) for module in model.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _pass_from(self, number: int) -> None:
        self._turn = self._left[(self._left.index(number) + 1) % len(self._left)]
        self._changed.notify_all()

    def _await(self, number: int) -> None:
        if not self._changed.wait_for(lambda: self._turn == number, TIMEOUT):
            raise TimeoutError(f"thread {number} waited {TIMEOUT} s for its turn")
