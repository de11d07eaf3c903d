"""The agent: all levels with their replays, as one pytree; acting and updating.

    act_and_store   the whole tower takes one agent step and remembers it
    act_only        the same without remembering, to evaluate
    update          one level samples, learns, imagines and writes its carries back

Of several seeds every array has one more axis in front, N; the first and the last of
these calls are vmapped over it, `act_only` plays one seed.
Keys are derived, not stored: acting folds the number of the call into the run's key,
an update the number of the update, so a resumed run continues the same streams.

Differs from the official code in: Δ4 everything follows from one seed.
"""

from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt8

from config import Config, ModelConfig
from etbs import Replay, load_carry, store_carry
from hieros import EnvStep, TowerState, act, init_state, remember, where
from learner import Learner, Trainer
from nets import (
    BINS,
    MLP,
    FlatDecoder,
    FlatEncoder,
    ImageDecoder,
    ImageEncoder,
    WindowDecoder,
    WindowEncoder,
)
from rssm import RSSM
from s5wm import S5WM, Heads, Transition
from subactor import Subactor
from subgoal import Autoencoder

# What matrices are rounded to when they meet; sums, parameters, states and losses are
# float32 in both.
PRECISIONS = {"float32": "highest", "bfloat16": "BF16_BF16_F32"}


def precision_here(name: str) -> str:
    """`auto` is bfloat16 on an accelerator, float32 on a CPU."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def matmul_precision(name: str):
    """Context in which programs are traced."""
    return jax.default_matmul_precision(PRECISIONS[precision_here(name)])


class Agent(NamedTuple):
    """Everything of a run that lives on the device; levels lowest first.

    Not a Module: Equinox looks through all leaves of one that is made, at every step.
    """

    learners: tuple[Learner, ...]
    replays: tuple[Replay, ...]
    tower: TowerState
    calls: Int[Array, "*N"]
    key: Key[Array, "*N"]

    @property
    def subactors(self) -> tuple[Subactor, ...]:
        return tuple(learner.subactor for learner in self.learners)


def make_coders(
    model: ModelConfig, level: int, period: int, obs_shape: tuple, keys
) -> tuple[eqx.Module, int, eqx.Module]:
    """Encoder, size of its output and decoder of a level's observations."""
    feat = model.z_categoricals * model.z_classes + model.features
    width = model.vector_width
    if level > 0:
        z_shape = (period, model.z_categoricals, model.z_classes)
        inputs = period * feat
        return (
            WindowEncoder(MLP(inputs, width, 2, None, key=keys[0]), model.z_classes),
            width,
            WindowDecoder(
                MLP(feat, width, 2, inputs, key=keys[1]),
                z_shape,
                (period, model.features),
            ),
        )
    if not model.channels:
        pixels = obs_shape[0] * obs_shape[1] * obs_shape[2]
        return (
            FlatEncoder(MLP(pixels, width, 2, None, key=keys[0])),
            width,
            FlatDecoder(MLP(feat, width, 2, pixels, key=keys[1]), obs_shape),
        )
    image = (obs_shape, model.channels, model.strides, model.overlap)
    encoder = ImageEncoder(*image, key=keys[0])
    return encoder, encoder.outputs, ImageDecoder(feat, *image, key=keys[1])


def make_world_model(
    config: Config, level: int, obs_shape: tuple, action_shape: tuple, keys
) -> S5WM | RSSM:
    """Dynamics with coders and heads, from five keys."""
    model = config.model
    *coder_keys, reward_key, cont_key, dynamics_key = keys
    z_shape = (model.z_categoricals, model.z_classes)
    feat = z_shape[0] * z_shape[1] + model.features
    encoder, embed, decoder = make_coders(
        model, level, config.period, obs_shape, coder_keys
    )
    head = partial(MLP, feat, model.width, model.head_layers)
    heads = Heads(
        decoder,
        reward=head(BINS, last_scale=0.0, key=reward_key),
        cont=head(1, key=cont_key),
    )
    sizes = {
        "z_shape": z_shape,
        "features": model.features,
        "width": model.latent_width,
        "key": dynamics_key,
    }
    if config.world_model == "rssm":
        return RSSM(encoder, embed, heads, action_shape, **sizes)
    return S5WM(
        encoder,
        embed,
        heads,
        action_shape,
        layers=model.layers,
        states=model.states,
        blocks=model.blocks,
        scaled=model.scaled,
        h_source=model.h_source,
        **sizes,
    )


def make_subactor(
    config: Config, level: int, obs_shape: tuple, actions: int, key: PRNGKeyArray
) -> Subactor:
    """One level of the tower that `config` describes."""
    model = config.model
    *model_keys, code_key, behaviour_key = jax.random.split(key, 7)
    code_shape = (model.code_categoricals, model.code_classes)
    action_shape = (1, actions) if level == 0 else code_shape
    goal_shape = None if level == config.levels - 1 else code_shape
    rewards = ["extrinsic"]
    if goal_shape is not None:
        rewards.append("subgoal")
    if level > 0:
        rewards.append("novelty")
    autoencoder = None
    if rewards != ["extrinsic"]:
        autoencoder = Autoencoder(
            model.features,
            code_shape,
            encoder_width=model.code_encoder_width,
            decoder_width=model.code_decoder_width,
            layers=3,
            key=code_key,
        )
    return Subactor(
        make_world_model(config, level, obs_shape, action_shape, model_keys),
        autoencoder,
        action_shape,
        goal_shape,
        tuple(rewards),
        width=model.width,
        layers=model.head_layers,
        key=behaviour_key,
    )


def make_trainer(config: Config) -> Trainer:
    return Trainer(**asdict(config.trainer))


def init_learners(
    config: Config, obs_shape: tuple, actions: int, *, key: PRNGKeyArray
) -> tuple[Learner, ...]:
    """All levels, untrained, lowest first."""
    keys = jax.random.split(key, config.levels)
    trainer = make_trainer(config)

    def init(level):
        subactor = make_subactor(config, level, obs_shape, actions, keys[level])
        return trainer.init(subactor)

    return tuple(map(init, range(config.levels)))


def init_agent(config: Config, obs_shape: tuple, actions: int, seed) -> Agent:
    """The agent before its first step. Replays are allocated here, once and for all.

    Level 0's replay has room for the whole run in episodes of 4 steps or more, those
    above for the whole run in at most 5,000 episodes; beyond that, or beyond
    `capacity`, the oldest entries go.
    """
    model_key, run_key = jax.random.split(jax.random.key(seed))
    learners = init_learners(config, obs_shape, actions, key=model_key)
    subactors = tuple(learner.subactor for learner in learners)
    tower = init_state(subactors, config.period)

    def replay(level):
        state, subactor = tower.levels[level], subactors[level]
        obs = state.window if level > 0 else jnp.zeros(obs_shape, jnp.uint8)
        goal = None
        if subactor.goal_shape is not None:
            goal = jnp.zeros(subactor.goal_shape[0], jnp.uint8)
        false = jnp.array(False)
        step = Transition(obs, state.action, jnp.zeros(()), false, false, goal)
        # An episode of n steps leaves n + 1 entries, above level 0 up to n / K_i + 2.
        endings = min(config.steps, 10_000) if level > 0 else 0
        entries = config.steps // config.period**level * 5 // 4 + endings
        entries += config.length
        return Replay(min(config.capacity, entries), step, state.carry)

    replays = tuple(replay(level) for level in range(config.levels))
    # Donation wants every leaf in a buffer of its own.
    learners, tower = jax.tree.map(jnp.copy, (learners, tower))
    return Agent(learners, replays, tower, jnp.array(0, jnp.int32), run_key)


def init_agents(config: Config, obs_shape: tuple, actions: int) -> Agent:
    """One agent, or `config.seeds` of them stacked along a leading axis."""
    init = partial(init_agent, config, obs_shape, actions)
    if config.seeds == 1:
        return jax.jit(init)(config.seed)
    return jax.jit(jax.vmap(init))(config.seed + jnp.arange(config.seeds))


def of_seed(tree, seed: int, seeds: int):
    """One seed's part of what is stacked over `seeds`; of one seed, everything."""
    return tree if seeds == 1 else jax.tree.map(lambda x: x[seed], tree)


def over_seeds(trees: list):
    """Inverse of `of_seed`: stacked over seeds, unless there is but one."""
    if len(trees) == 1:
        return trees[0]
    stack = lambda x: np.stack(x) if isinstance(x[0], np.ndarray) else jnp.stack(x)
    return jax.tree.map(lambda *x: stack(x), *trees)


@partial(
    jax.jit,
    static_argnames=("period", "precision", "seeds"),
    donate_argnames=("tower", "replays"),
)
def act_and_store(
    subactors: tuple[Subactor, ...],
    tower: TowerState,
    replays: tuple[Replay, ...],
    step: EnvStep,
    active: Bool[Array, "*N"],
    key: Key[Array, "*N"],
    calls: Int[Array, "*N"],
    *,
    period: int,
    precision: str,
    seeds: int = 1,
) -> tuple[UInt8[Array, "*N"], TowerState, tuple[Replay, ...], Int[Array, "*N"]]:
    """The action, and what has changed: tower, replays, number of calls.

    Nothing changes where not `active`: of several seeds some may be done with an
    episode while others are in the middle.
    """

    def one(subactors, tower, replays, step, active, key, calls):
        key = jax.random.fold_in(jax.random.fold_in(key, 0), calls)
        after, action, acted = act(subactors, tower, step, period=period, key=key)
        replays = remember(replays, acted, active)
        return action, where(active, after, tower), replays, calls + active

    with matmul_precision(precision):
        call = one if seeds == 1 else jax.vmap(one)
        return call(subactors, tower, replays, step, active, key, calls)


@partial(jax.jit, static_argnames=("period", "precision"))
def act_only(
    subactors: tuple[Subactor, ...],
    tower: TowerState,
    step: EnvStep,
    key: PRNGKeyArray,
    calls: Int[Array, ""],
    *,
    period: int,
    precision: str,
) -> tuple[UInt8[Array, ""], TowerState]:
    """The action without remembering it: evaluation, with a tower of its own."""
    key = jax.random.fold_in(key, calls)
    with matmul_precision(precision):
        tower, action, _ = act(subactors, tower, step, period=period, key=key)
    return action, tower


@partial(
    jax.jit,
    static_argnames=(
        *("trainer", "level", "batch", "length", "sampler", "tau", "carry"),
        *("precision", "seeds"),
    ),
    donate_argnames=("learner", "replay"),
)
def update(
    learner: Learner,
    replay: Replay,
    key: Key[Array, "*N"],
    *,
    trainer: Trainer,
    level: int,
    batch: int,
    length: int,
    sampler: str,
    tau: float,
    carry: str,
    precision: str,
    seeds: int = 1,
) -> tuple[Learner, Replay, dict[str, Float[Array, "*N"]], Int[Array, "*N B T"]]:
    """Samples windows, trains one level on them, writes their new carries back.

    Learner, replay, metrics and the replay's rows that the windows were.
    """

    def one(learner, replay, key):
        key = jax.random.fold_in(jax.random.fold_in(key, 1 + level), learner.updates)
        sample_key, learn_key = jax.random.split(key)
        replay, rows = replay.sample(batch, length, sampler, tau, key=sample_key)
        steps, before = replay.windows(rows, carry)
        classes = learner.subactor.world_model.z_shape[1]
        learner, carries, metrics = trainer.update(
            learner, steps, load_carry(before, classes), key=learn_key
        )
        replay = replay.refresh(rows, store_carry(carries))
        return learner, replay, metrics, rows

    with matmul_precision(precision):
        return (one if seeds == 1 else jax.vmap(one))(learner, replay, key)
