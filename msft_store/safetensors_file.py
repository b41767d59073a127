"""The headers of safetensors files, read at positions and checked before anything is believed.

The library's own reader maps files into memory, which kills the interpreter when a file is
truncated under it; a base is somebody else's file, so only the header is parsed here and the data
is read by position. Format: 8 bytes of header length, a JSON header, then the data.

Example::

    for file in find_files(Path("Qwen2.5-0.5B")):
        read_header(file)["lm_head.weight"].offset
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msft_store.backend import read_file
from msft_store.dtypes import DType, by_safetensors
from msft_store.errors import BaseError, InvalidInputError

_MAX_HEADER_BYTES = 100 << 20
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Where a tensor's bytes stand in a safetensors file."""

    dtype: DType
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.size


def find_files(path: Path) -> list[Path]:
    """Return the safetensors files of a model: the file itself, or those of a directory.

    Where a directory has an index of shards, the files that it names. :class:`BaseError` if there
    are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BaseError(f"no safetensors file or model directory at {path}")
    index = path / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            files = [path / str(name) for name in names]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise BaseError(f"{index} is not an index of shards: {error!r}") from None
        missing = [str(file) for file in files if file.parent != path or not file.is_file()]
        if missing:
            raise BaseError(f"{index} names files that are not there: {', '.join(missing)}")
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise BaseError(f"no *.safetensors file in {path}")
    return files


def read_header(path: Path) -> dict[str, TensorPlace]:
    """Return the tensors of a file; :class:`BaseError` if it is not a sound safetensors file."""
    start = read_file(path, 0, 8)
    if len(start) < 8:
        raise BaseError(f"{path} is too short for a safetensors file")
    (length,) = struct.unpack("<Q", start)
    size = path.stat().st_size
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise BaseError(f"{path} is not a safetensors file: its header would be {length} bytes")
    try:
        header = json.loads(read_file(path, 8, length))
        header.pop("__metadata__", None)
        return {name: _place(entry, 8 + length, size) for name, entry in header.items()}
    except InvalidInputError as error:
        raise BaseError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BaseError(f"{path} is not a sound safetensors file: {error}") from None


def _place(entry: Any, data_start: int, file_size: int) -> TensorPlace:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
        raise ValueError("an offset or a shape is not a natural number")
    place = TensorPlace(
        dtype=by_safetensors(entry["dtype"]), shape=shape, offset=data_start + begin
    )
    if end - begin != place.nbytes or data_start + end > file_size:
        raise ValueError("a tensor does not fit its place in the file")
    return place
