"""One level of the hierarchy: what it is, what it imagines, and its losses.

    a_τ ~ π(a | feat_τ, symlog(r̂_τ, ĉ_τ, H[p_τ]), goal)             (SUB 1)
    R_τ = r_τ + γ_τ ((1-λ) V_{τ+1} + λ R_{τ+1}),  γ_τ = γ_s ĉ_τ     (SUB 2)
    A_τ = Σ_s w_s (R_τ^s - V_τ^s) / max(1, scale_s)                 (SUB 3)
    L_actor = -W_τ (ln π(a_τ) sg(A_τ) + η H[π]),  W_τ = Π_{j<τ} γ ĉ_j (SUB 4)
    L_critic = -W_τ (ln p(R_τ) + ln p(V_slow))                      (SUB 5)

The three rewards s, extrinsic, subgoal and novelty, are kept apart: each has its own
critic, λ-return and scale. γ_s is γ, times `goal_discount` for the subgoal reward:
goals are held for k steps, and what comes later does not count towards them. Nothing
is differentiated through the world model.

Mattes, Schlosser, Herbrich, "Hieros", ICML 2024. Official:
hieros/models.py, class ImagBehavior. Differs from the official code in: Δ12 prior
entropy, Δ13 goals decoded now, Δ15 advantages are normalised, Δ25 γ_subgoal, Δ27 rows
of codes summed, Δ28 advantages added, Δ29 rewards without symlog, Δ32 ends weigh 0.

Axes: R rewards, τ imagined time, steps τ - 1, M start states, G × A action code, Sg ×
Kg goal code, H features of h, I inputs of actor and critics. As values R_τ is a return,
A_τ an advantage; `sg` stops gradients. Of the `horizon` imagined states the start is
one.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from nets import (
    BINS,
    MLP,
    entropy,
    log_prob,
    sample_onehot,
    symlog,
    twohot_log_prob,
    unimix_probs,
)
from s5wm import Latent, WorldModel
from subgoal import Autoencoder

sg = jax.lax.stop_gradient


class Subactor(eqx.Module):
    """World model, actor, critics and autoencoder of one level.

    `goal_shape` is None for the top level, which is given no goal; the `autoencoder`
    is None where neither goals nor novelty ask for one. `critics` are stacked over
    `rewards`, in that order.
    """

    world_model: WorldModel
    actor: MLP
    critics: MLP
    autoencoder: Autoencoder | None
    rewards: tuple[str, ...] = eqx.field(static=True)
    action_shape: tuple[int, int] = eqx.field(static=True)
    goal_shape: tuple[int, int] | None = eqx.field(static=True)

    def __init__(
        self,
        world_model: WorldModel,
        autoencoder: Autoencoder | None,
        action_shape: tuple[int, int],
        goal_shape: tuple[int, int] | None,
        rewards: tuple[str, ...],
        *,
        width: int,
        layers: int,
        key: PRNGKeyArray,
    ):
        actor_key, critic_key = jax.random.split(key)
        goal = 0 if goal_shape is None else goal_shape[0] * goal_shape[1]
        feat = math.prod(world_model.z_shape) + world_model.features
        inputs = feat + 3 + goal
        actions = action_shape[0] * action_shape[1]
        self.world_model, self.autoencoder = world_model, autoencoder
        self.actor = MLP(inputs, width, layers, actions, key=actor_key)
        self.critics = eqx.filter_vmap(
            lambda key: MLP(inputs, width, layers, BINS, last_scale=0.0, key=key)
        )(jax.random.split(critic_key, len(rewards)))
        self.rewards, self.action_shape = rewards, action_shape
        self.goal_shape = goal_shape

    def policy_input(
        self, latent: Latent, goal: Float[Array, "Sg Kg"] | None
    ) -> tuple[Float[Array, " I"], Float[Array, ""], Float[Array, ""]]:
        """What actor and critics see, and r̂, ĉ, which are part of it. (SUB 1)"""
        reward, cont, prior_entropy = self.world_model.heads.outlook(latent)
        parts = [latent.feat, symlog(jnp.stack([reward, cont, prior_entropy]))]
        if goal is not None:
            parts.append(goal.reshape(-1))
        return jnp.concatenate(parts), reward, cont

    def goal_onehot(
        self, goal: UInt8[Array, "*B Sg"] | None
    ) -> Float[Array, "*B Sg Kg"] | None:
        """The same goal as one-hots; at the top, where there is none, None."""
        return None if goal is None else jax.nn.one_hot(goal, self.goal_shape[1])

    def action_logits(self, inputs: Float[Array, " I"]) -> Float[Array, "G A"]:
        return self.actor(inputs).reshape(self.action_shape)

    def act(
        self, latent: Latent, goal: UInt8[Array, " Sg"] | None, *, key: PRNGKeyArray
    ) -> UInt8[Array, " G"]:
        """Classes of a sampled action, given the classes of the goal. (SUB 1)"""
        inputs, _, _ = self.policy_input(latent, self.goal_onehot(goal))
        p = unimix_probs(self.action_logits(inputs))
        return jax.random.categorical(key, jnp.log(p)).astype(jnp.uint8)


class Rollout(eqx.Module):
    """Imagined trajectories; `action` has one entry less than the states."""

    inputs: Float[Array, "tau M I"]
    action: Float[Array, "tau-1 M G A"]
    reward: Float[Array, "tau M"]
    cont: Float[Array, "tau M"]
    h: Float[Array, "tau M H"]


def imagine(
    subactor: Subactor,
    start: Latent,
    goal: Float[Array, "M Sg Kg"] | None,
    horizon: int,
    *,
    key: PRNGKeyArray,
) -> Rollout:
    """`horizon` states from each start, goal held. Not differentiable. (SUB 1)"""
    model = subactor.world_model.discretise()
    M = start.h.shape[0]

    def step(latent_inputs, key):
        latent, inputs = latent_inputs
        action_key, model_key = jax.random.split(key)
        logits = jax.vmap(subactor.action_logits)(inputs)
        action = sample_onehot(logits, action_key)  # (SUB 1)
        keys = jax.random.split(model_key, M)
        latent = jax.vmap(lambda c, a, k: model.imagine(c, a, key=k))(
            latent.carry, action, keys
        )
        inputs, reward, cont = jax.vmap(subactor.policy_input)(latent, goal)
        return (latent, inputs), (action, (inputs, reward, cont, latent.h))

    inputs, reward, cont = jax.vmap(subactor.policy_input)(start, goal)
    keys = jax.random.split(key, horizon - 1)
    _, (action, later) = jax.lax.scan(step, (start, inputs), keys)
    join = lambda first, rest: jnp.concatenate([first[None], rest])
    states = jax.tree.map(join, (inputs, reward, cont, start.h), later)
    inputs, reward, cont, h = states
    return sg(Rollout(inputs, action, reward, cont, h))


def critic_logits(
    critics: MLP, inputs: Float[Array, "tau M I"]
) -> Float[Array, "R tau M 255"]:
    """Bins of every stacked critic at every state, as one batched product."""
    return jax.vmap(lambda critic: jax.vmap(jax.vmap(critic))(inputs))(critics)


def lambda_return(
    reward: Float[Array, " tau"],
    value: Float[Array, " tau"],
    discount: Float[Array, " tau"],
    lambda_: float,
) -> Float[Array, " tau-1"]:
    """λ-returns of one trajectory, bootstrapped from its last value. (SUB 2)"""

    def back(R_next, inputs):
        r, gamma, v_next = inputs
        R = r + gamma * ((1 - lambda_) * v_next + lambda_ * R_next)  # (SUB 2)
        return R, R

    inputs = (reward[:-1], discount[:-1], value[1:])
    return jax.lax.scan(back, value[-1], inputs, reverse=True)[1]


def lambda_returns(
    reward: Float[Array, "R tau M"],
    value: Float[Array, "R tau M"],
    discount: Float[Array, "R tau M"],
    lambda_: float,
) -> Float[Array, "R tau-1 M"]:
    """`lambda_return` of every reward along every trajectory. (SUB 2)"""
    one = lambda r, v, gamma: lambda_return(r, v, gamma, lambda_)
    return jax.vmap(jax.vmap(one, in_axes=1, out_axes=1))(reward, value, discount)


def advantages(
    returns: Float[Array, "R steps M"],
    value: Float[Array, "R tau M"],
    scale: Float[Array, " R"],
    weights: Float[Array, " R"],
) -> Float[Array, "R steps M"]:
    """Of every reward, weighted; their sum is what the actor follows. (SUB 3)"""
    normed = (returns - value[:, :-1]) / jnp.maximum(1, scale)[:, None, None]
    return weights[:, None, None] * normed  # (SUB 3)


def survival(cont: Float[Array, "tau M"], discount: float) -> Float[Array, "tau-1 M"]:
    """W_τ, the discounted probability that no state before τ was an end. (SUB 4)"""
    before = jnp.concatenate([jnp.ones_like(cont[:1]), discount * cont[:-2]])
    return jnp.cumprod(before, 0)  # (SUB 4)


def actor_loss(
    actor: MLP,
    rollout: Rollout,
    advantage: Float[Array, "steps M"],
    weight: Float[Array, "steps M"],
    entropy_scale: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """REINFORCE with a bonus for entropy; also the mean entropy in nats. (SUB 4)"""
    logits = jax.vmap(jax.vmap(actor))(rollout.inputs[:-1])
    logits = logits.reshape(rollout.action.shape)
    H_pi, ln_pi = entropy(logits), log_prob(logits, rollout.action)
    objective = ln_pi * advantage + entropy_scale * H_pi
    return -(weight * objective).mean(), H_pi.mean()  # (SUB 4)


def critic_loss(
    logits: Float[Array, "R steps M 255"],
    returns: Float[Array, "R steps M"],
    slow_value: Float[Array, "R steps M"],
    weight: Float[Array, "steps M"],
) -> tuple[Float[Array, ""], Float[Array, " R"]]:
    """Towards the returns and the slow critics; summed, and of each reward. (SUB 5)"""
    fit = twohot_log_prob(logits, returns) + twohot_log_prob(logits, slow_value)
    each = -(weight * fit).mean((1, 2))  # (SUB 5)
    return each.sum(), each
