"""Building blocks: MLPs, image coders, one-hot latents, symlog and two-hot values.

    symlog(x) = sign(x) ln(1 + |x|),   symexp(x) = sign(x) (e^|x| - 1)   (NET 1)
    p = 0.99 softmax(logits) + 0.01/K                                   (NET 2)
    z = onehot(k ~ p) + (p - sg(p))                                     (NET 3)
    H[p] = -Σ_S Σ_K p ln p                                              (NET 4)
    KL[q ‖ p] = Σ_S Σ_K q (ln q - ln p)                                 (NET 5)
    twohot(y): weights on the two bins that enclose symlog(y)           (NET 6)
    mean = symexp(Σ softmax(logits) · bins), 255 bins on [-20, 20]      (NET 7)
    conv, kernel 2s, stride s = W · (2×2 neighbours of s×s blocks)      (NET 8)
    its transpose = s×s blocks of (W · 2×2 neighbours), edges cut       (NET 9)

(NET 8) and (NET 9) are convolutions written as matrix products: the strided
convolutions of XLA, and above all their gradients, are slow on a CPU.

Hafner et al., "Mastering Diverse Domains through World Models", 2023.
Official: hieros/networks.py, hieros/tools.py.
Differs from the official code in: Δ11 z windows are scored by cross-entropy.

Axes: S categoricals × K classes of z, k steps of a window, H features
of h, F = S·K + H.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

LAYER_NORM_EPS = 1e-3
UNIMIX = 0.01
BINS = 255
BIN_LIMIT = 20.0


def symlog(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Logarithm of the size, sign kept. (NET 1)"""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))  # (NET 1)


def symexp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Inverse of symlog. (NET 1)"""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))  # (NET 1)


def unimix_probs(logits: Float[Array, "*S K"]) -> Float[Array, "*S K"]:
    """Class probabilities with 1 % of uniform mixed in. (NET 2)"""
    K = logits.shape[-1]
    return (1 - UNIMIX) * jax.nn.softmax(logits) + UNIMIX / K  # (NET 2)


def sample_onehot(
    logits: Float[Array, "*S K"], key: PRNGKeyArray
) -> Float[Array, "*S K"]:
    """One-hot sample; gradients pass straight through to the probabilities. (NET 3)

    One random number per categorical, where Gumbel noise would take K.
    """
    p = unimix_probs(logits)
    u = jax.random.uniform(key, (*p.shape[:-1], 1))
    k = jnp.sum(u >= jnp.cumsum(p[..., :-1], -1), -1)
    onehot = jax.nn.one_hot(k, p.shape[-1])
    return onehot + (p - jax.lax.stop_gradient(p))  # (NET 3)


def mode_onehot(logits: Float[Array, "*S K"]) -> Float[Array, "*S K"]:
    """The likeliest one-hot, straight-through like a sample. (NET 3)"""
    p = unimix_probs(logits)
    onehot = jax.nn.one_hot(jnp.argmax(p, -1), p.shape[-1])
    return onehot + (p - jax.lax.stop_gradient(p))  # (NET 3)


def log_prob(
    logits: Float[Array, "*B S K"], onehot: Float[Array, "*B S K"]
) -> Float[Array, "*B"]:
    """Log-probability of a one-hot code, summed over its S categoricals."""
    return jnp.sum(onehot * jnp.log(unimix_probs(logits)), (-2, -1))


def entropy(logits: Float[Array, "*B S K"]) -> Float[Array, "*B"]:
    """Entropy in nats, summed over the S categoricals. (NET 4)"""
    p = unimix_probs(logits)
    return -jnp.sum(p * jnp.log(p), (-2, -1))  # (NET 4)


def kl_divergence(
    q_logits: Float[Array, "*B S K"], p_logits: Float[Array, "*B S K"]
) -> Float[Array, "*B"]:
    """KL[q ‖ p] in nats, summed over the S categoricals. (NET 5)"""
    q, p = unimix_probs(q_logits), unimix_probs(p_logits)
    return jnp.sum(q * (jnp.log(q) - jnp.log(p)), (-2, -1))  # (NET 5)


def bins() -> Float[Array, " 255"]:
    """Centres of the value bins, in symlog units."""
    return jnp.linspace(-BIN_LIMIT, BIN_LIMIT, BINS)


def twohot_position(value: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Where symlog(value) lies among the bins, counted from 0."""
    spacing = 2 * BIN_LIMIT / (BINS - 1)
    return jnp.clip((symlog(value) + BIN_LIMIT) / spacing, 0, BINS - 1)


def twohot(value: Float[Array, "*B"]) -> Float[Array, "*B 255"]:
    """Weights of the two bins around symlog(value); outside, the end bin. (NET 6)"""
    distance = jnp.abs(twohot_position(value)[..., None] - jnp.arange(BINS))
    return jnp.maximum(0, 1 - distance)  # (NET 6)


def twohot_log_prob(
    logits: Float[Array, "*B 255"], value: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """Cross-entropy, negated, of the two-hot target of a value. (NET 6)

    Only two bins of the target are not zero: they are picked instead of multiplied.
    """
    position = twohot_position(value)
    low = jnp.minimum(position.astype(jnp.int32), BINS - 2)
    pick = lambda bin: jnp.take_along_axis(logits, bin[..., None], -1)[..., 0]
    low_part = (low + 1 - position) * pick(low)
    return low_part + (position - low) * pick(low + 1) - jax.nn.logsumexp(logits, -1)


def twohot_mean(logits: Float[Array, "*B 255"]) -> Float[Array, "*B"]:
    """The value that a distribution over bins stands for. (NET 7)"""
    return symexp(jnp.sum(jax.nn.softmax(logits) * bins(), -1))  # (NET 7)


class RowLinear(eqx.nn.Linear):
    """Linear over the last axis of any array.

    x Wᵀ instead of W x under `vmap`, for which XLA transposes every picture twice.
    """

    def __call__(self, x: Float[Array, "*shape inputs"]) -> Float[Array, "*shape out"]:
        contract = (((x.ndim - 1,), (1,)), ((), ()))
        y = jax.lax.dot_general(x, self.weight, contract)
        return y if self.bias is None else y + self.bias


class MLP(eqx.Module):
    """`layers` times [Linear, LN, activation], then Linear to the given outputs.

    `outputs` None leaves the last Linear out, as encoders do.
    The last Linear starts `last_scale` times as large: at 0 a two-hot head says 0.
    """

    hidden: tuple[RowLinear, ...]
    norms: tuple[eqx.nn.LayerNorm, ...]
    last: RowLinear | None
    activation: Callable = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        width: int,
        layers: int,
        outputs: int | None,
        *,
        activation: Callable = jax.nn.silu,
        last_scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        *keys, last_key = jax.random.split(key, layers + 1)
        sizes = [inputs] + [width] * layers
        self.hidden = tuple(
            RowLinear(n, width, use_bias=False, key=k)
            for n, k in zip(sizes[:-1], keys, strict=True)
        )
        self.norms = tuple(eqx.nn.LayerNorm(width, LAYER_NORM_EPS) for _ in keys)
        self.last = None
        if outputs is not None:
            last = RowLinear(sizes[-1], outputs, key=last_key)
            self.last = jax.tree.map(lambda x: last_scale * x, last)
        self.activation = activation

    def __call__(self, x: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = self.activation(norm(linear(x)))
        return x if self.last is None else self.last(x)


def space_to_depth(x: Float[Array, "h w c"], s: int) -> Float[Array, "h2 w2 c2"]:
    """s×s blocks of pixels become channels, in the order (row, column, channel)."""
    h, w, c = x.shape
    x = x.reshape(h // s, s, w // s, s, c)
    return x.transpose(0, 2, 1, 3, 4).reshape(h // s, w // s, s * s * c)


def depth_to_space(x: Float[Array, "h w c"], s: int) -> Float[Array, "h2 w2 c2"]:
    """Inverse of `space_to_depth`."""
    h, w, c = x.shape
    x = x.reshape(h, w, s, s, c // (s * s))
    return x.transpose(0, 2, 1, 3, 4).reshape(h * s, w * s, c // (s * s))


def neighbours(x: Float[Array, "h w c"]) -> Float[Array, "h1 w1 c4"]:
    """All 2×2 neighbourhoods, in the order (row, column, channel)."""
    corners = [x[:-1, :-1], x[:-1, 1:], x[1:, :-1], x[1:, 1:]]
    return jnp.concatenate(corners, -1)


class Down(eqx.Module):
    """Convolution of stride s: kernel 2s with overlap, kernel s without. (NET 8)

    Raises ValueError for overlap with an odd stride.
    """

    linear: RowLinear
    stride: int = eqx.field(static=True)
    overlap: bool = eqx.field(static=True)

    def __init__(
        self, inputs: int, outputs: int, stride: int, overlap: bool, key: PRNGKeyArray
    ):
        if overlap and stride % 2:
            raise ValueError(f"overlap needs an even stride, not {stride}")
        patch = stride * stride * inputs * (4 if overlap else 1)
        self.linear = RowLinear(patch, outputs, key=key)
        self.stride, self.overlap = stride, overlap

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c2"]:
        s = self.stride
        if self.overlap:
            x = jnp.pad(x, ((s // 2, s // 2), (s // 2, s // 2), (0, 0)))
            x = neighbours(space_to_depth(x, s))
        else:
            x = space_to_depth(x, s)
        return self.linear(x)  # (NET 8)


class Up(eqx.Module):
    """Transposed convolution, the mirror of `Down`; the same ValueError. (NET 9)

    Each output channel has one bias, shared by its s×s positions.
    """

    linear: RowLinear
    bias: Float[Array, " outputs"]
    stride: int = eqx.field(static=True)
    overlap: bool = eqx.field(static=True)

    def __init__(
        self, inputs: int, outputs: int, stride: int, overlap: bool, key: PRNGKeyArray
    ):
        if overlap and stride % 2:
            raise ValueError(f"overlap needs an even stride, not {stride}")
        self.linear = RowLinear(
            inputs * (4 if overlap else 1),
            stride * stride * outputs,
            use_bias=False,
            key=key,
        )
        self.bias = jnp.zeros(outputs)
        self.stride, self.overlap = stride, overlap

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c2"]:
        s = self.stride
        if not self.overlap:
            return depth_to_space(self.linear(x), s) + self.bias
        x = neighbours(jnp.pad(x, ((1, 1), (1, 1), (0, 0))))
        x = depth_to_space(self.linear(x), s)  # (NET 9)
        return x[s // 2 : -(s // 2), s // 2 : -(s // 2)] + self.bias


class ImageEncoder(eqx.Module):
    """uint8 pixels / 255 - 0.5 → [Down, LN over channels, SiLU] per stride → flat."""

    layers: tuple[Down, ...]
    norms: tuple[eqx.nn.LayerNorm, ...]
    outputs: int = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        overlap: bool,
        *,
        key: PRNGKeyArray,
    ):
        height, width, pixel_channels = shape
        keys = jax.random.split(key, len(strides))
        inputs = (pixel_channels, *channels[:-1])
        self.layers = tuple(
            Down(c_in, c_out, s, overlap, k)
            for c_in, c_out, s, k in zip(inputs, channels, strides, keys, strict=True)
        )
        self.norms = tuple(eqx.nn.LayerNorm(c, LAYER_NORM_EPS) for c in channels)
        total = math.prod(strides)
        self.outputs = (height // total) * (width // total) * channels[-1]

    def __call__(self, image: UInt8[Array, "h w c"]) -> Float[Array, " embed"]:
        x = image / 255.0 - 0.5
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jax.nn.silu(jax.vmap(jax.vmap(norm))(layer(x)))
        return x.reshape(-1)


class ImageDecoder(eqx.Module):
    """Mirror of `ImageEncoder`: feat → Linear → Up per stride, last one linear."""

    first: eqx.nn.Linear
    layers: tuple[Up, ...]
    norms: tuple[eqx.nn.LayerNorm, ...]
    start: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        feat: int,
        shape: tuple[int, int, int],
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        overlap: bool,
        *,
        key: PRNGKeyArray,
    ):
        height, width, pixel_channels = shape
        first_key, *keys = jax.random.split(key, len(strides) + 1)
        total = math.prod(strides)
        self.start = (height // total, width // total, channels[-1])
        size = self.start[0] * self.start[1] * self.start[2]
        self.first = eqx.nn.Linear(feat, size, key=first_key)
        sizes = (*reversed(channels), pixel_channels)
        self.layers = tuple(
            Up(c_in, c_out, s, overlap, k)
            for c_in, c_out, s, k in zip(
                sizes[:-1], sizes[1:], reversed(strides), keys, strict=True
            )
        )
        self.norms = tuple(
            eqx.nn.LayerNorm(c, LAYER_NORM_EPS) for c in reversed(channels)
        )

    def __call__(self, feat: Float[Array, " F"]) -> Float[Array, "h w c"]:
        """Predicted pixels on the scale pixel / 255 - 0.5."""
        x = self.first(feat).reshape(self.start)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = layer(jax.nn.silu(jax.vmap(jax.vmap(norm))(x)))
        return x


class FlatEncoder(eqx.Module):
    """A small picture as a vector through an MLP, for worlds too small for patches.

    Black is 0 to the MLP: many equal pixels must not drown the few that differ.
    """

    mlp: MLP

    def __call__(self, image: UInt8[Array, "h w c"]) -> Float[Array, " embed"]:
        return self.mlp(image.reshape(-1) / 255.0)


class FlatDecoder(eqx.Module):
    """Mirror of `FlatEncoder`: features → MLP → predicted pixels."""

    mlp: MLP
    shape: tuple[int, int, int] = eqx.field(static=True)

    def __call__(self, feat: Float[Array, " F"]) -> Float[Array, "h w c"]:
        """Predicted pixels on the scale pixel / 255 - 0.5."""
        return self.mlp(feat).reshape(self.shape)


def image_loss(
    predicted: Float[Array, "h w c"], image: UInt8[Array, "h w c"]
) -> Float[Array, ""]:
    """Squared error summed over values, rescaled to the weight of a 64×64×3 image."""
    weight = 64 * 64 * 3 / image.size
    return weight * jnp.sum((predicted - (image / 255.0 - 0.5)) ** 2)


class Window(eqx.Module):
    """What an upper level sees: the last k latents of the level below, oldest first.

    `z` holds class indices, `h` is symlog(h) in float16: the form the replay keeps.
    """

    z: UInt8[Array, "*T k S"]
    h: Float[Array, "*T k H"]


class WindowEncoder(eqx.Module):
    """One-hot z and symlog(h) of a window, flat, through an MLP."""

    mlp: MLP
    classes: int = eqx.field(static=True)

    def __call__(self, window: Window) -> Float[Array, " embed"]:
        z = jax.nn.one_hot(window.z, self.classes).reshape(-1)
        return self.mlp(jnp.concatenate([z, window.h.astype(float).reshape(-1)]))


class WindowDecoder(eqx.Module):
    """Features → logits of the k·S categoricals and the k vectors symlog(h)."""

    mlp: MLP
    z_shape: tuple[int, int, int] = eqx.field(static=True)
    h_shape: tuple[int, int] = eqx.field(static=True)

    def __call__(
        self, feat: Float[Array, " F"]
    ) -> tuple[Float[Array, "k S K"], Float[Array, "k H"]]:
        k, S, K = self.z_shape
        logits, h = jnp.split(self.mlp(feat), [k * S * K])
        return logits.reshape(self.z_shape), h.reshape(self.h_shape)


def window_loss(
    predicted: tuple[Float[Array, "k S K"], Float[Array, "k H"]], window: Window
) -> Float[Array, ""]:
    """Cross-entropy of every z plus squared error of symlog(h), both summed."""
    logits, h = predicted
    target = window.z[..., None].astype(int)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), target, -1)
    return jnp.sum((h - window.h.astype(float)) ** 2) - jnp.sum(log_p)
