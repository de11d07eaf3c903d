"""The tower: which level acts when, what flows up, what flows down.

    level i acts  iff  c mod K_i = 0 or the episode ends,  K_i = k^i   (TOW 1)
    window_{i+1} ← (z, symlog h) of level i whenever level i acts   (TOW 2)
    reward_i = Σ r_t / K_i since level i last acted                 (TOW 3)
    goal_i = action_{i+1}, held until level i+1 acts again          (TOW 4)

c counts agent steps since the episode's start. At an episode's start every level
forgets and acts; at its end every level acts once more, to record the ending.

      goal ↓   level 2, every 16 steps   ↑ window of 4 latents
      goal ↓   level 1, every 4 steps    ↑ window of 4 latents
    action ↓   level 0, every step       ↑ observation
               the game

Mattes, Schlosser, Herbrich, "Hieros", ICML 2024. Official: hieros/hieros.py.
Differs from the official code in: Δ17 clock per episode, Δ18 no lag, Δ19 one-hot goals,
Δ31 actions are sampled in evaluation, too.

Axes: G groups of an action. k is the period, K_i a level's stride, K (nets.py) a
number of classes.
"""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from etbs import Replay, StoredCarry, load_carry, store_carry
from nets import Window, symlog
from s5wm import Latent, Transition
from subactor import Subactor


class LevelState(eqx.Module):
    """What one level remembers while acting.

    `action` is its own last one, for an upper level the goal in force below;
    `window` is None at level 0; `reward` is what has accumulated.
    """

    carry: StoredCarry
    action: UInt8[Array, " G"]
    window: Window | None
    reward: Float[Array, ""]


class TowerState(eqx.Module):
    """The clock c and the states of all levels, lowest first."""

    clock: Int[Array, ""]
    levels: tuple[LevelState, ...]


class EnvStep(eqx.Module):
    """What the game shows after an action; `is_last` is an ending of either kind."""

    obs: UInt8[Array | np.ndarray, "h w c"]
    reward: Float[Array | np.ndarray, ""]
    is_first: Bool[Array | np.ndarray, ""]
    is_last: Bool[Array | np.ndarray, ""]
    is_terminal: Bool[Array | np.ndarray, ""]


class Acted(eqx.Module):
    """What a level did in one agent step; the rest only counts where `acts`."""

    acts: Bool[Array, ""]
    step: Transition
    latent: Latent


def init_state(subactors: tuple[Subactor, ...], period: int) -> TowerState:
    """The tower before its first episode."""

    def level(i, subactor):
        carry = store_carry(subactor.world_model.init_carry())
        window = None
        if i > 0:
            below = subactors[i - 1].world_model
            z = jnp.zeros((period, below.z_shape[0]), jnp.uint8)
            h = jnp.zeros((period, below.features), jnp.float16)
            window = Window(z, h)
        return LevelState(
            carry=jax.tree.map(jnp.zeros_like, carry),
            action=jnp.zeros(subactor.action_shape[0], jnp.uint8),
            window=window,
            reward=jnp.zeros(()),
        )

    levels = tuple(level(i, s) for i, s in enumerate(subactors))
    return TowerState(jnp.array(0, jnp.int32), levels)


def push(window: Window, is_first: Bool[Array, ""], latent: Latent) -> Window:
    """The window after one more latent; an episode's first fills it whole. (TOW 2)"""
    z = jnp.argmax(latent.z, -1).astype(jnp.uint8)
    h = symlog(latent.h).astype(jnp.float16)

    def shift(rows, new):
        shifted = jnp.concatenate([rows[1:], new[None]])
        return jnp.where(is_first, jnp.broadcast_to(new, rows.shape), shifted)

    return Window(shift(window.z, z), shift(window.h, h))


def infer(
    subactor: Subactor,
    state: LevelState,
    obs: UInt8[Array, "h w c"] | Window,
    is_first: Bool[Array, ""],
    *,
    key: PRNGKeyArray,
) -> Latent:
    """A level's latent after its observation."""
    model = subactor.world_model
    carry = load_carry(state.carry, model.z_shape[1])
    return model.step(carry, state.action, is_first, obs, key=key)


def take_in(
    state: LevelState, step: EnvStep, below: Acted | None, stride: int
) -> LevelState:
    """The level with the game's new step: its window (TOW 2), its reward (TOW 3).

    `below` is what the level below did. The world model itself clears the carry.
    """
    window = state.window
    if below is not None:
        pushed = push(window, step.is_first, below.latent)  # (TOW 2)
        window = where(below.acts, pushed, window)
    reward = state.reward + step.reward / stride  # (TOW 3)
    return LevelState(
        carry=state.carry,
        action=jnp.where(step.is_first, 0, state.action),
        window=window,
        reward=jnp.where(step.is_first, 0.0, reward),
    )


def act(
    subactors: tuple[Subactor, ...],
    tower: TowerState,
    step: EnvStep,
    *,
    period: int,
    key: PRNGKeyArray,
) -> tuple[TowerState, UInt8[Array, ""], tuple[Acted, ...]]:
    """One agent step of the whole tower: latents up, goals down, an action out.

    The action is meaningless where `step.is_last`.
    """
    clock = jnp.where(step.is_first, 0, tower.clock)
    keys = jax.random.split(key, (len(subactors), 2))
    states, acted, below = [], [], None
    for i, (subactor, state) in enumerate(zip(subactors, tower.levels, strict=True)):
        acts = (clock % period**i == 0) | step.is_last  # (TOW 1)
        state = take_in(state, step, below, period**i)
        obs = step.obs if i == 0 else state.window
        latent = if_acting(
            acts, partial(infer, subactor, state, obs, step.is_first, key=keys[i, 0])
        )
        flags = {"is_first": step.is_first, "is_terminal": step.is_terminal}
        seen = Transition(obs, state.action, state.reward, **flags, goal=None)
        below = Acted(acts, seen, latent)
        states.append(state)
        acted.append(below)

    goal = None
    for i in reversed(range(len(subactors))):
        acts, seen, latent = acted[i].acts, acted[i].step, acted[i].latent
        action = if_acting(
            acts, partial(subactors[i].act, latent, goal, key=keys[i, 1])
        )
        done = LevelState(
            store_carry(latent.carry), action, states[i].window, jnp.zeros(())
        )
        states[i] = where(acts, done, states[i])
        acted[i] = Acted(acts, replace(seen, goal=goal), latent)
        goal = states[i].action  # (TOW 4)
    return TowerState(clock + 1, tuple(states)), states[0].action[0], tuple(acted)


def where(condition: Bool[Array, ""], yes, no):
    """Pytree version of jnp.where."""
    return jax.tree.map(lambda y, n: jnp.where(condition, y, n), yes, no)


def if_acting(condition: Bool[Array, ""], compute):
    """`compute()` where the level acts, else zeros of its shape, at no cost.

    Batched over several seeds both are computed, as `vmap` turns `cond` into a choice.
    """
    zeros = lambda: jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute)
    )
    return jax.lax.cond(condition, compute, zeros)


def remember(
    replays: tuple[Replay, ...],
    acted: tuple[Acted, ...],
    active: Bool[Array, ""] | bool = True,
) -> tuple[Replay, ...]:
    """Every level that acted writes one entry to its own replay, if `active`."""
    return tuple(
        replay.add(level.step, store_carry(level.latent.carry), level.acts & active)
        for replay, level in zip(replays, acted, strict=True)
    )
