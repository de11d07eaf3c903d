"""Every setting of a run, with its symbol and its key in the official code.

Frozen dataclasses that `train.py` turns into a command line; presets by name. What
the paper compares is one flag each: levels, world model, sampler. Of the sizes,
layers, states, blocks, h_source and scaled are those of S5, without effect in an RSSM.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Literal, get_type_hints


class UsageError(Exception):
    """Bad input; the message names the flag and the remedy."""


@dataclass(frozen=True)
class Between:
    """Bounds of a number, both included."""

    low: float | int
    high: float | int = math.inf

    def __str__(self) -> str:
        upper = "or more" if self.high == math.inf else f"to {self.high:g}"
        return f"{self.low:g} {upper}"


Count = Annotated[int, Between(1)]
Natural = Annotated[int, Between(0)]
Rate = Annotated[float, Between(0, 1e6)]
Fraction = Annotated[float, Between(0, 1)]


@dataclass(frozen=True)
class EnvConfig:
    """What the agent sees."""

    size: Annotated[int, Between(8)] = 64
    """Height and width of a frame in pixels (official: env.atari.size)."""
    gray: bool = False
    """One luminance channel instead of RGB (official: env.atari.gray)."""
    noops: Natural = 30
    """Upper bound, exclusive, of random no-op frames at reset (official:
    env.atari.noops)."""
    delay: Annotated[int, Between(1, 10**6)] = 10
    """D, blank steps between the cue and what it decides; for games recall and cue."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of every level's networks."""

    z_categoricals: Count = 32
    """S, categoricals of the latent z (official: dyn_stoch)."""
    z_classes: Annotated[int, Between(2, 256)] = 32
    """K, classes of each categorical (official: dyn_discrete)."""
    features: Count = 256
    """H, width of the S5 stack, of m and of h (official: s5.model_dim, dyn_deter)."""
    layers: Count = 8
    """N, S5 layers; 4 double blocks there (official: s5.num_blocks, s5.double_arch)."""
    states: Count = 64
    """P, complex states per layer, one of each conjugate pair (official: s5.state_dim
    = 2P)."""
    blocks: Count = 4
    """HiPPO blocks that share out the states (official: s5.init_blocks)."""
    h_source: Literal["both", "states", "output"] = "both"
    """What h is read from: S5 states, the stack's output or both (Δ10)."""
    scaled: bool = True
    """Scale S5 states by Δ^(-1/2), so that slow modes are heard (Δ22)."""
    width: Count = 256
    """Hidden width of reward, continue, actor and critics (official: units)."""
    latent_width: Count = 256
    """Hidden width of posterior and prior (official: dyn_hidden)."""
    head_layers: Count = 2
    """Hidden layers of reward, continue, actor and critics (official: reward_layers,
    cont_layers, actor_layers, value_layers)."""
    channels: tuple[Count, ...] = (24, 48, 96, 192)
    """Channels of the image encoder, mirrored by the decoder (official:
    encoder.cnn_depth). Empty: the picture goes through an MLP, for small worlds."""
    strides: tuple[Count, ...] = (2, 2, 2, 2)
    """Stride of each image layer."""
    overlap: bool = True
    """Kernels of twice the stride (official); otherwise patches side by side."""
    vector_width: Count = 512
    """Width of the 2-layer coders of windows and of small pictures (official:
    encoder.mlp_layers; mlp_units is 1024 there)."""
    code_categoricals: Count = 8
    """Sg, categoricals of a subgoal code (official: subgoal_shape)."""
    code_classes: Annotated[int, Between(2, 256)] = 8
    """Kg, classes of each (official: subgoal_shape)."""
    code_encoder_width: Count = 64
    """Hidden width of the subgoal encoder (official: product of subgoal_shape)."""
    code_decoder_width: Count = 256
    """Hidden width of the subgoal decoder (official: dyn_deter)."""


@dataclass(frozen=True)
class TrainerConfig:
    """How every level learns."""

    horizon: Annotated[int, Between(2)] = 16
    """H_imag, imagined states, start included (official: imag_horizon)."""
    imagination_starts: Count = 1024
    """M, start states per update, at most B·T (official: all of them)."""
    discount: Fraction = 0.997
    """γ (official: discount)."""
    goal_discount: Fraction = 0.75
    """Times γ for the subgoal reward, as a goal ends after k steps: 1 - 1/k for k = 4
    (Δ25) (official: 1)."""
    lambda_: Fraction = 0.95
    """λ of the returns (official: discount_lambda)."""
    entropy_scale: Rate = 3e-4
    """η, weight of the actor's entropy (official: actor_entropy)."""
    slow_rate: Fraction = 0.02
    """Rate at which the slow critics follow (official: slow_target_fraction)."""
    running_decay: Fraction = 0.99
    """Decay of return scales and of the standardisation of h."""
    normalise_returns: bool = True
    """Divide advantages by the 5-95 % range of returns (Δ15)."""
    reward_weights: tuple[Rate, Rate, Rate] = (1.0, 0.3, 0.1)
    """w of extrinsic, subgoal and novelty reward (official:
    extrinsic_reward_weight and so on). Novelty
    has weight 0 at level 0, where it is only logged, with one level not even that."""
    free_nats: Rate = 1.0
    """Floor of both KL terms, in nats (official: kl_free)."""
    code_kl_scale: Rate = 0.01
    """β, weight of KL[code ‖ uniform]; with 0.5 goals say next to nothing (Δ24)
    (official: subgoal_compression.kl_scale)."""
    standardise: bool = True
    """Goals live in standardised symlog(h); plain symlog(h) kills the code (Δ23)."""
    world_model_lr: Rate = 1e-4
    """Adam rate of the world model (official: model_lr)."""
    world_model_warmup: Natural = 1000
    """Updates over which that rate rises from 0 (official: warmup_steps)."""
    world_model_clip: Rate = 1000.0
    """Bound on the norm of its gradient (official: grad_clip)."""
    actor_critic_lr: Rate = 3e-5
    """Adam rate of actor and critics (official: actor_lr, value_lr)."""
    autoencoder_lr: Rate = 1e-4
    """Adam rate of the subgoal autoencoder (official: subgoal_compression.lr)."""


@dataclass(frozen=True)
class Config:
    """HIEROS on one game, to the end of its preset."""

    game: str = "Pong"
    """One of the 26 Atari100k games, a probe (catch, recall, pinpad, cue, echo), or
    minatar/NAME."""
    preset: Literal["atari100k", "cpu", "minatar", "probe", "tiny"] = "atari100k"
    """Named settings; other flags change them. Default: atari100k where JAX finds an
    accelerator, otherwise cpu; probe and minatar for their own games."""
    seed: Natural = 0
    """Seeds environment, networks, replay and policy (official: seed,
    without effect, Δ4)."""
    seeds: Annotated[int, Between(1, 64)] = 1
    """N, independent runs in one process, of seeds `seed` to `seed` + N - 1, their
    computations batched; each has its own run folder inside the common one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What matrix products round their inputs to; they add up in float32. Default:
    bfloat16 on an accelerator, float32 on a CPU."""
    steps: Count = 100_000
    """Agent steps of training; in Atari one is 4 frames (official: steps /
    action_repeat)."""
    eval_episodes: Natural = 100
    """Episodes after training, policy sampled (official: eval_eps; the likeliest
    action, Δ31)."""
    levels: Annotated[int, Between(1, 4)] = 3
    """Levels of the tower; 1 is the flat agent (official: max_hierarchy)."""
    world_model: Literal["s5", "rssm"] = "s5"
    """Sequence model: S5, or a plain GRU (Δ33; official: dynamics_model)."""
    sampler: Literal["etbs", "uniform", "balanced"] = "etbs"
    """Which replay windows are trained on (official: replay). uniform is etbs with a
    tau of 0."""
    carry: Literal["stored", "zero"] = "stored"
    """State a window starts from: that of the step before, or none (Δ21)."""
    run_dir: str | None = None
    """Folder of the run. Default: runs/GAME-PRESET-SEED, of several seeds
    runs/GAME-PRESET-SEED-to-SEED."""
    resume: str | None = None
    """Run folder to continue; its settings are used."""
    period: Annotated[int, Between(2)] = 4
    """k, steps a goal is held (official: subactor_update_every)."""
    tau: Fraction = 0.3
    """τ, how far ETBS moves from uniform, in [0, 1] (official: replay_temperature)."""
    batch: Count = 16
    """B, windows per update (official: batch_size)."""
    length: Annotated[int, Between(2)] = 64
    """T, steps per window (official: batch_length)."""
    updates_per_step: Rate = 1.0
    """Updates of a level per step of its own (official: train_ratio, 1024 = B T)."""
    prefill: Natural = 0
    """Agent steps of the untrained actor, all but random, before the first update:
    what was never seen before the actor chooses may stay unseen (official: none)."""
    capacity: Count = 1_000_000
    """Entries a level's replay keeps, at most (official: replay_size)."""
    log_every: Count = 500
    """Agent steps between lines of means in metrics.jsonl; an episode has its own."""
    checkpoint_every: Count = 10_000
    """Agent steps between checkpoints, at most."""
    checkpoint_minutes: Annotated[float, Between(0)] = 10.0
    """Minutes between checkpoints, at most."""
    env: EnvConfig = field(default_factory=EnvConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


ATARI100K = Config()

CPU = replace(
    ATARI100K,
    preset="cpu",
    steps=10_000,
    eval_episodes=5,
    batch=8,
    length=32,
    updates_per_step=0.25,
    log_every=250,
    checkpoint_every=2_500,
    env=EnvConfig(size=32, gray=True),
    model=ModelConfig(
        z_categoricals=16,
        z_classes=16,
        features=128,
        layers=4,
        states=32,
        blocks=2,
        width=128,
        latent_width=128,
        channels=(32, 64, 64),
        strides=(4, 2, 2),
        overlap=False,
        vector_width=256,
        code_decoder_width=128,
    ),
    trainer=TrainerConfig(
        horizon=12,
        imagination_starts=64,
        entropy_scale=1e-3,
        world_model_lr=1e-3,
        world_model_warmup=100,
        world_model_clip=30.0,
        actor_critic_lr=3e-4,
        autoencoder_lr=1e-3,
    ),
)

MINATAR = replace(
    CPU,
    preset="minatar",
    steps=100_000,
    eval_episodes=100,
    updates_per_step=0.5,
    prefill=1_000,
    log_every=1_000,
    checkpoint_every=25_000,
    model=ModelConfig(
        z_categoricals=16,
        z_classes=16,
        features=128,
        layers=4,
        states=32,
        blocks=1,
        width=64,
        latent_width=256,
        channels=(),
        strides=(),
        vector_width=256,
        code_encoder_width=64,
        code_decoder_width=64,
    ),
    trainer=replace(
        CPU.trainer,
        discount=0.99,
        free_nats=0.3,
        actor_critic_lr=1e-3,
    ),
)

PROBE = replace(
    MINATAR,
    preset="probe",
    steps=10_000,
    log_every=250,
    model=replace(
        MINATAR.model,
        z_categoricals=8,
        z_classes=8,
        latent_width=64,
        features=64,
        states=16,
        vector_width=64,
    ),
    trainer=replace(
        MINATAR.trainer,
        horizon=10,
        entropy_scale=3e-3,
        free_nats=0.1,
        actor_critic_lr=3e-4,
    ),
)

TINY = replace(
    CPU,
    preset="tiny",
    steps=96,
    eval_episodes=1,
    batch=2,
    length=4,
    log_every=16,
    checkpoint_every=48,
    env=EnvConfig(size=16, gray=True),
    model=ModelConfig(
        z_categoricals=4,
        z_classes=4,
        features=16,
        layers=2,
        states=8,
        blocks=1,
        width=16,
        latent_width=16,
        channels=(8, 8),
        strides=(4, 2),
        overlap=False,
        vector_width=16,
        code_categoricals=3,
        code_classes=4,
        code_encoder_width=8,
        code_decoder_width=8,
    ),
    trainer=replace(CPU.trainer, horizon=4, imagination_starts=8),
)

PRESETS = {p.preset: p for p in (ATARI100K, CPU, MINATAR, PROBE, TINY)}


def out_of_bounds(config, prefix: str = "--") -> Iterator[str]:
    """A phrase for every number outside its bounds, naming flag and remedy."""
    hints = get_type_hints(type(config), include_extras=True)
    for f in fields(config):
        value, flag = getattr(config, f.name), prefix + f.name.replace("_", "-")
        if is_dataclass(value):
            yield from out_of_bounds(value, f"{flag}.")
            continue
        hint = hints[f.name]
        values = value if isinstance(value, tuple) else (value,)
        for bounds in find_bounds(hint):
            if not all(bounds.low <= v <= bounds.high for v in values):
                shown = " ".join(map(str, values))
                yield f"{flag} {shown} is not possible: give {bounds}"


def find_bounds(hint) -> set[Between]:
    """The bounds in a type, or in the types of a tuple's entries."""
    found = {m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Between)}
    for inner in getattr(hint, "__args__", ()):
        found |= find_bounds(inner)
    return found


def from_json(values: dict, default=ATARI100K):
    """The settings that `json.dumps(asdict(config))` described.

    Raises KeyError, TypeError or AttributeError where the fields are others.
    """
    changes = {}
    for f in fields(default):
        value, old = values[f.name], getattr(default, f.name)
        if is_dataclass(old):
            value = from_json(value, old)
        changes[f.name] = tuple(value) if isinstance(value, list) else value
    return replace(default, **changes)
