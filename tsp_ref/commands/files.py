"""Files that commands write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import UserError


class WholeFile:
    """A file that is written whole, or not at all: what was there before is lost only to a full result.

    Made, it has tried whether it can be written. Without a path nothing is ever written.
    """

    def __init__(self, option: str, path: str | None) -> None:
        self.option = option
        self.path = path
        if path is not None:
            with self._part():
                pass
            os.remove(f"{path}.part")

    def write(self, text: str) -> None:
        """Write it, and put it in its place."""
        if self.path is not None:
            with self._part() as file:
                file.write(text)
            os.replace(f"{self.path}.part", self.path)

    @contextmanager
    def _part(self) -> Iterator[IO[str]]:
        try:
            if Path(str(self.path)).is_dir():
                raise IsADirectoryError(0, "it is a folder")
            with open(f"{self.path}.part", "w", encoding="utf-8") as file:
                yield file
        except OSError as error:
            raise UserError(f"{self.option} {self.path} cannot be written: {error.strerror}") from None
