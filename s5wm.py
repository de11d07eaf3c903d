"""S5WM: a world model whose memory is S5; observe in parallel, imagine step by step.

    z_t ~ q(z_t | o_t)                                              (WM 1)
    u_t = SiLU(LN(W_in [z_{t-1}; a_{t-1}])),  at is_first [z_init; 0]  (WM 2)
    x_t, y_t = S5Stack(x_{t-1}, u_t)                                (WM 3)
    m_t = W_m y_t                                                   (WM 4)
    h_t = symlog(W_h [Re x_t; Im x_t] + b + m_t)                    (WM 5)
    ẑ_t ~ p(z_t | m_t)                                              (WM 6)
    ô_t, r̂_t, ĉ_t from feat_t = [z_t; h_t]                          (WM 7)
    L = L_pred + 0.5 max(f, KL[sg q ‖ p]) + 0.1 max(f, KL[q ‖ sg p])  (WM 8)
    L_pred = |ô_t - o_t|² - ln p(r_t) - ln p(c_t)                     (WM 9)

r_t and o_t arrive together; a_{t-1} led to them; f are the free nats, 1 as published.
Squared errors of pictures weigh as if of 64×64×3 values, windows have their own loss
(nets.py). The logits of q start with a spread of about 2: a code that says something
from the start is one that the decoder learns to read, instead of drawing from h alone.

Mattes, Schlosser, Herbrich, "Hieros", ICML 2024. Official: hieros/
networks.py; hieros/models.py, class WorldModel. Differs from the official code in:
Δ1 alignment of actions, Δ2 the last reward counts, Δ10 features, Δ11 z windows, Δ26 q
starts sharp.

Axes: B batch, T time, S categoricals × K classes of z, G × A groups × classes of an
action, N layers, P states, H features of h, F = S·K + H. h is not the axis H. h is a
symlog already; windows and goals take symlog of it once more.
"""

from functools import partial
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, PRNGKeyArray, UInt8

from nets import (
    LAYER_NORM_EPS,
    MLP,
    FlatDecoder,
    FlatEncoder,
    ImageDecoder,
    ImageEncoder,
    Window,
    WindowDecoder,
    WindowEncoder,
    entropy,
    image_loss,
    kl_divergence,
    mode_onehot,
    sample_onehot,
    symlog,
    twohot_log_prob,
    twohot_mean,
    window_loss,
)
from s5 import S5Stack

POSTERIOR_SCALE = 6.0
Observation = UInt8[Array, "*T h w c"] | Window


class Carry(eqx.Module):
    """What the next step needs of this one: the memory and z."""

    x: Complex[Array, "*B N P"] | Float[Array, "*B N P"]
    z: Float[Array, "*B S K"]


class Latent(eqx.Module):
    """What a level knows at one time. `prior` are the logits of p(z_t | m_t)."""

    x: Complex[Array, "*B N P"] | Float[Array, "*B N P"]
    z: Float[Array, "*B S K"]
    h: Float[Array, "*B H"]
    prior: Float[Array, "*B S K"]

    @property
    def carry(self) -> Carry:
        return Carry(self.x, self.z)

    @property
    def feat(self) -> Float[Array, "*B F"]:
        return jnp.concatenate([self.z.reshape(*self.h.shape[:-1], -1), self.h], -1)


class Transition(eqx.Module):
    """One step of a level's experience, as the replay keeps it.

    `action` is the one that led to `obs`, `reward` the one that arrived with it;
    `goal` is the code in force from here on (None at the top). Codes are classes.
    """

    obs: Observation
    action: UInt8[Array, "*T G"]
    reward: Float[Array, "*T"]
    is_first: Bool[Array, "*T"]
    is_terminal: Bool[Array, "*T"]
    goal: UInt8[Array, "*T Sg"] | None


@runtime_checkable
class WorldModel(Protocol):
    """What a subactor asks of a world model; S5WM here, RSSM in rssm.py."""

    heads: "Heads"
    z_shape: tuple[int, int]
    features: int

    def init_carry(self) -> Carry: ...
    def discretise(self) -> "WorldModel": ...
    def observe(
        self, steps: Transition, carry: Carry, *, key: PRNGKeyArray
    ) -> tuple[Latent, Float[Array, "T S K"]]: ...
    def step(
        self,
        carry: Carry,
        action: UInt8[Array, " G"],
        is_first: Bool[Array, ""],
        obs: Observation,
        *,
        key: PRNGKeyArray,
    ) -> Latent: ...
    def imagine(
        self, carry: Carry, action: Float[Array, "G A"], *, key: PRNGKeyArray
    ) -> Latent: ...


class Heads(eqx.Module):
    """What is read off [z; h]: the observation, the reward, the continuation. (WM 7)"""

    decoder: ImageDecoder | FlatDecoder | WindowDecoder
    reward: MLP
    cont: MLP

    def outlook(
        self, latent: Latent
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """r̂_t, ĉ_t in [0, 1] and the prior's entropy in nats."""
        reward = twohot_mean(self.reward(latent.feat))
        cont = jax.nn.sigmoid(self.cont(latent.feat)[0])
        return reward, cont, entropy(latent.prior)


class S5WM(eqx.Module):
    """The S5 world model of one level. Batch with `vmap`.

    `action_shape` is (1, actions) for a game, (8, 8) for a level that sets goals.
    `h_source` names what h_t is made of: both, states or output (Δ10).
    """

    encoder: ImageEncoder | FlatEncoder | WindowEncoder
    posterior: MLP
    W_in: eqx.nn.Linear
    norm_in: eqx.nn.LayerNorm
    m_init: Float[Array, " H"]
    stack: S5Stack
    W_m: eqx.nn.Linear
    W_h: eqx.nn.Linear
    prior: MLP
    heads: Heads
    z_shape: tuple[int, int] = eqx.field(static=True)
    features: int = eqx.field(static=True)
    action_classes: int = eqx.field(static=True)
    h_source: str = eqx.field(static=True)

    def __init__(
        self,
        encoder: ImageEncoder | FlatEncoder | WindowEncoder,
        embed: int,
        heads: Heads,
        action_shape: tuple[int, int],
        *,
        z_shape: tuple[int, int],
        features: int,
        layers: int,
        states: int,
        blocks: int,
        width: int,
        scaled: bool = True,
        h_source: str = "both",
        key: PRNGKeyArray,
    ):
        keys = iter(jax.random.split(key, 7))
        flat_z = z_shape[0] * z_shape[1]
        flat_action = action_shape[0] * action_shape[1]
        self.encoder, self.heads = encoder, heads
        self.posterior = MLP(
            embed, width, 1, flat_z, last_scale=POSTERIOR_SCALE, key=next(keys)
        )
        self.W_in = eqx.nn.Linear(flat_z + flat_action, features, key=next(keys))
        self.norm_in = eqx.nn.LayerNorm(features, LAYER_NORM_EPS)
        self.m_init = jax.random.normal(next(keys), (features,))
        self.stack = S5Stack(
            features, layers, states, blocks, scaled=scaled, key=next(keys)
        )
        self.W_m = eqx.nn.Linear(features, features, use_bias=False, key=next(keys))
        self.W_h = eqx.nn.Linear(2 * layers * states, features, key=next(keys))
        self.prior = MLP(features, width, 1, flat_z, key=next(keys))
        self.z_shape, self.features = z_shape, features
        self.action_classes = action_shape[1]
        self.h_source = h_source

    def init_carry(self) -> Carry:
        """The state before an episode: x = 0, z = z_init."""
        return Carry(self.stack.init_carry(), self._z_init())

    def discretise(self) -> "S5WM":
        """The same model with its S5 layers discretised: do it once, before a loop."""
        return eqx.tree_at(lambda model: model.stack, self, self.stack.discretise())

    def _z_init(self) -> Float[Array, "S K"]:
        return mode_onehot(self.prior(self.m_init).reshape(self.z_shape))

    def _input(
        self,
        z: Float[Array, "S K"],
        action: Float[Array, "G A"],
        is_first: Bool[Array, ""],
    ) -> Float[Array, " H"]:
        z = jnp.where(is_first, self._z_init(), z)
        action = jnp.where(is_first, 0, action)
        flat = jnp.concatenate([z.reshape(-1), action.reshape(-1)])
        return jax.nn.silu(self.norm_in(self.W_in(flat)))  # (WM 2)

    def _read(
        self, x: Complex[Array, "N P"], y: Float[Array, " H"]
    ) -> tuple[Float[Array, " H"], Float[Array, "S K"]]:
        """h_t and the logits of the prior, from states and output of the stack."""
        m = self.W_m(y)  # (WM 4)
        states = self.W_h(jnp.concatenate([x.real.reshape(-1), x.imag.reshape(-1)]))
        parts = {"both": states + m, "states": states, "output": m}
        h = symlog(parts[self.h_source])  # (WM 5)
        return h, self.prior(m).reshape(self.z_shape)  # (WM 6)

    def posterior_logits(self, obs: Observation) -> Float[Array, "S K"]:
        """Logits of q(z_t | o_t): no memory, so all times are one pass. (WM 1)"""
        return self.posterior(self.encoder(obs)).reshape(self.z_shape)

    def predict(
        self,
        carry: Carry,
        action: Float[Array, "G A"],
        is_first: Bool[Array, ""],
    ) -> tuple[Complex[Array, "N P"], Float[Array, " H"], Float[Array, "S K"]]:
        """x_t, h_t and the prior's logits; needs a `discretise`d model. (WM 3)"""
        u = self._input(carry.z, action, is_first)
        x, y = self.stack.step(carry.x, u, is_first)  # (WM 3)
        return x, *self._read(x, y)

    def predict_all(
        self,
        z: Float[Array, "T S K"],
        carry: Carry,
        action: UInt8[Array, "T G"],
        is_first: Bool[Array, " T"],
        *,
        parallel: bool | None = None,
    ) -> Latent:
        """`predict` for a whole sequence at once, given all z. (WM 3)"""
        z_before = jnp.concatenate([carry.z[None], z[:-1]])
        action = jax.nn.one_hot(action, self.action_classes)
        u = jax.vmap(self._input)(z_before, action, is_first)
        stack = self.stack.discretise()
        x, y = stack.scan(u, is_first, carry.x, parallel=parallel)  # (WM 3)
        h, prior = jax.vmap(self._read)(x, y)
        return Latent(x, z, h, prior)

    def observe(
        self, steps: Transition, carry: Carry, *, key: PRNGKeyArray
    ) -> tuple[Latent, Float[Array, "T S K"]]:
        """Latents of a sequence that follows `carry`, and the posterior's logits."""
        logits = jax.vmap(self.posterior_logits)(steps.obs)
        z = sample_onehot(logits, key)  # (WM 1)
        return self.predict_all(z, carry, steps.action, steps.is_first), logits

    def step(
        self,
        carry: Carry,
        action: UInt8[Array, " G"],
        is_first: Bool[Array, ""],
        obs: Observation,
        *,
        key: PRNGKeyArray,
    ) -> Latent:
        """The latent after one more observation; the recurrent form of `observe`."""
        model = self.discretise()
        onehot = jax.nn.one_hot(action, self.action_classes)
        x, h, prior = model.predict(carry, onehot, is_first)
        return Latent(x, sample_onehot(self.posterior_logits(obs), key), h, prior)

    def imagine(
        self, carry: Carry, action: Float[Array, "G A"], *, key: PRNGKeyArray
    ) -> Latent:
        """One step without an observation, z ~ prior. Needs a `discretise`d model."""
        x, h, prior = self.predict(carry, action, jnp.array(False))
        return Latent(x, sample_onehot(prior, key), h, prior)  # (WM 6)


def prediction_losses(
    heads: Heads,
    feat: Float[Array, " F"],
    obs: Observation,
    reward: Float[Array, ""],
    is_terminal: Bool[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """L_pred of one step, its three summands: o, r and c. (WM 9)"""
    of_observation = window_loss if isinstance(obs, Window) else image_loss
    cont = heads.cont(feat)[0]
    return (  # (WM 9)
        of_observation(heads.decoder(feat), obs),
        -twohot_log_prob(heads.reward(feat), reward),
        jax.nn.softplus(jnp.where(is_terminal, cont, -cont)),
    )


def world_model_loss(
    model: WorldModel,
    batch: Transition,
    carry: Carry,
    *,
    free_nats: float,
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], tuple[Latent, dict[str, Float[Array, ""]]]]:
    """Mean over (B, T) of the loss; also the latents (B, T) and each part. (WM 8)

    KL is summed over the categoricals before the floor of `free_nats`.
    """
    keys = jax.random.split(key, batch.reward.shape[0])
    observe = jax.vmap(lambda steps, carry, key: model.observe(steps, carry, key=key))
    latent, q = observe(batch, carry, keys)
    sg = jax.lax.stop_gradient

    per_step = jax.vmap(jax.vmap(partial(prediction_losses, model.heads)))
    observation, reward, cont = per_step(
        latent.feat, batch.obs, batch.reward, batch.is_terminal
    )
    kl_dyn = kl_divergence(sg(q), latent.prior)
    kl_rep = kl_divergence(q, sg(latent.prior))
    loss = (
        observation
        + reward
        + cont
        + 0.5 * jnp.maximum(free_nats, kl_dyn)
        + 0.1 * jnp.maximum(free_nats, kl_rep)
    ).mean()  # (WM 8)
    metrics = {
        "loss_observation": observation.mean(),
        "loss_reward": reward.mean(),
        "loss_cont": cont.mean(),
        "kl": kl_dyn.mean(),
        "entropy_prior": entropy(latent.prior).mean(),
        "entropy_posterior": entropy(q).mean(),
        "loss_world_model": loss,
    }
    return loss, (latent, metrics)
