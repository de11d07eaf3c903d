"""MinAtar: five Atari games at 10×10 as Gymnasium environments with exact resume.

Observations are the game's boolean channels as uint8 0 or 255, (10, 10, channels).
No sticky actions (the package's default is 0.1), minimal action sets, difficulty
ramping on, raw rewards. Mean return of uniform actions ± its standard error:

game            actions  channels  random
asterix         5        4         0.00
breakout        3        4         0.00
freeway         3        7         0.00
seaquest        6        10        0.00
space_invaders  4        6         0.00

Episodes are cut after `max_steps` = 5,000 (truncated): without sticky actions a strong
agent, or one that hides at Seaquest's surface, plays for ever. The package has no cap
and its author suggests none (kenjyoung/MinAtar issue 19); gymnax cuts at 1,000.
Freeway ends only by its own clock of 2,501 steps, which the picture does not show:
that is reported as truncated here, as the end of the game in the package.

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
    """The package's own environment of one game; ImportError without the package.

    The game's file is loaded alone, since `import minatar` would import matplotlib and
    seaborn, which takes longer than a second and serves nothing here.
    """
    package = importlib.util.find_spec("minatar")
    if package is None or package.origin is None:
        raise ImportError("MinAtar is not installed: pip install -e '.[minatar]'")
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
        self.needs_reset = True
        box = gym.spaces.Box(0, 255, self.observation().shape, np.uint8)
        self.observation_space = box
        self.action_space = gym.spaces.Discrete(len(self.actions))

    def observation(self) -> Picture:
        """The current picture."""
        return 255 * self.game.state().astype(np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start an episode → (picture, {}); a seed starts the random stream anew."""
        super().reset(seed=seed)
        if seed is not None:
            self.game.random = np.random.RandomState(seed)
        self.game.reset()
        self.steps, self.needs_reset = 0, False
        return self.observation(), {}

    def step(self, action: SupportsIndex) -> tuple[Picture, float, bool, bool, dict]:
        """→ (picture, the reward that arrives with it, terminated, truncated, {}).

        Raises RuntimeError when the episode has ended or never began, ValueError for
        an action out of range.
        """
        if self.needs_reset:
            raise RuntimeError("no episode is under way: call reset() before step()")
        if not 0 <= operator.index(action) < len(self.actions):
            raise ValueError(f"action {action} is not in 0..{len(self.actions) - 1}")
        reward, over = self.game.act(self.actions[operator.index(action)])
        self.steps += 1
        terminated = over and self.name != "freeway"
        truncated = not terminated and (over or self.steps >= self.max_steps)
        self.needs_reset = terminated or truncated
        return self.observation(), float(reward), terminated, truncated, {}

    def get_state(self) -> dict[str, np.ndarray]:
        """All that the future depends on, as bytes of JSON: no pickle, about 10 kB."""
        fields = {k: v for k, v in vars(self.game).items() if k != "random"}
        stream = self.game.random.get_state(legacy=False)
        saved = [self.name, self.max_steps, fields, stream, self.steps]
        return {"minatar": pack([*saved, self.needs_reset])}

    def set_state(self, saved: dict[str, np.ndarray]) -> None:
        """Continue from `get_state`; ValueError if game or cap differ."""
        *made, fields, stream, self.steps, self.needs_reset = unpack(saved["minatar"])
        if made != [self.name, self.max_steps]:
            raise ValueError(f"this is {self.name} to {self.max_steps}, not {made}")
        self.game.random.set_state(stream)
        for name, value in fields.items():
            is_map = isinstance(getattr(self.game, name), np.ndarray)
            setattr(self.game, name, np.array(value, float) if is_map else value)


def make(name: str, *, seed: int, max_steps: int = 5000) -> MinAtar:
    """`minatar/breakout` and so on; a one-line ValueError for an unknown game."""
    names = [f"minatar/{game}" for game in GAMES]
    if name not in names:
        raise unknown("MinAtar game", name, names)
    return MinAtar(name.removeprefix("minatar/"), seed=seed, max_steps=max_steps)
