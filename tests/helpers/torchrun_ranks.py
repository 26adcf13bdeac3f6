"""Runs cases on one GPU and split over those of ``torchrun``, and compares: as ``forked_ranks.py``, with a GPU for each process.

    torchrun --nproc-per-node 2 torchrun_ranks.py MODULE OUT

Each rank runs each case by itself, and then split. OUT gets, for each case, the largest relative difference over the ranks,
‖split − one‖ ÷ ‖one‖, and what the case said on each, or its error.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import forked_ranks

HERE = Path(__file__).parent


def run_cases(module: str, ranks: int, timeout: float = 600) -> dict[str, Any]:
    """What the program wrote, for a test. Raises AssertionError if it failed."""
    root = HERE.parents[1]
    path = os.pathsep.join(str(root / folder) for folder in forked_ranks.TESTS)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
        done = subprocess.run(
            [*torchrun, str(HERE / "torchrun_ranks.py"), module, str(out)],
            env={**os.environ, "PYTHONPATH": path + os.pathsep + os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"},
            cwd=root, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return json.loads(out.read_text())


def main(module: str, out: str) -> None:
    import torch
    import torch.distributed as dist

    from tilewise.plugins.context_parallel.enable import enable_context_parallel

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, case in importlib.import_module(module).cases().items():
            one, _ = forked_ranks.attempt(case, None)
            split, said = forked_ranks.attempt(case, enable_context_parallel)
            same = one is not None and split is not None and one.shape == split.shape
            error = float((split.float() - one.float()).norm() / one.float().norm()) if same else None
            each: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(each, (error, said))
            errors = [error for error, _ in each]
            found[name] = {"error": None if None in errors else max(errors), "said": [said for _, said in each]}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
