"""Arrays of a GPU's over real MPI. The GPU is a stand-in, whose memory is the host's, so that any MPI can take it."""

import os
import sys

import numpy as np
import pytest
from strict import StrictCupy
from test_backend import CONFIG, digest_on, trained

from tsp_ref.backends.gpu import CupyBackend, open_backend
from tsp_ref.comm import mpi
from tsp_ref.comm.staging import DeviceTransport, StagedTransport
from tsp_ref.errors import AgreedError
from tsp_ref.training.collect import digest
from tsp_ref.training.strategy import Plan


def opened(comm, gpu_aware):
    """The backend that `--backend cupy` opens, on a stand-in of this rank's own."""
    sys.modules["cupy"] = StrictCupy(seed=comm.rank)
    try:
        return open_backend("cupy", comm, gpu_aware)
    finally:
        del sys.modules["cupy"]


def same_bits(comm, backend, *schedules):
    """Whether runs on this backend have the digest of the single process on NumPy."""
    found = [digest(trained(CONFIG, comm, Plan(schedule), backend)) for schedule in schedules]
    if comm.rank == 0:
        assert set(found) == {digest_on(np, Plan("single"), 1)}
    assert backend.xp.gpu.faults == []


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("progress", ["poll", "thread"])
def test_staged_messages_have_numpy_s_bits(comm, progress):
    backend = opened(comm, gpu_aware=False)
    assert isinstance(backend, CupyBackend) and isinstance(comm._transport, StagedTransport)
    comm.travel_by(progress, None)
    same_bits(comm, backend, "tsp", "tp+sp")
    comm.travel_by("wait", None)
    assert comm._transport.pinned_bytes == 0 < comm.pinned_peak


@pytest.mark.ranks(2, 4)
def test_messages_from_gpu_memory_have_numpy_s_bits(comm):
    os.environ[mpi.CRAY_GPU_SUPPORT] = "1"  # which is taken for this MPI's word
    try:
        backend = opened(comm, gpu_aware=True)
    finally:
        del os.environ[mpi.CRAY_GPU_SUPPORT]
    assert type(comm._transport) is DeviceTransport
    same_bits(comm, backend, "tsp", "sp")


@pytest.mark.ranks(2)
def test_an_mpi_that_does_not_take_gpu_memory_is_refused_by_name(comm):
    vendor = mpi.vendor(sys.modules["mpi4py.MPI"])
    with pytest.raises(AgreedError, match=rf"--gpu-aware needs an MPI that takes GPU memory, and {vendor.split()[0]}"):
        opened(comm, gpu_aware=True)
