"""The loop: what is counted, what is due, and the published size on a CPU."""

import platform
import resource
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import numpy as np
import pytest

import train
from checkpoint import CheckpointError, write
from config import TINY as SMALL
from config import UsageError
from game import COUNTS, make_env
from run import Run, evaluation, load_weights, save_weights, updates_by

ROOT = Path(__file__).parent.parent
TINY = ["--preset", "tiny"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run on catch that has taken 40 agent steps, over several episodes."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--game", "catch", "--model.channels", "--model.strides"]
    run = Run.start(train.parse([*TINY, *flags]), folder)
    for _ in range(40):
        run.advance()
    return run


def test_entries_are_counted_as_the_replay_counts_them(run):
    stored = [int(replay.size) for replay in run.agent.replays]
    capacities = [replay.capacity for replay in run.agent.replays]
    entries = run.game.entries
    assert stored == [min(pair) for pair in zip(entries, capacities, strict=True)]
    # Catch lasts 9 steps: 10 entries per episode at level 0, 4 at level 1 (0, 4, 8 and
    # the end), 2 at level 2; 40 steps are 4 episodes and the first 4 steps of a fifth.
    assert entries == [44, 17, 9]
    assert [step for step, _ in run.game.returns] == [9, 18, 27, 36]


def test_updates_per_own_step_once_a_window_is_there(run):
    # Windows have 4 steps: levels learn from agent step 4, 16 and 64 on.
    assert run.config.length == run.config.period == 4
    rate = run.config.updates_per_step
    assert run.updates == [int(36 * rate), int((40 - 16) / 4 * rate), 0]
    assert [int(x.updates) for x in run.agent.learners] == run.updates


def test_updates_begin_after_the_prefill():
    config = train.parse([*TINY, "--prefill", "20"])  # windows of 4, a goal lasts 4
    config = replace(config, updates_per_step=0.5)
    assert [updates_by(config, 0, n) for n in (4, 20, 21, 22, 30)] == [0, 0, 0, 1, 5]
    assert [updates_by(config, 1, n) for n in (16, 28, 36)] == [0, 1, 2]
    assert [updates_by(config, 2, n) for n in (64, 96)] == [0, 1]


def test_evaluation_leaves_the_run_alone(run):
    before = jax.tree.map(np.array, run.device_state())
    state = {name: x.copy() for name, x in run.game.env.get_state().items()}
    episodes = lambda: islice(evaluation(run.config, run.agent.subactors), 3)
    returns = [episode.score for episode in episodes()]
    assert set(returns) <= {-1.0, 1.0}
    assert returns == [episode.score for episode in episodes()]
    same = jax.tree.map(np.array_equal, before, run.device_state())
    assert all(jax.tree.leaves(same))
    after = run.game.env.get_state()
    assert all(np.array_equal(state[name], after[name]) for name in state)


def test_evaluation_counts_every_reward_of_episodes_of_its_own(monkeypatch):
    """Echo pays 1 for action 3 and is truncated after 20 steps."""
    seeds = []

    def make(config, seed):
        seeds.append(seed)
        return make_env(config, seed)

    monkeypatch.setattr("run.make_env", make)
    monkeypatch.setattr("run.init_state", lambda *_: None)
    monkeypatch.setattr("run.act_only", lambda *_, **options: (3, None))
    model = replace(SMALL.model, channels=(), strides=())
    config = replace(SMALL, game="echo", seed=7, model=model)
    episodes = list(islice(evaluation(config, ()), 2))
    assert [x.score for x in episodes] == [20, 20]
    assert [x.actions for x in episodes] == [[3] * 20] * 2
    assert seeds == [1_000_007]  # not what it was trained on


def test_a_resumed_run_counts_on_from_its_checkpoint(monkeypatch, tmp_path):
    counts = {"updates": [5, 1], "seconds": 70.0, "pending": [2, 0]}
    arrays = {"pending/0/kl": np.array(3.0)}
    state = dict.fromkeys(("learners", "replays", "tower", "calls"))
    resumed = object.__new__(Run)
    resumed.config, resumed.agent = SMALL, SimpleNamespace(key=None)
    game = {"config": SMALL, "folder": tmp_path, "restore": lambda *_: None}
    game |= dict.fromkeys(COUNTS, 0) | {"rings": SimpleNamespace(segments=[])}
    resumed.games = [SimpleNamespace(**game)]
    monkeypatch.setattr(Run, "_read", lambda *_: (state, arrays, {"counts": counts}))
    resumed.restore(40)
    assert (resumed.step, resumed.updates, resumed.seconds) == (40, [5, 1], 70.0)
    assert resumed.pending == [(2, {"kl": 3.0}), (0, {})]
    assert counts.items() <= resumed.meta(0)["counts"].items()


def test_metrics_are_means_over_the_interval(run):
    lines = []
    run.game.write = lambda step, **values: lines.append(values)
    counts = [count for count, _ in run.pending]
    totals = [{k: float(x) for k, x in total.items()} for _, total in run.pending]
    (values,) = run.log()
    del run.game.write
    assert lines == [values]
    assert values["level0/kl"] == pytest.approx(totals[0]["kl"] / counts[0])
    assert run.log() == [{}]


@pytest.mark.slow
@pytest.mark.gpu
def test_published_size_updates_every_level_within_12_gib_of_the_host(tmp_path):
    """Real frames, every level's own first full batch; minutes of compilation."""
    run = Run.start(train.parse(["--game", "Pong", "--preset", "atari100k"]), tmp_path)
    run.update = lambda: None
    while run.game.entries[-1] < run.config.length:
        run.advance()
    for level in range(3):
        before = run.agent.learners[level].subactor.world_model.W_h.weight
        before = np.array(before)
        run.update_level(level)
        after = run.agent.learners[level].subactor.world_model
        assert np.isfinite(np.array(after.W_h.weight)).all()
        moved = jax.tree.map(lambda x: float(abs(x).max()), run.pending[level][1])
        assert moved["grad_norm_world_model"] > 0
        # Warm-up: the first update has rate 0 for the world model, not for the rest.
        assert np.array_equal(before, after.W_h.weight)
    assert run.log()[0]["level2/kl"] >= 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert peak < 12, f"{peak:.1f} GiB"


def test_seeds_in_lockstep_are_the_seeds_alone(tmp_path):
    """In a game whose episodes end at different steps."""
    flags = "--game minatar/breakout --model.channels --model.strides --levels 2"
    config = train.parse([*TINY, *flags.split(), "--seed", "2"])
    both = Run.start(replace(config, seeds=2), tmp_path / "both")
    alone = [
        Run.start(replace(config, seed=seed), tmp_path / f"{seed}") for seed in (2, 3)
    ]
    for run in (both, *alone):
        for game in run.games:
            game.folder.mkdir(parents=True)
        for _ in range(30):
            run.advance()
    first, second = ([step for step, _ in game.returns] for game in both.games)
    assert first != second and first and second
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    for seed, single in enumerate(alone):
        part = both.solo(seed)
        assert (part.config, part.updates) == (single.config, single.updates)
        assert part.updates[0] > 0
        assert part.game.entries == single.game.entries
        assert part.game.returns == single.game.returns
        for i, n in enumerate(single.game.entries):
            ours, theirs = (
                jax.tree.map(lambda x, n=n: x[:n], (replay.steps, replay.carries))
                for replay in (part.agent.replays[i], single.agent.replays[i])
            )
            assert np.array_equal(ours[0].action, theirs[0].action)
            jax.tree.map(close, ours, theirs)
        jax.tree.map(close, part.pending, single.pending)


def test_weights_file_acts_as_the_run_does(run, tmp_path):
    path = tmp_path / "weights.ckpt"
    save_weights(path, run.config, run.agent.learners)
    config, learners = load_weights(path)
    assert config == run.config
    assert path.stat().st_size < 5e6
    subactors = tuple(x.subactor for x in learners)
    assert eqx.tree_equal(subactors, run.agent.subactors)
    assert learners[0].world_model_adam is None


def test_weights_of_a_file_that_holds_none_are_refused(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UsageError, match="no checkpoint"):
        load_weights(tmp_path)
    (tmp_path / "file").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_weights(tmp_path / "file")
    write(tmp_path / "other", {"a": np.zeros(2)}, {"config": {"game": "Pong"}})
    with pytest.raises(UsageError, match="another version"):
        load_weights(tmp_path / "other")


def number_said(program, *arguments):
    """The number that a Python program prints, run in a process of its own."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_pages_of_large_arrays_are_fetched_once():
    """Page faults of the same computation 20 times, in the heap as it is and kept."""
    program = """
import resource
import sys
import jax, jax.numpy as jnp
from machine import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
x = jnp.ones((1000, 10_000))
compute = jax.jit(lambda x: jnp.cumsum(jnp.sin(x).T @ x[:, :1000], 0)[::-1].sum())
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
compute(x).block_until_ready()
before = faults()
for _ in range(20):
    compute(x).block_until_ready()
print(faults() - before)
"""
    found = {name: number_said(program, name) for name in ("keep", "leave")}
    assert found["keep"] < found["leave"] / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_pages_of_freed_buffers_are_kept():
    """Page faults of 20 MiB taken and freed 20 times, in blocks of 1 MiB."""
    program = """
import resource
import sys
import numpy as np
from machine import keep_buffers
if sys.argv[1] == "keep":
    keep_buffers()
use = lambda: [np.ones(2**17) for _ in range(20)]
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
before = faults()
for _ in range(20):
    use()
print(faults() - before)
"""
    found = {name: number_said(program, name) for name in ("keep", "leave")}
    assert found["keep"] < found["leave"] / 10
