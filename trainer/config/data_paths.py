"""Resolve data paths: make them absolute and expand directories and mixture files.

Example::

    data = resolve_data(DataConfig(directory="data"), Path("/home/me/run"))
    data.sub_datasets["arith"].train                     # /home/me/run/data/arith.train.jsonl
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config.mixture_file import name_categories, read_mixture
from trainer.config.schema import DataConfig, MixtureConfig, SourceConfig, SubDatasetConfig
from trainer.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")
_TRAIN = ".train.jsonl"
RELATIVE = "relative paths are taken from the folder of the configuration file"
"""The end of messages about a file or directory that is missing."""

Source = str | SourceConfig


def resolve_data(data: DataConfig, folder: Path) -> DataConfig:
    """Return ``data`` with ``sub_datasets`` in place of a directory or mixture files.

    All paths become absolute; relative ones are taken from ``folder``. Raises :class:`ConfigError`
    if sub-datasets are given in two ways, or a directory or mixture file cannot be read.
    """
    ways = {
        "data.directory": data.directory,
        "data.mixture": data.mixture,
        "data.sub_datasets": data.sub_datasets,
    }
    given = [key for key, value in ways.items() if value]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other: remove all but one")
    if data.directory is not None:
        found: Mapping[str, SubDatasetConfig] = _scan_directory(
            folder / data.directory, always_validation=data.validation_share is None
        )
    elif data.mixture is not None:
        found = _expand_mixture(data.mixture, folder)
    else:
        found = data.sub_datasets
    sub_datasets = {}
    for name, files in found.items():
        splits = {split: _make_absolute(getattr(files, split), folder, split) for split in SPLITS}
        sub_datasets[name] = replace(files, **splits)
    return replace(data, sub_datasets=sub_datasets, directory=None, mixture=None)


def _make_absolute(source: Source | None, folder: Path, split: str) -> Any:
    if source is None:
        return None
    if isinstance(source, str):
        return str(folder / source)
    hub = source.hub
    return replace(
        source,
        file=None if source.file is None else str(folder / source.file),
        part=source.part if source.category is None else source.part or split,
        hub=str(folder / hub) if hub is not None and (folder / hub).is_dir() else hub,
    )


def _scan_directory(directory: Path, *, always_validation: bool) -> dict[str, SubDatasetConfig]:
    """Return the sub-datasets of a directory by their file names, sorted."""
    if not directory.is_dir():
        raise ConfigError(f"data.directory: there is no directory {directory}; {RELATIVE}")
    found = {}
    for train in sorted(directory.glob(f"*{_TRAIN}")):
        name = train.name[: -len(_TRAIN)]
        validation = directory / f"{name}.validation.jsonl"
        test = directory / f"{name}.test.jsonl"
        found[name] = SubDatasetConfig(
            train=str(train),
            validation=str(validation) if always_validation or validation.is_file() else None,
            test=str(test) if test.is_file() else None,
        )
    if not found:
        raise ConfigError(f"data.directory: no file in {directory} is named NAME{_TRAIN}")
    return found


def _expand_mixture(mixture: MixtureConfig, folder: Path) -> dict[str, SubDatasetConfig]:
    """Return the sub-datasets of mixture files; each split has all categories of ``train``."""
    categories: dict[str, str] = {}
    sources: dict[str, SourceConfig] = {}
    for split in SPLITS:
        at = f"data.mixture.{split}"
        given: Source | None = getattr(mixture, split)
        if given is None:
            continue
        source = SourceConfig(file=given) if isinstance(given, str) else given
        if source.file is None or source.category is not None or source.hub is not None:
            raise ConfigError(f"{at} must be a mixture file, or have 'file' and at most 'part'")
        file = folder / source.file
        try:
            named = name_categories(read_mixture(file, source.part or split), file)
        except DataError as error:
            advice = "" if file.exists() else f"; {RELATIVE}"
            raise ConfigError(f"{at}: {error}{advice}") from None
        if split == "train":
            categories = named
        if missing := sorted(set(categories.values()) - set(named.values())):
            raise ConfigError(
                f"{at}: {file} has no row of category {missing[0]!r}, which the training data has"
            )
        sources[split] = replace(source, file=str(file), part=source.part or split)
    if not categories:
        raise ConfigError("data.mixture.train has no rows")
    found = {}
    for name, category in categories.items():
        splits: dict[str, Any] = {
            split: replace(source, category=category) for split, source in sources.items()
        }
        found[name] = SubDatasetConfig(**splits)
    return found
