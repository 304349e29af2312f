"""The jobs that run MPI tests: a test that fails is blamed, on whatever ranks it fails, and the others run."""

import conftest
import numpy as np
import pytest


def passing(comm):
    """A test that passes."""


def failing_everywhere(comm):
    """A test that all ranks fail at the same moment."""
    raise AssertionError("on purpose")


def failing_on_the_last(comm):
    """A test that one rank fails while the others wait for it."""
    if comm.rank == comm.size - 1:
        raise AssertionError("on purpose")
    comm.Wait(comm.Irecv(np.zeros(1), comm.size - 1, 1))


def leaving_a_message(comm):
    """A test that passes, but for a message that nobody receives."""
    comm.Isend(np.zeros(1), (comm.rank + 1) % comm.size, 1)


@pytest.mark.ranks(2, 4)
def test_tests_that_fail_are_blamed_and_no_others(n):
    functions = [passing, failing_everywhere, failing_everywhere, passing, failing_on_the_last, leaving_a_message]
    tests = [{"id": number, "number": number, "module": __name__, "function": function.__name__, "parameters": {}}
             for number, function in enumerate(functions)]
    failures = conftest.run_tests(n, tests)
    assert {number for number, failure in failures.items() if failure is None} == {0, 3}
    assert all(f"of {n}:\n" in failures[number] and "on purpose" in failures[number] for number in (1, 2, 4))
    assert "MessageError" in failures[5]
