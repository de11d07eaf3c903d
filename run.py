"""A run in progress: the loop between tower and game, and what a checkpoint holds.

One agent step: the tower acts and remembers (one jitted call), every update that has
fallen due is dispatched, and while the device works the emulator takes its step.

Differs from the official code in: Δ2 the reward of an episode's last step is kept,
Δ3 a time-out is not a terminal.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

import atari
import checkpoint
import minatar_env
import probes
from agent import Agent, act_and_store, act_only, init_agent, init_learners, update
from config import Config, from_json
from cost import flops, update_arguments
from hieros import EnvStep, init_state
from subactor import Learner, Subactor

EVAL_SEED = 1_000_000
COUNTS = (
    *("step", "clock", "episode_return", "episode_length"),
    *("entries", "debts", "updates", "seconds"),
)


class UsageError(Exception):
    """Bad input; the message names the flag and the remedy."""


class Diverged(Exception):
    """A loss, gradient or statistic is not finite."""


def make_env(config: Config, seed: int) -> gymnasium.Env:
    """The environment of a run. Raises UsageError where it cannot be had."""
    if config.game.startswith("minatar/"):
        try:
            return minatar_env.make(config.game, seed=seed)
        except ImportError as error:
            raise UsageError(f"--game {config.game}: {error}") from None
    if config.game in probes.PROBES:
        options = {"delay": config.env.delay} if config.game == "recall" else {}
        return probes.make(config.game, seed=seed, **options)
    env = config.env
    return atari.make(
        config.game, seed=seed, noops=env.noops, size=env.size, gray=env.gray
    )


def env_step(obs, reward=0.0, first=False, last=False, terminal=False) -> EnvStep:
    """An observation on the host; acting takes it to the device, once."""
    flags = (np.array(flag) for flag in (first, last, terminal))
    return EnvStep(obs, np.array(reward, np.float32), *flags)


@jax.jit
def add(total, new):
    return jax.tree.map(jnp.add, total, new)


@dataclass
class Run:
    """A run in progress: the agent on the device, the game, and what is counted.

    `entries` are what each level's replay was given, `debts` fractions of updates that
    are due, `pending` sums of metrics since the last line, `returns` of all episodes.
    """

    config: Config
    folder: Path
    env: gymnasium.Env
    agent: Agent
    seen: EnvStep
    step: int = 0
    clock: int = 0
    episode_return: float = 0.0
    episode_length: int = 0
    seconds: float = 0.0
    entries: list[int] = field(default_factory=list)
    debts: list[float] = field(default_factory=list)
    updates: list[int] = field(default_factory=list)
    pending: list[tuple[int, dict]] = field(default_factory=list)
    returns: list[tuple[int, float]] = field(default_factory=list)
    rings: checkpoint.Rings | None = None

    @classmethod
    def start(cls, config: Config, folder: Path) -> "Run":
        """A run before its first step, with its folder."""
        env = make_env(config, config.seed)
        shape = env.observation_space.shape
        total = int(np.prod(config.model.strides))
        if config.model.channels and (shape[0] % total or shape[1] % total):
            raise UsageError(
                f"--model.strides {config.model.strides} do not divide the "
                f"{shape[0]}x{shape[1]} picture of --game {config.game}"
            )
        agent = init_agent(config, shape, int(env.action_space.n))
        zeros = [0] * config.levels
        return cls(
            config,
            folder,
            env,
            agent,
            seen=env_step(env.reset()[0], first=True),
            rings=checkpoint.Rings(folder / "checkpoint"),
            entries=list(zeros),
            debts=[0.0 for _ in zeros],
            updates=list(zeros),
            pending=[(0, {}) for _ in zeros],
        )

    def act(self) -> int:
        """The tower's answer to what has been seen; it is remembered."""
        agent = self.agent
        action, tower, replays, calls = act_and_store(
            agent.subactors,
            agent.tower,
            agent.replays,
            self.seen,
            agent.key,
            agent.calls,
            period=self.config.period,
        )
        self.agent = Agent(agent.learners, replays, tower, calls, agent.key)
        for i in range(self.config.levels):
            due = self.clock % self.config.period**i == 0 or self.seen.is_last
            self.entries[i] += int(due)
        self.clock += 1
        return int(action)

    def advance(self) -> None:
        """One agent step and the updates that it makes due."""
        action = self.act()
        self.update()
        obs, reward, terminated, truncated, _ = self.env.step(action)
        self.step += 1
        self.episode_return += float(reward)
        self.episode_length += 1
        last = terminated or truncated
        self.seen = env_step(obs, reward, last=last, terminal=terminated)
        if last:
            self.act()
            self.write(
                episode_return=self.episode_return, episode_length=self.episode_length
            )
            self.returns.append((self.step, self.episode_return))
            self.clock, self.episode_return, self.episode_length = 0, 0.0, 0
            self.seen = env_step(self.env.reset()[0], first=True)

    def update(self) -> None:
        """Dispatches what is due: a level owes `updates_per_step` per own step."""
        config = self.config
        for i in range(config.levels):
            if self.entries[i] < config.length:
                continue
            self.debts[i] += config.updates_per_step / config.period**i
            while self.debts[i] >= 1:
                self.debts[i] -= 1
                self.update_level(i)

    def update_level(self, i: int) -> None:
        config, agent = self.config, self.agent
        learner, replay, metrics = update(
            agent.learners[i],
            agent.replays[i],
            agent.key,
            level=i,
            **update_arguments(config),
        )
        learners, replays = list(agent.learners), list(agent.replays)
        learners[i], replays[i] = learner, replay
        self.agent = Agent(
            tuple(learners), tuple(replays), agent.tower, agent.calls, agent.key
        )
        count, total = self.pending[i]
        self.pending[i] = (count + 1, add(total, metrics) if count else metrics)
        self.updates[i] += 1

    def measure_update(self) -> tuple[float, float]:
        """Seconds and FLOPs of one update of level 0, after compiling it.

        On copies: the run's own first update comes when its replay is ready.
        """
        learner, replay = self.agent.learners[0], self.agent.replays[0]
        size = jnp.array(self.config.length, jnp.int32)
        replay = eqx.tree_at(lambda r: r.size, replay, size)
        learner, replay = jax.tree.map(jnp.copy, (learner, replay))
        call = partial(update, level=0, **update_arguments(self.config))
        work = flops(jax.make_jaxpr(call)(learner, replay, self.agent.key).jaxpr)
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            learner, replay, metrics = call(learner, replay, self.agent.key)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:]), work

    def write(self, **values) -> None:
        """One line of metrics.jsonl."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step} | values) + "\n")

    def means(self) -> dict[str, float]:
        """Mean of every metric since the last line. Raises Diverged."""
        values = {}
        for i, (count, total) in enumerate(self.pending):
            for name, x in jax.device_get(total).items():
                values[f"level{i}/{name}"] = float(x) / count
        if bad := [name for name, x in values.items() if not np.isfinite(x)]:
            raise Diverged(f"step {self.step}: {', '.join(bad)} not finite")
        return values

    def log(self) -> dict[str, float]:
        """Writes those means as one line and starts new ones. Raises Diverged."""
        values = self.means()
        self.pending = [(0, {}) for _ in self.pending]
        if values:
            self.write(**values)
        return values

    def device_state(self) -> dict:
        """What training and acting change on the device, the rings' steps left out."""
        replays = [(r.carries, r.draws, r.head, r.size) for r in self.agent.replays]
        return {
            "learners": self.agent.learners,
            "tower": self.agent.tower,
            "calls": self.agent.calls,
            "replays": replays,
            "seen": self.seen,
        }

    def save(self) -> Path:
        """Writes a checkpoint. Raises OSError or Diverged, the last one intact."""
        self.means()
        metrics = self.folder / "metrics.jsonl"
        arrays = named(self.device_state())
        arrays |= {f"env/{name}": x for name, x in self.env.get_state().items()}
        arrays["returns"] = np.array(self.returns, np.float64).reshape(-1, 2)
        for i, (_, total) in enumerate(self.pending):
            arrays |= {f"pending/{i}/{k}": np.asarray(x) for k, x in total.items()}
        for i, replay in enumerate(self.agent.replays):
            self.rings.append(f"level{i}", named(replay.steps), self.entries[i])
        meta = {
            "config": asdict(self.config),
            "counts": {name: getattr(self, name) for name in COUNTS},
            "pending": [count for count, _ in self.pending],
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
        }
        folder = self.folder / "checkpoint"
        return checkpoint.save(folder, self.step, arrays, meta, self.rings)

    def restore(self, path: Path) -> None:
        """Continues from a checkpoint. Raises CheckpointError, with nothing changed."""
        arrays, meta = checkpoint.read(path)
        state = fill(self.device_state(), arrays, path)
        rings = checkpoint.Rings(path.parent, meta["segments"])
        replays = []
        for i, (replay, saved) in enumerate(
            zip(self.agent.replays, state["replays"], strict=True)
        ):
            rows = {k: np.zeros_like(x) for k, x in named(replay.steps).items()}
            rings.restore(f"level{i}", rows)
            steps = fill(replay.steps, rows, path)
            where = lambda r: (r.steps, r.carries, r.draws, r.head, r.size)
            replays.append(eqx.tree_at(where, replay, (steps, *saved)))
        prefix = lambda p: {
            k[len(p) :]: x for k, x in arrays.items() if k.startswith(p)
        }
        self.env.set_state(prefix("env/"))
        self.agent = Agent(
            state["learners"],
            tuple(replays),
            state["tower"],
            state["calls"],
            self.agent.key,
        )
        self.seen, self.rings = jax.tree.map(np.asarray, state["seen"]), rings
        self.returns = [(int(step), value) for step, value in arrays["returns"]]
        self.pending = [
            (count, {k: jnp.asarray(x) for k, x in prefix(f"pending/{i}/").items()})
            for i, count in enumerate(meta["pending"])
        ]
        for name in COUNTS:
            setattr(self, name, meta["counts"][name])
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            os.truncate(metrics, meta["metrics_bytes"])


def named(tree) -> dict[str, np.ndarray]:
    """Leaves by their path. Typed keys never occur: they follow from the seed."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def fill(template, arrays: dict[str, np.ndarray], path: Path):
    """The template with its leaves replaced by name. Raises CheckpointError."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(template)
    values = []
    for key, old in leaves:
        new = arrays.get(jax.tree_util.keystr(key))
        if new is None or new.shape != old.shape or new.dtype != old.dtype:
            raise checkpoint.CheckpointError(f"{path} belongs to another configuration")
        values.append(jnp.array(new))
    return jax.tree_util.tree_unflatten(tree, values)


def evaluate(
    config: Config,
    subactors: tuple[Subactor, ...],
    episodes: int,
    *,
    watch: Callable | None = None,
) -> list[float]:
    """Returns of episodes with the trained policy, sampled, and a state of its own.

    Nothing is remembered and no counter of the run moves. `watch` is called after each
    episode with its return.
    """
    env = make_env(config, EVAL_SEED + config.seed)
    key = jax.random.key(EVAL_SEED + config.seed)
    tower, returns, calls = init_state(subactors, config.period), [], 0
    for _ in range(episodes):
        seen, total = env_step(env.reset()[0], first=True), 0.0
        while not seen.is_last:
            calls += 1
            action, tower = act_only(
                subactors, tower, seen, key, np.int32(calls), period=config.period
            )
            obs, reward, terminated, truncated, _ = env.step(int(action))
            total += float(reward)
            seen = env_step(obs, reward, last=terminated or truncated)
        returns.append(total)
        if watch is not None:
            watch(total)
    return returns


def keep_compiled() -> None:
    """Compiled programs stay on disk, unless JAX was told where: starts in seconds."""
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(Path(home, "hieros-jax")))


def load_config(folder: Path) -> Config:
    """The settings of a run folder. Raises UsageError where there are none."""
    try:
        saved = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise UsageError(f"{folder} is not a run folder") from None
    try:
        return from_json(saved)
    except (TypeError, KeyError, AttributeError):
        raise UsageError(
            f"{folder} was written by another version of this program"
        ) from None


def load(folder: Path) -> Run:
    """A run from its newest good checkpoint, to look at. Raises UsageError.

    Nothing in the folder is changed.
    """
    # Restoring cuts the metrics.jsonl of the run's own folder: here there is none.
    run = Run.start(load_config(folder), folder / "pictures")
    for path in checkpoint.checkpoints(folder / "checkpoint"):
        try:
            run.restore(path)
        except checkpoint.CheckpointError as error:
            print(f"{error}; trying the one before", file=sys.stderr)
            continue
        run.folder = folder
        return run
    raise UsageError(f"{folder} has no usable checkpoint")


def save_weights(path: Path, config: Config, learners: tuple[Learner, ...]) -> None:
    """A file of what acting and imagining need: no optimisers, no replay."""
    checkpoint.write(
        path, named({"learners": without_adam(learners)}), {"config": asdict(config)}
    )


def load_weights(path: Path) -> tuple[Config, tuple[Learner, ...]]:
    """Settings and trained levels, lowest first, their optimisers None.

    `path` is a run folder, whose newest good checkpoint is read, or a file of
    `save_weights`. Raises UsageError or CheckpointError.
    """
    newest = checkpoint.checkpoints(path / "checkpoint") if path.is_dir() else [path]
    for file in newest:
        try:
            arrays, meta = checkpoint.read(file)
            break
        except checkpoint.CheckpointError as error:
            if file == newest[-1]:
                raise
            print(f"{error}; trying the one before", file=sys.stderr)
    else:
        raise UsageError(f"{path} has no checkpoint")
    config = from_json(meta["config"])
    env = make_env(config, config.seed)
    actions = int(env.action_space.n)
    learners = init_learners(config, env.observation_space.shape, actions)
    template = {"learners": without_adam(learners)}
    return config, fill(template, arrays, file)["learners"]


def without_adam(learners: tuple[Learner, ...]) -> tuple[Learner, ...]:
    """The levels as they act and imagine."""
    optimisers = lambda x: (
        x.world_model_adam,
        x.actor_adam,
        x.critics_adam,
        x.autoencoder_adam,
    )
    is_none = lambda x: x is None
    nothing = (None, None, None, None)
    strip = lambda x: eqx.tree_at(optimisers, x, nothing, is_leaf=is_none)
    return tuple(map(strip, learners))
