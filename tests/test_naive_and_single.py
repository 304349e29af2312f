"""The textbook model and the model on the grid agree to rounding: two programs that share no line of maths."""

import numpy as np
import pytest
from cases import CASES, case_config, cut, perturbed_parameters, random_batch

from tsp_ref.model.model import Model
from tsp_ref.model.parameters import zero_parameters
from tsp_ref.model.tilewise import normalise
from tsp_ref.reference import naive, single

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


def relative(found, wanted):
    """The largest difference, relative to the largest entry."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))


def both_models(case, dtype):
    """Loss, logits and gradients of single, assembled whole, and what naive returns."""
    config = case_config(case, dtype)
    model = Model(config, np)
    weights, gradients = perturbed_parameters(model), zero_parameters(model, "gradients")
    tokens, targets = random_batch(config)
    loss, saved = single.model_forward(model, weights, cut(model, tokens), cut(model, targets))
    last = normalise(model, saved.head.x, weights.gains[-1])
    logits = np.zeros((config.batch_size, config.seq_len, config.vocab_size), dtype=dtype)
    for slot, x in zip(model.grid.slots, last):
        logits[:, model.grid.tokens(slot)] = np.concatenate([x @ table.T for table in weights.head_table], -1)
    single.model_backward(model, saved, weights, gradients)
    wanted = naive.loss_and_gradients(config, naive.assemble(config, weights), tokens, targets)
    return loss, logits, naive.assemble(config, gradients), wanted


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient_of_naive_and_single_agree(case, dtype):
    loss, logits, gradients, wanted = both_models(case, dtype)
    gaps = {"loss": abs(loss - wanted["loss"]) / abs(wanted["loss"]), "logits": relative(logits, wanted["logits"])}
    for name in ("embedding", "head", "gains"):
        if wanted["gradients"][name] is not None:
            gaps[name] = relative(gradients[name], wanted["gradients"][name])
    for layer, matrices in enumerate(wanted["gradients"]["layers"]):
        for name, matrix in matrices.items():
            gaps[f"layers.{layer}.{name}"] = relative(gradients["layers"][layer][name], matrix)
    assert len(gaps) >= 11
    assert {name: gap for name, gap in gaps.items() if gap > TOLERANCE[dtype]} == {}
