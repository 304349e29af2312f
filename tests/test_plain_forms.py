"""Operations that are written for the cache, against the plain form that their docstring gives."""

import numpy as np
import pytest

from tsp_ref.ops import attention
from tsp_ref.ops.attention import attend_backward, attend_forward, causal_mask, key_chunks, strips
from tsp_ref.ops.mlp import sigmoid, swiglu_backward, swiglu_forward
from tsp_ref.ops.norm import rmsnorm_backward, rmsnorm_forward
from tsp_ref.ops.rotary import rotary_backward, rotary_forward, rotary_table

LENGTH, QUERIES_A_KEY, HEAD = 8, 2, 6


def random(*shape):
    """Random numbers, the same for the same shape."""
    return np.random.default_rng(shape).standard_normal(shape)


@pytest.mark.parametrize("tiles", [1, 2, 5])
@pytest.mark.parametrize("chunk", [8, 12, 24])
@pytest.mark.parametrize("diagonal", [8, 4, 3])
def test_attention_by_chunks_of_keys_is_attention_over_all_of_them(tiles, chunk, diagonal, monkeypatch):
    rows, keys = QUERIES_A_KEY * LENGTH, tiles * LENGTH
    q, dheads = random(3, 2, rows, HEAD), random(3, 2, rows, HEAD) + 1
    k, v = random(3, 2, keys, HEAD), random(3, 2, keys, HEAD) - 1
    mask = causal_mask(np, LENGTH, "float64")
    monkeypatch.setattr(attention, "CHUNK_BYTES", chunk * 3 * 2 * rows * 8)
    monkeypatch.setattr(attention, "DIAGONAL", diagonal)
    assert len(key_chunks(q, keys, LENGTH)) == -(-(tiles - 1) * LENGTH // chunk) + -(-LENGTH // diagonal)

    position = np.tile(np.arange(keys - LENGTH, keys), QUERIES_A_KEY)[:, None]  # of each row's query
    scores = np.where(np.arange(keys) <= position, q @ k.swapaxes(-1, -2) / np.sqrt(HEAD), -np.inf)
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    heads, logsumexp = attend_forward(np, q, k, v, mask)
    np.testing.assert_allclose(heads, p @ v, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(logsumexp[..., 0], np.log(np.exp(scores).sum(-1)), rtol=1e-12)

    dq, (dk, dv) = attend_backward(np, dheads, q, k, v, mask, heads, logsumexp)
    dscores = p * (dheads @ v.swapaxes(-1, -2) - (dheads * heads).sum(-1, keepdims=True)) / np.sqrt(HEAD)
    np.testing.assert_allclose(dv, p.swapaxes(-1, -2) @ dheads, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(dq, dscores @ k, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(dk, dscores.swapaxes(-1, -2) @ q, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("longest", [8, 4, 3, 2])
def test_a_tile_by_strips_of_queries_is_the_whole_tile(longest, monkeypatch):
    rows, keys = QUERIES_A_KEY * LENGTH, 3 * LENGTH
    q, dheads, k, v = random(3, 2, rows, HEAD), random(3, 2, rows, HEAD) + 1, random(3, 2, keys, HEAD), \
        random(3, 2, keys, HEAD) - 1
    mask = causal_mask(np, LENGTH, "float64")
    whole = attend_forward(np, q, k, v, mask)
    whole_gradients = attend_backward(np, dheads, q, k, v, mask, *whole)
    monkeypatch.setattr(attention, "STRIP", longest)
    assert [strip.stop - strip.start for strip in strips(LENGTH)] == {8: [8], 4: [4, 4]}.get(longest, [2] * 4)
    for found, wanted in zip(attend_forward(np, q, k, v, mask), whole):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)
    for found, wanted in zip(attend_backward(np, dheads, q, k, v, mask, *whole), whole_gradients):
        np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-13)


def test_chunks_cover_the_keys_in_order_those_of_the_tile_itself_in_small_ones():
    q = np.zeros((1, 2, 256, 64), dtype=np.float32)
    for tiles in range(1, 9):
        chunks = key_chunks(q, 256 * tiles, 256)
        assert [key for chunk, _ in chunks for key in range(chunk.start, chunk.stop)] == list(range(256 * tiles))
        earlier, own = chunks[:-4], chunks[-4:]
        assert all((chunk.stop - chunk.start) * 2 * 256 * 4 == attention.CHUNK_BYTES for chunk, _ in earlier)
        assert [(chunk.stop - chunk.start, first) for chunk, first in own] == [(64, 0), (64, 64), (64, 128), (64, 192)]


def test_swiglu_in_place_is_the_plain_one():
    x, dy, gate_up, down = random(2, 4, 10), random(2, 4, 10) + 1, random(10, 14), random(7, 10)
    y, projected = swiglu_forward(np, x, gate_up, down)
    out = np.empty_like(gate_up), np.empty_like(down)
    dx = swiglu_backward(np, dy, x, gate_up, down, projected, out)

    gate, up = np.split(x @ gate_up, 2, axis=-1)
    slope = 1 / (1 + np.exp(-gate))
    silu = gate * slope
    dhidden = dy @ down.T
    dprojected = np.concatenate([dhidden * up * (slope + silu * (1 - slope)), dhidden * silu], axis=-1)
    np.testing.assert_allclose(y, (silu * up) @ down, rtol=1e-12)
    np.testing.assert_allclose(dx, dprojected @ gate_up.T, rtol=1e-11)
    np.testing.assert_allclose(out[0], np.einsum("bsi,bso->io", x, dprojected), rtol=1e-11)
    np.testing.assert_allclose(out[1], np.einsum("bsi,bso->io", silu * up, dy), rtol=1e-11)
    np.testing.assert_allclose(projected.reshape(2, 4, 14), x @ gate_up, rtol=1e-12)


def test_the_norm_s_gradient_is_that_of_the_plain_form():
    x, dy, gain = random(2, 4, 10), random(2, 4, 10) + 1, random(10)
    y, inverse = rmsnorm_forward(np, x, gain, 1e-5)
    dx, dgain = rmsnorm_backward(np, dy, x, gain, inverse)
    unit, dunit = x * inverse, dy * gain
    np.testing.assert_allclose(y, unit * gain, rtol=1e-13)
    np.testing.assert_allclose(dx, (dunit - unit * (dunit * unit).mean(-1, keepdims=True)) * inverse, rtol=1e-11)
    np.testing.assert_allclose(dgain, (dy * unit).sum((0, 1)), rtol=1e-11)


def test_a_rotation_by_whole_rows_is_that_of_the_two_halves():
    x, table = random(2, 3, 5, 8), rotary_table(np, 7, 5, 8, 100.0, "float64")
    angles = np.arange(7, 12)[:, None] * 100.0 ** (-np.arange(4) / 4)
    first, second = x[..., :4], x[..., 4:]
    y = np.concatenate([first * np.cos(angles) - second * np.sin(angles),
                        second * np.cos(angles) + first * np.sin(angles)], axis=-1)
    np.testing.assert_allclose(rotary_forward(np, x, table), y, rtol=1e-12, atol=1e-14)
    back = np.empty_like(x)
    rotary_backward(np, y, table, out=back)
    np.testing.assert_allclose(back, x, rtol=1e-12, atol=1e-14)


def test_the_sigmoid_of_any_number_is_finite():
    with np.errstate(all="raise", under="ignore"):
        assert list(sigmoid(np, np.array([-1e30, 0.0, 1e30], dtype=np.float32))) == [0.0, 0.5, 1.0]
