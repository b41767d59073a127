"""The mixture that a configuration names, tokenized and in memory.

All examples are held as tuples of token ids, about 40 bytes a token. What is chosen at random,
the examples of ``data.max_examples`` and those set aside for validation, depends on ``data.seed``,
the sub-dataset's name and the rows alone; examples stay in the order of their rows.

Example::

    mixture = load_mixture(config.data, tokenizer)
    mixture["arith"].train.examples[0].prompt, mixture["arith"].set_aside
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.config.mixture_file import record
from trainer.config.schema import DataConfig, FieldsConfig, SourceConfig, SubDatasetConfig
from trainer.config.templates import render
from trainer.data.examples import Example, Mixture, Split, SubDataset, bos_prefix, encode
from trainer.data.sources import Row, Rows, Sources
from trainer.errors import DataError


def load_mixture(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, max_validation: int | None = None
) -> Mixture:
    """Load all sub-datasets, sorted by name; of validation data the first ``max_validation``.

    Raises :class:`DataError` for a source that is missing, damaged or has no usable example.
    """
    reader = _Reader(tokenizer, Sources(), config, max_validation)
    return {
        name: reader.sub_dataset(name, files) for name, files in sorted(config.sub_datasets.items())
    }


def load_split(
    source: str | Path | SourceConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    limit: int | None = None,
    fields: FieldsConfig | None = None,
) -> Split:
    """Load the first ``limit`` usable examples of one source (all of them by default).

    Raises :class:`DataError` with the place of a row that is wrong, or if none is usable.
    """
    reader = _Reader(tokenizer, Sources(), DataConfig(max_length=max_length), None)
    return reader.split(source, fields, limit)


@dataclass(frozen=True)
class _Taken:
    """Usable examples with their numbers, in the order in which they were taken."""

    examples: Sequence[tuple[int, Example]]
    too_long: int

    def split(self, start: int, stop: int | None, too_long: int) -> Split:
        """Return a slice of the examples in the order of their rows."""
        chosen = sorted(self.examples[start:stop], key=lambda pair: pair[0])
        return Split(examples=tuple(example for _, example in chosen), too_long=too_long)


class _Reader:
    """Reads sources as one configuration has it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sources,
        config: DataConfig,
        max_validation: int | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._prefix = bos_prefix(tokenizer)
        self._sources = sources
        self._config = config
        self._max_validation = max_validation

    def sub_dataset(self, name: str, files: SubDatasetConfig) -> SubDataset:
        """Return a sub-dataset; raises :class:`DataError` with its name and the split."""
        at = "train"
        try:
            train, aside, too_long = self._train(name, files)
            training, set_aside = train.split(aside, None, too_long), aside
            at = "validation"
            if files.validation is not None:
                validation = self.split(files.validation, files.fields, self._max_validation)
            else:
                validation = train.split(0, aside, 0)
                kept = validation.examples[: self._max_validation]
                validation = Split(examples=kept)
            at = "test"
            test = None if files.test is None else self.split(files.test, files.fields, None)
        except DataError as error:
            raise DataError(f"sub-dataset {name!r}, {at}: {error}") from None
        return SubDataset(train=training, validation=validation, test=test, set_aside=set_aside)

    def split(
        self, source: str | Path | SourceConfig, fields: FieldsConfig | None, limit: int | None
    ) -> Split:
        """Return the first ``limit`` usable examples of a source."""
        rows = self._sources.open(source)
        taken = self._take(rows, range(len(rows)), _form(source, fields), limit)
        return taken.split(0, None, taken.too_long)

    def _train(self, name: str, files: SubDatasetConfig) -> tuple[_Taken, int, int]:
        """Return training examples, how many of the first are for validation, and the dropped."""
        config, rows = self._config, self._sources.open(files.train)
        share = None if files.validation is not None else config.validation_share
        if files.validation is None and share is None:
            raise DataError("there is no validation data, and data.validation_share is not set")
        wanted = config.max_examples
        form = _form(files.train, files.fields)
        if share is None and wanted is None:
            taken = self._take(rows, range(len(rows)), form, None)
            return taken, 0, taken.too_long
        generator = np.random.Generator(np.random.PCG64([config.seed, *name.encode()]))
        order = generator.permutation(len(rows)).tolist()
        most = None if wanted is None else wanted + _part(share, wanted)
        taken = self._take(rows, order, form, most)
        found = len(taken.examples)
        aside = _part(share, found if wanted is None else min(found, wanted))
        if found == aside:
            raise DataError(
                f"{rows.name} has {found} usable examples: too few to set some aside for validation"
            )
        return taken, aside, taken.too_long

    def _take(self, rows: Rows, order: Sequence[int], form: _Form, limit: int | None) -> _Taken:
        """Take usable examples in the given order, at most ``limit``."""
        examples: list[tuple[int, Example]] = []
        too_long = 0
        for index in order:
            if limit is not None and len(examples) >= limit:
                break
            try:
                example = form.encode(rows[index], self._tokenizer, self._prefix)
            except DataError as error:
                raise DataError(f"{rows.place(index)}: {error}") from None
            if len(example) > self._config.max_length:
                too_long += 1
            else:
                examples.append((index, example))
        if not examples:
            why = (
                f"all {too_long} examples have more than max_length={self._config.max_length} "
                "tokens"
                if too_long
                else "it has no rows"
            )
            raise DataError(f"{rows.name} has no usable example: {why}")
        return _Taken(examples=examples, too_long=too_long)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """The conversion of a row to an example."""

    fields: FieldsConfig | None
    mixture: bool
    """True if the rows are those of a mixture file."""

    def encode(
        self, row: Row, tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...]
    ) -> Example:
        """Return a row's example; raises :class:`DataError`."""
        if self.fields is not None:
            return encode(_fill(self.fields, row), tokenizer, prefix)
        if self.mixture:
            parts = record(row)
            return encode(parts, tokenizer, prefix, reference=parts["reference"])
        return encode(row, tokenizer, prefix)


def _form(source: str | Path | SourceConfig, fields: FieldsConfig | None) -> _Form:
    mixture = isinstance(source, SourceConfig) and source.category is not None
    return _Form(fields=fields, mixture=mixture)


def _fill(fields: FieldsConfig, row: Row) -> Mapping[str, Any]:
    templates = {
        "prompt": fields.prompt,
        "completion": fields.completion,
        "text": fields.text,
    }
    return {key: render(text, row) for key, text in templates.items() if text is not None}


def _part(share: float | None, count: int) -> int:
    """Return how many of ``count`` examples are set aside: at least one, if there is a share."""
    return 0 if share is None else max(1, round(share * count))
