"""What is known of the launcher before MPI is loaded, and what Ctrl-C does until MPI is up. Loaded before NumPy."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK")
SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched() -> bool:
    """Whether an MPI launcher started this process."""
    return _first_number(RANK_VARIABLES) is not None


def launcher_rank() -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    return _first_number(RANK_VARIABLES) or 0


def launcher_size() -> int | None:
    """How many ranks the launcher started, if it says so."""
    return _first_number(SIZE_VARIABLES)


def _first_number(names: tuple[str, ...]) -> int | None:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), None)


def leave_at_ctrl_c() -> None:
    """While modules load, Ctrl-C ends a process that a launcher started with code 130, and no traceback of an import
    from each."""
    if launched():
        _replace(signal.SIGINT, _leave, signal.default_int_handler)


def end_at_ctrl_c() -> None:
    """From here until `hear_ctrl_c`, Ctrl-C ends the process wherever it is.

    A handler of Python's only notes the signal, and acts on it when the next line runs. While MPI starts no line runs,
    and that may take for ever if another rank, which was still importing, has ended: the job would hang.
    """
    _replace(signal.SIGINT, signal.SIG_DFL, _leave, signal.default_int_handler)


def hear_ctrl_c() -> None:
    """MPI is up: Ctrl-C is `KeyboardInterrupt` again, unless the program has chosen otherwise."""
    _replace(signal.SIGINT, signal.default_int_handler, _leave, signal.SIG_DFL)


def hear_termination(end_job: Callable[[], None]) -> None:
    """From here on SIGTERM ends the job, unless the program has chosen otherwise."""
    _replace(signal.SIGTERM, lambda number, frame: end_job(), signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(130)


def _replace(number: signal.Signals, new: Any, *known: Any) -> None:
    """Put a handler in the place of one of these; one that the program has chosen stays."""
    # Only the main thread may: a program that starts MPI in another keeps what it has.
    with suppress(ValueError):
        if signal.getsignal(number) in known:
            signal.signal(number, new)
