"""Decides when the loops that Numba compiles may serve, and has them compiled in the background.

Numba keeps what it compiled in a folder of its own. While this cache lacks the loops, a separate
process compiles them, and NumPy serves. Both give the same bytes, so the loops can take over
between any two chunks.

Invariants: one process at a time compiles for a folder. It inherits the lock on ``msft_store.lock``
from the process that starts it, and the system frees the lock when it ends for any reason. A
marker exists only if the loops are in the cache, for these sources, this version of Numba and this
processor. If nothing can be kept, or if the process cannot be started or dies, the loops are
compiled where they are called.

Example::

    compiled = compiled_kernels()             # a module; None without Numba or until it is compiled
    compiled = compiled_kernels(wait=True)    # a module, or None without Numba
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import xxhash

NUMBA_VARIABLE = "MSFT_STORE_NUMBA"
"""The variable of the environment that says where loops are compiled, if it is set."""
NEVER, HERE = "0", "1"
"""Its values: NumPy alone serves, or a process compiles the loops that it calls."""
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from msft_store.codec import rehearsal; rehearsal.main()"
)
_logger = logging.getLogger(__name__)


def compiled_kernels(lane: int | None = None, *, wait: bool = False) -> Any:
    """Return :mod:`msft_store.codec.numba_kernels`, imported at first use, or ``None``.

    It is ``None`` without Numba, and while another process compiles the loops. With ``wait``, the
    call returns when that process has ended. ``lane`` is the number of bytes of the lanes that the
    loops are called with: those of two are ready before all others.
    """
    chosen = os.environ.get(NUMBA_VARIABLE)
    kernels = None if chosen == NEVER else _import_kernels()
    if kernels is None or chosen == HERE:
        return kernels
    compilation = _compilation()
    return kernels if compilation is None or compilation.is_over(lane, wait=wait) else None


@functools.cache
def digest_sources() -> str:
    """Return a digest of the sources of all codecs."""
    digest = xxhash.xxh3_128()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def mark_compiled(lane: int | None) -> None:
    """Record that the cache has the loops for these lanes, or all loops."""
    compilation = _compilation()
    if compilation is not None:
        compilation.marker(lane).touch()


class _Compilation:
    """The compilation of all loops into a folder, by whatever process."""

    def __init__(self, folder: Path, digest: str) -> None:
        self._folder = folder
        self._digest = digest
        self._over: set[int | None] = set()
        self._has_started = False
        self._has_failed = False

    def marker(self, lane: int | None) -> Path:
        """Return the file that exists if the loops are compiled."""
        return self._folder / f"msft_store-{self._digest}.{lane or 'all'}"

    def is_over(self, lane: int | None, *, wait: bool) -> bool:
        """Return True if the loops are compiled, or if no other process does it.

        Otherwise a process that compiles them has been started.
        """
        if not self._has_failed and lane not in self._over:
            try:
                if self._advance(lane, wait=wait):
                    self._over.add(lane)
            except (OSError, subprocess.SubprocessError) as error:
                _logger.info("this process compiles the loops of the codec itself: %s", error)
                self._has_failed = True
        return self._has_failed or lane in self._over

    def _advance(self, lane: int | None, *, wait: bool) -> bool:
        if self.marker(lane).exists():
            return True
        file = self._folder / "msft_store.lock"
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.marker(lane).exists():
                return True
            if self._has_started:
                raise ChildProcessError("the process that should compile them has ended")
            self._has_started = True
            _start_compiling(lock)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
        _logger.info(
            "another process compiles the loops of the codec into %s; until it has ended, saves "
            "and loads are slower",
            self._folder,
        )
        return wait and self._advance(lane, wait=True)


@functools.cache
def _import_kernels() -> Any:
    try:
        return importlib.import_module("msft_store.codec.numba_kernels")
    except Exception as error:  # Numba raises many kinds of errors on unsupported machines
        warnings.warn(
            f"Numba cannot be used ({error}): saves and loads are slower; install a Numba "
            "that supports this machine, or set MSFT_STORE_NUMBA=0",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


@functools.cache
def _compilation() -> _Compilation | None:
    """Return the compilation into Numba's folder; ``None`` if Numba can keep nothing."""
    kernels = _import_kernels()
    folder = kernels.cache_folder()
    return None if folder is None else _Compilation(Path(folder), _digest(kernels))


def _digest(kernels: Any) -> str:
    """Return a digest of all that Numba's cache depends on."""
    target = f"{sys.implementation.cache_tag} {kernels.describe_target()}"
    return xxhash.xxh3_128_hexdigest(f"{target} {digest_sources()}".encode())


def _start_compiling(lock: int) -> None:
    """Start a process that compiles all loops and holds the lock until it ends.

    It is no child of this process, which need not wait for it and gets no signal when it ends. It
    belongs to no terminal, either.
    """
    if getattr(sys, "frozen", False) or not sys.executable:
        raise OSError("there is no Python interpreter to start")
    subprocess.run(
        ["/bin/sh", "-c", '"$@" &', "sh", sys.executable, "-c", _PROGRAM, *map(str, sys.path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[lock],
        start_new_session=True,
        env={**os.environ, NUMBA_VARIABLE: HERE, "OMP_NUM_THREADS": "1"},
        check=True,
    )
