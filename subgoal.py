"""Subgoals: states as codes that one level can hand to the level below.

    S_t = (symlog(h_t) - mean) / std,  running over imagined states  (GOAL 1)
    g = code ~ encode(S),  Ŝ = decode(code)                         (GOAL 2)
    L = mean (S - Ŝ)² + β mean_rows KL[code ‖ uniform]              (GOAL 3)
    r_g = max(0, ⟨G, S⟩ / max(‖G‖, ‖S‖)²),  G = decode(goal)        (GOAL 4)
    r_nov = mean (S - Ŝ)²                                           (GOAL 5)

Standardised, because symlog(h) has so little variance that the KL term of (GOAL 3)
collapses the code: then every goal decodes to the mean of h, and r_g is the same for
any goal. Even then β = 0.5 leaves the code one to three nats of the 17 it could hold,
and goals that say so little cannot be followed. The slides leave the square out of
(GOAL 4), without which it is unbounded.

Mattes, Schlosser, Herbrich, "Hieros", ICML 2024; Hafner et al., "Deep
Hierarchical Planning from Pixels", 2022. Official:
hieros/models.py, class SubgoalAutoencoder.
Differs from the official code in: Δ13 goals decoded now, Δ14 novelty in the same space,
Δ16 final linear layers, Δ23 standardised, Δ24 β is 0.01, not 0.5, Δ29 rewards without
symlog, Δ30 sampled codes.

Axes: M states, H features of h, Sg categoricals × Kg classes of a code. S and G are
values: a state and a goal.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from nets import MLP, mode_onehot, sample_onehot, symlog, unimix_probs


def subgoal_reward(
    goal: Float[Array, " H"], state: Float[Array, " H"]
) -> Float[Array, ""]:
    """Agreement of direction and length, in [0, 1]; 1 iff goal = state. (GOAL 4)"""
    longest = jnp.maximum(goal @ goal, state @ state)
    return jnp.maximum(0, goal @ state / jnp.maximum(longest, 1e-8))  # (GOAL 4)


class Standardiser(eqx.Module):
    """Running mean and spread per dimension, the first batch's to begin with."""

    mean: Float[Array, " H"]
    var: Float[Array, " H"]
    started: Bool[Array, ""]
    enabled: bool = eqx.field(static=True)

    def __init__(self, features: int, enabled: bool = True):
        self.mean, self.var = jnp.zeros(features), jnp.ones(features)
        self.started = jnp.array(False)
        self.enabled = enabled

    def __call__(self, h: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        """S of raw h; plain symlog(h) if not `enabled`. (GOAL 1)"""
        if not self.enabled:
            return symlog(h)
        return (symlog(h) - self.mean) / jnp.sqrt(self.var + 1e-6)  # (GOAL 1)

    def inverse(self, S: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        """symlog(h) of a standardised S."""
        return S * jnp.sqrt(self.var + 1e-6) + self.mean if self.enabled else S

    def update(self, h: Float[Array, "M H"], decay: float) -> "Standardiser":
        """The same after another batch of h."""
        decay = jnp.where(self.started, decay, 0.0)
        mean = decay * self.mean + (1 - decay) * symlog(h).mean(0)
        var = decay * self.var + (1 - decay) * symlog(h).var(0)
        new = (mean, var, jnp.array(True))
        return eqx.tree_at(lambda s: (s.mean, s.var, s.started), self, new)


class Autoencoder(eqx.Module):
    """Standardised features ↔ a code of Sg categoricals of Kg classes. (GOAL 2)"""

    encoder: MLP
    decoder: MLP
    code_shape: tuple[int, int] = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        code_shape: tuple[int, int],
        *,
        encoder_width: int,
        decoder_width: int,
        layers: int,
        key: PRNGKeyArray,
    ):
        encoder_key, decoder_key = jax.random.split(key)
        code = code_shape[0] * code_shape[1]
        gelu = jax.nn.gelu
        self.encoder = MLP(
            features, encoder_width, layers, code, activation=gelu, key=encoder_key
        )
        self.decoder = MLP(
            code, decoder_width, layers, features, activation=gelu, key=decoder_key
        )
        self.code_shape = code_shape

    def logits(self, S: Float[Array, " H"]) -> Float[Array, "Sg Kg"]:
        return self.encoder(S).reshape(self.code_shape)

    def encode(self, S: Float[Array, " H"]) -> Float[Array, "Sg Kg"]:
        """The likeliest code of a state."""
        return mode_onehot(self.logits(S))  # (GOAL 2)

    def decode(self, code: Float[Array, "Sg Kg"]) -> Float[Array, " H"]:
        """The state that a code stands for."""
        return self.decoder(code.reshape(-1))  # (GOAL 2)

    def novelty(self, S: Float[Array, " H"]) -> Float[Array, ""]:
        """How badly a state is reproduced: what has not been seen often. (GOAL 5)"""
        return jnp.mean((S - self.decode(self.encode(S))) ** 2)  # (GOAL 5)


def autoencoder_loss(
    autoencoder: Autoencoder, S: Float[Array, "M H"], *, kl_scale: float, key
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Reconstruction plus code cost, and the health of the code. (GOAL 3)

    A code is dead when its KL per row is near 0, whatever its perplexity says.
    """
    sample_key, random_key = jax.random.split(key)
    Sg, Kg = autoencoder.code_shape
    logits = jax.vmap(autoencoder.logits)(S)
    S_hat = jax.vmap(autoencoder.decode)(sample_onehot(logits, sample_key))
    p = unimix_probs(logits)
    kl_rows = jnp.sum(p * (jnp.log(p) + jnp.log(Kg)), -1)
    error = jnp.mean((S - S_hat) ** 2)
    loss = error + kl_scale * kl_rows.mean()  # (GOAL 3)

    decode = jax.vmap(autoencoder.decode)
    random = jax.random.randint(random_key, (S.shape[0], Sg), 0, Kg)
    own = jax.vmap(subgoal_reward)(decode(mode_onehot(logits)), S)
    other = jax.vmap(subgoal_reward)(decode(jax.nn.one_hot(random, Kg)), S)
    metrics = {
        "loss_autoencoder": loss,
        "code_kl_per_row": kl_rows.mean(),
        "code_explained_variance": 1 - error / jnp.var(S, 0).mean(),
        "code_reward_own": own.mean(),
        "code_reward_random": other.mean(),
    }
    return loss, metrics
