"""Memory measured: the linear probe on known features, a world model that learns."""

import numpy as np
import pytest

import memory
import train


def test_linear_probe_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    y = rng.choice([-1.0, 1.0], 400)
    noise = rng.normal(size=(400, 5))
    assert memory.linear_probe(np.column_stack([noise, 3 + 1e-3 * y]), y) == 1.0
    assert abs(memory.linear_probe(noise, y) - 0.5) < 0.12
    assert (
        memory.linear_probe(np.column_stack([noise[:, 0], y * noise[:, 1]]), y) < 0.65
    )


@pytest.mark.slow
@pytest.mark.parametrize("carry", ["stored", "zero"])
def test_windows_shorter_than_the_delay_need_the_stored_carry(carry, tmp_path):
    """Δ21: a reward that comes 17 steps after its cue, windows of 8."""
    words = "--game cue --levels 1 --length 8 --env.delay 16 --steps 6000 --seed 1"
    words += f" --updates-per-step 1 --eval-episodes 1 --carry {carry}"
    assert train.main([*words.split(), "--run-dir", str(tmp_path / "run")]) == 0
    found = memory.foreseen(tmp_path / "run")
    assert found > 0.95 if carry == "stored" else found < 0.75
