"""A store of many checkpoints, made in seconds, to measure listing and planning.

Manifests and packs are the real ones of a run, written by the package's own encoders; only the
payloads are a few bytes of nothing, so that the store takes little room. A third of each
checkpoint's chunks equals the base, a third the checkpoint before it, and a third is new, each
checkpoint in a pack of its own. Loading tensors from it is not possible.

Example::

    python -m bench.manystore /tmp/many --checkpoints 1000 --chunks 1500
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from msft_store import Store
from msft_store.codec.codecs import SPARSE
from msft_store.format.dtypes import dtype_by_name
from msft_store.format.layout import CHUNK_BYTES, KEY_BYTES, NEWEST, BaseSpan, Record
from msft_store.format.mapping import NOTHING
from msft_store.objects.bases import Base, BaseTensor, base_id, read_base, write_base
from msft_store.objects.manifest import (
    CheckpointFacts,
    Piece,
    TensorEntry,
    checkpoint_content,
    tensor_table,
    write_manifest,
)
from msft_store.objects.packs import PackWriter
from msft_store.objects.tables import TensorTables
from msft_store.storage.backend import LocalBackend, Writer

DTYPE = dtype_by_name("bfloat16")
PAYLOAD = bytes(16)
CHUNKS_PER_TENSOR = 4
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm")
FIRST = 1_700_000_000_000_000_000
SECOND = 1_000_000_000


class UnsyncedBackend(LocalBackend):
    """A folder whose files are written without waiting for the disk."""

    @contextlib.contextmanager
    def writer(self) -> Iterator[Writer]:
        yield _Unsynced(self.root)


class _Unsynced:
    def __init__(self, root: Path) -> None:
        self.position = 0
        self._root = root
        self._parts: list[bytes] = []

    def write(self, data: bytes | memoryview) -> None:
        self._parts.append(bytes(data))
        self.position += len(data)

    def finalize(self, path: str) -> None:
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"".join(self._parts))


class Maker:
    """Makes one checkpoint after the other."""

    def __init__(self, path: Path, chunks: int) -> None:
        self._backend = UnsyncedBackend(path)
        self._random = np.random.default_rng(0)
        count = chunks // CHUNKS_PER_TENSOR
        self._names = [
            f"model.layers.{at // len(PARTS)}.{PARTS[at % len(PARTS)]}.weight"
            for at in range(count)
        ]
        self._shape = (CHUNKS_PER_TENSOR * CHUNK_BYTES // DTYPE.size // 2048, 2048)
        self._base_keys = self._new_keys(count * CHUNKS_PER_TENSOR)
        self._keys = list(self._base_keys)
        self._depths = [0] * len(self._keys)
        self._parent = self._base = self._write_base(path)
        self._tables = TensorTables(self._backend, partial(read_base, self._backend))

    def _new_keys(self, count: int) -> list[bytes]:
        data = self._random.bytes(count * KEY_BYTES)
        return [data[at : at + KEY_BYTES] for at in range(0, len(data), KEY_BYTES)]

    def _write_base(self, path: Path) -> str:
        nbytes = CHUNKS_PER_TENSOR * CHUNK_BYTES
        tensors = {
            name: BaseTensor(
                dtype=DTYPE,
                shape=self._shape,
                file=0,
                offset=8 + number * nbytes,
                keys=self._of_tensor(self._base_keys, number),
            )
            for number, name in enumerate(self._names)
        }
        file = path / "absent.safetensors"
        files = ((str(file), 8 + len(tensors) * nbytes),)
        base = Base(id=base_id(tensors), path=str(file), files=files, tensors=tensors)
        write_base(self._backend, base)
        return base.id

    @staticmethod
    def _of_tensor(keys: list[bytes], number: int) -> tuple[bytes, ...]:
        return tuple(keys[number * CHUNKS_PER_TENSOR : (number + 1) * CHUNKS_PER_TENSOR])

    def add(self, step: int) -> None:
        """Write the pack and the manifest of the next checkpoint."""
        fate = self._random.integers(3, size=len(self._keys))
        fresh = np.flatnonzero(fate == 0).tolist()
        for at in np.flatnonzero(fate == 1).tolist():
            self._keys[at], self._depths[at] = self._base_keys[at], 0
        with self._backend.writer() as writer:
            pack = PackWriter(writer, NEWEST)
            for at, key in zip(fresh, self._new_keys(len(fresh)), strict=True):
                pack.append(self._record(at, key, pack.position), PAYLOAD)
                self._keys[at] = key
            pack.finalize()
        self._write_manifest(step, len(fresh))

    def _record(self, at: int, key: bytes, offset: int) -> Record:
        # Every other change is one of the parent's chunk, where that one needs the base alone.
        name, start = self._names[at // CHUNKS_PER_TENSOR], at % CHUNKS_PER_TENSOR
        span = BaseSpan(tensor=name, start=start * CHUNK_BYTES // DTYPE.size)
        deep = at % 2 == 1 and self._depths[at] == 1
        self._depths[at] = 2 if deep else 1
        return Record(
            key=key,
            offset=offset,
            length=len(PAYLOAD),
            size=CHUNK_BYTES,
            codec=SPARSE.code,
            dtype=DTYPE.code,
            depth=2 if deep else 1,
            base=self._base,
            ref_key=self._keys[at] if deep else self._base_keys[at],
            reference=None if deep else span,
        )

    def _write_manifest(self, step: int, fresh: int) -> None:
        table = {
            name: TensorEntry(
                dtype=DTYPE,
                shape=self._shape,
                pieces=(
                    Piece(
                        offset=(0, 0), shape=self._shape, keys=self._of_tensor(self._keys, number)
                    ),
                ),
            )
            for number, name in enumerate(self._names)
        }
        line = tensor_table(table)
        content = checkpoint_content(
            CheckpointFacts.of(
                step=step,
                metrics={"loss": float(self._random.random()), "accuracy": step / 1e4},
                metadata={"epoch": step / 10},
            ),
            parent=self._parent,
            base=self._base,
            tensors=line,
            logical_bytes=sum(entry.nbytes for entry in table.values()),
        )
        written = write_manifest(
            self._backend,
            content,
            self._tables.encode(line, self._base, NOTHING),
            created=FIRST + step * SECOND,
            stored_bytes=fresh * len(PAYLOAD),
            unreferenced_bytes=0,
        )
        self._parent = written.id


def make(path: Path, checkpoints: int, chunks: int) -> None:
    """Make a store of so many checkpoints, each of so many chunks."""
    Store.create(path)
    maker = Maker(path, chunks)
    for step in range(checkpoints):
        maker.add(step)
    os.sync()


def main() -> None:
    """Make a store as the command line says."""
    parser = argparse.ArgumentParser(description="Make a store of many checkpoints.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=1500)
    options = parser.parse_args()
    make(options.path, options.checkpoints, options.chunks)


if __name__ == "__main__":
    main()
