"""The sub-datasets of a Trainer's run: their training and validation sets, and their mixtures.

A set is what the user's Trainer takes: a ``Dataset`` of the package datasets, a ``Dataset`` of
torch, or a list of rows. The mixture of several is of the same kind.

Example::

    mixture = check_mixture({"maths": (train, validation), "chat": (train, validation)})
    mixture.training_set(("chat", "maths")), mixture.validation_sets
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from trainer.config.checks import check_name
from trainer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Training and validation sets by sub-dataset."""

    training_sets: Mapping[str, Any]
    validation_sets: Mapping[str, Any]

    @property
    def train_sizes(self) -> dict[str, int]:
        """The number of training rows by sub-dataset."""
        return {name: len(rows) for name, rows in self.training_sets.items()}

    @property
    def validation_sizes(self) -> dict[str, int]:
        """The number of validation rows by sub-dataset."""
        return {name: len(rows) for name, rows in self.validation_sets.items()}

    def training_set(self, names: Sequence[str]) -> Any:
        """Return the rows of some sub-datasets, one after another, in the kind that was given."""
        return concatenate([self.training_sets[name] for name in names])


def check_mixture(sub_datasets: Mapping[str, tuple[Any, Any]]) -> Mixture:
    """Return a mixture; raise :class:`ConfigError` for one that cannot be trained on."""
    if not sub_datasets:
        raise ConfigError("the mixture is empty: give at least one sub-dataset, by its name")
    for name, pair in sub_datasets.items():
        check_name(f"the mixture's {name!r}", name)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ConfigError(f"the mixture's {name!r} must be a pair: (training, validation)")
        for kind, rows in zip(("training", "validation"), pair, strict=True):
            if not hasattr(rows, "__len__"):
                raise ConfigError(
                    f"the {kind} set of {name!r} has no length: a streamed data set cannot be "
                    "divided into epochs; load it, or take a part of it"
                )
            if not len(rows):
                raise ConfigError(f"the {kind} set of {name!r} is empty")
    _check_columns({name: pair[0] for name, pair in sorted(sub_datasets.items())})
    return Mixture(
        training_sets={name: pair[0] for name, pair in sorted(sub_datasets.items())},
        validation_sets={name: pair[1] for name, pair in sorted(sub_datasets.items())},
    )


def concatenate(sets: Sequence[Any]) -> Any:
    """Return sets one after another, in the kind that they have."""
    if len(sets) == 1:
        return sets[0]
    first = sets[0]
    if isinstance(first, Sequence):
        return [row for rows in sets for row in rows]
    if all(isinstance(rows, Dataset) for rows in sets):
        return ConcatDataset(sets)
    if _is_table(first):
        from datasets import concatenate_datasets  # noqa: PLC0415

        return concatenate_datasets(list(sets))
    raise ConfigError(
        f"sets of the kind {type(first).__name__} cannot be joined: give data sets of the package "
        "datasets, of torch, or lists of rows"
    )


def _is_table(rows: Any) -> bool:
    """Return True for a data set of the package datasets, which may not be installed."""
    return type(rows).__module__.partition(".")[0] == "datasets"


def _check_columns(training_sets: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` if joined tables would have rows of different shapes.

    The package datasets fills a column that a set lacks with None, and a Trainer takes the shape
    of all rows from the columns.
    """
    columns = {name: rows.column_names for name, rows in training_sets.items() if _is_table(rows)}
    if columns and not set.intersection(*map(set, columns.values())):
        listed = "; ".join(f"{name!r} has {', '.join(has)}" for name, has in columns.items())
        raise ConfigError(
            f"the sub-datasets have no column in common: {listed}. A Trainer reads all rows in one "
            "form: give all sets the same columns, for example with map"
        )
