"""How a program starts on N ranks, and how it ends: once, at once, with one message and one exit code.

`start(main)` calls main(communicator) on every rank: of `mpirun`, of `--ranks N` virtual ranks, or of one process.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from ..comm import launcher, mpi
from ..comm.communicator import Communicator
from ..comm.virtual import VirtualWorld
from ..errors import AgreedError, UserError
from .output import careful_output

ONE_LINE = {number: ascii(chr(number))[1:-1] for number in (*range(32), 127)}
"""For a text that may hold anything, as a path may: what would break its line, or speak to the terminal, is spelled."""

MOST_VIRTUAL = 64
"""Virtual ranks at most: they take turns in one process, so a step takes longer the more they are."""


@careful_output()
def start(
    main: Callable[[Communicator], int], ranks: int | None = None, shuffle: int | None = None, debug: bool = False
) -> int:
    """Run main on all ranks and return the exit code: main's own, 2 for a `UserError`, 130 for Ctrl-C, 1 for a bug.

    ranks    virtual ranks in this process; None: the ranks of mpirun, or one
    shuffle  seed for a random order of turns and deliveries between virtual ranks
    debug    show the traceback of a `UserError` too
    """
    try:
        if shuffle is not None and shuffle < 0:
            raise UserError(f"--shuffle {shuffle} is not valid: use 0 or more")
        # A launcher of one process leaves that process free to have virtual ranks.
        if launcher.launched() and not (ranks is not None and launcher.launcher_size() == 1):
            if ranks is not None:
                raise UserError(f"--ranks {ranks} asks for virtual ranks inside one process, and a launcher "
                                "has started this one: use one or the other")
            if shuffle is not None:
                raise UserError(f"--shuffle {shuffle} orders the messages of virtual ranks: use it with --ranks N, "
                                "not under mpirun")
            return _run_real(main)
        if ranks is not None and not 1 <= ranks <= MOST_VIRTUAL:
            raise UserError(f"--ranks {ranks} is not valid: use 1 to {MOST_VIRTUAL} virtual ranks; more are for "
                                "mpirun")
        world = VirtualWorld(ranks or 1, shuffle)
        return max(world.run(lambda comm: _finished(comm, main(comm))))
    except UserError as error:
        return refuse(error, debug)
    except MemoryError as error:
        return refuse(_too_large(error), debug)
    except KeyboardInterrupt:
        if launcher.launched():
            mpi.leave_interrupted()
        print("interrupted", file=sys.stderr)
        return 130


def refuse(error: UserError, debug: bool = False) -> int:
    """Print a user's error, which every rank has met, once, on rank 0, and return its exit code."""
    if launcher.launcher_rank() == 0:
        if debug:
            traceback.print_exception(error)
        print(f"error: {str(error).translate(ONE_LINE)}", file=sys.stderr, flush=True)
    if launcher.launched():
        mpi.leave_together()
    return error.code


def _run_real(main: Callable[[Communicator], int]) -> int:
    world = mpi.open_world()
    try:
        return _finished(world, main(world))
    except AgreedError:
        raise
    except MemoryError as error:
        mpi.fail(world, _too_large(error))
        raise
    except BaseException as error:
        # One rank alone must not return: the others would wait for its messages for ever.
        mpi.fail(world, error)
        raise


def _too_large(error: MemoryError) -> UserError:
    """Beyond what was counted before (`room.py`), which is a lower bound."""
    return UserError(f"memory does not suffice ({error or 'no more could be had'}): use smaller sizes, or more ranks")


def _finished(comm: Communicator, code: int) -> int:
    # Now, because a launcher may end the others as soon as one rank has left with a code that is not 0.
    sys.stdout.flush()
    comm.finish()
    return code
