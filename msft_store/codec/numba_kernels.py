"""All loops that Numba compiles; importing this module takes half a second.

They return what :mod:`msft_store.codec.changes`, :mod:`msft_store.codec.compact_codec`,
:mod:`msft_store.codec.kernels` and :mod:`msft_store.codec.rans` return, many times as fast. They
release the GIL, and are compiled once on each machine.

Example::

    from msft_store.codec.codecs import compiled_kernels
    compiled = compiled_kernels()                    # this module, or None without Numba
"""

from __future__ import annotations

from msft_store.codec.numba_coding import (
    apply_changes,
    build_slots,
    code_symbols,
    compute_exponents,
    compute_frequencies,
    decode,
    encode_words,
    invert_shares,
    read_distances,
)
from msft_store.codec.numba_compact import (
    decode_payload,
    encode_payload,
    proves,
    read_tables,
    write_tables,
)
from msft_store.codec.numba_planes import join_rotated_planes, split_rotated_planes
from msft_store.codec.numba_search import find_changes, locate_listed, plan_listing
from msft_store.codec.numba_setup import describe_target

__all__ = [
    "apply_changes",
    "build_slots",
    "cache_folder",
    "code_symbols",
    "compute_exponents",
    "compute_frequencies",
    "decode",
    "decode_payload",
    "describe_target",
    "encode_payload",
    "encode_words",
    "find_changes",
    "invert_shares",
    "join_rotated_planes",
    "locate_listed",
    "plan_listing",
    "proves",
    "read_distances",
    "read_tables",
    "split_rotated_planes",
    "write_tables",
]


def cache_folder() -> str | None:
    """Return the folder in which Numba keeps these loops; ``None`` if it keeps nothing."""
    stats = getattr(find_changes, "stats", None)
    return None if stats is None else stats.cache_path
