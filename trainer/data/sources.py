"""Rows from JSON Lines, Parquet, mixture files and data sets of the hub, by their number.

A row is read when it is asked for, so that a bad one is named when, and only if, it is used. Rows
and lines count from 1. Nothing is streamed: a file, or the index of a data set, is opened whole, so
every row keeps its number, which is the identity of its example.

Parquet needs ``pyarrow``, data sets of the hub need ``datasets``; both are in
``pip install 'msft-store[data]'``.

Example::

    sources = Sources()
    rows = sources.open(SourceConfig(hub="openai/gsm8k", config="main", split="train"))
    rows.place(0), rows[0]                # "openai/gsm8k (main, train), row 1", {"question": …}
"""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from trainer.config.mixture_file import flatten_row, read_mixture
from trainer.config.schema import SourceConfig
from trainer.errors import DataError

Row = Mapping[str, Any]


class Rows(ABC):
    """Rows by their number, from 0; in messages from 1."""

    unit = "row"

    def __init__(self, name: str) -> None:
        """Name the rows for messages."""
        self.name = name

    def place(self, index: int) -> str:
        """Return where a row is, for messages."""
        return f"{self.name}, {self.unit} {index + 1}"

    @abstractmethod
    def __len__(self) -> int:
        """Return how many there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Row:
        """Return a row; raises :class:`DataError` without its place if it is none."""


class Sources:
    """Opens sources, each mixture file once."""

    def __init__(self) -> None:
        """Begin with nothing read."""
        self._mixtures: dict[tuple[str, str], dict[str, list[tuple[int, Row]]]] = {}

    def open(self, source: str | Path | SourceConfig) -> Rows:
        """Return the rows of a source; raises :class:`DataError` if it cannot be opened."""
        if not isinstance(source, SourceConfig):
            source = SourceConfig(file=str(source))
        if source.hub is not None:
            return _Table(_hub_name(source), _load_hub(source))
        path = Path(source.file or "")
        if source.category is not None:
            return _MixtureRows(path, self._category(source))
        if path.suffix.lower() == ".parquet":
            return _Table(str(path), _ArrowRows(_load_parquet(path)))
        return _Lines(path)

    def _category(self, source: SourceConfig) -> list[tuple[int, Row]]:
        key = (source.file or "", source.part or "train")
        if key not in self._mixtures:
            categories: dict[str, list[tuple[int, Row]]] = {}
            for index, row in enumerate(read_mixture(Path(key[0]), key[1])):
                categories.setdefault(row["category"], []).append((index, row))
            self._mixtures[key] = categories
        return self._mixtures[key].get(source.category or "", [])


class _Lines(Rows):
    """The lines of a JSON Lines file that are not blank."""

    unit = "line"

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        try:
            lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        except FileNotFoundError:
            raise DataError(f"{path} does not exist") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        self._lines = [(i, line) for i, line in enumerate(lines) if line.strip()]

    def place(self, index: int) -> str:
        return super().place(self._lines[index][0])

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        try:
            record = json.loads(self._lines[index][1].decode())
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 ({error.reason})") from None
        except ValueError as error:
            raise DataError(f"not valid JSON ({error})") from None
        except RecursionError:
            raise DataError("not usable JSON (nested too deeply)") from None
        if not isinstance(record, dict):
            raise DataError(f"a line must be a JSON object, this one is a {type(record).__name__}")
        return record


class _MixtureRows(Rows):
    """The rows of one category of a mixture file."""

    def __init__(self, path: Path, rows: Sequence[tuple[int, Row]]) -> None:
        super().__init__(str(path))
        self._rows = rows

    def place(self, index: int) -> str:
        return super().place(self._rows[index][0])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return flatten_row(self._rows[index][1])


class _Table(Rows):
    """The rows of something that has columns."""

    def __init__(self, name: str, table: Any) -> None:
        super().__init__(name)
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        row: Row = self._table[index]
        return row


class _ArrowRows:
    """An Arrow table's rows, without making Python objects of all of them at once."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Row:
        (row,) = self._table.slice(index, 1).to_pylist()
        return dict(row)


def _load_parquet(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        import pyarrow as arrow  # noqa: PLC0415
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        raise DataError(_missing("pyarrow", f"the Parquet file {path}")) from None
    try:
        return parquet.read_table(path, partitioning=None)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a sound Parquet file: {_first_line(error)}") from None


def _load_hub(source: SourceConfig) -> Any:
    name = _hub_name(source)
    try:
        import datasets  # noqa: PLC0415
    except ImportError:
        raise DataError(_missing("datasets", f"the data set {name}")) from None
    try:
        found = _load_with(datasets, source)
    except Exception as error:  # a hub, its files and its builders raise what they like
        raise DataError(f"the data set {name} cannot be loaded: {_first_line(error)}") from None
    if not isinstance(found, datasets.Dataset):
        raise DataError(f"the data set {name} is a {type(found).__name__}, not a table of rows")
    return found


def _load_with(datasets: ModuleType, source: SourceConfig) -> Any:
    directory = Path(source.hub or "")
    if (directory / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(directory))
        if source.split not in splits:
            raise DataError(f"it has no split {source.split!r}, only {', '.join(splits)}")
        return splits[source.split]
    if (directory / "state.json").is_file():
        return datasets.load_from_disk(str(directory))
    return datasets.load_dataset(
        source.hub, name=source.config, split=source.split, revision=source.revision
    )


def _hub_name(source: SourceConfig) -> str:
    return f"{source.hub} ({', '.join(filter(None, (source.config, source.split)))})"


def _missing(package: str, what: str) -> str:
    return f"{what} needs {package}, which is not installed: pip install 'msft-store[data]'"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
