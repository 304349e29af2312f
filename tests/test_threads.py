"""How many threads BLAS gets, and what compares bits refuses."""

import os
from unittest import mock

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from tsp_ref.errors import UserError
from tsp_ref.process import threads

OWN = [names[0] for names in threads.READ_BY.values()]


def pinned(**variables):
    """What the environment says of threads after `pin`, if NumPy is not yet loaded and the user has set these."""
    with mock.patch.dict(os.environ, variables, clear=True), mock.patch.object(threads.sys, "modules", {}):
        threads.pin()
        return dict(os.environ)


def test_blas_runs_on_one_thread_and_two_are_refused_where_bits_are_compared():
    assert np.ones(1).dtype == np.float64  # NumPy is loaded
    threads.require_one("this test")
    with (threadpool_limits(2, user_api="blas"),
          pytest.raises(UserError, match=r"this test .* BLAS would use 2 threads \(set within this process\)")):
        threads.require_one("this test")


def test_every_library_gets_one_thread_where_the_user_says_nothing():
    assert pinned() == dict.fromkeys(OWN, "1")
    assert pinned(OMP_NUM_THREADS="", OPENBLAS_NUM_THREADS=" ") == dict.fromkeys(OWN, "1")


@pytest.mark.parametrize("name", [name for name in OWN if name != "OMP_NUM_THREADS"])
def test_what_the_user_sets_for_one_library_leaves_the_others_at_one_thread(name):
    assert pinned(**{name: "3"}) == dict.fromkeys(OWN, "1") | {name: "3"}


def test_a_variable_that_several_libraries_read_counts_for_each_of_them():
    assert pinned(OMP_NUM_THREADS="3") == {"OMP_NUM_THREADS": "3", "VECLIB_MAXIMUM_THREADS": "1"}
    assert "OPENBLAS_NUM_THREADS" not in pinned(GOTO_NUM_THREADS="3")


@pytest.mark.parametrize(("variables", "cause"), [
    ({"OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "1"}, "OPENBLAS_NUM_THREADS=4"),
    ({"OPENBLAS_NUM_THREADS": "", "OMP_NUM_THREADS": "4"}, "OMP_NUM_THREADS=4"),
    ({"MKL_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "1"}, "set within this process"),
])
def test_the_refusal_names_the_variable_that_the_library_reads_and_no_other(variables, cause):
    pool = {"internal_api": "openblas", "num_threads": 4}
    with (mock.patch.dict(os.environ, variables, clear=True), mock.patch.object(threads, "blas_pools", lambda: [pool]),
          pytest.raises(UserError) as refused):
        threads.require_one("verify")
    assert f"4 threads ({cause})" in str(refused.value)


def test_where_no_blas_can_be_asked_no_bits_are_compared():
    with mock.patch.object(threads, "blas_pools", list), pytest.raises(UserError) as refused:
        threads.require_one("verify")
    assert "verify compares bits" in str(refused.value) and "threadpoolctl finds no BLAS" in str(refused.value)


def test_accelerate_which_cannot_be_asked_is_believed_what_its_variable_says():
    with (mock.patch.object(threads, "blas_pools", list),
          mock.patch.object(threads, "built_with", lambda: "accelerate")):
        with mock.patch.dict(os.environ, VECLIB_MAXIMUM_THREADS="1"):
            threads.require_one("verify")
        with mock.patch.dict(os.environ, VECLIB_MAXIMUM_THREADS="2"), pytest.raises(UserError):
            threads.require_one("verify")


def test_threads_are_set_in_a_library_that_is_loaded_too_unless_the_user_has_chosen():
    with threadpool_limits(2, user_api="blas"):
        with mock.patch.dict(os.environ, {"MKL_NUM_THREADS": "3"}, clear=True):
            threads.pin()
        assert {pool["num_threads"] for pool in threads.blas_pools()} == {1}
    with threadpool_limits(2, user_api="blas"):
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "2"}, clear=True):
            threads.pin()
        assert {pool["num_threads"] for pool in threads.blas_pools()} == {2}
