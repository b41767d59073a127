"""Whether what a configuration says of the data can work, before any row is read.

Example::

    check_data(config.data)                                     # raises ConfigError
"""

from __future__ import annotations

import re
from pathlib import Path

from trainer.datapaths import SPLITS, Source
from trainer.errors import ConfigError, DataError
from trainer.mixturefile import ANSWER_PATTERN
from trainer.settings import Config, DataConfig, FieldsConfig, SourceConfig, SubDatasetConfig
from trainer.strategy import OVERALL
from trainer.templates import check

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def check_data(config: Config) -> None:
    """Raise :class:`ConfigError` for the first thing about the data that cannot work."""
    data = config.data
    if not data.sub_datasets:
        raise ConfigError("data.sub_datasets is empty: name at least one sub-dataset and its files")
    if (data.sampling == "temperature") != (data.temperature is not None):
        raise ConfigError(
            "data.temperature belongs to data.sampling=temperature: give both or neither"
        )
    evaluation = config.evaluation
    exact = evaluation.metric == "exact_match" and evaluation.answer_pattern is None
    for name, files in data.sub_datasets.items():
        _check_sub_dataset(f"data.sub_datasets.{name}", name, files, data)
        if exact and files.fields is None and any(map(_is_mixture, _sources(files))):
            raise ConfigError(
                "the answers in mixture files follow '####': set evaluation.answer_pattern, as in "
                f"'{ANSWER_PATTERN}'"
            )


def _sources(files: SubDatasetConfig) -> list[Source]:
    return [source for source in (files.train, files.validation, files.test) if source is not None]


def _is_mixture(source: Source) -> bool:
    return isinstance(source, SourceConfig) and source.category is not None


def _check_sub_dataset(at: str, name: str, files: SubDatasetConfig, data: DataConfig) -> None:
    if name == OVERALL:
        raise ConfigError(f"{at}: {OVERALL!r} names the metric of the whole mixture; rename it")
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{at}: a name begins with a letter or digit, and consists of letters, digits, "
            "'_' and '-', at most 64 of them; rename it"
        )
    if files.validation is None and data.validation_share is None:
        raise ConfigError(
            f"{at}.validation is missing: peaks are found on validation data; name a source, or "
            "set data.validation_share to set some of the training examples aside"
        )
    for split in SPLITS:
        source: Source | None = getattr(files, split)
        if source is not None:
            _check_source(f"{at}.{split}", source)
    if files.fields is not None:
        _check_fields(f"{at}.fields", files.fields)


def _check_source(at: str, source: Source) -> None:
    if isinstance(source, str):
        source = SourceConfig(file=source)
    if (source.file is None) == (source.hub is None):
        raise ConfigError(f"{at} must have either 'file' or 'hub'")
    if source.file is not None:
        if source.config is not None or source.revision is not None or source.split != "train":
            raise ConfigError(f"{at}: config, split and revision go with 'hub', not with 'file'")
        if source.part is not None and source.category is None:
            raise ConfigError(f"{at}: 'part' goes with 'category'")
        if not Path(source.file).is_file():
            raise ConfigError(f"{at}: there is no file {source.file}")
    elif source.category is not None or source.part is not None:
        raise ConfigError(f"{at}: category and part go with 'file', not with 'hub'")
    elif not Path(source.hub or "").is_dir() and not _HUB_ID.fullmatch(source.hub or ""):
        raise ConfigError(f"{at}.hub: {source.hub!r} is neither a directory nor an id (owner/name)")


def _check_fields(at: str, fields: FieldsConfig) -> None:
    given = {
        key: template
        for key in ("prompt", "completion", "text")
        if (template := getattr(fields, key)) is not None
    }
    if given.keys() not in ({"prompt", "completion"}, {"text"}):
        raise ConfigError(f"{at} must have prompt and completion, or text alone")
    for key, template in given.items():
        try:
            check(template)
        except DataError as error:
            raise ConfigError(f"{at}.{key}: {error}") from None
