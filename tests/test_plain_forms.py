"""Operations that are written for the cache, against the plain form that their docstring gives; and on a stack of
tiles, against the same on each tile alone, in every bit."""

import numpy as np
import pytest
from cases import cut_in_strips

from tsp_ref.ops import attention
from tsp_ref.ops.attention import add_keys, attend_backward, attend_forward, causal_mask, chunks_before, strips
from tsp_ref.ops.embedding import embed_backward, embed_forward
from tsp_ref.ops.loss import logits_backward, logits_forward, token_losses
from tsp_ref.ops.mlp import sigmoid, swiglu_backward, swiglu_forward
from tsp_ref.ops.norm import rmsnorm_backward, rmsnorm_forward
from tsp_ref.ops.rotary import rotary_backward, rotary_forward, rotary_table

LENGTH, QUERIES_A_KEY, HEAD = 8, 2, 6
ROWS, MOST = QUERIES_A_KEY * LENGTH, 5
BATCH, KEYS = 3, 2
STACKS = [[1], [2], [5], [2, 2], [1, 5, 2]]
"""How many tiles each tile of a stack sees, of the text's five."""


def random(*shape):
    """Random numbers, the same for the same shape."""
    return np.random.default_rng(shape).standard_normal(shape)


def tiles_and_text(count, dtype="float64"):
    """Queries and gradients of the heads of a stack's tiles, and the keys and values of the text."""
    q, dheads = random(count, BATCH, KEYS, ROWS, HEAD), random(count, BATCH, KEYS, ROWS, HEAD)[::-1] + 1
    keys_values = random(2, BATCH, KEYS, MOST * LENGTH, HEAD)
    return q.astype(dtype), dheads.astype(dtype), keys_values.astype(dtype)


def attend(q, dheads, keys_values, seen, blocks=1):
    """Forward and backward of a stack: heads, log-sum-exp, dq, and of each tile dk and dv."""
    mask, visible = causal_mask(np, LENGTH, str(q.dtype)), [LENGTH * tiles for tiles in seen]
    heads, logsumexp = np.empty_like(q), np.empty_like(q[..., :1])
    attend_forward(np, q, keys_values, visible, mask, out=(heads, logsumexp))
    dq, given = attend_backward(np, dheads, q, keys_values, visible, mask, heads, logsumexp, blocks)
    return heads, logsumexp, dq, given


def is_plain(q, dheads, keys_values, seen):
    """Assert that `attend` is the plain form of every tile."""
    heads, logsumexp, dq, given = attend(q, dheads, keys_values, seen)
    for tile, tiles in enumerate(seen):
        keys = tiles * LENGTH
        k, v = keys_values[:, :, :, :keys]
        position = np.tile(np.arange(keys - LENGTH, keys), QUERIES_A_KEY)[:, None]  # of each row's query
        scores = np.where(np.arange(keys) <= position, q[tile] @ k.swapaxes(-1, -2) / np.sqrt(HEAD), -np.inf)
        p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(heads[tile], p @ v, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(logsumexp[tile, ..., 0], np.log(np.exp(scores).sum(-1)), rtol=1e-12)

        mean = (dheads[tile] * heads[tile]).sum(-1, keepdims=True)
        dscores = p * (dheads[tile] @ v.swapaxes(-1, -2) - mean) / np.sqrt(HEAD)
        dk, dv = given[tile]
        np.testing.assert_allclose(dv, p.swapaxes(-1, -2) @ dheads[tile], rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(dq[tile], dscores @ k, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(dk, dscores.swapaxes(-1, -2) @ q[tile], rtol=1e-11, atol=1e-13)


def noted(monkeypatch, name):
    """The arguments of every call of one of attention's functions, as a list that fills."""
    honest, calls = getattr(attention, name), []

    def noting(*arguments, **named):
        calls.append((*arguments, *named.values()))
        return honest(*arguments, **named)

    monkeypatch.setattr(attention, name, noting)
    return calls


@pytest.mark.parametrize("seen", STACKS, ids=str)
@pytest.mark.parametrize("chunk", [8, 12, 24])
@pytest.mark.parametrize("diagonal", [8, 4, 3])
def test_attention_by_chunks_of_keys_is_attention_over_all_of_them(seen, chunk, diagonal, monkeypatch):
    q, dheads, keys_values = tiles_and_text(len(seen))
    monkeypatch.setattr(attention, "CHUNK_BYTES", chunk * BATCH * KEYS * ROWS * 8)
    monkeypatch.setattr(attention, "DIAGONAL", diagonal)
    before, own = noted(monkeypatch, "before_backward"), noted(monkeypatch, "own_backward")
    is_plain(q, dheads, keys_values, seen)
    assert len(own) == -(-LENGTH // diagonal)
    for tiles in seen:
        assert len(chunks_before(q, 1, [(tiles - 1) * LENGTH])) == -(-(tiles - 1) * LENGTH // chunk)
    assert len(before) >= -(-(max(seen) - 1) * LENGTH // chunk)


@pytest.mark.parametrize("longest", [8, 4, 3, 2])
@pytest.mark.parametrize("seen", STACKS, ids=str)
def test_a_tile_by_strips_of_queries_is_the_whole_tile(seen, longest, monkeypatch):
    cut_in_strips(monkeypatch, longest)
    taken = noted(monkeypatch, "attention_scores")
    sizes = {8: [8], 4: [4, 4], 3: [3, 3, 2], 2: [2, 2, 2, 2]}[longest]
    assert [strip.stop - strip.start for strip in attention.strips(LENGTH)] == sizes
    is_plain(*tiles_and_text(len(seen)), seen)
    assert sorted(scores.shape[-2] // QUERIES_A_KEY for *_, scores in taken) == sorted(sizes * len(seen))


def test_strips_are_few_and_nearly_as_long_as_each_other():
    for length in range(1, 600):
        sizes = [strip.stop - strip.start for strip in strips(length)]
        assert sum(sizes) == length and len(sizes) == -(-length // attention.STRIP)
        assert max(sizes) <= attention.STRIP and set(sizes[:-1]) <= {sizes[0]} and 0 < sizes[-1] <= sizes[0]
        assert sizes[0] - sizes[-1] < len(sizes)


def test_chunks_cover_the_keys_in_order_those_of_the_tile_itself_in_small_ones(monkeypatch):
    q = np.zeros((1, 1, 2, 256, 64), dtype=np.float32)
    for tiles in range(1, 9):
        chunks = chunks_before(q, 1, [256 * (tiles - 1)])
        assert [key for first, (width,) in chunks for key in range(first, first + width)] == list(
            range(256 * (tiles - 1)))
        assert all(width * 2 * 256 * 4 == attention.CHUNK_BYTES for _, (width,) in chunks)
    own = noted(monkeypatch, "own_backward")
    attend_backward(np, q, q, np.zeros((2, 1, 2, 512, 64), dtype=np.float32), [512], causal_mask(np, 256, "float32"), q,
                    q[..., :1])
    assert [(wide.shape[-2], count) for _, _, wide, _, count, _ in own] == [(64, 256), (64, 192), (64, 128), (64, 64)]


def test_tiles_that_are_taken_together_have_the_chunks_of_the_one_that_sees_most_and_each_its_own_part():
    q = np.zeros((3, 1, 2, 256, 64), dtype=np.float32)
    for before in ([0, 512, 256], [700, 300], [256]):
        chunks = chunks_before(q, 1, before)
        for tile, count in enumerate(before):
            alone = chunks_before(q, 1, [count])
            assert [(first, [widths[tile]]) for first, widths in chunks if widths[tile]] == alone
        assert chunks_before(np.repeat(q, 5, axis=1), 5, before) == chunks, "the chunks of five blocks are those of one"


@pytest.mark.parametrize("padded", [1, 3 * BATCH * KEYS * ROWS * 2 * LENGTH * 4, 1 << 30])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seen", STACKS, ids=str)
def test_a_tile_in_a_stack_attends_in_every_bit_as_alone_however_many_are_padded_together(
    seen, dtype, padded, monkeypatch
):
    cut_in_strips(monkeypatch, 4)
    monkeypatch.setattr(attention, "DIAGONAL", 3)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 12 * BATCH * KEYS * ROWS * 8)
    q, dheads, keys_values = tiles_and_text(len(seen), dtype)
    alone = [attend(q[tile : tile + 1], dheads[tile : tile + 1], keys_values, [seen[tile]])
             for tile in range(len(seen))]
    monkeypatch.setattr(attention, "PADDED_BYTES", padded)
    heads, logsumexp, dq, given = attend(q, dheads, keys_values, seen)
    for tile, one in enumerate(alone):
        for found, wanted in zip((heads[tile], logsumexp[tile], dq[tile], given[tile]),
                                 (one[0][0], one[1][0], one[2][0], one[3][0])):
            assert found.tobytes() == wanted.tobytes() and found.dtype == dtype


@pytest.mark.parametrize("seen", STACKS, ids=str)
def test_several_blocks_attend_at_a_time_in_every_bit_as_one_by_one(seen, monkeypatch):
    monkeypatch.setattr(attention, "DIAGONAL", 3)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 12 * KEYS * ROWS * 8)
    q, dheads, keys_values = tiles_and_text(len(seen))  # the three sequences: three blocks of one
    heads, logsumexp, dq, given = attend(q, dheads, keys_values, seen, blocks=BATCH)
    for block in range(BATCH):
        this = slice(block, block + 1)
        one = attend(q[:, this], dheads[:, this], keys_values[:, this], seen)
        for found, wanted in zip((heads, logsumexp, dq), one):
            assert found[:, this].tobytes() == wanted.tobytes()
        assert [part[:, this].tobytes() for part in given] == [part.tobytes() for part in one[3]]


def test_gradients_of_fewer_keys_are_added_to_the_head_of_those_of_more_whichever_is_left():
    short, long = random(2, 1, 2, 3, 4), random(2, 1, 2, 7, 4)
    wanted = long.copy()
    wanted[:, :, :, :3] += short
    for arguments in ((short, long), (long, short)):
        left, right = (part.copy() for part in arguments)
        found = add_keys(left, right)
        assert found.tobytes() == wanted.tobytes()
        assert found is (left if left.shape[3] == 7 else right), "in place"


def test_swiglu_in_place_is_the_plain_one():
    x, dy, gate_up, down = random(3, 2, 4, 10), random(3, 2, 4, 10)[::-1] + 1, random(10, 14), random(7, 10)
    projected = np.empty((3, 8, 14))
    y = swiglu_forward(np, x, gate_up, down, out=projected)
    out = np.empty((3, 10, 14)), np.empty((3, 7, 10))
    dx = swiglu_backward(np, dy, x, gate_up, down, projected, out)

    gate, up = np.split(x @ gate_up, 2, axis=-1)
    slope = 1 / (1 + np.exp(-gate))
    silu = gate * slope
    dhidden = dy @ down.T
    dprojected = np.concatenate([dhidden * up * (slope + silu * (1 - slope)), dhidden * silu], axis=-1)
    np.testing.assert_allclose(y, (silu * up) @ down, rtol=1e-12)
    np.testing.assert_allclose(dx, dprojected @ gate_up.T, rtol=1e-11)
    np.testing.assert_allclose(out[0], np.einsum("pbsi,pbso->pio", x, dprojected), rtol=1e-11)
    np.testing.assert_allclose(out[1], np.einsum("pbsi,pbso->pio", silu * up, dy), rtol=1e-11)
    np.testing.assert_allclose(projected.reshape(3, 2, 4, 14), x @ gate_up, rtol=1e-12)


def test_the_norm_s_gradient_is_that_of_the_plain_form():
    x, dy, gain = random(3, 2, 4, 10), random(3, 2, 4, 10)[::-1] + 1, random(10)
    y, into = rmsnorm_forward(np, x, gain, 1e-5), np.empty_like(x)
    dx, dgain = rmsnorm_backward(np, dy, x, gain, 1e-5, out=into)
    inverse = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    unit, dunit = x * inverse, dy * gain
    np.testing.assert_allclose(y, unit * gain, rtol=1e-13)
    np.testing.assert_allclose(dx, (dunit - unit * (dunit * unit).mean(-1, keepdims=True)) * inverse, rtol=1e-11)
    np.testing.assert_allclose(dgain, (dy * unit).sum((1, 2)), rtol=1e-11)
    assert dx is into


def test_a_rotation_by_whole_rows_is_that_of_the_two_halves():
    x = random(3, 2, 3, 5, 8)
    table = np.stack([rotary_table(np, first, 5, 8, 100.0, "float64") for first in (7, 0, 20)])
    angles = (np.array([7, 0, 20])[:, None] + np.arange(5))[:, None, None, :, None] * 100.0 ** (-np.arange(4) / 4)
    first, second = x[..., :4], x[..., 4:]
    y = np.concatenate([first * np.cos(angles) - second * np.sin(angles),
                        second * np.cos(angles) + first * np.sin(angles)], axis=-1)
    np.testing.assert_allclose(rotary_forward(np, x, table), y, rtol=1e-12, atol=1e-14)
    back = np.empty_like(x)
    rotary_backward(np, y, table, out=back)
    np.testing.assert_allclose(back, x, rtol=1e-12, atol=1e-14)


def test_a_position_far_into_the_text_is_not_rounded():
    table = rotary_table(np, 4097, 64, 16, 10000.0, "float32")
    angles = np.arange(4097, 4097 + 64)[:, None] * 10000.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(table[0, :, :8], np.cos(angles), atol=1e-3)
    np.testing.assert_allclose(table[1, :, 8:], np.sin(angles), atol=1e-3)


def of_each_tile(operation, stacked, *others):
    """What an operation returns and writes for tiles one at a time, joined."""
    alone = [operation(*(part[tile : tile + 1] for part in stacked), *others) for tile in range(len(stacked[0]))]
    return [np.concatenate(parts) for parts in zip(*alone)]


def swiglu(x, dy, gate_up, down):
    projected, out = np.empty((len(x), 8, 14)), (np.empty((len(x), 10, 14)), np.empty((len(x), 7, 10)))
    y = swiglu_forward(np, x, gate_up, down, out=projected)
    return y, projected, swiglu_backward(np, dy, x, gate_up, down, projected, out), *out


def norm(x, dy, gain):
    return rmsnorm_forward(np, x, gain, 1e-5), *rmsnorm_backward(np, dy, x, gain, 1e-5)


def head(x, targets, table):
    triple, out = logits_forward(np, x, table, targets, 4), np.empty((len(x), *table.shape))
    losses, logsumexp = token_losses(np, triple)
    return triple, losses, logits_backward(np, 0.1, x, table, targets, 4, logsumexp, out), out


def table_rows(dy, tokens, table):
    out = np.empty((len(dy), *table.shape))
    embed_backward(np, dy, tokens, 4, out)
    return embed_forward(np, tokens, table, 4), out


@pytest.mark.parametrize(("operation", "integers", "others"), [
    (swiglu, False, [(10, 14), (7, 10)]), (norm, False, [(10,)]), (head, True, [(9, 10)]),
    (table_rows, True, [(9, 10)])], ids=lambda part: getattr(part, "__name__", None))
def test_a_tile_in_a_stack_has_every_bit_that_it_has_alone(operation, integers, others):
    x = random(5, 2, 4, 10)
    tokens = np.random.default_rng(0).integers(0, 16, size=(5, 2, 4))
    stacked, rest = (x, tokens if integers else x[::-1] + 1), [random(*shape) for shape in others]
    together = operation(*stacked, *rest)
    for found, wanted in zip(together, of_each_tile(operation, stacked, *rest), strict=True):
        assert found.tobytes() == wanted.tobytes()


def test_the_sigmoid_of_any_number_is_finite():
    with np.errstate(all="raise", under="ignore"):
        assert list(sigmoid(np, np.array([-1e30, 0.0, 1e30], dtype=np.float32))) == [0.0, 0.5, 1.0]
