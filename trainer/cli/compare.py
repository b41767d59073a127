"""The options of ``msft-train compare``.

Example::

    add_options(parser)
    options = parser.parse_args(["--seeds", "3"])
"""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "--methods",
        default="sft,msft",
        metavar="NAMES",
        help="methods, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="N runs of each method: the seed, seed + 1, …"
    )
    parser.add_argument(
        "--budgets",
        type=_numbers,
        default=(),
        metavar="C,…",
        help="values of msft.compute_budget, separated by commas (default: the configured one)",
    )
    parser.add_argument(
        "--equal-compute",
        action="store_true",
        help="run every other method also with the C that needs about as many FLOPs as MSFT",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="N runs at once (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-models",
        action="store_true",
        help="keep model/ of every run also with the options above; the stores have it anyway",
    )


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))
