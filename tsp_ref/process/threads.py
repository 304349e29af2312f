"""One BLAS thread for each rank, unless the user chose otherwise; with more, no claim of equal bits is made."""

from __future__ import annotations

import os
import sys
from typing import Any

from ..errors import UserError

READ_BY = {
    "openblas": ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"),
    "mkl": ("MKL_NUM_THREADS", "OMP_NUM_THREADS"),
    "blis": ("BLIS_NUM_THREADS", "OMP_NUM_THREADS"),
    "accelerate": ("VECLIB_MAXIMUM_THREADS",),
    "openmp": ("OMP_NUM_THREADS",),
}
"""The variables that a library reads, by its name in threadpoolctl: the first that is set counts."""

UNASKABLE = "accelerate"  # macOS's, which threadpoolctl does not know: it is believed what its variable says


def pin() -> None:
    """Set one thread for every library whose variables the user has left unset or empty: in the environment, for
    libraries not yet loaded, and in those that are."""
    free = [library for library in READ_BY if _chosen(library) is None]
    os.environ.update({READ_BY[library][0]: "1" for library in free})
    if "numpy" in sys.modules:
        from threadpoolctl import ThreadpoolController

        # (Of several conditions `select` asks for any.)
        ThreadpoolController().select(user_api="blas").select(internal_api=free).limit(limits=1)


def require_one(claim: str) -> None:
    """Refuse `claim` where BLAS uses several threads: it may then split the same product in other ways at every N. And
    where no BLAS is found that could be asked: nothing is known then of how many it uses."""
    pools = blas_pools()
    if not pools and not (built_with() == UNASKABLE and _chosen(UNASKABLE) == f"{READ_BY[UNASKABLE][0]}=1"):
        raise UserError(f"{claim} compares bits, which several BLAS threads may change, and threadpoolctl finds no "
                        f"BLAS to ask for its threads (NumPy was built with {built_with()}): pip install -U "
                        "threadpoolctl, or use a NumPy from PyPI")
    for pool in pools:
        if pool["num_threads"] > 1:
            chosen = _chosen(pool["internal_api"])
            # One that says 1 is not the cause.
            why = "set within this process" if chosen is None or chosen.endswith("=1") else chosen
            raise UserError(f"{claim} compares bits, and BLAS would use {pool['num_threads']} threads ({why}), which "
                            "may change bits from one machine or number of ranks to another: use 1 thread")


def blas_pools() -> list[dict[str, Any]]:
    """What threadpoolctl knows of each BLAS in this process: internal_api, version, architecture, num_threads, ..."""
    import numpy  # noqa: F401  (the library to be asked must be loaded)
    from threadpoolctl import threadpool_info

    return [pool for pool in threadpool_info() if pool["user_api"] == "blas"]


def built_with() -> str:
    """The BLAS that NumPy was built with, as it names it."""
    import numpy

    built: Any = numpy.show_config(mode="dicts")
    return str(built.get("Build Dependencies", {}).get("blas", {}).get("name", "an unknown BLAS"))


def _chosen(library: str) -> str | None:
    """The setting that a library reads, as NAME=value; None if all of its variables are unset or empty."""
    names = READ_BY.get(library, ("OMP_NUM_THREADS",))
    return next((f"{name}={os.environ[name]}" for name in names if os.environ.get(name, "").strip()), None)
