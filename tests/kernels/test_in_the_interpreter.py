"""The tests with the marker ``interpreted`` again, where Triton kernels run on the CPU.

In one process of its own, since the variable must be set before the import, and importing takes seconds.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("tests/kernels", "tests/plugins/methods/test_window_bounds.py")


@pytest.mark.slow
def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpreted", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run([*command, *FOLDERS], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
