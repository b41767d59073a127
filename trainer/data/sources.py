"""Rows from JSON Lines, Parquet, mixture files and data sets of the hub, by their number.

A row is parsed when it is asked for, so an error names a bad row only if the row is used. Nothing
is streamed: a file, or the index of a data set, is opened whole. So every row keeps its number,
which is the identity of its example.

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from trainer.config.mixture_file import normalize_row, read_mixture
from trainer.config.schema import SourceConfig
from trainer.errors import DataError, first_line

Row = Mapping[str, Any]


class Rows:
    """The rows of a source by number, from 0; messages count from 1.

    Args:
        name: The source's name in messages.
        items: The rows as the source holds them.
        parse: Makes a row of an item; raises :class:`DataError` without the row's place.
        numbers: The number of each item in the source, if some are left out.
        unit: The word for an item in messages.
    """

    def __init__(
        self,
        name: str,
        items: Sequence[Any],
        parse: Callable[[Any], Row],
        *,
        numbers: Sequence[int] | None = None,
        unit: str = "row",
    ) -> None:
        self.name = name
        self._items = items
        self._parse = parse
        self._numbers = range(len(items)) if numbers is None else numbers
        self._unit = unit

    def place(self, index: int) -> str:
        """Return where a row is, for messages."""
        return f"{self.name}, {self._unit} {self._numbers[index] + 1}"

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Row:
        """Return a row; raises :class:`DataError` without its place if it is damaged."""
        return self._parse(self._items[index])


class Sources:
    """Opens sources; a mixture file is read once."""

    def __init__(self) -> None:
        self._mixtures: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}

    def open(self, source: str | Path | SourceConfig) -> Rows:
        """Return the rows of a source; raises :class:`DataError` if it cannot be opened."""
        if not isinstance(source, SourceConfig):
            source = SourceConfig(file=str(source))
        if source.hub is not None:
            return Rows(_hub_name(source), _load_hub(source), dict)
        path = Path(source.file or "")
        if source.category is not None:
            rows = self._read_category(source)
            return Rows(str(path), [*rows.values()], normalize_row, numbers=[*rows])
        if path.suffix.lower() == ".parquet":
            table = _load_parquet(path)
            # A slice makes Python objects of one row only.
            return Rows(
                str(path), range(table.num_rows), lambda index: table.slice(index, 1).to_pylist()[0]
            )
        return _open_lines(path)

    def _read_category(self, source: SourceConfig) -> dict[int, Row]:
        """Return the rows of a category by their numbers in the mixture file."""
        key = (source.file or "", source.part or "train")
        if key not in self._mixtures:
            categories: dict[str, dict[int, Row]] = {}
            for number, row in enumerate(read_mixture(Path(key[0]), key[1])):
                categories.setdefault(row["category"], {})[number] = row
            self._mixtures[key] = categories
        return self._mixtures[key].get(source.category or "", {})


def _open_lines(path: Path) -> Rows:
    """Return the lines of a JSON Lines file that are not blank."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    found = {number: line for number, line in enumerate(lines) if line.strip()}
    return Rows(str(path), [*found.values()], _parse_line, numbers=[*found], unit="line")


def _parse_line(line: bytes) -> Row:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        # The error's own text counts lines, too, and would contradict the place in the file.
        raise DataError(f"not valid JSON ({error.msg}, character {error.pos + 1})") from None
    except ValueError as error:
        raise DataError(f"not valid JSON ({error})") from None
    except RecursionError:
        raise DataError("not usable JSON (nested too deeply)") from None
    if not isinstance(row, dict):
        raise DataError(f"a line must be a JSON object, this one is a {type(row).__name__}")
    return row


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
        raise DataError(f"{path} is not a sound Parquet file: {first_line(error)}") from None


def _load_hub(source: SourceConfig) -> Any:
    name = _hub_name(source)
    try:
        import datasets  # noqa: PLC0415
    except ImportError:
        raise DataError(_missing("datasets", f"the data set {name}")) from None
    try:
        found = _load_with(datasets, source)
    except Exception as error:  # the data set's own code may raise any error
        raise DataError(f"the data set {name} cannot be loaded: {first_line(error)}") from None
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
