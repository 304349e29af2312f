"""What is known before MPI is up, and what Ctrl-C and SIGTERM do then."""

import os
import signal
from types import SimpleNamespace
from unittest import mock

import pytest

from tsp_ref.comm import launcher, mpi
from tsp_ref.errors import UserError


@pytest.fixture
def handlers():
    """Both signals as they are in a new process, and afterwards as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_leaves_imports_at_once_ends_a_start_of_mpi_and_is_an_exception_afterwards(handlers):
    with mock.patch.dict(os.environ, PMI_RANK="0"), mock.patch.object(os, "_exit") as left:
        launcher.leave_at_ctrl_c()
        signal.raise_signal(signal.SIGINT)
    left.assert_called_once_with(130)
    launcher.end_at_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    launcher.hear_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_without_a_launcher_ctrl_c_stays_python_s(handlers):
    with mock.patch.dict(os.environ, clear=True):
        launcher.leave_at_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_program_s_own_stays(handlers):
    def own(number, frame):
        pass

    signal.signal(signal.SIGINT, own)
    signal.signal(signal.SIGTERM, own)
    with mock.patch.dict(os.environ, PMI_RANK="0"):
        launcher.leave_at_ctrl_c()
    launcher.end_at_ctrl_c()
    launcher.hear_ctrl_c()
    launcher.hear_termination(lambda: None)
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is own


MPICH = SimpleNamespace(Get_library_version=lambda: "MPICH Version:      5.0.2\nof a date")
OPEN_MPI = SimpleNamespace(Get_library_version=lambda: "Open MPI v5.0.11, package: ...")


@pytest.mark.parametrize(("variables", "said"), [
    ({"PMIX_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
     "mpirun started 2 ranks, but it is not of the MPI that Python loads (MPICH Version: 5.0.2)"),
    ({"PMIX_RANK": "0"}, "PMIX_RANK=0 says that a launcher has started this process, but not one of the MPI"),
])
def test_a_launcher_that_would_make_mpich_abort_is_refused_before_it_does(variables, said):
    with (mock.patch.dict(os.environ, variables, clear=True), mock.patch.object(mpi, "_has_loaded", lambda name: False),
          pytest.raises(UserError) as refused):
        mpi._require_launcher_of(MPICH)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("library", "variables", "has_pmix"), [
    (MPICH, {"PMI_RANK": "0", "PMI_FD": "9"}, False),
    (MPICH, {"PMI_RANK": "0", "PMI_FD": "9", "PMIX_RANK": "0"}, False),
    (MPICH, {"PMIX_RANK": "0"}, True),
    (OPEN_MPI, {"PMIX_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, False),
    (MPICH, {}, False),
])
def test_a_launcher_that_the_library_knows_is_let_pass(library, variables, has_pmix):
    with (mock.patch.dict(os.environ, variables, clear=True),
          mock.patch.object(mpi, "_has_loaded", lambda name: has_pmix)):
        mpi._require_launcher_of(library)
