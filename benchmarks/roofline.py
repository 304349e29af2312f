"""How near one process comes to its matrix products: a step's time over the time of its products alone.

    python benchmarks/roofline.py                           preset bench; about two minutes
    python benchmarks/roofline.py --set tiles=8 blocks=4    a coarser grid
    python benchmarks/roofline.py --shapes                  every shape, its calls and its rate, too

First one step is watched, and every matrix product that it makes is noted: shapes, strides, dtype. Then, round after
round, by turns: a step is timed; the same step with a clock around each of its functions; and each product that was
noted, alone, on arrays that lie in memory in the same way. `roofline` is the time of all its products at these rates:
a step that did nothing else would take that long. Nothing is assumed about the machine.

The table has the time of each function, without that of the others in it; of that its products, at their rates; and
what is left, which is elementwise work, copies, memory that is touched for the first time, and Python. The products
noted are checked against the formulas: if their floating-point operations differ, the exit code is 1.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

from common import Benchmark, Spread, by_turns, np, random_text, run, table_with
from products import Clock, Journal, Product, Watcher, around, watching

from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.formulas.memory import alone
from tsp_ref.formulas.work import step_flops
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

TARGET = 1.33
LEAST = 3e-3  # seconds that a kind of product is timed for in each round


class Rates:
    """The kinds of products of a step, timed alone."""

    def __init__(self, journal: Journal, clock: Callable[[], float]) -> None:
        self.journal, self.clock = journal, clock
        self.kinds = sorted({product for _, product in journal}, key=lambda product: -product.flops)
        self.times: dict[Product, list[float]] = {product: [] for product in self.kinds}

    def measure(self) -> float:
        """Time each kind; the seconds of all products of a step at these rates."""
        generator = np.random.default_rng(0)
        for product in self.kinds:
            call = product.call(generator)
            call()
            self.times[product].append(self.seconds_of(call))
        latest = {product: times[-1] for product, times in self.times.items()}
        return sum(count * latest[product] for (_, product), count in self.journal.items())

    def seconds(self, product: Product) -> float:
        """The median of all rounds but the first, which is the warm-up's."""
        return median(self.times[product][1:])

    def seconds_of(self, call: Callable[[], None]) -> float:
        """The median time of a call, of at least three and of as many as fit into LEAST."""
        times: list[float] = []
        while len(times) < 3 or sum(times) < LEAST:
            begin = self.clock()
            call()
            times.append(self.clock() - begin)
        return median(times)


def main(benchmark: Benchmark) -> int:
    """Watch a step, time it and its products, and print what it is made of."""
    training = new_training(benchmark, np)
    rates = Rates(watch(benchmark), benchmark.clock)
    clocks: list[Clock] = []

    def clocked() -> float:
        clock = Clock(benchmark.clock)
        clocks.append(clock)
        with around(clock.run):
            return step_seconds(benchmark, training)

    spreads = by_turns(benchmark, {"step": lambda: step_seconds(benchmark, training), "products": rates.measure,
                                   "step with clocks": clocked})
    ratio = spreads["step"].over(spreads["products"])
    rows = breakdown(benchmark, spreads, rates, clocks[1:])
    if benchmark.options.shapes:
        show_shapes(benchmark, rates)
    same = check_flops(benchmark, rates.journal)
    flops = sum(count * product.flops for (_, product), count in rates.journal.items())
    roofline = spreads["products"].median
    benchmark.say(f"step {spreads['step'].median:.3f} s, its products at the roofline {roofline:.3f} s "
                  f"({flops / 1e9:.1f} GFLOP at {flops / roofline / 1e9:.0f} GFLOP/s)")
    benchmark.say(f"ratio {ratio.median:.3f}, quartiles " + "-".join(f"{each:.3f}" for each in ratio.quartiles)
                  + f"; the target is at most {TARGET}: " + ("reached" if ratio.median <= TARGET else "not reached"))
    benchmark.finish("roofline", {
        "step": spreads["step"].record(), "roofline": spreads["products"].record(), "flops": flops,
        "ratio": ratio.median, "ratio_quartiles": list(ratio.quartiles), "target": TARGET, "functions": rows,
        "products": shapes(rates)})
    return int(not same)


def new_training(benchmark: Benchmark, xp: Any) -> Training:
    """A training of the single process."""
    config = benchmark.config
    return Training(config, VirtualWorld(1).communicators[0], Plan("single"), random_text(config), xp)


def step_seconds(benchmark: Benchmark, training: Training) -> float:
    """The time of a step."""
    begin = benchmark.clock()
    training.step()
    return benchmark.clock() - begin


def watch(benchmark: Benchmark) -> Journal:
    """All products of a step."""
    benchmark.say("watching a step: which products does it make?")
    watcher = Watcher()
    with watching(watcher):
        new_training(benchmark, watcher).step()
    return watcher.journal


def check_flops(benchmark: Benchmark, journal: Journal) -> bool:
    """Whether the products noted are as much work as the formulas say that a step is."""
    found = sum(count * product.flops for (_, product), count in journal.items())
    wanted = sum(step_flops(benchmark.config, alone(benchmark.config)).values())
    if found != wanted:
        benchmark.say(f"[red]PRODUCTS ARE MISSING[/]: {found:,} floating-point operations noted, of {wanted:,}")
    return found == wanted


def breakdown(
    benchmark: Benchmark, spreads: dict[str, Spread], rates: Rates, clocks: list[Clock]
) -> list[dict[str, Any]]:
    """Print the functions of a step; the rows for `--json`."""
    whole = spreads["step with clocks"].median
    seconds = {name: median(clock.seconds[name] for clock in clocks) for name in clocks[0].seconds}
    seconds["all else"] = whole - sum(seconds.values())
    gemm: dict[str, float] = defaultdict(float)
    flops: dict[str, int] = defaultdict(int)
    for (name, product), count in rates.journal.items():
        gemm[name] += count * rates.seconds(product)
        flops[name] += count * product.flops
    table = table_with("function", "calls", "ms", "of the step", "products, ms", "GFLOP/s", "left, ms", "over products")
    rows = []
    for name, taken in sorted(seconds.items(), key=lambda item: -item[1]):
        calls, products = clocks[0].calls[name], gemm[name]
        if products:
            cells = (f"{1e3 * products:,.1f}", f"{flops[name] / products / 1e9:.0f}",
                     f"{1e3 * (taken - products):,.1f}", f"{taken / products:.2f}")
        else:
            cells = ("", "", f"{1e3 * taken:,.1f}", "")
        table.add_row(name, f"{calls:,}" if calls else "", f"{1e3 * taken:,.1f}", f"{taken / whole:.1%}", *cells)
        rows.append({"function": name, "calls": calls, "seconds": taken, "product_seconds": products,
                     "flops": flops[name]})
    table.add_section()
    total = sum(gemm.values())
    table.add_row("step, with clocks", "", f"{1e3 * whole:,.1f}", "100.0%", f"{1e3 * total:,.1f}",
                  f"{sum(flops.values()) / total / 1e9:.0f}", f"{1e3 * (whole - total):,.1f}", f"{whole / total:.2f}")
    benchmark.say(table)
    return rows


def shapes(rates: Rates) -> list[dict[str, Any]]:
    """Every kind of product in every function, for `--json`."""
    return [{"function": name, "form": product.form, "left": product.left.shape, "right": product.right.shape,
             "calls": count, "seconds_each": rates.seconds(product), "flops_each": product.flops}
            for (name, product), count in sorted(
                rates.journal.items(), key=lambda item: -item[1] * rates.seconds(item[0][1]))]


def show_shapes(benchmark: Benchmark, rates: Rates) -> None:
    """Print them."""
    table = table_with("function", "form", "left", "right", "calls", "us each", "ms", "GFLOP/s")
    for row in shapes(rates):
        each = row["seconds_each"]
        table.add_row(row["function"], row["form"], *("x".join(map(str, row[side])) for side in ("left", "right")),
                      str(row["calls"]), f"{1e6 * each:,.0f}", f"{1e3 * row['calls'] * each:,.1f}",
                      f"{row['flops_each'] / each / 1e9:.0f}")
    benchmark.say(table)


def own_options(parser: argparse.ArgumentParser) -> None:
    """What only this benchmark asks."""
    parser.add_argument("--shapes", action="store_true", help="list every kind of product")


if __name__ == "__main__":
    run(__doc__, main, repeats=5, more=own_options, one_process=True)
