"""The benchmark's own arithmetic: work counted as XLA counts it, shares, the table."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from test_agent import used
from test_subactor import CONFIG

import bench
from agent import make_trainer


def test_shape_hook_is_live():
    with pytest.raises(TypeCheckError):
        bench.table("no results")


def test_work_of_products():
    x = jnp.ones((1024, 1024))
    out, one = bench.phase(lambda x: x @ x, x)
    _, eight = bench.phase(lambda x: [jnp.sin(i * x) @ x for i in range(8)], x)
    assert out.shape == x.shape
    assert one["gflop"] == pytest.approx(2 * 1.024**3)
    assert one["gflop_loops_once_by_xla"] == pytest.approx(one["gflop"], rel=1e-3)
    assert eight["gflop"] == pytest.approx(8 * one["gflop"])
    assert eight["ms"] > 0 and one["ms"] > 0


def test_formula_agrees_with_xla_on_a_world_model():
    """XLA also counts what is element-wise, which here is most: never less than us."""
    a = used(CONFIG)
    learner, replay = a.learners[0], a.replays[0]
    rows = jnp.arange(8).reshape(2, 4)
    steps, before = replay.windows(rows, "stored")
    carry = bench.load_carry(before, CONFIG.model.z_classes)
    learn = make_trainer(CONFIG)._learn_world_model
    call = lambda *inputs: learn(*inputs, key=jax.random.key(0))
    _, found = bench.phase(call, learner, steps, carry)
    ours, xla = found["gflop_loops_once"], found["gflop_loops_once_by_xla"]
    assert found["gflop"] == ours > 0
    assert 0.05 * xla < ours < 1.05 * xla


def test_filled_replays_differ_only_in_their_contents():
    replay = used(CONFIG).replays[1]
    full = bench.filled(replay, 7, jax.random.key(0))
    assert int(full.size) == int(full.head) == 7
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(full) == shapes(replay)
    classes = CONFIG.model.z_classes
    assert int(full.steps.obs.z.max()) < max(classes, 4)


def test_shares_are_of_the_median_peak():
    phase = {"ms": 2.0, "gflop": 1.0}
    found = {"4 windows of 16": {"level 0": {"update": phase}}}
    found |= {"peak GiB": {"4 windows of 16": 1.0}, "matmul_gflops": [900, 1000, 5000]}
    text = bench.table(bench.with_shares(found))
    assert "| 4 windows of 16 | level 0 | update | 2.0 | 1.00 | 50 % |" in text


def test_the_figure_has_a_curve_for_each_measurement(tmp_path):
    curve = {1: 1.0, 10: 2.0}
    found = {
        "sequence length": {"S5": curve},
        "draws": {"etbs": curve},
        "batch": curve,
        "seeds at once": curve,
        "levels": curve,
    }
    bench.draw(found, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_a_part_that_does_not_exist_is_refused_in_a_line(capsys):
    assert bench.main(["--part", "drawing"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'draws'" in error


def test_parts_run_in_processes_of_their_own(monkeypatch):
    """What the process prints last is what was measured; the heap is train.py's."""
    asked = []

    def answer(command, env, **_):
        asked.append((command[2:], "MALLOC_ARENA_MAX" in env))
        return SimpleNamespace(stdout='a warning\n{"GiB": 1.0}\n')

    monkeypatch.setattr(bench, "one_heap", lambda: {"MALLOC_ARENA_MAX": "1"})
    monkeypatch.setattr(bench.subprocess, "run", answer)
    for part in ("draws", "batch"):
        assert bench.measure_elsewhere(part, ["--steps", "9"]) == {"GiB": 1.0}
    flags = ["--steps", "9", "--part"]
    assert asked == [([*flags, "draws"], False), ([*flags, "batch"], True)]
