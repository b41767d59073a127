"""Whether compiled loops are there: Numba is asked for when they are needed first, not on import.

Without Numba, or with ``MSFT_STORE_NUMBA=0`` in the environment, everything works and gives the
same bytes, more slowly.

Example::

    fast = loops()
    words = rans.encode(symbols, packed) if fast is None else fast.encode(symbols, packed, lanes)
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import Any

VARIABLE = "MSFT_STORE_NUMBA"


@functools.cache
def loops() -> Any:
    """Return :mod:`msft_store.loops`, or ``None``."""
    if os.environ.get(VARIABLE) == "0":
        return None
    try:
        return importlib.import_module("msft_store.loops")
    except Exception as error:  # Numba fails in many ways where it does not fit its machine
        warnings.warn(
            f"Numba cannot be used ({error}): saves and loads are slower, level small by far",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
