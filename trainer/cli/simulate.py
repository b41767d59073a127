"""The options of ``msft-train simulate`` and the text that it prints.

Example::

    add_options(parser)
    tree, text = simulations(parser.parse_args(["runs/demo", "--peak-window", "4"]))
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trainer.journal import read
from trainer.simulate.policies import OPTIONS, expand_sweeps
from trainer.simulate.report import simulate_own_policy, simulate_policy, to_text
from trainer.training.directory import JOURNAL


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("journal", metavar="JOURNAL", help="the directory of a run, or its journal")
    for key, text in OPTIONS.items():
        parser.add_argument(f"--{key.replace('_', '-')}", dest=key, metavar="VALUE", help=text)
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="several values of an option above, as in peak-window=2,4,off; repeated: all pairs",
    )
    parser.add_argument(
        "--method",
        choices=("msft", "sft"),
        default="msft",
        help="the method whose decisions are replayed; sft: the first stage only",
    )
    parser.add_argument(
        "--retention",
        default="needs",
        metavar="RULE",
        help="rollback points to keep: needs (those that the method may still use; the default), "
        "last:K, best:K (by the overall metric), all",
    )


def simulations(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the requested simulations as JSON values and as text.

    Raises :class:`RunError` for a journal that cannot be simulated, and :class:`ConfigError` for an
    invalid option.
    """
    path = Path(options.journal)
    records = read(path / JOURNAL if path.is_dir() else path)
    given = {key: value for key in OPTIONS if (value := getattr(options, key)) is not None}
    run = simulate_own_policy(records)
    outcomes = [
        simulate_policy(records, policy, method=options.method, retention=options.retention)
        for policy in expand_sweeps(given, options.sweep)
    ]
    tree = {"run": run.to_dict(), "policies": [one.to_dict() for one in outcomes]}
    return tree, to_text(run, outcomes)
