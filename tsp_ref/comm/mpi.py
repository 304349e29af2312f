"""Real ranks: a communicator over MPI, and what keeps N processes from hanging when one of them fails.

This is the only file that imports mpi4py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import MessageError, UserError
from . import launcher
from .communicator import Communicator
from .link import Link
from .request import Request
from .staging import Device, DeviceTransport, StagedTransport, Transport

LOOK_EVERY = 200e-6  # seconds between two looks of a thread that progresses messages
BACK_OFF = 2.5e-6  # seconds by which a pause is longer than the pause before it
LONGEST_PAUSE = 1e-3  # seconds
PATIENCE = 5000  # looks, some milliseconds, after which a rank that has a core to itself sleeps, too
SHORT_PAUSE = 50e-6  # seconds

GPU_SUPPORT = {
    "cuda": ("MPIX_Query_cuda_support",),  # Open MPI and MPICH
    "hip": ("MPIX_Query_rocm_support", "MPIX_Query_hip_support"),  # Open MPI; MPICH
}
"""Functions of MPI libraries, not of the standard, that answer whether they take a GPU's memory."""
CRAY_GPU_SUPPORT = "MPICH_GPU_SUPPORT_ENABLED"  # of Cray's MPICH, for all GPUs


class MPICommunicator(Communicator):
    """A communicator over an MPI communicator of its own. Sizes are checked on both sides; MPI carries no dtype, so
    that is checked on each side only: a float32 message for a float64 array is caught as one of the wrong size, but an
    int64 message for it is not. Virtual ranks compare both ends."""

    def __init__(self, mpi: Any, synchronous: bool = False) -> None:
        """synchronous: every Isend is an Issend, which no library completes before its receive has begun."""
        self.mpi = mpi.COMM_WORLD.Dup()
        super().__init__(self.mpi.Get_rank(), self.mpi.Get_size())
        self._library = mpi
        self._send = self.mpi.Issend if synchronous else self.mpi.Isend
        self._status = mpi.Status()
        self._transport = Transport(self)
        node = self.mpi.Split_type(mpi.COMM_TYPE_SHARED)
        self.process_on_node = node.Get_rank(), node.Get_size()
        self._crowded = node.Get_size() > cores()
        node.Free()

    def travel_by(self, progress: str, link: Link | None) -> None:
        """With `thread`, a second thread of this rank progresses messages while NumPy computes, and Python is free."""
        super().travel_by(progress, link)
        if progress == "thread":
            level = self._library.Query_thread()
            if level < self._library.THREAD_SERIALIZED:
                raise UserError(f"--progress thread needs an MPI that lets two threads call it, and this one gives "
                                f"thread level {level} of {self._library.THREAD_MULTIPLE}: use --progress poll")
            self._lock = threading.RLock()
            threading.Thread(target=self._keep_progressing, daemon=True).start()

    def _keep_progressing(self) -> None:
        while self.progress_mode == "thread":
            self._progress_all()
            time.sleep(LOOK_EVERY)

    def _progress_all(self) -> None:
        for request in list(self._open.values()):
            try:
                self._advance(request)
            except MessageError as error:
                request.error = error  # raised where the message is waited for: MPI reports it only once

    def carry(self, device: Device, gpu_aware: bool) -> None:
        """A device's arrays are staged in the host's memory, or handed to an MPI that says that it takes them."""
        if gpu_aware:
            self.require_gpu_support(device.kind)
        self._transport = DeviceTransport(self, device) if gpu_aware else StagedTransport(self, device)

    @property
    def pinned_peak(self) -> int:
        """The most bytes of pinned memory that messages were staged in at a time."""
        return self._transport.pinned_peak

    def require_gpu_support(self, kind: str) -> None:
        """A `UserError` unless MPI says that it takes the memory of GPUs of this kind ("cuda" or "hip"): by one of
        GPU_SUPPORT, asked of the library that mpi4py has loaded, or by Cray's variable. An MPI that does not would read
        the address as one of the host's, and end the process."""
        if os.environ.get(CRAY_GPU_SUPPORT) == "1":
            return
        loaded = ctypes.CDLL(self._library.__file__)
        found = [name for name in GPU_SUPPORT[kind] if hasattr(loaded, name)]
        if not any(getattr(loaded, name)() for name in found):
            why = f"its {found[0]} says no" if found else f"it has no {' or '.join(GPU_SUPPORT[kind])}"
            raise UserError(f"--gpu-aware needs an MPI that takes GPU memory, and {vendor(self._library)} does not say "
                            f"so ({why}, and {CRAY_GPU_SUPPORT}=1 is not set): leave --gpu-aware out, or use an MPI "
                            f"built for {'ROCm' if kind == 'hip' else 'CUDA'}")

    def _start(self, request: Request) -> None:
        self._transport.post(request)

    def _test(self, request: Request) -> bool:
        return self._transport.test(request)

    def begin(self, request: Request, buffer: Array) -> Any:
        """Hand MPI a message with this buffer, of the host's memory or of a GPU's; MPI's request."""
        start = self._send if request.verb == "send" else self.mpi.Irecv
        try:
            return start([buffer, self._library.BYTE], request.peer, int(request.tag))
        except self._library.Exception as error:
            raise MessageError(f"{request}: {error}") from None

    def over(self, request: Request, handle: Any) -> bool:
        """Whether MPI is through with a message; raises if it arrived in another size."""
        try:
            if not handle.Test(self._status):
                return False
        except self._library.Exception as error:
            raise MessageError(f"{request}: {error}") from None
        arrived = self._status.Get_count(self._library.BYTE)
        if request.verb == "receive" and arrived != request.array.nbytes:
            raise MessageError(f"{request}: the message has {arrived} bytes")
        return True

    def _pause(self, requests: list[Request], polls: int) -> None:
        """Wait by testing, not inside MPI: so Ctrl-C is heard, and where ranks outnumber cores, a rank that waits for
        long sleeps, the longer the longer, and leaves its core to one that works (a wait inside MPI would spin on
        it). Elsewhere it sleeps only in a long wait: others may use the machine, too."""
        if self._crowded:
            time.sleep(min(polls * BACK_OFF, LONGEST_PAUSE))
        elif polls > PATIENCE:
            time.sleep(SHORT_PAUSE)

    def _check_all_received(self) -> None:
        """Compare what each rank says it sent to this one with what this one received: a check, not a part of the data
        path, so MPI's own collective will do."""
        sent = np.array([self.ledger.sums("send", peer=peer) for peer in range(self.size)], dtype=np.int64)
        promised = np.empty_like(sent)
        self.mpi.Alltoall(sent, promised)
        for peer in range(self.size):
            received = self.ledger.sums("receive", peer=peer)
            if received != tuple(promised[peer]):
                raise MessageError(f"rank {self.rank} received {received[0]} messages, {received[1]} bytes from rank "
                                   f"{peer}, which sent {promised[peer][0]} messages, {promised[peer][1]} bytes")

    def abort(self, code: int) -> None:
        """End all ranks at once, without waiting for any."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(UserError):  # an output that cannot be written is no reason to go on
                stream.flush()
        self._library.COMM_WORLD.Abort(code)
        os._exit(code)  # MPICH's Abort may return before this process is ended, and what comes after must not run


def vendor(library: Any) -> str:
    """The name and version of an MPI library, as it gives them."""
    return " ".join(str(library.Get_library_version()).strip().split("\n")[0].split(",")[0].strip("\x00").split())


def open_world() -> MPICommunicator:
    """The communicator of all ranks that the launcher started; from here on an exception on one rank ends the job, and
    so does SIGTERM to one."""
    with warnings.catch_warnings(action="ignore"):  # of a mismatched launcher, which is refused
        library = _started_library()
    wanted, found = launcher.launcher_size(), library.COMM_WORLD.Get_size()
    if wanted is not None and wanted != found:
        raise UserError(f"mpirun started {wanted} ranks, but each finds itself rank 0 of {found}: the launcher is not "
                        f"of the MPI that Python loads ({vendor(library)}); use the mpirun beside this environment's "
                        "python")
    world = MPICommunicator(library)
    sys.excepthook = lambda kind, error, trace: fail(world, error, trace)
    launcher.hear_ctrl_c()
    launcher.hear_termination(lambda: fail(world, Terminated()))
    return world


def _started_library() -> Any:
    """mpi4py's MPI, started; a `UserError` where it cannot be loaded, or would end the process instead of starting."""
    try:
        import mpi4py

        # Not at import: first it must be asked who it is.
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"MPI cannot be loaded ({str(error).splitlines()[0]}): pip install 'tsp_ref[mpi]', or run "
                        "without mpirun and with --ranks N") from None
    if not MPI.Is_initialized():
        _require_launcher_of(MPI)
        launcher.end_at_ctrl_c()
        MPI.Init_thread()
    return MPI


def _require_launcher_of(library: Any) -> None:
    """A `UserError` where MPI would end the process: MPICH, unless built with PMIx, cannot be started by a launcher
    that speaks PMIx alone, as Open MPI's does."""
    speaks_pmix = "PMIX_RANK" in os.environ and not {"PMI_RANK", "PMI_FD"}.intersection(os.environ)
    if not speaks_pmix or not vendor(library).startswith("MPICH") or _has_loaded("pmix"):
        return
    wanted = launcher.launcher_size()
    if wanted is None:
        raise UserError(f"PMIX_RANK={os.environ['PMIX_RANK']} says that a launcher has started this process, but not "
                        f"one of the MPI that Python loads ({vendor(library)}): unset PMIX_RANK, or use the mpirun "
                        "beside this environment's python")
    raise UserError(f"mpirun started {wanted} ranks, but it is not of the MPI that Python loads ({vendor(library)}), "
                    "which cannot join them; use the mpirun beside this environment's python")


def _has_loaded(library: str) -> bool:
    """Whether a library of this name is in this process; where that cannot be seen, it is taken to be."""
    try:
        return f"lib{library}" in Path("/proc/self/maps").read_text()
    except OSError:
        return True


class Terminated(BaseException):
    """SIGTERM came to this rank."""


def version() -> str:
    """The name and version of the MPI that Python loads; a `UserError` where it loads none, or another than the
    launcher's."""
    open_world()
    from mpi4py import MPI

    return " ".join(vendor(MPI).split())


def leave_together() -> None:
    """Wait for all ranks, so that none leaves before rank 0 has spoken: a launcher may end the job when one rank leaves
    with a code that is not 0. Where MPI does not join the ranks, give rank 0 a second."""
    try:
        open_world().mpi.Barrier()
    except UserError:
        time.sleep(float(launcher.launcher_rank() > 0))


CODES = {KeyboardInterrupt: 130, Terminated: 143}
"""Exit codes by what ended the job; a `UserError` has its own, and anything else is 1."""


def fail(world: MPICommunicator, error: BaseException, trace: TracebackType | None = None) -> None:
    """Say once for the whole node, however many ranks fail at once, what went wrong, and end the job."""
    code = error.code if isinstance(error, UserError) else CODES.get(type(error), 1)
    if not _first_to_fail():
        time.sleep(5)  # the rank that failed first is about to end this one
        world.abort(code)
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif isinstance(error, Terminated):
        print(f"rank {world.rank} of {world.size} was told to end (SIGTERM), and ends the job", file=sys.stderr)
    elif isinstance(error, UserError):
        print(f"error: on rank {world.rank}: {error}", file=sys.stderr)
    else:
        print(f"rank {world.rank} of {world.size} failed:", file=sys.stderr)
        traceback.print_exception(type(error), error, trace or error.__traceback__)
    sys.stderr.flush()
    time.sleep(0.2)  # ranks that fail at the same time find this one first only while it lives
    world.abort(code)


def leave_interrupted() -> None:
    """End this process for a Ctrl-C that came before `fail` could be called: at once, for in good order it would wait
    for the others."""
    if _first_to_fail():
        print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


_failure_marks: list[socket.socket] = []


def _first_to_fail() -> bool:
    """Whether no other rank of this job on this node failed before: the first to fail takes a name that only one
    process can hold. Where the launcher gives the job a folder, as Open MPI's does, a file's in it, because that
    launcher sends SIGTERM to the others when the first has ended; else one that is free again when the process ends
    (Linux's abstract sockets; elsewhere every rank is first)."""
    folder = os.environ.get("PMIX_SERVER_TMPDIR", "")
    if os.path.isdir(folder):
        try:
            os.close(os.open(os.path.join(folder, "tsp_ref_failed"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError:
            pass
        else:
            return True
    if not sys.platform.startswith("linux"):
        return True
    mark = socket.socket(socket.AF_UNIX)
    try:
        mark.bind(f"\0tsp_ref failed {os.getppid()}")
    except OSError:
        return False
    _failure_marks.append(mark)
    return True


def cores() -> int:
    """The cores that this process may use; a process bound to one core has neighbours on the others."""
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1:
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
