"""The jobs that run MPI tests: a test that fails is blamed, on whatever ranks it fails, the others run, and all end."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import conftest
import numpy as np
import pytest

from tsp_ref.process import jobs
from tsp_ref.process.jobs import ROOT


def passing(comm):
    """A test that passes."""


def failing_everywhere(comm):
    """A test that all ranks fail at the same moment."""
    raise AssertionError("on purpose")


def failing_on_the_last(comm):
    """A test that one rank fails while the others wait for it."""
    if comm.rank == comm.size - 1:
        raise AssertionError("on purpose")
    comm.Wait(comm.Irecv(np.zeros(1), comm.size - 1, 1))


def leaving_a_message(comm):
    """A test that passes, but for a message that nobody receives."""
    comm.Isend(np.zeros(1), (comm.rank + 1) % comm.size, 1)


def waiting_for_ever(comm, folder):
    """A test that says which process runs it, and never ends."""
    (Path(folder) / f"{os.getpid()}").touch()
    comm.Wait(comm.Irecv(np.zeros(1), (comm.rank + 1) % comm.size, 1))


def job_of(*functions, **parameters):
    """What a job is told of some tests."""
    return [{"id": number, "number": number, "module": __name__, "function": function.__name__,
             "parameters": parameters} for number, function in enumerate(functions)]


@pytest.mark.ranks(4)
def test_tests_that_fail_are_blamed_and_no_others(n):
    tests = job_of(passing, failing_everywhere, failing_everywhere, passing, failing_on_the_last, leaving_a_message)
    failures = conftest.run_tests(n, tests, threading.Event())
    assert {number for number, failure in failures.items() if failure is None} == {0, 3}
    assert all(f"of {n}:\n" in failures[number] and "on purpose" in failures[number] for number in (1, 2, 4))
    assert "MessageError" in failures[5]


def alone(number):
    """A test without MPI that passes if its number is even."""
    assert number % 2 == 0, "on purpose"


def test_so_are_tests_that_run_beside_without_mpi():
    tests = [job_of(alone, number=number)[0] | {"id": number, "number": number} for number in range(4)]
    failures = conftest.run_tests(conftest.WITHOUT_MPI, tests, threading.Event())
    assert failures[0] is failures[2] is None
    assert all("AssertionError: on purpose" in failures[number] for number in (1, 3))


def is_running(process):
    """Whether a process is there, and not only its exit code, which nobody has asked for."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.ranks(2)
def test_a_job_ends_when_pytest_stops_before_it(n, tmp_path):
    begun = conftest.Jobs()
    begun.tests = {n: job_of(waiting_for_ever, folder=str(tmp_path)), 4: job_of(passing)}
    begun.begin()
    try:
        while len(list(tmp_path.iterdir())) < n:
            assert not begun.results[n].done(), begun.results[n].result()
            time.sleep(0.05)
    finally:
        begun.end()
    assert "no end after" not in begun.results[n].result()[0]
    deadline = time.monotonic() + 10  # a launcher may be gone before the last of its ranks
    while left := [process.name for process in tmp_path.iterdir() if is_running(int(process.name))]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.mark.parametrize("request_", ["comm", "n"])
def test_pytest_ended_by_sigterm_leaves_no_ranks_behind(request_, tmp_path):
    """Whether they run the tests of one N, or were started by one test."""
    running, script = tmp_path / "running", tmp_path / "test_for_ever.py"
    running.mkdir()
    waiting = f"import test_jobs, tsp_ref.comm.mpi as m; test_jobs.waiting_for_ever(m.open_world(), {str(running)!r})"
    body = {"comm": f"test_jobs.waiting_for_ever(comm, {str(running)!r})",
            "n": f"mpirun(n, '-c', {waiting!r}, PYTHONPATH={str(Path(__file__).parent)!r} + ':' + {str(ROOT)!r})"}
    script.write_text("import pytest\nimport test_jobs\nfrom tsp_ref.process.jobs import mpirun\n\n\n"
                      f"@pytest.mark.ranks(2)\ndef test_for_ever({request_}):\n    {body[request_]}\n")
    words = ["-m", "pytest", "-p", "conftest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(script)]
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), str(tmp_path)])
    run = subprocess.Popen([sys.executable, *words], cwd=tmp_path, stdout=subprocess.DEVNULL,
                           env=jobs.environment(PYTHONPATH=path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"))
    try:
        deadline = time.monotonic() + 60
        while len(list(running.iterdir())) < 2:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        run.terminate()
        run.wait(30)
    finally:
        run.kill()
    deadline = time.monotonic() + 10
    while left := [process.name for process in running.iterdir() if is_running(int(process.name))]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
