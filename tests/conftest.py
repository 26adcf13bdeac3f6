"""Fixtures that every test may use, and the rules: markers by folder, GPU tests need a GPU, one thread a process.

The controller of pytest-xdist loads this file and runs no test: what takes seconds to import is imported where it is used.
"""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and inherited by the programs that tests start: on tiny tensors, and with several test
# processes on few cores, threads mostly wait for each other (measured: 5 s instead of 40 for the same tests).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What `tilewise tune` found on this machine is not for tests to go by.
os.environ["XDG_CONFIG_HOME"] = str(Path(tempfile.gettempdir()) / "tilewise-tests-config")

# A shell starts what it puts in the background with SIGINT ignored, and so would be what tests start in order to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

HERE = Path(__file__).parent
# Markers that every test in a folder has. A file with one kind of tests sets ``pytestmark`` itself.
MARKERS = {"ui/cli": "cli", "ui/web": "web", "examples": "slow", "benchmarks": "slow"}
LONG = ("slow", "compile", "cli", "web")


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would hand out the files with the most tests first, and those with a few tests of many seconds last.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for folder, marker in MARKERS.items():
            if item.path.is_relative_to(HERE / folder):
                item.add_marker(marker)
    long_files_first(items)
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def long_files_first(items: list[pytest.Item]) -> None:
    """Files with long tests first, those with many of them before others: all processes then end at about the same time."""
    tests = Counter(item.path for item in items)
    long = Counter(item.path for item in items if any(item.get_closest_marker(name) for name in LONG))
    items.sort(key=lambda item: (-long[item.path], -tests[item.path], item.path))


@pytest.fixture(scope="module", autouse=True)
def what_stays_is_not_gone_over_again() -> None:
    # PyTorch, diffusers, Gradio and what is compiled leave millions of objects that stay: a collection goes over them for up to
    # half a second, and tests of freed memory ask for many. Frozen, they are left out.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def global_state_of_a_module() -> Iterator[None]:
    """As for a test, for the fixtures that a module's tests share."""
    import global_state

    before = global_state.snapshot()
    yield
    global_state.fail_if_changed(before)


@pytest.fixture(autouse=True)
def global_state_of_a_test() -> Iterator[None]:
    """A test leaves the process as it found it, so that tests pass in any order: one that does not fails."""
    import global_state

    before = global_state.snapshot()
    yield
    global_state.fail_if_changed(before)


@pytest.fixture(autouse=True)
def same_numbers_each_run() -> None:
    """What a test draws without a seed of its own is the same in every run: one that fails can be looked at again."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def tiny_pipe():
    """A fresh tiny WanPipeline with random weights (64x64, 9 frames by default): yours to patch and break."""
    import tiny_wan

    return tiny_wan.tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_sd_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion pipeline with random weights as a diffusers folder on disk. Shared: read it, do not write to it."""
    import tiny_unets

    folder = tmp_path_factory.mktemp("tiny") / "tiny-sd"
    tiny_unets.whole_pipe().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline as a diffusers folder on disk. Shared: read it, do not write to it."""
    import tiny_wan

    return tiny_wan.save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "tiny-wan")
