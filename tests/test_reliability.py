"""Small doses of what `reliability.py` does by the hundred, and whether it can fail."""

import pytest
from jaxtyping import TypeCheckError

import checkpoint
import reliability
from game import Game


def test_shape_hook_is_live():
    with pytest.raises(TypeCheckError):
        reliability.contents("a text")


def test_twenty_kills():
    """Every scenario several times, two of three while it learns or saves."""
    assert reliability.kills(20)["survived"] >= 20


def test_mutants():
    found = reliability.mutants(60)
    assert found["tried"] == sum(found["by_kind"].values()) == 60
    assert min(found["by_kind"].values()) > 0


def test_a_checksum_that_is_not_compared_would_be_noticed(monkeypatch):
    real = checkpoint.hashlib.sha256

    class Forgiving:
        """Equal to any other checksum."""

        def __init__(self, raw):
            self.found = real(raw)

        def digest(self):
            return Anything(self.found.digest())

        def hexdigest(self):
            return AnyText(self.found.hexdigest())

    class Anything(bytes):
        __hash__ = bytes.__hash__

        def __ne__(self, _):
            return False

    class AnyText(str):
        __hash__ = str.__hash__

        def __ne__(self, _):
            return False

    monkeypatch.setattr(
        checkpoint, "hashlib", type("hashlib", (), {"sha256": Forgiving})
    )
    with pytest.raises(RuntimeError, match="was taken"):
        reliability.mutants(60)


def test_bad_command_lines():
    assert reliability.command_lines()["tried"] >= 200


def test_a_command_line_that_is_taken_would_be_noticed(monkeypatch):
    monkeypatch.setattr(reliability, "bad_command_lines", lambda: iter([["--seed=1"]]))
    monkeypatch.setattr(reliability.train, "open_run", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reliability.command_lines()


def test_an_environment_that_fails_is_named(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    flags = ["--preset", "tiny", "--game", "catch", "--run-dir", str(folder)]
    flags += ["--model.channels", "--model.strides"]
    advance = Game.advance

    def failing(game, action, step):
        if step == 30:
            game.env.step = lambda _: {}["obs"]
        advance(game, action, step)

    monkeypatch.setattr(Game, "advance", failing)
    assert reliability.train.main(flags) == 4
    error = capsys.readouterr().err
    assert "--game catch, step 30: KeyError('obs')" in error


def test_the_summary_names_what_was_done():
    parts = {"kills": {"survived": 200}, "soak": {"minutes": 45.0, "growth": 0.0012}}
    said = reliability.summary(parts)
    assert said == "200 kills survived; memory +0.12% over 45 minutes"
