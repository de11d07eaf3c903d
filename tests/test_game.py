"""One seed's side of a run: how its episodes end, what their returns are."""

from dataclasses import replace

import pytest
from jaxtyping import TypeCheckError

from config import TINY
from game import Game, read_lines

FLAT = replace(TINY, model=replace(TINY.model, channels=(), strides=()))


def test_shape_hook_is_live(tmp_path):
    with pytest.raises(TypeCheckError):
        Game.start("catch", tmp_path)


@pytest.mark.parametrize(
    ("name", "length", "terminal"), [("probe-discount", 2, True), ("echo", 20, False)]
)
def test_a_time_out_is_a_last_step_but_no_terminal(tmp_path, name, length, terminal):
    """Δ3: echo never ends by itself."""
    game = Game.start(replace(FLAT, game=name), tmp_path)
    for step in range(length):
        assert not game.seen.is_last
        game.advance(0, step)
    assert game.seen.is_last and game.seen.is_terminal == terminal


def test_a_return_holds_every_reward_of_its_own_episode(tmp_path):
    """Δ2: echo pays 1 for action 3 and nothing for 0, twenty steps long."""
    game = Game.start(replace(FLAT, game="echo"), tmp_path)
    for step in range(1, 41):
        game.advance(3 if step <= 20 else 0, step)
        if game.seen.is_last:
            game.begin_episode(step)
            assert game.seen.is_first and not game.seen.is_last
    assert game.returns == [(20, 20.0), (40, 0.0)]
    names = ("step", "episode_return", "episode_length")
    assert [tuple(x[k] for k in names) for x in read_lines(tmp_path)] == [
        (20, 20.0, 20),
        (40, 0.0, 20),
    ]
