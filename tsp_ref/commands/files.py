"""Files that commands write: whole or not at all, or a line at a time; and what lies at a path already is respected.

A link goes on pointing, and its target gets the new content; a file keeps its mode; a device, a pipe or a terminal is
written to as it is.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import IO

from ..comm.communicator import Communicator
from ..comm.control import agreed
from ..errors import UserError

SPOKEN = (1, 2)  # the descriptors that the program's own words go to


class WholeFile:
    """A file that is written whole, or not at all: what was there before is lost only to a full result.

    Made, it has tried whether it can be written; not whether it can be replaced, which is refused at the end where the
    path is a mount point, or another user's in a folder like /tmp. Without a path nothing is ever written.
    """

    def __init__(self, option: str, path: str | None) -> None:
        self.option = option
        self.path = path
        self._stream: IO[bytes] | None = None
        if path is None:
            return
        with _refusing(option, path):
            found = _found(path)
            if found is not None and not stat.S_ISREG(found.st_mode):
                # Held until it is written: a pipe whose only writer leaves has ended for its reader.
                self._stream = os.fdopen(_open_to_write(path), "wb")
                return
            os.remove(self._part(b""))

    def write(self, text: str) -> None:
        """Write it, and put it in its place."""
        if self.path is None:
            return
        content = text.encode()
        with _refusing(self.option, self.path):
            if self._stream is not None:
                with self._stream as stream:
                    stream.write(content)
            else:
                part = self._part(content)
                try:
                    os.replace(part, os.path.realpath(self.path))
                except BaseException:
                    os.remove(part)
                    raise

    def _part(self, content: bytes) -> str:
        """A file with this content that can take the place of what the path leads to: beside it, of its mode, and under
        a name that nobody has. An `OSError` leaves nothing behind."""
        target = os.path.realpath(str(self.path))
        found = _found(target)
        if found is not None and not os.access(target, os.W_OK):
            raise PermissionError(0, os.strerror(errno.EACCES))  # renaming would not ask
        part = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.part")
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            try:
                file.write(content)
                file.flush()
                if found is not None:
                    _own_as(file.fileno(), found)
                os.fsync(file.fileno())  # some systems say only now that the disk is full
            except BaseException:
                os.remove(part)
                raise
        return part


class LineFile:
    """A file that is appended to, a JSON object a line. What is in it already is never lost, and a line that cannot be
    written whole is not there at all. Without a path nothing is ever written."""

    def __init__(self, option: str, path: str | None) -> None:
        """Open it, which makes it where there is none; a `UserError` if it cannot be written."""
        self.option = option
        self.path = path
        self._file: IO[bytes] | None = None
        if path is not None:
            with _refusing(option, path):
                _found(path)
                self._file = os.fdopen(_open_to_write(path, os.O_APPEND | os.O_CREAT), "ab", buffering=0)

    def write(self, record: Mapping[str, object]) -> None:
        """One more line. A number that JSON does not have is a bug of the caller's."""
        if self._file is None:
            return
        line = f"{json.dumps(record, allow_nan=False)}\n".encode()
        with _refusing(self.option, str(self.path)):
            self._write_whole(self._file, line)

    def close(self) -> None:
        """Close it."""
        if self._file is not None:
            self._file.close()

    @staticmethod
    def _write_whole(file: IO[bytes], line: bytes) -> None:
        found = os.fstat(file.fileno())
        written = 0
        try:
            while written < len(line):
                written += file.write(line[written:])
        except OSError:
            if written and stat.S_ISREG(found.st_mode):
                os.ftruncate(file.fileno(), found.st_size)
            raise


def write_all(comm: Communicator, texts: Mapping[WholeFile, str]) -> None:
    """Write some files, most of which have a path on rank 0 only. Every rank must call it: where one cannot be written
    all stop with the same `AgreedError`, after those before it were."""

    def write() -> bool:
        for file, text in texts.items():
            file.write(text)
        return True

    agreed(comm, write)


def require_different(written: Mapping[str, str | None], read: Iterable[str]) -> None:
    """A `UserError` if two of the files that are written, by their options, are one by whatever way, or one of them is
    a text that is read; a device may be named twice."""
    named = [(option, path) for option, path in written.items() if path is not None]
    texts = [("--text", path) for path in read]
    for (option, path), (other, another) in itertools.combinations([*named, *texts], 2):
        if other != option and _same_file(path, another):
            raise UserError(f"{option} {path} and {other} {another} are one file: name two")


def _same_file(path: str, other: str) -> bool:
    try:
        found, another = os.stat(path), os.stat(other)
    except OSError:  # one is not there yet, or cannot be looked up, which is refused where it is to be written
        return os.path.realpath(path) == os.path.realpath(other)
    return os.path.samestat(found, another) and not stat.S_ISCHR(found.st_mode)


def _found(path: str) -> os.stat_result | None:
    """What a path leads to, by way of links; None if nothing is there yet. An `OSError` for what cannot be a file that
    is written: a folder, and the file that the program's own output goes to, which the two would spoil together."""
    if not path:
        raise FileNotFoundError(0, "an empty path names no file")
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(0, "it is a folder")
    if stat.S_ISREG(found.st_mode) and any(os.path.samestat(found, each) for each in _outputs()):
        raise OSError(0, "it is the file that the program's output goes to")
    return found


def _outputs() -> Iterator[os.stat_result]:
    for descriptor in SPOKEN:
        with contextlib.suppress(OSError):
            yield os.fstat(descriptor)


def _open_to_write(path: str, flags: int = 0) -> int:
    """A descriptor to write to what is there as it is. Opening waits for nobody: a pipe that nobody reads is an
    `OSError`; writing waits, for a reader that is slow."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | flags, 0o666)
    except OSError as error:
        pipe = os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode)
        raise (OSError(error.errno, "nobody reads this pipe") if pipe else error) from None
    os.set_blocking(descriptor, True)
    return descriptor


def _own_as(descriptor: int, found: os.stat_result) -> None:
    """Give a file the owner, where that is allowed, and the mode of another."""
    with contextlib.suppress(PermissionError):
        os.fchown(descriptor, found.st_uid, found.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(found.st_mode))


@contextlib.contextmanager
def _refusing(option: str, path: str) -> Iterator[None]:
    """An `OSError` within it is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {path or repr(path)} cannot be written: {error.strerror}") from None
