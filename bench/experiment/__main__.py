"""Complete the experiment's missing runs and write its results.

``key=value`` changes the recipe of all variants, as on the command line of ``msft-train``; these
runs have other settings, and so other records.

Example::

    python -m bench.experiment --minutes 110                    # as much as fits; the same again
    python -m bench.experiment --phase final --jobs 2
    python -m bench.experiment --mixture heterogeneous --variants sft msft-3 --seeds 0 --print
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

from bench.experiment.mixtures import MIXTURES
from bench.experiment.records import RECORDS, load
from bench.experiment.results import render, write_results
from bench.experiment.runs import Experiment, list_cases
from bench.experiment.variants import PHASES, find_variant
from trainer.signals import Interrupted


def main() -> int:
    """Run the command; the exit code is 1 if runs are missing, 128 and more after a signal."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiment", description=__doc__.splitlines()[0]
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes to the recipe")
    parser.add_argument("--phase", choices=sorted(PHASES), default="choose", help="its runs")
    parser.add_argument("--mixture", nargs="+", choices=sorted(MIXTURES), help="only these")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after so many; the same call continues")
    parser.add_argument("--directory", type=Path, default=Path("runs/experiment"), help="of runs")
    parser.add_argument("--records", type=Path, default=RECORDS, help="the file of the records")
    parser.add_argument("--keep", action="store_true", help="keep the directories of finished runs")
    parser.add_argument("--print", action="store_true", help="print the tables, write no page")
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    phase = PHASES[options.phase]
    try:
        variants = tuple(find_variant(name) for name in options.variants or ())
    except KeyError as error:
        parser.error(f"there is no variant {error}")
    phase = replace(
        phase,
        mixtures=tuple(options.mixture or phase.mixtures),
        variants=variants or phase.variants,
        seeds=tuple(options.seeds or phase.seeds),
    )
    experiment = Experiment(
        directory=options.directory,
        records=options.records,
        overrides=options.overrides,
        keep=options.keep,
    )
    try:
        is_complete = experiment.complete(
            list_cases(phase), jobs=options.jobs, minutes=options.minutes
        )
    except Interrupted as interrupted:
        logging.warning("%s: give the same command again to continue", interrupted)
        return 128 + interrupted.number
    for case, why in experiment.failures.items():
        logging.warning("%s, %s, seed %d: %s", case.mixture, case.variant, case.seed, why)
    records = load(options.records)
    if options.print:
        print(render(records, phase))
    else:
        write_results(records)
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
