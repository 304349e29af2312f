"""One rank of a job that runs MPI tests: `mpiexec -n N python worker.py JOB.json`, started by the conftest beside it.
For tests without MPI it is started as it is.

Every rank calls every test of the job in turn, with a barrier between. After a failure the ranks may disagree about
what comes next, so the failing rank writes its traceback and ends the job; the conftest starts another for the rest.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from tsp_ref.comm.control import gather_texts  # noqa: E402
from tsp_ref.comm.mpi import MPICommunicator, open_world  # noqa: E402


def main(job_file: str) -> None:
    """Run the job's tests in order."""
    job = json.loads(Path(job_file).read_text())
    run = on_every_rank if job["mpi"] else alone
    run(job["tests"], Path(job["results"]))


def function_of(test: dict[str, Any]) -> Callable[..., None]:
    """What a test calls."""
    return getattr(importlib.import_module(test["module"]), test["function"])


def on_every_rank(tests: list[dict[str, Any]], results: Path) -> None:
    """The tests of N ranks."""
    world = open_world()
    for test in tests:
        # A communicator of its own, so that a test's messages and counts are its own.
        comm = MPICommunicator(sys.modules["mpi4py.MPI"])
        try:
            function_of(test)(comm, **test["parameters"])
            comm.finish()
        except BaseException:
            (results / f"{test['number']}.rank{world.rank}").write_text(traceback.format_exc())
            world.abort(1)
            os._exit(1)  # an abort may return; where all ranks have failed they would meet below, as if all had passed
        gather_texts(world, "")  # all ranks are here, so the test has passed on all
        if world.rank == 0:
            (results / f"{test['number']}.passed").touch()


def alone(tests: list[dict[str, Any]], results: Path) -> None:
    """The tests of one process without MPI."""
    for test in tests:
        try:
            function_of(test)(**test["parameters"])
        except BaseException:
            (results / f"{test['number']}.rank0").write_text(traceback.format_exc())
            sys.exit(1)
        (results / f"{test['number']}.passed").touch()


if __name__ == "__main__":
    main(sys.argv[1])
