"""Commands, lessons and benchmarks called inside this process, as if they were typed: by a job, or by pytest itself.

What the process itself is the subject of, as its start, its end or what a terminal shows, is tested with `mpirun` of
`jobs.py`; everything else costs one job for all tests of an N this way, in place of N starts for each.
"""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from collections.abc import Callable
from typing import TextIO
from unittest import mock

import pytest

from tsp_ref.cli import main
from tsp_ref.process.jobs import ROOT, Ended


def command(*arguments: str) -> Ended:
    """`python -m tsp_ref arguments...`"""
    return _caught(lambda: main(arguments))


def script(path: str, *arguments: str) -> Ended:
    """`python path arguments...`, of a script that always exits with a code, as lessons and benchmarks do."""
    def run() -> int:
        search = [str((ROOT / path).parent), *sys.path]
        with (mock.patch.object(sys, "argv", [path, *arguments]), mock.patch.object(sys, "path", search),
              pytest.raises(SystemExit) as ended):
            runpy.run_path(str(ROOT / path), run_name="__main__")
        return ended.value.code

    return _caught(run)


class Overheard(io.StringIO):
    """Keeps what is written to it, and passes it on: an error that ends the job ends this process, too."""

    def __init__(self, passed_to: TextIO) -> None:
        super().__init__()
        self.passed_to = passed_to

    def write(self, text: str) -> int:
        """Keep and pass on."""
        self.passed_to.write(text)
        return super().write(text)

    def flush(self) -> None:
        """Let what was passed on be seen."""
        self.passed_to.flush()


def _caught(run: Callable[[], int]) -> Ended:
    with (contextlib.redirect_stdout(io.StringIO()) as output,
          contextlib.redirect_stderr(Overheard(sys.stderr)) as errors):
        code = run()
    return Ended(code, output.getvalue(), errors.getvalue(), 0.0)
