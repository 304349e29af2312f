"""The backward by hand: each operation's gradient, judged by central differences and not by a falling loss.

Objective: after this lesson you can read each operation as a pair, a forward and the backward that someone derived by
hand; judge every pair, and the gradient of the whole model, by central differences along random directions; and show a
wrong gradient that still trains.

    mpirun -n 4 python lessons/04_backward_by_hand.py
    python lessons/04_backward_by_hand.py --ranks 4 --shuffle 7

A scalar is needed to differentiate, so a result y is weighed with a random cotangent dy: L = <dy, y>. Along a direction
u, the backward claims that L changes at the rate <gradient, u>; what L really does a step to either side is measured:
(L(x + step u) - L(x - step u)) / (2 step), the central difference.

Look at: the digits in which the two rates agree; then the same for a gradient that forgets the residual path, and the
loss that it trains to.

Try it: in `rotary_pair`, replace `rotary_backward(...)` by `rotary_forward(...)`: the gradient is turned on instead of
back. The check "rotary, x: ..." fails.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from stage import Lesson, random_weights, run

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tsp_ref.arrays import Array
from tsp_ref.comm.control import all_gather
from tsp_ref.grid.grid import share
from tsp_ref.model.config import Config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import Parameters, named_views, zero_parameters
from tsp_ref.ops.attention import (
    attend_backward,
    attend_forward,
    causal_mask,
    out_backward,
    out_backward_weight,
    out_forward,
)
from tsp_ref.ops.embedding import embed_backward, embed_forward
from tsp_ref.ops.loss import logits_backward, logits_forward, merge_triples, token_losses
from tsp_ref.ops.mlp import swiglu_backward, swiglu_forward
from tsp_ref.ops.norm import rmsnorm_backward, rmsnorm_forward
from tsp_ref.ops.projection import qkv_backward, qkv_forward
from tsp_ref.ops.rotary import rotary_backward, rotary_forward, rotary_table
from tsp_ref.reference import single

SEED = 2604
EPS, THETA = 1e-5, 10000.0
STEP = 1e-5
TOLERANCE = 1e-7
DIRECTIONS = 3
# An operation on its own: a stack of one tile of s tokens, and n = 2s keys that it sees; the rest is one block of
# weights.
B, s, h, e, n = 2, 5, 12, 6, 10
QUERY_HEADS, KV_HEADS, WIDTH, ROWS = 4, 2, 7, 9
# The whole model: several blocks, tiles and layers, so that every kind of sum takes part.
CONFIG = Config(vocab_size=32, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=24, seq_len=16,
                blocks=2, tiles=4, batch_size=2, dtype="float64")
TRAINING_STEPS, LEARNING_RATE = 30, 0.1


def norm(arrays: Sequence[Array]) -> float:
    """The Euclidean norm of several arrays taken as one vector."""
    return float(np.sqrt(sum(np.sum(array * array) for array in arrays)))


def inner(left: Sequence[Array], right: Sequence[Array]) -> float:
    """<left, right>, of several arrays taken as one vector."""
    return float(sum(np.sum(one * other) for one, other in zip(left, right)))


def directions(generator: np.random.Generator, point: list[Array]) -> list[list[Array]]:
    """A few random directions of length one in the space of some arrays."""
    drawn = [[generator.standard_normal(array.shape, dtype=np.float64) for array in point] for _ in range(DIRECTIONS)]
    return [[part / norm(direction) for part in direction] for direction in drawn]


def differences(loss: Callable[[list[Array]], float], point: list[Array], along: list[list[Array]]) -> list[float]:
    """The rate at which a loss changes along each direction, measured a step to either side of a point."""
    rates = []
    for direction in along:
        ahead, behind = ([x + step * part for x, part in zip(point, direction)] for step in (STEP, -STEP))
        rates.append((loss(ahead) - loss(behind)) / (2 * STEP))
    return rates


def claims(gradient: list[Array], along: list[list[Array]]) -> list[float]:
    """The rate that a gradient claims along each direction."""
    return [inner(gradient, direction) for direction in along]


def error(measured: Array, claimed: Array) -> float:
    """The distance of the rates along all directions, relative to the larger."""
    return float(np.linalg.norm(measured - claimed) / max(np.linalg.norm(measured), np.linalg.norm(claimed)))


def shared_out(lesson: Lesson, count: int, kinds: int, work: Callable[[int], list[list[float]]]) -> Array:
    """work(0), ..., work(count - 1), each done by one rank and known to all: [count, kinds of rates, DIRECTIONS]."""
    rates = np.zeros((count, kinds, DIRECTIONS), dtype=np.float64)
    for task in share(count, lesson.rank, lesson.size):
        rates[task] = work(task)
    # Where one rank has worked all others have zeros, so the sum is exact.
    return np.sum(all_gather(lesson.comm, rates), axis=0)


# Each operation on its own.


@dataclass
class Pair:
    """An operation's forward and backward, brought to one form.

    inputs    what is differentiated, by name
    forward   (*inputs) -> a tuple of results
    backward  (cotangents of the results, *inputs) -> a tuple with the gradient of each input
    """

    name: str
    inputs: dict[str, Array]
    forward: Callable[..., tuple[Array, ...]]
    backward: Callable[..., tuple[Array, ...]]


Draw = Callable[..., Array]


def rmsnorm_pair(draw: Draw) -> Pair:
    """RMSNorm: the scale depends on x too."""

    def forward(x: Array, gain: Array) -> tuple[Array, ...]:
        return (rmsnorm_forward(np, x, gain, EPS),)

    def backward(dy: tuple[Array], x: Array, gain: Array) -> tuple[Array, ...]:
        dx, dgain = rmsnorm_backward(np, dy[0], x, gain, EPS)
        return dx, dgain[0]

    return Pair("rmsnorm", {"x": draw(1, B, s, h), "gain": draw(h)}, forward, backward)


def rotary_pair(draw: Draw) -> Pair:
    """The rotary embedding, of a tile that begins at position s."""
    table = rotary_table(np, s, s, e, THETA, "float64")[None]  # [1, 2, s, e]

    def forward(x: Array) -> tuple[Array, ...]:
        return (rotary_forward(np, x, table),)

    def backward(dy: tuple[Array], x: Array) -> tuple[Array, ...]:
        return (rotary_backward(np, dy[0], table),)

    return Pair("rotary", {"x": draw(1, B, QUERY_HEADS, s, e)}, forward, backward)


def qkv_pair(draw: Draw) -> Pair:
    """The projection to queries, and to keys and values; two results, so two cotangents."""
    table = rotary_table(np, s, s, e, THETA, "float64")[None]  # [1, 2, s, e]

    def forward(x: Array, wqkv: Array) -> tuple[Array, ...]:
        q = np.empty((1, B, KV_HEADS, QUERY_HEADS // KV_HEADS * s, e), dtype=np.float64)
        keys_values = np.empty((1, 2, B, KV_HEADS, s, e), dtype=np.float64)
        qkv_forward(np, x, wqkv, table, out=(q, keys_values))
        return q, keys_values

    def backward(dy: tuple[Array, Array], x: Array, wqkv: Array) -> tuple[Array, ...]:
        dwqkv = np.empty_like(wqkv[None])
        return qkv_backward(np, *dy, x, wqkv, table, out=dwqkv), dwqkv[0]

    return Pair("qkv", {"x": draw(1, B, s, h), "wqkv": draw(h, (QUERY_HEADS + 2 * KV_HEADS) * e)}, forward, backward)


def attend_pair(draw: Draw) -> Pair:
    """Causal attention of a tile to itself and the tile before; the backward has kept only the log-sum-exp."""
    mask = causal_mask(np, s, "float64")  # [s, s]

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        heads, logsumexp = np.empty_like(q), np.empty_like(q[..., :1])
        attend_forward(np, q, np.stack([k, v]), [n], mask, out=(heads, logsumexp))
        return heads, logsumexp

    def forward(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        return (attend(q, k, v)[0],)

    def backward(dy: tuple[Array], q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        dq, [(dk, dv)] = attend_backward(np, dy[0], q, np.stack([k, v]), [n], mask, *attend(q, k, v))
        return dq, dk, dv

    queries = draw(1, B, KV_HEADS, QUERY_HEADS // KV_HEADS * s, e)  # [1, B, K/G, g*s, e]
    keys, values = draw(B, KV_HEADS, n, e), draw(B, KV_HEADS, n, e)  # [B, K/G, n, e], [B, K/G, n, e]
    return Pair("attend", {"q": queries, "k": keys, "v": values}, forward, backward)


def out_pair(draw: Draw) -> Pair:
    """The output projection, whose two gradients are functions of their own."""

    def forward(heads: Array, wo: Array) -> tuple[Array, ...]:
        return (out_forward(np, heads, wo, s),)

    def backward(dy: tuple[Array], heads: Array, wo: Array) -> tuple[Array, ...]:
        dwo = np.empty_like(wo[None])
        out_backward_weight(np, dy[0], heads, out=dwo)
        return out_backward(np, dy[0], heads, wo), dwo[0]

    heads = draw(1, B, KV_HEADS, QUERY_HEADS // KV_HEADS * s, e)  # [1, B, K/G, g*s, e]
    return Pair("out", {"heads": heads, "wo": draw(QUERY_HEADS * e, h)}, forward, backward)


def swiglu_pair(draw: Draw) -> Pair:
    """The gated MLP; its backward is given what the forward has kept."""
    projected = np.empty((1, B * s, 2 * WIDTH), dtype=np.float64)  # [1, B*s, 2*f/G]

    def forward(x: Array, gate_up: Array, down: Array) -> tuple[Array, ...]:
        return (swiglu_forward(np, x, gate_up, down, out=projected),)

    def backward(dy: tuple[Array], x: Array, gate_up: Array, down: Array) -> tuple[Array, ...]:
        forward(x, gate_up, down)
        dgate_up, ddown = np.empty_like(gate_up[None]), np.empty_like(down[None])
        dx = swiglu_backward(np, dy[0], x, gate_up, down, projected, out=(dgate_up, ddown))
        return dx, dgate_up[0], ddown[0]

    gate_up, down = draw(h, 2 * WIDTH), draw(WIDTH, h)  # [h, 2*f/G], [f/G, h]
    return Pair("swiglu", {"x": draw(1, B, s, h), "gate_up": gate_up, "down": down}, forward, backward)


def embed_pair(draw: Draw) -> Pair:
    """The embedding by the second of three blocks: most tokens are in other blocks, some occur more than once."""
    tokens = np.random.default_rng([SEED, 1]).integers(0, 3 * ROWS, (1, B, s), dtype=np.int64)

    def forward(table: Array) -> tuple[Array, ...]:
        return (embed_forward(np, tokens, table, ROWS),)

    def backward(dy: tuple[Array], table: Array) -> tuple[Array, ...]:
        dtable = np.empty_like(table[None])
        embed_backward(np, dy[0], tokens, ROWS, out=dtable)
        return (dtable[0],)

    return Pair("embed", {"table": draw(ROWS, h)}, forward, backward)


def logits_pair(draw: Draw) -> Pair:
    """Head and cross-entropy over two blocks of the vocabulary, merged; the cotangent is the loss's own scale."""
    targets = np.random.default_rng([SEED, 2]).integers(0, 2 * ROWS, (1, B, s), dtype=np.int64)

    def losses(x: Array, table: Array) -> tuple[Array, Array]:
        triples = [logits_forward(np, x, block, targets, first) for block, first in zip(table, (0, ROWS))]
        return token_losses(np, merge_triples(np, *triples))

    def forward(x: Array, table: Array) -> tuple[Array, ...]:
        return (np.sum(losses(x, table)[0], keepdims=True),)

    def backward(dy: tuple[Array], x: Array, table: Array) -> tuple[Array, ...]:
        scale, logsumexp, dtable = dy[0].item(), losses(x, table)[1], np.empty_like(table)
        dx = [logits_backward(np, scale, x, block, targets, first, logsumexp, out=out[None])
              for block, first, out in zip(table, (0, ROWS), dtable)]
        return dx[0] + dx[1], dtable

    return Pair("logits", {"x": draw(1, B, s, h), "table": draw(2, ROWS, h)}, forward, backward)


PAIRS = (rmsnorm_pair, rotary_pair, qkv_pair, attend_pair, out_pair, swiglu_pair, embed_pair, logits_pair)


def judge_input(pair: Pair, number: int, generator: np.random.Generator) -> list[list[float]]:
    """The rates of <dy, forward> in one of a pair's inputs, the others held still: as measured, as claimed."""
    inputs = list(pair.inputs.values())
    dy = tuple(generator.standard_normal(result.shape, dtype=np.float64) for result in pair.forward(*inputs))

    def loss(moved: list[Array]) -> float:
        return inner(dy, pair.forward(*inputs[:number], *moved, *inputs[number + 1 :]))

    point, gradient = [inputs[number]], [pair.backward(dy, *inputs)[number]]
    along = directions(generator, point)
    return [differences(loss, point, along), claims(gradient, along)]


def show_pairs(lesson: Lesson) -> None:
    """The rates of every operation in every input, as measured and as claimed."""
    lesson.part("Each operation: what a step does, and what the backward claims")
    pairs = [make(drawer(index)) for index, make in enumerate(PAIRS)]
    tasks = [(pair, number) for pair in pairs for number in range(len(pair.inputs))]
    rates = shared_out(lesson, len(tasks), 2,
                       lambda task: judge_input(*tasks[task], np.random.default_rng([SEED, 4, task])))
    lesson.say(f"{len(pairs)} operations in float64, {DIRECTIONS} random directions in each input; the ranks share out "
               f"the {len(tasks)} inputs. Shown: the rates along the first direction, and the error over all, at most "
               f"{TOLERANCE:.0e}.")
    for (pair, number), (measured, claimed) in zip(tasks, rates):
        found = error(measured, claimed)
        lesson.check(f"{pair.name + ', ' + list(pair.inputs)[number] + ':':<18} {measured[0]:+14.10f} measured, "
                     f"{claimed[0]:+14.10f} by hand, error {found:.0e}", found < TOLERANCE)


def drawer(key: int) -> Draw:
    """A function that draws arrays of a shape, the same on every rank."""
    generator = np.random.default_rng([SEED, 3, key])
    return lambda *shape: generator.standard_normal(shape, dtype=np.float64)


# The gradient of the whole model, and a copy of it that forgets the residual path.


@dataclass
class Problem:
    """A model with random weights, and one batch; the same on every rank."""

    model: Model
    weights: Parameters
    tokens: Array  # [p, B, s]
    targets: Array  # [p, B, s]


def make_problem() -> Problem:
    """Drawn from one seed on every rank."""
    model, generator = Model(CONFIG, np), np.random.default_rng([SEED, 5])
    weights = random_weights(model, generator)
    text = generator.integers(0, CONFIG.vocab_size, (2, CONFIG.batch_size, CONFIG.seq_len), dtype=np.int64)
    tokens, targets = (  # [B, S] -> [p, B, s]
        np.stack([whole[:, model.grid.tokens(slot)] for slot in model.grid.slots]) for whole in text)
    return Problem(model, weights, tokens, targets)


def matrices(parameters: Parameters) -> Iterator[tuple[str, list[Array]]]:
    """Every named matrix as views of its blocks; and the gains."""
    for name, tensor in parameters.tensors():
        blocks = [named_views(CONFIG, name, block) for block in tensor]
        for matrix in blocks[0]:
            yield name if matrix == "table" else f"{name}.{matrix}", [views[matrix] for views in blocks]
    yield "gains", [parameters.gains]


def passed_on(dx: Array, dy: Array, residual: bool) -> Array:
    """y = x + f(x), so a sub-layer's backward returns dy + what comes back through f. The mistake: without dy."""
    return dx if residual else dx - dy


def loss_and_gradient(problem: Problem, weights: Parameters, residual: bool = True) -> tuple[float, Parameters]:
    """`single.model_backward`, written out; residual=False is the same with one mistake."""
    model, gradients = problem.model, zero_parameters(problem.model, "gradients")
    loss, saved = single.model_forward(model, weights, problem.tokens, problem.targets)
    dgain = np.empty((len(model.grid.slots), *weights.gains.shape), dtype=np.float64)  # [p, 2L+1, h]
    dx = single.head_backward(model, saved.head, problem.targets, weights, gradients, dgain)
    for layer in reversed(range(CONFIG.num_layers)):
        dy, dx = dx, single.mlp_backward(model, dx, saved.mlp.pop(), weights, layer, gradients, dgain)
        dx = passed_on(dx, dy, residual)
        dy, dx = dx, single.attention_backward(model, dx, saved.attention.pop(), weights, layer, gradients, dgain)
        dx = passed_on(dx, dy, residual)
    single.embedding_backward(model, dx, problem.tokens, weights, gradients)
    single.gains_backward(model, dgain, gradients)
    return loss, gradients


def judge_matrix(problem: Problem, number: int, gradients: list[Parameters]) -> list[list[float]]:
    """The rates of the model's loss in one matrix: as measured, and as each gradient claims."""
    weights = copy.deepcopy(problem.weights)
    _, views = list(matrices(weights))[number]

    def loss(moved: list[Array]) -> float:
        for view, value in zip(views, moved):
            view[...] = value
        return single.model_forward(problem.model, weights, problem.tokens, problem.targets)[0]

    point = [view.copy() for view in views]
    along = directions(np.random.default_rng([SEED, 6, number]), point)
    claimed = [claims(list(matrices(gradient))[number][1], along) for gradient in gradients]
    return [differences(loss, point, along), *claimed]


def show_model(lesson: Lesson, problem: Problem) -> None:
    """The rates of the loss in every matrix: as measured, and as a right and a wrong gradient claim."""
    lesson.part("The whole model: a right gradient, and one without the residual")
    names = [name for name, _ in matrices(problem.weights)]
    gradients = [loss_and_gradient(problem, problem.weights, residual)[1] for residual in (True, False)]
    rates = shared_out(lesson, len(names), 3, lambda task: judge_matrix(problem, task, gradients))
    lesson.say(f"L = {CONFIG.num_layers} layers, {CONFIG.num_parameters:,} parameters, {DIRECTIONS} random directions "
               "in each matrix. The wrong gradient is a copy of the right one in which each sub-layer's backward "
               "returns only what comes through it, without dy, which passes beside it:")
    lesson.say(rates_table(names, rates))
    twins = zip(every_array(gradients[0]), every_array(by_single(problem)))
    lesson.check("the right gradient is, bit for bit, that of single.model_backward",
                 all(one.tobytes() == other.tobytes() for one, other in twins))
    check_errors(lesson, {name: error(measured, right) for name, (measured, right, _) in zip(names, rates)},
                 {name: error(measured, wrong) for name, (measured, _, wrong) in zip(names, rates)})


def check_errors(lesson: Lesson, right: dict[str, float], wrong: dict[str, float]) -> None:
    """The right gradient passes everywhere; the wrong one fails exactly where it should."""
    lesson.check(f"right: the error is below {TOLERANCE:.0e} in all {len(right)} matrices (the largest is "
                 f"{max(right.values()):.0e})", all(found < TOLERANCE for found in right.values()))
    # Between these and the loss lies no residual, so even the wrong backward has them right.
    last = f"layers.{CONFIG.num_layers - 1}.mlp"
    untouched = {"head", f"{last}.gate", f"{last}.up", f"{last}.down"}
    lesson.check("wrong: refused (error above 0.01) in every matrix that has a residual between itself and the loss",
                 all(found > 0.01 for name, found in wrong.items() if name not in untouched))
    lesson.check("wrong: right all the same in the head and the last MLP, where no dy was lost",
                 all(wrong[name] < TOLERANCE for name in untouched))


def every_array(parameters: Parameters) -> list[Array]:
    """All arrays of some parameters."""
    return [array for _, views in matrices(parameters) for array in views]


def by_single(problem: Problem) -> Parameters:
    """The project's own backward in one process."""
    gradients = zero_parameters(problem.model, "gradients")
    _, saved = single.model_forward(problem.model, problem.weights, problem.tokens, problem.targets)
    single.model_backward(problem.model, saved, problem.weights, gradients)
    return gradients


def rates_table(names: list[str], rates: Array) -> Table:
    """A row per matrix: the rates along the first direction, and the errors over all."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("matrix")
    for heading in ("measured", "right", "error", "no residual", "error"):
        table.add_column(heading, justify="right")
    for name, (measured, right, wrong) in zip(names, rates):
        errors = [error(measured, claimed) for claimed in (right, wrong)]
        colors = ["green" if found < TOLERANCE else "red" for found in errors]
        first, second = (f"[{color}]{found:.0e}[/]" for color, found in zip(colors, errors))
        table.add_row(name, f"{measured[0]:+.8f}", f"{right[0]:+.8f}", first, f"{wrong[0]:+.8f}", second)
    return table


# A falling loss is no evidence.


def train(problem: Problem, residual: bool) -> list[float]:
    """The losses of plain gradient descent on the batch, by the right gradient or by the wrong one."""
    weights, losses = copy.deepcopy(problem.weights), []
    for _ in range(TRAINING_STEPS + 1):
        loss, gradients = loss_and_gradient(problem, weights, residual)
        losses.append(loss)
        for (_, views), (_, slopes) in zip(matrices(weights), matrices(gradients)):
            for view, slope in zip(views, slopes):
                view -= LEARNING_RATE * slope
    return losses


def show_training(lesson: Lesson, problem: Problem) -> None:
    """The first rank trains with the right gradient, the last with the wrong one."""
    lesson.part("A falling loss is no evidence")
    mine = np.zeros((2, TRAINING_STEPS + 1), dtype=np.float64)
    for number, (trainer, residual) in enumerate(((0, True), (lesson.size - 1, False))):
        if lesson.rank == trainer:
            mine[number] = train(problem, residual)
    right, wrong = np.sum(all_gather(lesson.comm, mine), axis=0)
    lesson.say(f"{TRAINING_STEPS} steps of plain gradient descent on one batch, from the same weights; loss in nats:")
    shown = range(0, TRAINING_STEPS + 1, TRAINING_STEPS // 5)
    for text, losses in (("right", right), ("no residual", wrong)):
        lesson.say(f"  {text:<12} " + "  ".join(f"step {step:2} {losses[step]:.4f}" for step in shown))
    lesson.check("with the right gradient the loss falls, by more than half", bool(right[-1] < 0.5 * right[0]))
    lesson.check("with the wrong one it falls too, by more than a third", bool(wrong[-1] < 2 / 3 * wrong[0]))
    lesson.say("Whoever sees the second run alone sees a model that learns. Central differences refuse it at step 0.")


def main(lesson: Lesson) -> None:
    """The lesson on one rank."""
    show_pairs(lesson)
    problem = make_problem()
    show_model(lesson, problem)
    show_training(lesson, problem)


if __name__ == "__main__":
    run(__doc__, main)
