"""How a level learns: one gradient step of each of its parts, on one batch of windows.

    world model   its loss on the windows; their states are kept
    imagination   from M of those states, the goal of the time held
    standardiser  running mean and variance of symlog(h) in imagination
    behaviour     λ-returns of every reward, normalised advantages; actor, critics
    autoencoder   its loss on the imagined h

The parts that imagine are given the world model as it is after its own step, none of
their gradients reaches it. The equations are those of s5wm.py, subactor.py (whose Δ
hold here) and subgoal.py; slow critics move a `slow_rate` of the way in every update.

Mattes, Schlosser, Herbrich, "Hieros", ICML 2024. Official:
hieros/models.py, classes WorldModel, ImagBehavior, SubgoalAutoencoder.

Axes: B batch, T time, R rewards, τ imagined time, steps τ - 1, M start states, Sg × Kg
goal code, H features of h. As values S is a standardised state and G a decoded goal.
"""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from nets import MLP, twohot_mean
from s5wm import Carry, Latent, Transition, world_model_loss
from subactor import (
    Rollout,
    Subactor,
    actor_loss,
    advantages,
    critic_logits,
    critic_loss,
    imagine,
    lambda_returns,
    sg,
    survival,
)
from subgoal import Standardiser, autoencoder_loss, subgoal_reward

REWARDS = ("extrinsic", "subgoal", "novelty")


class Learner(eqx.Module):
    """All of one level that training changes."""

    subactor: Subactor
    slow_critics: MLP
    standardiser: Standardiser
    return_scale: Float[Array, " R"]
    world_model_adam: optax.OptState
    actor_adam: optax.OptState
    critics_adam: optax.OptState
    autoencoder_adam: optax.OptState | None
    updates: Int[Array, ""]

    def rewards(
        self,
        extrinsic: Float[Array, "*B M"],
        h: Float[Array, "*B M H"],
        goal: Float[Array, "M Sg Kg"] | None,
    ) -> dict[str, Float[Array, "*B M"]]:
        """Those that exist at this level, by name; goals as one-hots."""
        rewards, autoencoder = {"extrinsic": extrinsic}, self.subactor.autoencoder
        if autoencoder is None:
            return rewards
        S = self.standardiser(h)
        if goal is not None:
            G = jnp.broadcast_to(jax.vmap(autoencoder.decode)(goal), S.shape)
            per_state = jnp.vectorize(subgoal_reward, signature="(h),(h)->()")
            rewards["subgoal"] = per_state(G, S)
        per_state = jnp.vectorize(autoencoder.novelty, signature="(h)->()")
        rewards["novelty"] = per_state(S)
        return rewards


Metrics = dict[str, Float[Array, ""]]


def descend(
    adam: optax.GradientTransformation, grads, learner: Learner, where
) -> Learner:
    """One step of the part that `where(learner)` gives, with its optimiser's state."""
    part, state = where(learner)
    step, state = adam.update(grads, state)
    return eqx.tree_at(where, learner, (optax.apply_updates(part, step), state))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Trainer:
    """How a level learns: every field is a constant, `update` is one pure function.

    `imagination_starts` is the number of start states per update, at most B·T.
    `reward_weights` are w for extrinsic, subgoal and novelty.
    """

    horizon: int
    imagination_starts: int
    discount: float
    goal_discount: float
    lambda_: float
    entropy_scale: float
    slow_rate: float
    running_decay: float
    normalise_returns: bool
    reward_weights: tuple[float, float, float]
    free_nats: float
    code_kl_scale: float
    standardise: bool
    world_model_lr: float
    world_model_warmup: int
    world_model_clip: float
    actor_critic_lr: float
    autoencoder_lr: float

    def _adam(self, lr: float, eps: float, clip: float, warmup: int = 0):
        rate = optax.linear_schedule(0, lr, warmup) if warmup else lr
        return optax.chain(optax.clip_by_global_norm(clip), optax.adam(rate, eps=eps))

    @property
    def _world_model_adam(self) -> optax.GradientTransformation:
        lr, clip = self.world_model_lr, self.world_model_clip
        return self._adam(lr, 1e-8, clip, self.world_model_warmup)

    @property
    def _actor_critic_adam(self) -> optax.GradientTransformation:
        return self._adam(self.actor_critic_lr, 1e-5, 100.0)

    @property
    def _autoencoder_adam(self) -> optax.GradientTransformation:
        return self._adam(self.autoencoder_lr, 1e-6, 100.0)

    def init(self, subactor: Subactor) -> Learner:
        """A learner before its first update."""
        autoencoder, features = subactor.autoencoder, subactor.world_model.features
        return Learner(
            subactor=subactor,
            slow_critics=jax.tree.map(jnp.copy, subactor.critics),
            standardiser=Standardiser(features, self.standardise),
            return_scale=jnp.zeros(len(subactor.rewards)),
            world_model_adam=self._world_model_adam.init(subactor.world_model),
            actor_adam=self._actor_critic_adam.init(subactor.actor),
            critics_adam=self._actor_critic_adam.init(subactor.critics),
            autoencoder_adam=autoencoder and self._autoencoder_adam.init(autoencoder),
            updates=jnp.array(0, jnp.int32),
        )

    def update(
        self, learner: Learner, batch: Transition, carry: Carry, *, key: PRNGKeyArray
    ) -> tuple[Learner, Carry, Metrics]:
        """One gradient step of every part on a batch (B, T) that follows `carry` (B).

        Also returns the recomputed carries (B, T), which the replay writes back.
        """
        model_key, start_key, imagine_key, code_key = jax.random.split(key, 4)
        learner, latent, metrics = self._learn_world_model(
            learner, batch, carry, key=model_key
        )
        start, goal, alive = self._starts(learner, latent, batch, key=start_key)
        rollout = imagine(learner.subactor, start, goal, self.horizon, key=imagine_key)
        standardiser = learner.standardiser.update(
            rollout.h.reshape(-1, rollout.h.shape[-1]), self.running_decay
        )
        learner = replace(learner, standardiser=standardiser)
        real = self._real_rewards(learner, latent, batch)
        learner, behaviour = self._learn_behaviour(learner, rollout, goal, alive)
        learner, code = self._learn_code(learner, rollout.h, key=code_key)
        learner = replace(learner, updates=learner.updates + 1)
        return learner, latent.carry, metrics | real | behaviour | code

    def _learn_world_model(
        self, learner: Learner, batch: Transition, carry: Carry, *, key: PRNGKeyArray
    ) -> tuple[Learner, Latent, Metrics]:
        model = learner.subactor.world_model
        (_, (latent, metrics)), grads = jax.value_and_grad(
            lambda model: world_model_loss(
                model, batch, carry, free_nats=self.free_nats, key=key
            ),
            has_aux=True,
        )(model)
        where = lambda x: (x.subactor.world_model, x.world_model_adam)
        learner = descend(self._world_model_adam, grads, learner, where)
        metrics["grad_norm_world_model"] = optax.global_norm(grads)
        return learner, sg(latent), metrics

    def _starts(
        self,
        learner: Learner,
        latent: Latent,
        batch: Transition,
        *,
        key: PRNGKeyArray,
    ) -> tuple[Latent, Float[Array, "M Sg Kg"] | None, Float[Array, " M"]]:
        """Start states, their goals, and weight 0 for those that are a game's end."""
        total = batch.reward.size
        chosen = jnp.arange(total)
        if self.imagination_starts < total:
            shape = (self.imagination_starts,)
            chosen = jax.random.choice(key, total, shape, replace=False)

        def pick(x):
            return x.reshape(total, *x.shape[2:])[chosen]

        start, goal = jax.tree.map(pick, (latent, batch.goal))
        alive = 1.0 - pick(batch.is_terminal)
        return start, learner.subactor.goal_onehot(goal), alive

    def _real_rewards(
        self, learner: Learner, latent: Latent, batch: Transition
    ) -> Metrics:
        """The same rewards on replayed states, to watch beside the imagined ones.

        A goal set at a step counts from that step on.
        """
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        reward, h, goal = jax.tree.map(flat, (batch.reward, latent.h, batch.goal))
        goal = learner.subactor.goal_onehot(goal)
        rewards = learner.rewards(reward, h, goal)
        return {f"real_{name}": reward.mean() for name, reward in rewards.items()}

    def _learn_behaviour(
        self,
        learner: Learner,
        rollout: Rollout,
        goal: Float[Array, "M Sg Kg"] | None,
        alive: Float[Array, " M"],
    ) -> tuple[Learner, Metrics]:
        """REINFORCE and the critics, on one batch of imagined trajectories."""
        subactor, inputs = learner.subactor, rollout.inputs
        rewards = learner.rewards(rollout.reward, rollout.h, goal)
        reward = jnp.stack([rewards[name] for name in subactor.rewards])
        weights, gamma = self._of_each_reward(subactor)
        # One forward pass serves values and loss: its gradient is pulled back below.
        logits, pull = jax.vjp(lambda c: critic_logits(c, inputs), subactor.critics)
        value, gamma = twohot_mean(logits), gamma[:, None, None] * rollout.cont
        returns = lambda_returns(reward, value, gamma, self.lambda_)
        scale = self._return_scale(learner, returns)
        advantage = advantages(returns, value, scale, weights)
        weight = alive * survival(rollout.cont, self.discount)
        slow = jax.tree.map(
            lambda slow, fast: slow + self.slow_rate * (fast - slow),
            learner.slow_critics,
            subactor.critics,
        )
        slow_value = twohot_mean(critic_logits(slow, inputs[:-1]))
        (loss_actor, H_pi), actor_grads = jax.value_and_grad(actor_loss, has_aux=True)(
            subactor.actor, rollout, advantage.sum(0), weight, self.entropy_scale
        )
        logit_grads, loss_critic = jax.grad(
            lambda logits: critic_loss(logits[:, :-1], returns, slow_value, weight),
            has_aux=True,
        )(logits)
        (critic_grads,) = pull(logit_grads)
        metrics = {
            "loss_actor": loss_actor,
            "entropy_actor": H_pi,
            "grad_norm_actor": optax.global_norm(actor_grads),
            "grad_norm_critics": optax.global_norm(critic_grads),
        }
        for r, name in enumerate(subactor.rewards):
            metrics[f"loss_critic_{name}"] = loss_critic[r]
            metrics[f"value_{name}"] = value[r].mean()
            metrics[f"return_{name}"] = returns[r].mean()
            metrics[f"return_scale_{name}"] = scale[r]
            metrics[f"advantage_{name}"] = jnp.abs(advantage[r]).mean()
        for name, x in rewards.items():  # weighted like the losses
            total = (weight * x[:-1]).sum()
            metrics[f"imagined_{name}"] = total / jnp.maximum(weight.sum(), 1e-8)
        learner = replace(learner, slow_critics=slow, return_scale=scale)
        adam = self._actor_critic_adam
        learner = descend(
            adam, actor_grads, learner, lambda x: (x.subactor.actor, x.actor_adam)
        )
        return descend(
            adam, critic_grads, learner, lambda x: (x.subactor.critics, x.critics_adam)
        ), metrics

    def _of_each_reward(self, subactor: Subactor) -> Float[Array, "2 R"]:
        """w_s and γ_s of the rewards that exist at this level."""
        w = dict(zip(REWARDS, self.reward_weights, strict=True))
        gamma = dict.fromkeys(REWARDS, self.discount)
        gamma["subgoal"] *= self.goal_discount
        return jnp.array([[x[name] for name in subactor.rewards] for x in (w, gamma)])

    def _return_scale(
        self, learner: Learner, returns: Float[Array, "R steps M"]
    ) -> Float[Array, " R"]:
        """Running 5-95 % range of each reward's returns; 1 if not normalised."""
        if not self.normalise_returns:
            return jnp.ones_like(learner.return_scale)
        flat = returns.reshape(returns.shape[0], -1)
        low, high = jnp.percentile(flat, jnp.array([5.0, 95.0]), axis=1)
        decay = jnp.where(learner.updates == 0, 0.0, self.running_decay)
        return decay * learner.return_scale + (1 - decay) * (high - low)

    def _learn_code(
        self, learner: Learner, h: Float[Array, "tau M H"], *, key: PRNGKeyArray
    ) -> tuple[Learner, Metrics]:
        autoencoder = learner.subactor.autoencoder
        if autoencoder is None:
            return learner, {}
        S = learner.standardiser(h.reshape(-1, h.shape[-1]))
        grads, metrics = jax.grad(
            lambda autoencoder: autoencoder_loss(
                autoencoder, S, kl_scale=self.code_kl_scale, key=key
            ),
            has_aux=True,
        )(autoencoder)
        where = lambda x: (x.subactor.autoencoder, x.autoencoder_adam)
        metrics["grad_norm_autoencoder"] = optax.global_norm(grads)
        return descend(self._autoencoder_adam, grads, learner, where), metrics
