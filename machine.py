"""The machine under a program: what it keeps in memory and on disk, and its name."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
ONE_HEAP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}


def keep_compiled() -> None:
    """Compiled programs stay on disk, unless JAX was told where: starts in seconds."""
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(Path(home, "hieros-jax")))


def keep_memory() -> None:
    """Starts the program anew in a process whose heap never shrinks, on a CPU.

    Otherwise glibc gives large arrays back to the kernel, which clears every page of
    the next update anew: a third of its time. Small worlds have no large arrays, and
    their many small ones are better off with a heap per thread, as usual.
    """
    wanted = one_heap()
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | wanted)


def keep_buffers() -> None:
    """Lets glibc keep 64 MiB of freed memory, without a new process: for small worlds.

    It comes to do so by itself when it frees a large array, which a resumed run does
    not: a fifth of its time went into clearing pages.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # as high as glibc itself goes
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)


def one_heap() -> dict[str, str]:
    """Environment of such a process; empty where it would be of no use."""
    glibc = platform.libc_ver()[0] == "glibc"
    return ONE_HEAP if glibc and jax.default_backend() == "cpu" else {}


def commit() -> str:
    """Short hash of this version of the program; empty where git knows none."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def hardware() -> str:
    """What JAX computes on, and the machine around it."""
    device = jax.devices()[0].device_kind
    return f"{device}, {os.cpu_count()} cores, {platform.machine()}"
