"""The linear probe on features whose content is known; test_studies.py trains."""

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


def test_both_cues_count_alike():
    cue = np.array([1.0, 1, 1, -1])
    assert memory.balanced(np.ones(4), cue) == memory.balanced(-np.ones(4), cue) == 0.5
    assert memory.balanced(np.array([1.0, 1, -1, -1]), cue) == (2 / 3 + 1) / 2
