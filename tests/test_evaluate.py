"""The command: tables, evaluations with videos, random play, the results page."""

import csv
import json
from dataclasses import replace
from itertools import islice, pairwise
from os.path import relpath
from pathlib import Path

import jax
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from PIL import Image, ImageSequence
from test_scores import write_run

import atari
import evaluate
import run
import scores
import train
from agent import init_learners
from config import TINY, UsageError
from evaluate import HEADER, PROTOCOLS, Recording
from game import make_env

ROOT = Path(evaluate.__file__).parent
RESULTS = ROOT / "results"
RAW = {"command": "python x.py", "commit": "abc", "hardware": "a b", "seeds": [0, 1]}


def strict_json(path: Path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_command_writes_tables_aggregates_and_figures(tmp_path):
    for seed in range(2):
        ends = [(at, at / 10) for at in range(5, 101, 5)]
        write_run(tmp_path / f"a/Pong-{seed}", seed=seed, score=seed, returns=ends)
        write_run(tmp_path / f"b/Pong-{seed}", seed=seed, score=-5.0)
    write_run(tmp_path / "a/Boxing-0", "Boxing", score=None)
    out = tmp_path / "deep" / "out"
    evaluate.table((tmp_path / "a",), out=out, agent=(f"b={tmp_path}/b/P*",))
    with (out / "table.csv").open(newline="") as file:
        rows = {row["game"]: row for row in csv.DictReader(file)}
    assert len(rows) == 26
    assert (rows["Pong"]["ours"], rows["Pong"]["ours seeds"]) == ("0.5", "2/2")
    assert (rows["Pong"]["Hieros"], rows["Pong"]["b"]) == ("5.0", "-5.0")
    assert rows["Pong"]["ours HNS %"] == "60.1"  # (0.5 + 20.7) / 35.3
    assert (rows["Boxing"]["ours"], rows["Boxing"]["ours seeds"]) == ("missing", "0/2")
    with (out / "aggregates.csv").open(newline="") as file:
        sums = [x["mean %"] for x in csv.DictReader(file) if x["agent"] == "ours"]
    assert sums == ["missing", "missing", "60.1 [58.6, 61.5]"]
    text = (out / "table.md").read_text()
    assert "| Boxing | 0.1 | 12.1 |" in text and "| missing | missing | 0/2 |" in text
    assert "| played | ours | 2 | 60.1 [58.6, 61.5] |" in text
    summary = strict_json(out / "aggregates.json")
    assert set(HEADER) <= set(summary) and summary["seeds"] == [0, 1]
    assert summary["25"]["rows"]["ours"]["mean"] == [None, None, None]
    assert summary["played"]["improvement"]["ours > b"] == [1.0, 1.0, 1.0]
    names = ("aggregates", "efficiency", "improvement", "profile")
    assert sorted(out.glob("*.png")) == [out / f"{x}_played.png" for x in names]
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("agent", "words"),
    [
        ((), "RUN_DIRS: none given"),
        (("x",), "--agent x: give NAME=GLOB"),
        (("=x",), "--agent =x: give NAME=GLOB"),
        (("x=/nowhere/*",), "--agent x=/nowhere/.*: give NAME=GLOB"),
        (("x,y=/",), "--agent x,y=/: give NAME=GLOB"),
        (("x=/", "x=/"), "--agent x=/: give NAME=GLOB, NAME new"),
    ],
)
def test_bad_agents_are_refused(tmp_path, agent, words):
    with pytest.raises(UsageError, match=words):
        evaluate.table(out=tmp_path, agent=agent)


def test_out_must_be_a_folder(tmp_path):
    write_run(tmp_path / "run")
    for out in (None, tmp_path / "run/result.json"):
        with pytest.raises(UsageError, match=r"--out .*: is no folder; usage"):
            evaluate.table((tmp_path,), out=out)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert evaluate.main(["table", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith(f"evaluate.py: {tmp_path}: no usable result.json")
    assert not (tmp_path / "out").exists()
    for argv in (["checkpoint", "nowhere"], ["checkpoint", "x", "--episodes", "0"]):
        assert evaluate.main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained weights of a flat agent that plays catch, 9 steps an episode."""
    config = train.parse(["--game", "catch", "--levels", "1", "--seed", "3"])
    shape = make_env(config, 0).observation_space.shape
    learners = init_learners(config, shape, 3, key=jax.random.key(0))
    path = tmp_path_factory.mktemp("weights") / "catch.weights"
    run.save_weights(path, config, learners)
    return path, config, tuple(learner.subactor for learner in learners)


def test_checkpoint_plays_the_episodes_that_training_ends_with(
    weights, capsys, tmp_path, monkeypatch
):
    path, config, subactors = weights
    monkeypatch.chdir(tmp_path)
    expected = [x.score for x in islice(run.evaluation(config, subactors), 20)]
    argv = ["checkpoint", str(path), "--episodes", "20", "--videos"]
    assert evaluate.main(argv) == 0
    folder = tmp_path / "runs" / "catch"
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["eval_returns"] == expected and len(set(expected)) == 2
    assert found["eval_score"] == np.mean(expected)
    text = capsys.readouterr().out
    assert "best.gif: episode" in text and ", return 1\n" in text
    assert text.endswith(f", return {sorted(expected)[9]:g}\n")
    for name in ("best", "median"):
        with Image.open(folder / "pictures" / f"{name}.gif") as film:
            assert film.n_frames <= 9 and film.size == (80, 160)


def test_an_evaluation_stands_above_the_score_of_the_run(tmp_path):
    write_run(tmp_path / "run", score=5.0, train_score=-3.0)
    result, later = tmp_path / "run/result.json", tmp_path / "run/evaluation.json"
    for updates, score in (([40], 7), ([30], 5)):  # of the end, and of mid-training
        later.write_text(json.dumps({"eval_score": 7.0, "updates": updates}))
        finished = json.loads(result.read_text()) | {"updates": [40]}
        result.write_text(json.dumps(finished))
        assert scores.read_result(result, "eval").score == score
        assert scores.read_result(result, "train").score == -3


@pytest.fixture(scope="module")
def breakout():
    """An episode as a gray, small agent meets it, and the screens behind it."""
    config = replace(TINY, game="Breakout")
    assert config.env.gray and config.env.size < 64
    env = make_env(replace(config, env=replace(config.env, gray=False)), 5)
    env.reset()  # an episode depends on those before it: take the second
    env.reset()
    start, rng = env.get_state(), np.random.default_rng(0)
    actions, shown, over = [], [], False
    while not over:
        actions.append(int(rng.integers(env.action_space.n)))
        over = any(env.step(actions[-1])[2:4])
        shown.append(env.screens.max(axis=0).copy())
    return config, Recording(0.0, start, actions), shown


def test_videos_show_the_consoles_own_colours(breakout, tmp_path):
    config, episode, shown = breakout
    frames = list(evaluate.pictures(config, episode))
    np.testing.assert_array_equal(frames, shown)
    assert frames[0].shape == (210, 160, 3)
    evaluate.write_video(tmp_path / "new/film.gif", iter(frames))
    with Image.open(tmp_path / "new/film.gif") as film:
        decoded = [np.array(x.convert("RGB")) for x in ImageSequence.Iterator(film)]
    changed = [frames[0], *(b for a, b in pairwise(frames) if (a != b).any())]
    np.testing.assert_array_equal(decoded, changed)  # a GIF holds equal pictures longer


def test_long_episodes_are_shown_faster_and_to_their_end(breakout, monkeypatch):
    config, episode, shown = breakout
    monkeypatch.setattr(evaluate, "FILM", 10)
    every = -(-len(shown) // 10)
    frames = list(evaluate.pictures(config, episode))
    expected = shown[every - 1 :: every]
    expected += [] if len(shown) % every == 0 else shown[-1:]
    np.testing.assert_array_equal(frames, expected)
    assert len(frames) <= 11


def test_chance_is_uniform_play_in_the_environment_of_training():
    found = evaluate.chance("Breakout", 2)
    env, rng = atari.make("Breakout", seed=0), np.random.default_rng(0)
    for score, length in zip(found["returns"], found["lengths"], strict=True):
        env.reset()
        rewards, over = [], False
        while not over:
            _, reward, *ends, _ = env.step(rng.integers(4))
            rewards.append(reward)
            over = any(ends)
        assert (sum(rewards), len(rewards)) == (score, length)
    assert found["actions"] == 4


def test_episodes_of_chance_may_be_cut():
    """No ball is lost in two steps."""
    env = evaluate.make_minatar("minatar/breakout", seed=0, max_steps=2)
    assert evaluate.play_uniformly(env, 3)["lengths"] == [2, 2, 2]


@pytest.mark.parametrize("game", ["Breakout", "Pong"])
def test_committed_random_play_is_what_the_command_measures(game):
    raw = json.loads((RESULTS / "random_baseline.json").read_text())
    protocols = [name for name in PROTOCOLS if game in raw["played"][name]]
    assert protocols[0] == "here"
    for protocol in protocols:
        saved = raw["played"][protocol][game]
        again = evaluate.chance(game, 1, **PROTOCOLS[protocol])
        assert saved["returns"][:1] == again["returns"]
        assert saved["lengths"][:1] == again["lengths"]
        assert saved["actions"] == again["actions"]
        assert len(saved["returns"]) == raw["episodes"] == 100
    assert set(raw["played"]["here"]) == set(atari.GAMES)


def test_standard_errors_by_hand():
    """Spread 2, 4 and 30 episodes: 2 √(1/4 + 1/30) = 1.0646."""
    ours = [1.0, 1.0, 3.0 + 2 * 2**0.5 - 2, 3.0]
    spread = np.std(ours, ddof=1) * (1 / 4 + 1 / 30) ** 0.5
    assert evaluate.apart(ours, np.mean(ours) + spread) == pytest.approx(1)
    assert evaluate.apart([0.0, 0.0], 0.0) == 0 and evaluate.apart([0.0, 0.0], 1.0) > 99


def test_verdicts():
    """Mean 0.5 ± 0.05, with their 30 episodes ± 0.1: 0.5, 0.65, 0.9 lie otherwise."""
    coin = {"Pong": {"returns": [0.0, 1.0] * 50}}
    high = {"Pong": {"returns": [0.8, 1.0] * 50}}
    played = {"here": coin, "6 frames": coin, "both": high}
    assert evaluate.verdict(played, "Pong", 0.55) == "inside"
    within = "within the error of their 30 episodes"
    assert evaluate.verdict(played, "Pong", 0.65) == within
    assert evaluate.verdict(played, "Pong", 0.9) == "that of both"
    assert evaluate.verdict(played, "Pong", -9.0) == "unexplained"


def test_random_play_continues_where_it_was(tmp_path, monkeypatch, capsys):
    asked, far = [], {"actions": 3, "returns": [0.0, 1.0], "lengths": [1, 2]}

    def chance(game, count, **options):
        asked.append((game, tuple(options)))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return far

    monkeypatch.setattr(evaluate, "chance", chance)
    argv = ["random", "--games", "pong", "Freeway", "--episodes", "2"]
    argv += ["--out", str(tmp_path / "raw.json")]
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(argv)
    assert evaluate.main(argv) == 0
    both = [("Pong", ()), ("Freeway", ()), ("Freeway", ())]
    others = [("Pong", tuple(options)) for options in PROTOCOLS.values()][1:]
    assert asked == both + others  # -20.7 is far from ½, 0 is not
    raw = json.loads((tmp_path / "raw.json").read_text())
    assert set(HEADER) <= set(raw) and raw["summary"].startswith("of 2 games")
    assert "| Freeway | 3 | 0.5 [0.0, 1.0] | 0.0 |" in (tmp_path / "raw.md").read_text()
    assert evaluate.main([*argv[:-3], "3", *argv[-2:]]) == 2
    assert "--episodes 3: give 2 or more, as many as in" in capsys.readouterr().err
    assert evaluate.main(["random", "--games", "Pogn"]) == 2
    assert "unknown Atari game 'Pogn': did you mean Pong" in capsys.readouterr().err


def test_minatar_beside_others(tmp_path, capsys, monkeypatch):
    """Columns by hand; random play again is what was committed."""
    runs = [{"measured": 1.0}, {"measured": 3.0}]
    tasks = {"breakout": {"flat": {"runs": runs}, "deep": {"runs": []}}}
    study = tmp_path / "minatar.json"
    study.write_text(json.dumps({"tasks": tasks}))
    argv = ["minatar", "--study", str(study), "--episodes"]
    assert evaluate.main([*argv, "20"]) == 0
    raw = json.loads((tmp_path / "minatar_scores.json").read_text())
    committed = json.loads((RESULTS / "minatar_scores.json").read_text())
    returns = committed["played"]["breakout"]["returns"]
    assert raw["played"]["breakout"]["returns"] == returns[:20]
    assert raw["command"].endswith(f"minatar --episodes 20 --study {relpath(study)}")
    last = (tmp_path / "minatar_scores.md").read_text().splitlines()[-1]
    assert last.startswith("| breakout | 0.")
    assert last.endswith("| 2.00 [1.00, 3.00] (n = 2) | not run | 28 |")
    assert evaluate.main([*argv, "1"]) == 2
    assert "--episodes 1: give 2 or more" in capsys.readouterr().err
    assert evaluate.main(["minatar", "--study", str(tmp_path / "none.json")]) == 2
    assert "none.json: not there, run python studies.py" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert evaluate.main([*argv, "2"]) == 2
    assert "MinAtar is not installed: pip install" in capsys.readouterr().err


def test_the_committed_page_is_what_the_raw_files_give():
    text = (RESULTS / "README.md").read_text()
    assert text == evaluate.make_page(RESULTS), "run python evaluate.py page"


def test_page_by_hand(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RAW | {"wall_seconds": [60, 180]}))
    more = {"wall_seconds": 9000, "cores": 2, "gpus": 0.5, "summary": "x | y"}
    (tmp_path / "b.json").write_text(json.dumps(RAW | more))
    (tmp_path / "c.json").write_text('["no header"]')
    (tmp_path / "d.json").write_text(json.dumps(RAW | {"wall_seconds": None}))
    (tmp_path / "a.md").write_text("| a |\n")
    (tmp_path / "a_curve.png").write_bytes(b"")
    text = evaluate.make_page(tmp_path)
    rows = [x.strip("| ").split(" | ") for x in text.splitlines() if x.startswith("| ")]
    assert rows[2][:2] == ["Atari100k, published configuration", "**not run**"]
    cost = ["4.0 min", "2.0 min; cores not stated", "abc"]
    assert rows[3] == ["[a](a.json)", "-", "a b", "0 1", *cost]
    cost = ["2.5 h", "2.5 h; 5 core-hours, 1.2 GPU-hours", "abc"]
    assert rows[4] == ["[b](b.json)", "x / y", "a b", "0 1", *cost]
    assert rows[5] == ["[d](d.json)", "-", "a b", "0 1", "-", "-", "abc"]
    assert "Without a header: c.json." in text
    section = "## a\n\n`python x.py`\n\n| a |\n\n![a_curve](a_curve.png)\n"
    assert section in text


def test_the_published_row_is_there_once_its_raw_file_is(tmp_path):
    write_run(tmp_path / "runs/Pong", wall_seconds=3600, hardware="one GPU")
    out = tmp_path / "results/atari100k"
    evaluate.table((tmp_path / "runs",), out=out)
    text = evaluate.make_page(tmp_path / "results")
    assert "not run" not in text
    title = "[Atari100k, published configuration](atari100k/aggregates.json)"
    assert f"| {title} | - | one GPU | 0 | 60.0 min |" in text


def test_shape_checks_are_live():
    with pytest.raises(TypeCheckError):
        evaluate.picture(make_env(TINY, 0), np.zeros((3, 3)))
