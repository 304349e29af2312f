"""Messages over real MPI: checked, counted, and matched at the end."""

import numpy as np
import pytest
from cases import case_config, random_text

from tsp_ref.comm.control import agreed, from_root, gather_texts
from tsp_ref.commands.holdings import activation_bytes, gain_bytes, model_state_bytes
from tsp_ref.errors import MessageError, UserError
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan


def neighbours(comm):
    """Left and right."""
    return (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size


@pytest.mark.ranks(2, 3, 4, 8)
def test_a_message_of_another_size_is_an_error_that_names_rank_peer_and_tag(comm):
    left, right = neighbours(comm)
    for sent, room in ((3, 4), (4, 3)):
        send = comm.Isend(np.zeros(sent), right, 5)
        receive = comm.Irecv(np.zeros(room), left, 5)
        with pytest.raises(MessageError, match=rf"on rank {comm.rank} from rank {left}, tag 5, \[{room}\] float64"):
            comm.Wait(receive)
        comm.Wait(send)
        comm._open.clear()
    comm.ledger.entries.clear()


@pytest.mark.ranks(2, 3, 4, 8)
def test_an_array_that_is_not_contiguous_is_refused(comm):
    _, right = neighbours(comm)
    with pytest.raises(MessageError, match="C-contiguous"):
        comm.Isend(np.zeros((4, 3)).T, right, 1)


@pytest.mark.ranks(2, 3, 4, 8)
def test_a_message_never_received_is_noticed_at_the_end(comm):
    left, right = neighbours(comm)
    comm.Wait(comm.Isend(np.zeros(2), right, 1))
    with pytest.raises(MessageError, match=rf"received 0 messages, 0 bytes from rank {left}, which sent 1 messages"):
        comm.finish()
    comm.Wait(comm.Irecv(np.zeros(2), left, 1))


@pytest.mark.ranks(2, 3, 4, 8)
def test_messages_of_one_tag_arrive_in_order_and_tags_do_not_mix(comm):
    left, right = neighbours(comm)
    tags = [1, 2, 1, 2, 1]
    received = [np.zeros(4, dtype=np.float32) for _ in tags]
    receives = [comm.Irecv(received[i], left, tags[i]) for i in (1, 0, 3, 2, 4)]
    sent = [np.random.default_rng([comm.rank, i]).standard_normal(4, dtype=np.float32) for i in range(5)]
    sends = [comm.Isend(sent[i], right, tags[i]) for i in range(5)]
    comm.Waitall(sends + receives)
    for i in range(5):
        assert received[i].tobytes() == np.random.default_rng([left, i]).standard_normal(4, dtype=np.float32).tobytes()


def test_texts_numbers_and_refusals_are_shared(comm):
    assert gather_texts(comm, f"rank {comm.rank}, ü") == [f"rank {rank}, ü" for rank in range(comm.size)]
    assert from_root(comm, comm.rank + 40) == 40

    def refuse_on_the_last():
        if comm.rank == comm.size - 1:
            raise UserError("no text here")
        return 1

    with pytest.raises(UserError, match="no text here"):
        agreed(comm, refuse_on_the_last)


def test_each_rank_holds_its_share_and_no_more_at_the_peak(comm):
    config = case_config("plain", "float32")
    training = Training(config, comm, Plan("tsp"), random_text(), np)
    for _ in range(2):
        training.step()
    memory, share = training.model.memory, len(training.model.grid.blocks) / config.blocks
    tiles = len(training.model.grid.slots) / config.tiles
    gains = gain_bytes(config)
    assert memory.model_state_peak - gains == (model_state_bytes(config) - gains) * share
    assert memory.peak["activations"] == activation_bytes(config) * tiles
