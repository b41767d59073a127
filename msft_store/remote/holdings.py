"""Where a follower keeps the version that it holds: tensors in memory, or a directory.

Invariants: :meth:`Holding.stage` changes nothing that is held, and raises an error unless every
chunk that differs was decoded and matches its key. :meth:`Staged.switch` then makes it the version
held. In memory the staged chunks take at most the bytes of the chunks that differ, less if few
elements do; an error, or an interrupt, while they are written puts back what was there. In a
directory the version is written beside the one that is held, and a link is renamed.

Example::

    holding = TensorHolding(module)
    staged = holding.stage(catalog, checkpoint, tensors, pairs)
    staged.switch()
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from msft_store.codec.kernels import Bytes, Lanes, view_lanes
from msft_store.errors import MismatchError, StoreError
from msft_store.maintenance.export import export
from msft_store.objects.catalog import Catalog
from msft_store.objects.manifest import Checkpoint, Piece, TensorEntry
from msft_store.objects.safetensors_header import TensorPlace, read_headers
from msft_store.pipeline.decode import Source, empty_like, find_unshared
from msft_store.pipeline.parallel import for_each
from msft_store.remote.followed import Place, Reader
from msft_store.storage.backend import make_folder, read_file, translate_os_errors
from msft_store.tensors.bytes import (
    has_plain_bytes,
    memory_key,
    read_elements,
    torch_dtype,
    write_elements,
)
from msft_store.tensors.files import PREFIX, name_problem, split_files
from msft_store.tensors.matching import check_match
from msft_store.tensors.module_state import split_entries
from msft_store.tensors.names import plain_names
from msft_store.tensors.nested import is_wrapper

Target = torch.nn.Module | Mapping[str, torch.Tensor]
Tensors = Mapping[str, TensorEntry]
_VERSION = re.compile("[0-9a-f]{12}-[0-9a-f]{8}")
"""The name of the directory of a version."""
_PLACE_BYTES = 4
"""Bytes that a patch takes for the place of an element."""


class Holding(Protocol):
    """What a follower holds."""

    def select(self, checkpoint: Checkpoint, tensors: Tensors) -> Tensors:
        """Return the tensors that are kept here, each memory once; refuse what does not match."""

    def reader(self, name: str, entry: TensorEntry, piece: Piece) -> Reader | None:
        """Return a reader of the bytes that are held in the place of a piece, if there are any."""

    def stage(self, catalog: Catalog, checkpoint: Checkpoint, wrong: Sequence[Place]) -> Staged:
        """Decode the chunks that differ, beside what is held."""

    def tied(self, names: set[str]) -> set[str]:
        """Return the names with those of the tensors that share their memory."""

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors that are held."""


class Staged(Protocol):
    """A version that is complete, beside the one that is held."""

    def switch(self) -> None:
        """Make it the version that is held."""


@dataclass(frozen=True, kw_only=True)
class _Patch:
    """New values of the elements of a chunk that differ, in lanes."""

    box: torch.Tensor
    place: Place
    at: NDArray[np.uint32] | None
    """Places of the values; ``None`` if all lanes are given."""
    values: Lanes

    def write(self) -> None:
        """Write the values."""
        data = self.values
        if self.at is not None:
            data = self.held()
            if has_plain_bytes(self.box):
                # They are the tensor's own memory, so writing a whole chunk back is spared.
                data[self.at] = self.values
                return
            data = data.copy()
            data[self.at] = self.values
        write_elements(self.box, self.place.start, data.view(np.uint8))

    def undo(self) -> _Patch:
        """Return the patch that puts back what is there now."""
        held = self.held()
        return replace(self, values=held.copy() if self.at is None else held[self.at])

    def held(self) -> Lanes:
        """Return the chunk as it is now, as a view if possible."""
        stop = self.place.start + self.place.size // self.place.dtype.size
        data = read_elements(self.box, self.place.start, stop)
        held: Lanes = view_lanes(data, self.place.dtype.lane)
        return held


@dataclass(frozen=True)
class _StagedPatches:
    patches: Sequence[_Patch]

    def switch(self) -> None:
        done: list[_Patch] = []
        try:
            for patch in self.patches:
                done.append(patch.undo())
                patch.write()
        except BaseException:
            for patch in reversed(done):
                patch.write()
            raise


class TensorHolding:
    """Tensors that are updated in place, those of a module or a mapping, or of its own."""

    def __init__(self, into: Target | None) -> None:
        self._own = into is None
        self._state: Mapping[str, torch.Tensor] = {}
        if into is not None:
            memory, copies = split_entries(into)
            odd = [*copies, *(name for name, tensor in memory.items() if is_wrapper(tensor))]
            if odd:
                raise MismatchError(
                    f"{', '.join(odd)} cannot be updated in place: they are copies, or tensors of "
                    "another kind than plain ones"
                )
            named = plain_names({name: name for name in memory})
            self._state = {name: memory[own] for name, own in named.items()}

    def select(self, checkpoint: Checkpoint, tensors: Tensors) -> Tensors:
        tensors = plain_names(split_files(tensors)[0])
        if self._own and not self._state:
            self._state = {name: empty_like(entry) for name, entry in tensors.items()}
        check_match(checkpoint, tensors, self._state)
        once = {memory_key(tensor): name for name, tensor in self._state.items()}
        unshared = find_unshared({name: self._state[name].detach() for name in once.values()})
        shared = sorted(name for name in once.values() if name not in unshared)
        if shared:
            raise MismatchError(f"{', '.join(shared)} share a part of their memory")
        return {name: tensors[name] for name in once.values()}

    def reader(self, name: str, entry: TensorEntry, piece: Piece) -> Reader | None:
        return partial(read_elements, self._box(name, piece))

    def _box(self, name: str, piece: Piece) -> torch.Tensor:
        ranges = zip(piece.offset, piece.shape, strict=True)
        tensor = self._state[name].detach()
        return tensor[tuple(slice(first, first + count) for first, count in ranges)]

    def stage(self, catalog: Catalog, checkpoint: Checkpoint, wrong: Sequence[Place]) -> Staged:
        source, patches = Source.of(catalog, checkpoint), dict[int, _Patch]()

        def decode(numbered: tuple[int, Place]) -> None:
            number, place = numbered
            new = source.read(place.name, place.key, place.size, place.dtype)
            box, values = self._box(place.name, place.piece), view_lanes(new, place.dtype.lane)
            patch = _Patch(box=box, place=place, at=None, values=values)
            at = np.flatnonzero(patch.held() != values)
            if at.size * (_PLACE_BYTES + place.dtype.lane) < place.size:
                patch = replace(patch, at=at.astype(np.uint32), values=values[at])
            patches[number] = patch

        for_each(decode, enumerate(wrong))
        return _StagedPatches(list(patches.values()))

    def tied(self, names: set[str]) -> set[str]:
        changed = {memory_key(self._state[name]) for name in names}
        return {name for name, tensor in self._state.items() if memory_key(tensor) in changed}

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            yield name, self._state[name]


class DirectoryHolding:
    """A directory with the versions held last, and the link ``current`` to the one held now."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._current = root / "current"
        self._places: dict[str, tuple[Path, TensorPlace]] = {}
        with translate_os_errors("create", root):
            make_folder(root)
        self._read_places()

    def _read_places(self) -> None:
        self._places = {}
        try:
            folder = self._current.resolve()
            for file, places in read_headers(folder):
                self._places |= {name: (file, place) for name, place in places.items()}
        except (StoreError, OSError):
            # What cannot be read is not held.
            self._places = {}

    def select(self, checkpoint: Checkpoint, tensors: Tensors) -> Tensors:
        return tensors

    def reader(self, name: str, entry: TensorEntry, piece: Piece) -> Reader | None:
        found = self._places.get(name)
        if name.startswith(PREFIX):
            found = self._file(name.removeprefix(PREFIX), entry)
        if found is None or piece.shape != entry.shape:
            return None
        file, place = found
        if (place.dtype, place.shape) != (entry.dtype, entry.shape):
            return None

        def read(start: int, stop: int) -> Bytes:
            width = place.dtype.size
            data = read_file(file, place.offset + start * width, (stop - start) * width)
            return np.frombuffer(data, np.uint8)

        return read

    def _file(self, name: str, entry: TensorEntry) -> tuple[Path, TensorPlace] | None:
        """Return a file of the model as the place of the tensor that holds it."""
        file = self._current / name
        if name_problem(name) or not file.is_file() or file.stat().st_size != entry.nbytes:
            return None
        return file, TensorPlace(dtype=entry.dtype, shape=entry.shape, offset=0)

    def stage(self, catalog: Catalog, checkpoint: Checkpoint, wrong: Sequence[Place]) -> Staged:
        if not wrong and self._places:
            return _StagedPatches([])
        folder = self.root / f"{checkpoint.id[:12]}-{uuid.uuid4().hex[:8]}"
        export(catalog, checkpoint, folder, layout="memory")
        return _StagedFolder(self, folder)

    def switch(self, folder: Path) -> None:
        """Point the link to a folder; delete all others but the one before."""
        before = os.path.basename(os.path.realpath(self._current))
        link = self.root / f".{uuid.uuid4().hex}"
        with translate_os_errors("write", link):
            os.symlink(folder.name, link)
            os.replace(link, self._current)
        self._read_places()
        for path in self.root.iterdir():
            if _VERSION.fullmatch(path.name) and path.name not in {before, folder.name}:
                shutil.rmtree(path, ignore_errors=True)

    def tied(self, names: set[str]) -> set[str]:
        return names & self._places.keys()

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            file, place = self._places[name]
            data = bytearray(read_file(file, place.offset, place.nbytes))
            kind = torch_dtype(place.dtype)
            flat = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
            yield name, flat.reshape(place.shape)


@dataclass(frozen=True)
class _StagedFolder:
    holding: DirectoryHolding
    folder: Path

    def switch(self) -> None:
        self.holding.switch(self.folder)
