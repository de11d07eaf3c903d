"""MinAtar: five Atari games at 10×10 as Gymnasium environments with exact resume.

Observations are the game's boolean channels as uint8 0 or 255, (10, 10, channels).
No sticky actions (the package's default is 0.1), minimal action sets, difficulty
ramping on, raw rewards. Mean return of uniform actions (results/minatar_scores.json):

game            actions  channels  random
asterix         5        4         0.57
breakout        3        4         0.40
freeway         3        7         0.41
seaquest        6        10        0.09
space_invaders  4        6         4.25

Episodes are truncated after `max_steps` = 5,000: without sticky actions a strong agent,
or one at Seaquest's surface, may play for ever. The package has no cap and its author
suggests none (kenjyoung/MinAtar issue 19); gymnax cuts at 1,000. Freeway's clock of
2,501 steps, which its picture does not show, truncates too (package: terminates).

Source: Young and Tian 2019, "MinAtar" (arXiv:1903.03176), package `minatar` 1.0.15.
"""

import importlib.util
import operator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsIndex

import gymnasium as gym
import numpy as np
from jaxtyping import UInt8

from probes import pack, unknown, unpack

GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")
Picture = UInt8[np.ndarray, "10 10 channels"]


def load_game(game: str) -> Any:
    """The package's own environment of one game; ImportError without the package."""
    package = importlib.util.find_spec("minatar")
    if package is None or package.origin is None:
        raise ImportError("MinAtar is not installed: pip install -e '.[minatar]'")
    # The file alone: `import minatar` would import seaborn too, which takes seconds.
    path = Path(package.origin).parent / "environments" / f"{game}.py"
    module = ModuleType(f"minatar_{game}")
    SourceFileLoader(module.__name__, str(path)).exec_module(module)
    return module.Env(ramping=True)


class MinAtar(gym.Env[np.ndarray, Any]):
    """One game, seeded once; later resets draw on."""

    def __init__(self, name: str, *, seed: int, max_steps: int):
        self.name, self.max_steps, self.game = name, max_steps, load_game(name)
        self.actions = self.game.minimal_action_set()
        self.reset(seed=int(seed))
        self.game.random.seed(int(seed))  # make(seed=s).reset() is reset(seed=s)
        self.needs_reset = True
        shape = self.observation().shape
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gym.spaces.Discrete(len(self.actions))

    def observation(self) -> Picture:
        """The current picture."""
        return 255 * self.game.state().astype(np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """→ (first picture, {}); a seed, if given, starts the random stream anew."""
        super().reset(seed=seed)
        if seed is not None:
            self.game.random = np.random.RandomState(seed)
        self.game.reset()
        self.steps, self.needs_reset = 0, False
        return self.observation(), {}

    def step(self, action: SupportsIndex) -> tuple[Picture, float, bool, bool, dict]:
        """→ (picture, the reward that arrives with it, terminated, truncated, {});
        RuntimeError when no episode is under way, ValueError for an unknown action."""
        if self.needs_reset:
            raise RuntimeError("no episode is under way: call reset() before step()")
        if not 0 <= operator.index(action) < len(self.actions):
            raise ValueError(f"action {action} is not in 0..{len(self.actions) - 1}")
        reward, over = self.game.act(self.actions[operator.index(action)])
        self.steps += 1
        self.needs_reset = over or self.steps >= self.max_steps
        terminated = over and self.name != "freeway"
        truncated = self.needs_reset and not terminated
        return self.observation(), float(reward), terminated, truncated, {}

    def get_state(self) -> dict[str, np.ndarray]:
        """All that the future depends on, as bytes of JSON: no pickle, about 10 kB."""
        fields = {k: v for k, v in vars(self.game).items() if k != "random"}
        fields["random"] = self.game.random.get_state(legacy=False)
        made, now = [self.name, self.max_steps], [self.steps, self.needs_reset]
        return {"minatar": pack([made, now, fields])}

    def set_state(self, saved: dict[str, np.ndarray]) -> None:
        """Continue from `get_state`; ValueError if game or cap differ."""
        made, now, fields = unpack(saved["minatar"])
        if made != [self.name, self.max_steps]:
            raise ValueError(f"this is {self.name} to {self.max_steps}, not {made}")
        if fields.keys() != vars(self.game).keys():
            raise ValueError(f"this is not a state of {self.name}")
        self.steps, self.needs_reset = now
        self.game.random.set_state(fields.pop("random"))
        for name, value in fields.items():
            is_map = isinstance(getattr(self.game, name), np.ndarray)
            setattr(self.game, name, np.array(value, float) if is_map else value)


def make(name: str, *, seed: int, max_steps: int = 5000) -> MinAtar:
    """`minatar/breakout` and so on; a one-line ValueError for an unknown game."""
    games = {f"minatar/{game}": game for game in GAMES}
    if name not in games:
        raise unknown("MinAtar game", name, games)
    return MinAtar(games[name], seed=seed, max_steps=max_steps)
