"""Read and validate the headers of safetensors files.

The safetensors library maps files into memory, which kills the interpreter if the user truncates a
base's file meanwhile. This module therefore parses only the header, and the data is read by
position. A file is 8 bytes of header length, a JSON header, and the data.

Example::

    for file in find_files(Path("Qwen2.5-0.5B")):
        read_header(file)["lm_head.weight"].offset
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msft_store.errors import BaseError, InvalidInputError
from msft_store.format.dtypes import DType, dtype_by_safetensors
from msft_store.format.strict_json import check_object, check_shape, check_tensor_name, parse
from msft_store.storage.backend import read_file

_MAX_HEADER_BYTES = 100 << 20
INDEX = "model.safetensors.index.json"
_SINGLE_FILES = (
    "model.safetensors",
    "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors",
)
"""Names that the readers of a directory look for first; variants beside them are other models."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """The type of a tensor and the position of its first byte in a safetensors file."""

    dtype: DType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.size


def find_files(path: Path) -> list[Path]:
    """Return the safetensors files of a model: the file itself, or those of a directory.

    Of a directory these are the files that ``from_pretrained`` reads: the single file if there is
    one, otherwise those in the index of shards. Only a directory with neither gives all its files.
    :class:`BaseError` if there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BaseError(
            f"no safetensors file or model directory at {path}; of a model of the Hugging Face hub "
            "name the directory that huggingface_hub.snapshot_download returns"
        )
    single = next((path / name for name in _SINGLE_FILES if (path / name).is_file()), None)
    if single is not None:
        return [single]
    if (path / INDEX).is_file():
        files = [path / name for name in sorted(set(_weight_map(path / INDEX).values()))]
        missing = [str(file) for file in files if file.parent != path or not file.is_file()]
        if missing:
            raise BaseError(f"{path / INDEX} names missing files: {', '.join(missing)}")
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise BaseError(f"no *.safetensors file in {path}{_pickled(path.iterdir())}")
    return files


def read_headers(path: Path) -> list[tuple[Path, dict[str, TensorPlace]]]:
    """Return the files of a model and the tensors of each file.

    :class:`BaseError` if two files hold the same tensor, or an index names a file for a tensor that
    the file does not hold.
    """
    headers = {file: read_header(file) for file in find_files(path)}
    seen: set[str] = set()
    for places in headers.values():
        for name in places:
            if name in seen:
                raise BaseError(f"{path} holds the tensor {name!r} twice")
            seen.add(name)
    if path.is_dir() and not any((path / name) in headers for name in _SINGLE_FILES):
        index = path / INDEX
        for name, file in _weight_map(index).items() if index.is_file() else ():
            if name not in headers[path / file]:
                raise BaseError(f"{index} is wrong: {file} does not hold the tensor {name!r}")
    return list(headers.items())


def read_header(path: Path) -> dict[str, TensorPlace]:
    """Return the tensors of a file; :class:`BaseError` if it is not a valid safetensors file."""
    start = read_file(path, 0, 8)
    if len(start) < 8:
        raise BaseError(f"{path} is too short for a safetensors file")
    (length,) = struct.unpack("<Q", start)
    size = path.stat().st_size
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise BaseError(
            f"{path} is not a safetensors file: its header would be {length} bytes"
            f"{_pickled([path])}"
        )
    try:
        header = check_object(parse(read_file(path, 8, length), "utf-8"))
        header.pop("__metadata__", None)
        places = {
            check_tensor_name(name): _place(entry, 8 + length, size)
            for name, entry in header.items()
        }
        _check_apart(places.values())
        return places
    except InvalidInputError as error:
        raise BaseError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BaseError(f"{path} is not a valid safetensors file: {error}") from None


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor by an index of shards."""
    try:
        listed = check_object(parse(read_file(index, 0, _MAX_HEADER_BYTES), "utf-8")["weight_map"])
        return {name: check_tensor_name(file) for name, file in listed.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise BaseError(f"{index} is not an index of shards: {error!r}") from None


def _pickled(files: Iterable[Path]) -> str:
    """Return advice if some files are pickles by their names, otherwise an empty string."""
    found = sorted(file.name for file in files if file.suffix in _PICKLES)
    return (
        f"; {found[0]} may be a pickle, which can run code and is never read: load the model and "
        "save_pretrained it, which writes safetensors"
        if found
        else ""
    )


def _place(entry: Any, data_start: int, file_size: int) -> TensorPlace:
    (begin, end), shape = check_shape(entry["data_offsets"]), check_shape(entry["shape"])
    place = TensorPlace(
        dtype=dtype_by_safetensors(entry["dtype"]), shape=shape, offset=data_start + begin
    )
    if end - begin != place.nbytes or data_start + end > file_size:
        raise ValueError("a tensor's size does not match its offsets, or exceeds the file")
    return place


def _check_apart(places: Iterable[TensorPlace]) -> None:
    # Overlapping tensors would let a small file claim to be a huge model.
    reached = 0
    for place in sorted(places, key=lambda place: (place.offset, place.nbytes)):
        if place.offset < reached:
            raise ValueError("two tensors overlap")
        reached = place.offset + place.nbytes
