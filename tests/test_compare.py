"""The command `compare`: every schedule measured, one digest, a file only of whole results."""

import json

import pytest

from tsp_ref.cli import main

FIELDS = {"schedule", "mesh", "digest", "model_state_bytes", "activation_bytes", "peak_bytes", "forward_bytes_sent",
          "backward_bytes_sent", "messages", "balance", "step_seconds"}
SMALL = ["--preset", "tiny", "--set", "num_layers=1", "hidden_size=32", "ffn_size=48", "blocks=4", "tiles=8",
         "--steps", "1", "--text", __file__]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What a comparison on four virtual ranks writes."""
    path = tmp_path_factory.mktemp("compare") / "rows.json"
    assert main(["compare", "--ranks", "4", *SMALL, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_every_schedule_and_every_mesh_is_measured(rows):
    assert [(row["schedule"], row["mesh"]) for row in rows] == [
        ("single", None), ("tp", None), ("sp", None), ("tp+sp", "1x4"), ("tp+sp", "2x2"), ("tp+sp", "4x1"),
        ("fsdp+sp", None), ("tsp", None)]
    assert all(set(row) == FIELDS for row in rows)
    assert all(row["step_seconds"] > 0 for row in rows)


def test_all_schedules_have_one_digest(rows):
    assert len({row["digest"] for row in rows}) == 1 and len(rows[0]["digest"]) == 64


def test_a_mesh_with_an_axis_of_one_rank_is_tp_or_sp(rows):
    same = ("model_state_bytes", "forward_bytes_sent", "backward_bytes_sent", "messages", "balance")
    for one, other in ((rows[1], rows[5]), (rows[2], rows[3])):
        assert [one[field] for field in same] == [other[field] for field in same]


def test_tsp_holds_the_least_and_sends_more_than_sp(rows):
    single, tp, sp, *_, tsp = rows
    assert tsp["model_state_bytes"] == tp["model_state_bytes"] < single["model_state_bytes"] == sp["model_state_bytes"]
    assert tsp["activation_bytes"] == sp["activation_bytes"] < tp["activation_bytes"] < single["activation_bytes"]
    assert tsp["forward_bytes_sent"] > sp["forward_bytes_sent"] > single["forward_bytes_sent"] == 0
    assert all(row["balance"] == 1.0 for row in rows)


def test_the_contiguous_layout_is_out_of_balance_and_recomputation_keeps_less(rows, tmp_path):
    path = tmp_path / "rows.json"
    arguments = ["--layout", "contiguous", "--recompute", "full", "--json", str(path)]
    assert main(["compare", "--ranks", "2", *SMALL, *arguments]) == 0
    single, tp, *_, tsp = json.loads(path.read_text())
    assert {row["digest"] for row in (single, tp, tsp)} == {rows[0]["digest"]}
    assert tsp["balance"] > 1.05 and tp["balance"] == 1.0
    assert single["activation_bytes"] < rows[0]["activation_bytes"]


def test_what_cannot_be_dealt_out_is_left_out_and_said(capsys):
    assert main(["compare", "--ranks", "3", *SMALL, "--set", "blocks=2"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "left out: tp: ranks=3 is not possible: with blocks=2" in output
    assert "left out: tsp: ranks=3" in output
    assert "tp+sp 1x3" in output and "One digest" in output


def test_a_file_is_written_whole_or_not_at_all(tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text("earlier")
    assert main(["compare", "--ranks", "4", *SMALL, "--text", "/no/such/file", "--json", str(path)]) == 2
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]
    assert main(["compare", *SMALL, "--json", str(tmp_path / "no" / "rows.json")]) == 2
    assert "--json" in capsys.readouterr().err


def test_one_wrong_bit_is_a_failure(monkeypatch, capsys):
    from tsp_ref.schedules import sp

    honest = sp.gains_backward

    def drifting(comm, model, dgain, gradients):
        honest(comm, model, dgain, gradients)
        gradients.gains[0, 0] += comm.rank == 1

    monkeypatch.setattr(sp, "gains_backward", drifting)
    assert main(["compare", "--ranks", "2", *SMALL]) == 1
    assert "THE DIGESTS DIFFER" in capsys.readouterr().out


def test_a_run_that_does_not_stay_finite_is_refused_by_all_ranks(capsys):
    wild = ["--set", "learning_rate=1e30", "warmup_steps=0", "--steps", "3"]
    assert main(["compare", "--ranks", "2", "--preset", "tiny", "--text", __file__, *wild]) == 2
    assert "is not finite: lower learning_rate" in capsys.readouterr().err
