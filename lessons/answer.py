"""A reader's own functions in the place of a lesson's: loaded, called, and blamed by file and line if they go wrong."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, NoReturn

from tsp_ref.comm import mpi
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.launcher import launcher_rank
from tsp_ref.comm.virtual import Cancelled
from tsp_ref.errors import UserError

PATIENCE = 120.0  # seconds, if the reader does not say otherwise
GRACE = 5.0  # seconds, by which a rank that only waits for another lets that one speak first


class AnswerError(UserError):
    """What a reader's file did wrong, by file and line."""

    code = 1


class Answer:
    """A reader's file.

    limit  seconds without a word of the lesson's, and without a call or return of a function of the file, after which
           the job is ended
    """

    def __init__(self, path: str, limit: float = PATIENCE) -> None:
        self.path = path
        self.limit = limit
        self.comm: Communicator | None = None  # once there is one
        self._sign_of_life = time.monotonic()
        self._returned = ""
        self._over = threading.Event()
        self._terminal = sys.stdin

    def __enter__(self) -> Answer:
        # Nobody is there to be asked: on most ranks there is no terminal, and the others would wait.
        sys.stdin = open(os.devnull)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        sys.stdin.close()
        sys.stdin = self._terminal

    def fill(self, holes: Sequence[FunctionType]) -> None:
        """Put the functions of the file in the place of the lesson's of the same names.

        The file is run with all that the lesson has imported and defined: it needs no import to use that. A `UserError`
        if it cannot be read, or has none of the functions; an `AnswerError` if it cannot be run.
        """
        lesson = holes[0].__globals__
        names_of_holes = [hole.__name__ for hole in holes]
        written = {name: value for name, value in lesson.items() if name not in names_of_holes}
        try:
            code = compile(Path(self.path).read_text(encoding="utf-8"), self.path, "exec", dont_inherit=True)
        except OSError as error:
            raise UserError(f"--answer {self.path} cannot be read: {error.strerror}") from None
        except (SyntaxError, ValueError) as error:
            raise UserError(f"--answer {self.path} cannot be run: {_in_a_line(error)}") from None
        try:
            exec(code, written)
        except BaseException as error:
            self.blame(error)
        found = [name for name in names_of_holes if callable(written.get(name))]
        if not found:
            raise UserError(f"--answer {self.path} has no function {' or '.join(names_of_holes)}: write one there")
        lesson |= {name: self._judged(name, written[name]) for name in found}

    def blame(self, error: BaseException) -> NoReturn:
        """Raise what went wrong as the answer's fault, if it is: it was raised there, or by the lesson after it had
        been given something by the answer."""
        if isinstance(error, KeyboardInterrupt | Cancelled | AnswerError):
            raise error
        lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.path]
        if lines:
            where = "" if lines[-1].name == "<module>" else f", in {lines[-1].name}"
            raise AnswerError(f"--answer {self.path}, line {lines[-1].lineno}{where}: {_in_a_line(error)}") from error
        if self._returned and not isinstance(error, UserError):
            raise AnswerError(f"--answer {self.path}, {self._returned}: after it the lesson cannot go on: "
                              f"{_in_a_line(error)}") from error
        raise error

    def is_alive(self) -> None:
        """Something happens: the lesson speaks, or a function of the answer begins or ends."""
        self._sign_of_life = time.monotonic()

    def _judged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        code = getattr(function, "__code__", None)
        line = f"line {code.co_firstlineno}, " if code is not None else ""

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            self.is_alive()
            result = function(*arguments, **named)
            self._returned = f"{line}{name}, which returned {_described(result)}"
            self.is_alive()
            return result

        return call

    def _watch(self) -> None:
        while time.monotonic() - self._sign_of_life < self.limit:
            if self._over.wait(min(0.2, self.limit / 10)):
                return
        where = self._in_the_answer()
        if where is None and self._over.wait(min(self.limit, GRACE)):
            return
        error = AnswerError(f"--answer {self.path}{where or self._in_the_lesson()} (--limit sets how many seconds are "
                            "waited)")
        if isinstance(self.comm, mpi.MPICommunicator):
            mpi.fail(self.comm, error)
        if launcher_rank() == 0:
            sys.stdout.flush()
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # a launcher ends all as soon as one has ended: rank 0 speaks
        os._exit(error.code)

    def _in_the_answer(self) -> str | None:
        """Where the answer is, and what it waits for; None if it is not running."""
        for stack in _stacks():
            for frame in stack:
                if frame.f_code.co_filename == self.path:
                    where = "" if frame.f_code.co_name == "<module>" else f", in {frame.f_code.co_name}"
                    return f", line {frame.f_lineno}{where}: no end after {self.limit:g} s{_waits_for(stack)}"
        return None

    def _in_the_lesson(self) -> str:
        """What the lesson waits for after it."""
        waits = next((text for stack in _stacks() if (text := _waits_for(stack))), "")
        after = f", {self._returned}" if self._returned else ""
        return f"{after}: after it nothing has come for {self.limit:g} s{waits}"


def _stacks() -> list[list[FrameType]]:
    """What every other thread is in, from the innermost call outwards. Of virtual ranks one has its turn, and those
    that only wait for theirs come last."""
    stacks = [list(_outwards(frame)) for thread, frame in sys._current_frames().items()
              if thread != threading.get_ident()]
    return sorted(stacks, key=lambda stack: any(frame.f_code.co_name == "yield_turn" for frame in stack))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _waits_for(stack: list[FrameType]) -> str:
    """The messages that a stack of calls waits for, if it does."""
    for frame in stack:
        if frame.f_code.co_name == "Waitany":
            waiting = [str(request) for request in frame.f_locals.get("requests", []) if not request.done]
            return f"; it waits for {'; '.join(waiting)}" if waiting else ""
    return ""


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")


def _described(result: Any) -> str:
    """What a function has returned, in a few words."""
    if result is None:
        return "nothing"
    size = f" and length {len(result)}" if hasattr(result, "__len__") and getattr(result, "shape", None) != () else ""
    return f"a value of type {type(result).__name__}{size}"
