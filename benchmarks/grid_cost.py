"""What the grid costs: the model cut in blocks and tiles against the textbook model on whole arrays, in one process.

    python benchmarks/grid_cost.py                            preset bench, several grids; some minutes
    python benchmarks/grid_cost.py --grids 8x16 8x32 4x8      G x T of your own
    python benchmarks/grid_cost.py --set seq_len=512 --repeats 10

Each grid is a run of `reference/single.py`, forward and backward, on the weights and the batch that are given to
`reference/naive.py` too. In each round every one of them runs once, by turns; reported are medians, and the median
ratio of the times of the same round: less than 1 is faster than whole arrays. The losses, and the gradients of the
embedding, which have come through all layers, must agree to --tolerance; else the exit code is 1.

Whole arrays mean few, large products, and [S, S] scores for every head, half of which are masked. The grid means many
small ones, sums of partials, and no more scores than tiles see: so it can be faster, where sequences are long.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from common import Benchmark, UserError, by_turns, np, run, table_with

from tsp_ref.model.config import Config, make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import Parameters, initial_parameters, named_views, zero_parameters
from tsp_ref.reference import naive, single

GRIDS = ["1x1", "1x8", "8x1", "4x4", "4x8", "8x8", "8x16"]


Result: TypeAlias = tuple[float, Any]
"""The loss, and the gradient of the embedding [V, h]."""


class Run:
    """A model that is run forward and backward."""

    def __init__(self, step: Callable[[], Result], clock: Callable[[], float]) -> None:
        self.step, self.clock = step, clock
        self.loss, self.gradient = 0.0, np.zeros(0)

    def __call__(self) -> float:
        """Its seconds."""
        begin = self.clock()
        self.loss, self.gradient = self.step()
        return self.clock() - begin

    def gap(self, other: Run) -> float:
        """The largest relative difference from another's last loss, or gradient."""
        largest = np.max(np.abs(other.gradient))
        return max(abs(self.loss / other.loss - 1), float(np.max(np.abs(self.gradient - other.gradient)) / largest))


def main(benchmark: Benchmark) -> int:
    """Time the textbook model and every grid."""
    config = benchmark.config
    whole = make_whole(config)
    tokens, targets = np.random.default_rng(1).integers(0, config.vocab_size, (2, config.batch_size, config.seq_len))
    runs = {"naive": Run(partial(textbook, config, whole, tokens, targets), benchmark.clock)}
    for name, grid in grids(benchmark).items():
        runs[name] = Run(tiled(grid, whole, tokens, targets), benchmark.clock)
    spreads = by_turns(benchmark, runs)
    table = table_with("G x T", "block's columns of f", "tile's tokens", "ms", "quartiles", "over naive", "quartiles")
    rows = []
    for name, spread in spreads.items():
        ratio = spread.over(spreads["naive"])
        columns, length = ("", "") if name == "naive" else sizes(config, name)
        table.add_row(name, columns, length, *spread.cells(), f"{ratio.median:.3f}",
                      "{:.3f}-{:.3f}".format(*ratio.quartiles))
        rows.append({"grid": name, "over_naive": ratio.median, "over_naive_quartiles": list(ratio.quartiles),
                     "loss": runs[name].loss, **spread.record()})
    benchmark.say(table)
    gap = max(each.gap(runs["naive"]) for each in runs.values())
    benchmark.say(f"loss {runs['naive'].loss:.6f}; largest relative difference, in losses and gradients, {gap:.1e}")
    close = gap <= benchmark.options.tolerance
    if not close:
        benchmark.say(f"[red]NOT THE SAME COMPUTATION[/]: losses or gradients differ by more than "
                      f"{benchmark.options.tolerance:g}")
    benchmark.finish("grid_cost", {"rows": rows, "largest_relative_gap": gap})
    return int(not close)


def make_whole(config: Config) -> naive.Weights:
    """The initial weights of the preset's own grid, as whole matrices."""
    return naive.assemble(config, initial_parameters(Model(config, np)))


def grids(benchmark: Benchmark) -> dict[str, Config]:
    """"GxT" -> the configuration cut like that."""
    options, found = benchmark.options, {}
    for name in options.grids:
        blocks, separator, tiles = name.partition("x")
        if not (separator and blocks.isdigit() and tiles.isdigit()):
            raise UserError(f"--grids {name} is not of the form GxT, blocks by tiles, for example 8x16")
        found[name] = make_config(options.preset, options.settings, blocks=int(blocks), tiles=int(tiles))
    return found


def cut(config: Config, whole: naive.Weights, model: Model) -> Parameters:
    """Whole matrices as the blocks of a grid: the reverse of `naive.assemble`."""
    parameters = zero_parameters(model, "weights")
    for name, tensor in parameters.tensors():
        for number, block in enumerate(tensor):
            for field, view in named_views(config, name, block).items():
                if field == "table":
                    first, rows = number * config.rows_per_block, config.tokens_in_block(number)
                    view[:rows] = whole[name][first : first + rows]
                    continue
                matrix = whole["layers"][int(name.split(".")[1])][field]
                view[...] = np.split(matrix, config.blocks, 0 if field in ("wo", "down") else -1)[number]
    parameters.gains[...] = whole["gains"]
    return parameters


def textbook(config: Config, whole: naive.Weights, tokens: Any, targets: Any) -> Result:
    """A forward and backward of the textbook model."""
    result = naive.loss_and_gradients(config, whole, tokens, targets)
    return result["loss"], result["gradients"]["embedding"]


def tiled(config: Config, whole: naive.Weights, tokens: Any, targets: Any) -> Callable[[], Result]:
    """A forward and backward of the model on a grid."""
    model = Model(config, np)
    weights, gradients = cut(config, whole, model), zero_parameters(model, "gradients")
    tiles = [np.stack([part[:, model.grid.tokens(slot)] for slot in model.grid.slots])  # [B, S] -> [p, B, s]
             for part in (tokens, targets)]

    def step() -> Result:
        loss, saved = single.model_forward(model, weights, *tiles)
        single.model_backward(model, saved, weights, gradients)
        return loss, gradients.embedding.reshape(-1, config.hidden_size)[: config.vocab_size]

    return step


def sizes(config: Config, grid: str) -> tuple[str, str]:
    """How many columns of the MLP a block has, and how many tokens a tile."""
    blocks, tiles = map(int, grid.split("x"))
    return str(config.ffn_size // blocks), str(config.seq_len // tiles)


def own_options(parser: argparse.ArgumentParser) -> None:
    """What only this benchmark asks."""
    parser.add_argument("--grids", nargs="+", default=GRIDS, metavar="GxT", help=f"({' '.join(GRIDS)})")
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X",
                        help="largest relative difference of losses and gradients (1e-4)")


if __name__ == "__main__":
    run(__doc__, main, repeats=5, more=own_options, one_process=True)
