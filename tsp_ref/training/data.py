"""Text as bytes: found, read, split and cut into batches, the same on every rank.

A single file is mapped, not read: ranks of one machine share its pages, and only what batches touch need be in memory.
(So it must stay as it is until the run has ended.) Several files are read, and are in memory as one.
"""

from __future__ import annotations

import hashlib
import mmap
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..arrays import Array
from ..comm.communicator import Communicator
from ..comm.control import gather_texts
from ..errors import AgreedError, UserError
from ..model.config import Config
from ..model.model import Model

TRAINING, VALIDATION = 0, 1
NOT_SOURCE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """A text in two parts. A token is a byte; both parts are uint8.

    Every rank holds the whole text, of which each batch is a sample; what it cuts out are its own tokens.
    """

    training: Array
    validation: Array
    source: str

    @property
    def fingerprint(self) -> str:
        """The same on two ranks only if they have read the same text."""
        lengths = f"{len(self.training)} {len(self.validation)} "
        whole = hashlib.sha256(lengths.encode())
        for part in (self.training, self.validation):
            whole.update(part.data)  # one after the other, as they lie in memory: joined, they would be copied
        return whole.hexdigest()


def load_text(paths: list[str] | None, config: Config) -> Text:
    """The text of files and of all files in folders, or of Python's standard library; a twentieth is held out."""
    if config.vocab_size < 256:
        raise UserError(f"vocab_size={config.vocab_size} is too small to train on bytes: use 256 or more")
    if paths:
        text, source = _bytes_of([file for path in paths for file in _files(path)]), ", ".join(paths)
    else:
        text, source = _standard_library(), "the source of Python's standard library"
    needed = config.seq_len + 1
    held_out = max(len(text) // 20, needed)
    if len(text) < 2 * needed:
        raise UserError(f"--text {source} holds {len(text)} bytes: a sequence of seq_len={config.seq_len} needs at "
                        f"least {2 * needed}, half of them held out; give more text or lower seq_len")
    return Text(text[:-held_out], text[-held_out:], source)


def _files(name: str) -> list[Path]:
    if not name:
        raise UserError("--text '' names no file: an empty path is not the current folder, which is --text .")
    path = Path(name)
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
            return sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    except OSError as error:
        raise UserError(f"--text {path} cannot be looked up: {error.strerror}") from None
    raise UserError(f"--text {path} is neither a file nor a folder: give paths that exist, or leave --text out")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@lru_cache(maxsize=1)  # read once for all virtual ranks of a process
def _standard_library() -> Array:
    root = Path(sysconfig.get_path("stdlib"))
    return _joined(
        sorted(file for file in root.rglob("*.py") if not NOT_SOURCE.intersection(file.relative_to(root).parts)))


def _bytes_of(files: list[Path]) -> Array:
    """All files' bytes, one after the other, read-only uint8."""
    mapped = _mapped(files[0]) if len(files) == 1 else None
    return _joined(files) if mapped is None else mapped


def _mapped(path: Path) -> Array | None:
    """A file's bytes where they are; None for what cannot be mapped, as what is empty or made while it is read."""
    try:
        with path.open("rb") as file:
            # Unmapped when the last array over it is gone.
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    except (OSError, ValueError):
        return None


def _joined(files: Iterable[Path]) -> Array:
    content = bytearray()  # which grows, so no second copy of everything is made to join the parts
    for file in files:
        try:
            content += file.read_bytes()
        except OSError as error:
            raise UserError(f"--text {file} cannot be read: {error.strerror}") from None
    return np.frombuffer(memoryview(content).toreadonly(), dtype=np.uint8)


def require_same_text(comm: Communicator, text: Text) -> None:
    """An `AgreedError` unless every rank has read the same text."""
    prints = gather_texts(comm, text.fingerprint)
    for rank, fingerprint in enumerate(prints):
        if fingerprint != prints[0]:
            raise AgreedError(f"rank {rank} read another text than rank 0 from {text.source}: give all machines the "
                              "same files with --text")


def batch(model: Model, text: Text, part: int, number: int) -> tuple[Array, Array]:
    """This rank's tokens and targets of batch `number` of a part of the text: [p, B, s] each.

    Where the sequences begin is drawn from (seed, part, number), alike on every rank; each cuts out only its own slots.
    """
    config, grid = model.config, model.grid
    source = text.training if part == TRAINING else text.validation
    generator = np.random.default_rng([config.seed, part, number])
    starts = generator.integers(0, len(source) - config.seq_len, size=config.batch_size)

    def cut(shift: int) -> Array:
        spans = [grid.tokens(slot) for slot in grid.slots]
        rows = [[source[start + span.start + shift : start + span.stop + shift] for start in starts] for span in spans]
        return model.backend.from_host(np.array(rows, dtype=np.int64))

    # The target of a token is the token after it.
    return cut(0), cut(1)
