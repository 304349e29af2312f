"""Starting N real ranks, with a watchdog: a job that does not end by itself is ended, with its output, as a failure."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = ("--text", "docs")  # for commands whose text does not matter: the standard library takes long to read

# As it is before any test: jobs are started beside tests that change it for themselves.
BEFORE = dict(os.environ)

if sys.dont_write_bytecode:
    # Hundreds of processes would compile the package each for itself: the first does it for all, beside the sources.
    COMPILED = tempfile.TemporaryDirectory(prefix="tsp_ref-compiled-")
    BEFORE |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": COMPILED.name}

# What Open MPI needs to start more ranks than cores, as root too; MPICH ignores all of it.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_btl": "^ofi",
    "OMPI_MCA_osc": "^ucx",
}


@dataclass
class Ended:
    """How a job ended."""

    code: int
    output: str  # of all ranks, stdout
    errors: str  # of all ranks, stderr
    seconds: float


def mpiexec() -> str:
    """The launcher of this environment's MPI; an error where there is none, because an MPI test never skips."""
    for package in ("mpich", "openmpi"):
        with contextlib.suppress(metadata.PackageNotFoundError, StopIteration):
            files = metadata.distribution(package).files or []
            return str(next(file for file in files if file.name == "mpiexec").locate())
    found = shutil.which("mpiexec")
    if found is None:
        raise RuntimeError('no mpiexec in this environment: pip install -e ".[test]"')
    return found


def vendor() -> str:
    """The name of the MPI that the tests run on."""
    text = subprocess.run([mpiexec(), "--version"], capture_output=True, text=True, env=environment()).stdout
    if "HYDRA" in text:
        return "MPICH " + next((line.split()[-1] for line in text.splitlines() if "Version:" in line), "")
    return text.splitlines()[0] if text else mpiexec()


def environment(**extra: str) -> dict[str, str]:
    """The environment of a job."""
    return BEFORE | OPEN_MPI | extra


def begin(n: int, *arguments: str, first: tuple[str, ...] = (), **extra: str) -> subprocess.Popen[bytes]:
    """Start `mpiexec -n N python arguments...` in a process group of its own, its output in files; `first` are words
    before it, as `nice`."""
    return begin_words(*first, mpiexec(), "-n", str(n), sys.executable, *arguments, **extra)


def begin_words(*words: str, **extra: str) -> subprocess.Popen[bytes]:
    """Start these words in a process group of their own, their output in files."""
    output, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (closed by collect)
    job = subprocess.Popen(words, cwd=ROOT, env=environment(**extra), stdin=subprocess.DEVNULL, stdout=output,
                           stderr=errors, start_new_session=True)
    job.files = (output, errors, time.monotonic())  # type: ignore[attr-defined]
    return job


def end(job: subprocess.Popen[bytes]) -> None:
    """End a job: politely first, because a launcher that is killed orphans its ranks."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, number) if number == signal.SIGKILL else job.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(10)
            return


def collect(job: subprocess.Popen[bytes]) -> Ended:
    """The result of a job that has ended."""
    output, errors, begun = job.files  # type: ignore[attr-defined]
    texts = []
    for file in (output, errors):
        file.seek(0)
        texts.append(file.read().decode(errors="replace"))
        file.close()
    return Ended(job.returncode, texts[0], texts[1], time.monotonic() - begun)


def mpirun(n: int, *arguments: str, limit: float = 120, **extra: str) -> Ended:
    """Run `mpiexec -n N python arguments...` to its end. A job still running after `limit` seconds is a failure."""
    job = begin(n, *arguments, first=(), **extra)
    try:
        job.wait(limit)
    except subprocess.TimeoutExpired:
        end(job)
        ended = collect(job)
        said = f"{ended.output}\n{ended.errors}"
        raise AssertionError(f"n={n} {' '.join(arguments)}: no end after {limit:.0f} s\n{said}") from None
    except BaseException:
        end(job)
        raise
    return collect(job)
