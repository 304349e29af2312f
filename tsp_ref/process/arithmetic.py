"""What computes on each rank, and whether all compute alike.

The same program has other bits with another NumPy, another BLAS, or another kernel of the same BLAS, which chooses one
by the processor it finds. Ranks on one machine agree by themselves; on several they may not, and then no digest means
anything, and what should be copies drifts apart. Known here is what NumPy computes with; of GPUs nothing is asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import numpy as np
from rich.console import Console

from ..arrays import Array
from ..comm.communicator import Communicator
from ..comm.control import gather_texts
from ..errors import AgreedError
from . import threads

SHAPES = ((1, 64, 96), (16, 64, 16), (33, 257, 65), (128, 128, 128))  # [m, k] times [k, n]


def require_alike(comm: Communicator, claim: str) -> None:
    """Refuse `claim` on every rank where not all compute alike. Every rank must call it."""
    different = differences(comm)
    if different:
        raise AgreedError(f"{claim} compares bits, and not all ranks compute alike: {different}; use one NumPy and one "
                          "kind of processor")


def warn_unless_alike(comm: Communicator, console: Console) -> None:
    """Say on rank 0 that bits will not be those of one process, where not all ranks compute alike."""
    different = differences(comm)
    if different:
        console.print(f"warning: not all ranks compute alike, so bits will not be those of one process, and copies of "
                      f"weights may drift apart: {different}", highlight=False, markup=False, soft_wrap=True)


def differences(comm: Communicator) -> str:
    """In what the ranks differ, and which ones; "" if in nothing."""
    if comm.size == comm.ranks_in_process:
        return ""
    found = [json.loads(text) for text in gather_texts(comm, json.dumps(description()))]
    said = []
    for what in found[0]:
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(found):
            ranks.setdefault(one[what], []).append(rank)
        if len(ranks) > 1:
            said.append(f"{what}: " + ", ".join(f"{value} on {_named(which)}" for value, which in ranks.items()))
    return "; ".join(said)


def description() -> dict[str, str]:
    """What this process computes with, and what it makes of a few numbers."""
    pools = [f"{pool['internal_api']} {pool['version']} for {pool.get('architecture', 'any processor')}"
             for pool in threads.blas_pools()]
    return {"NumPy": np.__version__, "BLAS": " and ".join(sorted(pools)) or threads.built_with(),
            **{f"bits of {what}": _hash(compute()) for what, compute in COMPUTED.items()}}


def products() -> list[Array]:
    """A few matrix products of single and double precision, plain and of transposed matrices."""
    pairs = [(_numbers(m, k).astype(dtype), _numbers(k, n).astype(dtype))
             for m, k, n in SHAPES for dtype in (np.float32, np.float64)]
    return [product for left, right in pairs for product in (np.matmul(left, right), np.matmul(right.T, left.T))]


def functions() -> list[Array]:
    """What NumPy computes element by element, by loops that it too chooses by the processor."""
    numbers = [_numbers(1000).astype(dtype) for dtype in (np.float32, np.float64)]
    return [function(each) for function in (np.exp, np.tanh, np.sin, np.cos) for each in numbers] + [
        function(abs(each)) for function in (np.log, np.sqrt) for each in numbers]


def sums() -> list[Array]:
    """Sums along either axis, and of all."""
    numbers = [_numbers(67, 129).astype(dtype) for dtype in (np.float32, np.float64)]
    return [np.sum(each, axis=axis) for each in numbers for axis in (0, 1, None)]


COMPUTED: dict[str, Callable[[], list[Array]]] = {
    "products": products, "exp, tanh, sin, cos, log, sqrt": functions, "sums": sums}


def _numbers(*shape: int) -> Array:
    """Numbers from -1 to 1, without a generator: the same with every NumPy."""
    drawn: Array = (np.arange(1, np.prod(shape) + 1) * 7919 % 1_000_003 / 500_001.5 - 1).reshape(shape)
    return drawn


def _hash(arrays: list[Array]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:8]


def _named(ranks: list[int]) -> str:
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
