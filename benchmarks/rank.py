"""One rank, or the single process, of a benchmark: it is asked for one training step at a time, and sleeps meanwhile.

Started by the benchmarks (`common.Worker`), not by hand: the arguments are a configuration as JSON, a schedule, a
backend and the path of a socket.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from common import json, np, random_text, serve
from device import watched

from tsp_ref.backends.gpu import open_backend
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import agreed, all_gather, from_root
from tsp_ref.model.config import Config
from tsp_ref.process.launch import start
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan


def main(comm: Communicator) -> int:
    """Serve until the parent hangs up."""
    config, schedule, path = Config(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[4]
    backend = open_backend(sys.argv[3], comm)
    comm.travel_by("poll", None)
    text = random_text(config)
    training = agreed(comm, lambda: Training(config, comm, Plan(schedule), text, backend))

    def step() -> dict[str, Any]:
        from_root(comm, 0)  # all ranks begin together
        begin = time.perf_counter()
        report = training.step()
        backend.synchronise()  # a GPU may still be at it
        mine = np.array([time.perf_counter() - begin])
        # The slowest rank's; and no rank sleeps before the last one has what it waits for.
        return {"seconds": float(max(all_gather(comm, mine))[0]), "loss": report.loss, "norm": report.norm}

    def count() -> dict[str, Any]:
        """The largest peak of a rank, when everything is counted."""
        counted = Training(config, comm, Plan(schedule, counted=True), text, np)
        counted.step()
        mine = np.array([counted.model.memory.total_peak])
        return {"peak_bytes": int(max(all_gather(comm, mine))[0])}

    def device() -> dict[str, Any]:
        """What the device's own pool held in one step of a new training, at most and after it, and the accounting."""
        with watched(backend) as pool:
            fresh = Training(config, comm, Plan(schedule), text, backend)
            fresh.step()
            backend.synchronise()
            return {"pool_peak": pool.peak, "pool_held": pool.used, "accounts_held": fresh.model.memory.total}

    def pool() -> dict[str, Any]:
        """What the device's pool has taken until now."""
        return {"pool_bytes": backend.peak_bytes()}

    serve(path, comm.rank, {"step": step, "count": count, "device": device, "pool": pool})
    return 0


if __name__ == "__main__":
    sys.exit(start(main))
