"""One BLAS thread for each rank, unless the user chose otherwise; with more, no claim of equal bits is made."""

from __future__ import annotations

import os
import sys

from ..errors import UserError

VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def pin() -> None:
    """Set one thread in the environment, for libraries not yet loaded, and in those that are."""
    if any(name in os.environ for name in VARIABLES):
        return
    os.environ.update(dict.fromkeys(VARIABLES, "1"))
    if "numpy" in sys.modules:
        from threadpoolctl import threadpool_limits

        threadpool_limits(1, user_api="blas")


def require_one(claim: str) -> None:
    """Refuse `claim` where BLAS uses several threads: it may then split the same product in other ways at every N."""
    import numpy  # noqa: F401  (the library to be asked must be loaded)
    from threadpoolctl import threadpool_info

    threads = max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)
    if threads > 1:
        chosen = [f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name, "1") != "1"]
        why = ", ".join(chosen) or "set by the program that started this one"
        raise UserError(f"{claim} compares bits, and BLAS would use {threads} threads ({why}), which may change bits "
                        "from one machine or number of ranks to another: use 1 thread")
