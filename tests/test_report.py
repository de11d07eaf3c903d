"""Pictures of a real tiny run, and the numbers in them worked by hand."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import rc_context
from PIL import Image

import diagnose
import report
import train
from config import TINY
from etbs import Replay, StoredCarry
from game import read_lines
from nets import symlog
from run import Run
from s5wm import Latent, Transition
from subgoal import subgoal_reward

MODEL = replace(TINY.model, channels=(), strides=(), layers=1, head_layers=1)
# Long windows: only level 0 collects enough to be trained, which is what takes time.
CONFIG = replace(TINY, game="catch", steps=48, period=2, length=36, model=MODEL)
ALL = [
    "learning_curve",
    "rewards",
    "world_model_losses",
    "health",
    "open_loop",
    "goals",
]


@pytest.fixture(autouse=True)
def style():
    with rc_context(report.STYLE):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three levels on catch with a checkpoint; then a crash in mid-line."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run = Run.start(CONFIG, folder)
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(CONFIG)))
    while run.step < CONFIG.steps:
        run.advance()
        if run.step % CONFIG.log_every == 0:
            run.log()
    (folder / "result.json").write_text(json.dumps({"eval_returns": [1.0, -1.0]}))
    run.save()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 49, "episode_return": 1.0, "episode_length": 9}\n{"st')
    return run


@pytest.fixture(scope="module")
def drawn(run):
    """Pictures by the command line, the other files before and after."""

    def files():
        found = [p for p in run.folder.rglob("*") if p.is_file()]
        return {p: p.read_bytes() for p in found if p.parent.name != "pictures"}

    before = files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "keep_compiled", lambda: None)
        assert report.main([str(run.folder)]) == 0
    return sorted((run.folder / "pictures").iterdir()), before, files()


def test_every_picture_is_drawn_and_shows_something(drawn):
    paths, _, _ = drawn
    assert [p.name for p in paths] == sorted(
        [f"{n}.png" for n in ALL] + ["open_loop.gif"]
    )
    for path in paths:
        with Image.open(path) as image:
            assert 300 < image.width < 1600 and 200 < image.height < 1600, path
            assert np.asarray(image.convert("L")).std() > 5, path
            if path.suffix == ".gif":
                assert image.n_frames >= 8


def test_the_command_line_leaves_the_run_as_it_is(drawn):
    """Metrics beyond the checkpoint, as after a crash, stay where they are."""
    _, before, after = drawn
    assert after == before and len(before) > 4


def test_figures_show_every_metric_they_name(run):
    """A metric renamed elsewhere would leave an empty plot."""
    lines, panels = read_lines(run.folder), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot", lambda axes, panel, lines: panels.append(panel))
        for make in (report.rewards, report.losses, report.health):
            make(run, lines)
    assert len(panels) == 9 + 4 + 6
    named = {name for p in panels if 0 in p.levels for name in p.metrics.split()}
    named -= {"return_scale_novelty", "advantage_novelty"}  # not learned at level 0
    assert len(named) == 19
    for name in named:
        assert len(report.series(lines, f"level0/{name}")) == 1, name


def test_pictures_are_numbers_from_0_to_1(run, monkeypatch):
    monkeypatch.setattr(run, "updates", [1, 1, 1])  # level 1's networks as they began
    play = diagnose.open_loop(run)
    now, found = diagnose.aims(run)
    assert [a.level for a in found] == [0, 1]
    shown = [play.truth, play.model, play.seen, now]
    shown += [x for a in found for x in (a.frame, a.state, a.goal, a.now, a.best)]
    for x in shown:
        assert np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1
    assert play.truth.max() == 1  # the ball
    assert play.model.std() > 0
    for a in found:
        assert (a.now <= a.best + 1e-6).all()  # the state now is one of those searched
        assert a.state.std() > 0 and (a.state != a.goal).any()


def test_curves_lie_within_their_axes(run):
    """Columns share a scale, which must hold all rows."""
    lines = [
        {"step": 8 * n, f"level{i}/{kind}_subgoal": n + 10 * i + 100 * (kind == "real")}
        for n in range(5)
        for i in range(2)
        for kind in ("real", "imagined")
    ]
    figure = report.rewards(run, lines)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[3:6] == [f"level 1: {x}" for x in ("extrinsic", "subgoal", "novelty")]
    for i in range(2):
        axes = figure.axes[1 + 3 * i]
        real, imagined = (line.get_ydata() for line in axes.lines)
        assert real.tolist() == [100 + 10 * i + n for n in range(5)]
        assert imagined.tolist() == [10 * i + n for n in range(5)]
        low, high = axes.get_ylim()
        assert low < 0 and high > 114


def test_a_uniform_actor_is_drawn_at_1_on_every_level(run):
    """Catch has one group of three actions, upper levels act in codes."""
    model = CONFIG.model
    code = model.code_categoricals * np.log(model.code_classes)
    entropies = {f"level{i}/entropy_actor": x for i, x in enumerate((np.log(3), code))}
    axes = report.health(run, [{"step": 8} | entropies]).axes[0]
    assert axes.get_title(loc="left") == "actor: entropy / uniform"
    drawn = [y for line in axes.lines for y in line.get_ydata()]
    assert drawn == pytest.approx([1, 1])


def test_marks_stand_where_there_are_values(run):
    lines = [{"step": 8, "level0/kl": 2.0, "level0/loss_reward": 0.1}]
    kl = report.losses(run, lines).axes[3]
    assert [t.get_text() for t in kl.texts] == ["free\nnats"]
    assert kl.texts[0].get_position()[1] == CONFIG.trainer.free_nats
    assert [a.get_yscale() for a in kl.figure.axes] == [
        "linear",
        "log",
        *["linear"] * 2,
    ]
    codes = report.health(run, [{"step": 8, "level0/entropy_actor": 1.0}]).axes[3]
    assert [t.get_text() for t in codes.texts] == ["none"]


def test_a_flat_agent_has_no_rows_for_codes_and_goals(run, monkeypatch):
    monkeypatch.setattr(run, "config", replace(CONFIG, levels=1))
    lines = [{"step": 8, "level0/entropy_actor": 1.0, "level0/real_extrinsic": 0.0}]
    assert len(report.health(run, lines).axes) == 3
    assert len(report.rewards(run, lines).axes) == 1


def test_the_running_mean_ends_with_the_newest_episode(run):
    """300 episodes, so a mean of 15; the first is that of steps 1 to 15."""
    lines = [{"step": n, "episode_return": float(n)} for n in range(1, 301)]
    _, mean, *_ = report.learning_curve(run, lines).axes[0].lines
    assert mean.get_label() == "mean of the last 15"
    assert mean.get_xydata()[[0, -1]] == pytest.approx(np.array([[15, 8], [300, 293]]))


def test_references_out_of_reach_are_told_below(run, tmp_path, monkeypatch):
    """Catch: -0.6 and 1. What is a point or less beyond the returns is drawn."""
    monkeypatch.setattr(run, "folder", tmp_path)  # without the evaluation
    for returns, drawn, told in (
        ([0.2, 0.3], ["random\n-0.6", "best\n1"], ""),
        ([0.8], ["best\n1"], "Off the scale: random -0.6."),
        ([9.0], [], "Off the scale: random -0.6. Off the scale: best 1."),
    ):
        lines = [{"step": n, "episode_return": x} for n, x in enumerate(returns)]
        figure = report.learning_curve(run, lines)
        assert [t.get_text() for t in figure.axes[0].texts] == drawn
        text = " ".join(figure.get_supxlabel().split())
        assert text.partition(" Off")[2] == told.partition("Off")[2]


def test_learning_curve_shows_references_and_evaluation(run):
    figure = report.learning_curve(run, read_lines(run.folder))
    (axes,) = figure.axes
    assert {t.get_text() for t in axes.texts} == {"random\n-0.6", "best\n1"}
    assert axes.lines[0].get_xydata()[-1].tolist() == [49, 1]
    (marker,) = [x for x in axes.lines if x.get_label().startswith("evaluation")]
    assert marker.get_xydata().tolist() == [[CONFIG.steps, 0.0]]


@pytest.mark.parametrize("level", [0, 1])
def test_now_is_the_reward_of_the_goal_in_force(run, level):
    """The newest of the level's entries up to each moment, sought one by one."""
    due = diagnose.acting_ages(diagnose.first_flags(run), False, CONFIG.period**level)
    replay, learner = run.agent.replays[level], run.agent.learners[level]
    n, moments = len(due), np.array([3, 14, 27, 51])
    aim = diagnose.aim(run, level, due, n, moments)
    h = diagnose.replayed(run, level, np.arange(n)[None])[1].h[0]
    for moment, now in zip(moments, aim.now, strict=True):
        entry = max(j for j in range(n) if due[j] <= moment)
        code = jax.nn.one_hot(replay.steps.goal[entry], CONFIG.model.code_classes)
        goal = learner.subactor.autoencoder.decode(code)
        expected = subgoal_reward(goal, learner.standardiser(h[entry]))
        assert float(now) == pytest.approx(float(expected), abs=1e-5)


def test_acting_ages_by_hand():
    is_first = np.array([0, 1, 0, 0, 0, 0, 0, 1, 0, 0], bool)
    # clocks            ?  0  1  2  3  4  5  0  1  2
    assert diagnose.acting_ages(is_first, False, 4).tolist() == [1, 5, 6, 7]
    assert diagnose.acting_ages(is_first, True, 4).tolist() == [1, 5, 6, 7, 9]
    assert diagnose.acting_ages(is_first, False, 1).tolist() == list(range(1, 10))


def test_last_before_by_hand():
    due, moments = np.array([1, 5, 6, 7]), np.array([1, 4, 5, 9])
    assert diagnose.last_before(due, moments).tolist() == [0, 0, 1, 3]


def test_acting_ages_are_those_of_the_tower(run):
    """Flags agree with the level's own replay; goals with the actions that set them."""
    below = diagnose.first_flags(run)
    for level in (1, 2):
        replay, lower = run.agent.replays[level], run.agent.replays[level - 1]
        stride = CONFIG.period**level
        due = diagnose.acting_ages(below, run.game.clock == 0, stride)
        assert len(due) == run.game.entries[level] == int(replay.size)
        rows = replay.rows(jnp.arange(replay.size))
        np.testing.assert_array_equal(replay.steps.is_first[rows], below[due])
        ages = diagnose.acting_ages(below, run.game.clock == 0, stride // CONFIG.period)
        goals = lower.steps.goal[lower.rows(jnp.arange(lower.size))]
        entry = diagnose.last_before(due, ages)
        known = entry + 1 < len(due)
        set_by = replay.steps.action[rows][entry[known] + 1]
        inside = ~below[due][entry[known] + 1]
        assert inside.sum() > 5
        np.testing.assert_array_equal(goals[known][inside], set_by[inside])


def test_window_starts_by_hand():
    is_first = np.array([0, 0, 1, 0, 0, 1, 0], bool)
    assert diagnose.window_starts(is_first, 2).tolist() == [0, 2, 3, 5]
    assert diagnose.window_starts(is_first, 3).tolist() == [2]
    assert diagnose.window_starts(is_first, 4).tolist() == []


@pytest.mark.parametrize(
    ("goal", "S", "index", "reward"),
    [
        ([1.0, 0.0], [[2.0, 0.0], [0.9, 0.0], [0.0, 1.0]], 1, 0.9),
        # The right direction at ten times the length agrees less than a skew one.
        ([1.0, 0.0], [[10.0, 0.0], [0.6, 0.6]], 1, 0.6),
    ],
)
def test_nearest_by_hand(goal, S, index, reward):
    k, best = diagnose.nearest(jnp.array(goal), jnp.array(S))
    assert int(k) == index
    assert float(best) == pytest.approx(reward)


class Fixed(eqx.Module):
    """An autoencoder that knows one goal."""

    goal: jax.Array
    code_shape: tuple[int, int] = eqx.field(static=True)

    def decode(self, code):
        return self.goal


def test_a_goal_that_is_a_state_is_found_and_decoded_as_that_state(run, monkeypatch):
    """Standardised h and back, for the newest state as everybody's goal."""
    monkeypatch.setattr(run, "updates", [1, 1, 1])
    for level in (0, 1):
        due = diagnose.acting_ages(
            diagnose.first_flags(run), False, CONFIG.period**level
        )
        n, size = len(due), int(run.agent.replays[level].size)
        ages = size - n + np.arange(n)[None]
        learner = run.agent.learners[level]
        S = learner.standardiser(diagnose.replayed(run, level, ages)[1].h[0])
        stub = Fixed(S[-1], learner.subactor.autoencoder.code_shape)
        where = lambda agent: agent.learners[level].subactor.autoencoder  # noqa: B023
        monkeypatch.setattr(run, "agent", eqx.tree_at(where, run.agent, stub))
        aim = diagnose.aims(run)[1][level]
        np.testing.assert_allclose(aim.best, 1, atol=1e-5)
        np.testing.assert_allclose(aim.goal, aim.state, atol=1e-4)
        for frame in aim.frame:
            np.testing.assert_array_equal(frame, diagnose.frames(run, due[[-1]])[0])


def test_decode_down_takes_the_last_of_the_window():
    """z picks a pixel, h = 2 its brightness of 0.2; older entries would differ."""

    def level1(feat):
        assert feat.shape == (7,)
        logits = jnp.array([[[9.0, 0], [9, 0]], [[0, 9], [9, 0]]])
        return logits * feat[0], symlog(jnp.array([[5.0], [2.0]]))

    def level0(feat):
        return feat[:4].reshape(2, 2, 1) * feat[4] / 10 - 0.5

    z, h = jnp.array([[1.0, 0, 0], [0, 0, 1]]), jnp.zeros(1)
    picture = diagnose.decode_down((level0, level1), z, h)
    np.testing.assert_allclose(picture[..., 0], [[0, 0.2], [0.2, 0]], atol=1e-6)
    brightest = diagnose.decode_down(
        (lambda feat: feat[:4].reshape(2, 2, 1),), z[:, :2], h
    )
    assert float(brightest.max()) == 1  # clipped from 1.5


class Pixels(eqx.Module):
    """A picture of two pixels, which are z."""

    def __call__(self, feat):
        return feat[:2].reshape(1, 2, 1) - 0.5


class Toggle(eqx.Module):
    """The perfect model of a light that action 1 switches on or off."""

    heads: SimpleNamespace = eqx.field(static=True)
    z_shape: tuple[int, int] = eqx.field(static=True, default=(1, 2))
    wrong: bool = eqx.field(static=True, default=False)

    features: int = eqx.field(static=True, default=1)

    def init_carry(self): ...
    def step(self, carry, action, is_first, obs, *, key): ...
    def discretise(self):
        return self

    def observe(self, steps, carry, *, key):
        z = steps.obs.reshape(-1, 1, 2) / 255.0
        T = len(z)
        return Latent(jnp.zeros((T, 1, 1)), z, jnp.zeros((T, 1)), z), z

    def imagine(self, carry, action, *, key):
        z = jnp.where(action[0, 1] == 1, 1 - carry.z, carry.z)
        z = 1 - z if self.wrong else z
        return Latent(carry.x, z, jnp.zeros(1), z)


# A light switched at random, and at the last step of either context.
ACTIONS = np.random.default_rng(0).integers(0, 2, 40)
ACTIONS[[7, 15]] = 1
LIGHT = np.cumsum(ACTIONS) % 2


def toggle_run(wrong):
    """What `open_loop` reads of a run, for one episode of the light."""
    rows = lambda x: jnp.append(jnp.asarray(x, jnp.uint8), 0)
    zero, n = jnp.zeros((), bool), len(ACTIONS)
    step = Transition(
        jnp.zeros((1, 2, 1), jnp.uint8),
        jnp.zeros(1, jnp.uint8),
        jnp.zeros(()),
        *(zero, zero, None),
    )
    replay = Replay(n, step, StoredCarry((jnp.zeros((1, 1)),), jnp.zeros(1, jnp.uint8)))
    obs = 255 * jax.nn.one_hot(rows(LIGHT), 2, dtype=jnp.uint8).reshape(-1, 1, 2, 1)
    where = lambda r: (r.steps.obs, r.steps.action, r.steps.is_first, r.size)
    is_first = jnp.arange(n + 1) == 0
    new = (obs, rows(ACTIONS)[:, None], is_first, jnp.array(n))
    replay = eqx.tree_at(where, replay, new)
    model = Toggle(SimpleNamespace(decoder=Pixels()), wrong=wrong)
    run = object.__new__(Run)
    run.config, run.games = CONFIG, [SimpleNamespace(clock=n)]
    subactor = SimpleNamespace(world_model=model, action_shape=(1, 2))
    run.agent = SimpleNamespace(replays=[replay], subactors=[subactor])
    return run


def test_open_loop_errors_by_hand():
    """A perfect model errs nowhere; a copy errs by 1 where the light has changed."""
    play = diagnose.open_loop(toggle_run(wrong=False))
    errors = play.errors()
    assert errors["imagined"].shape == (2, 32)  # the newest, and a context before it
    assert play.context == 8
    np.testing.assert_allclose(errors["imagined"], 0, atol=1e-10)
    light = play.truth[:, :, 0, 1, 0]
    assert {tuple(x) for x in light} == {tuple(LIGHT[8:]), tuple(LIGHT[:32])}
    changed = light != light[:, [7]]
    np.testing.assert_allclose(errors["copy of the last frame seen"], changed)


def test_open_loop_errors_of_a_wrong_model():
    """Every light turned at every step: wrong at all odd ones, after the context."""
    errors = diagnose.open_loop(toggle_run(wrong=True)).errors()["imagined"]
    np.testing.assert_allclose(errors[:, :8], 0, atol=1e-10)
    np.testing.assert_allclose(errors[:, 8:], [[1, 0] * 12] * 2, atol=1e-10)


def test_the_best_predicted_window_comes_first():
    """An action that only the newest window has is remembered wrongly."""
    run = toggle_run(wrong=False)
    action = lambda replay: replay.steps.action
    (replay,) = run.agent.replays
    wrong = action(replay).at[36].set(1 - action(replay)[36])
    run.agent.replays = [eqx.tree_at(action, replay, wrong)]
    best, worst = diagnose.open_loop(run).errors()["imagined"].sum(1)
    assert best == pytest.approx(0) and worst > 1


def test_the_strip_shows_the_median_window_and_the_errors_of_all():
    """Two windows of 32 after 8 frames, of which one is foreseen wrongly."""
    run = toggle_run(wrong=True)
    play = diagnose.open_loop(run)
    model = np.stack([play.truth[0], play.model[1]])  # right in the first window
    play = play._replace(model=model)
    figure = report.film_strip(run, play)
    strip, axes = figure.axes[:-1], figure.axes[-1]
    titles = [a.get_title() for a in strip if a.get_title()]
    assert titles[:3] == ["context\n-1", "context\n0", "imagined\n+1"]
    assert titles[-1] == "imagined\n+24"
    for a, title in zip(strip, titles, strict=False):  # what was seen comes first
        t = play.context - 1 + int(title.split()[1])
        np.testing.assert_array_equal(
            a.images[0].get_array()[..., 0], play.truth[1, t, ..., 0]
        )
    imagined, *_ = axes.lines
    assert imagined.get_xdata().tolist() == list(range(1, 25))
    errors = play.errors()["imagined"]
    np.testing.assert_allclose(imagined.get_ydata(), errors.mean(0)[play.context :])


def test_the_film_moves_and_shows_other_windows(tmp_path):
    run = toggle_run(wrong=False)
    play = diagnose.open_loop(run)
    report.write_film(run, play, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        shots = []
        for n in range(film.n_frames):
            film.seek(n)
            shots.append(np.asarray(film.convert("L"), float))
    height = shots[0].shape[0]
    top, bottom = slice(height // 8, height // 3), slice(3 * height // 4, height)
    light = play.truth[:, :, 0, 1, 0]
    for part, window in ((top, light[0]), (bottom, light[1])):
        for t in range(1, 8):
            moved = np.abs(shots[t][part] - shots[t - 1][part]).max() > 100
            assert moved == (window[t] != window[t - 1]), t


def test_the_goal_sheet_by_hand(run):
    """Each picture in its row, r_g of the moment before the best."""
    flat = lambda value: np.full((2, 3, 3, 1), value)
    aim = diagnose.Aim(
        0, np.array([0.1, 0.2]), np.array([0.3, 0.4]), *map(flat, (0.5, 0.6, 0.7))
    )
    figure = report.goal_sheet(run, flat(0.9), [aim])
    shown = [a.images[0].get_array().mean() for a in figure.axes]
    assert shown == pytest.approx([0.9, 0.9, 0.5, 0.5, 0.6, 0.6, 0.7, 0.7])
    labels = [a.get_xlabel() for a in figure.axes]
    assert labels[-2:] == ["r_g 0.10, closest 0.30", "r_g 0.20, closest 0.40"]
    assert "decoding changes a state's frame by 0.1," in " ".join(
        figure.get_supxlabel().split()
    )


def test_mean_of_all_frames_by_hand():
    truth = np.array([0.0, 1.0, 1.0, 0.0]).reshape(2, 2, 1, 1, 1)
    play = diagnose.OpenLoop(truth, truth, truth, 1)
    np.testing.assert_allclose(play.errors()["mean of all frames"], 0.25)


def test_colours():
    grey = np.full((2, 2, 1), 0.5)
    assert report.to_rgb(grey).tolist() == np.full((2, 2, 3), 0.5).tolist()
    one_each = np.eye(10).reshape(1, 10, 10)
    colours = report.to_rgb(one_each)[0]
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 9 * np.eye(10)
    assert apart.min() > 0.2
    assert report.to_rgb(np.zeros((1, 1, 4))).max() == 0
    two = report.to_rgb(np.eye(10)[:2].sum(0).reshape(1, 1, 10))[0, 0]
    np.testing.assert_allclose(two, colours[:2].mean(0))


def test_a_run_without_data_draws_nothing(tmp_path):
    assert report.draw(Run.start(CONFIG, tmp_path / "none")) == []


@pytest.mark.parametrize("argv", [[], ["/no/such/folder"], ["a", "b"]])
def test_bad_input_is_one_line(argv, capsys, monkeypatch):
    monkeypatch.setattr(train, "keep_compiled", lambda: None)
    assert report.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("report.py: ") and said.count("\n") == 1
    assert "--resume" not in said


def test_shapes_are_checked():
    with pytest.raises(TypeError):
        diagnose.nearest(jnp.zeros(3), jnp.zeros((2, 4)))
