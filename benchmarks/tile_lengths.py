"""Whether a tile's length matters: a forward and backward per token, at even lengths and at odd or uneven ones.

    python benchmarks/tile_lengths.py                          256, 257, 262 and 512, 509, 514 tokens; a minute or two
    python benchmarks/tile_lengths.py --lengths 128 131 --lengths 1024 1021 1026
    python benchmarks/tile_lengths.py --tiles 4 --repeats 20 --json tile_lengths.json

One process, `reference/single.py`, with the same weights at every length; a sequence has --tiles tiles. In each round
every length runs once, by turns. Reported are medians of the time per token, and the median ratio of that to the time
per token of the first length of the group in the same round, which is the even neighbour. The goal is at most 1.15:
lengths that do not fill a processor's vectors, or a strip of attention, should cost little. A longer sequence also has
more keys for each token to see, which is left in the ratio.

Times decide nothing; if a loss is not finite, the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from common import Benchmark, Spread, UserError, by_turns, np, random_text, run, table_with

from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.model.config import Config, make_config
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

GROUPS = [[256, 257, 262], [512, 509, 514]]
GOAL = 1.15


class Pass:
    """A forward and backward of the single process at one length of a tile."""

    def __init__(self, config: Config, clock: Callable[[], float]) -> None:
        self.training = Training(config, VirtualWorld(1).communicators[0], Plan("single"), random_text(config), np)
        self.tokens, self.clock, self.loss = config.batch_size * config.seq_len, clock, math.nan

    def __call__(self) -> float:
        """Its seconds."""
        begin = self.clock()
        self.loss, saved = self.training.forward()
        self.training.strategy.backward(saved, self.training.weights, self.training.gradients)
        return self.clock() - begin


def main(benchmark: Benchmark) -> int:
    """Time every length, and print one table."""
    groups = groups_asked(benchmark)
    runs = {length: Pass(config_of(benchmark, length), benchmark.clock) for group in groups for length in group}
    seconds = by_turns(benchmark, {str(length): each for length, each in runs.items()})
    per_token = {length: Spread([taken / runs[length].tokens for taken in seconds[str(length)].times])
                 for length in runs}
    rows = [row for group in groups for row in report(benchmark, group, per_token)]
    largest = max(row["over_first"] for row in rows)
    benchmark.say(f"largest median ratio {largest:.3f}; the goal is at most {GOAL}: "
                  + ("reached" if largest <= GOAL else "not reached"))
    broken = [length for length, each in runs.items() if not math.isfinite(each.loss)]
    if broken:
        benchmark.say(f"[red]NO LOSS[/]: it is not finite at {', '.join(map(str, broken))} tokens a tile")
    benchmark.finish("tile_lengths", {
        "rows": rows, "losses": {str(length): each.loss for length, each in runs.items()}, "goal": GOAL,
        "largest_ratio": largest})
    return int(bool(broken))


def groups_asked(benchmark: Benchmark) -> list[list[int]]:
    """The lengths, group by group."""
    options = benchmark.options
    if options.tiles < 1:
        raise UserError(f"--tiles {options.tiles} is not valid: use 1 or more")
    groups = [list(dict.fromkeys(group)) for group in options.lengths or GROUPS]
    for length in (length for group in groups for length in group):
        if length < 1:
            raise UserError(f"--lengths {length} is not valid: a tile has 1 token or more")
    return groups


def config_of(benchmark: Benchmark, length: int) -> Config:
    """The model with sequences of tiles of this length."""
    options = benchmark.options
    return make_config(options.preset, options.settings, tiles=options.tiles, seq_len=options.tiles * length)


def report(benchmark: Benchmark, group: list[int], per_token: dict[int, Spread]) -> list[dict[str, Any]]:
    """Print a group's table; its rows for `--json`."""
    first = group[0]
    table = table_with("tile's tokens", "us a token", "quartiles", f"over {first}", "quartiles")
    rows = []
    for length in group:
        mine, ratio = per_token[length], per_token[length].over(per_token[first])
        table.add_row(str(length), f"{1e6 * mine.median:,.1f}",
                      "-".join(f"{1e6 * each:,.1f}" for each in mine.quartiles), f"{ratio.median:.3f}",
                      "{:.3f}-{:.3f}".format(*ratio.quartiles))
        rows.append({"length": length, "first": first, "over_first": ratio.median,
                     "over_first_quartiles": list(ratio.quartiles), **mine.record()})
    benchmark.say(table)
    return rows


def own_options(parser: argparse.ArgumentParser) -> None:
    """What only this benchmark asks."""
    parser.add_argument("--lengths", type=int, nargs="+", action="append", metavar="s",
                        help="tokens of a tile, the first of which the others are compared with; may be given several "
                             f"times, once for each group ({'; '.join(' '.join(map(str, group)) for group in GROUPS)})")
    parser.add_argument("--tiles", type=int, default=2, metavar="T", help="tiles of a sequence (2)")


if __name__ == "__main__":
    run(__doc__, main, repeats=7, more=own_options, one_process=True)
