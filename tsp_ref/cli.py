"""The command line: `tsp-ref`, or `python -m tsp_ref`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .backends.gpu import BACKENDS, Backend, open_backend
from .comm.communicator import PROGRESS, Communicator
from .comm.control import agreed
from .comm.launcher import launched, launcher_rank
from .comm.link import parse_link
from .commands.compare import compare
from .commands.messages import DIRECTIONS, HELP, PARTS, Choice, MessagesOptions, messages, small_grid
from .commands.overlap import MODEL, RATIO, REPEATS, ROUNDS, OverlapOptions, overlap
from .commands.timeline import PictureOptions
from .commands.train import TrainOptions, train
from .commands.verify import verify
from .errors import UserError
from .grid.grid import LAYOUTS
from .model.config import PLANNING_ONLY, PRESETS, Config, make_config
from .model.model import RECOMPUTE
from .process.launch import refuse, start
from .process.output import careful_output
from .process.version import version
from .training.strategy import SCHEDULES, Plan

DESCRIPTION = """\
A transformer trained under TSP: every rank holds 1/N of the weights and 1/N of the tokens, and computes bit for bit
what a single process computes.

  mpirun -n 4 python -m tsp_ref train             train on 4 ranks
  python -m tsp_ref train --ranks 4               the same, as 4 virtual ranks of one process: no MPI needed
  mpirun -n 4 python -m tsp_ref verify            4 ranks against one process, a verdict for each tensor
  mpirun -n 8 python -m tsp_ref compare           TP, SP, TP+SP on every mesh and TSP, side by side
  python -m tsp_ref messages --rank 1 --part mlp  what a rank posts, computes and waits for, in order
  python -m tsp_ref train --digest --schedule single --preset tiny
"""


FEW_STEPS = ["steps=2"]
"""What is set over a preset where every step is compared, or measured."""

OVERLAP = """\
How much of the messages' time is hidden under the computation, in two ways.

  mpirun -n 2 python -m tsp_ref overlap                      a core for each
  mpirun -n 2 python -m tsp_ref overlap --progress wait      no progress
                                          between waits: less is hidden
  mpirun -n 2 python -m tsp_ref overlap --link 88MB/s,50us   on this link, as a
                                          run before has chosen it
  mpirun -n 2 python -m tsp_ref overlap --link none          on the machine's
                                          own: memory, or a network

By turns it times a step's messages alone, its computation alone, and both:

  hidden, by the three times
      = (messages + computation - both) / min(messages, computation)

100 % if the shorter of the two costs no time at all, 0 % if one comes after
the other. And during both it records how long ranks wait, the exposed time:

  hidden, by the waits
      = (messages - exposed) / min(messages, computation)

If the first is less, the difference is what messages cost the processor:
posting, copying, testing them. If it is more, the computation was slowed
down when it was timed alone, or ranks wait for one that has more to do. Where
rounds contradict each other, because other programs use the cores, this is said
instead of a figure; so it is where messages are too short to be worth hiding.

Between two processes of one machine a message is a copy in memory, over almost
at once and made by the core that should compute. So messages are slowed down,
by default to half of the computation's time; the option that does so again is
printed. Ranks that share a core, or one process (--ranks), cannot show overlap.
"""


class Parser(argparse.ArgumentParser):
    """On N ranks only one may print: errors are raised, and only rank 0 prints the help."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise UserError(f"{message}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        """Print on rank 0 only."""
        if launcher_rank() == 0:
            super().print_help(file)
            sys.stdout.flush()  # here, where it can be said that it cannot be


class Once(argparse.Action):
    """An option that may not be given twice."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Keep the first value, and refuse another."""
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "it is given twice: give one file")
        setattr(namespace, self.dest, values)


class Version(argparse.Action):
    """Print all versions, on rank 0 only, and leave."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Every rank loads MPI, so that it ends on every rank."""
        text = version()
        if launcher_rank() == 0:
            print(text, flush=True)
        parser.exit()


@careful_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser().parse_args(arguments)
        return int(options.run(options))
    except UserError as error:
        return refuse(error, debug)


def _parser() -> Parser:
    parser = Parser(
        prog="tsp-ref", description=DESCRIPTION, **_form(make_config()))
    parser.add_argument("--version", action=Version, help="the versions of this program, NumPy, its BLAS, and MPI")
    parser.set_defaults(run=lambda options: _help(parser))  # where no command is given
    commands = parser.add_subparsers(dest="command", metavar="train | verify | compare | overlap | messages")

    training = commands.add_parser(
        "train", help="train a byte-level language model", **_form(make_config()),
        description="Train a byte-level language model on text, and show at the end what each rank held and sent.")
    training.add_argument("--digest", action="store_true",
                          help="end with a SHA-256 over the bits of losses, gradients, weights and optimizer state: "
                               "the same for any number of ranks, schedule, mesh, layout and recomputation")
    _file_option(training, "--log", "FILE.jsonl", "append a JSON line for each step, after one for the request")
    _picture_options(training, "the last step")
    _plan_options(training)
    _common(training, preset="small", steps="the preset's")
    training.set_defaults(run=_train)

    verifying = commands.add_parser(
        "verify", help="compare N ranks with the single process, bit by bit", **_form(make_config("tiny", FEW_STEPS)),
        description="Train on N ranks and in a single process in the same job, and compare every activation, gradient, "
                    "weight and moment. Exit code 0 only if every bit agrees. Both sides share their maths, so an "
                    "error in that agrees too: that gradients are right is what pytest tests/test_gradients.py "
                    "tests/test_naive_and_single.py checks, against differences and a textbook model.")
    _plan_options(verifying)
    _common(verifying, preset="tiny", steps="2")
    verifying.set_defaults(run=_verify)

    comparing = commands.add_parser(
        "compare", help="all schedules at this N, measured side by side", **_form(make_config("tiny", FEW_STEPS)),
        description="Train a few steps under TP, SP, TP+SP on every mesh of N, and TSP, and in a single process, and "
                    "show what each rank holds at most, sends and computes, the time of a step, and TSP against each. "
                    "Exit code 0 only if all agree in every bit.")
    _layout_options(comparing)
    _file_option(comparing, "--json", "FILE",
                 "write a list of objects, one for each schedule: schedule, mesh, digest, model_state_bytes, "
                 "activation_bytes, peak_bytes, forward_bytes_sent, backward_bytes_sent, messages, balance, "
                 "step_seconds; the largest over the ranks")
    _common(comparing, preset="tiny", steps="2")
    comparing.set_defaults(run=_compare)

    _overlap_parser(commands.add_parser(
        "overlap", help="how much of the messages' time is hidden under the computation", description=OVERLAP,
        **_form(make_config(*MODEL))))
    _messages_parser(commands)
    return parser


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0


def _overlap_parser(parser: argparse.ArgumentParser) -> None:
    _plan_options(parser)
    parser.add_argument("--ratio", type=float, metavar="R",
                        help=f"choose a link on which messages alone take R of the computation's time ({RATIO:g})")
    _file_option(parser, "--json", "FILE",
                 "write a list of objects, for the forward and for forward and backward: schedule, part, rounds, link, "
                 "link_shared; medians comm_seconds, compute_seconds, both_seconds, exposed_seconds; hidden_fraction "
                 "and hidden_by_waits, null where verdict and verdict_by_waits say why; quartiles, [lower, upper] of "
                 "each")
    parser.add_argument("--repeats", type=int, default=REPEATS, metavar="K",
                        help=f"rounds at most ({REPEATS}): {ROUNDS}, and more where they contradict each other")
    _picture_options(parser, "a forward and backward")
    _common(parser, preset=f"{MODEL[0]} --set {' '.join(MODEL[1])}", steps=None,
            link="the machine's own link as it is: none; by default one is chosen, see above")
    parser.set_defaults(run=_overlap, preset=None)


def _messages_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "messages", help="what one rank posts, computes and waits for in a step, in order", description=HELP,
        **_form(make_config("tiny", small_grid(1))))
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="whose step is printed (0)")
    parser.add_argument("--part", metavar="|".join(PARTS), help="only this sub-layer (all)")
    parser.add_argument("--direction", metavar="|".join(DIRECTIONS), help="only the forward, or only the backward")
    parser.add_argument("--layer", type=int, metavar="I", help="only this layer's attention and MLP, from 0 on")
    _plan_options(parser)
    _common(parser, preset="tiny, in 4 blocks and 8 tiles on up to 4 ranks", steps=None)
    parser.set_defaults(run=_messages, preset=None)


def _picture_options(parser: argparse.ArgumentParser, step: str) -> None:
    parser.add_argument("--timeline", action="store_true",
                        help=f"draw {step}: when each rank computed, waited, and had messages in flight")
    _file_option(parser, "--trace", "FILE.json",
                 f"write {step} as a trace for https://ui.perfetto.dev: every tile, wait and message")
    _file_option(parser, "--svg", "FILE.svg", "write the timeline as a picture")


def _file_option(parser: argparse.ArgumentParser, option: str, metavar: str, meaning: str) -> None:
    """A file that is written: of two only the last would be."""
    parser.add_argument(option, type=_path, action=Once, metavar=metavar, help=meaning)


def _path(text: str) -> str:
    """A path as it was given; empty, as of a shell's variable that is not set, it would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path names no file: give one, or leave the option out")
    return text


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--schedule", default="tsp", metavar="|".join(SCHEDULES),
                        help="single: the reference, one process; tp: tensor parallelism, weights dealt out; sp: "
                             "sequence parallelism, tokens dealt out; tp+sp: both, on a mesh; tsp: both, folded on the "
                             "same ranks, block by block (default); fsdp+sp: the same, a sub-layer's weights at once")
    parser.add_argument("--mesh", metavar="TxS",
                        help="for tp+sp: T ranks for weights by S ranks for tokens, as 2x4 (as square as N allows)")
    _layout_options(parser)


def _layout_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layout", default="zigzag", metavar="|".join(LAYOUTS),
                        help="zigzag: a rank's tiles are from both ends of the text, equal work (default); "
                             "contiguous: from one place, unequal work, the same bits")
    parser.add_argument("--recompute", default="none", metavar="|".join(RECOMPUTE),
                        help="what the backward recomputes instead of finding it kept: nothing (default), the "
                             "attention sub-layers, everything but the layers' inputs; the same bits")
    parser.add_argument("--stack", type=int, metavar="K",
                        help="tiles that go through an operation at a time (chosen by their size): fewer take less "
                             "memory and let messages progress more often, more take less Python; the same bits")


def _backend_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="numpy", metavar="|".join(BACKENDS),
                        help="the library that computes: numpy, on the CPU (default); cupy, on a GPU of NVIDIA's or "
                             "AMD's for each rank, or shared where there are fewer; bits are equal on the same device")
    parser.add_argument("--gpu-aware", action="store_true",
                        help="with --backend cupy: hand MPI the GPU's memory, instead of copies in the host's; for an "
                             "MPI that is built for it")


def _travel_options(parser: argparse.ArgumentParser, link: str) -> None:
    parser.add_argument("--progress", default="poll", metavar="|".join(PROGRESS),
                        help="who progresses messages while NumPy computes: nobody until a wait; this rank, between "
                             "stacks of tiles (default); a second thread")
    parser.add_argument("--link", metavar="BANDWIDTH,LATENCY",
                        help=f"a slower link than there is, as 200MB/s,50us: the same bits, later; {link}")
    parser.add_argument("--link-shared", action="store_true", help="one link for all of a rank's peers, not one each")


def _start(options: argparse.Namespace, main: Callable[[Communicator, Backend], int]) -> int:
    """Start on all ranks, with the arrays that are asked for, and messages that travel as asked."""

    def travel(comm: Communicator) -> int:
        def prepare() -> bool:
            own = options.link in (None, "none")
            comm.travel_by(options.progress, None if own else parse_link(options.link, options.link_shared))
            return True

        agreed(comm, prepare)
        return main(comm, open_backend(options.backend, comm, options.gpu_aware))

    return start(travel, options.ranks, options.shuffle, options.debug)


def _pictures(options: argparse.Namespace) -> PictureOptions:
    return PictureOptions(options.timeline, options.trace, options.svg)


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(options.schedule, options.mesh, options.layout, options.recompute, stack=options.stack)


def _common(
    parser: argparse.ArgumentParser, preset: str, steps: str | None, link: str = "none: as it is (default)"
) -> None:
    """steps: the default's description; None for a command that takes none, and says so."""
    parser.add_argument("--preset", default=preset, metavar="|".join(PRESETS), help=f"sizes to begin with ({preset})")
    parser.add_argument("--steps", type=int, metavar="K",
                        help=f"optimizer steps ({steps})" if steps else argparse.SUPPRESS)
    parser.add_argument("--text", nargs="+", action="extend", type=_path, metavar="PATH",
                        help="files or folders to learn from (the source of Python's standard library)")
    parser.add_argument("--dtype", metavar="float32|float64", help="of every floating array (float32)")
    parser.add_argument("--seed", type=int, metavar="I", help="of initial weights and batches (0)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", dest="settings",
                        help="override any field of the configuration, listed below")
    parser.add_argument("--ranks", type=int, metavar="N",
                        help="N virtual ranks in this process instead of mpirun: repeatable, and easy to debug")
    parser.add_argument("--shuffle", type=int, metavar="SEED",
                        help="with --ranks: a random order of turns and messages; changes no bit of the result")
    _backend_options(parser)
    _travel_options(parser, link)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors in the request, too")


def _config(options: argparse.Namespace) -> Config:
    if options.preset in PLANNING_ONLY:
        raise UserError(f"preset={options.preset} is only for planning, it is too large to run here: use one of "
                        f"{', '.join(name for name in PRESETS if name not in PLANNING_ONLY)}")
    names = ("steps", "dtype", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return make_config(options.preset, options.settings, **given)


def _train(options: argparse.Namespace) -> int:
    request = TrainOptions(_config(options), _plan(options), options.text, options.digest, options.log,
                           _pictures(options))
    return _start(options, lambda comm, backend: train(comm, request, backend))


def _verify(options: argparse.Namespace) -> int:
    options.settings = [*FEW_STEPS, *options.settings]
    config, plan = _config(options), _plan(options)
    return _start(options, lambda comm, backend: verify(comm, config, plan, options.text, backend))


def _compare(options: argparse.Namespace) -> int:
    options.settings = [*FEW_STEPS, *options.settings]
    config, plan = _config(options), Plan(layout=options.layout, recompute=options.recompute, stack=options.stack)
    return _start(options, lambda comm, backend: compare(comm, config, plan, options.text, options.json, backend))


def _overlap(options: argparse.Namespace) -> int:
    if options.steps is not None:
        raise UserError(f"--steps {options.steps} is not for overlap, which times one step in rounds: use --repeats")
    if options.preset is None:
        options.preset, options.settings = MODEL[0], [*MODEL[1], *options.settings]
    request = OverlapOptions(_config(options), _plan(options), options.text, options.json, options.repeats,
                             options.link, options.link_shared, options.ratio, _pictures(options))
    return _start(options, lambda comm, backend: overlap(comm, request, backend))


def _messages(options: argparse.Namespace) -> int:
    if options.steps is not None:
        raise UserError(f"--steps {options.steps} is not for messages, which prints one step: leave it out")
    if options.ranks is None and not launched():
        options.ranks = 4

    def config_for(ranks: int) -> Config:
        if options.preset is not None:
            return _config(options)
        settings = small_grid(ranks) + options.settings
        return _config(argparse.Namespace(**{**vars(options), "preset": "tiny", "settings": settings}))

    request = MessagesOptions(config_for, _plan(options), options.rank,
                              Choice(options.part, options.direction, options.layer), options.text)
    return _start(options, lambda comm, backend: messages(comm, request, backend))


def _form(config: Config) -> dict[str, Any]:
    """How --help is laid out: as it is written, and at its end every field of the configuration with its default."""
    lines = [f"  {item.name:<22}{getattr(config, item.name)!s:<10} {item.metadata['meaning']}"
             for item in dataclasses.fields(Config)]
    return {"formatter_class": argparse.RawDescriptionHelpFormatter,
            "epilog": "fields for --set, with what they are by default here:\n" + "\n".join(lines)}
