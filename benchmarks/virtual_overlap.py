"""What of the messages' time a schedule hides, in virtual time: no noise, links and progress that are ideal.

    python benchmarks/virtual_overlap.py                              TSP on 2, 4 and 8 ranks
    python benchmarks/virtual_overlap.py --ranks 4 --blocks 4 --recompute full attention --ratio 0.5
    python benchmarks/virtual_overlap.py --schedule sp --jitter 0.2

The real schedule runs on virtual ranks that have clocks (comm/virtual_time.py): computation costs the floating-point
operations of its matrix products, messages cost bytes over bandwidth on a link between each pair of ranks. The
bandwidth is chosen so that messages alone take `--ratio` of what computation alone takes. Hidden is (messages +
computation - both) / min(messages, computation), of the slowest rank. The model is small, of the preset bench's
proportions; seconds mean nothing here, shares do.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

from tsp_ref.comm.virtual_time import TimedCommunicator, TimedWorld
from tsp_ref.model.config import Config, make_config
from tsp_ref.training.data import Text
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

RATE = 1e9  # FLOPs a second; only its ratio to the bandwidth matters


def times(config: Config, plan: Plan, world: TimedWorld, rate: float) -> tuple[float, float]:
    """The slowest rank's clock after a forward, and after forward and backward."""
    bytes_ = np.random.default_rng(0).integers(0, min(256, config.vocab_size), size=20000, dtype=np.uint8)

    def rank(comm: TimedCommunicator) -> tuple[float, float]:
        training = Training(config, comm, plan, Text(bytes_[:10000], bytes_[10000:], "random bytes"), np)
        work = training.model.work
        comm.work = lambda: work.total / rate
        _, saved = training.forward()
        comm.tick()
        forward = comm.clock
        training.strategy.backward(saved, training.weights, training.gradients)
        comm.tick()
        return forward, comm.clock

    found = world.run(rank)  # type: ignore[arg-type]
    return max(first for first, _ in found), max(last for _, last in found)


def hidden(config: Config, plan: Plan, ranks: int, ratio: float, jitter: float) -> tuple[float, float]:
    """The hidden share in the forward, and in forward and backward."""
    compute = times(config, plan, TimedWorld(ranks, jitter=jitter), RATE)
    alone = times(config, plan, TimedWorld(ranks, bandwidth=1.0), math.inf)
    shares = []
    for part in (0, 1):
        bandwidth = alone[part] / (ratio * compute[part])
        both = times(config, plan, TimedWorld(ranks, bandwidth, jitter=jitter), RATE)[part]
        messages = alone[part] / bandwidth
        shares.append((messages + compute[part] - both) / min(messages, compute[part]))
    return shares[0], shares[1]


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", default="tsp")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tiles", type=int, default=16)
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.5, 0.9])
    parser.add_argument("--recompute", nargs="+", default=["none"])
    parser.add_argument("--jitter", type=float, default=0.0, help="computation takes longer by up to this part (0)")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    rows = []
    for recompute in options.recompute:
        for ranks in options.ranks:
            for blocks in options.blocks:
                if blocks < ranks:
                    continue
                config = make_config("bench", [
                    "hidden_size=64", "ffn_size=176", "seq_len=256", f"tiles={options.tiles}", f"blocks={blocks}",
                    "vocab_size=256", "num_layers=4", *options.set])
                plan = Plan(options.schedule, recompute=recompute, counted=True)
                cells = [hidden(config, plan, ranks, ratio, options.jitter) for ratio in options.ratio]
                text = "   ".join(f"{ratio}: {100 * first:5.1f} / {100 * both:5.1f}"
                                  for ratio, (first, both) in zip(options.ratio, cells))
                print(f"N={ranks} G={blocks} recompute {recompute:9s}  {text}", flush=True)
                rows.append({"ranks": ranks, "blocks": blocks, "recompute": recompute, "ratios": options.ratio,
                             "hidden": cells})
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
