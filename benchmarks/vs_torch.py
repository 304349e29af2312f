"""tsp_ref against PyTorch on the same cores: one training step of the same model, timed by turns.

    python benchmarks/vs_torch.py                      one core, and two; about two minutes
    python benchmarks/vs_torch.py --preset small --repeats 20
    python benchmarks/vs_torch.py --set seq_len=4096 tiles=32 --json vs_torch.json

PyTorch is eager, on 1 thread against the single process, and on 2 threads against TSP on 2 ranks of mpiexec. Both train
the same model from the same weights on the same tokens, with the same AdamW and clipping, in float32. That it is the
same computation is checked: all losses and gradient norms, step by step, must agree to --tolerance, and those of
tsp_ref to the last bit; else the exit code is 1.

All four live in processes that are started once. In each round each takes one step while the others sleep, which is
checked too: how much of the processor they used meanwhile is told. So whatever else the machine does falls on all
alike. Reported are medians and quartiles, and for each pair the median ratio of the times of the same round: 1.00 is as
fast as PyTorch, less is faster. `processor` is what all threads and ranks together used of it in a step, waiting for
each other included: on a machine that others use too, it says more than the time that passed.

PyTorch is needed only here: pip install -e ".[bench]"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import (
    Benchmark,
    Spread,
    Steps,
    UserError,
    agreed_losses,
    by_turns,
    installed,
    json,
    rank_command,
    run,
    table_with,
    workers,
)

TORCH = str(Path(__file__).with_name("torch_llama.py"))


def main(benchmark: Benchmark) -> int:
    """Time both pairs."""
    if not installed("torch"):
        raise UserError("PyTorch is not installed: pip install -e '.[bench]', or pip install torch")
    config, ranks = benchmark.config, benchmark.options.ranks
    commands: dict[str, Any] = {}
    for n in ranks:
        schedule = "single" if n == 1 else "tsp"
        commands[ours(n)] = (rank_command(config, schedule), n, 1)
        commands[theirs(n)] = ([TORCH, json.dumps(vars(config)), str(n), "cpu"], 1, n)
    with workers(commands) as started:
        steps = {name: Steps(worker) for name, worker in started.items()}
        spreads = by_turns(benchmark, steps)
        idle = max(worker.idle_seconds for worker in started.values())
    rows = report(benchmark, steps, spreads)
    benchmark.say(f"while others were timed, none used the processor for more than {1e3 * idle:.1f} ms a step")
    own, gap = {ours(n): steps[ours(n)] for n in ranks}, largest_gap(steps, ranks)
    first, *_, last = own[ours(ranks[0])].losses
    benchmark.say(f"losses {first:.6f} -> {last:.6f}; largest relative difference from PyTorch, in losses and gradient "
                  f"norms, {gap:.1e}")
    alike, close = agreed_losses(benchmark, own), gap <= benchmark.options.tolerance
    if not close:
        benchmark.say(f"[red]NOT THE SAME COMPUTATION[/]: losses or gradient norms differ by more than "
                      f"{benchmark.options.tolerance:g}")
    benchmark.finish("vs_torch", {"rows": rows, "largest_relative_gap": gap, "largest_idle_seconds": idle})
    return int(not (alike and close))


def report(benchmark: Benchmark, steps: dict[str, Steps], spreads: dict[str, Spread]) -> dict[str, Any]:
    """Print the table; its rows for `--json`."""
    tokens = benchmark.config.batch_size * benchmark.config.seq_len
    table = table_with("", "ms a step", "quartiles", "tokens/s", "over PyTorch", "quartiles", "processor, ms",
                       "over PyTorch")
    rows = {}
    for n in benchmark.options.ranks:
        ratio = spreads[ours(n)].over(spreads[theirs(n)])
        processor = steps[ours(n)].processor.over(steps[theirs(n)].processor)
        for name in (ours(n), theirs(n)):
            mine = name == ours(n)
            table.add_row(
                name, *spreads[name].cells(), f"{tokens / spreads[name].median:,.0f}",
                f"{ratio.median:.3f}" * mine, "{:.3f}-{:.3f}".format(*ratio.quartiles) * mine,
                f"{1e3 * steps[name].processor.median:,.1f}", f"{processor.median:.3f}" * mine)
            rows[name] = spreads[name].record() | {
                "losses": steps[name].losses, "norms": steps[name].norms,
                "processor_seconds": steps[name].processor.times}
        rows[ours(n)] |= {"over_torch": ratio.median, "over_torch_quartiles": list(ratio.quartiles),
                          "processor_over_torch": processor.median}
    benchmark.say(table)
    return rows


def ours(n: int) -> str:
    """The name of a run of tsp_ref."""
    return "tsp_ref, 1 process" if n == 1 else f"tsp_ref, TSP on {n} ranks"


def theirs(n: int) -> str:
    """The name of a run of PyTorch."""
    return f"PyTorch, {n} thread{'s' * (n > 1)}"


def largest_gap(steps: dict[str, Steps], ranks: list[int]) -> float:
    """The largest relative difference of tsp_ref's loss, or gradient norm, from PyTorch's of the same step."""
    pairs = [(steps[ours(n)], steps[theirs(n)]) for n in ranks]
    return max(abs(a / b - 1) for mine, other in pairs
               for a, b in zip(mine.losses + mine.norms, other.losses + other.norms))


def own_options(parser: argparse.ArgumentParser) -> None:
    """What only this benchmark asks."""
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N",
                        help="cores of each comparison: threads of PyTorch, ranks of tsp_ref (1 2)")
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X",
                        help="largest relative difference of losses and gradient norms (1e-4)")


if __name__ == "__main__":
    run(__doc__, main, repeats=9, more=own_options)
