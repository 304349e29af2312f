"""That ranks which compute differently are told apart, and what compares bits refuses them."""

import json
from types import SimpleNamespace
from unittest import mock

import pytest

from tsp_ref.errors import AgreedError
from tsp_ref.process import arithmetic
from tsp_ref.process.terminal import console_for

PROCESSES = SimpleNamespace(size=4, ranks_in_process=1)
ALIKE = {"NumPy": "2.4.6", "BLAS": "openblas 0.3.31 for Haswell", "bits of products": "d0260248"}
OLDER = {**ALIKE, "NumPy": "2.0.2"}
OTHER_KERNEL = {**ALIKE, "BLAS": "openblas 0.3.31 for SkylakeX", "bits of products": "2d653b25"}


def said_of(*descriptions):
    """What is said of processes that describe themselves so."""
    with mock.patch.object(arithmetic, "gather_texts", lambda comm, text: [json.dumps(each) for each in descriptions]):
        return arithmetic.differences(PROCESSES)


@pytest.mark.parametrize(("others", "said"), [
    ([ALIKE, ALIKE, ALIKE], ""),
    ([ALIKE, ALIKE, OLDER], "NumPy: 2.4.6 on ranks 0-2, 2.0.2 on rank 3"),
    ([OLDER, ALIKE, OLDER], "NumPy: 2.4.6 on ranks 0, 2, 2.0.2 on ranks 1, 3"),
    ([OTHER_KERNEL, ALIKE, ALIKE],
     "BLAS: openblas 0.3.31 for Haswell on ranks 0, 2, 3, openblas 0.3.31 for SkylakeX on rank 1; "
     "bits of products: d0260248 on ranks 0, 2, 3, 2d653b25 on rank 1"),
])
def test_it_is_said_which_ranks_differ_in_what(others, said):
    assert said_of(ALIKE, *others) == said


def test_what_compares_bits_is_refused_on_ranks_that_compute_differently_and_what_does_not_is_warned(capsys):
    with mock.patch.object(arithmetic, "differences", lambda comm: "NumPy: 2.4.6 on rank 0, 2.0.2 on rank 1"):
        with pytest.raises(AgreedError, match=r"^verify compares bits, and not all ranks compute alike: NumPy: "):
            arithmetic.require_alike(PROCESSES, "verify")
        arithmetic.warn_unless_alike(PROCESSES, console_for(0))
    assert capsys.readouterr().out.startswith("warning: not all ranks compute alike")


def test_a_process_computes_as_itself_and_what_it_computes_shows():
    mine = arithmetic.description()
    assert mine == arithmetic.description() and list(mine)[:2] == ["NumPy", "BLAS"]
    for name in ("products", "functions", "sums"):
        assert len({array.tobytes() for array in getattr(arithmetic, name)()}) > 5
    with mock.patch.object(arithmetic.np, "__version__", "1.0"):
        assert arithmetic.description()["NumPy"] == "1.0"


def test_virtual_ranks_are_one_process_and_need_not_ask_each_other():
    assert arithmetic.differences(SimpleNamespace(size=4, ranks_in_process=4)) == ""
