"""Runs tests that take a `comm` on N real ranks.

Such a test is collected once for each N (1, 2, 3, 4, 8, or those that `@pytest.mark.ranks` names). All tests of one N
run in one job. The jobs run one after another, from the start, beside the tests that pytest itself runs; pytest asks
for each test's outcome when its turn has come. A test that fails, or hangs, ends its job and is blamed; another job
runs the rest. The run ends by saying how many tests ran at which N.

A test marked `beside`, which takes no fixtures, runs in such a job too, the first: of one process, without MPI. So two
cores have work from the start to the end.
"""

from __future__ import annotations

import inspect
import json
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tsp_ref.process import jobs

SIZES = (1, 2, 3, 4, 8)
JOBS = pytest.StashKey["Jobs"]()
LIMIT = 120.0  # seconds for one test, after which it hangs
WITHOUT_MPI = 0  # the N of the job that is one process, not started by a launcher


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks(*sizes): the numbers of ranks that an MPI test runs at")
    config.addinivalue_line("markers", "beside: runs in a process beside pytest's, without MPI; takes no fixtures")
    config.stash[JOBS] = Jobs()
    # As at Ctrl-C: pytest ends in good order, and with it the jobs that it has begun.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("comm", "n"):
        if name in metafunc.fixturenames:
            marker = metafunc.definition.get_closest_marker("ranks")
            metafunc.parametrize(name, marker.args if marker else SIZES, ids=lambda size: f"n{size}")


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        if _job(item) is not None:
            session.config.stash[JOBS].add(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Any:
    jobs = session.config.stash[JOBS]
    if not session.config.option.collectonly and not session.testsfailed:
        jobs.begin()
    try:
        return (yield)
    finally:
        jobs.end()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if _job(pyfuncitem) is None:
        return None
    failure = pyfuncitem.config.stash[JOBS].failure_of(pyfuncitem)
    if failure is not None:
        pytest.fail(failure, pytrace=False)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    size = _size(item, "comm") or _size(item, "n")
    if size is not None and report.when == "call":
        item.config.stash[JOBS].outcomes[size, report.outcome] += 1
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    outcomes = config.stash[JOBS].outcomes
    terminalreporter.section("MPI tests: what ran at which number of ranks")
    if not outcomes:
        terminalreporter.line("none were selected")
        return
    terminalreporter.line(f"on {jobs.vendor()}")
    for size in sorted({size for size, _ in outcomes}):
        counts = ", ".join(f"{count} {outcome}" for (n, outcome), count in sorted(outcomes.items()) if n == size)
        terminalreporter.line(f"n={size}: {counts}")


def _size(item: pytest.Item, name: str) -> int | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get(name) if callspec else None


def _job(item: pytest.Item) -> int | None:
    """The N of the job that runs a test; None: pytest itself does."""
    return WITHOUT_MPI if item.get_closest_marker("beside") else _size(item, "comm")


class Jobs:
    """The tests of each N, and the job, in a thread beside pytest's own, that runs them."""

    def __init__(self) -> None:
        self.tests: dict[int, list[dict[str, Any]]] = {}
        self.outcomes: Counter[tuple[int, str]] = Counter()
        self.results: dict[int, Future[dict[str, str | None]]] = {}
        self._stopped = threading.Event()
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mpi-jobs")

    def add(self, item: pytest.Function) -> None:
        """Note a test for the job of its N."""
        callspec = getattr(item, "callspec", None)
        parameters = {name: value for name, value in (callspec.params if callspec else {}).items() if name != "comm"}
        if fixtures := set(inspect.signature(item.function).parameters) - {"comm", *parameters}:
            raise pytest.UsageError(f"{item.nodeid}: a job has no fixtures, as {', '.join(sorted(fixtures))}")
        tests = self.tests.setdefault(_job(item), [])
        tests.append({"id": item.nodeid, "number": len(tests), "module": item.module.__name__,
                      "function": item.originalname, "parameters": parameters})

    def begin(self) -> None:
        """Start to run all tests, N after N."""
        for size, tests in sorted(self.tests.items()):
            self.results[size] = self._beside.submit(run_tests, size, tests, self._stopped)

    def failure_of(self, item: pytest.Function) -> str | None:
        """None if the test passed on all ranks. Waits for the whole job of its N."""
        return self.results[_job(item)].result()[item.nodeid]

    def end(self) -> None:
        """Leave nothing running, whether all is done or pytest stops early."""
        self._stopped.set()
        self._beside.shutdown(cancel_futures=True)


def run_tests(size: int, tests: list[dict[str, Any]], stopped: threading.Event) -> dict[str, str | None]:
    """The failure, or None, of each test: one job after another until every test has run, or all are to stop."""
    failures: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        while tests and not stopped.is_set():
            passed, failure = run_job(size, tests, Path(folder), stopped)
            failures.update({test["id"]: None for test in tests[:passed]})
            if passed < len(tests):
                failures[tests[passed]["id"]] = failure
            tests = tests[passed + 1 :]
    return failures


def run_job(size: int, tests: list[dict[str, Any]], folder: Path, stopped: threading.Event) -> tuple[int, str]:
    """How many tests passed, in order, before the job ended; and what the next one, if any, failed with."""
    job_file = folder / "job.json"
    job_file.write_text(json.dumps({"mpi": size != WITHOUT_MPI, "results": str(folder), "tests": tests}))
    words = [str(jobs.ROOT / "mpi_tests" / "worker.py"), str(job_file)]
    # N ranks would leave little of two cores to pytest itself, and at the end, when only it is left, one would idle.
    if size == WITHOUT_MPI:
        job = jobs.begin_words("nice", "-n", "10", sys.executable, *words)
    else:
        job = jobs.begin(size, *words, first=("nice", "-n", "10"))
    passed, since, hung = 0, time.monotonic(), False
    try:
        while job.poll() is None and not hung and not stopped.wait(0.02):
            now = _count_passed(tests, folder, passed)
            if now > passed:
                passed, since = now, time.monotonic()
            hung = time.monotonic() - since > LIMIT
    finally:
        if job.poll() is None:
            jobs.end(job)
    ended = jobs.collect(job)
    passed = _count_passed(tests, folder, passed)
    if passed == len(tests):
        assert ended.code == 0, f"all tests passed, but the job of n={size} ended with {ended.code}\n{ended.errors}"
        return passed, ""
    traces = [f"rank {file.suffix[5:]} of {size or 1}:\n{file.read_text()}"
              for file in sorted(folder.glob(f"{tests[passed]['number']}.rank*"))]
    how = f"no end after {LIMIT:.0f} s" if hung else f"the job ended with {ended.code}"
    return passed, "\n".join(traces) or f"n={size}: {how}\n{ended.output}\n{ended.errors}"


def _count_passed(tests: list[dict[str, Any]], folder: Path, before: int) -> int:
    """How many have passed by now, of which some are known already."""
    while before < len(tests) and (folder / f"{tests[before]['number']}.passed").exists():
        before += 1
    return before

