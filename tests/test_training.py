"""Training as a whole: against a textbook loop on whole arrays, and what the digest and the initial weights are."""

import json
import math

import numpy as np
import pytest
from cases import case_config, random_text, single_training

from tsp_ref.cli import main
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.grid.grid import folded
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import initial_parameters, named_views
from tsp_ref.reference import naive, single
from tsp_ref.training.collect import digest
from tsp_ref.training.data import Text
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

TRAIN = ["train", "--preset", "tiny", "--steps", "1", "--text", __file__, "--set", "num_layers=1", "hidden_size=32",
         "ffn_size=48", "warmup_steps=0"]


def refused(capsys, *arguments):
    """The one line with which the command line ends."""
    assert main([*TRAIN, *map(str, arguments)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


def strict(log):
    """A log's records, read by the letter of JSON."""
    def never(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=never) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_model_that_the_last_step_destroys_is_one_line_and_exit_code_2(ranks, capsys, tmp_path):
    log, broken = tmp_path / "log", ["--set", "learning_rate=1e20", "weight_decay=0"]
    assert "validation loss=nan at step 1 is not finite: lower learning_rate" in refused(
        capsys, *broken, "--log", log, "--ranks", ranks)
    assert [set(record) & {"start", "step", "validation_loss"} for record in strict(log)] == [{"start"}, {"step"}]


@pytest.mark.parametrize("norm", [math.inf, math.nan])
@pytest.mark.parametrize("command", ["train", "verify"])
def test_a_gradient_norm_that_is_not_finite_is_one_line_and_exit_code_2(norm, command, capsys, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setattr(Training, "update", lambda training: norm)
    assert main([command, *TRAIN[1:], "--ranks", "2", *(("--log", str(log)) if command == "train" else ())]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: gradient norm={norm} at step 1 is not finite: lower learning_rate")
    assert errors.count("\n") == 1
    assert command == "verify" or [set(record) & {"start", "step"} for record in strict(log)] == [{"start"}]


def leaves(weights):
    """(matrix or gains, whether it decays) of naive's weights, in one order."""
    names = [weights["embedding"]] + ([] if weights["head"] is None else [weights["head"]])
    matrices = names + [layer[name] for layer in weights["layers"] for name in sorted(layer)]
    return [(matrix, True) for matrix in matrices] + [(weights["gains"], False)]


def textbook_batch(config, text, number):
    """Batch `number` of the training text."""
    starts = np.random.default_rng([config.seed, 0, number]).integers(
        0, len(text.training) - config.seq_len, size=config.batch_size)
    rows = np.stack([text.training[start : start + config.seq_len + 1] for start in starts]).astype(np.int64)
    return rows[:, :-1], rows[:, 1:]


def textbook_rate(config, step):
    """Warm-up, then a cosine from the peak to a part of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    turn = math.pi * (step - config.warmup_steps) / (config.steps - 1 - config.warmup_steps)
    low = config.learning_rate * config.final_rate
    return low + (config.learning_rate - low) * (1 + math.cos(turn)) / 2


def textbook_training(config, weights, text):
    """Losses, and the weights after all steps: whole arrays, naive gradients, AdamW as in its paper."""
    moments = [(np.zeros_like(leaf), np.zeros_like(leaf)) for leaf, _ in leaves(weights)]
    losses = []
    for step in range(config.steps):
        result = naive.loss_and_gradients(config, weights, *textbook_batch(config, text, step))
        losses.append(result["loss"])
        gradients = [gradient for gradient, _ in leaves(result["gradients"])]
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        assert norm > config.clip_norm, "clipping must be at work, or this test says nothing of it"
        rate = textbook_rate(config, step)
        for (weight, decays), gradient, (first, second) in zip(leaves(weights), gradients, moments):
            clipped = gradient * config.clip_norm / norm
            first[...] = config.beta1 * first + (1 - config.beta1) * clipped
            second[...] = config.beta2 * second + (1 - config.beta2) * clipped**2
            ahead = first / (1 - config.beta1 ** (step + 1))
            spread = np.sqrt(second / (1 - config.beta2 ** (step + 1))) + config.adam_eps
            weight -= rate * (ahead / spread + config.weight_decay * decays * weight)
    return losses, moments


@pytest.mark.parametrize("case", ["grouped-query", "tied head"])
def test_five_steps_are_those_of_a_textbook_loop(case):
    config = case_config(case, "float64", clip_norm=0.1, weight_decay=0.3, adam_eps=1e-3, learning_rate=0.03)
    text = random_text()
    training = single_training(config, text)
    weights = naive.assemble(config, initial_parameters(training.model))
    losses, moments = textbook_training(config, weights, text)
    for _ in range(config.steps):
        training.step()
    assert training.losses == pytest.approx(losses, rel=1e-9)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-6), "the weights must move"
    optimizer = training.optimizer
    for parameters, wanted in (
        (training.weights, [leaf for leaf, _ in leaves(weights)]),
        (optimizer.first, [first for first, _ in moments]),
        (optimizer.second, [second for _, second in moments]),
    ):
        for (found, _), leaf in zip(leaves(naive.assemble(config, parameters)), wanted):
            assert np.max(np.abs(found - leaf)) < 1e-9 * np.max(np.abs(leaf))


def test_the_gradient_norm_is_that_of_all_gradients():
    training = single_training(case_config("plain", "float64"), random_text())
    _, saved = training.forward()
    training.strategy.backward(saved, training.weights, training.gradients)
    arrays = [tensor for _, tensor in training.gradients.tensors()] + [training.gradients.gains]
    wanted = math.sqrt(sum(float(np.sum(array**2)) for array in arrays))
    assert training.strategy.gradient_norm(training.gradients) == pytest.approx(wanted, rel=1e-12)


def test_validation_is_on_the_held_out_text_and_changes_nothing():
    text = Text(random_text(1).training, random_text(2).validation, "two texts")
    other = Text(random_text(1).training, random_text(3).validation, "another held out")
    runs = [single_training(case_config("plain", "float64", validation_batches=3), each) for each in (text, other)]
    before = runs[0].weights.embedding.copy()
    first, second = (run.validate() for run in runs)
    assert first != second
    assert runs[0].losses == [] and runs[0].validation_losses == [first]
    assert (runs[0].weights.embedding == before).all()
    assert len({run.forward()[0] for run in runs}) == 1, "the training text is the same"


def stepped(schedule, comm, steps=1):
    """A run with one layer after some steps and a validation."""
    config = case_config("plain", "float32", num_layers=1)
    training = Training(config, comm, Plan(schedule), random_text(), np)
    for _ in range(steps):
        training.step()
    training.validate()
    return training


def test_every_bit_that_a_run_made_is_in_its_digest():
    training = stepped("single", VirtualWorld(1).communicators[0])
    honest = digest(training)
    optimizer = training.optimizer
    tried = 0
    for parameters in (training.gradients, training.weights, optimizer.first, optimizer.second):
        for array in [*(block for _, tensor in parameters.tensors() for block in tensor), parameters.gains]:
            bits = array.reshape(-1).view(np.uint32)
            for position in (0, -1):
                bits[position] ^= 1
                assert digest(training) != honest
                bits[position] ^= 1
                tried += 1
    assert tried == 4 * 2 * (4 * training.config.blocks + 1)
    for losses in (training.losses, training.validation_losses):
        losses[0] = math.nextafter(losses[0], 9)
        assert digest(training) != honest
        losses[0] = math.nextafter(losses[0], 0)
    assert digest(training) == honest


@pytest.mark.parametrize("schedule, tensor", [
    ("tsp", "gains"), ("tp", "gains"), ("sp", "gains"), ("tp+sp", "gains"), ("sp", "embedding"), ("sp", "head"),
    ("sp", "layers.0.mlp"), ("tp+sp", "layers.0.attention")])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_copy_that_drifts_on_one_rank_is_in_the_digest(schedule, tensor, rank):
    def main(comm, drift):
        training = stepped(schedule, comm)
        if comm.rank == rank and drift:
            held = {**dict(training.weights.tensors()), "gains": training.weights.gains}[tensor]
            held.reshape(-1).view(np.uint32)[-1] ^= 1
        return digest(training)

    honest, drifted = (VirtualWorld(4).run(lambda comm, drift=drift: main(comm, drift))[0] for drift in (0, 1))
    assert honest == digest(stepped("single", VirtualWorld(1).communicators[0])) != drifted


def test_a_drift_that_all_copies_but_the_first_share_is_in_the_digest():
    def main(comm, drift):
        training = stepped("sp", comm)
        training.weights.embedding[0, 0, 0] += drift * (comm.rank > 0)
        return digest(training)

    honest, drifted = (VirtualWorld(3).run(lambda comm, drift=drift: main(comm, drift))[0] for drift in (0, 1))
    assert honest != drifted


def test_initial_weights_have_their_spread_whoever_draws_them():
    config = case_config("plain", "float32", hidden_size=128, ffn_size=256, num_layers=4)
    whole = initial_parameters(Model(config, np))
    assert (whole.gains == 1).all()
    for name, tensor in whole.tensors():
        for field in named_views(config, name, tensor[0]):
            values = np.concatenate([named_views(config, name, block)[field].ravel() for block in tensor])
            spread = 0.02 / math.sqrt(8) if field in ("wo", "down") else 0.02
            assert values.std() == pytest.approx(spread, rel=0.05) and abs(values.mean()) < spread / 20
    for size in (2, 3, 8):
        parts = [initial_parameters(Model(config, np, *folded(rank, size))) for rank in range(size)]
        for number, (_, tensor) in enumerate(whole.tensors()):
            joined = np.concatenate([list(part.tensors())[number][1] for part in parts])
            assert joined.tobytes() == tensor.tobytes()


def test_the_reference_needs_no_communicator():
    model = Model(case_config("plain", "float32"), np)
    assert single.gradient_norm(model, initial_parameters(model)) > 0
