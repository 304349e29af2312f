"""Where output goes: rank 0 speaks, and knows a terminal even behind mpirun, which gives every rank a pipe."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from ..comm.launcher import launched

WIDTH = 120  # where no terminal says another

LAUNCHERS = ("mpiexec", "mpirun", "prterun", "orterun", "hydra")


class SteadyConsole(Console):
    """A console that leaves the cursor alone: hidden for a live display, it would stay so where a rank is killed."""

    def show_cursor(self, show: bool = True) -> bool:
        """Say that nothing was done."""
        return False


def console_for(rank: int) -> Console:
    """A console that prints on rank 0 and is silent elsewhere."""
    if rank != 0:
        return Console(quiet=True)
    terminal = _launcher_terminal()
    if terminal is not None:
        return SteadyConsole(force_terminal=True, width=_width(terminal))
    # Behind a launcher that writes to no terminal, a rank may still see one: Open MPI gives each a terminal of its own.
    console = SteadyConsole(force_terminal=False if launched() else None)
    # Without a terminal there is no width to respect, and 80 columns would break the tables.
    return console if console.is_terminal else Console(force_terminal=False, width=WIDTH)


def _launcher_terminal() -> str | None:
    """The terminal that mpirun writes to, if it started this process and writes to one (Linux only)."""
    try:
        pid = os.getppid()
        while pid > 1:
            name, parent = _name_and_parent(pid)
            target = os.readlink(f"/proc/{pid}/fd/1")
            if name.startswith(LAUNCHERS) and target.startswith(("/dev/pts/", "/dev/tty")):
                return target
            pid = parent
    except (OSError, ValueError):
        pass
    return None


def _name_and_parent(pid: int) -> tuple[str, int]:
    name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    return name, int(rest.split()[1])


def _width(terminal: str) -> int:
    descriptor = os.open(terminal, os.O_RDONLY | os.O_NOCTTY)
    try:
        return os.get_terminal_size(descriptor).columns or WIDTH
    finally:
        os.close(descriptor)
