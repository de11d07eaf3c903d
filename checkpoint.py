"""Checkpoints that survive a crash and execute nothing when they are read.

One file holds named arrays and a JSON object:

    magic  8 bytes "HIEROS\\x00\\x02"     version of the format in the last byte
    size   8 bytes, little endian       length of the header
    sha    32 bytes                     SHA-256 of the header
    header JSON                         meta; name, dtype, shape, length and SHA-256
                                        of every array
    data   the arrays, one after the other, each packed by zlib where that helps

A file is written under a temporary name, flushed, renamed. What a ring buffer has
gained since the last checkpoint goes to a segment, a file of the same form that later
checkpoints refer to, so that saving costs what is new and not what is there.
"""

import hashlib
import json
import os
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

MAGIC = b"HIEROS\x00"
VERSION = 2
PREAMBLE = len(MAGIC) + 1 + 8 + 32
MAX_HEADER = 1 << 26
ZLIB_MAX_RATIO = 1100
INTEGERS = frozenset(("bool", "int8", "uint8", "int32", "uint32", "int64"))
DTYPES = INTEGERS | {"float16", "float32", "float64", "complex64"}
KEEP = 2


class CheckpointError(Exception):
    """A file that is no checkpoint, or a damaged or foreign one; says so in a line."""


def write(
    path: Path, arrays: dict[str, np.ndarray], meta: dict, *, small: bool = False
) -> str:
    """Writes one file and returns the SHA-256 of its header. Raises OSError.

    Floats hardly shrink, pixels, classes and flags do, more than tenfold: only `small`
    files pack floats too.
    """
    entries, blobs = [], []
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        packed = small or array.dtype.name in INTEGERS
        blobs.append(zlib.compress(raw, 9 if small else 1) if packed else raw)
        entries.append(
            {
                "name": name,
                "dtype": array.dtype.name,
                "shape": array.shape,
                "packed": packed,
                "length": len(blobs[-1]),
                "sha256": hashlib.sha256(blobs[-1]).hexdigest(),
            }
        )
    header = json.dumps({"arrays": entries, "meta": meta}).encode()
    digest = hashlib.sha256(header)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(MAGIC + bytes([VERSION]))
            file.write(len(header).to_bytes(8, "little") + digest.digest() + header)
            for blob in blobs:
                file.write(blob)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    sync_folder(path.parent)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_header(path: Path, sha256: str | None = None) -> tuple[list[dict], dict, int]:
    """Checked array entries, meta and the offset of the data. Raises CheckpointError.

    Sizes are compared with the file's before anything is allocated.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            preamble = file.read(PREAMBLE)
            if len(preamble) < PREAMBLE or not preamble.startswith(MAGIC):
                raise CheckpointError(f"{path} is not a checkpoint")
            if preamble[len(MAGIC)] != VERSION:
                raise CheckpointError(
                    f"{path} has format {preamble[len(MAGIC)]}, "
                    f"this program reads format {VERSION}"
                )
            length = int.from_bytes(preamble[8:16], "little")
            if length > min(size - PREAMBLE, MAX_HEADER):
                raise CheckpointError(f"{path} is cut short")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(header)
    if digest.digest() != preamble[16:] or sha256 not in (None, digest.hexdigest()):
        raise CheckpointError(f"{path} has a damaged header")
    try:
        content = json.loads(header)
        entries, meta = content["arrays"], content["meta"]
        for entry in entries:
            valid = (
                entry["dtype"] in DTYPES
                and isinstance(entry["name"], str)
                and isinstance(entry["packed"], bool)
                and all(isinstance(n, int) and n >= 0 for n in entry["shape"])
                and isinstance(entry["length"], int)
                and entry["length"] >= 0
            )
            if not valid:
                raise CheckpointError(f"{path} describes an impossible array")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} has an unreadable header") from error
    total = PREAMBLE + length + sum(entry["length"] for entry in entries)
    if total != size:
        raise CheckpointError(f"{path} has {size} bytes instead of {total}")
    return entries, meta, PREAMBLE + length


def read(path: Path, sha256: str | None = None) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and meta of one file, every byte checked. Raises CheckpointError."""
    entries, meta, offset = read_header(path, sha256)
    arrays = {}
    with open(path, "rb") as file:
        file.seek(offset)
        for entry in entries:
            name, dtype = entry["name"], np.dtype(entry["dtype"])
            raw = file.read(entry["length"])
            if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
                raise CheckpointError(f"{path} is damaged at {name}")
            bytes_needed = dtype.itemsize * int(np.prod(entry["shape"], dtype=object))
            if entry["packed"]:
                raw = unpack(raw, bytes_needed)
            if len(raw) != bytes_needed:
                raise CheckpointError(f"{path} holds {name} at another size")
            arrays[name] = np.frombuffer(raw, dtype).reshape(entry["shape"])
    return arrays, meta


def unpack(packed: bytes, limit: int) -> bytes:
    """zlib, never more than one byte above `limit`. Raises CheckpointError."""
    if limit > ZLIB_MAX_RATIO * len(packed):
        raise CheckpointError("packed data is too short for its shape")
    try:
        return zlib.decompressobj().decompress(packed, limit + 1)
    except zlib.error as error:
        raise CheckpointError("packed data is damaged") from error


class Rings:
    """Append-only segments of the run's ring buffers, one chain per buffer.

    A ring of capacity C that has been given n entries keeps entry e at row e mod C.
    """

    def __init__(self, folder: Path, segments: dict[str, list[dict]] | None = None):
        self.folder = folder
        self.segments = segments or {}

    def unsaved(self, name: str, total: int, capacity: int) -> np.ndarray:
        """Rows of what buffer `name` gained up to its entry `total`."""
        chain = self.segments.get(name)
        start = max(chain[-1]["end"] if chain else 0, total - capacity, 0)
        return np.arange(start, total) % capacity

    def append(
        self, name: str, rows: dict[str, np.ndarray], total: int, capacity: int
    ) -> None:
        """Saves the `unsaved` rows of buffer `name`, whose last entry is `total`."""
        chain = self.segments.setdefault(name, [])
        start = total - len(next(iter(rows.values())))
        if start < total:
            file = f"{name}-{start:09d}-{total:09d}.seg"
            digest = write(self.folder / file, rows, {})
            chain.append({"file": file, "end": total, "start": start, "sha256": digest})
        self.segments[name] = [s for s in chain if s["end"] > total - capacity]

    def restore(self, name: str, rows: dict[str, np.ndarray]) -> None:
        """Fills writable arrays with the saved rows of buffer `name`."""
        for segment in self.segments[name]:
            arrays, _ = read(self.folder / segment["file"], segment["sha256"])
            if arrays.keys() != rows.keys():
                raise CheckpointError(f"{segment['file']} belongs to another run")
            for key, ring in rows.items():
                capacity = ring.shape[0] - 1
                index = np.arange(segment["start"], segment["end"]) % capacity
                same = arrays[key].dtype == ring.dtype
                if not same or arrays[key].shape != (len(index), *ring.shape[1:]):
                    raise CheckpointError(f"{segment['file']} belongs to another run")
                ring[index] = arrays[key]


def checkpoints(run_folder: Path) -> list[Path]:
    """Checkpoint files of a run, newest first."""
    return sorted((run_folder / "checkpoint").glob("step-*.ckpt"), reverse=True)


def path_of(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of an agent step lies."""
    return run_folder / "checkpoint" / f"step-{step:09d}.ckpt"


def step_of(path: Path) -> int:
    """Inverse of `path_of`."""
    return int(path.stem.removeprefix("step-"))


def save(
    run_folder: Path, step: int, arrays: dict[str, np.ndarray], meta: dict
) -> None:
    """Writes the checkpoint of a step; older ones stay. Raises OSError."""
    write(path_of(run_folder, step), arrays, meta)


def prune(run_folder: Path, step: int) -> None:
    """Drops all but the newest KEEP good checkpoints, and segments nobody needs.

    The newest, of this step, is read back whole: only then may it replace one that was
    good. Later ones are what a resumed run could not use.
    """
    good, needed = 0, set()
    for old in checkpoints(run_folder):
        if step_of(old) > step:
            continue
        try:
            if good == 0:
                read(old)
            segments = read_header(old)[1]["segments"] if good < KEEP else {}
        except CheckpointError:
            continue
        good += 1
        needed |= {s["file"] for chain in segments.values() for s in chain}
        if good > KEEP:
            old.unlink()
    folder = run_folder / "checkpoint"
    for segment in folder.glob("*.seg"):
        if segment.name not in needed:
            segment.unlink()
    for unfinished in folder.glob("*.tmp"):  # of a program that was killed
        unfinished.unlink()


def named(tree) -> dict[str, np.ndarray]:
    """Leaves by their path. Typed keys never occur: they follow from the seed."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def fill(template, arrays: dict[str, np.ndarray], path: Path):
    """The template with its leaves replaced by name. Raises CheckpointError."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(template)
    values = []
    for key, old in leaves:
        new = arrays.get(jax.tree_util.keystr(key))
        if new is None or new.shape != old.shape or new.dtype != old.dtype:
            raise CheckpointError(f"{path} belongs to another configuration")
        values.append(jnp.array(new))
    return jax.tree_util.tree_unflatten(tree, values)


def check_numbers(found, own, path: Path) -> None:
    """Raises CheckpointError unless JSON `found` has the keys and types of `own`."""
    types = lambda tree: jax.tree.map(type, tree)
    if types(found) != types(own):
        raise CheckpointError(f"{path} holds other counts than this program keeps")


def prefixed(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin so, without that beginning."""
    n = len(prefix)
    return {name[n:]: x for name, x in arrays.items() if name.startswith(prefix)}
