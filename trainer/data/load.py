"""Load the mixture of a configuration: tokenized examples, all in memory.

An example takes about 40 bytes a token. ``data.max_examples`` and ``data.validation_share`` choose
examples at random. The choice depends only on ``data.seed``, the sub-dataset's name and the rows.
The chosen examples stay in the order of their rows.

Example::

    mixture = load_mixture(config.data, tokenizer)
    mixture["arith"].train.examples[0].prompt, mixture["arith"].set_aside
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from trainer.config.mixture_file import to_completion_row
from trainer.config.schema import DataConfig, FieldsConfig, SourceConfig, SubDatasetConfig
from trainer.config.templates import render
from trainer.data.batches import generator
from trainer.data.encode import encode
from trainer.data.examples import Example, Mixture, Split, SubDataset
from trainer.data.sources import Row, Rows, Sources
from trainer.data.tokens import bos_prefix
from trainer.errors import DataError


def load_mixture(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, max_validation: int | None = None
) -> Mixture:
    """Load all sub-datasets, sorted by name; of validation data the first ``max_validation``.

    Raises :class:`DataError` if a source is missing, damaged or has no usable example.
    """
    loader = _Loader(config, tokenizer, max_validation)
    return {name: loader.load(name, files) for name, files in sorted(config.sub_datasets.items())}


_Numbered = list[tuple[int, Example]]


@dataclass(kw_only=True)
class _Taken:
    """The usable examples of a source with the numbers of their rows, as they were asked for."""

    examples: _Numbered = field(default_factory=list)
    too_long: int = 0
    cut: int = 0

    def split(self, start: int = 0, *, rows: Rows | None = None) -> Split:
        """Return the examples from the ``start``-th on, if wanted with their rows."""
        return Split(
            examples=_in_order(self.examples[start:], rows), too_long=self.too_long, cut=self.cut
        )


class _Loader:
    """Loads sub-datasets by one configuration."""

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_validation: int | None
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._prefix = bos_prefix(tokenizer)
        self._max_validation = max_validation
        self._sources = Sources()

    def load(self, name: str, files: SubDatasetConfig) -> SubDataset:
        """Load a sub-dataset; an error names it and the split."""
        split = "train"
        try:
            train, set_aside = self._load_train(name, files)
            split = "validation"
            validation = Split(examples=set_aside[: self._max_validation])
            limit = self._max_validation
            if files.validation is not None:
                validation = self._load_split(files.validation, files.fields, limit, rows=True)
            split = "test"
            test = None
            if files.test is not None:
                test = self._load_split(files.test, files.fields, None, rows=True)
        except DataError as error:
            raise DataError(f"sub-dataset {name!r}, {split}: {error}") from None
        return SubDataset(train=train, validation=validation, test=test, set_aside=len(set_aside))

    def _load_split(
        self,
        source: str | SourceConfig,
        fields: FieldsConfig | None,
        limit: int | None,
        *,
        rows: bool = False,
    ) -> Split:
        """Load the first ``limit`` usable examples of a source, if wanted with their rows."""
        found = self._sources.open(source)
        taken = self._take(found, range(len(found)), source, fields, limit)
        return taken.split(rows=found if rows else None)

    def _load_train(self, name: str, files: SubDatasetConfig) -> tuple[Split, tuple[Example, ...]]:
        """Load the training examples, and those of the same source that are set aside."""
        config, source = self._config, files.train
        share = None if files.validation is not None else config.validation_share
        wanted = config.max_examples
        if share is None and wanted is None:
            return self._load_split(source, files.fields, None), ()
        rows = self._sources.open(source)
        order = generator(config.seed, *name.encode()).permutation(len(rows)).tolist()
        limit = None if wanted is None else wanted + _count_set_aside(share, wanted)
        taken = self._take(rows, order, source, files.fields, limit)
        found = len(taken.examples)
        count = _count_set_aside(share, found if wanted is None else min(found, wanted))
        if found == count:
            raise DataError(
                f"{rows.name} has {found} usable examples: too few to set some aside for validation"
            )
        return taken.split(count), _in_order(taken.examples[:count], rows)

    def _take(
        self,
        rows: Rows,
        order: Sequence[int],
        source: str | SourceConfig,
        fields: FieldsConfig | None,
        limit: int | None,
    ) -> _Taken:
        """Encode rows in the given order until ``limit`` are usable."""
        max_length = self._config.max_length
        taken = _Taken()
        for index in order:
            if limit is not None and len(taken.examples) >= limit:
                break
            try:
                example = self._encode(rows[index], source, fields)
            except DataError as error:
                damage = DataError(f"{rows.place(index)}: {error}")
                raise self._first_error(rows, index, source, fields) or damage from None
            fitting: Example | None = example
            if len(example) > max_length:
                cuts = self._config.over_length == "truncate"
                fitting = example.cut(max_length, self._tokenizer) if cuts else None
            if fitting is None:
                taken.too_long += 1
            else:
                taken.cut += fitting is not example
                taken.examples.append((index, fitting))
        if not taken.examples:
            why = "it has no rows"
            if taken.too_long:
                why = f"all {taken.too_long} examples have more than max_length={max_length} tokens"
            raise DataError(f"{rows.name} has no usable example: {why}")
        return taken

    def _first_error(
        self, rows: Rows, before: int, source: str | SourceConfig, fields: FieldsConfig | None
    ) -> DataError | None:
        """Return the error of the first damaged row before another one, with its place.

        So the message is the same for every order in which rows are taken.
        """
        for index in range(before):
            try:
                self._encode(rows[index], source, fields)
            except DataError as error:
                return DataError(f"{rows.place(index)}: {error}")
        return None

    def _encode(self, row: Row, source: str | SourceConfig, fields: FieldsConfig | None) -> Example:
        reference = None
        if fields is not None and fields.messages is not None:
            if fields.messages not in row:
                raise DataError(
                    f"there is no {fields.messages!r}; the row has the columns "
                    + ", ".join(map(str, row))
                )
            row = {"messages": row[fields.messages], "tools": row.get("tools")}
        elif fields is not None:
            templates = vars(fields).items()
            row = {key: render(text, row) for key, text in templates if text is not None}
        elif isinstance(source, SourceConfig) and source.category is not None:
            row = to_completion_row(row)
            reference = row["reference"]
        return encode(
            row,
            self._tokenizer,
            self._prefix,
            reference=reference,
            loss_on=self._config.loss_on,
        )


def _in_order(examples: _Numbered, rows: Rows | None = None) -> tuple[Example, ...]:
    """Return examples in the order of their rows, and with them if these are given."""
    ordered = sorted(examples, key=lambda pair: pair[0])
    if rows is None:
        return tuple(example for _, example in ordered)
    return tuple(replace(example, row=rows[index]) for index, example in ordered)


def _count_set_aside(share: float | None, count: int) -> int:
    """Return how many of ``count`` examples are set aside: at least one, if there is a share."""
    return 0 if share is None else max(1, round(share * count))
