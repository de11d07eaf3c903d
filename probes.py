"""Probe environments: small worlds whose worst and best scores are known exactly.

A probe is a deterministic machine on states that are tuples of ints, started in one
of `starts()` at random: move(s_t, a_t) → (s_{t+1}, r_{t+1}, over), draw(s) → picture;
an empty s_{t+1} asks for a new random start. `Probe` makes a Gymnasium environment of
it, in which a reward arrives with the picture that the action led to. Expected return
of uniform actions and of the best actions, as computed by `scores`:

name               what it asks for                          steps  uniform  best
catch              control over a short horizon              9       -0.6    1
recall             a cue remembered over D = `delay` blanks  D + 2    0      1
pinpad             pads in order, sparse reward              100      0.044  7.300
cue                nothing: the reward is the cue, ±1        D + 2    0      0
echo               nothing: o_t shows a_{t-1}                20      10     20
probe-value        the value of a constant                   1        1      1
probe-observation  a value that depends on the picture       1        0      0
probe-discount     a value one step ahead                    2        1      1
probe-policy       the better of two actions                 1        0      1
probe-both         the action that the picture asks for      1        0      1

Sources: Catch as in bsuite (Osband et al. 2020); PinPad after Director (Hafner et al.
2022), but one cell per pad and reward 1; the five `probe-` after Jones, "Debugging RL,
without the agonizing pain" (2021), and rejax. Pictures: uint8 (rows, cols, channels).
"""

import difflib
import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import gymnasium as gym
import numpy as np
from jaxtyping import UInt8

Picture = UInt8[np.ndarray, "rows cols channels"]
State = tuple[int, ...]
MOVES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # stay, up, down, left, right
COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)])


@dataclass(frozen=True)
class Catch:
    """A ball falls one row per step; the paddle below goes left, stays, goes right.

    State (ball row, ball col, paddle col); ±1 and the end when the ball is at the
    bottom. Every ball can be caught if rows > columns // 2.
    """

    rows: int = 10
    columns: int = 5
    actions = 3
    limit = None

    def starts(self) -> list[State]:
        return [(0, ball, self.columns // 2) for ball in range(self.columns)]

    def move(self, state: State, action: int) -> tuple[State, float, bool]:
        row, ball, paddle = state
        paddle = min(max(paddle + action - 1, 0), self.columns - 1)
        over = row + 2 == self.rows
        reward = (1.0 if ball == paddle else -1.0) if over else 0.0
        return (row + 1, ball, paddle), reward, over

    def draw(self, state: State) -> Picture:
        picture = np.zeros((self.rows, self.columns, 1), np.uint8)
        picture[state[0], state[1]] = picture[-1, state[2]] = 255
        return picture


@dataclass(frozen=True)
class Recall:
    """A cue, `delay` blank pictures, a go picture: the action taken there counts.

    State (cue, t, choice): column half `cue` lit at t = 0, the centre at t = delay + 1;
    then `rewards[cue][action]` with a last picture, column half `action` lit. Other
    actions do nothing; choice is -1 before. With delay = -1 there is no go picture: the
    action taken at the cue counts.
    """

    delay: int = 10
    rewards: tuple[tuple[float, ...], ...] = ((1.0, -1.0), (-1.0, 1.0))
    actions: int = 2
    limit = None

    def starts(self) -> list[State]:
        return [(cue, 0, -1) for cue in range(len(self.rewards))]

    def move(self, state: State, action: int) -> tuple[State, float, bool]:
        (cue, t, _), over = state, state[1] == self.delay + 1
        reward, choice = (self.rewards[cue][action], action) if over else (0.0, -1)
        return (cue, t + 1, choice), reward, over

    def draw(self, state: State) -> Picture:
        (cue, t, choice), picture = state, np.zeros((4, 4, 1), np.uint8)
        lit = cue if t == 0 else choice
        if lit >= 0:
            picture[:, 2 * lit : 2 * lit + 2] = 255
        elif t == self.delay + 1:
            picture[1:3, 1:3] = 255
        return picture


@dataclass(frozen=True)
class PinPad:
    """Step on the corner pads clockwise from the top left; +1 when all are done.

    State (row, col, the last `pads` pads stepped on, newest last, 0 for none); the
    newest pad does not count twice. A finished sequence is shown with its reward; the
    next step, whatever the action, puts the agent on a random free cell with nothing
    visited. Picture: history strip above the floor, agent white. Truncated at `limit`.
    """

    size: int = 5
    pads: int = 3
    limit: int = 100
    actions = 5

    def corners(self) -> list[State]:
        end = self.size - 1
        return [(0, 0), (0, end), (end, end), (end, 0)][: self.pads]

    def starts(self) -> list[State]:
        cells = [divmod(i, self.size) for i in range(self.size**2)]
        return [(*c, *[0] * self.pads) for c in cells if c not in self.corners()]

    def move(self, state: State, action: int) -> tuple[State, float, bool]:
        goal = tuple(range(1, self.pads + 1))
        if state[2:] == goal:
            return (), 0.0, False
        (down, right), end = MOVES[action], self.size - 1
        cell = min(max(state[0] + down, 0), end), min(max(state[1] + right, 0), end)
        pad = self.corners().index(cell) + 1 if cell in self.corners() else 0
        visited = state[2:] if pad in (0, state[-1]) else (*state[3:], pad)
        return cell + visited, float(visited == goal), False

    def draw(self, state: State) -> Picture:
        picture = np.zeros((self.size + 1, self.size, 3), np.uint8)
        picture[0] = 64
        picture[0, : self.pads] = COLOURS[list(state[2:])]
        for pad, (row, col) in enumerate(self.corners(), start=1):
            picture[row + 1, col] = COLOURS[pad]
        picture[state[0] + 1, state[1]] = 255
        return picture


@dataclass(frozen=True)
class Echo:
    """The picture shows the action a that led to it: row a lit, none after a reset.

    State (a + 1,), 0 for none. The reward a / (actions - 1) tells the same, so that an
    action that lands one step late shows in both. Truncated at `limit`.
    """

    actions: int = 4
    limit: int = 20

    def starts(self) -> list[State]:
        return [(0,)]

    def move(self, state: State, action: int) -> tuple[State, float, bool]:
        return (action + 1,), action / (self.actions - 1), False

    def draw(self, state: State) -> Picture:
        picture = np.zeros((self.actions + 1, self.actions, 1), np.uint8)
        picture[state[0]] = 255
        return picture[1:]


Rules = Catch | Recall | PinPad | Echo
PROBES: dict[str, Rules] = {
    "catch": Catch(),
    "recall": Recall(),
    "pinpad": PinPad(),
    "cue": Recall(rewards=((1.0,), (-1.0,)), actions=1),
    "echo": Echo(),
    "probe-value": Recall(delay=-1, rewards=((1.0,),), actions=1),
    "probe-observation": Recall(delay=-1, rewards=((-1.0,), (1.0,)), actions=1),
    "probe-discount": Recall(delay=0, rewards=((1.0,),), actions=1),
    "probe-policy": Recall(delay=-1, rewards=((-1.0, 1.0),)),
    "probe-both": Recall(delay=-1),
}


def scores(rules: Rules) -> tuple[float, float]:
    """Expected undiscounted return per episode of uniform and of best actions.

    V_n(s) = mean_a or max_a of r + V_{n-1}(s'), over all states that can be reached;
    n counts to `limit`, or to the number of states when the episodes end by themselves.
    """
    states = rules.starts()
    n_starts, seen, outcomes = len(states), {s: i for i, s in enumerate(states)}, []
    for state in states:  # grows while it is read
        for action in range(rules.actions):
            child, reward, over = rules.move(state, action)
            if child and not over and child not in seen:
                seen[child] = len(states)
                states.append(child)
            outcomes.append((-1 if over else seen[child] if child else -2, reward))
    after, rewards = map(np.array, zip(*outcomes, strict=True))
    expected = []
    for choose in (np.mean, np.max):
        value = np.zeros(len(states) + 2)  # the last two: a new start, the end
        for _ in range(rules.limit or len(states)):
            value[-2] = value[:n_starts].mean()
            value[:-2] = choose((rewards + value[after]).reshape(-1, rules.actions), 1)
        expected.append(float(value[:n_starts].mean()))
    return expected[0], expected[1]


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The one-line error for a name that is not among `known`."""
    near = difflib.get_close_matches(name, known := list(known), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    choice = ", ".join(known)
    return ValueError(f"unknown {kind} {name!r}: {hint}choose from {choice}")


def pack(tree: Any) -> UInt8[np.ndarray, " bytes"]:
    """JSON text of `tree` as bytes; numpy scalars and arrays become plain lists."""
    text = json.dumps(tree, default=lambda leaf: leaf.tolist())
    return np.frombuffer(text.encode(), np.uint8).copy()


def unpack(packed: UInt8[np.ndarray, " bytes"]) -> Any:
    """The inverse of `pack`, except that tuples and arrays come back as lists."""
    return json.loads(packed.tobytes())


class Probe(gym.Env[np.ndarray, Any]):
    """A probe as a Gymnasium environment, seeded once; later resets draw on."""

    def __init__(self, rules: Rules, *, seed: int):
        super().reset(seed=int(seed))
        self.rules, self.starts = rules, rules.starts()
        self.state, self.steps, self.needs_reset = self.starts[0], 0, True
        shape = self.observation().shape
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gym.spaces.Discrete(rules.actions)

    def observation(self) -> Picture:
        """The current picture."""
        return self.rules.draw(self.state)

    def _start(self) -> State:
        return self.starts[self.np_random.integers(len(self.starts))]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """→ (first picture, {}); a seed, if given, starts the random stream anew."""
        super().reset(seed=seed)
        self.state, self.steps, self.needs_reset = self._start(), 0, False
        return self.observation(), {}

    def step(self, action: SupportsIndex) -> tuple[Picture, float, bool, bool, dict]:
        """→ (picture, the reward that arrives with it, terminated, truncated, {});
        RuntimeError when no episode is under way, ValueError for an unknown action."""
        if self.needs_reset:
            raise RuntimeError("no episode is under way: call reset() before step()")
        if not 0 <= operator.index(action) < self.rules.actions:
            raise ValueError(f"action {action} is not in 0..{self.rules.actions - 1}")
        state, reward, over = self.rules.move(self.state, operator.index(action))
        self.state, self.steps = state or self._start(), self.steps + 1
        truncated = self.steps == self.rules.limit and not over
        self.needs_reset = over or truncated
        return self.observation(), reward, over, truncated, {}

    def get_state(self) -> dict[str, np.ndarray]:
        """All that the future depends on, as bytes of JSON: no pickle."""
        stream, flag = self.np_random.bit_generator.state, self.needs_reset
        return {"probe": pack([repr(self.rules), stream, self.state, self.steps, flag])}

    def set_state(self, saved: dict[str, np.ndarray]) -> None:
        """Continue from `get_state`; ValueError if probe or options differ."""
        rules, stream, *rest = unpack(saved["probe"])
        if rules != repr(self.rules):
            raise ValueError(f"this is {self.rules}, the saved state is of {rules}")
        self.np_random.bit_generator.state = stream
        state, self.steps, self.needs_reset = rest
        self.state = tuple(state)


def make(name: str, *, seed: int, **options: int) -> Probe:
    """The probe called `name`; options are its dataclass fields, such as `delay=30`.

    Raises a one-line ValueError for an unknown name, TypeError for an unknown option.
    """
    if name not in PROBES:
        raise unknown("probe", name, PROBES)
    return Probe(replace(PROBES[name], **options), seed=seed)
