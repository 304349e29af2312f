"""What every lesson stands on: its options, its voice on rank 0, its checks, which all ranks must pass, and its holes,
which a reader's own functions can fill.

Below them are the few functions that several lessons need.
"""

from __future__ import annotations

import tsp_ref  # noqa: F401  (first: what it sets counts while all else is loaded)

# isort: split
import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
from answer import PATIENCE, Answer
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table

from tsp_ref.accounting.phase import OUTSIDE
from tsp_ref.arrays import Array
from tsp_ref.cli import Parser
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather, from_root, gather_texts
from tsp_ref.comm.link import Link
from tsp_ref.errors import AgreedError, UserError
from tsp_ref.grid.grid import Grid, share
from tsp_ref.grid.tree import Node, Partial, Tree, add
from tsp_ref.model.activations import AttentionSaved, MlpSaved
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import Parameters, zero_parameters
from tsp_ref.process import arithmetic, threads
from tsp_ref.process.launch import refuse, start
from tsp_ref.process.output import careful_output
from tsp_ref.process.terminal import console_for
from tsp_ref.training.data import Text

Sent: TypeAlias = dict[tuple[str, str, str], tuple[int, int]]
"""(sub-layer, direction, purpose) -> messages and bytes."""


@dataclass
class Lesson:
    """A lesson on one rank.

    comm     the communicator, of `mpirun -n N` or of `--ranks N`
    console  prints on rank 0, silent elsewhere
    options  what the command line asks for
    """

    comm: Communicator
    console: Console
    options: argparse.Namespace = field(default_factory=argparse.Namespace)
    failures: list[str] = field(default_factory=list)
    spoken: Callable[[], None] = lambda: None  # called whenever the lesson says something

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

    def require_comparable_bits(self) -> None:
        """Refuse ranks that would compute other bits of the same thing. Every rank must call it."""
        threads.require_one("this lesson")
        arithmetic.require_alike(self.comm, "this lesson")

    def part(self, title: str) -> None:
        """Begin a part."""
        self.console.print(Rule(title, align="left", style="cyan"))

    def say(self, text: RenderableType = "") -> None:
        """Tell the reader something, once."""
        self.spoken()
        self.console.print(text, highlight=False)

    def say_from_all(self, text: str) -> None:
        """One line from each rank, in the order of ranks, printed by rank 0. Every rank must call it."""
        for rank, line in enumerate(gather_texts(self.comm, text)):
            self.say(escape(f"  rank {rank}: {line}"))

    def check(self, statement: str, holds: bool) -> None:
        """A statement that must hold on every rank. Every rank must call it; a failure makes the lesson exit with 1."""
        self.spoken()
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


@careful_output()
def run(
    description: str, main: Callable[[Lesson], None], holes: Sequence[FunctionType] = (),
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> None:
    """Run a lesson on the ranks of mpirun, or on `--ranks N` virtual ranks, and exit with its verdict.

    description  the lesson's docstring: its first line is the title, all of it is shown by --help
    holes        functions of the lesson in whose place `--answer FILE` puts a reader's own
    more         adds the lesson's own options, which it finds in `lesson.options`
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, metavar="N", help="N virtual ranks in this process instead of mpirun")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="with --ranks: a random order of messages")
    parser.set_defaults(answer=None, limit=PATIENCE)
    if holes:
        parser.add_argument("--answer", metavar="FILE", help="a file with your own " + " or ".join(
            hole.__name__ for hole in holes) + ", which takes the place of the lesson's")
        parser.add_argument("--limit", type=float, metavar="SECONDS",
                            help=f"how long to wait for an answer that does not end ({PATIENCE:g})")
    more(parser)
    try:
        options = parser.parse_args()
        if not 0 < options.limit < math.inf:
            raise UserError(f"--limit {options.limit:g} is not valid: use a number of seconds above 0")
        with nullcontext() if options.answer is None else Answer(options.answer, options.limit) as answer:
            if answer is not None:
                answer.fill(holes)
            sys.exit(start(lambda comm: teach(description, main, options, answer, comm), options.ranks,
                           options.shuffle))
    except UserError as error:
        sys.exit(refuse(error))


def teach(
    description: str, main: Callable[[Lesson], None], options: argparse.Namespace, answer: Answer | None,
    comm: Communicator
) -> int:
    """Give a lesson on one rank; the exit code. What goes wrong by an answer's fault is an `AnswerError`."""
    lesson = Lesson(comm, console_for(comm.rank), options)
    if answer is not None:
        answer.comm, lesson.spoken = comm, answer.is_alive
    ranks = f"{comm.size} rank{'s' * (comm.size > 1)}"
    lesson.say(f"[bold]{description.strip().splitlines()[0]}[/]  ({ranks})")
    try:
        main(lesson)
        code = lesson.end()
        if answer is not None:
            comm.finish()  # here, where it is known whose message is left
    except BaseException as error:
        if answer is None:
            raise
        answer.blame(error)
    return code


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


def dealt(model: Model, whole: Parameters) -> Parameters:
    """What a rank holds of weights that were drawn whole: a copy of its own blocks, and of the gains."""
    weights, blocks = zero_parameters(model, "weights"), model.grid.blocks
    for (_, own), (_, tensor) in zip(weights.tensors(), whole.tensors()):
        own[...] = tensor[blocks.start : blocks.stop]
    weights.gains[...] = whole.gains
    return weights


def random_tiles(model: Model, purpose: int) -> Array:
    """Random tiles [p, B, s, h], drawn by slot, so that all ranks agree and none draws a tile that it does not hold."""
    config = model.config
    shape = (config.batch_size, config.tile_len, config.hidden_size)
    dtype = np.dtype(config.dtype).type
    return np.stack(
        [np.random.default_rng([purpose, slot]).standard_normal(shape, dtype) for slot in model.grid.slots])


def in_order_of_text(grid: Grid, tiles: Array) -> Array:
    """A rank's tiles [p, B, s, h] as one array in the order of the text [B, S, h], in float64; zeros elsewhere."""
    _, batch, length, hidden = tiles.shape
    whole = np.zeros((batch, grid.num_tiles * length, hidden), dtype=np.float64)
    for slot, tile in zip(grid.slots, tiles):
        whole[:, grid.tokens(slot)] = tile
    return whole


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays have the same bits, however they lie in memory."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def drawn_text() -> Text:
    """Words drawn at random, and sentences drawn from them: something to learn, the same on every rank."""
    generator = np.random.default_rng(7)
    letters = np.frombuffer(b"etaoinshrdlu", dtype=np.uint8)
    words = [generator.choice(letters, size=size).tobytes() for size in generator.integers(2, 7, size=24)]
    text = np.frombuffer(b" ".join(words[number] for number in generator.integers(0, 24, size=1000)), dtype=np.uint8)
    return Text(text[:-500], text[-500:], "drawn words")


def subtrees(leaves: Iterable[int]) -> int:
    """How many whole subtrees some leaves fill, in a tree over a power of two of leaves: their pieces in a sum."""
    count, nodes = 0, set(leaves)
    while nodes:
        parents = {node // 2 for node in nodes if node ^ 1 in nodes}
        count += len(nodes) - 2 * len(parents)
        nodes = parents
    return count


def all_reduce_sends(count: int, pieces: int, rank: int, size: int, in_turns: bool = False) -> int:
    """How many arrays a rank sends in an all-reduce of `count` sums, which are dealt to the ranks to be made: of those
    that others make its pieces, of those that it makes the totals, to all others.

    in_turns  whether sum number i is dealt to rank i modulo N; if not, each rank makes consecutive ones
    """
    own = len(range(rank, count, size) if in_turns else share(count, rank, size))
    return (count - own) * pieces + own * (size - 1)


def kept_bytes(attention: AttentionSaved, mlp: MlpSaved) -> tuple[int, int]:
    """What a layer's forward keeps: the inputs of its two sub-layers, and what is computed by blocks of weights."""
    by_blocks = [array for kept in (attention.q, attention.keys_values, attention.heads, attention.logsumexp,
                                    mlp.projected) for array in kept.values()]
    return attention.x.nbytes + mlp.x.nbytes, sum(array.nbytes for array in by_blocks)


def table_with(*headings: str) -> Table:
    """An empty table: numbers to the right, the first column to the left."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def until_all_are_through(comm: Communicator, work: Callable[[], object]) -> float:
    """Seconds from when all ranks begin to when the last is through, by rank 0's clock. Every rank must call it.

    Virtual ranks compute, and sleep for a link, one after the other, and this has the time of all of them.
    """
    from_root(comm, 0)
    begin = time.perf_counter()
    work()
    from_root(comm, 0)
    return from_root(comm, int(1e9 * (time.perf_counter() - begin))) / 1e9


def link_that_takes(seconds: float, size: int) -> Link:
    """A link on which a message of so many bytes takes so many seconds."""
    return Link(size / seconds)


def sent_since(comm: Communicator, before: Sent) -> Sent:
    """What this rank has sent within steps beyond `before`, which is an earlier answer, or empty; zeros left out."""
    now: Sent = {}
    for entry, (messages, size) in comm.ledger.entries.items():
        if entry.verb == "send" and entry.phase != OUTSIDE:
            known = now.get((*entry.phase, entry.tag), (0, 0))
            now[*entry.phase, entry.tag] = known[0] + messages, known[1] + size
    earlier = {key: before.get(key, (0, 0)) for key in now}
    return {key: (messages - earlier[key][0], size - earlier[key][1])
            for key, (messages, size) in now.items() if messages > earlier[key][0]}


def _nothing(left: Any, right: Any) -> Any:
    """A merge that keeps no partial: the tree below is left with only its nodes."""


class InOrderOfArrival(Tree[Partial]):
    """What takes the tree's place: one running sum, to which each partial is added when it comes.

    What has come, what is still missing and what is sent to whom stay the tree's; only the order of additions is free.
    """

    def __init__(self, leaves: Iterable[int], merge: Callable[[Any, Any], Any] = add, of: int = 0) -> None:
        super().__init__(leaves, _nothing, of)
        self.sum_of = merge
        self.running: Any = None

    def add(self, index: int, partial: Any, level: int = 0) -> None:
        """Note that a node has come, and add its partial to the sum at once."""
        super().add(index, None, level)  # type: ignore[arg-type]
        self.running = partial if self.running is None else self.sum_of(self.running, partial)

    def add_stack(self, leaves: Sequence[int], stack: Any) -> None:
        """Add several leaves, one by one from left to right."""
        for leaf, partial in zip(leaves, stack):
            self.add(leaf, partial)

    @property
    def total(self) -> Any:
        """The sum, when nothing is missing."""
        assert super().total is None
        return self.running

    def pieces(self) -> list[tuple[Node, Any]]:
        """As many messages as the tree would send: the sum in the first, zeros in the others."""
        nodes = [node for node, _ in super().pieces()]
        return [(node, np.zeros_like(self.running) if number else self.running) for number, node in enumerate(nodes)]


@contextmanager
def sums_in_order_of_arrival(*modules: ModuleType) -> Iterator[None]:
    """Within it, these modules have no tree. For virtual ranks only: the ranks of this job go on with theirs."""
    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(mock.patch.object(module, "Tree", InOrderOfArrival))
        yield
