"""The share of each sub-dataset in an epoch of the mixture: a pure function of their sizes.

With any sampling, an epoch has as many examples as the mixture, so that methods and budgets in
epochs stay comparable. With a share above 1, examples are seen more than once in an epoch; with one
below 1, some are left for a later epoch.

Example::

    shares({"a": 900, "b": 100}, "equal")                # {"a": 0.556, "b": 5.0}
    shares({"a": 900, "b": 100}, "temperature", 2.0)     # {"a": 0.833, "b": 2.5}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

Sampling = Literal["proportional", "equal", "temperature"]


def shares(
    sizes: Mapping[str, int], sampling: Sampling, temperature: float | None = None
) -> dict[str, float]:
    """Return the share of each sub-dataset's examples that an epoch has.

    With N examples in total, of which n_k are of sub-dataset k, an epoch has N p_k of them:

    - ``proportional``: p_k = n_k / N, each example once; all shares are exactly 1;
    - ``equal``: p_k is the same for all;
    - ``temperature``: p_k is proportional to n_k ** (1 / ``temperature``). 1 is ``proportional``,
      infinity would be ``equal``; below 1, large sub-datasets get a larger share.

    Raises :class:`ValueError` for a size below 1, or a ``temperature`` that is not above 0.
    """
    if any(size < 1 for size in sizes.values()):
        raise ValueError(f"every sub-dataset needs an example, got {dict(sizes)}")
    if sampling == "proportional":
        return dict.fromkeys(sizes, 1.0)
    if sampling == "equal":
        power = 0.0
    elif temperature is None or not temperature > 0:
        raise ValueError(f"the temperature must be above 0, got {temperature}")
    else:
        power = 1 / temperature
    # Relative to the largest size, so that no power overflows.
    largest = math.log(max(sizes.values(), default=1))
    weights = {name: math.exp(power * (math.log(n) - largest)) for name, n in sizes.items()}
    scale = sum(sizes.values()) / sum(weights.values()) if weights else 0.0
    return {name: scale * weights[name] / n for name, n in sizes.items()}
