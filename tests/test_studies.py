"""Studies: runs shared by flags, tables and figures by hand, missing seeds shown."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import memory
import studies
from studies import STUDIES, Study
from train import parse, write_config


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An empty folder of runs."""
    monkeypatch.setattr(studies, "RUNS", tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def finish(flags, seed, score, returns=(0.0, 1.0), losses=(), minutes=2.0):
    """A finished run of 80 steps: episodes at steps 1, 3, ..., each of two bins.

    Returns its folder.
    """
    folder = studies.folder_of(flags, seed)
    folder.mkdir()
    result = dict.fromkeys(studies.KEPT) | {"seed": seed, "steps": 80}
    result |= {"eval_score": score, "wall_seconds": 60 * minutes, "hardware": "a chip"}
    (folder / "result.json").write_text(json.dumps(result))
    lines = [
        {"step": 2 * i + 1, "episode_return": x} for i, x in enumerate(returns)
    ] + [{"step": 40, "level0/kl": x} for x in losses]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder.parent / f"{folder.name}.log").write_text("commit abc\nrun\ncommit abc\n")
    return folder


def test_equal_settings_are_one_run_and_others_another():
    found = {}
    for study in STUDIES.values():
        for task in study.tasks:
            for arm in study.arms:
                flags = study.flags(task, arm)
                folder = studies.folder_of(flags, 0)
                settings = str(parse(flags.split()))
                assert found.setdefault(folder, settings) == settings
    assert len(set(found.values())) == len(found)
    losses, ablations = STUDIES["losses"], STUDIES["ablations"]
    same = losses.flags("catch", "RSSM"), ablations.flags("catch", "RSSM")
    assert studies.folder_of(same[0], 3) == studies.folder_of(same[1], 3)


def test_every_arm_is_a_command_line_that_train_takes():
    for study in STUDIES.values():
        for task in study.tasks:
            for arm in study.arms:
                config = parse(study.flags(task, arm).split())
                assert config.levels in (1, 2, 3)


def test_numbers_of_a_run_by_hand(runs):
    finish("--game catch", 2, 0.5, returns=(1.0, 3.0, 5.0), losses=(0.25,))
    found = studies.read_run(Study({}, {}, ("kl",)), "--game catch", 2)
    assert found["commits"] == ["abc"] and found["measured"] == 0.5
    assert found["curve"][:4] == [1.0, 3.0, 5.0, None]
    assert found["losses"]["kl"][19] == 0.25 and found["losses"]["kl"].count(None) == 39
    assert studies.read_run(Study({}, {}), "--game catch", 0) is None
    finish("--game catch", 3, 0.5, returns=())  # no episode ended
    assert set(studies.read_run(Study({}, {}), "--game catch", 3)["curve"]) == {None}


@pytest.mark.parametrize("measure", studies.MEASURES)
def test_what_is_not_the_score_is_measured_in_the_run(runs, monkeypatch, measure):
    folder = finish("--game catch", 0, 0.5)
    measured = {folder: 0.75}
    monkeypatch.setitem(studies.MEASURES, measure, measured.__getitem__)
    monkeypatch.setattr(studies, "commit", lambda: "def")
    study = Study({"task": "--game catch"}, {"arm": ""}, measure=measure)
    run = studies.read_run(study, "--game catch", 0)
    assert run["measured"] == 0.75 and run["commits"] == ["abc", "def"]
    axes = Figure().subplots()
    studies.draw_intervals(axes, {"arm": [run["measured"]]}, measure)
    chance = [line for line in axes.lines if list(line.get_xdata()) == [0.5, 0.5]]
    assert len(chance) == (measure in memory.MEASURES)
    assert axes.get_xlim() == (0, 1.03)


def test_interval_of_known_values():
    mean, low, high = studies.interval([2.0])
    assert mean == 2.0 and np.isnan(low) and np.isnan(high)
    assert studies.shown([2.0]) == "2.00"
    assert studies.interval([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)
    # Binomial(8, ½)/8 is at most 1/8 with 3.5 %: of a 90 % interval 2/8 were the end.
    assert studies.interval([0.0, 1.0] * 4) == (0.5, 1 / 8, 7 / 8)


def test_a_report_shows_what_is_missing_and_starts_nothing(
    runs, tmp_path, monkeypatch, capsys
):
    tasks = {"one": "--game catch", "two": "--game recall"}
    study = Study(
        tasks, {"a": "--levels 1", "b": "--levels 3"}, pictures=("dream.png",)
    )
    monkeypatch.setitem(STUDIES, "catch", study)
    monkeypatch.setattr(studies, "run_all", lambda jobs: pytest.fail("started"))
    for seed, score in enumerate((0.0, 1.0)):
        pictures = finish(study.flags("one", "a"), seed, score) / "pictures"
        pictures.mkdir()
        (pictures / "dream.png").write_bytes(bytes([seed]))
    assert studies.main("catch", seeds=2, report=True, out=tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[0] == (
        "| one | a | 0.50 [0.00, 1.00] | 0.00 1.00 | 0.50 [0.50, 0.50] | 2.0 |"
    )
    assert all("(2 missing)" in line for line in lines[1:]) and len(lines) == 4
    found = json.loads((tmp_path / "catch.json").read_text())
    assert found["commit"] == "abc" and found["seeds"] == [0, 1]
    assert found["summary"].endswith("one, a: 0.50 [0.00, 1.00]")
    assert (tmp_path / "catch.png").stat().st_size > 1000
    copied = {path.name: path.read_bytes() for path in tmp_path.glob("catch_*")}
    assert copied == {"catch_one_dream.png": b"\0"}


def test_figures_say_their_numbers():
    axes = Figure().subplots()
    values = [[0.0, None] + [1.0] * 38, [2.0, None] + [3.0] * 38]
    studies.draw_curves(
        axes, {"a": values, "none": [], "no episode": [[None] * 40]}, 400, "return"
    )
    (line,) = axes.get_lines()
    x, y = line.get_data()
    assert len(x) == 39 and (x[0], x[1]) == (5.0, 25.0)
    assert (y[0], y[1]) == (1.0, 2.0) and axes.get_ylabel() == "return"
    axes = Figure().subplots()
    studies.draw_intervals(axes, {"a": [1.0, 3.0], "none": []}, "score")
    points = axes.get_lines()[1].get_xdata()
    assert np.allclose(points, 2.0)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "none"]


# In place of train.py: prints its flags and its cores, fails on request.
TRAIN = """
import json, os, sys, time
time.sleep(0.5)
print(json.dumps([sys.argv[1:], list(os.sched_getaffinity(0))]))
sys.exit("none" in sys.argv)
"""


def test_a_run_is_resumed_if_begun_and_read_if_done(runs, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    flags, core = "--game catch", max(os.sched_getaffinity(0))
    folder = studies.folder_of(flags, 1)

    def started():
        log = Path(f"{folder}.log").read_text().splitlines()
        return [json.loads(line) for line in log if not line.startswith("commit")]

    studies.run_one(flags, 1, core)
    arguments = [*flags.split(), "--seed", "1", "--run-dir", str(folder)]
    assert started() == [[arguments, [core]]]
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    studies.run_one(flags, 1, core)
    assert started()[1:] == [[["--resume", str(folder)], [core]]]
    (folder / "result.json").write_text("{}")
    studies.run_one(flags, 1, core)
    assert len(started()) == 2
    assert studies.run_all([(flags, 1), ("--game none", 1)]) == [
        studies.folder_of("--game none", 1)
    ]


def test_runs_of_other_settings_are_refused(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(studies, "run_all", lambda jobs: pytest.fail("started"))
    flags = STUDIES["pinpad"].flags("pinpad", "3 levels")
    folder = finish(flags, 0, 1.0)
    settings = parse([*flags.split(), "--seed", "0", "--run-dir", str(folder)])
    write_config(folder, settings)
    assert studies.main("pinpad", seeds=1, report=True, out=tmp_path) == 0
    write_config(folder, replace(settings, tau=0.5))
    assert studies.main("pinpad", seeds=1, report=True, out=tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert "other settings" in error and error.count("\n") == 1


def test_runs_of_results_are_kept_at_equal_settings_only(
    runs, tmp_path, monkeypatch, capsys
):
    started = []
    monkeypatch.setattr(studies, "run_all", lambda jobs: started.extend(jobs) or [])
    study = STUDIES["catch"]
    flat, tower = (study.flags("catch", arm) for arm in study.arms)
    for seed in range(2):
        finish(flat, seed, float(seed))
    assert studies.main("catch", seeds=2, out=tmp_path) == 0
    for folder in runs.glob("*-[01]"):
        shutil.rmtree(folder)
    finish(flat, 2, 5.0)
    started.clear()
    assert studies.main("catch", seeds=3, out=tmp_path) == 0
    assert started == [(tower, 0), (tower, 1), (flat, 2), (tower, 2)]
    found = json.loads((tmp_path / "catch.json").read_text())
    flat_runs = found["tasks"]["catch"]["1 level"]["runs"]
    assert [run["measured"] for run in flat_runs] == [0, 1, 5.0]
    assert found["hardware"] == "a chip, one core per run"
    known = lambda study: studies.known_runs(study, [flat], tmp_path)[flat]
    # Other studies have them too; fewer seeds asked lose none.
    assert set(known(STUDIES["pinpad"])) == {0, 1, 2}
    assert studies.main("catch", seeds=1, report=True, out=tmp_path) == 0
    assert len(json.loads((tmp_path / "catch.json").read_text())["seeds"]) == 3
    # Not where losses were not kept, the measure is another or a setting was.
    assert not known(STUDIES["losses"])
    assert not known(STUDIES["carry"])
    found["tasks"]["catch"]["1 level"]["settings"]["tau"] = 0.5
    text = json.dumps(found)
    (tmp_path / "catch.json").write_text(text)
    assert not known(study)
    assert studies.main("catch", seeds=1, report=True, out=tmp_path) == 2
    error = capsys.readouterr().err
    assert "(catch, 1 level)" in error and error.count("\n") == 1
    assert (tmp_path / "catch.json").read_text() == text


def test_an_unknown_study_is_one_line(capsys):
    assert studies.main("nothing") == 2
    error = capsys.readouterr().err
    assert "choose catch" in error and error.count("\n") == 1


def trained(study, arm, seed, monkeypatch):
    """Folder of a real run of a study's only task."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # conftest's: slow programs
    (task,) = STUDIES[study].tasks
    flags = STUDIES[study].flags(task, arm)
    studies.run_one(flags, seed, min(os.sched_getaffinity(0)))
    return studies.folder_of(flags, seed)


@pytest.mark.slow
def test_two_of_three_seeds_learn_catch(runs, monkeypatch):
    folders = [trained("catch", "1 level", seed, monkeypatch) for seed in range(3)]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert sum(result["eval_score"] >= 0.95 for result in results) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["stored", "zero"])
def test_windows_shorter_than_the_delay_need_the_stored_carry(arm, runs, monkeypatch):
    """Δ21: a reward that comes 17 steps after its cue, windows of 8."""
    found = memory.foreseen(trained("carry", arm, 1, monkeypatch))
    assert found > 0.9 if arm == "stored" else found < 0.75
