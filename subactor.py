"""One level of the hierarchy: an actor-critic that learns in imagination.

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
entropy, Δ13 goals decoded now, Δ15 advantages are normalised, Δ25 γ_subgoal.

Axes: R rewards, τ imagined time, M start states, G × A action code, Sg × Kg goal
code, H features of h. As values R_τ is a return, A_τ an advantage, G a decoded goal, S
a standardised state; `sg` stops gradients. The imagined horizon is `horizon` states,
start included.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from nets import (
    BINS,
    MLP,
    entropy,
    log_prob,
    sample_onehot,
    symlog,
    twohot_log_prob,
    twohot_mean,
    unimix_probs,
)
from s5wm import Carry, Latent, Transition, WorldModel, world_model_loss
from subgoal import Autoencoder, Standardiser, autoencoder_loss, subgoal_reward

REWARDS = ("extrinsic", "subgoal", "novelty")
sg = jax.lax.stop_gradient


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
        features: int,
        width: int,
        layers: int,
        key: PRNGKeyArray,
    ):
        actor_key, critic_key = jax.random.split(key)
        goal = 0 if goal_shape is None else goal_shape[0] * goal_shape[1]
        inputs = features + 3 + goal
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
        reward, cont, surprise = self.world_model.heads.outlook(latent)
        parts = [latent.feat, symlog(jnp.stack([reward, cont, surprise]))]
        if goal is not None:
            parts.append(goal.reshape(-1))
        return jnp.concatenate(parts), reward, cont

    def action_logits(self, inputs: Float[Array, " I"]) -> Float[Array, "G A"]:
        return self.actor(inputs).reshape(self.action_shape)

    def act(
        self, latent: Latent, goal: UInt8[Array, " Sg"] | None, *, key: PRNGKeyArray
    ) -> UInt8[Array, " G"]:
        """Classes of a sampled action, given the classes of the goal. (SUB 1)"""
        if goal is not None:
            goal = jax.nn.one_hot(goal, self.goal_shape[1])
        inputs, _, _ = self.policy_input(latent, goal)
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
        return (latent, inputs), (inputs, action, reward, cont, latent.h)

    inputs, reward, cont = jax.vmap(subactor.policy_input)(start, goal)
    keys = jax.random.split(key, horizon - 1)
    _, imagined = jax.lax.scan(step, (start, inputs), keys)

    def with_start(first, rest):
        return jnp.concatenate([first[None], rest])

    return sg(
        Rollout(
            inputs=with_start(inputs, imagined[0]),
            action=imagined[1],
            reward=with_start(reward, imagined[2]),
            cont=with_start(cont, imagined[3]),
            h=with_start(start.h, imagined[4]),
        )
    )


class Learner(eqx.Module):
    """All of one level that training changes; a checkpoint of it is complete."""

    subactor: Subactor
    slow_critics: MLP
    standardiser: Standardiser
    return_scale: Float[Array, " R"]
    world_model_adam: optax.OptState
    actor_adam: optax.OptState
    critics_adam: optax.OptState
    autoencoder_adam: optax.OptState | None
    updates: Int[Array, ""]


Metrics = dict[str, Float[Array, ""]]


class Trainer(eqx.Module):
    """How a level learns: every field is a constant, `update` is one pure function.

    `imagination_starts` is the number of start states per update, at most B·T.
    `reward_weights` are w for extrinsic, subgoal and novelty.
    """

    horizon: int = eqx.field(static=True)
    imagination_starts: int = eqx.field(static=True)
    discount: float = eqx.field(static=True)
    goal_discount: float = eqx.field(static=True)
    lambda_: float = eqx.field(static=True)
    entropy_scale: float = eqx.field(static=True)
    slow_rate: float = eqx.field(static=True)
    running_decay: float = eqx.field(static=True)
    normalise_returns: bool = eqx.field(static=True)
    reward_weights: tuple[float, float, float] = eqx.field(static=True)
    free_nats: float = eqx.field(static=True)
    code_kl_scale: float = eqx.field(static=True)
    standardise: bool = eqx.field(static=True)
    world_model_lr: float = eqx.field(static=True)
    world_model_warmup: int = eqx.field(static=True)
    world_model_clip: float = eqx.field(static=True)
    actor_critic_lr: float = eqx.field(static=True)
    autoencoder_lr: float = eqx.field(static=True)

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

    def init(self, subactor: Subactor, features: int) -> Learner:
        """A learner before its first update. `features` is the size H of h."""
        autoencoder = subactor.autoencoder
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
        learner = eqx.tree_at(lambda x: x.standardiser, learner, standardiser)
        real = self._real_rewards(learner, latent, batch)
        learner, behaviour = self._learn_behaviour(learner, rollout, goal, alive)
        learner, code = self._learn_code(learner, rollout.h, key=code_key)
        learner = eqx.tree_at(lambda x: x.updates, learner, learner.updates + 1)
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
        updates, adam = self._world_model_adam.update(grads, learner.world_model_adam)
        model = optax.apply_updates(model, updates)
        where = lambda x: (x.subactor.world_model, x.world_model_adam)
        learner = eqx.tree_at(where, learner, (model, adam))
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
        """Start states, their goals, and weight 0 for those after a game's end."""
        total = batch.reward.size
        chosen = jnp.arange(total)
        if self.imagination_starts < total:
            shape = (self.imagination_starts,)
            chosen = jax.random.choice(key, total, shape, replace=False)

        def pick(x):
            return x.reshape(total, *x.shape[2:])[chosen]

        goal = None
        if batch.goal is not None:
            goal = jax.nn.one_hot(pick(batch.goal), learner.subactor.goal_shape[1])
        alive = 1.0 - pick(batch.is_terminal)
        return jax.tree.map(pick, latent), goal, alive

    def _rewards(
        self,
        learner: Learner,
        extrinsic: Float[Array, "*B M"],
        h: Float[Array, "*B M H"],
        goal: Float[Array, "M Sg Kg"] | None,
    ) -> dict[str, Float[Array, "*B M"]]:
        """The rewards that exist at this level, by name."""
        rewards = {"extrinsic": extrinsic}
        autoencoder = learner.subactor.autoencoder
        if autoencoder is None:
            return rewards
        S = learner.standardiser(h)
        if goal is not None:
            G = jnp.broadcast_to(jax.vmap(autoencoder.decode)(goal), S.shape)
            per_state = jnp.vectorize(subgoal_reward, signature="(h),(h)->()")
            rewards["subgoal"] = per_state(G, S)
        per_state = jnp.vectorize(autoencoder.novelty, signature="(h)->()")
        rewards["novelty"] = per_state(S)
        return rewards

    def _real_rewards(
        self, learner: Learner, latent: Latent, batch: Transition
    ) -> Metrics:
        """The same rewards on replayed states, to watch beside the imagined ones."""
        h = latent.h.reshape(-1, latent.h.shape[-1])
        goal = None
        if batch.goal is not None:
            Sg, Kg = learner.subactor.goal_shape
            goal = jax.nn.one_hot(batch.goal, Kg).reshape(-1, Sg, Kg)
        rewards = self._rewards(learner, batch.reward.reshape(-1), h, goal)
        return {f"real_{name}": reward.mean() for name, reward in rewards.items()}

    def _learn_behaviour(
        self,
        learner: Learner,
        rollout: Rollout,
        goal: Float[Array, "M Sg Kg"] | None,
        alive: Float[Array, " M"],
    ) -> tuple[Learner, Metrics]:
        """REINFORCE and the critics, on one batch of imagined trajectories."""
        subactor = learner.subactor
        all_rewards = self._rewards(learner, rollout.reward, rollout.h, goal)
        reward = jnp.stack([all_rewards[name] for name in subactor.rewards])
        discount = self._discounts(subactor)[:, None, None] * rollout.cont
        before = self.discount * rollout.cont[:-2]
        before = jnp.concatenate([jnp.ones_like(rollout.cont[:1]), before])
        weight = alive * jnp.cumprod(before, 0)
        slow = jax.tree.map(
            lambda slow, fast: slow + self.slow_rate * (fast - slow),
            learner.slow_critics,
            subactor.critics,
        )
        (actor_grads, critic_grads), (scale, metrics) = jax.grad(
            self._behaviour_loss, has_aux=True
        )(
            (subactor.actor, subactor.critics),
            learner,
            rollout,
            reward=reward,
            discount=discount,
            weight=weight,
            slow=slow,
        )
        adam = self._actor_critic_adam
        actor_step, actor_adam = adam.update(actor_grads, learner.actor_adam)
        critic_step, critics_adam = adam.update(critic_grads, learner.critics_adam)
        # Weighted like the losses: discounted, and nothing after a game's end.
        alive_mean = lambda x: (weight * x[:-1]).sum() / jnp.maximum(weight.sum(), 1e-8)
        metrics |= {f"imagined_{k}": alive_mean(x) for k, x in all_rewards.items()}
        metrics["grad_norm_actor"] = optax.global_norm(actor_grads)
        metrics["grad_norm_critics"] = optax.global_norm(critic_grads)
        return eqx.tree_at(
            lambda x: (
                x.subactor.actor,
                x.subactor.critics,
                x.slow_critics,
                x.return_scale,
                x.actor_adam,
                x.critics_adam,
            ),
            learner,
            (
                optax.apply_updates(subactor.actor, actor_step),
                optax.apply_updates(subactor.critics, critic_step),
                slow,
                scale,
                actor_adam,
                critics_adam,
            ),
        ), metrics

    def _behaviour_loss(
        self,
        learned: tuple[MLP, MLP],
        learner: Learner,
        rollout: Rollout,
        *,
        reward: Float[Array, "R tau M"],
        discount: Float[Array, "R tau M"],
        weight: Float[Array, "tau-1 M"],
        slow: MLP,
    ) -> tuple[Float[Array, ""], tuple[Float[Array, " R"], Metrics]]:
        """Of actor and critics, together; the scale of returns and metrics besides."""
        actor, critics = learned
        logits = critic_logits(critics, rollout.inputs)
        value = sg(twohot_mean(logits))
        returns = self._returns(reward, value, discount)
        scale = self._return_scale(learner, returns)
        advantage = (returns - value[:, :-1]) / jnp.maximum(1, scale)[:, None, None]
        weights = self._weights(learner.subactor)[:, None, None]
        advantage = weights * advantage  # (SUB 3)
        action_logits = jax.vmap(jax.vmap(actor))(rollout.inputs[:-1])
        action_logits = action_logits.reshape(rollout.action.shape)
        H_pi = entropy(action_logits)
        ln_pi = log_prob(action_logits, rollout.action)
        objective = ln_pi * advantage.sum(0) + self.entropy_scale * H_pi
        actor_loss = -(weight * objective).mean()  # (SUB 4)
        target = sg(twohot_mean(critic_logits(slow, rollout.inputs[:-1])))
        logits = logits[:, :-1]
        fit = twohot_log_prob(logits, returns) + twohot_log_prob(logits, target)
        critic_loss = -(weight * fit).mean((1, 2))  # (SUB 5)
        metrics = {"loss_actor": actor_loss, "entropy_actor": H_pi.mean()}
        for r, name in enumerate(learner.subactor.rewards):
            metrics[f"loss_critic_{name}"] = critic_loss[r]
            metrics[f"value_{name}"] = value[r].mean()
            metrics[f"return_{name}"] = returns[r].mean()
            metrics[f"return_scale_{name}"] = scale[r]
            metrics[f"advantage_{name}"] = jnp.abs(advantage[r]).mean()
        return actor_loss + critic_loss.sum(), (scale, metrics)

    def _weights(self, subactor: Subactor) -> Float[Array, " R"]:
        weights = dict(zip(REWARDS, self.reward_weights, strict=True))
        return jnp.array([weights[name] for name in subactor.rewards])

    def _discounts(self, subactor: Subactor) -> Float[Array, " R"]:
        own = {"subgoal": self.discount * self.goal_discount}
        return jnp.array([own.get(name, self.discount) for name in subactor.rewards])

    def _returns(
        self,
        reward: Float[Array, "R tau M"],
        value: Float[Array, "R tau M"],
        discount: Float[Array, "R tau M"],
    ) -> Float[Array, "R tau-1 M"]:
        one = lambda r, v, gamma: lambda_return(r, v, gamma, self.lambda_)
        per_start = jax.vmap(one, in_axes=1, out_axes=1)
        return jax.vmap(per_start)(reward, value, discount)

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
        step, adam = self._autoencoder_adam.update(grads, learner.autoencoder_adam)
        where = lambda x: (x.subactor.autoencoder, x.autoencoder_adam)
        new = (optax.apply_updates(autoencoder, step), adam)
        metrics["grad_norm_autoencoder"] = optax.global_norm(grads)
        return eqx.tree_at(where, learner, new), metrics


def critic_logits(
    critics: MLP, inputs: Float[Array, "tau M I"]
) -> Float[Array, "R tau M 255"]:
    """Bins of every stacked critic at every state, as one batched product."""
    return jax.vmap(lambda critic: jax.vmap(jax.vmap(critic))(inputs))(critics)
