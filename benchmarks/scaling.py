"""Strong scaling: the same model on more ranks, under every schedule, timed by turns.

    python benchmarks/scaling.py                                    1 and 2 ranks, every schedule; some minutes
    python benchmarks/scaling.py --ranks 1 2 4 --schedules tsp tp   on a machine with four cores
    python benchmarks/scaling.py --preset small --repeats 20 --json scaling.json

Each schedule at each number of ranks is a run of its own, started once with this environment's mpiexec. In each round
every run takes one step, while the others sleep. A step's time is that of its slowest rank. `speedup` is the median
over the rounds of the time on the fewest ranks of the same schedule over that on N; `over single` the same against the
single process, which has no schedule at all. `held` is the most that a rank holds at a time, by the accounting of a
step in which every array is counted, and `part` that of what the single process holds.

All runs compute the same bits; that their losses agree is checked, and if not, the exit code is 1.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from common import (
    Benchmark,
    Spread,
    Steps,
    UserError,
    Worker,
    agreed_losses,
    by_turns,
    rank_command,
    run,
    short,
    table_with,
    workers,
)

from tsp_ref.training.strategy import SCHEDULES

SINGLE = ("single", 1)


@dataclass(frozen=True)
class Measured:
    """What a run took and held."""

    spread: Spread
    peak_bytes: int


def main(benchmark: Benchmark) -> int:
    """Time all runs, and print one table."""
    runs = wanted(benchmark)
    commands = {name_of(*each): (rank_command(benchmark.config, each[0]), each[1], 1) for each in runs}
    with workers(commands) as started:
        steps = {name: Steps(worker) for name, worker in started.items()}
        spreads = by_turns(benchmark, steps)
        idle = max(worker.idle_seconds for worker in started.values())
        peaks = {name: held(benchmark, worker) for name, worker in started.items()}
    measured = {each: Measured(spreads[name_of(*each)], peaks[name_of(*each)]) for each in runs}
    rows = report(benchmark, measured)
    benchmark.say(f"while others were timed, none used the processor for more than {1e3 * idle:.1f} ms a step")
    alike = agreed_losses(benchmark, steps)
    benchmark.finish("scaling", {"rows": rows, "largest_idle_seconds": idle})
    return int(not alike)


def wanted(benchmark: Benchmark) -> list[tuple[str, int]]:
    """(schedule, ranks) of every run: the single process, and each schedule at each N."""
    options, config = benchmark.options, benchmark.config
    for n in options.ranks:
        if not 1 <= n <= config.max_ranks:
            raise UserError(f"--ranks {n} is not possible: use 1 to {config.max_ranks}, or raise blocks and tiles with "
                            "--set")
    cores = benchmark.machine["cores"]
    if max(options.ranks) > cores:
        benchmark.say(f"[yellow]{max(options.ranks)} ranks on {cores} cores[/]: they share them, and cannot be faster")
    return [SINGLE, *((schedule, n) for schedule in options.schedules if schedule != "single"
                      for n in sorted(set(options.ranks)))]


def name_of(schedule: str, n: int) -> str:
    """For the lines of progress."""
    return f"{schedule}/{n}"


def held(benchmark: Benchmark, worker: Worker) -> int:
    """The most that a rank of a run holds at a time."""
    benchmark.say(f"counting what {worker.name} holds")
    return int(worker.ask("count")["peak_bytes"])


def report(benchmark: Benchmark, measured: dict[tuple[str, int], Measured]) -> list[dict[str, Any]]:
    """Print the table; its rows for `--json`."""
    table = table_with("schedule", "N", "ms a step", "quartiles", "tokens/s", "speedup", "over single", "held", "part")
    tokens = benchmark.config.batch_size * benchmark.config.seq_len
    fewest = {schedule: min(n for other, n in measured if other == schedule) for schedule, _ in measured}
    rows, alone = [], measured[SINGLE]
    for (schedule, n), mine in measured.items():
        speedup = measured[schedule, fewest[schedule]].spread.over(mine.spread).median
        over_single = alone.spread.over(mine.spread).median
        table.add_row(schedule, str(n), *mine.spread.cells(), f"{tokens / mine.spread.median:,.0f}", f"{speedup:.2f}",
                      f"{over_single:.2f}", short(mine.peak_bytes), f"{mine.peak_bytes / alone.peak_bytes:.2f}")
        rows.append({"schedule": schedule, "ranks": n, "tokens_per_second": tokens / mine.spread.median,
                     "speedup": speedup, "speedup_over_single": over_single, "peak_bytes": mine.peak_bytes,
                     **mine.spread.record()})
    benchmark.say(table)
    return rows


def own_options(parser: argparse.ArgumentParser) -> None:
    """What only this benchmark asks."""
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of ranks (1 2)")
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES, metavar="SCHEDULE",
                        help=f"of {', '.join(SCHEDULES)} (all); the single process is always among them")


if __name__ == "__main__":
    run(__doc__, main, repeats=7, more=own_options)
