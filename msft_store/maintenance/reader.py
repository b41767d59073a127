"""Read tensors of a checkpoint, or parts of them, with the methods of an open safetensors file.

Invariants: only chunks that hold a wanted element, or an element of a row with one, are read; every
chunk is verified. Threads may share a reader. It reads one tensor or slice at a time, in several
threads, so that nothing but the results and a few chunks is in memory.

Example::

    with store.open_checkpoint("best") as reader:
        for name in reader.keys():
            print(name, reader.get_slice(name).get_shape())
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from msft_store.errors import MismatchError
from msft_store.maintenance.export_files import Content, select_content
from msft_store.maintenance.export_names import Layout
from msft_store.maintenance.original_layout import Assembled
from msft_store.objects.catalog import Catalog, read_consistently
from msft_store.objects.manifest import Checkpoint, TensorEntry, whole_entry
from msft_store.pipeline.decode import Source, decode_state
from msft_store.pipeline.reshard import decode_boxes
from msft_store.storage.backend import Backend
from msft_store.tensors.boxes import Box
from msft_store.tensors.bytes import torch_dtype
from msft_store.tensors.files import split_files
from msft_store.tensors.matching import format_names

_Ranges = tuple[tuple[int, int], ...]
"""The first index and the length of a box, for each dimension."""


class TensorSlice:
    """A tensor that is read when it is indexed, as ``safe_open(...).get_slice(name)`` returns it.

    Integers and slices select what is read; lists, tensors and ``None`` select from what was read.
    """

    def __init__(self, entry: TensorEntry, read: Callable[[_Ranges], torch.Tensor]) -> None:
        self._entry = entry
        self._read = read

    def get_shape(self) -> list[int]:
        """Return the shape of the whole tensor."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """Return the dtype by its name in safetensors, or by the store's if it has none there."""
        return self._entry.dtype.safetensors or self._entry.dtype.name

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return a part of the tensor; the index is one that torch takes.

        Raises:
            IndexError: As torch raises it.
            CorruptedError: Stored data of this part is damaged.
        """
        ranges, rest = _split_index(index, self._entry.shape)
        return self._read(ranges)[rest]


@dataclass(frozen=True, kw_only=True)
class CheckpointReader:
    """The tensors of one checkpoint, with the methods of ``safetensors.safe_open``.

    Attributes:
        checkpoint: The checkpoint that is read.
        content: The content of an export of it, if the names and shapes are those of an export.
    """

    checkpoint: Checkpoint
    content: Content | None = field(repr=False)
    _tensors: Mapping[str, TensorEntry] = field(repr=False)
    _stored: Mapping[str, TensorEntry] = field(repr=False)
    _assembled: Mapping[str, Assembled] = field(repr=False)
    _source: Source = field(repr=False)
    _backend: Backend = field(repr=False)
    _device: torch.device = field(repr=False)
    _reading: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: no file stays open between two reads."""

    def keys(self) -> list[str]:
        """Return the names of the tensors, sorted."""
        return sorted(self._tensors)

    def metadata(self) -> dict[str, str]:
        """Return id, step, metrics and tags of the checkpoint as strings, the last two in JSON."""
        found = self.checkpoint
        step = {} if found.step is None else {"step": str(found.step)}
        metrics = json.dumps(dict(found.metrics), sort_keys=True)
        tags = json.dumps(list(found.tags))
        return {"format": "pt", "checkpoint": found.id, "metrics": metrics, "tags": tags, **step}

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, bit-exact and verified.

        Raises:
            MismatchError: The checkpoint lacks the name.
            CorruptedError: Stored data of the tensor is damaged.
        """
        return self.get_slice(name)[...]

    def get_slice(self, name: str) -> TensorSlice:
        """Return a tensor that is read when it is indexed.

        Raises:
            MismatchError: The checkpoint lacks the name.
        """
        if name not in self._tensors:
            raise MismatchError(
                f"{self._source.name} has no tensor {name!r}, but {format_names(self.keys())}"
            )
        return TensorSlice(self._tensors[name], lambda ranges: self._read(name, ranges))

    def _read(self, name: str, ranges: _Ranges) -> torch.Tensor:
        entry = self._tensors[name]
        sizes = tuple(size for _, size in ranges)

        def read() -> torch.Tensor:
            if name in self._assembled:
                whole = read_assembled(
                    self._source, self._stored, self._assembled[name], self._device
                )
                return whole[tuple(slice(first, first + size) for first, size in ranges)]
            out = torch.empty(sizes, dtype=torch_dtype(entry.dtype), device=self._device)
            if sizes == entry.shape:
                decode_state(self._source, {name: entry}, {name: out}, fresh=True)
            else:
                _read_box(self._source, name, entry, tuple(first for first, _ in ranges), out)
            return out

        with self._reading:
            return read_consistently(self._backend, read)


def open_reader(
    catalog: Catalog, checkpoint: Checkpoint, *, layout: Layout, device: torch.device
) -> CheckpointReader:
    """Return a reader of the tensors as they were saved, or as the files of an export have them."""
    stored = split_files(catalog.tensors(checkpoint))[0]
    content = None
    if layout == "files":
        content = select_content(catalog, checkpoint, stored, None, None)
    return CheckpointReader(
        checkpoint=checkpoint,
        content=content,
        _tensors=stored if content is None else content.chosen.tensors,
        _stored=stored,
        _assembled={} if content is None else content.chosen.assembled,
        _source=Source.of(catalog, checkpoint),
        _backend=catalog.backend,
        _device=device,
    )


def read_assembled(
    source: Source,
    stored: Mapping[str, TensorEntry],
    tensor: Assembled,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return a tensor that consists of parts of a checkpoint's tensors."""
    entry = tensor.entry
    out = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device=device)
    boxes = []
    for name, part in tensor.parts:
        first, size = part.in_base((0,) * len(part.shape), part.shape)
        place = tuple(slice(a, a + n) for a, n in zip(first, size, strict=True))
        box = out.view(part.check(entry.shape))[place]
        box = box if part.axes is None else box.permute(part.axes)
        shape = stored[name].shape
        boxes.append(Box(name=name, shape=shape, offset=part.offset, tensor=box.view(part.shape)))
    decode_boxes(source, stored, boxes)
    return out


def _read_box(
    source: Source, name: str, entry: TensorEntry, first: tuple[int, ...], out: torch.Tensor
) -> None:
    """Fill ``out`` with a box of a tensor that begins at ``first``."""
    if len(entry.pieces) == 1:
        entry, first, out = _merge_leading(entry, first, out)
    decode_boxes(
        source, {name: entry}, [Box(name=name, shape=entry.shape, offset=first, tensor=out)]
    )


def _merge_leading(
    entry: TensorEntry, first: tuple[int, ...], out: torch.Tensor
) -> tuple[TensorEntry, tuple[int, ...], torch.Tensor]:
    """View the dimensions of which the box has one index, and the next one, as one.

    Rows of the box are then smaller, so that fewer chunks have a row with a wanted element.
    """
    sizes = tuple(out.shape)
    last = next((axis for axis, size in enumerate(sizes) if size != 1), len(sizes) - 1)
    rest = entry.shape[last + 1 :]
    rows = math.prod(entry.shape[: last + 1])
    at = 0
    for index, count in zip(first[: last + 1], entry.shape, strict=False):
        at = at * count + index
    merged = whole_entry(entry.dtype, (rows, *rest), entry.pieces[0].keys)
    return merged, (at, *first[last + 1 :]), out.view(sizes[last], *sizes[last + 1 :])


def _split_index(index: Any, shape: tuple[int, ...]) -> tuple[_Ranges, tuple[Any, ...]]:
    """Return the box that an index selects from, and the index of the result in that box."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(item is None or _is_plain(item) for item in items):
        # Lists, tensors and masks: torch selects from the whole tensor.
        return tuple((0, count) for count in shape), tuple(items)
    used = sum(item is not None and item is not Ellipsis for item in items)
    if used > len(shape):
        raise IndexError(f"too many indices for tensor of dimension {len(shape)}")
    if Ellipsis not in items:
        items.append(Ellipsis)
    ranges: list[tuple[int, int]] = []
    rest: list[Any] = []
    for item in items:
        if item is None:
            rest.append(None)
            continue
        if item is Ellipsis:
            left = shape[len(ranges) :][: len(shape) - used]
            ranges += [(0, count) for count in left]
            rest += [slice(None)] * len(left)
            continue
        count = shape[len(ranges)]
        if isinstance(item, slice):
            begin, end, step = item.indices(count)
            if step < 1:
                raise ValueError("step must be greater than zero")
            ranges.append((begin, max(end - begin, 0)))
            rest.append(slice(None, None, step))
        else:
            if not -count <= item < count:
                raise IndexError(f"index {item} is out of bounds for a dimension of size {count}")
            ranges.append((item % count, 1))
            rest.append(0)
    return tuple(ranges), tuple(rest)


def _is_plain(item: Any) -> bool:
    return isinstance(item, slice) or item is Ellipsis or type(item) is int
