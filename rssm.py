"""RSSM: the recurrent twin of S5WM, for the comparison that the paper makes.

    h_t = GRU(h_{t-1}, SiLU(LN(W_in [z_{t-1}; a_{t-1}])))           (RSSM 1)
    z_t ~ q(z_t | h_t, o_t),   ẑ_t ~ p(z_t | h_t)                   (RSSM 2)

Same heads, losses and training as S5WM; h is the GRU's state as it is. The posterior
depends on h_t, so a sequence is observed one step after the other: what S5WM avoids.

Hafner et al., "Mastering Diverse Domains through World Models", 2023.
Official: hieros/networks.py, class RSSM. Differs from the official code in:
Δ1 alignment of actions, Δ2 the last reward counts, Δ26 q starts sharp, Δ33 a plain GRU
from h = 0.

Axes: T time, S categoricals × K classes of z, G × A action code, H features.
The carry's x is (1, H): one layer, whose state is h.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8

from nets import LAYER_NORM_EPS, MLP, mode_onehot, sample_onehot
from s5wm import POSTERIOR_SCALE, Carry, Heads, Latent, Observation, Transition


class RSSM(eqx.Module):
    """Recurrent state-space model with the interface of S5WM. Batch with `vmap`."""

    encoder: eqx.Module
    posterior: MLP
    W_in: eqx.nn.Linear
    norm_in: eqx.nn.LayerNorm
    gru: eqx.nn.GRUCell
    prior: MLP
    heads: Heads
    z_shape: tuple[int, int] = eqx.field(static=True)
    features: int = eqx.field(static=True)
    action_classes: int = eqx.field(static=True)

    def __init__(
        self,
        encoder: eqx.Module,
        embed: int,
        heads: Heads,
        action_shape: tuple[int, int],
        *,
        z_shape: tuple[int, int],
        features: int,
        width: int,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 4)
        flat_z = z_shape[0] * z_shape[1]
        inputs = flat_z + action_shape[0] * action_shape[1]
        self.encoder, self.heads = encoder, heads
        self.posterior = MLP(
            embed + features, width, 1, flat_z, last_scale=POSTERIOR_SCALE, key=keys[0]
        )
        self.W_in = eqx.nn.Linear(inputs, features, key=keys[1])
        self.norm_in = eqx.nn.LayerNorm(features, LAYER_NORM_EPS)
        self.gru = eqx.nn.GRUCell(features, features, key=keys[2])
        self.prior = MLP(features, width, 1, flat_z, key=keys[3])
        self.z_shape, self.features = z_shape, features
        self.action_classes = action_shape[1]

    def init_carry(self) -> Carry:
        """The state before an episode: h = 0, z = the prior's mode there."""
        h = jnp.zeros((1, self.features))
        return Carry(h, mode_onehot(self.prior(h[0]).reshape(self.z_shape)))

    def discretise(self) -> "RSSM":
        """Itself: time is discrete here."""
        return self

    def predict(
        self, carry: Carry, action: Float[Array, "G A"], is_first: Bool[Array, ""]
    ) -> tuple[Float[Array, " H"], Float[Array, "S K"]]:
        """h_t and the prior's logits. (RSSM 1)"""
        start = self.init_carry()
        h = jnp.where(is_first, start.x[0], carry.x[0])
        z = jnp.where(is_first, start.z, carry.z)
        action = jnp.where(is_first, 0, action)
        flat = jnp.concatenate([z.reshape(-1), action.reshape(-1)])
        u = jax.nn.silu(self.norm_in(self.W_in(flat)))
        h = self.gru(u, h)  # (RSSM 1)
        return h, self.prior(h).reshape(self.z_shape)

    def _observe_embed(self, carry, action, is_first, embed, key):
        onehot = jax.nn.one_hot(action, self.action_classes)
        h, prior = self.predict(carry, onehot, is_first)
        logits = self.posterior(jnp.concatenate([embed, h])).reshape(self.z_shape)
        z = sample_onehot(logits, key)  # (RSSM 2)
        return Latent(h[None], z, h, prior), logits

    def observe(
        self, steps: Transition, carry: Carry, *, key: PRNGKeyArray
    ) -> tuple[Latent, Float[Array, "T S K"]]:
        """Latents of a sequence that follows `carry`, and the posterior's logits."""
        embed = jax.vmap(self.encoder)(steps.obs)

        def step(carry, inputs):
            latent, logits = self._observe_embed(carry, *inputs)
            return latent.carry, (latent, logits)

        keys = jax.random.split(key, steps.reward.shape[0])
        inputs = (steps.action, steps.is_first, embed, keys)
        return jax.lax.scan(step, carry, inputs)[1]

    def step(
        self,
        carry: Carry,
        action: UInt8[Array, " G"],
        is_first: Bool[Array, ""],
        obs: Observation,
        *,
        key: PRNGKeyArray,
    ) -> Latent:
        """The latent after one more observation."""
        return self._observe_embed(carry, action, is_first, self.encoder(obs), key)[0]

    def imagine(
        self, carry: Carry, action: Float[Array, "G A"], *, key: PRNGKeyArray
    ) -> Latent:
        """One step without an observation, z ~ prior. (RSSM 2)"""
        h, prior = self.predict(carry, action, jnp.array(False))
        return Latent(h[None], sample_onehot(prior, key), h, prior)
