"""Tests of s5.py: golden numbers, two forms of one recurrence, laws, scale at init.

Laws hold for one layer and for the whole stack, whose `scan` and `step` share their
signatures: `kind` names which of the two is meant.
"""

from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

import s5
from s5 import S5, DiscreteS5, S5Stack, hippo_normal

GOLDEN = Path(__file__).parent / "golden"
H, P, BLOCKS, N, T = 4, 8, 2, 2, 7
KINDS = ("layer", "stack")
keys = st.integers(0, 2**20)
cuts = st.integers(0, T - 1)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


@partial(jax.jit, static_argnames="kind")
def make(kind, key):
    """A discretised model with random parameters."""
    key = jax.random.key(key)
    if kind == "layer":
        return S5(H, P, BLOCKS, key=key).discretise()
    return S5Stack(H, N, P, BLOCKS, key=key).discretise()


def draw(kind, key):
    """What `scan` and `loop` take: model, inputs, resets, a carry that is not zero.

    Drawn by numpy: every new shape of an operation that JAX runs costs a compilation.
    """
    rng = np.random.default_rng(key)
    pair = rng.normal(size=(2, P) if kind == "layer" else (2, N, P))
    x0 = (pair[0] + 1j * pair[1]).astype(np.complex64)
    u = rng.normal(size=(T, H)).astype(np.float32)
    return make(kind, key), u, rng.random(T) < 0.3, x0


@partial(jax.jit, static_argnames="parallel")
def scan(model, u, resets, x0, parallel=False):
    return model.scan(u, resets, x0, parallel=parallel)


@jax.jit
def loop(model, u, resets, x0):
    """`step` after `step`, by a scan that knows nothing of S5."""

    def step(x, inputs):
        x, y = model.step(x, *inputs)
        return x, (x, y)

    return jax.lax.scan(step, x0, (u, resets))[1]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "s5_layer.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def golden_layer(golden):
    """The golden convention is y = Re(C̃ x) + D u over the full spectrum."""
    names = ("Lambda_bar", "B_bar", "C_tilde", "D")
    Lambda_bar, B_bar, C_tilde, D = (jnp.asarray(golden[name]) for name in names)
    return DiscreteS5(Lambda_bar, B_bar, C_tilde / 2, D)


@pytest.fixture(scope="module")
def wide():
    """A layer so wide that its scales at init are no matter of luck."""
    return S5(64, 64, 4, key=jax.random.key(0))


def stationary_rms(layer):
    """rms of every state under white input: the sum of a geometric series."""
    model = layer.discretise()
    gain = jnp.sum(jnp.abs(model.B_bar) ** 2, 1)
    return np.sqrt(gain / (1 - jnp.abs(model.Lambda_bar) ** 2))


def test_shape_hook_is_live():
    x0, b = jnp.zeros(P, complex), jnp.zeros((T, P), complex)
    with pytest.raises(TypeCheckError):
        s5.scan_sequential(jnp.zeros((T + 1, P), complex), b, x0)
    with pytest.raises(TypeCheckError):
        make("layer", 0).step(x0, jnp.zeros((1, H)), jnp.array(False))


def test_hippo_has_the_golden_spectrum_and_eigenvectors():
    Lambda, V = hippo_normal(32)
    with np.load(GOLDEN / "hippo_32.npz") as file:
        golden_Lambda, golden_V = file["Lambda"], file["V"]
    n = np.arange(32)
    q = np.sqrt(2 * n + 1)
    A = np.where(n[:, None] > n, -1, 1) * np.outer(q, q) / 2
    A[n, n] = -0.5
    order, keep = np.argsort(Lambda.imag), golden_Lambda.imag > 0
    Lambda, V = Lambda[order], V[:, order]
    golden_order = np.argsort(golden_Lambda[keep].imag)
    np.testing.assert_allclose(Lambda, golden_Lambda[keep][golden_order], rtol=1e-5)
    np.testing.assert_allclose(A @ V, V * Lambda, atol=1e-10)
    both = np.concatenate([V, V.conj()], 1)
    np.testing.assert_allclose(both.conj().T @ both, np.eye(32), atol=1e-10)
    overlap = np.abs(np.sum(golden_V[:, keep][:, golden_order].conj() * V, 0))
    np.testing.assert_allclose(overlap, 1, atol=1e-5)


def test_discretise_is_the_golden_zero_order_hold(golden):
    log_re = jnp.log(-golden["Lambda"].real)
    B, C = golden["B_tilde"], golden["C_tilde"]
    leaves = (log_re, golden["Lambda"].imag, B.real, B.imag, C.real, C.imag)
    leaves = jax.tree.map(jnp.asarray, (*leaves, golden["D"], golden["log_Delta"]))
    for scaled in (False, True):
        layer = S5(8, 16, 1, scaled=scaled, key=jax.random.key(0))
        assert len(jax.tree.leaves(layer)) == len(leaves)
        layer = jax.tree.unflatten(jax.tree.structure(layer), leaves)
        model = layer.discretise()
        scale = np.exp(-golden["log_Delta"] / 2)[:, None] if scaled else 1
        close(model.Lambda_bar, golden["Lambda_bar"], atol=1e-6)
        close(model.B_bar, golden["B_bar"] * scale, rtol=1e-4, atol=1e-6)
        close(model.C_tilde, golden["C_tilde"])
        close(model.D, golden["D"])


@pytest.mark.parametrize("parallel", [False, True])
def test_scan_is_the_golden_layer(golden, golden_layer, parallel):
    u, x0 = jnp.asarray(golden["u"]), jnp.asarray(golden["x0"])
    resets = jnp.asarray(golden["reset"])
    assert 0 < golden["reset"].sum() < len(resets)
    x, y = scan(golden_layer, u, resets, jnp.zeros_like(x0), parallel)
    close(x, golden["x"])
    close(y, golden["y"])
    x, y = scan(golden_layer, u, jnp.zeros_like(resets), x0, parallel)
    close(x, golden["x_from_x0_no_reset"])
    close(y, golden["y_from_x0_no_reset"])


def test_one_of_each_pair_is_the_real_system_that_hippo_describes():
    """At one Δ for all, the layer is x' = A x + B u, y = C x + D u, without V."""
    size, Delta = 2 * P, 0.05
    layer = S5(H, P, 1, scaled=False, key=jax.random.key(3))
    layer = eqx.tree_at(lambda s: s.log_Delta, layer, jnp.full(P, np.log(Delta)))
    u = np.asarray(jax.random.normal(jax.random.key(4), (T, H)))
    Lambda, V = hippo_normal(size)
    A = 2 * ((V * Lambda) @ V.conj().T).real
    B = 2 * (V @ (layer.B_re + 1j * np.asarray(layer.B_im))).real
    C = 2 * ((layer.C_re + 1j * np.asarray(layer.C_im)) @ V.conj().T).real
    A_bar = scipy.linalg.expm(A * Delta)
    B_bar = np.linalg.solve(A, (A_bar - np.eye(size)) @ B)
    x, naive = np.zeros(size), []
    for u_t in u:
        x = A_bar @ x + B_bar @ u_t
        naive.append(C @ x + layer.D * u_t)
    _, y = scan(layer.discretise(), u, np.zeros(T, bool), np.zeros(P, np.complex64))
    close(y, np.stack(naive), atol=1e-4)


@given(keys)
def test_stack_is_its_equation_written_naively(key):
    model, u, resets, x0 = draw("stack", key)
    x, y = scan(model, u, resets, x0)
    model = jax.tree.map(np.asarray, model)

    def layer_norm(u, norm):
        u = (u - u.mean(-1, keepdims=True)) / np.sqrt(u.var(-1, keepdims=True) + 1e-3)
        return u * norm.weight + norm.bias

    for n, block in enumerate(model.blocks):
        ssm, state, v = block.ssm, x0[n], layer_norm(u, block.norm)
        outputs = []
        for t in range(T):
            state = 0 * state if resets[t] else state
            state = ssm.Lambda_bar * state + ssm.B_bar @ v[t]
            close(x[t, n], state)
            outputs.append(2 * (ssm.C_tilde @ state).real + ssm.D * v[t])
        u = u + np.asarray(jax.nn.gelu(np.stack(outputs) @ block.W.weight.T))
    assert all(block.W.bias is None for block in model.blocks)
    close(y, layer_norm(u, model.norm))


@pytest.mark.parametrize("kind", KINDS)
@given(keys)
def test_parallel_sequential_and_step_by_step_agree(kind, key):
    """With resets anywhere and a carry-in."""
    inputs = draw(kind, key)
    forms = scan(*inputs), scan(*inputs, parallel=True), loop(*inputs)
    for sequential, parallel, stepped in zip(*forms, strict=True):
        close(sequential, parallel)
        close(sequential, stepped)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_recurrence_is_itself_written_out(length, parallel):
    draws = jax.random.normal(jax.random.key(length), (2 * length + 1, P), complex)
    a, b, x0 = draws[:length], draws[length:-1], draws[-1]
    x, naive = np.asarray(x0), []
    for t in range(length):
        x = a[t] * x + b[t]
        naive.append(x)
    close(s5.linear_recurrence(a, b, x0, parallel=parallel), np.stack(naive))
    close(s5.linear_recurrence(a, b, x0), np.stack(naive))


def test_operator_of_the_parallel_scan_is_associative(monkeypatch):
    operators = []
    keep = lambda operator, elements: operators.append(operator) or elements
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "associative_scan", keep)
        one = jnp.ones((1, 1), complex)
        s5.scan_parallel(one, one, one[0])
    (o,) = operators

    @given(keys)
    def law(key):
        normal = np.random.default_rng(key).normal(size=(3, 2, 2, P))
        i, j, k = map(tuple, normal[..., 0, :] + 1j * normal[..., 1, :])
        one = (np.ones(P), np.zeros(P))
        np.testing.assert_allclose(o(o(i, j), k), o(i, o(j, k)), rtol=1e-10)
        np.testing.assert_allclose(o(one, i), i)
        np.testing.assert_allclose(o(i, one), i)
        after_i = i[0] * k[0] + i[1]
        twice = o(i, j)
        np.testing.assert_allclose(twice[0] * k[0] + twice[1], j[0] * after_i + j[1])

    law()


log_re, imag = st.floats(-4, 4), st.floats(-1000, 1000)


@given(log_re, imag, st.floats(np.log(1e-4), 0))
def test_states_always_decay(log_re, imag, log_Delta):
    """Whatever training does to the parameters."""
    layer = S5(1, 1, 1, key=jax.random.key(0))
    where = lambda s: (s.log_neg_Lambda_re, s.Lambda_im, s.log_Delta)
    values = tuple(jnp.array([value]) for value in (log_re, imag, log_Delta))
    layer = eqx.tree_at(where, layer, values)
    assert jnp.abs(discretise(layer).Lambda_bar) < 1


discretise = jax.jit(lambda layer: layer.discretise())


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(keys, cuts)
def test_no_output_depends_on_later_inputs(kind, parallel, key, t):
    model, u, resets, x0 = draw(kind, key)
    x, y = scan(model, u, resets, x0, parallel)
    later = np.arange(T) > t
    changed = u + 0
    changed[t:] = np.random.default_rng(~key % 2**32).normal(size=(T - t, H))
    new_x, new_y = scan(model, changed, resets ^ later, x0, parallel)
    np.testing.assert_array_equal(new_x[:t], x[:t])
    np.testing.assert_array_equal(new_y[:t], y[:t])
    assert np.abs(np.asarray(new_x) - x)[t].max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@given(keys, cuts)
def test_cut_anywhere_and_carried_on(kind, key, t):
    model, u, resets, x0 = draw(kind, key)
    x, y = map(np.asarray, scan(model, u, resets, x0))
    # One compiled length serves all cuts: the rest is padded behind.
    rest = lambda v: np.concatenate([v[t + 1 :], np.zeros_like(v[: t + 1])])
    for form in (scan, loop):
        rest_x, rest_y = form(model, rest(u), rest(resets), x[t])
        close(rest_x[: T - t - 1], x[t + 1 :])
        close(rest_y[: T - t - 1], y[t + 1 :])


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(keys, cuts)
def test_nothing_crosses_a_reset(kind, parallel, key, t):
    model, u, resets, x0 = draw(kind, key)
    other_u, no_resets = u + 0, resets & (np.arange(T) > t)
    other_u[:t] *= -2

    def after(reset, u, resets, x0):
        resets = np.where(np.arange(T) == t, reset, resets)
        x, y = scan(model, u, resets, x0, parallel)
        return np.asarray(x)[t:], np.asarray(y)[t:]

    x, y = after(True, u, resets, x0)
    other_x, other_y = after(True, other_u, no_resets, 3 * x0 + 1)
    close(x, other_x, rtol=1e-5, atol=1e-6)
    close(y, other_y, rtol=1e-5, atol=1e-6)
    x, _ = after(False, u, no_resets, x0)
    other_x, _ = after(False, other_u, no_resets, 3 * x0 + 1)
    assert np.abs(x - other_x)[0].max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_vmapped_is_single(kind):
    model = make(kind, 0)
    inputs = [draw(kind, key)[1:] for key in range(3)]
    batch = [np.stack(leaves) for leaves in zip(*inputs, strict=True)]
    for form in (scan, loop):
        x, y = jax.vmap(form, in_axes=(None, 0, 0, 0))(model, *batch)
        for row, single in enumerate(inputs):
            single_x, single_y = form(model, *single)
            close(x[row], single_x)
            close(y[row], single_y)


def test_parameters_are_real_and_start_where_hippo_puts_them(wide):
    stack = S5Stack(H, N, P, BLOCKS, key=jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(stack))
    for drawn in (lambda s: s.B_re, lambda s: s.C_im, lambda s: s.D):
        one, two = (drawn(block.ssm) for block in stack.blocks)
        assert np.any(one != two)
    Lambda, _ = hippo_normal(32)
    close(-jnp.exp(wide.log_neg_Lambda_re), -0.5 * np.ones(64))
    close(wide.Lambda_im, np.tile(Lambda.imag, 4))
    for values, low, high in ((wide.log_Delta, 0.001, 0.1), (wide.D, 0, 1)):
        values = jnp.exp(values) if low else values
        assert low <= values.min() < low + (high - low) / 5
        assert high - (high - low) / 5 < values.max() <= high


def test_gradients_of_all_parameters_are_finite_and_not_zero():
    @jax.jit
    @jax.grad
    def gradient(layer, *inputs):
        _, y = layer.discretise().scan(*inputs)
        return jnp.sum(y**2)

    layer = S5(H, P, BLOCKS, key=jax.random.key(0))
    for leaf in jax.tree.leaves(gradient(layer, *draw("layer", 1)[1:])):
        assert np.isfinite(leaf).all()
        assert (np.asarray(leaf) != 0).all()


@pytest.mark.parametrize("key", range(3))
def test_scaled_states_all_have_about_the_same_size(key):
    """Modes beyond half a turn per step are averaged away, like |sinc|."""
    layer = S5(64, 64, 4, key=jax.random.key(key))
    turn = np.abs(layer.Lambda_im) * np.exp(layer.log_Delta)
    slow = turn < np.pi
    rms = stationary_rms(layer)
    assert 16 < slow.sum() < 64
    assert rms[slow].max() < 3 * rms[slow].min()
    assert rms[slow].min() > 0.5 and rms[slow].max() < 1.3
    size = np.sqrt(np.sum(layer.B_re**2 + layer.B_im**2, 1))
    close(rms / size, np.abs(np.sinc(turn / (2 * np.pi))), atol=0.06)
    unscaled = S5(64, 64, 4, scaled=False, key=jax.random.key(key))
    unscaled = stationary_rms(unscaled)
    assert unscaled[slow].max() > 5 * unscaled[slow].min()
    close(rms / unscaled, np.exp(-layer.log_Delta / 2))


def test_states_and_outputs_of_a_fresh_layer_are_of_order_one(wide):
    """Under white input, in a run long enough for the slowest mode to fill (Δ7)."""
    u = jax.random.normal(jax.random.key(1), (8, 6000, 64))
    scan_all = jax.jit(jax.vmap(wide.discretise().scan, in_axes=(0, None, None)))
    x, y = scan_all(u, jnp.zeros(6000, bool), jnp.zeros(64, complex))
    x, from_states = x[:, 2000:], (y - wide.D * u)[:, 2000:]
    close(np.sqrt(np.mean(np.abs(x) ** 2, (0, 1))), stationary_rms(wide), rtol=0.35)
    variance = np.mean(from_states**2)
    assert 0.3 < variance < 2


@pytest.mark.parametrize("blocks", [0, -1, 3, 16])
def test_blocks_that_do_not_divide_the_states_are_refused(blocks):
    with pytest.raises(ValueError, match="blocks do not divide"):
        S5(H, P, blocks, key=jax.random.key(0))
