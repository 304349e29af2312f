"""What every lesson stands on: its options, its voice on rank 0, and its checks, which all ranks must pass.

Below them are the few functions that several lessons need.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.rule import Rule

from tsp_ref.arrays import Array
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather, gather_texts
from tsp_ref.comm.mpi import launcher_rank
from tsp_ref.errors import AgreedError
from tsp_ref.launch import start
from tsp_ref.model import Model
from tsp_ref.parameters import Parameters, zero_parameters
from tsp_ref.terminal import console_for


@dataclass
class Lesson:
    """A lesson on one rank.

    comm     the communicator, of `mpirun -n N` or of `--ranks N`
    console  prints on rank 0, silent elsewhere
    """

    comm: Communicator
    console: Console
    failures: list[str] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """N."""
        return self.comm.size

    def require_ranks(self, most: int) -> None:
        """Refuse more ranks than the lesson's model can be dealt to. Every rank must call it."""
        if self.size > most:
            raise AgreedError(f"ranks={self.size} is not possible: each rank needs a block and a tile of this lesson's "
                            f"model, so use 1 to {most} ranks")

    def part(self, title: str) -> None:
        """Begin a part."""
        self.console.print(Rule(title, align="left", style="cyan"))

    def say(self, text: RenderableType = "") -> None:
        """Tell the reader something, once."""
        self.console.print(text, highlight=False)

    def say_from_all(self, text: str) -> None:
        """One line from each rank, in the order of ranks, printed by rank 0. Every rank must call it."""
        for rank, line in enumerate(gather_texts(self.comm, text)):
            self.say(escape(f"  rank {rank}: {line}"))

    def check(self, statement: str, holds: bool) -> None:
        """A statement that must hold on every rank. Every rank must call it; a failure makes the lesson exit with 1."""
        verdicts = [bool(row[0]) for row in all_gather(self.comm, np.array([holds], dtype=np.int64))]
        if all(verdicts):
            self.say(f"  [green]holds[/]  {escape(statement)}")
            return
        wrong = ", ".join(str(rank) for rank, verdict in enumerate(verdicts) if not verdict)
        self.say(f"  [red]FAILS[/]  {escape(statement)} (on rank {wrong})")
        self.failures.append(statement)

    def end(self) -> int:
        """The last line, and the exit code."""
        if self.failures:
            self.say(f"[red]This lesson fails:[/] {len(self.failures)} of its checks do not hold.")
            return 1
        self.say("[green]This lesson's checks all hold.[/]")
        return 0


def run(description: str, main: Callable[[Lesson], None]) -> None:
    """Run a lesson on the ranks of mpirun, or on `--ranks N` virtual ranks, and exit with its verdict.

    description  the lesson's docstring: its first line is the title, all of it is shown by --help
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, metavar="N", help="N virtual ranks in this process instead of mpirun")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="with --ranks: a random order of messages")
    if launcher_rank() != 0 and {"-h", "--help"}.intersection(sys.argv):
        sys.exit(0)
    options = parser.parse_args()

    def teach(comm: Communicator) -> int:
        lesson = Lesson(comm, console_for(comm.rank))
        ranks = f"{comm.size} rank{'s' * (comm.size > 1)}"
        lesson.say(f"[bold]{description.strip().splitlines()[0]}[/]  ({ranks})")
        main(lesson)
        return lesson.end()

    sys.exit(start(teach, options.ranks, options.shuffle))


def relative_gap(found: Array, wanted: Array) -> float:
    """The largest difference, relative to the largest entry wanted."""
    return float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))


def patterns(arrays: Iterable[Array]) -> set[bytes]:
    """The different bit patterns among arrays."""
    return {array.tobytes() for array in arrays}


def one_by_one(parts: Sequence[Array] | Array, order: Array) -> Array:
    """The sum of some parts, added up in the order given."""
    total = np.zeros_like(parts[0])
    for index in order:
        total += parts[index]
    return total


def names(numbers: Iterable[int]) -> str:
    """Consecutive numbers as `2-4`, others one by one."""
    listed = list(numbers)
    if len(listed) > 1 and listed == list(range(listed[0], listed[-1] + 1)):
        return f"{listed[0]}-{listed[-1]}"
    return ",".join(map(str, listed))


def recognise(held: Array, blocks: Array) -> int:
    """Which of a layer's blocks these are, by their bytes: bit number b is set for block b, none for a stranger."""
    known = {block.tobytes(): number for number, block in enumerate(blocks)}
    return sum(1 << known[block.tobytes()] for block in held if block.tobytes() in known)


def members(mask: int) -> list[int]:
    """The numbers of the bits that are set."""
    return [number for number in range(mask.bit_length()) if mask >> number & 1]


def random_weights(model: Model, generator: np.random.Generator) -> Parameters:
    """Weights larger than a new model's, and gains other than one, so that every part has a say in the result."""
    weights = zero_parameters(model, "weights")
    for _, tensor in weights.tensors():
        tensor[...] = generator.standard_normal(tensor.shape, dtype=np.float64) * model.config.hidden_size**-0.5
    weights.gains[...] = generator.uniform(0.5, 1.5, weights.gains.shape)
    return weights
