"""Runs cases in one process and split over several, on the CPU, and compares: ``python forked_ranks.py MODULES MOST OUT``.

Importing takes seconds a process, so all cases of some modules (with commas between) run in one program: it imports, runs each
case as one process does, and forks 2, 3, … MOST processes with a gloo group, and as many as a case asks for. OUT gets a JSON
object: for each case and number of ranks the largest difference from one process, over all ranks, and what the case said on
each, or its error.

A module has ``cases()``, functions by name. Each takes ``split``, None or a function that enables context parallelism on a
pipeline or denoiser, and returns (tensor, what it has to say in JSON). Its attribute ``ranks``, if there is one, says which
numbers of ranks it is for; with ``cfg``, ``split`` enables CFG parallelism.
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
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TESTS = ("tests/helpers", "tests/plugins/models", "tests/plugins/context_parallel", "src", ".")


def run_cases(modules: str, ranks: int, timeout: float = 300) -> dict[str, Any]:
    """What the program wrote, for a test. Raises AssertionError if it failed."""
    root = HERE.parents[1]
    path = os.pathsep.join(str(root / folder) for folder in TESTS)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        done = subprocess.run(
            [sys.executable, str(HERE / "forked_ranks.py"), modules, str(ranks), str(out)],
            env={**os.environ, "PYTHONPATH": path + os.pathsep + os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"},
            cwd=root, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return json.loads(out.read_text())


def attempt(case: Callable[..., Any], split: Any) -> tuple[Any, Any]:
    """(tensor, said) of a case; the tensor is None where it raised, and ``said`` the error."""
    try:
        return case(split) or (None, None)
    except Exception as error:
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}"


def worker(rank: int, ranks: int, cases: dict[str, Any], alone: dict[str, Any], store: str) -> dict[str, Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from tilewise.plugins.context_parallel.enable import enable_context_parallel
    from tilewise.plugins.context_parallel.enable_cfg import enable_cfg_parallel

    limit = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=limit)
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("ring", "ulysses"))  # one for all: making it takes time
    split = functools.partial(enable_context_parallel, mesh=mesh)
    if any(getattr(case, "cfg", False) for case in cases.values()):
        mesh = init_device_mesh("cpu", (2, 1, ranks // 2), mesh_dim_names=("cfg", "ring", "ulysses"))
        cfg = functools.partial(enable_cfg_parallel, mesh=mesh)
    found: dict[str, Any] = {}
    for name, case in cases.items():
        out, said = attempt(case, cfg if getattr(case, "cfg", False) else split)
        one = alone[name][0]
        same = out is not None and one is not None and out.shape == one.shape
        found[name] = {
            "error": float((out - one).abs().max()) if same else None,
            "largest": float(one.abs().max()) if same else None,
            "said": said,
        }
    dist.barrier()
    dist.destroy_process_group()
    return found


def forked(ranks: int, cases: dict[str, Any], alone: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What each of so many processes found. Exits where one of them failed, and ends the others."""
    children = {}
    for rank in range(ranks):
        if child := os.fork():
            children[child] = rank
            continue
        try:
            found = worker(rank, ranks, cases, alone, str(folder / f"store of {ranks}"))
            (folder / f"{rank}.json").write_text(json.dumps(found))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    for _ in range(ranks):
        child, status = os.wait()
        rank = children.pop(child)
        if status:
            for other in children:
                os.kill(other, 9)
            sys.exit(f"rank {rank} of {ranks} failed")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def main(modules: str, most: int, out: str) -> None:
    import torch

    torch.set_num_threads(1)
    cases = {name: case for each in modules.split(",") for name, case in importlib.import_module(each).cases().items()}
    with torch.no_grad():
        alone = {name: attempt(case, None) for name, case in cases.items()}
        whole: dict[str, Any] = {"one process": {name: said for name, (_, said) in alone.items()}}
        usual = range(2, most + 1)
        for ranks in sorted({*usual, *(number for case in cases.values() for number in getattr(case, "ranks", ()))}):
            some = {name: case for name, case in cases.items() if ranks in getattr(case, "ranks", usual)}
            if not some:
                continue
            each = forked(ranks, some, alone, Path(out).parent)
            for name in some:
                errors = [found[name]["error"] for found in each]
                said = [found[name]["said"] for found in each]
                whole[f"{name}, {ranks} ranks"] = {
                    "error": None if None in errors else max(errors),
                    "largest": each[0][name]["largest"],  # value of the output
                    "said": said,
                }
    Path(out).write_text(json.dumps(whole))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
