"""How Numba compiles the loops of the codecs.

Invariant: a loop from the cache was compiled from the sources as they are. Numba alone would look
at the file of the loop only, but a loop contains those that it calls.

Example::

    @compile_loop
    def total(values): ...
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast

import llvmlite.binding
import numba
from numba import njit

from msft_store.codec.compilation import digest_sources

_F = TypeVar("_F", bound=Callable[..., Any])
_TARGET_VARIABLES = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX")
"""Variables of the environment that select the processor to compile for."""
_SOURCES = digest_sources()


def compile_loop(function: _F) -> _F:
    """Return a function that is compiled at its first call, or read from Numba's cache."""
    try:
        compiled: Any = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:
        # Without a directory for the cache, each process compiles the loops again.
        return cast("_F", njit(nogil=True, error_model="numpy")(function))
    file = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if file is not None:
        file._source_stamp = _SOURCES
    return cast("_F", compiled)


def rebind_globals(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """Return a copy of a function with some of its global names bound to other objects."""
    known = {**function.__globals__, **names}
    return FunctionType(function.__code__, known, function.__name__)


def describe_target() -> str:
    """Return what Numba's cache depends on besides the sources: the processor and versions."""
    processor = llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features()
    chosen = [os.environ.get(name) for name in _TARGET_VARIABLES]
    return f"{numba.__version__} {processor[0]} {processor[1].flatten()} {chosen}"
