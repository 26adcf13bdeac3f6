"""Runs modules as programs in the process of the test: one of their own would import for seconds what is here already."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys

import global_state
import pytest
import torch


def run_module(name: str, *words: object) -> str:
    """What ``python -m NAME WORDS`` writes to standard output. The test fails if its exit code is not 0."""
    out = io.StringIO()
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch, global_state.restored(), contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [name, *map(str, words)])
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                pytest.fail(f"{name} ended with {ended.code}: {out.getvalue()}")
    torch.compiler.reset()
    return out.getvalue()
