"""The benchmark's statistics: published figures, hand-worked cases, laws, command."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

import atari
import scores
from config import UsageError
from scores import Result, estimate

ROOT = Path(scores.__file__).parent
REFERENCE = atari.scores()
NAN = math.nan
HAND = np.array([[0.0, 0.2, 0.4], [1.0, 1.0, 4.0], [0.5, 0.5, 0.8]])
law = settings(deadline=None)
shapes = st.sampled_from([(1, 1), (2, 3), (5, 2), (4, 5)])


@st.composite
def matrices(draw, shape=None):
    """HNS with some runs missing, but at least one per game."""
    shape = draw(shapes) if shape is None else shape
    hns = draw(hnp.arrays(np.float64, shape, elements=st.floats(-5, 10)))
    missing = draw(hnp.arrays(bool, shape))
    missing[:, 0] = False
    return np.where(missing, NAN, hns)


def mean(hns):
    return scores.aggregates(hns)[..., 0]


def write_run(folder: Path, game="Pong", seed=0, score=1.0, returns=(), **changes):
    """A run folder as train.py leaves it, as far as it is read here."""
    folder.mkdir(parents=True)
    result = {"game": game, "seed": seed, "preset": "tiny", "steps": 100}
    result |= {"train_score": 0.0, "eval_score": score} | changes
    (folder / "result.json").write_text(json.dumps(result))
    lines = [{"step": at, "episode_return": value} for at, value in returns]
    lines = [*lines, {"step": 100, "loss": 1.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture(scope="module")
def summary():
    """Of one agent whose runs are unequal: Pong 2 of 2 seeds, Boxing 1 of 2."""
    runs = [Result("Pong", 0, 14.6, "tiny", 100, ((50, -20.7),))]
    runs += [
        Result("Pong", 1, -20.7, "tiny", 100),
        Result("Boxing", 1, 12.1, "tiny", 100),
    ]
    return scores.summarise({"ours": runs}, REFERENCE)


@pytest.mark.parametrize(
    ("paper", "mean_percent", "median_percent"),
    [
        ("SimPLe", 33.6, 11.1),
        ("TWM", 93.9, 39.8),
        ("IRIS", 107.8, 30.8),  # printed as 108.0
        ("DreamerV3", 114.4, 34.0),
        ("Hieros", 120.3, 56.4),  # printed as 120.2
    ],
)
def test_aggregates_of_the_published_columns(
    summary, paper, mean_percent, median_percent
):
    row = summary["25"]["rows"][f"{paper} (paper)"]
    assert round(100 * row["mean"][0], 1) == mean_percent
    assert round(100 * row["median"][0], 1) == median_percent
    assert row["missing"] == [] and "IQM" not in row
    row = summary["26"]["rows"][f"{paper} (paper)"]
    assert np.isnan(row["mean"]).all() and row["missing"] == ["UpNDown"]


@pytest.mark.parametrize(("paper", "printed"), [("IRIS", 108.0), ("Hieros", 120.2)])
def test_printed_means_lie_within_the_rounding_of_their_columns(
    summary, paper, printed
):
    """Columns hold whole points: each game's score is known to ± half a point."""
    mean_hns = summary["25"]["rows"][f"{paper} (paper)"]["mean"][0]
    rows = [row for game, row in REFERENCE.items() if game != "UpNDown"]
    slack = np.mean([0.5 / (row["human"] - row["random"]) for row in rows])
    assert abs(mean_hns - printed / 100) <= slack


def test_reference_has_26_games_and_blank_is_missing():
    assert len(REFERENCE) == 26
    assert math.isnan(REFERENCE["UpNDown"]["Hieros"])
    assert REFERENCE["Pong"]["random"] == -20.7


def test_human_normalised_by_hand():
    assert scores.human_normalised(-20.7, -20.7, 14.6) == 0
    assert scores.human_normalised(14.6, -20.7, 14.6) == 1
    assert scores.human_normalised(5.0, 1.0, 3.0) == 2


def test_aggregates_by_hand():
    """Means .2, 2, .6; of 9 sorted runs the middle 5 are .4 .5 .5 .8 1."""
    expected = [2.8 / 3, 0.6, 0.64, 0.4]
    np.testing.assert_allclose(scores.aggregates(HAND), expected)


def test_uneven_seeds_weigh_games_alike_in_the_mean_and_runs_alike_in_the_rest():
    hns = np.array([[0.0, NAN, NAN], [1.0, 1.0, 4.0]])
    np.testing.assert_allclose(scores.aggregates(hns), [1.0, 1.0, 1.0, 0.25])


def test_a_game_without_runs_leaves_no_aggregate():
    hns = np.array([[1.0, 2.0], [NAN, NAN]])
    assert np.isnan(scores.aggregates(hns)).all()
    assert np.isnan(scores.profile(hns)).all()
    assert np.isnan(estimate(scores.improvement, hns, np.ones((2, 1)))).all()


def test_profile_by_hand():
    """At τ = .5 the two runs of exactly .5 do not count: 4 of 9 lie above."""
    assert scores.TAU[10] == 0.5
    assert scores.profile(HAND)[10] == pytest.approx(4 / 9)
    assert scores.profile(HAND)[0] == pytest.approx(8 / 9)


def test_improvement_by_hand():
    """Game 1: (½ + 0 + 1 + 0)/4; game 2, one run against two: 1."""
    x = np.array([[1.0, 2.0], [5.0, NAN]])
    y = np.array([[1.0, 3.0], [4.0, 4.0]])
    assert scores.improvement(x, y) == pytest.approx((0.375 + 1) / 2)


def test_bootstrap_interval_is_the_binomial_one():
    """Eight runs, half of them 1: the mean of a redraw is Binomial(8, ½)/8.

    It is 0 with 0.4 %, at most 1/8 with 3.5 %: of a 90 % interval 2/8 were the end.
    """
    hns = np.repeat([0.0, 1.0], 4)[None]
    assert estimate(mean, hns, reps=4000).tolist() == [0.5, 1 / 8, 7 / 8]


def test_bootstrap_is_stratified():
    """Runs that agree within each game leave no spread, however games differ."""
    hns = np.array([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
    np.testing.assert_array_equal(estimate(mean, hns), [2.0, 2.0, 2.0])


def test_agents_are_redrawn_independently():
    """A copy of an agent beats it half of the time, but not in every redraw."""
    hns = np.array([[0.0, 1.0, 2.0, 3.0]])
    point, low, high = estimate(scores.improvement, hns, hns)
    assert point == 0.5 and low < 0.3 and high > 0.7


def test_no_interval_from_a_single_run():
    point, low, high = estimate(mean, np.array([[1.0, 2.0], [3.0, NAN]]))
    assert point == 2.25 and math.isnan(low) and math.isnan(high)


def test_estimate_is_seeded():
    one, again = estimate(mean, HAND, reps=50), estimate(mean, HAND, reps=50)
    other = estimate(mean, HAND, reps=50, seed=1)
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_train_score_as_it_stood():
    """Tenths of a budget of 100: a window is open below and closed above."""
    run = Result("Pong", 0, 9.0, "tiny", 100, ((20, 1.0), (21, 2.0), (30, 4.0)))
    now = [scores.as_of(run, tenth).score for tenth in (1, 2, 3, 4, 10)]
    assert math.isnan(now[0])
    assert now[1:] == [1.0, 3.0, 4.0, 4.0]


def test_hns_matrix_keeps_missing_runs_missing():
    runs = [Result("Pong", 3, 14.6), Result("Pong", 7, -20.7), Result("Boxing", 7, NAN)]
    hns = scores.hns_matrix(runs, REFERENCE)
    assert hns.shape == (26, 2)
    pong = list(REFERENCE).index("Pong")
    np.testing.assert_allclose(hns[pong], [1.0, 0.0], atol=1e-12)
    assert np.isnan(np.delete(hns, pong, 0)).all()


@law
@given(matrices())
def test_aggregates_lie_within_the_runs(hns):
    low, high = np.nanmin(hns) - 1e-9, np.nanmax(hns) + 1e-9
    assert all(low <= x <= high for x in scores.aggregates(hns)[:3])
    gap = scores.aggregates(hns)[3]
    assert max(0.0, 1 - high) <= gap + 1e-9 and 0 <= gap <= max(0.0, 1 - low)


@law
@given(matrices(), st.randoms(use_true_random=False))
def test_order_of_games_and_seeds_does_not_matter(hns, random):
    games, seeds = list(range(len(hns))), list(range(hns.shape[1]))
    random.shuffle(games)
    shuffled = hns[games]
    for row in shuffled:
        random.shuffle(seeds)
        row[:] = row[seeds]
    for statistic in (scores.aggregates, scores.profile):
        np.testing.assert_allclose(statistic(shuffled), statistic(hns), atol=1e-9)


@law
@given(matrices())
def test_profile_falls_from_at_most_1(hns):
    profile = scores.profile(hns)
    assert profile[0] == (hns > 0).sum() / (~np.isnan(hns)).sum()
    assert (np.diff(profile) <= 1e-12).all() and (profile >= 0).all()


@law
@given(shapes.flatmap(lambda s: st.tuples(matrices(s), matrices((s[0], 3)))))
def test_improvement_is_a_fair_comparison(pair):
    x, y = pair
    there, back = scores.improvement(x, y), scores.improvement(y, x)
    assert 0 <= there <= 1 and there + back == pytest.approx(1)
    assert scores.improvement(x, x) == pytest.approx(0.5)
    assert scores.improvement(x + 100, y) == 1


@law
@given(matrices(), st.integers(0, 99))
def test_resample_keeps_each_games_runs_and_their_number(hns, seed):
    replicates = scores.resample(hns, 7, np.random.default_rng(seed))
    assert (np.isnan(replicates) == np.isnan(hns)).all()
    for game, row in enumerate(hns):
        drawn = replicates[:, game][~np.isnan(replicates[:, game])]
        assert set(drawn) <= set(row)


@law
@given(matrices(), st.integers(0, 99))
def test_statistics_of_replicates_are_those_of_each(hns, seed):
    """The leading axis is only a batch: each replicate alone gives the same."""
    replicates = scores.resample(hns, 3, np.random.default_rng(seed))
    for statistic in (scores.aggregates, scores.profile):
        alone = [statistic(x) for x in replicates]
        np.testing.assert_allclose(statistic(replicates), alone, atol=1e-12)
    pairs = scores.improvement(replicates, replicates[::-1])
    alone = [scores.improvement(replicates[i], replicates[2 - i]) for i in range(3)]
    np.testing.assert_allclose(pairs, alone, atol=1e-12)


@law
@given(matrices(), st.floats(-5, 10))
def test_interval_of_equal_runs_is_their_point(hns, value):
    equal = np.full((hns.shape[0], 3), value)
    for statistic in (scores.aggregates, scores.profile):
        point, low, high = estimate(statistic, equal, reps=20)
        np.testing.assert_allclose(low, point, atol=1e-9)
        np.testing.assert_allclose(high, point, atol=1e-9)


def test_summary_says_what_is_missing(summary):
    ours = summary["25"]["rows"]["ours"]
    assert len(ours["missing"]) == 23 and ours["scores"] == 3
    assert np.isnan(ours["mean"]).all() and np.isnan(ours["profile"]).all()
    assert summary["played"]["games"] == ["Boxing", "Pong"]
    ours = summary["played"]["rows"]["ours"]
    np.testing.assert_allclose(ours["mean"], [0.75, NAN, NAN])
    np.testing.assert_allclose(ours["IQM"][0], 2 / 3)
    assert np.isnan(ours["curve"]).all()  # Boxing has no episode
    assert list(summary["25"]["games"]) == [x for x in REFERENCE if x != "UpNDown"]
    assert len(summary["26"]["games"]) == 26


def test_played_stands_only_for_a_set_of_its_own():
    runs = [Result(game, 0, 1.0, "tiny", 100) for game in REFERENCE]
    assert list(scores.summarise({"ours": runs}, REFERENCE)) == ["25", "26"]
    apart = {"a": runs[:1], "b": runs[1:2]}
    assert list(scores.summarise(apart, REFERENCE)) == ["25", "26"]


def test_curve_ends_at_the_iqm_of_train_scores():
    """Of four seeds, one far above the rest: the middle two decide."""
    runs = []
    for seed, last in enumerate((14.6, 14.6, 14.6, 500.0)):
        ends = ((40, -20.7), (95, last), (100, last))
        runs.append(Result("Pong", seed, 0.0, "tiny", 100, ends))
    row = scores.summarise({"ours": runs}, REFERENCE)["played"]["rows"]["ours"]
    expected = [NAN] * 3 + [0.0] * 6 + [1.0]
    np.testing.assert_allclose(row["curve"][0], expected, atol=1e-12)
    np.testing.assert_array_equal(row["steps"], np.arange(10, 101, 10))


def test_train_scores_on_demand(tmp_path):
    write_run(tmp_path / "run", score=5.0, train_score=-3.0)
    assert scores.read_result(tmp_path / "run/result.json", "eval").score == 5
    assert scores.read_result(tmp_path / "run/result.json", "train").score == -3


def test_folders_of_runs_are_searched(tmp_path):
    write_run(tmp_path / "x/Pong", seed=4)
    write_run(tmp_path / "x/y/Boxing", "Boxing")
    runs = scores.read_agent([tmp_path], "eval")
    assert {run[:2] for run in runs} == {("Pong", 4), ("Boxing", 0)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"game": "catch"}, "second.*no Atari100k game: catch"),
        ({"game": ["Pong"]}, "second.*no Atari100k game"),
        ({"seed": 0}, "second.*'Pong', 0.*needs own --agent"),
        ({"preset": "cpu"}, "second.*'cpu', 100.*'tiny', 100.*needs own --agent"),
        ({"steps": 99}, "second.*99.*needs own --agent"),
        ({"steps": math.inf}, "second.*OverflowError.*give finished runs"),
        ({"eval_score": "high"}, "second.*ValueError.*give finished runs"),
        ({"returns": [("x", 1.0)]}, "second.*ValueError.*give finished runs"),
    ],
)
def test_runs_that_do_not_fit_are_refused(tmp_path, changes, words):
    write_run(tmp_path / "first", seed=0)
    write_run(tmp_path / "second", **{"seed": 1, **changes})
    with pytest.raises(UsageError, match=words) as caught:
        scores.read_agent([tmp_path], "eval")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"game": "Pong"}', "\x00"])
@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl"])
def test_damaged_files_are_refused_or_harmless(tmp_path, name, text):
    write_run(tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    if name == "metrics.jsonl" and text in ("", "[]", '{"game": "Pong"}'):
        assert scores.read_agent([tmp_path / "run"], "eval")[0].returns == ()
        return
    with pytest.raises(UsageError, match=r"run: no usable .* give finished runs"):
        scores.read_agent([tmp_path / "run"], "eval")


def test_module_needs_no_jax():
    code = "import sys, scores; sys.exit('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert result.returncode == 0


def test_shape_checks_are_live():
    with pytest.raises(TypeCheckError):
        scores.per_game(np.zeros(3))


def test_every_tag_in_the_code_stands_in_the_header():
    text = (ROOT / "scores.py").read_text()
    header = set(re.findall(r"\(SC \d+\)", scores.__doc__))
    cited = set(re.findall(r"#.*(\(SC \d+\))", text))
    assert cited == header
