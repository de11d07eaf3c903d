"""The Atari100k environment: 26 games, one protocol, exact resume.

An agent step holds one action for 4 frames. The reward is the sum over those frames,
unclipped; lives are ignored; actions are the game's minimal set and never sticky. The
observation is the pixelwise maximum X of the last two screens, averaged over areas:

    A[i, j] = s/n · |[i n/s, (i+1) n/s) ∩ [j, j+1)|    weights, n pixels to s    (ENV 1)
    o = rint(A_H X A_Wᵀ)                               per channel, uint8        (ENV 2)

From 210×160 to 64 or 32 the exact average is a multiple of 1/525, hence never a tie
and at least 1/1050 from one: float32 in any order rounds alike, and (ENV 2) equals
OpenCV's INTER_AREA bit for bit.

Sources: Bellemare et al. 2013 (ALE), Machado et al. 2018 (protocol), Kaiser et al. 2020
(Atari100k), gymnasium's AtariPreprocessing; scores: data/README.md.

Differs from the official code in:
    Δ3  the cap of 108,000 frames truncates an episode and is not a terminal;
    Δ4  emulator and no-ops are seeded from one seed.

Without sticky actions a game has no randomness of its own: chance enters through the
no-ops alone. Yet episodes are not copies: in some games (Assault, Seaquest) memory
survives a reset, so an episode depends on those before it.

Axes: H height, W width, C channels (3 RGB, 1 gray), k taps, S bytes.
"""

import csv
import difflib
import functools
import json
import math
import operator
import re
from pathlib import Path
from typing import Any, SupportsIndex

import gymnasium
import numpy as np
from ale_py import ALEInterface, ALEState, LoggerMode, roms
from jaxtyping import Float32, Int, UInt8

SCORES_CSV = Path(__file__).parent / "data" / "atari100k_scores.csv"


def scores() -> dict[str, dict[str, float]]:
    """Reference scores, game → column → score in game points.

    Columns are those of data/atari100k_scores.csv: random, human, then one per
    published agent. NaN marks a score that was not reported.
    """
    with SCORES_CSV.open(newline="") as file:
        rows = {row.pop("game"): row for row in csv.DictReader(file)}
    return {
        game: {name: float(text or "nan") for name, text in row.items()}
        for game, row in rows.items()
    }


GAMES = tuple(scores())


@functools.lru_cache
def area_taps(
    n: int, size: int
) -> tuple[Int[np.ndarray, "k {size}"], Float32[np.ndarray, "k {size}"]]:
    """Of n pixels, those under each of `size` equal areas, and their weights (ENV 1).

    Row i of A has its k taps in column i; unused ones weigh 0.
    """
    edges = np.arange(size + 1) * n / size
    left, right = edges[:-1], edges[1:]
    pixel = np.floor(left).astype(int) + np.arange(math.ceil(n / size) + 1)[:, None]
    overlap = np.minimum(right, pixel + 1) - np.maximum(left, pixel)
    weight = size / n * overlap.clip(0)  # (ENV 1)
    return pixel.clip(max=n - 1), weight.astype(np.float32)


def area_resize(
    image: UInt8[np.ndarray, "H W C"], size: int
) -> UInt8[np.ndarray, "{size} {size} C"]:
    """Average the areas of an image with pixels 0..255 (ENV 2).

    For size > min(H, W) this stays an area average, where OpenCV interpolates.
    """
    H, W, C = image.shape
    # Sums over taps, not matrix products: BLAS would split these over threads, which
    # on a busy machine wait for each other for tens of milliseconds.
    pixel, weight = area_taps(H, size)
    rows = np.einsum("ki,kic->ic", weight, image.reshape(H, W * C)[pixel])
    pixel, weight = area_taps(W, size)
    columns = rows.reshape(size, W, C).swapaxes(0, 1)[pixel]
    mean = np.einsum("kj,kjic->ijc", weight, columns)
    return np.rint(mean).astype(np.uint8)  # (ENV 2)


def to_array(data: bytes) -> UInt8[np.ndarray, " S"]:
    """Bytes as a read-only array, which `np.savez` stores without pickle."""
    return np.frombuffer(data, np.uint8)


def find(game: str) -> str:
    """The name in GAMES that `game` spells in any case; else a one-line ValueError."""
    names = {name.lower(): name for name in GAMES}
    if game.lower() in names:
        return names[game.lower()]
    near = difflib.get_close_matches(game.lower(), names)
    hint = f"did you mean {' or '.join(names[n] for n in near)}? " if near else ""
    raise ValueError(
        f"unknown Atari game {game!r}: {hint}"
        'List all: python -c "import atari; print(*atari.GAMES)"'
    )


class Atari(gymnasium.Env[np.ndarray, SupportsIndex]):
    """One game under the protocol above.

    game: a name of GAMES, in any case. seed ≥ 0 starts the emulator's and the no-ops'
    random streams; later resets draw on. noops: a reset plays 0..noops-1 no-op frames;
    0 for none. size: side of the observation in pixels. gray: luminance instead of RGB.
    frame_skip: frames per step; 1 pools nothing. max_frames: length of an episode in
    frames, no-ops not counted, rounded up to a whole step. ValueError if out of range.

    `frames` counts the episode's frames; `actions[i].name` says what action i does.

    Resume is exact because it replays: a state is the emulator's before the last reset,
    and the actions since. ALE's own save (0.12) omits how far an unfinished frame is
    drawn; restored in mid-episode, Qbert shows other pictures and may write out of
    bounds (ALE issue 412, pull requests 732 and 739). A reset starts a frame afresh.
    """

    def __init__(
        self,
        game: str,
        *,
        seed: int,
        noops: int = 30,
        size: int = 64,
        gray: bool = False,
        frame_skip: int = 4,
        max_frames: int = 108_000,
    ):
        if min(size, frame_skip, max_frames) < 1 or noops < 0:
            raise ValueError("size, frame_skip, max_frames must be ≥ 1 and noops ≥ 0")
        self.game, self.noops, self.size = find(game), noops, size
        self.frame_skip, self.max_frames = frame_skip, max_frames
        ALEInterface.setLoggerMode(LoggerMode.Error)
        self.ale = ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self._seed(seed)
        self.frames, self.needs_reset = 0, True
        self.origin: dict[str, np.ndarray] = {}
        self.played = bytearray()
        self.actions = tuple(self.ale.getMinimalActionSet())
        self.grab = self.ale.getScreenGrayscale if gray else self.ale.getScreenRGB
        shape = self.ale.getScreenDims() + (() if gray else (3,))
        # Newest screen first; the older one is there only if a step has two frames.
        self.screens = np.zeros((min(frame_skip, 2), *shape), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(self.actions))
        self.observation_space = gymnasium.spaces.Box(
            0, 255, (size, size, 1 if gray else 3), np.uint8
        )

    def _seed(self, seed: int) -> None:
        super().reset(seed=int(seed))
        self.ale.setInt("random_seed", int(self.np_random.integers(1, 2**31)))
        rom = roms.get_rom_path(re.sub(r"(?<!^)(?=[A-Z])", "_", self.game).lower())
        assert rom, f"ALE has no ROM of {self.game}, a name in {SCORES_CSV}"
        self.ale.loadROM(rom)  # only now does the emulator read its seed

    def observation(self) -> UInt8[np.ndarray, "{self.size} {self.size} C"]:
        """The current observation; black before the first reset."""
        screen = self.screens.max(axis=0)
        return area_resize(screen.reshape(*screen.shape[:2], -1), self.size)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[UInt8[np.ndarray, "size size C"], dict[str, Any]]:
        """Start an episode; returns (observation, {}).

        The random streams continue, unless a seed starts them anew. No options.
        """
        if seed is not None:
            self._seed(seed)
        self.origin = {
            "game": to_array(self.game.encode()),
            "emulator": to_array(self.ale.cloneState(include_rng=True).serialize()),
            "rng": to_array(json.dumps(self.np_random.bit_generator.state).encode()),
        }
        self.played.clear()
        self.ale.reset_game()
        for _ in range(self.np_random.integers(max(self.noops, 1))):
            self.ale.act(0)
        self.screens[:] = 0  # no older screen as yet
        self.grab(self.screens[0])
        self.frames, self.needs_reset = 0, False
        return self.observation(), {}

    def step(
        self, action: SupportsIndex
    ) -> tuple[UInt8[np.ndarray, "size size C"], float, bool, bool, dict[str, Any]]:
        """Hold an action for `frame_skip` frames.

        Returns (observation, reward, terminated, truncated, {}), reward in game points,
        truncated at `max_frames` unless the game is over. Raises ResetNeeded when the
        episode has ended or never began, ValueError for an action out of range.
        """
        action = operator.index(action)
        if self.needs_reset:
            raise gymnasium.error.ResetNeeded("no episode: call reset() before step()")
        if not 0 <= action < len(self.actions):
            raise ValueError(f"action {action} is not in 0..{len(self.actions) - 1}")
        self.played.append(action)
        reward = 0.0
        # After a game over ALE ignores actions: the reward is 0 and the screen stays.
        for left in reversed(range(self.frame_skip)):
            reward += self.ale.act(self.actions[action])
            if left < 2:
                self.grab(self.screens[left])
        self.frames += self.frame_skip
        terminated = self.ale.game_over()
        truncated = not terminated and self.frames >= self.max_frames
        self.needs_reset = terminated or truncated
        return self.observation(), reward, terminated, truncated, {}

    def get_state(self) -> dict[str, np.ndarray]:
        """All that the future depends on: read-only arrays, at most about 45 kB.

        An environment of the same game, noops, frame_skip and max_frames continues
        from it bit for bit, later resets included, in any process. Raises ResetNeeded
        before the first reset.
        """
        if not self.origin:
            raise gymnasium.error.ResetNeeded("call reset() before get_state()")
        return {**self.origin, "actions": to_array(bytes(self.played))}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from what `get_state` returned; ValueError for another game's.

        Plays the episode so far once more: under a millisecond per step.
        """
        game = state["game"].tobytes().decode()
        if game != self.game:
            raise ValueError(f"this is a state of {game}, not of {self.game}")
        self.ale.restoreState(ALEState(state["emulator"].tobytes()))
        self.np_random.bit_generator.state = json.loads(state["rng"].tobytes())
        self.reset()
        for action in state["actions"]:
            self.step(action)


make = Atari
