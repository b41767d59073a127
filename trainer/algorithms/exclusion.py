"""The excluded sub-datasets of a run: their shares of an epoch, and the ones that come back.

Example::

    excluded = Exclusions(settings=MsftConfig(exclusion="soft", return_margin=2.0))
    excluded.add("dates", champion)
    excluded.find_forgotten({"arith": 0.6, "dates": 1.4})             # ("dates",)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.algorithms.peaks import Champion
from trainer.config.schema import MsftConfig


@dataclass(kw_only=True, eq=False)
class Exclusions:
    """The sub-datasets that are excluded now, with their metrics at the peak."""

    settings: MsftConfig
    _champions: dict[str, Champion] = field(init=False, default_factory=dict)

    def add(self, name: str, champion: Champion) -> None:
        """Exclude a sub-dataset."""
        self._champions[name] = champion

    def remove(self, name: str) -> None:
        """Include a sub-dataset again."""
        del self._champions[name]

    def find_forgotten(self, metrics: Mapping[str, float]) -> tuple[str, ...]:
        """Return the names that must come back: worse than at their peak by ``return_margin``.

        One that was not measured stays excluded.
        """
        margin = self.settings.return_margin
        if margin is None:
            return ()
        found = self._champions.items()
        return tuple(
            sorted(n for n, one in found if n in metrics and one.is_forgotten(metrics[n], margin))
        )

    def shares(self) -> dict[str, float]:
        """Return the share of its examples that each excluded sub-dataset has in an epoch."""
        soft = self.settings.exclusion == "soft"
        return dict.fromkeys(sorted(self._champions), self.settings.floor) if soft else {}
