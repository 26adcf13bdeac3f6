"""Runs ``tilewise`` commands as torchrun starts them, without its seconds of importing: ``python forked_commands.py IN OUT``.

IN holds a JSON list of {"name", "commands"}: the arguments of each process of a command, which are forked together, with the
environment that torchrun gives them; one process alone gets none. As torchrun does, the program ends the others when one fails:
by SIGTERM, and after 30 seconds by SIGKILL. OUT gets, by name, each process's exit code and output, and the seconds until all
had ended. "fails": the process whose third exchange raises, or with "by", the name of a signal, gets that signal.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GRACE = 30.0


def run_commands(runs: list[dict[str, Any]], timeout: float = 240) -> dict[str, Any]:
    """What the program found, for a test."""
    root = HERE.parents[1]
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "in.json", Path(folder) / "out.json"
        given.write_text(json.dumps(runs))
        done = subprocess.run(
            [sys.executable, str(HERE / "forked_commands.py"), str(given), str(out)],
            env={**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return json.loads(out.read_text())


def child(arguments: list[str], rank: int, count: int, port: int, log: Path, run: dict[str, Any]) -> None:
    """Becomes one process of a command. Does not return."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    if count > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(port)
    if rank == run.get("fails"):
        break_exchange(run.get("by"))
    from tilewise.ui.cli.app import app
    from tilewise.ui.common.exit_codes import run_app

    sys.argv = ["tilewise", *arguments]
    code: Any = 1
    try:
        run_app(app)
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def break_exchange(by: str | None) -> None:
    import torch.distributed as dist

    whole, calls = dist.all_to_all_single, []

    def exchange(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3 and by is not None:
            os.kill(os.getpid(), signal.Signals[by])
        elif len(calls) == 3:
            raise RuntimeError("this GPU fell off the bus")
        return whole(*args, **kwargs)

    dist.all_to_all_single = exchange


def run_one(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    commands = run["commands"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"{rank}.log" for rank in range(len(commands))]
    for log in logs:
        log.touch()
    begin = time.monotonic()
    children = {}
    for rank, arguments in enumerate(commands):
        if pid := os.fork():
            children[pid] = rank
            continue
        try:
            child(arguments, rank, len(commands), port, logs[rank], run)
        finally:
            os._exit(1)  # a signal that came while it was ending
    codes: dict[int, int] = {}
    failed_at: float | None = None
    while len(codes) < len(children):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[children[pid]] = os.waitstatus_to_exitcode(status)
            if codes[children[pid]] and failed_at is None:
                failed_at = time.monotonic()
                for other in [other for other, rank in children.items() if rank not in codes]:
                    os.kill(other, signal.SIGTERM)
            continue
        if failed_at is not None and time.monotonic() - failed_at > GRACE:
            for other in [other for other, rank in children.items() if rank not in codes]:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.02)
    ended = time.monotonic()
    output = [log.read_text(errors="replace") for log in logs]
    for log in logs:
        log.unlink()
    seconds = {"seconds": ended - begin, "seconds_after_failure": None if failed_at is None else ended - failed_at}
    return {"codes": [codes[rank] for rank in range(len(commands))], "output": output, **seconds}


def main(given: str, out: str) -> None:
    import diffusers
    import torch

    import tilewise.ui.cli.generate  # noqa: F401 - imported once, for all processes

    torch.set_num_threads(1)
    _ = diffusers.WanPipeline, diffusers.AutoencoderKLWan
    with tempfile.TemporaryDirectory() as folder:
        found = {run["name"]: run_one(run, Path(folder)) for run in json.loads(Path(given).read_text())}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
