"""Measurements beside peers, on data from real training; see README.md in this folder.

No measurement depends on how far another process has got with compiling the loops of the codec.
"""

import os

os.environ.setdefault("MSFT_STORE_NUMBA", "1")
