"""Kernels compiled for a GPU that need not be there, with what ptxas says of them: registers, spills, warnings.

A compiled kernel knows its spills only once it is loaded on a GPU. ptxas takes most of the time of compiling a large kernel, so
its report is kept from Triton's own run of it, with the kernel and so in Triton's cache too.
"""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", minversion="3.6")
from triton.backends.compiler import GPUTarget  # noqa: E402

KEY = "with the report of ptxas"


def keep_report(backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, arch: Any = None):
    """Triton's hook for the stages of a compilation; called with nothing, it says what to add to the key of the cache."""
    if stages is None:
        return KEY, KEY
    assemble = stages["cubin"]

    def assembled(ptx: str, metadata: dict[str, Any]) -> bytes:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            binary = assemble(ptx, metadata)
        metadata["ptxas"] = said.getvalue()
        return binary

    stages["cubin"] = assembled
    return None


def compile_for(source: Any, capability: int, **options: Any) -> Any:
    """A source compiled for a compute capability, 80 for 8.0; ``options`` are those of the launch, such as num_warps."""
    with triton.knobs.nvidia.scope(), triton.knobs.runtime.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.runtime.add_stages_inspection_hook = keep_report
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(kernel: Any) -> str:
    """What ptxas said of a kernel of ``compile_for``."""
    return kernel.metadata.ptxas


def usage(kernel: Any) -> dict[str, int]:
    """Bytes of "spill stores" and "spill loads", and "registers" of a thread."""
    text = report(kernel)
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.search(r"Used (\d+) registers", text)
    assert found and registers, text
    return {"spill stores": int(found[1]), "spill loads": int(found[2]), "registers": int(registers[1])}
