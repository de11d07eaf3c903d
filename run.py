"""A run in progress: the loop between tower and games, and what a checkpoint holds.

One agent step: the tower acts and remembers (one jitted call), every update that has
fallen due is dispatched, and while the device works the emulator takes its step.
Several seeds go in lockstep: the same two calls, vmapped.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import checkpoint
from agent import (
    Agent,
    act_and_store,
    act_only,
    init_agents,
    init_learners,
    of_seed,
    over_seeds,
    update,
)
from config import Config, UsageError, from_json
from cost import flops, update_arguments
from game import COUNTS, Game, env_step, make_env
from hieros import init_state
from learner import Learner
from subactor import Subactor

EVAL_SEED = 1_000_000


class Diverged(Exception):
    """A loss, gradient or statistic is not finite."""


class Listed:
    """Stands for a pytree in calls of jitted functions, which get that pytree.

    Its leaves are listed once; JAX looks for those of all modules at every call.
    """

    def __init__(self, tree):
        self.leaves, self.structure = jax.tree.flatten(tree)


jax.tree_util.register_pytree_node(
    Listed, lambda x: (x.leaves, x.structure), jax.tree.unflatten
)


@jax.jit
def add(total, new):
    return jax.tree.map(jnp.add, total, new)


@jax.jit
def first_bad(held, new):
    """Metrics and rows of an update: those held if not finite, else the new ones."""
    bad = ~jnp.all(jnp.isfinite(jnp.stack(jax.tree.leaves(held[0]))))
    return jax.tree.map(lambda x, y: jnp.where(bad, x, y), held, new)


@dataclass
class Run:
    """One seed, or several in lockstep: the agent on the device and their games.

    `pending` are counts and sums of metrics since the last line, `suspects` metrics and
    replay rows of each level's newest update or, if one was not finite, of the first
    such. Of several seeds, arrays have an axis of seeds in front. `listed` are the
    learners as they are and what acts of them.
    """

    config: Config
    folder: Path
    games: list[Game]
    agent: Agent
    updates: list[int]
    pending: list[tuple[int, dict]]
    suspects: list[tuple[dict, Array] | None]
    step: int = 0
    seconds: float = 0.0
    listed: tuple[tuple[Learner, ...], Listed] | None = None

    @classmethod
    def start(cls, config: Config, folder: Path) -> "Run":
        """A run before its first step. Raises UsageError."""
        own = lambda seed: replace(config, seed=config.seed + seed, seeds=1)
        folders = [folder]
        if config.seeds > 1:
            folders = [folder / f"seed-{own(i).seed}" for i in range(config.seeds)]
        games = [Game.start(own(i), path) for i, path in enumerate(folders)]
        env = games[0].env
        agent = init_agents(
            config, env.observation_space.shape, int(env.action_space.n)
        )
        n = config.levels
        return cls(config, folder, games, agent, [0] * n, [(0, {})] * n, [None] * n)

    @property
    def game(self) -> Game:
        """The game of a run with one seed."""
        (game,) = self.games
        return game

    def solo(self, seed: int) -> "Run":
        """One seed as a run of its own, to be looked at."""
        if self.config.seeds == 1:
            return self
        game, part = self.games[seed], partial(of_seed, seed=seed, seeds=2)
        pending = [(count, part(total)) for count, total in self.pending]
        return replace(
            self,
            config=game.config,
            folder=game.folder,
            games=[game],
            agent=part(self.agent),
            pending=pending,
        )

    def act(self, active: list[bool]) -> list[int]:
        """The towers' answers to what has been seen; it is remembered where active."""
        agent, config = self.agent, self.config
        if self.listed is None or self.listed[0] is not agent.learners:
            self.listed = agent.learners, Listed(agent.subactors)
        actions, tower, replays, calls = act_and_store(
            self.listed[1],
            agent.tower,
            agent.replays,
            over_seeds([game.seen for game in self.games]),
            over_seeds([np.array(x) for x in active]),
            agent.key,
            agent.calls,
            period=config.period,
            precision=config.precision,
            seeds=config.seeds,
        )
        self.agent = agent._replace(tower=tower, replays=replays, calls=calls)
        for game, stored in zip(self.games, active, strict=True):
            if stored:
                game.remembered()
        return np.atleast_1d(actions).tolist()

    def advance(self) -> None:
        """One agent step and the updates that it makes due. Raises GameError."""
        actions = self.act([True for _ in self.games])
        self.update()
        self.step += 1
        for game, action in zip(self.games, actions, strict=True):
            game.advance(action, self.step)
        ended = [bool(game.seen.is_last) for game in self.games]
        if any(ended):
            self.act(ended)
            for game, is_last in zip(self.games, ended, strict=True):
                if is_last:
                    game.begin_episode(self.step)

    def update(self) -> None:
        """Dispatches what is due: `updates_per_step` per K_i agent steps.

        From the first window and `prefill` on, wherever episodes ended, which the
        upper levels' extra entries then do not count: seeds stay in lockstep.
        """
        for i in range(self.config.levels):
            while self.updates[i] < updates_by(self.config, i, self.step + 1):
                self.update_level(i)

    def update_level(self, i: int) -> None:
        config, agent = self.config, self.agent
        learner, replay, metrics, rows = update(
            agent.learners[i],
            agent.replays[i],
            agent.key,
            level=i,
            **update_arguments(config),
        )
        learners, replays = list(agent.learners), list(agent.replays)
        learners[i], replays[i] = learner, replay
        self.agent = agent._replace(learners=tuple(learners), replays=tuple(replays))
        count, total = self.pending[i]
        self.pending[i] = (count + 1, add(total, metrics) if count else metrics)
        held, new = self.suspects[i], (metrics, rows)
        self.suspects[i] = first_bad(held, new) if held else new
        self.updates[i] += 1

    def measure_update(self) -> tuple[float, float]:
        """Seconds and FLOPs of one update of level 0, after compiling it.

        On copies: the run's own first update comes when its replay is ready.
        """
        learner, replay = self.agent.learners[0], self.agent.replays[0]
        size = jnp.full_like(replay.size, self.config.length)
        replay = eqx.tree_at(lambda r: r.size, replay, size)
        learner, replay = jax.tree.map(jnp.copy, (learner, replay))
        call = partial(update, level=0, **update_arguments(self.config))
        work = flops(jax.make_jaxpr(call)(learner, replay, self.agent.key).jaxpr)
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            learner, replay, metrics, _ = call(learner, replay, self.agent.key)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:]), work

    def means(self) -> list[dict[str, float]]:
        """Mean of every metric since the last line, per seed. Raises Diverged."""
        found = [{} for _ in self.games]
        for i, (count, total) in enumerate(self.pending):
            for name, x in jax.device_get(total).items():
                for values, each in zip(found, np.atleast_1d(x), strict=True):
                    values[f"level{i}/{name}"] = float(each) / count
        for seed, values in enumerate(found):
            if bad := [name for name, x in values.items() if not np.isfinite(x)]:
                level = int(bad[0][len("level")])
                try:
                    where = str(self.dump(seed, level))
                except OSError as error:
                    where = f"could not be written, {error}"
                raise Diverged(
                    f"step {self.step}: {', '.join(bad)} not finite; "
                    f"the windows it began with: {where}"
                )
        return found

    def dump(self, seed: int, level: int) -> Path:
        """Writes the batch and losses of the level's first update that went wrong."""
        part = partial(of_seed, seed=seed, seeds=self.config.seeds)
        metrics, rows = jax.device_get(part(self.suspects[level]))
        steps = jax.device_get(part(self.agent.replays[level].steps))
        arrays = checkpoint.named(jax.tree.map(lambda x: x[rows], steps))
        meta = {"level": level, "losses": {k: str(x) for k, x in metrics.items()}}
        path = self.games[seed].folder / "diverged.ckpt"
        checkpoint.write(path, arrays, meta)
        return path

    def log(self) -> list[dict[str, float]]:
        """Writes those means as one line per seed, starts new ones. Raises Diverged."""
        found = self.means()
        self.pending = [(0, {}) for _ in self.pending]
        for game, values in zip(self.games, found, strict=True):
            if values:
                game.write(self.step, **values)
        return found

    def device_state(self) -> dict:
        """What training and acting change on the device, the rings' steps left out."""
        replays = [(r.carries, r.draws, r.head, r.size) for r in self.agent.replays]
        return {
            "learners": self.agent.learners,
            "tower": self.agent.tower,
            "calls": self.agent.calls,
            "replays": replays,
        }

    def save(self) -> None:
        """A checkpoint of every seed. Raises OSError or Diverged, older ones intact."""
        self.means()
        state, pending, steps = jax.device_get(
            (
                self.device_state(),
                [total for _, total in self.pending],
                [replay.steps for replay in self.agent.replays],
            )
        )
        for seed, game in enumerate(self.games):
            part = partial(of_seed, seed=seed, seeds=self.config.seeds)
            arrays = checkpoint.named(part(state) | {"seen": game.seen})
            arrays |= {f"env/{name}": x for name, x in game.env.get_state().items()}
            arrays["returns"] = np.array(game.returns, np.float64).reshape(-1, 2)
            for i, replay in enumerate(self.agent.replays):
                sums = part(pending[i])
                arrays |= {f"pending/{i}/{k}": np.asarray(x) for k, x in sums.items()}
                name, total, capacity = f"level{i}", game.entries[i], replay.capacity
                new = game.rings.unsaved(name, total, capacity)
                rows = jax.tree.map(lambda x, at=new: x[at], part(steps[i]))
                game.rings.append(name, checkpoint.named(rows), total, capacity)
            game.sync()
            meta = self.meta(seed)
            checkpoint.save(game.folder, self.step, arrays, meta)
        for game in self.games:
            checkpoint.prune(game.folder, self.step)

    def meta(self, seed: int) -> dict:
        """Settings and counts of one seed, for JSON."""
        game = self.games[seed]
        return {
            "config": asdict(game.config),
            "counts": {
                "game": {name: getattr(game, name) for name in COUNTS},
                "updates": self.updates,
                "seconds": self.seconds,
                "pending": [count for count, _ in self.pending],
            },
            "segments": game.rings.segments,
        }

    def restore(self, step: int) -> None:
        """Continues from the checkpoints of an agent step.

        Raises CheckpointError, after which only another checkpoint makes sense.
        """
        found = []
        for seed, game in enumerate(self.games):
            path = checkpoint.path_of(game.folder, step)
            try:
                found.append(self._read(seed, path))
                game.restore(*found[-1][1:])
            except checkpoint.CheckpointError:
                raise
            except Exception as error:  # whatever foreign contents provoke
                raise checkpoint.CheckpointError(
                    f"{path} has foreign contents: {error!r}"
                ) from error
        state = over_seeds([state for state, _, _ in found])
        counts = found[0][2]["counts"]
        self.agent = Agent(
            state["learners"],
            state["replays"],
            state["tower"],
            state["calls"],
            self.agent.key,
        )
        sums = lambda arrays, i: checkpoint.prefixed(arrays, f"pending/{i}/")
        self.pending = [
            (count, over_seeds([sums(arrays, i) for _, arrays, _ in found]))
            for i, count in enumerate(counts["pending"])
        ]
        self.step, self.updates = step, counts["updates"]
        self.seconds = counts["seconds"]

    def saved_steps(self) -> list[int]:
        """Steps that every seed has a checkpoint of, newest first."""
        steps = [
            {checkpoint.step_of(path) for path in checkpoint.checkpoints(game.folder)}
            for game in self.games
        ]
        return sorted(set.intersection(*steps), reverse=True)

    def restore_newest(self) -> bool:
        """From the newest step that every seed has a good checkpoint of, if any."""
        for step in self.saved_steps():
            try:
                self.restore(step)
                return True
            except checkpoint.CheckpointError as error:
                print(f"{error}; trying the one before", file=sys.stderr)
        return False

    def _read(self, seed: int, path: Path) -> tuple[dict, dict, dict]:
        """State of one seed, all arrays and meta. Raises CheckpointError."""
        arrays, meta = checkpoint.read(path)
        checkpoint.check_numbers(meta["counts"], self.meta(seed)["counts"], path)
        part = partial(of_seed, seed=seed, seeds=self.config.seeds)
        shapes = jax.eval_shape(part, self.device_state() | {"all": self.agent.replays})
        blank = shapes.pop("all")
        state = checkpoint.fill(shapes, arrays, path)
        rings, replays = checkpoint.Rings(path.parent, meta["segments"]), []
        for i, (replay, saved) in enumerate(zip(blank, state["replays"], strict=True)):
            zeros = lambda x: np.zeros(x.shape, x.dtype)
            rows = checkpoint.named(jax.tree.map(zeros, replay.steps))
            rings.restore(f"level{i}", rows)
            steps = checkpoint.fill(replay.steps, rows, path)
            where = lambda r: (r.steps, r.carries, r.draws, r.head, r.size)
            replays.append(eqx.tree_at(where, replay, (steps, *saved)))
        return state | {"replays": tuple(replays)}, arrays, meta


def updates_by(config: Config, level: int, steps: int) -> int:
    """Updates of a level due after so many agent steps."""
    stride = config.period**level
    begin = max(config.length * stride, config.prefill)
    return int(max(0, steps - begin) * config.updates_per_step / stride)


class Recording(NamedTuple):
    """What it takes to see an episode of the evaluation again."""

    score: float
    start: dict[str, np.ndarray]  # the environment's state after the reset
    actions: list[int]


def evaluation(config: Config, subactors: tuple[Subactor, ...]) -> Iterator[Recording]:
    """Episodes of the trained policy, sampled, with a state of its own, without end.

    Nothing is remembered and no counter of the run moves.
    """
    env = make_env(config, EVAL_SEED + config.seed)
    key = jax.random.key(EVAL_SEED + config.seed)
    tower, calls = init_state(subactors, config.period), 0
    while True:
        seen, total, actions = env_step(env.reset()[0], first=True), 0.0, []
        start = env.get_state()
        while not seen.is_last:
            calls += 1
            action, tower = act_only(
                subactors,
                tower,
                seen,
                key,
                np.int32(calls),
                period=config.period,
                precision=config.precision,
            )
            actions.append(int(action))
            obs, reward, terminated, truncated, _ = env.step(actions[-1])
            total += float(reward)
            seen = env_step(obs, reward, last=terminated or truncated)
        yield Recording(total, start, actions)


def place_of(path: Path) -> Path:
    """Folder for what is found out about a run: its own, for weights runs/NAME."""
    folder = path if path.is_dir() else Path("runs") / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_config(folder: Path) -> Config:
    """The settings of a run folder. Raises UsageError where there are none."""
    try:
        saved = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise UsageError(f"{folder} is not a run folder") from None
    return parse_config(saved, folder)


def parse_config(values: dict, where: Path) -> Config:
    """Settings as JSON gave them. Raises UsageError where they have other names."""
    try:
        return from_json(values)
    except (TypeError, KeyError, AttributeError):
        raise UsageError(
            f"{where} was written by another version of this program"
        ) from None


def load(folder: Path) -> Run:
    """A run from its newest good checkpoint, to look at. Raises UsageError.

    Nothing in the folder is changed.
    """
    config = load_config(folder)
    if config.seeds > 1:
        raise UsageError(f"{folder} has several seeds: give one of its folders seed-N")
    run = Run.start(config, folder)
    if not run.restore_newest():
        raise UsageError(f"{folder} has no usable checkpoint")
    return run


def save_weights(path: Path, config: Config, learners: tuple[Learner, ...]) -> None:
    """A file of what acting and imagining need: no optimisers, no replay."""
    arrays = checkpoint.named({"learners": without_adam(learners)})
    checkpoint.write(path, arrays, {"config": asdict(config)}, small=True)


def load_weights(path: Path) -> tuple[Config, tuple[Learner, ...]]:
    """Settings and trained levels, lowest first, their optimisers None.

    `path` is a run folder, whose newest good checkpoint is read, or a file of
    `save_weights`. Raises UsageError or CheckpointError.
    """
    newest = checkpoint.checkpoints(path) if path.is_dir() else [path]
    for file in newest:
        try:
            arrays, meta = checkpoint.read(file)
            break
        except checkpoint.CheckpointError as error:
            if file == newest[-1]:
                raise
            print(f"{error}; trying the one before", file=sys.stderr)
    else:
        raise UsageError(f"{path} has no checkpoint (of several seeds: give a seed-N)")
    config = parse_config(meta.get("config"), file)
    env = make_env(config, config.seed)
    actions = int(env.action_space.n)
    init = partial(init_learners, config, env.observation_space.shape, actions)
    learners = jax.eval_shape(init, key=jax.random.key(0))
    template = {"learners": without_adam(learners)}
    return config, checkpoint.fill(template, arrays, file)["learners"]


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
