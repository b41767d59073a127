"""Whether a margin in standard errors can tell peaks apart with the validation data that there is.

Pure functions, for ``msft.peaks: robust``. A margin that is a large part of the metric itself hides
what training does, and the sub-dataset seems to peak where it began.

Example::

    indistinct({"arith": 0.30}, {"arith": 0.09}, margin=1.0)    # {"arith": 0.09}
"""

from __future__ import annotations

from collections.abc import Mapping

from trainer.settings import Config

LARGEST_SHARE = 0.1
"""The part of a metric above which a margin hides too much."""


def indistinct(
    metrics: Mapping[str, float], errors: Mapping[str, float], *, margin: float
) -> dict[str, float]:
    """Return the margins, in the metric's unit, that are more than a tenth of their metrics.

    ``errors`` are standard errors by sub-dataset, ``margin`` says how many of them make a
    difference.
    """
    return {
        name: margin * error
        for name, error in errors.items()
        if margin * error > LARGEST_SHARE * abs(metrics[name])
    }


def margin_warnings(
    config: Config,
    metrics: Mapping[str, float],
    errors: Mapping[str, float],
    examples: Mapping[str, int],
) -> list[str]:
    """Return a warning for each sub-dataset whose peak the run's margin can hardly tell.

    ``metrics`` and ``errors`` are of one evaluation, ``examples`` says how many were evaluated.
    """
    margin = config.msft.margin
    if config.method != "msft" or config.msft.peaks != "robust" or margin == 0:
        return []
    return [
        f"warning: the {examples[name]} validation examples of {name} tell metrics apart that "
        f"differ by {width:.3g} (msft.margin: {margin:g} standard errors of {width / margin:.3g}); "
        f"its metric is {metrics[name]:.3g}: give it more validation examples, or lower the margin"
        for name, width in indistinct(metrics, errors, margin=margin).items()
    ]
