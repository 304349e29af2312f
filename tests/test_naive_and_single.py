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


def both_models(case, dtype, **changes):
    """Loss, logits and gradients of single, assembled whole, and what naive returns."""
    config = case_config(case, dtype, **changes)
    model = Model(config, np)
    weights, gradients = perturbed_parameters(model), zero_parameters(model, "gradients")
    tokens, targets = random_batch(config)
    loss, saved = single.model_forward(model, weights, cut(model, tokens), cut(model, targets))
    last = normalise(model, saved.head.x, weights.gains[-1]).x
    logits = np.zeros((config.batch_size, config.seq_len, config.vocab_size), dtype=dtype)
    for slot, x in zip(model.grid.slots, last):
        of_rows = np.concatenate([x @ table.T for table in weights.head_table], -1)
        logits[:, model.grid.tokens(slot)] = of_rows[..., : config.vocab_size]
    single.model_backward(model, saved, weights, gradients)
    wanted = naive.loss_and_gradients(config, naive.assemble(config, weights), tokens, targets)
    return loss, logits, naive.assemble(config, gradients), wanted


def too_large(loss, logits, gradients, wanted, tolerance):
    """The gaps between both models that are no rounding."""
    gaps = {"loss": abs(loss - wanted["loss"]) / abs(wanted["loss"]), "logits": relative(logits, wanted["logits"])}
    for name in ("embedding", "head", "gains"):
        if wanted["gradients"][name] is not None:
            gaps[name] = relative(gradients[name], wanted["gradients"][name])
    for layer, matrices in enumerate(wanted["gradients"]["layers"]):
        for name, matrix in matrices.items():
            gaps[f"layers.{layer}.{name}"] = relative(gradients["layers"][layer][name], matrix)
    assert len(gaps) >= 11
    return {name: gap for name, gap in gaps.items() if not gap <= tolerance}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient_of_naive_and_single_agree(case, dtype):
    assert too_large(*both_models(case, dtype), TOLERANCE[dtype]) == {}


@pytest.mark.parametrize("changes", [
    dict(rope_theta=500000.0), dict(norm_eps=0.01), dict(blocks=4), dict(blocks=1)], ids=str)
def test_they_agree_with_other_constants_and_with_several_key_value_heads_in_a_block(changes):
    """Sixteen query heads and eight key/value heads, two or all of them in a block."""
    assert too_large(*both_models("grouped-query", "float64", **changes), TOLERANCE["float64"]) == {}


def in_float64(weights):
    """The textbook's weights, all of them wider."""
    if isinstance(weights, dict):
        return {name: in_float64(part) for name, part in weights.items()}
    if isinstance(weights, list):
        return [in_float64(part) for part in weights]
    return None if weights is None else weights.astype(np.float64)


@pytest.mark.parametrize("large", ["attention", "head"])
def test_scores_and_logits_whose_exponential_overflows_are_the_textbook_s(large):
    config = case_config("grouped-query", "float32", num_layers=1)
    model = Model(config, np)
    weights, gradients = perturbed_parameters(model), zero_parameters(model, "gradients")
    for tensor in weights.attention if large == "attention" else [weights.head]:
        tensor *= 60.0
    tokens, targets = random_batch(config)
    with np.errstate(over="raise", invalid="raise"):
        loss, saved = single.model_forward(model, weights, cut(model, tokens), cut(model, targets))
        single.model_backward(model, saved, weights, gradients)
    wanted = naive.loss_and_gradients(config, in_float64(naive.assemble(config, weights)), tokens, targets)
    if large == "attention":
        assert max(np.max(part) for part in saved_logsumexp(config, weights, tokens, targets)) > 89
    else:
        assert np.max(wanted["logits"]) > 89
    assert abs(loss - wanted["loss"]) < 1e-3 * wanted["loss"]
    assert all(np.all(np.isfinite(tensor)) for _, tensor in gradients.tensors())


def saved_logsumexp(config, weights, tokens, targets):
    """Of the scores of every block's queries: above 88.7 a float32 has no exponential."""
    model = Model(config, np)
    _, saved = single.model_forward(model, weights, cut(model, tokens), cut(model, targets))
    return list(saved.attention[0].logsumexp.values())
