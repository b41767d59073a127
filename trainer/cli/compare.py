"""The options of ``msft-train compare`` and the text that it prints.

Example::

    add_options(parser)
    tree, text = shown(comparison_of(config, parser.parse_args(["--seeds", "3"])))
"""

from __future__ import annotations

import argparse
from typing import Any

from trainer.comparison.compare import compare
from trainer.comparison.report import summaries_by_method
from trainer.comparison.results import Comparison
from trainer.comparison.tables import render_text
from trainer.config.schema import Config
from trainer.report.report import compare_table


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "--methods",
        default="sft,msft",
        metavar="NAMES",
        help="methods, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="N runs of each: the configured seed, + 1, …"
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
        help="run every other method also with the C that takes about MSFT's FLOPs",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="N runs at once (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-models",
        action="store_true",
        help="keep model/ of every run also with the options above; each run's store has it anyway",
    )


def comparison_of(config: Config, options: argparse.Namespace, *, progress: bool) -> Comparison:
    """Do the runs that the options ask for and return their comparison."""
    return compare(
        config,
        options.methods.split(","),
        seeds=options.seeds,
        budgets=options.budgets,
        equal_compute=options.equal_compute,
        jobs=options.jobs,
        keep_models=options.keep_models,
        progress=progress,
    )


def shown(comparison: Comparison) -> tuple[dict[str, Any], str]:
    """Return a comparison as JSON values and as text."""
    if summaries := summaries_by_method(comparison):
        tree = {label: summary.to_dict() for label, summary in summaries.items()}
        return tree, compare_table(summaries)
    return comparison.to_dict(), render_text(comparison)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))
