"""How a program ends."""

import numpy as np
import pytest

from tsp_ref.errors import MessageError, UserError
from tsp_ref.process.launch import start


def test_a_program_ends_with_its_own_code():
    assert start(lambda comm: 0, ranks=3) == 0
    assert start(lambda comm: 7 * (comm.rank == 1), ranks=3) == 7


def test_a_program_that_leaves_a_message_in_flight_fails():
    def main(comm):
        if comm.rank == 0:
            comm.Isend(np.zeros(3), 1, 5)
        return 0

    with pytest.raises(MessageError, match=r"never completed: send on rank 0 to rank 1, tag 5|never received"):
        start(main, ranks=2)


def test_a_refusal_is_printed_once_and_is_exit_code_2(capsys):
    def main(comm):
        raise UserError("tiles=0 is not valid: use 1")

    assert start(main, ranks=4) == 2
    assert capsys.readouterr().err == "error: tiles=0 is not valid: use 1\n"
