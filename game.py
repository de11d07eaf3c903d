"""One seed's side of a run, on the host: its game, its folder and what is counted.

Differs from the official code in: Δ2 the reward of an episode's last step is kept,
Δ3 a time-out is not a terminal.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium
import jax
import numpy as np

import atari
import checkpoint
import minatar_env
import probes
from config import Config, UsageError
from hieros import EnvStep

COUNTS = ("clock", "episode_return", "episode_length", "entries", "metrics_bytes")


class GameError(Exception):
    """An environment failed; the message names the game and the step."""


def make_env(config: Config, seed: int) -> gymnasium.Env:
    """The environment of a run. Raises UsageError where it cannot be had.

    Or where the model's strides do not divide its picture.
    """
    env = find_env(config, seed)
    height, width, _ = env.observation_space.shape
    total = int(np.prod(config.model.strides))
    if config.model.channels and (height % total or width % total):
        raise UsageError(
            f"--model.strides {config.model.strides} do not divide the "
            f"{height}x{width} picture of --game {config.game}"
        )
    return env


def find_env(config: Config, seed: int) -> gymnasium.Env:
    """The environment by its name. Raises UsageError."""
    if config.game.startswith("minatar/"):
        try:
            return minatar_env.make(config.game, seed=seed)
        except ImportError as error:
            raise UsageError(f"--game {config.game}: {error}") from None
    if config.game in probes.PROBES:
        has_delay = config.game in ("recall", "cue")
        options = {"delay": config.env.delay} if has_delay else {}
        return probes.make(config.game, seed=seed, **options)
    env = config.env
    return atari.make(
        config.game, seed=seed, noops=env.noops, size=env.size, gray=env.gray
    )


def env_step(obs, reward=0.0, first=False, last=False, terminal=False) -> EnvStep:
    """An observation on the host; acting takes it to the device, once."""
    flags = (np.array(flag) for flag in (first, last, terminal))
    return EnvStep(obs, np.array(reward, np.float32), *flags)


def read_lines(folder: Path) -> list[dict]:
    """metrics.jsonl as far as it can be read: a crash may have cut the last line."""
    path, lines = folder / "metrics.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


@dataclass
class Game:
    """What a seed plays.

    `entries` are what each level's replay was given, `clock` the tower's calls in this
    episode, `returns` the agent step and return of all episodes.
    """

    config: Config
    folder: Path
    env: gymnasium.Env
    seen: EnvStep
    rings: checkpoint.Rings
    entries: list[int]
    clock: int = 0
    episode_return: float = 0.0
    episode_length: int = 0
    metrics_bytes: int = 0
    returns: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def start(cls, config: Config, folder: Path) -> "Game":
        """Before the first step. Raises UsageError."""
        env = make_env(config, config.seed)
        seen = env_step(env.reset()[0], first=True)
        rings = checkpoint.Rings(folder / "checkpoint")
        return cls(config, folder, env, seen, rings, entries=[0] * config.levels)

    def remembered(self) -> None:
        """Counts what the tower's call has stored of `seen`."""
        for i in range(self.config.levels):
            due = self.clock % self.config.period**i == 0 or self.seen.is_last
            self.entries[i] += int(due)
        self.clock += 1

    def advance(self, action: int, step: int) -> None:
        """The environment's answer becomes what is `seen`. Raises GameError."""
        try:
            obs, reward, terminated, truncated, _ = self.env.step(action)
        except Exception as error:
            raise GameError(
                f"--game {self.config.game}, step {step}: {error!r}"
            ) from error
        self.episode_return += float(reward)
        self.episode_length += 1
        last = terminated or truncated
        self.seen = env_step(obs, reward, last=last, terminal=terminated)

    def begin_episode(self, step: int) -> None:
        """After the last step of the one before, which ended at agent step `step`."""
        self.write(
            step,
            episode_return=self.episode_return,
            episode_length=self.episode_length,
        )
        self.returns.append((step, self.episode_return))
        self.clock, self.episode_return, self.episode_length = 0, 0.0, 0
        self.seen = env_step(self.env.reset()[0], first=True)

    def restore(self, arrays: dict[str, np.ndarray], meta: dict) -> None:
        """Continues from the arrays and counts of a checkpoint."""
        self.env.set_state(checkpoint.prefixed(arrays, "env/"))
        seen = checkpoint.fill({"seen": self.seen}, arrays, self.folder)["seen"]
        self.seen = jax.tree.map(np.asarray, seen)
        self.returns = [(int(step), value) for step, value in arrays["returns"]]
        self.rings = checkpoint.Rings(self.rings.folder, meta["segments"])
        for name in COUNTS:
            setattr(self, name, meta["counts"]["game"][name])

    def write(self, step: int, **values) -> None:
        """One line of metrics.jsonl."""
        line = json.dumps({"step": step} | values) + "\n"
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(line)
        self.metrics_bytes += len(line)

    def sync(self) -> None:
        """What was written is on the disk."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            os.fsync(file.fileno())

    def cut(self) -> None:
        """Drops lines that were written after the checkpoint that was restored."""
        path = self.folder / "metrics.jsonl"
        if path.exists() and path.stat().st_size > self.metrics_bytes:
            os.truncate(path, self.metrics_bytes)
