"""Run the unfinished part of the experiment, and write its tables into ``docs/RESULTS.md``.

The runs are those of ``msft-train compare``: one that is finished is not repeated, one that was
killed is continued, so the same command goes on after a kill and, when all is done, writes the
tables again. ``key=value`` overrides the recipe, as on the command line of ``msft-train``.

Example::

    python -m bench.mixture10 --jobs 2              # the short form, about an hour on two cores
    python -m bench.mixture10 --long model.path=…   # by hand: 5 seeds, C up to 10, 18,000 examples
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.codec import machine
from bench.mixture10.exact import exact_matches
from bench.mixture10.make_data import DATA, write
from bench.mixture10.results import Findings, tables, write_section
from trainer.comparison.compare import compare
from trainer.comparison.report import write_comparison
from trainer.comparison.results import Comparison, group_outcomes
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.training.workspace import quiet_libraries

RECIPE = Path(__file__).parent / "mixture10.yaml"
METHODS = ("sft", "continual", "single_rollout", "ies", "dynamix", "msft")
EQUAL_AT = 1.0
"""The budget at which every method also gets MSFT's FLOPs."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """The size of the experiment."""

    name: str
    seeds: int
    budgets: tuple[float, ...]
    train: int | None = None
    """Training examples of each sub-dataset; ``None``: the sizes that are committed."""

    @property
    def output(self) -> Path:
        """The directory of its runs, relative to the working directory."""
        return Path("runs", self.name)


SHORT = Form(name="mixture10", seeds=3, budgets=(1.0, 3.0))
LONG = Form(name="mixture10-long", seeds=5, budgets=(1.0, 3.0, 10.0), train=1800)


def configure(form: Form, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a form; its data is written where it is not committed."""
    data = DATA
    if form.train is not None:
        data = (form.output / "data").absolute()
        write(data, train=form.train)
    own = [f"output_dir={form.output}", f"data.directory={data}"]
    return load_config(RECIPE, overrides=[*own, *overrides])


def run(form: Form, config: Config, *, jobs: int) -> Comparison:
    """Complete all runs, and write ``compare.{md,json,html}`` beside them."""
    found = {}
    for budgets, equal in (((EQUAL_AT,), True), (form.budgets, False)):
        comparison = compare(
            config,
            METHODS,
            seeds=form.seeds,
            budgets=budgets,
            equal_compute=equal,
            jobs=jobs,
            keep_models=True,
        )
        found.update(comparison.outcomes)
    comparison = group_outcomes(found)
    write_comparison(Path(config.output_dir), comparison)
    return comparison


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.mixture10", description=__doc__.splitlines()[0]
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes to the recipe")
    parser.add_argument("--long", action="store_true", help="the long form, hours to days")
    parser.add_argument("--print", action="store_true", help="print the tables, write no page")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: %(default)s)")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trainer").setLevel(logging.INFO)
    quiet_libraries()
    form = LONG if options.long else SHORT
    config = configure(form, options.overrides)
    comparison = run(form, config, jobs=options.jobs)
    findings = Findings(
        comparison=comparison,
        directory=Path(config.output_dir),
        exact=exact_matches(config, comparison),
        overrides=tuple(options.overrides),
        machine=machine(),
    )
    if options.print:
        print(tables(findings))
    else:
        write_section(form.name, tables(findings))


if __name__ == "__main__":
    main()
