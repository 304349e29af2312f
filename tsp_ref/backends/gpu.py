"""Which array library computes. This is the only file that knows CuPy; all others are written for a namespace `xp`.

The host's own is in `host.py`, with what every backend can do.
"""

from __future__ import annotations

import importlib
import os
from functools import partial
from typing import Any

import numpy as np

from ..accounting.memory import Memory
from ..accounting.work import Work
from ..arrays import Array
from ..comm.communicator import Communicator
from ..comm.control import ControlTag, agreed
from ..errors import UserError
from .host import HOST, Backend, backend_of

__all__ = ["BACKENDS", "HOST", "Backend", "CupyBackend", "backend_of", "open_backend"]

BACKENDS = ("numpy", "cupy")

REPEATABLE = {
    # float32 products in float32, not in TensorFloat-32 (CuPy's and NVIDIA's documentation of environment variables).
    "CUPY_TF32": "0",
    "NVIDIA_TF32_OVERRIDE": "0",
    # A workspace of a fixed size, so that the same product is always split alike (cuBLAS, "Results reproducibility").
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # No sums by atomic additions, whose order is that of arrival (rocBLAS, "Atomic operations"); cuBLAS has none unless
    # a program asks for them.
    "ROCBLAS_DEFAULT_ATOMICS_MODE": "0",
}
"""Set before CuPy is imported, where the user has not set them: so that the same product has the same bits.

Both makers promise that on the same kind of GPU, with the same versions, and one stream for each handle of the library;
and it is what `verify` checks. From one kind of GPU to another, or to a CPU, bits differ.
"""

OWN_STREAMS = "CUPY_CUDA_PER_THREAD_DEFAULT_STREAM"
PROBE = 4096
"""Numbers of the message that tries whether MPI takes the GPU's arrays: more than an MPI copies eagerly from a cache
line or two, few enough to cost nothing."""


class CupyBackend(Backend):
    """CuPy on one GPU, of NVIDIA's or AMD's. Also the `Device` that carries its arrays in messages (comm/staging.py).

    Everything is computed on one stream, the one that is current when this is made, so kernels run one after another
    in the order of their launch. Messages are copied on a second stream that does not wait for the first by itself:
    only events order the two.
    """

    name = "cupy"

    def __init__(self, cupy: Any, gpu: int = 0, sharing: int = 1) -> None:
        """gpu: its number among those visible, made current for this thread; sharing: how many ranks use it."""
        super().__init__(cupy)
        self._cuda = cupy.cuda
        self._gpu = gpu
        self._sharing = sharing
        self._device = cupy.cuda.Device(gpu)
        self._device.use()
        self._compute = cupy.cuda.get_current_stream()
        self._copies = cupy.cuda.Stream(non_blocking=True)

    def to_host(self, array: Array) -> Array:
        """A copy in the host's memory, taken on the computing stream and waited for."""
        host: Array = self.xp.asnumpy(array)
        return host

    def from_host(self, array: Array) -> Array:
        """A copy in the GPU's memory; blocking, so that the host's array may be changed at once."""
        made: Array = self.xp.asarray(array, blocking=True)
        return made

    def synchronise(self) -> None:
        """Wait for both streams."""
        self._compute.synchronize()
        self._copies.synchronize()

    def describe(self) -> str:
        """CuPy's version, which GPU of how many, its name, and who shares it."""
        runtime = self._cuda.runtime
        name = runtime.getDeviceProperties(self._gpu)["name"]
        name = name.decode() if isinstance(name, bytes) else name
        shared = f", shared by {self._sharing} ranks" if self._sharing > 1 else ""
        return f"CuPy {self.xp.__version__}, GPU {self._gpu} of {runtime.getDeviceCount()}: {name}{shared}"

    def peak_bytes(self) -> int | None:
        """What the pool has taken from the GPU. It keeps what is freed, so it only grows; virtual ranks share one."""
        return int(self.xp.get_default_memory_pool().total_bytes())

    def counted(self, memory: Memory, work: Work) -> Backend:
        """CuPy's arrays cannot count themselves."""
        raise UserError("--backend cupy cannot count every array, as compare does: use --backend numpy; train shows "
                        "what each rank holds, on a GPU too")

    @property
    def kind(self) -> str:
        """Whose GPUs: "cuda" or "hip"."""
        return "hip" if self._cuda.runtime.is_hip else "cuda"

    def owns(self, array: Array) -> bool:
        """Whether the array lies in the GPU's memory."""
        return isinstance(array, self.xp.ndarray)

    def mark(self) -> Any:
        """An event after all that was launched to compute until now; `done` says whether the GPU has come there."""
        return self._event(self._compute)

    def pinned(self, size: int) -> Array:
        """So many bytes of the host's memory that the GPU can copy from and to by itself, uint8 [size]. CuPy's pool
        takes them back when the array is freed, and gives them out again."""
        return np.frombuffer(self._cuda.alloc_pinned_memory(size), dtype=np.uint8, count=size)

    def copy_out(self, array: Array, pinned: Array, after: Any) -> Any:
        """Let a contiguous array be copied to pinned memory once `after` is done; the event after the copy."""
        with self._device:
            self._copies.wait_event(after)
            array.data.copy_to_host_async(pinned.ctypes.data, array.nbytes, self._copies)  # type: ignore[attr-defined]
        return self._event(self._copies)

    def copy_in(self, pinned: Array, array: Array, after: Any) -> Any:
        """Let pinned memory be copied to a contiguous array once `after` is done; the event after the copy."""
        with self._device:
            self._copies.wait_event(after)
            array.data.copy_from_host_async(pinned.ctypes.data, array.nbytes, self._copies)  # type: ignore[attr-defined]
        return self._event(self._copies)

    def _event(self, stream: Any) -> Any:
        # The device is current for a thread, and a thread that progresses messages has not chosen any.
        with self._device:
            event = self._cuda.Event(disable_timing=True)
            event.record(stream)
        return event


def open_backend(name: str, comm: Communicator, gpu_aware: bool = False) -> Backend:
    """The backend called `name` on this rank, and messages that can carry its arrays; every rank must call it.

    A rank takes the GPU whose number is its own on its machine modulo the number of GPUs there; virtual ranks are one
    process and share GPU 0. An `AgreedError` on all ranks where one of them cannot have what is asked for.

    gpu_aware  MPI is handed the GPU's own memory, instead of copies in the host's. That MPI can take it is checked in
               two ways: it must say so (`MPICommunicator.require_gpu_support`, before it is handed anything), and a
               message of known numbers from each rank to the next must arrive in GPU memory unchanged.
    """
    if name == HOST.name and not gpu_aware:
        return HOST
    backend = agreed(comm, partial(_open, name, comm, gpu_aware))
    if gpu_aware and comm.size > 1:
        found = _round_trip(comm, backend)
        agreed(comm, partial(_require_intact, found))
    return backend


def _open(name: str, comm: Communicator, gpu_aware: bool) -> Backend:
    if name not in BACKENDS:
        raise UserError(f"--backend {name} is unknown: use one of {', '.join(BACKENDS)}")
    if name == HOST.name:
        raise UserError("--gpu-aware hands a GPU's memory to MPI, and --backend numpy has none: add --backend cupy, or "
                        "leave --gpu-aware out")
    if os.environ.get(OWN_STREAMS, "0") not in ("", "0"):
        raise UserError(f"{OWN_STREAMS}={os.environ[OWN_STREAMS]} gives each thread a stream of its own, and arrays go "
                        "from thread to thread here: unset it")
    cupy = _import_cupy()
    gpus = _count_gpus(cupy)
    process, processes = comm.process_on_node
    gpu = process % gpus
    sharing = sum(other % gpus == gpu for other in range(processes)) * comm.ranks_in_process
    backend = CupyBackend(cupy, gpu, sharing)
    comm.carry(backend, gpu_aware)
    return backend


def _import_cupy() -> Any:
    for name, value in REPEATABLE.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise UserError(f"--backend cupy needs CuPy, which cannot be imported ({str(error).strip().splitlines()[0]}): "
                        'pip install -e ".[cuda]" for NVIDIA GPUs, or ".[rocm]" for AMD\'s') from None


def _count_gpus(cupy: Any) -> int:
    runtime = cupy.cuda.runtime
    try:
        count, reason = int(runtime.getDeviceCount()), "none is visible"
    except runtime.CUDARuntimeError as error:
        count, reason = 0, str(error)
    if count == 0:
        raise UserError(f"--backend cupy finds no GPU ({reason}): run it where there is one, look at "
                        "CUDA_VISIBLE_DEVICES or ROCR_VISIBLE_DEVICES, or use --backend numpy")
    return count


def _round_trip(comm: Communicator, backend: Backend) -> bool:
    """Whether a message from GPU memory to the next rank, and one from the rank before, bring the right numbers."""
    following, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size

    def numbers(rank: int) -> Array:
        return np.arange(PROBE, dtype=np.float32) + np.float32(rank)

    sent, received = backend.from_host(numbers(comm.rank)), backend.from_host(numbers(-1))
    comm.Waitall([comm.Irecv(received, before, ControlTag.CONTROL), comm.Isend(sent, following, ControlTag.CONTROL)])
    return backend.to_host(received).tobytes() == numbers(before).tobytes()


def _require_intact(arrived: bool) -> bool:
    if not arrived:
        raise UserError("--gpu-aware: a message from GPU memory arrived with other numbers than were sent, although "
                        "this MPI says that it takes GPU memory: leave --gpu-aware out")
    return True
