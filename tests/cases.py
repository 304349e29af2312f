"""What the tests of both folders share: configurations, plans, batches, and a model's parts bound to their context."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tsp_ref.arrays import Array
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather
from tsp_ref.comm.mesh import make_mesh
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.model.config import Config, make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import Parameters, bias_view, initial_parameters, named_views, zero_parameters
from tsp_ref.ops import attention
from tsp_ref.reference import single
from tsp_ref.schedules import fsdp_sp, sp, tp, tp_sp, tsp
from tsp_ref.schedules.gradients import AllReduceGradients
from tsp_ref.training.collect import digest
from tsp_ref.training.data import Text
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan, mesh_sides, meshes

MODULES = {"tp": tp, "sp": sp, "tp+sp": tp_sp, "fsdp+sp": fsdp_sp, "tsp": tsp}
"""Every schedule, by the name that a plan gives it."""

SMALL = dict(num_layers=2, hidden_size=32, ffn_size=48, seq_len=32)

CASES: dict[str, dict[str, Any]] = {
    "plain": dict(SMALL, num_heads=8, tiles=8),
    "grouped-query": dict(SMALL, hidden_size=64, num_heads=16, num_kv_heads=8, tiles=8),
    "tied head": dict(SMALL, num_layers=1, num_heads=8, tied_head=True, batch_size=1, tiles=8),
    "nine blocks, eleven tiles": dict(num_layers=1, hidden_size=36, num_heads=18, num_kv_heads=9, ffn_size=45,
                                      seq_len=33, vocab_size=261, blocks=9, tiles=11, batch_size=3),
    "every option": dict(SMALL, num_layers=1, num_heads=16, num_kv_heads=8, head_dim=6, tiles=8, vocab_size=261,
                         qkv_bias=True, qk_norm=True, rope_factor=8.0, rope_original_length=16),
}
"""Nine blocks and eleven tiles divide by no N but 1 and 3: every N owns unevenly, and tiles' trees have odd leaves."""


def case_config(case: str, dtype: str, **overrides: Any) -> Config:
    """A configuration that runs in milliseconds."""
    return make_config("tiny", **{**CASES[case], "dtype": dtype, "steps": 5, "warmup_steps": 2, **overrides})


def random_text(seed: int = 0) -> Text:
    """Random bytes: any loss above chance on them would be a mistake, and no two batches are alike."""
    bytes_ = np.random.default_rng(seed).integers(0, 256, size=6000, dtype=np.uint8)
    return Text(bytes_[:5000], bytes_[5000:], "random bytes")


def random_batch(config: Config, seed: int = 1) -> tuple[Array, Array]:
    """Whole tokens and targets, [B, S] each."""
    both = np.random.default_rng(seed).integers(0, config.vocab_size, size=(2, config.batch_size, config.seq_len))
    return both[0], both[1]


def cut(model: Model, whole: Array) -> Array:
    """A whole [B, S, ...] as this rank's tiles [p, B, s, ...]."""
    return np.stack([whole[:, model.grid.tokens(slot)] for slot in model.grid.slots])


def plans(schedule: str, ranks: int, **options: Any) -> list[Plan]:
    """Every way to run a schedule on so many ranks: one, or one for each mesh."""
    if schedule != "tp+sp":
        return [Plan(schedule, **options)]
    return [Plan(schedule, mesh, **options) for mesh in meshes(ranks)]


def single_training(config: Config, text: Text) -> Training:
    """The reference run."""
    return Training(config, VirtualWorld(1).communicators[0], Plan("single"), text, np)


def digest_after(config: Config, plan: Plan, comm: Communicator, steps: int) -> str:
    """The digest, on rank 0, of a run of some steps, after which no message is left in flight."""
    training = Training(config, comm, plan, random_text(), np)
    for _ in range(steps):
        training.step()
    text = digest(training)
    comm.finish()
    return text


def virtual_digest(config: Config, plan: Plan, ranks: int, seed: int | None = None, steps: int = 2) -> str:
    """The digest of a run on virtual ranks."""
    return VirtualWorld(ranks, seed).run(lambda comm: digest_after(config, plan, comm, steps))[0]


@cache
def single_digest(config: Config, steps: int = 2) -> str:
    """The digest of the single process."""
    return virtual_digest(config, Plan("single"), 1, steps=steps)


def perturbed_parameters(model: Model, seed: int = 7) -> Parameters:
    """Weights far from their initial symmetry: gains are not one, biases not zero, and softmaxes are not flat."""
    parameters = initial_parameters(model)
    gains = parameters.gains
    gains += 0.3 * np.random.default_rng(seed).standard_normal(gains.shape, dtype=gains.dtype)
    for number, (name, tensor) in enumerate(parameters.tensors()):
        tensor *= 8.0
        biases = bias_view(model.config, tensor) if name.endswith("attention") else None
        for bias, block in zip(() if biases is None else biases, model.grid.blocks):
            bias += 0.3 * np.random.default_rng([seed, number, block]).standard_normal(bias.shape, dtype=bias.dtype)
    return parameters


def cut_in_strips(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    """Attention's forward takes so many queries of a tile at a time, and remembers no other cut."""
    monkeypatch.setattr(attention, "STRIP", longest)
    monkeypatch.setattr(attention, "strips", attention.strips.__wrapped__)


class Calls:
    """The functions of a reference or schedule with their first arguments filled in: Calls(tsp, comm, model)."""

    def __init__(self, module: ModuleType, *context: Any) -> None:
        self._module, self._context = module, context

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(getattr(self._module, name), *self._context)


def gradient_gaps(calls: Calls, model: Model, total: Callable[[float], float], what: str) -> dict[str, float]:
    """For each matrix: how far its gradient is from central differences along a random direction.

    Relative to the gradient's norm, which is the size to expect of its product with a direction of unit variance.
    Copies of a block are moved alike, each by the rank that holds it, and count together as one: as their mean.

    what   "loss": the loss; "layers": the product of the last layer's output with a random cotangent
    total  sums a number over ranks
    """
    config, grid = model.config, model.grid
    of_block = parts_of_one(config.blocks, grid.blocks, total)
    of_gains = 1.0 / total(1.0)
    weights, gradients = perturbed_parameters(model), zero_parameters(model, "gradients")
    tokens, targets = (cut(model, whole) for whole in random_batch(config))
    shape = (config.batch_size, config.seq_len, config.hidden_size)
    cotangent = cut(model, np.random.default_rng(5).standard_normal(shape))
    value, backward = (_loss(calls, tokens, targets) if what == "loss"
                       else _layers(calls, model, tokens, cotangent, total))
    backward(weights, gradients)
    gaps = {}
    for name, views in _directions(config, grid.blocks, weights, gradients):
        if what == "layers" and name == "head":
            continue
        step = 2e-6
        products = squares = 0.0
        moves = []
        for weight, gradient, seed, block in views:
            direction = np.random.default_rng(seed).standard_normal(weight.shape)
            moves.append((weight, direction))
            part = of_gains if block is None else of_block[block]
            products += part * float(np.sum(gradient * direction))
            squares += part * float(np.sum(gradient * gradient))
        values = []
        for sign in (1.0, -2.0):
            for weight, direction in moves:
                weight += sign * step * direction
            values.append(value(weights))
        for weight, direction in moves:
            weight += step * direction
        analytic, numeric = total(products), (values[0] - values[1]) / (2 * step)
        norm = total(squares) ** 0.5
        gaps[name] = abs(analytic - numeric) / norm if norm else float("inf")
    return gaps


def parts_of_one(count: int, held: Collection[int], total: Callable[[float], float]) -> list[float]:
    """For each of `count` things that are dealt out, what this rank's copy counts for: the parts of all copies sum to
    one, and who holds none has no part."""
    return [(index in held) / total(float(index in held)) for index in range(count)]


def _directions(config: Config, blocks: range, weights: Parameters, gradients: Parameters) -> list[tuple[str, Any]]:
    """(matrix, [(its block's weights, gradient, seed, block)]) for every named matrix; seeds are keyed by matrix and
    block. The gains are in no block."""
    found: dict[str, list[tuple[Array, Array, list[int], int]]] = {}
    for number, ((name, tensor), (_, gradient)) in enumerate(zip(weights.tensors(), gradients.tensors())):
        for block, weight, slope in zip(blocks, tensor, gradient):
            slopes = named_views(config, name, slope)
            for field, view in named_views(config, name, weight).items():
                full = name if field == "table" else f"{name}.{field}"
                found.setdefault(full, []).append((view, slopes[field], [number, block, len(field)], block))
    return [*found.items(), ("gains", [(weights.gains, gradients.gains, [99], None)])]


def _loss(calls: Calls, tokens: Array, targets: Array) -> tuple[Any, Any]:
    def value(weights: Parameters) -> float:
        return calls.model_forward(weights, tokens, targets)[0]

    def backward(weights: Parameters, gradients: Parameters) -> None:
        calls.model_backward(calls.model_forward(weights, tokens, targets)[1], weights, gradients)

    return value, backward


def landed(result: Any) -> Any:
    """What a sub-layer's backward returns, run by itself: dx, if any, once its gradients in flight are written."""
    dx, in_flight = result if isinstance(result, tuple) else (None, result)
    if not hasattr(in_flight, "finish"):
        return in_flight  # nothing is: it is dx
    if isinstance(in_flight, AllReduceGradients):
        in_flight.gather()
    in_flight.finish()
    return dx


def _layers(
    calls: Calls, model: Model, tokens: Array, cotangent: Array, total: Callable[[float], float]
) -> tuple[Any, Any]:
    layers = range(model.config.num_layers)
    of_tile = np.array(parts_of_one(model.config.tiles, model.grid.slots, total))[list(model.grid.slots)]

    def forward(weights: Parameters) -> tuple[Array, list[Any]]:
        saved = []
        x = calls.embedding_forward(tokens, weights)
        for layer in layers:
            x, attention = calls.attention_forward(x, weights, layer)
            x, mlp = calls.mlp_forward(x, weights, layer)
            saved.append((attention, mlp))
        return x, saved

    def value(weights: Parameters) -> float:
        x, _ = forward(weights)
        return total(float(of_tile @ np.sum(x * cotangent, axis=(1, 2, 3))))

    def backward(weights: Parameters, gradients: Parameters) -> None:
        _, saved = forward(weights)
        dgain = np.zeros((len(model.grid.slots), *weights.gains.shape))
        dx = cotangent
        for layer in reversed(layers):
            dx = landed(calls.mlp_backward(dx, saved[layer][1], weights, layer, gradients, dgain))
            dx = landed(calls.attention_backward(dx, saved[layer][0], weights, layer, gradients, dgain))
        landed(calls.embedding_backward(dx, tokens, weights, gradients))
        calls.gains_backward(dgain, gradients)

    return value, backward


def sum_over(comm: Communicator | None) -> Callable[[float], float]:
    """Sums a number over all ranks of a communicator; without one, leaves it."""
    if comm is None:
        return lambda number: number
    return lambda number: float(sum(row[0] for row in all_gather(comm, np.array([number], dtype=np.float64))))


def single_calls(config: Config) -> tuple[Calls, Model]:
    """The single process's functions and its model."""
    model = Model(config, np)
    return Calls(single, model), model


def schedule_calls(config: Config, plan: Plan, comm: Communicator) -> tuple[Calls, Model]:
    """A schedule's functions and its model, as a rank has them."""
    module = MODULES[plan.schedule]
    ranks = make_mesh(comm, *mesh_sides(plan.mesh, comm.size)) if plan.schedule == "tp+sp" else comm
    model = Model(config, np, *module.place(ranks), layout=plan.layout, recompute=plan.recompute, stack=plan.stack)
    return Calls(module, ranks, model), model
