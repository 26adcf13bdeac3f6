"""The jobs on disk: one JSON file in the output folder, written anew whenever a job begins or ends, complete or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tilewise.pipelines.media.files import write_text
from tilewise.ui.web.jobs.job import ENDED, Job

FORMAT = 1
MOST = 200  # ended jobs that are kept, the latest
MOST_BYTES = 4 * 2**20  # of the file: a batch's prompts may be long


class JobFile:
    """The jobs of one server. folder: absolute; made if need be.

    Another server on the same folder has a file of its own: jobs.json, jobs-2.json and so on, whichever is free.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            name = "jobs" if number == 1 else f"jobs-{number}"
            lock = (folder / f".{name}.lock").open("a")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            except OSError:  # a file system without locks: one server a folder is the user's affair
                pass
            self._lock: IO[str] = lock
            self.path = folder / f"{name}.json"
            return

    def load(self) -> tuple[list[Job], list[str]]:
        """The jobs in order of arrival, and what could not be read, in sentences. A damaged file is put aside."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return [], []
        except (OSError, UnicodeDecodeError) as error:
            return [], [f"{self._aside()}: {error}"]
        try:
            told = json.loads(text)
            entries = told["jobs"]
            if told["format"] != FORMAT or not isinstance(entries, list):
                raise ValueError(f"not of format {FORMAT}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return [], [f"{self._aside()}: {str(error)[:120]}"]
        jobs, broken = [], 0
        for entry in entries:
            try:
                jobs.append(Job.from_dict(entry))
            except (ValueError, KeyError, TypeError):
                broken += 1
        problems = [f"{self._aside()}: {broken} of {len(entries)} entries could not be read"] if broken else []
        return jobs, problems

    def save(self, jobs: Sequence[Job]) -> list[Job]:
        """Writes the jobs, in order of arrival, without the oldest ended ones beyond the bounds; those that were written.

        Raises OSError.
        """
        kept: list[tuple[Job, str]] = []
        ended = size = 0
        for job in reversed(jobs):
            text = json.dumps(job.to_dict(), allow_nan=False)
            if job.status in ENDED:
                ended += 1
                if ended > MOST or (ended > 1 and size + len(text) > MOST_BYTES):
                    continue
            size += len(text)
            kept.append((job, text))
        kept.reverse()
        body = ",\n".join(text for _, text in kept)
        write_text(self.path, f'{{"format": {FORMAT}, "jobs": [\n{body}\n]}}\n')
        return [job for job, _ in kept]

    def close(self) -> None:
        """Gives the name back to other servers."""
        self._lock.close()

    def _aside(self) -> str:
        """Moves the file out of the way; the beginning of a sentence that says so."""
        for number in itertools.count(1):
            aside: Any = self.path.with_name(f"{self.path.stem}.damaged-{number}.json")
            if not aside.exists():
                break
        with contextlib.suppress(OSError):
            self.path.rename(aside)
        return f"the list of jobs was damaged; the file is kept as {aside.name}"
