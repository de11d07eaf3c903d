"""The linear probe on features whose content is known; test_studies.py trains."""

from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

import memory


def test_linear_probe_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    y = rng.choice([-1.0, 1.0], 400)
    noise = rng.normal(size=(400, 5))
    assert memory.linear_probe(np.column_stack([noise, 3 + 1e-3 * y]), y) == 1.0
    assert abs(memory.linear_probe(noise, y) - 0.5) < 0.12
    assert (
        memory.linear_probe(np.column_stack([noise[:, 0], y * noise[:, 1]]), y) < 0.65
    )
    many = rng.normal(size=(400, 150))  # enough to fit any half by heart
    assert abs(memory.linear_probe(many, y) - 0.5) < 0.12


def test_measures_look_at_what_was_known_before_the_reward(monkeypatch):
    """Before it, state and prior know the cue; what saw the reward tells a lie."""
    levels, h = [], np.array([[-1.0], [1.0]])
    for cue in [1.0, -1.0] * 20:
        z = np.eye(2)[None, int(cue > 0)]
        latent = SimpleNamespace(
            x=np.array([[0.0], [cue], [1.0]]),
            z=np.stack([1 - z, 1 - z]),
            prior=jnp.stack([1 - z, z]),
            h=h,
        )
        steps = SimpleNamespace(reward=np.array([0.0, cue]))
        levels.append(SimpleNamespace(steps=steps, latent=latent))
    monkeypatch.setattr(memory, "played", lambda *_: (None, levels))
    says = lambda learner, z, h: (z[:, 0, 1] - z[:, 0, 0]) * h[:, 0]
    monkeypatch.setattr(memory, "predicted_rewards", says)
    assert memory.readable(Path()) == memory.foreseen(Path()) == 1


def test_both_cues_count_alike():
    cue = np.array([1.0, 1, 1, -1])
    assert memory.balanced(np.ones(4), cue) == memory.balanced(-np.ones(4), cue) == 0.5
    assert memory.balanced(np.array([1.0, 1, -1, -1]), cue) == (2 / 3 + 1) / 2
