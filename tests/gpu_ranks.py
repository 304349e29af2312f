"""Ranks with a GPU each, in one process: virtual ranks, but with the transports of real ones, over stand-ins for CuPy.

The mailbox of virtual ranks takes the place of MPI, so that runs are repeatable and orders can be drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from strict import Array as DeviceArray
from strict import StrictCupy

from tsp_ref.arrays import Array
from tsp_ref.backends.gpu import CupyBackend
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.request import Request
from tsp_ref.comm.staging import Device, DeviceTransport, StagedTransport, Transport
from tsp_ref.comm.virtual import VirtualCommunicator, VirtualWorld

Result = TypeVar("Result")

PATIENCE = 20_000
"""Looks at messages without an end of any: then a rank waits for what never comes."""


class GpuCommunicator(VirtualCommunicator):
    """One rank, which hands its messages to the mailbox as it would to MPI."""

    def __init__(self, world: VirtualWorld, rank: int) -> None:
        super().__init__(world, rank)
        self.process_on_node, self.ranks_in_process = (rank, world.size), 1
        self.transport = Transport(self)

    def carry(self, device: Device, gpu_aware: bool) -> None:
        self.transport = DeviceTransport(self, device) if gpu_aware else StagedTransport(self, device)

    def begin(self, request: Request, buffer: Array) -> Any:
        """As MPI: it takes the memory as it is now, whatever streams there are."""
        raw = buffer.gpu.handed(buffer, request.verb) if isinstance(buffer, DeviceArray) else buffer
        inner = Request(request.verb, raw.reshape(-1).view(np.uint8), self.rank, request.peer, request.tag)
        self.world.post(inner)
        return inner, buffer

    def over(self, request: Request, handle: Any) -> bool:
        """As MPI's Test."""
        inner, buffer = handle
        if not super()._test(inner):
            return False
        if isinstance(buffer, DeviceArray):
            buffer.gpu.given_back(buffer, request.verb)
        return True

    def _start(self, request: Request) -> None:
        self.transport.post(request)

    def _test(self, request: Request) -> bool:
        return self.transport.test(request)

    def _pause(self, requests: list[Request], polls: int) -> None:
        assert polls < PATIENCE, f"waits for ever: {'; '.join(map(str, requests))}"
        self.world.deliver()
        super()._pause(requests, polls)


def on_gpus(
    size: int, main: Callable[[Communicator, CupyBackend], Result], gpu_aware: bool = False, seed: int | None = None,
    backend: type[CupyBackend] = CupyBackend
) -> list[Result]:
    """main(communicator, backend) on every rank; what each returns, once nothing is left in flight."""
    world = VirtualWorld(size, seed)
    world.communicators = [GpuCommunicator(world, rank) for rank in range(size)]

    def live(comm: Communicator) -> Result:
        cupy = StrictCupy(seed=comm.rank + 100 * (seed or 0))
        library = backend(cupy)
        comm.carry(library, gpu_aware)
        result = main(comm, library)
        comm.finish()
        assert isinstance(comm, GpuCommunicator)
        assert comm.transport.pinned_bytes == 0
        assert cupy.gpu.faults == []
        return result

    return world.run(live)
