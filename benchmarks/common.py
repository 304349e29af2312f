"""What the benchmarks share: options, the machine in words, statistics, and child processes that are asked by turns.

A benchmark compares times that were taken in turns, round after round, so that a disturbance of the machine falls on
all alike. What needs a process of its own lives in a child (`Worker`) that is started once and sleeps in a read while
others are timed; each answer says how much of the processor the child used since its last one, as a proof of that.
A child ends when its parent is gone, however that ended, because then the read finds the end of the stream.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project that this file belongs to, installed or not
import numpy as np  # noqa: E402
from rich.box import SIMPLE_HEAD  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from tsp_ref.commands.files import WholeFile  # noqa: E402
from tsp_ref.commands.holdings import short  # noqa: E402
from tsp_ref.errors import UserError  # noqa: E402
from tsp_ref.model.config import PLANNING_ONLY, PRESETS, Config, make_config  # noqa: E402
from tsp_ref.process import jobs  # noqa: E402  (of this environment's MPI)
from tsp_ref.process.terminal import console_for  # noqa: E402
from tsp_ref.process.threads import READ_BY  # noqa: E402
from tsp_ref.training.data import Text  # noqa: E402

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
CALM = 0.02  # seconds before each turn: threads of OpenMP go on looking for work for some milliseconds after the last
PATIENCE, HASTE = 30.0, 5.0  # seconds for children to end by themselves, after the last question and after Ctrl-C

# What a benchmark needs, from one place.
__all__ = [
    "Benchmark",
    "Spread",
    "Steps",
    "UserError",
    "Worker",
    "agreed_losses",
    "by_turns",
    "installed",
    "jobs",
    "json",
    "np",
    "random_text",
    "rank_command",
    "run",
    "serve",
    "short",
    "table_with",
    "workers",
]


@dataclass
class Benchmark:
    """One run of a benchmark: what was asked, where to print, what the machine is.

    config   the model
    options  the command line
    """

    config: Config
    options: argparse.Namespace
    console: Console
    machine: dict[str, Any]
    file: WholeFile

    def say(self, text: Any = "") -> None:
        """Print it; a line of text as one line."""
        self.console.print(text, highlight=False, soft_wrap=isinstance(text, str))

    def clock(self) -> float:
        """Seconds, by the clock that was asked for."""
        return CLOCKS[self.options.clock]()

    def finish(self, name: str, results: Mapping[str, Any]) -> None:
        """Print the load, and write everything to `--json`, if that was asked for."""
        self.machine["load_at_end"] = os.getloadavg()[0]
        self.say(f"load of the machine: {self.machine['load_at_start']:.2f} at the start, "
                 f"{self.machine['load_at_end']:.2f} at the end, on {self.machine['cores']} cores")
        self.file.write(json.dumps({"benchmark": name, "options": vars(self.options), "machine": self.machine,
                                    "config": vars(self.config), **results}, indent=1))


def run(
    description: str, main: Callable[[Benchmark], int], repeats: int,
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None, one_process: bool = False,
    own_sizes: Mapping[str, list[str]] | None = None,
    refused: Callable[[argparse.Namespace], int] = lambda options: 0,
) -> None:
    """Run a benchmark and exit: with main's code, 2 and one line for what cannot be done, 130 after Ctrl-C.

    repeats      rounds, if the command line does not say
    more         adds the benchmark's own options
    one_process  everything happens in this process, so that it can be timed by the processor's clock, too
    own_sizes    presets of the benchmark's own, each a list of FIELD=VALUE over `bench`; the first is the default
    refused      before anything is printed or written: a code to exit with, for which it has printed the reason; or 0
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    own_sizes = own_sizes or {}
    sizes = [*own_sizes, *(name for name in PRESETS if name not in PLANNING_ONLY)]
    first = next(iter(own_sizes), "bench")
    parser.add_argument("--preset", default=first, choices=sizes, help=f"sizes to begin with ({first})")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", dest="settings",
                        help="override any field of the configuration; `tsp-ref train --help` lists them")
    parser.add_argument("--repeats", type=int, default=repeats, metavar="K",
                        help=f"rounds that are timed, after one that is not ({repeats})")
    parser.add_argument("--json", metavar="FILE", help="write the figures, the machine and the configuration")
    if one_process:
        parser.add_argument("--clock", default="wall", choices=sorted(CLOCKS),
                            help="wall: time that passes (default); processor: time that this process really ran, for "
                                 "a machine that others use too")
    more(parser)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended here, too
    try:
        if options.repeats < 1:
            raise UserError(f"--repeats {options.repeats} is not valid: use 1 or more")
        settings = [*own_sizes.get(options.preset, []), *options.settings]
        config = make_config("bench" if options.preset in own_sizes else options.preset, settings)
        code = refused(options)
        if code:
            sys.exit(code)
        benchmark = Benchmark(config, options, console_for(0), describe_machine(), WholeFile("--json", options.json))
        benchmark.say(description.strip().splitlines()[0])
        greet(benchmark)
        sys.exit(main(benchmark))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def greet(benchmark: Benchmark) -> None:
    """What is measured, and on what."""
    config, machine = benchmark.config, benchmark.machine
    benchmark.say(f"model: {config.num_parameters:,} parameters in {config.dtype}, h={config.hidden_size} "
                  f"L={config.num_layers} H={config.num_heads} K={config.num_kv_heads} f={config.ffn_size} "
                  f"S={config.seq_len} B={config.batch_size}, G={config.blocks} blocks, T={config.tiles} tiles")
    benchmark.say(f"machine: {machine['cpu']}, {machine['cores']} cores; {machine['blas']}; "
                  + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()))


def describe_machine() -> dict[str, Any]:
    """The machine and its software."""
    from threadpoolctl import threadpool_info

    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    blas = "; ".join(f"{pool['internal_api']} {pool['version']}, kernels for {pool.get('architecture', 'unknown')}, "
                     f"{pool['num_threads']} thread{'s' * (pool['num_threads'] != 1)}" for pool in pools)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for package in ("mpi4py", "mpich", "openmpi", "torch", "cupy-rocm-7-0", "cupy-cuda12x", "cupy-cuda13x"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": processor(), "cores": cores, "system": platform.platform(), "blas": blas or "no known BLAS",
            "versions": versions, "load_at_start": os.getloadavg()[0]}


def processor() -> str:
    """The model of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def random_text(config: Config) -> Text:
    """Random bytes to train on, the same everywhere: a step costs the same whatever it reads."""
    text = np.random.default_rng(17).integers(0, min(256, config.vocab_size), 64 * config.seq_len, dtype=np.uint8)
    return Text(text[: -2 * config.seq_len], text[-2 * config.seq_len :], "random bytes")


# Times.


@dataclass(frozen=True)
class Spread:
    """Some times of the same thing, in seconds."""

    times: list[float]

    @property
    def median(self) -> float:
        """What is reported."""
        return float(np.median(self.times))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Half of the times lie between these."""
        low, high = np.percentile(self.times, [25, 75])
        return float(low), float(high)

    def over(self, other: Spread) -> Spread:
        """The ratios of the times of the same round."""
        return Spread([mine / theirs for mine, theirs in zip(self.times, other.times)])

    def cells(self) -> tuple[str, str]:
        """Median and quartiles for a table, in milliseconds."""
        low, high = self.quartiles
        return f"{1e3 * self.median:,.1f}", f"{1e3 * low:,.1f}-{1e3 * high:,.1f}"

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        return {"median_seconds": self.median, "quartiles_seconds": list(self.quartiles), "seconds": self.times}


def by_turns(
    benchmark: Benchmark, runs: Mapping[str, Callable[[], float]], repeats: int | None = None
) -> dict[str, Spread]:
    """Call each of `runs`, which return seconds, once in every round: forwards and backwards by turns, so that none
    always follows the same other. The first round, in which memory is touched for the first time, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    repeats = benchmark.options.repeats if repeats is None else repeats
    for number in range(repeats + 1):
        names = list(runs) if number % 2 else list(reversed(runs))
        taken = {}
        for name in names:
            time.sleep(CALM)
            taken[name] = runs[name]()
        shown = "  ".join(f"{name} {1e3 * taken[name]:,.0f}" for name in runs)
        benchmark.say(f"{f'round {number}/{repeats}' if number else 'warm-up'}, ms:  {shown}")
        if number:
            for name, seconds in taken.items():
                times[name].append(seconds)
    return {name: Spread(seconds) for name, seconds in times.items()}


def table_with(*headings: str) -> Table:
    """An empty table: the first column to the left, numbers to the right."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


# Children.


class Worker:
    """A child, of one process or of the ranks of one mpiexec, that does what it is asked and then sleeps.

    idle_seconds  the most processor time that one of its processes used between an answer and the next question
    """

    def __init__(self, name: str, folder: str, number: int, command: Sequence[str], ranks: int, threads: int) -> None:
        """Start `command`, which is given the path of a socket as its last argument and calls `serve`."""
        self.name, self.ranks, self.idle_seconds = name, ranks, 0.0
        path = os.path.join(folder, str(number))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(ranks)
        self.listener.settimeout(0.1)
        self.streams: list[Any] = [None] * ranks
        start = [jobs.mpiexec(), "-n", str(ranks)] if ranks > 1 else []
        self.process = subprocess.Popen(
            [*start, sys.executable, *command, path], stdin=subprocess.DEVNULL, stdout=sys.stderr,
            env=jobs.environment(**{names[0]: str(threads) for names in READ_BY.values()}), start_new_session=True)

    def meet(self) -> None:
        """Wait until all of its processes are ready."""
        while None in self.streams:
            try:
                connection, _ = self.listener.accept()
            except TimeoutError:
                self.require_alive()
                continue
            connection.settimeout(None)
            stream = connection.makefile("rw", encoding="utf-8")
            self.streams[json.loads(stream.readline())["rank"]] = stream

    def require_alive(self) -> None:
        """Leave with its exit code if it has ended: it has said why."""
        code = self.process.poll()
        if code is not None:
            print(f"{self.name} has ended", file=sys.stderr)
            sys.exit(code or 1)

    def ask(self, question: str) -> dict[str, Any]:
        """Its answer; of several ranks, rank 0's, with the processor time of all together."""
        for stream in self.streams:
            stream.write(json.dumps(question) + "\n")
            stream.flush()
        answers = []
        for stream in self.streams:
            line = stream.readline()
            if not line:
                self.process.wait()
                self.require_alive()
            answers.append(json.loads(line))
        self.idle_seconds = max(self.idle_seconds, *(answer["idle_seconds"] for answer in answers))
        return answers[0] | {"processor_seconds": sum(answer["processor_seconds"] for answer in answers)}

    def hang_up(self) -> None:
        """Ask no more: it ends when it notices, after the step that it is at."""
        for stream in (*self.streams, self.listener):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def end(self, seconds: float) -> None:
        """End it, if it has not ended by itself within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, seconds))
        if self.process.poll() is None:
            jobs.end(self.process)


@contextlib.contextmanager
def workers(commands: Mapping[str, tuple[Sequence[str], int, int]]) -> Iterator[dict[str, Worker]]:
    """name -> (command, ranks, threads of each) becomes name -> `Worker`, ready; none is left behind."""
    started: dict[str, Worker] = {}
    done = False
    with tempfile.TemporaryDirectory(prefix="tsp_ref") as folder:
        try:
            for number, (name, (command, ranks, threads)) in enumerate(commands.items()):
                started[name] = Worker(name, folder, number, command, ranks, threads)
            for worker in started.values():
                worker.meet()
            yield started
            done = True
        finally:
            until = time.monotonic() + (PATIENCE if done else HASTE)
            for worker in started.values():
                worker.hang_up()
            for worker in started.values():
                worker.end(until - time.monotonic())


class Steps:
    """The training steps of a worker, of which each call asks one more; returns its seconds."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.losses: list[float] = []
        self.norms: list[float] = []  # of the gradients, before clipping
        self.processor_times: list[float] = []  # of all its processes and threads together

    def __call__(self) -> float:
        """Ask for a step."""
        answer = self.worker.ask("step")
        self.losses.append(answer["loss"])
        self.norms.append(answer["norm"])
        self.processor_times.append(answer["processor_seconds"])
        return float(answer["seconds"])

    @property
    def processor(self) -> Spread:
        """Processor time, without the warm-up's."""
        return Spread(self.processor_times[1:])


def agreed_losses(benchmark: Benchmark, runs: Mapping[str, Steps]) -> bool:
    """Whether all these runs of tsp_ref had the same losses and norms, as they owe to the last bit; says if not."""
    alike = len({(*steps.losses, *steps.norms) for steps in runs.values()}) == 1
    if not alike:
        benchmark.say("[red]THE LOSSES DIFFER[/] between runs of tsp_ref, which must agree in every bit: "
                      + "; ".join(f"{name} {steps.losses[-1]!r}" for name, steps in runs.items()))
    return alike


def rank_command(config: Config, schedule: str, backend: str = "numpy") -> list[str]:
    """The command of a `Worker` that trains under a schedule."""
    return [str(ROOT / "benchmarks" / "rank.py"), json.dumps(vars(config)), schedule, backend]


def serve(path: str, rank: int, actions: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """In the child: say that this rank is ready, and answer one question after another until there are no more."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        stream = connection.makefile("rw", encoding="utf-8")
        answer: dict[str, Any] = {"rank": rank}
        with contextlib.suppress(BrokenPipeError):  # the parent is gone
            while True:
                stream.write(json.dumps(answer) + "\n")
                stream.flush()
                before = time.process_time()
                line = stream.readline()
                if not line:
                    return
                begin = time.process_time()
                answer = actions[json.loads(line)]()
                answer |= {"idle_seconds": begin - before, "processor_seconds": time.process_time() - begin}


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return util.find_spec(package) is not None
