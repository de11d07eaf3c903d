"""Tests of nets.py: golden numbers, laws of latents and bins, layers = convolutions."""

import math
from functools import cache, partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

import agent
import nets
from config import PRESETS
from nets import MLP, Down, Up, Window

GOLDEN = Path(__file__).parent / "golden"
S, K, B = 3, 4, 5
keys = st.integers(0, 2**20)
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
entropy, kl_divergence = jax.jit(nets.entropy), jax.jit(nets.kl_divergence)
unimix_probs, sample_onehot = jax.jit(nets.unimix_probs), jax.jit(nets.sample_onehot)
mode_onehot, log_prob = jax.jit(nets.mode_onehot), jax.jit(nets.log_prob)
twohot, twohot_mean = jax.jit(nets.twohot), jax.jit(nets.twohot_mean)
twohot_log_prob = jax.jit(nets.twohot_log_prob)
symlog, symexp = jax.jit(nets.symlog), jax.jit(nets.symexp)


def normal(key, *shape, scale=1.0):
    return (scale * np.random.default_rng(key).normal(size=shape)).astype(np.float32)


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def test_shape_hook_is_live():
    with pytest.raises(TypeCheckError):
        nets.twohot_log_prob(jnp.zeros((B, 254)), jnp.zeros(B))
    with pytest.raises(TypeCheckError):
        nets.kl_divergence(jnp.zeros((S, K)), jnp.zeros((S, K + 1)))


# Two-hot values


def test_twohot_is_golden():
    file = golden("twohot")
    target = file["target"][:, 0]
    close(twohot_log_prob(file["logits"], target), file["log_prob"])
    close(twohot_mean(file["logits"]), file["mean"][:, 0], rtol=1e-4)


@given(st.sampled_from([-1e9, -7.3, -1.0, 0.0, 1e-3, 0.2, 1.0, 21.0, 1e9]))
def test_uniform_bins_cost_ln_255_whatever_the_value(value):
    close(twohot_log_prob(jnp.zeros((1, 255)), jnp.array([value])), -5.54126)
    assert math.isclose(math.log(255), 5.54126, abs_tol=1e-5)


def test_bins_are_evenly_spaced_around_zero():
    bins = np.asarray(nets.bins())
    close(np.diff(bins), 0.1574803)
    assert bins[127] == 0 and (bins[0], bins[-1]) == (-20, 20)
    close(bins, -bins[::-1])


values = st.lists(st.floats(-1e8, 1e8, width=32), min_size=B, max_size=B)


@given(values)
def test_twohot_round_trip(values):
    values = np.array(values, np.float32)
    weights = np.asarray(twohot(values))
    assert ((weights > 0).sum(-1) <= 2).all() and (weights >= 0).all()
    close(weights.sum(-1), 1, atol=1e-4)
    for row, value in zip(weights, values, strict=True):
        (at,) = np.nonzero(row)
        assert at[-1] - at[0] <= 1
        below, above = nets.bins()[at[0]], nets.bins()[at[-1]]
        assert below - 1e-4 <= np.sign(value) * np.log1p(abs(value)) <= above + 1e-4
    mean = twohot_mean(np.log(np.maximum(weights, 1e-30)))
    close(mean, values, rtol=1e-3, atol=1e-4)


def test_twohot_by_hand():
    """Half way between two bins of symlog space, on a bin, beyond the last one."""
    middle = math.expm1(0.1574803 / 2)
    weights = np.asarray(twohot(jnp.array([middle, -middle, 0.0, 1e12, -1e12])))
    expected = np.zeros_like(weights)
    expected[0, 127] = expected[0, 128] = expected[1, 126] = expected[1, 127] = 0.5
    expected[2, 127] = expected[3, 254] = expected[4, 0] = 1
    close(weights, expected, atol=1e-4)
    # A third of the way costs the entropy of (1/3, 2/3) at best.
    third = jnp.array([math.expm1(0.1574803 / 3)])
    best = twohot_log_prob(jnp.log(jnp.maximum(twohot(third), 1e-30)), third)
    close(best, (2 * math.log(2 / 3) + math.log(1 / 3)) / 3, atol=1e-3)


@given(values)
def test_symexp_undoes_symlog(values):
    values = np.array(values, np.float32)
    close(symexp(symlog(values)), values, rtol=1e-4)
    small = np.clip(values, -20, 20)
    close(symlog(symexp(small)), small, rtol=1e-4)
    close(symlog(-values), -symlog(values))
    close(symlog(jnp.array([0.0, 1.0, -math.e + 1])), [0, math.log(2), -1])


# One-hot latents


def test_latents_are_golden():
    file = golden("latents")
    q, p = file["logits_q"], file["logits_p"]
    close(unimix_probs(q), file["probs_q"])
    close(entropy(q), file["entropy_q"], rtol=1e-4)
    close(kl_divergence(q, p), file["kl_qp"], rtol=1e-4)


def test_unimix_keeps_one_percent_for_all_classes():
    extreme = np.zeros((1, 32), np.float32)
    extreme[0, 3] = 1e4
    expected = np.full((1, 32), 0.0003125)
    expected[0, 3] = 0.9903125
    close(unimix_probs(extreme), expected, atol=1e-7)


@given(keys, st.sampled_from([0.1, 1.0, 30.0]))
def test_kl_is_never_negative_and_zero_iff_equal(key, scale):
    """Pinsker: a categorical's KL is at least half the squared distance of its p."""
    q, p = normal(key, 2, B, S, K, scale=scale)
    distance = np.abs(unimix_probs(q) - unimix_probs(p)).sum(-1)
    kl = kl_divergence(q, p)
    assert (kl >= 0.5 * np.sum(distance**2, -1) - 1e-5).all()
    assert (kl[distance.max(-1) > 0.01] > 0).all()
    close(kl_divergence(q, q), 0, atol=1e-6)
    close(kl_divergence(q, q + 5), 0)
    probs_q, probs_p = map(np.asarray, (unimix_probs(q), unimix_probs(p)))
    close(kl, np.sum(probs_q * np.log(probs_q / probs_p), (1, 2)), rtol=1e-4)


@given(keys)
def test_entropy_lies_between_none_and_uniform(key):
    assert (entropy(normal(key, B, S, K)) < S * math.log(K)).all()
    close(entropy(np.zeros((B, S, K), np.float32)), S * math.log(K))
    # Certainty is as certain as the 1 % allows.
    p = np.array([1 - 0.01 * (K - 1) / K] + [0.01 / K] * (K - 1))
    certain = np.full((B, S, K), -1e4, np.float32)
    certain[..., key % K] = 0
    close(entropy(certain), -S * np.sum(p * np.log(p)), rtol=1e-4)


@given(keys, st.sampled_from([0.1, 1.0, 30.0]))
def test_samples_and_modes_are_exactly_onehot(key, scale):
    logits = normal(key, B, S, K, scale=scale)
    for z in (sample_onehot(logits, jax.random.key(key)), mode_onehot(logits)):
        z = np.asarray(z)
        assert ((z == 0) | (z == 1)).all()
        assert (z.sum(-1) == 1).all()
    np.testing.assert_array_equal(z.argmax(-1), logits.argmax(-1))


def test_samples_follow_the_mixed_probabilities():
    """A class that softmax rules out still turns up in 1 % / K of the samples."""
    n = 40_000
    logits = np.tile(np.array([0.0, 1.0, 2.0, -1e4], np.float32), (n, 1, 1))
    z = np.asarray(sample_onehot(logits, jax.random.key(0)))[:, 0]
    p = np.asarray(unimix_probs(logits[0]))[0]
    assert (np.abs(z.mean(0) - p) < 4 * np.sqrt(p * (1 - p) / n)).all()
    assert z[:, 3].sum() > 0


@given(keys)
def test_gradients_pass_straight_through_to_the_probabilities(key):
    logits, w = normal(key, S, K), normal(key + 1, S, K)
    expected = gradient_of(nets.unimix_probs)(logits, w)
    close(gradient_of(sample)(logits, w), expected)
    close(gradient_of(nets.mode_onehot)(logits, w), expected)
    assert np.abs(expected).max() > 1e-3


def sample(logits):
    return nets.sample_onehot(logits, jax.random.key(0))


@cache
def gradient_of(code):
    """Gradient, with respect to logits, of a weighting of what `code` makes of them."""
    return jax.jit(jax.grad(lambda logits, w: jnp.sum(w * code(logits))))


@given(keys)
def test_log_prob_of_a_code_is_that_of_its_classes(key):
    logits = normal(key, B, S, K)
    z = sample_onehot(logits, jax.random.key(key))
    p = np.sum(np.asarray(unimix_probs(logits)) * z, -1)
    close(log_prob(logits, z), np.log(p).sum(-1), rtol=1e-4)


# Networks


def test_mlp_is_linear_norm_activation_then_linear():
    x = normal(0, 6)
    exact = MLP(6, 8, 2, 3, key=jax.random.key(0))
    mlp, v = jax.tree.map(np.asarray, exact), x
    for linear, norm in zip(mlp.hidden, mlp.norms, strict=True):
        assert linear.bias is None
        v = linear.weight @ v
        v = (v - v.mean()) / np.sqrt(v.var() + 1e-3) * norm.weight + norm.bias
        v = v / (1 + np.exp(-v))
    close(exact(jnp.asarray(x)), mlp.last.weight @ v + mlp.last.bias)
    headless = MLP(6, 8, 2, None, key=jax.random.key(0))
    assert headless.last is None
    assert headless(jnp.asarray(x)).shape == (8,)


def test_a_twohot_head_that_starts_at_zero_says_zero():
    head = MLP(6, 8, 2, 255, last_scale=0.0, key=jax.random.key(0))
    logits = jax.vmap(head)(normal(0, B, 6))
    np.testing.assert_array_equal(logits, 0)
    close(twohot_mean(logits), 0)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(head.hidden))


@pytest.mark.parametrize("s", [1, 2, 4])
def test_depth_to_space_undoes_space_to_depth(s):
    x = jnp.asarray(normal(0, 8, 4, 3))
    deep = nets.space_to_depth(x, s)
    assert deep.shape == (8 // s, 4 // s, 3 * s * s)
    np.testing.assert_array_equal(nets.depth_to_space(deep, s), x)
    for i, j in ((0, 0), (8 // s - 1, 4 // s - 1)):
        block = x[i * s : (i + 1) * s, j * s : (j + 1) * s]
        np.testing.assert_array_equal(deep[i, j], block.reshape(-1))


def convolution(kernel, s, overlap):
    """`jax.lax` with a kernel (rows, columns, in, out): stride s, padding s // 2."""
    padding = [(s // 2, s // 2)] * 2 if overlap else "VALID"

    def convolve(x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x[None], kernel, (s, s), padding, dimension_numbers=numbers
        )[0]

    return convolve


SHAPES = [(2, True), (4, True), (2, False), (4, False)]


@pytest.mark.parametrize("s, overlap", SHAPES)
def test_down_is_a_strided_convolution(s, overlap):
    c, out, n = 3, 5, 2 if overlap else 1
    layer = Down(c, out, s, overlap, jax.random.key(0))
    x = jnp.asarray(normal(1, 4 * s, 2 * s, c))
    # Columns of the weight are (neighbour row, column, row, column, channel).
    kernel = layer.linear.weight.reshape(out, n, n, s, s, c)
    kernel = kernel.transpose(1, 3, 2, 4, 5, 0).reshape(n * s, n * s, c, out)
    expected = convolution(kernel, s, overlap)(x) + layer.linear.bias
    assert expected.shape == (4, 2, out)
    close(eqx.filter_jit(layer)(x), expected)


@pytest.mark.parametrize("s, overlap", SHAPES)
def test_up_is_the_transpose_of_that_convolution(s, overlap):
    c, out, n = 3, 2, 2 if overlap else 1
    layer = Up(c, out, s, overlap, jax.random.key(0))
    assert layer.bias.shape == (out,)
    layer = eqx.tree_at(lambda l: l.bias, layer, jnp.asarray(normal(2, out)))
    x = jnp.asarray(normal(1, 4, 2, c))
    # An output block sees its own input last: the kernel's rows run backwards.
    kernel = layer.linear.weight.reshape(s, s, out, n, n, c)[:, :, :, ::-1, ::-1]
    kernel = kernel.transpose(3, 0, 4, 1, 2, 5).reshape(n * s, n * s, out, c)
    picture = jnp.zeros((4 * s, 2 * s, out))
    transposed = jax.linear_transpose(convolution(kernel, s, overlap), picture)
    close(eqx.filter_jit(layer)(x), transposed(x)[0] + layer.bias)


SIZES = [
    ("atari100k", (64, 64, 3), 3072, nets.ImageEncoder),
    ("cpu", (32, 32, 1), 4 * 64, nets.ImageEncoder),
    ("tiny", (16, 16, 1), 4 * 8, nets.ImageEncoder),
    ("minatar", (10, 10, 6), 256, nets.FlatEncoder),
    ("probe", (10, 5, 1), 64, nets.FlatEncoder),
]


@pytest.mark.parametrize("preset, shape, embed, kind", SIZES)
def test_coders_of_the_presets_fit_their_pictures(preset, shape, embed, kind):
    model = PRESETS[preset].model
    feat = jnp.zeros(model.z_categoricals * model.z_classes + model.features)

    def sizes():
        keys = jax.random.split(jax.random.key(0))
        encoder, size, decoder = agent.make_coders(model, 0, 4, shape, keys)
        assert isinstance(encoder, kind) and size == embed
        window_keys = jax.random.split(jax.random.key(1))
        upper, width, windows = agent.make_coders(model, 1, 4, shape, window_keys)
        window = Window(
            jnp.zeros((4, model.z_categoricals), jnp.uint8),
            jnp.zeros((4, model.features), jnp.float16),
        )
        assert width == model.vector_width
        code = encoder(jnp.zeros(shape, jnp.uint8))
        return code, decoder(feat), upper(window), windows(feat)

    code, picture, upper, (z, h) = jax.eval_shape(sizes)
    assert code.shape == (embed,) and picture.shape == shape
    assert upper.shape == (model.vector_width,)
    assert z.shape == (4, model.z_categoricals, model.z_classes)
    assert h.shape == (4, model.features)


def test_image_coders_mirror_each_other_layer_by_layer():
    shape, channels, strides = (8, 16, 1), (3, 4), (2, 4)
    image = (shape, channels, strides, False)
    encoder = nets.ImageEncoder(*image, key=jax.random.key(0))
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    x = picture / np.float32(255) - 0.5
    for layer, norm in zip(encoder.layers, encoder.norms, strict=True):
        x = layer(jnp.asarray(x, jnp.float32))
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
        x = jax.nn.silu(x * norm.weight + norm.bias)
    assert x.shape == (1, 2, 4) and encoder.outputs == 8
    close(encoder(jnp.asarray(picture)), x.reshape(-1))

    decoder = nets.ImageDecoder(5, *image, key=jax.random.key(1))
    assert decoder.start == (1, 2, 4)
    assert [layer.stride for layer in decoder.layers] == [4, 2]
    feat = jnp.asarray(normal(0, 5))
    assert decoder(feat).shape == shape
    # The last layer is linear: no activation or norm bounds its pixels.
    last = lambda d: d.layers[-1].bias
    shifted = eqx.tree_at(last, decoder, last(decoder) + 7.0)
    close(shifted(feat), decoder(feat) + 7, atol=1e-4)


def test_flat_and_window_coders_flatten_in_reading_order():
    identity = MLP(4, 1, 0, 4, key=jax.random.key(0))
    linear = (jnp.eye(4), jnp.zeros(4))
    identity = eqx.tree_at(lambda m: (m.last.weight, m.last.bias), identity, linear)
    picture = jnp.array([[0, 51], [102, 255]], jnp.uint8)[..., None]
    code = nets.FlatEncoder(identity)(picture)
    close(code, [0, 0.2, 0.4, 1])
    close(nets.FlatDecoder(identity, (2, 2, 1))(code)[..., 0], code.reshape(2, 2))

    wide = MLP(10, 1, 0, 10, key=jax.random.key(0))
    linear = (jnp.eye(10), jnp.zeros(10))
    wide = eqx.tree_at(lambda m: (m.last.weight, m.last.bias), wide, linear)
    window = Window(
        jnp.array([[2], [0]], jnp.uint8),
        jnp.array([[1.5, -2.0], [3.0, 0.0]], jnp.float16),
    )
    code = nets.WindowEncoder(wide, 3)(window)
    close(code, [0, 0, 1, 1, 0, 0, 1.5, -2, 3, 0])
    z, h = nets.WindowDecoder(wide, (2, 1, 3), (2, 2))(code)
    close(z[:, 0], [[0, 0, 1], [1, 0, 0]])
    close(h, window.h)


@pytest.mark.parametrize("shape", [(64, 64, 3), (4, 4, 1)])
def test_every_picture_weighs_as_much_as_one_of_the_published_size(shape):
    picture = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    exact = picture / 255.0 - 0.5
    assert nets.image_loss(exact, picture) == 0
    close(nets.image_loss(exact + 0.1, picture), 12288 * 0.01, rtol=1e-4)
    one = exact.at[0, 0, 0].add(1.0)
    close(nets.image_loss(one, picture), 12288 / picture.size, rtol=1e-4)


def test_window_loss_by_hand():
    """k = 2 steps, S = 1 categorical of K = 2 classes, H = 3 features."""
    window = Window(
        jnp.array([[1], [0]], jnp.uint8),
        jnp.array([[0.5, 0.0, -1.0], [2.0, 0.0, 0.0]], jnp.float16),
    )
    logits = jnp.array([[[0.0, 0.0]], [[math.log(3), 0.0]]])
    h = jnp.array([[0.5, 1.0, -1.0], [0.0, 0.0, 0.0]])
    loss = nets.window_loss((logits, h), window)
    close(loss, math.log(2) + math.log(4 / 3) + 1.0 + 4.0)


@given(keys)
def test_window_loss_is_least_at_the_window(key):
    rng = np.random.default_rng(key)
    z = rng.integers(0, K, (2, S)).astype(np.uint8)
    window = Window(jnp.asarray(z), jnp.asarray(normal(key, 2, 3).astype(np.float16)))
    certain = jnp.asarray(np.where(np.arange(K) == z[..., None], 50.0, 0.0), float)
    exact = (certain, window.h.astype(float))
    close(window_loss(exact, window), 0)
    assert window_loss((-certain, exact[1]), window) > 100 * S
    close(window_loss((certain, exact[1] + 1), window), 2 * 3, rtol=1e-3)


window_loss = jax.jit(nets.window_loss)


@pytest.mark.parametrize("layer", [Down, Up])
def test_overlap_needs_an_even_stride(layer):
    with pytest.raises(ValueError, match="even stride, not 3"):
        layer(1, 1, 3, True, jax.random.key(0))
