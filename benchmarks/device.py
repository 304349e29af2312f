"""What a device's own pool of memory holds, watched from inside: CuPy tells a hook of every allocation and release."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tsp_ref.backends.host import Backend


class Pool:
    """Bytes that a device's pool has given out, now and at most; None where there is no such pool to watch."""

    def __init__(self) -> None:
        self.used: int | None = None
        self.peak: int | None = None


def hook_into(pool: Pool, base: type[Any]) -> Any:
    """A `cupy.cuda.MemoryHook` that keeps `pool`. Bytes are the pool's own, rounded up by it.

    From zero on: a hook that is never called is a pool that disagrees with the accounts, not one that is not there.
    """
    pool.used = pool.peak = 0

    class Watch(base):  # type: ignore[misc]
        name = "tsp_ref"

        def malloc_postprocess(self, **told: Any) -> None:
            """After memory was given out."""
            pool.used = (pool.used or 0) + told["mem_size"]
            pool.peak = max(pool.peak or 0, pool.used)

        def free_postprocess(self, **told: Any) -> None:
            """After it came back; what was given out before the watch is not counted."""
            pool.used = max(0, (pool.used or 0) - told["mem_size"])

    return Watch()


@contextmanager
def watched(backend: Backend) -> Iterator[Pool]:
    """Watch the pool of a backend in this thread."""
    pool = Pool()
    if backend.name != "cupy":
        yield pool
        return
    with hook_into(pool, backend.xp.cuda.MemoryHook):
        yield pool
