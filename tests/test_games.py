"""All 26 games: their actions, and whole runs of three levels on each."""

import json
import math
from collections import defaultdict

import pytest

import atari
import report
import run
import train

COUNTS = {
    3: "Freeway",
    4: "Breakout",
    6: "DemonAttack Pong Qbert UpNDown",
    7: "Assault",
    8: "Gopher",
    9: "Asterix CrazyClimber MsPacman",
    10: "Amidar",
    14: "KungFuMaster",
    18: "Alien BankHeist BattleZone Boxing ChopperCommand Frostbite Hero Jamesbond "
    "Kangaroo Krull PrivateEye RoadRunner Seaquest",
}
ACTIONS = {game: n for n, games in COUNTS.items() for game in games.split()}


def test_minimal_action_sets():
    envs = {game: atari.make(game, seed=0) for game in atari.GAMES}
    assert {game: len(env.actions) for game, env in envs.items()} == ACTIONS
    assert {env.observation_space.shape for env in envs.values()} == {(64, 64, 3)}
    for env in envs.values():
        names = [action.name for action in env.actions]
        assert names[0] == "NOOP" and len(set(names)) == env.action_space.n


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_three_levels_train_on_every_game(count, tmp_path, monkeypatch):
    """Games with as many actions share what is compiled."""
    monkeypatch.setattr(report, "draw", lambda run: [])  # has tests of its own
    for game in COUNTS[count].split():
        folder = tmp_path / game
        flags = "--preset tiny --levels 3 --steps 200 --eval-episodes 0"
        argv = [*flags.split(), "--game", game, "--run-dir", str(folder)]
        assert train.main(argv) == 0
        config, learners = run.load_weights(folder)
        assert config.game == game
        shapes = [learner.subactor.action_shape for learner in learners]
        code = (config.model.code_categoricals, config.model.code_classes)
        assert shapes == [(1, count), code, code]
        result = json.loads((folder / "result.json").read_text())
        assert (result["game"], result["steps"]) == (game, 200)
        assert result["updates"][0] == 49 and min(result["updates"]) >= 2
        assert result["human"] == atari.scores()[game]["human"]
        found = defaultdict(list)
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            for name, value in json.loads(line).items():
                found[name].append(value)
        assert all(math.isfinite(x) for values in found.values() for x in values)
        assert {f"level{i}/loss_actor" for i in range(3)} <= set(found)
