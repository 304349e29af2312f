"""What a run's bits depend on beside the request: the versions of this package, Python, NumPy, its BLAS, and MPI."""

from __future__ import annotations

import platform

import numpy as np

from .. import __version__
from ..comm import mpi
from ..errors import UserError
from . import threads


def version() -> str:
    """All versions, a line each. With a launcher every rank must call it: MPI is loaded to be asked."""
    return "\n".join([f"tsp_ref {__version__}", f"Python {platform.python_version()}", f"NumPy {np.__version__}",
                      *(_blas() or ["BLAS: none that threadpoolctl knows"]), f"MPI: {_mpi()}"])


def _blas() -> list[str]:
    return [f"BLAS: {pool['internal_api']} {pool['version']}"
            f"{' for ' + pool['architecture'] if pool.get('architecture') else ''}, {pool['num_threads']} thread"
            f"{'s' * (pool['num_threads'] != 1)}" for pool in threads.blas_pools()]


def _mpi() -> str:
    try:
        return mpi.version()
    except UserError as error:
        return f"none ({error})"
