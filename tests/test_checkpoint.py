"""Checkpoints: exact, crash-safe, never executed, refused when damaged."""

import errno
import os
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import checkpoint
from checkpoint import CheckpointError, Rings, read, write

ARRAYS = st.dictionaries(
    st.text(string.printable, max_size=8),
    npst.arrays(
        st.sampled_from([np.dtype(d) for d in sorted(checkpoint.DTYPES)]),
        npst.array_shapes(min_dims=0, max_dims=3, max_side=5),
    ),
    max_size=4,
)
SOME = {
    "weights": np.arange(12, dtype=np.float32).reshape(3, 4),
    "pixels": np.arange(200, dtype=np.uint8).reshape(2, 100) // 7,
    "x": np.array([1 + 2j, 3 - 1j], np.complex64),
    "step": np.array(7, np.int32),
}
EMPTY = {"segments": {}}


def same(a: dict, b: dict) -> bool:
    """Equal names, types, shapes and bytes."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and a[k].tobytes() == b[k].tobytes()
        for k in a
    )


@given(arrays=ARRAYS, meta=st.dictionaries(st.text(max_size=4), st.integers()))
def test_what_is_written_is_read(tmp_path_factory, arrays, meta):
    path = tmp_path_factory.mktemp("c") / "a.ckpt"
    digest = write(path, arrays, meta)
    read_arrays, read_meta = read(path, digest)
    assert same(arrays, read_arrays)
    assert read_meta == meta


@given(data=st.data())
def test_a_changed_bit_or_a_cut_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("c") / "a.ckpt"
    write(path, SOME, {"n": 1})
    good = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "zero"]))
    where = data.draw(st.integers(0, len(good) - 1))
    if kind == "flip":
        good[where] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        good = good[:where]
    elif kind == "grow":
        good += bytes(data.draw(st.integers(1, 9)))
    else:
        end = where + data.draw(st.integers(1, 64))
        if not any(good[where:end]):
            return
        good[where:end] = bytes(len(good[where:end]))
    path.write_bytes(good)
    with pytest.raises(CheckpointError):
        read(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(99), b"HIEROS\x00"]
)
def test_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read(path)


def test_a_later_format_is_named(tmp_path):
    path = tmp_path / "a.ckpt"
    write(path, SOME, {})
    content = bytearray(path.read_bytes())
    content[7] = 9
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="format 9, this program reads format 2"):
        read(path)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_an_impossible_size_is_refused_before_memory_is_taken(
    tmp_path, monkeypatch, dtype
):
    path = tmp_path / "a.ckpt"

    class Huge(np.ndarray):
        shape = (1 << 60, 1 << 60)

    write(path, {"a": np.zeros(4, dtype).view(Huge)}, {})
    with pytest.raises(CheckpointError):
        read(path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path / "none.ckpt")


@given(
    capacity=st.integers(3, 9),
    totals=st.lists(st.integers(0, 12), min_size=1, max_size=6),
)
def test_segments_rebuild_the_ring(tmp_path_factory, capacity, totals):
    folder = tmp_path_factory.mktemp("ring")
    rings, ring, total = Rings(folder), np.zeros((capacity + 1, 2), np.int32), 0
    for gained in totals:
        for _ in range(gained):
            ring[total % capacity] = [total, -total]
            total += 1
        rows = {"a": ring[rings.unsaved("level0", total, capacity)]}
        rings.append("level0", rows, total, capacity)
    rebuilt = np.zeros_like(ring)
    Rings(folder, rings.segments).restore("level0", {"a": rebuilt})
    held = np.arange(max(0, total - capacity), total) % capacity
    assert np.array_equal(rebuilt[held], ring[held])


def test_segments_of_another_shape_are_refused(tmp_path):
    rings = Rings(tmp_path)
    rings.append("level0", {"a": np.zeros((3, 2), np.int32)}, 3, 4)
    for other in (np.zeros((5, 3), np.int32), np.zeros((5, 2), np.int64)):
        with pytest.raises(CheckpointError, match="another run"):
            rings.restore("level0", {"a": other})
    with pytest.raises(CheckpointError, match="another run"):
        rings.restore("level0", {"b": np.zeros((5, 2), np.int32)})


def test_a_segment_that_another_run_wrote_is_refused(tmp_path):
    rings = Rings(tmp_path)
    rings.append("level0", {"a": np.zeros((3, 2), np.int32)}, 3, 4)
    (path,) = tmp_path.glob("*.seg")
    write(path, {"a": np.ones((3, 2), np.int32)}, {})
    with pytest.raises(CheckpointError, match="damaged header"):
        rings.restore("level0", {"a": np.zeros((5, 2), np.int32)})


def test_arrays_fill_a_tree_of_their_names_shapes_and_types(tmp_path):
    tree = {"w": np.arange(3, dtype=np.float32), "n": (np.array(7, np.int32),)}
    arrays = checkpoint.named(tree)
    filled = checkpoint.fill(tree | {"w": 0 * tree["w"]}, arrays, tmp_path)
    assert same(checkpoint.named(filled), arrays)
    for w in (np.zeros(4, np.float32), np.zeros(3, np.float16)):
        with pytest.raises(CheckpointError, match="another configuration"):
            checkpoint.fill(tree | {"w": w}, arrays, tmp_path)
    with pytest.raises(CheckpointError, match="another configuration"):
        checkpoint.fill(tree | {"more": tree["w"]}, arrays, tmp_path)


def test_the_newest_two_stay_with_their_segments(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    rings, ring = Rings(folder), np.zeros((5, 1), np.uint8)
    for step in range(1, 9):
        ring[(step - 1) % 4] = step
        rows = {"a": ring[rings.unsaved("level0", step, 4)]}
        rings.append("level0", rows, step, 4)
        checkpoint.save(
            tmp_path, step, {"w": np.array(step)}, {"segments": rings.segments}
        )
        checkpoint.prune(tmp_path, step)
    names = [p.name for p in checkpoint.checkpoints(tmp_path)]
    assert names == ["step-000000008.ckpt", "step-000000007.ckpt"]
    for path in checkpoint.checkpoints(tmp_path):
        arrays, meta = read(path)
        assert f"step-{int(arrays['w']):09d}.ckpt" == path.name
        rebuilt = np.zeros_like(ring)
        Rings(folder, meta["segments"]).restore("level0", {"a": rebuilt})
        last = int(arrays["w"])
        assert sorted(rebuilt[:4, 0]) == list(range(last - 3, last + 1))
    assert len(list(folder.glob("*.seg"))) == 5


def test_a_full_disk_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    path = checkpoint.path_of(tmp_path, 1)
    checkpoint.save(tmp_path, 1, SOME, {})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, SOME, {})
    assert list(path.parent.iterdir()) == [path]
    assert same(read(path)[0], SOME)


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, SOME, EMPTY)
    checkpoint.path_of(tmp_path, 2).write_bytes(b"torn")
    checkpoint.save(tmp_path, 3, SOME, EMPTY)
    checkpoint.prune(tmp_path, 3)
    assert same(read(checkpoint.path_of(tmp_path, 1))[0], SOME)


def test_a_newest_checkpoint_with_a_torn_array_replaces_none(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, SOME, EMPTY)
    newest = checkpoint.path_of(tmp_path, 3)
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    checkpoint.prune(tmp_path, 3)
    assert same(read(checkpoint.path_of(tmp_path, 1))[0], SOME)


def test_what_a_resumed_run_could_not_use_is_not_kept_for_it(tmp_path):
    """A header says nothing of its segments: later checkpoints do not count as good."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for step in (8, 9):
        checkpoint.save(tmp_path, step, SOME, EMPTY)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, SOME, EMPTY)
        (folder / "step-000000004.tmp").write_bytes(b"killed while it was written")
        checkpoint.prune(tmp_path, step)
    steps = [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)]
    assert steps == [9, 8, 3, 2] and not list(folder.glob("*.tmp"))


def test_shape_hook_is_live(tmp_path):
    with pytest.raises(Exception, match="type"):
        write(tmp_path / "a", {"a": "not an array"}, {})
