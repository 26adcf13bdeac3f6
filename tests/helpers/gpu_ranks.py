"""Runs cases on one GPU and split over several, and compares: as ``forked_ranks.py``, with a GPU for each process.

    RANK=0 WORLD_SIZE=2 python gpu_ranks.py MODULE OUT STORE        and the same with RANK=1, at the same time

Each rank runs each case by itself, and then split, with one process group and one mesh for all cases: NCCL takes a second or more
for each. OUT gets, for each case, the largest relative difference over the ranks, ‖split − one‖ ÷ ‖one‖, what the case said on
each, or its error, and its seconds. Without GPUs it runs on the CPU with gloo.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import forked_ranks

HERE = Path(__file__).parent
LIMIT = datetime.timedelta(seconds=60)  # of one exchange


def run_cases(module: str, ranks: int, timeout: float = 300) -> dict[str, Any]:
    """What the processes wrote, for a test. Raises AssertionError if one failed, and ends the others."""
    root = HERE.parents[1]
    path = os.pathsep.join(str(root / folder) for folder in forked_ranks.TESTS)
    given = {**os.environ, "PYTHONPATH": path + os.pathsep + os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out, logs = Path(folder) / "out.json", [Path(folder) / f"{rank}.log" for rank in range(ranks)]
        command = [sys.executable, str(HERE / "gpu_ranks.py"), module, str(out), str(Path(folder) / "store")]
        running = []
        for rank, log in enumerate(logs):
            world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            with log.open("wb") as file:
                running.append(subprocess.Popen(command, env=given | world, cwd=root, stdout=file, stderr=file))
        end = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in running):
                if any(process.poll() for process in running) or time.monotonic() > end:
                    break
                time.sleep(0.1)
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                process.wait()
        said = "\n".join(f"rank {rank}: {log.read_text(errors='replace')[-4000:]}" for rank, log in enumerate(logs))
        assert not any(process.returncode for process in running), said
        return json.loads(out.read_text())


def main(module: str, out: str, store: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from tilewise.plugins.context_parallel.enable import enable_context_parallel
    from tilewise.plugins.context_parallel.enable_cfg import enable_cfg_parallel

    cuda, rank, ranks = torch.cuda.is_available(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if cuda:
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=LIMIT)
    kind = "cuda" if cuda else "cpu"
    mesh = init_device_mesh(kind, (1, ranks), mesh_dim_names=("ring", "ulysses"))
    halves = init_device_mesh(kind, (2, 1, ranks // 2), mesh_dim_names=("cfg", "ring", "ulysses"))
    split = functools.partial(enable_context_parallel, mesh=mesh)
    cfg = functools.partial(enable_cfg_parallel, mesh=halves)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, case in importlib.import_module(module).cases().items():
            begin = time.monotonic()
            one, _ = forked_ranks.attempt(case, None)
            parts, said = forked_ranks.attempt(case, cfg if getattr(case, "cfg", False) else split)
            same = one is not None and parts is not None and one.shape == parts.shape
            error = float((parts.float() - one.float()).norm() / one.float().norm()) if same else None
            each: list[Any] = [None] * ranks
            dist.all_gather_object(each, (error, said))
            errors = [error for error, _ in each]
            seconds = time.monotonic() - begin
            largest = None if None in errors else max(errors)
            found[name] = {"error": largest, "said": [said for _, said in each], "seconds": seconds}
            print(f"{name}: {seconds:.1f} s", flush=True)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
