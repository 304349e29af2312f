"""What a program prints reaches its reader, or ends the program with one line and no traceback.

Where the output's encoding has no such character, a plain one is written. Where it cannot be written, because a disk is
full, it is closed, or nobody reads it any more, that is a `UserError`; where errors cannot be, they are dropped.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from ..errors import UserError

PLAIN = {"Σ": "Sigma", "·": "*", "×": "x", "²": "^2", "³": "^3", "√": "sqrt", "ᵀ": "^T", "µ": "u", "…": "...",
         "─": "-", "━": "-", "╶": "-", "╴": "-", "╸": "-", "╺": "-", "│": "|", "’": "'", "–": "-", "—": "-"}
"""What is written for a character that an encoding does not have; for any other, its number."""


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    """A byte of a path that is not valid UTF-8, which Python knows as half of a surrogate pair, is shown as a byte."""
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return f"\\x{ord(character) - 0xDC00:02x}"
    return PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode()


codecs.register_error("tsp_ref.plainly", _plainly)


class Output:
    """A stream in another's place. What cannot be written to it is a `UserError`, once; then nothing more is tried.

    name  how an error calls it; None: it is where errors go, and nothing can be said
    """

    def __init__(self, stream: Any, name: str | None) -> None:
        self._stream = stream
        self._name = name
        self._broken = False

    def write(self, text: str) -> int:
        """Write a text, or refuse."""
        if not self._broken:
            try:
                self._stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Let it be seen, or refuse."""
        if not self._broken:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        self._broken = True
        # What is still in its buffer is tried again when Python ends, and must not fail again.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            _connect_to_nothing(self._stream.fileno())
        if self._name is not None:
            self._refuse(error)

    def _refuse(self, error: OSError) -> NoReturn:
        raise UserError(f"{self._name} cannot be written: {error.strerror}") from None


class Closed(io.TextIOBase):
    """In place of a stream that was closed before the program began."""

    def write(self, text: str) -> int:
        """It cannot be."""
        raise OSError(errno.EBADF, "it is closed")


@contextlib.contextmanager
def careful_output() -> Iterator[None]:
    """Within it, and within functions that it decorates, the program's output and errors are as this module says."""
    if isinstance(sys.stdout, Output):
        yield
        return
    before = sys.stdout, sys.stderr
    sys.stdout = _careful(sys.stdout, 1, "standard output")
    sys.stderr = _careful(sys.stderr, 2, None)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _careful(stream: Any, descriptor: int, name: str | None) -> Any:
    if stream is None:
        try:
            os.fstat(descriptor)
        except OSError:
            _connect_to_nothing(descriptor)  # or the next file that is opened would be in its place
        stream = Closed()
    elif hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="tsp_ref.plainly")
    return Output(stream, name)


def _connect_to_nothing(descriptor: int) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    if nothing != descriptor:
        os.dup2(nothing, descriptor)
        os.close(nothing)
