"""Names for the clips of one request: they never stand for a file that is there already, unless the user says so."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tilewise.pipelines.errors import OutputPathError
from tilewise.pipelines.media.files import sidecar


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The clips that one request writes: ``file``, and beside it one for each of ``endings``, such as NAME-dense.mp4.

    given: whether the user chose the name; another is numbered until it is free. force: replace what is there. settings: whether
    those of each clip go to a file beside it, which is kept as the clip is.
    """

    file: Path
    endings: tuple[str, ...] = ()
    given: bool = False
    force: bool = False
    settings: bool = True

    @property
    def files(self) -> list[Path]:
        return [self.file, *(self.file.with_stem(self.file.stem + ending) for ending in self.endings)]

    def free(self) -> Outputs:
        """With the first number for which neither a clip nor the settings of one are there; a name that was given stays."""
        return self if self.given else next(one for one in self._numbered() if one._taken() is None)

    def check(self) -> None:
        """Raises OutputPathError where a name that was given is taken, and `force` does not say to replace it."""
        if self.force or not self.given:
            return
        if there := self._taken():
            what = (
                "there is such a file" if there in self.files else f"its settings go to {there}, which is there already"
            )
            raise OutputPathError(f"cannot write {self.file}: {what}; give --force to replace it, or another --out")

    @contextlib.contextmanager
    def claimed(self) -> Iterator[list[Path]]:
        """The files for a block that writes them, kept from other processes by empty files, which go where none was written.

        Where a name was taken since it was chosen, there are others: a clip that is made is not lost for its name.
        """
        if self.force:
            yield self.files
            return
        mine: list[Path] = []
        for one in self._numbered():
            try:
                mine = one._claim()
                break
            except FileExistsError:
                continue
            except OSError:  # whoever writes there says what is wrong
                break
        try:
            yield one.files
        finally:
            _remove_empty(mine)

    def _numbered(self) -> Iterator[Outputs]:
        yield self
        for number in itertools.count(2):
            yield dataclasses.replace(self, file=self.file.with_stem(f"{self.file.stem}-{number}"))

    def _beside(self) -> list[Path]:
        return [sidecar(file) for file in self.files] if self.settings else []

    def _taken(self) -> Path | None:
        """The first of the files that is there."""
        return next((path for path in (*self.files, *self._beside()) if os.path.lexists(path)), None)

    def _claim(self) -> list[Path]:
        """Makes the files, empty. Raises FileExistsError, and leaves none, where one is there."""
        mine: list[Path] = []
        try:
            for path in self._beside():
                if os.path.lexists(path):
                    raise FileExistsError(path)
            for file in self.files:
                file.touch(exist_ok=False)
                mine.append(file)
        except BaseException:
            _remove_empty(mine)
            raise
        return mine


def _remove_empty(files: Sequence[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            if file.stat().st_size == 0:
                file.unlink()
