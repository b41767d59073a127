"""Export a checkpoint to an ordinary directory of safetensors files.

The files that were recorded with a checkpoint (configuration, tokenizer) are written, and what they
lack is copied from the base if that is a model directory, so that ``from_pretrained`` loads the
result (:mod:`msft_store.maintenance.export_files`). ``like`` names another directory with such
files, which takes the place of both.

The metadata of a checkpoint controls its export under the key ``export``: tensors of the training
state are left out (:mod:`msft_store.maintenance.export_names`), and the settings of an ``adapter``
give a PEFT directory. If there is a configuration, a tied tensor is written once, under its name in
the files of the base, and ``from_pretrained`` ties it again.

Invariant: the directory appears complete or not at all. A killed export leaves a hidden directory
beside it, which the next export to the same path removes.

Example::

    export(catalog, checkpoint, Path("my-model"))
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import os
import re
import shutil
import struct
import uuid
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msft_store.codec.kernels import Bytes
from msft_store.errors import InvalidInputError
from msft_store.format.layout import canonical_json
from msft_store.maintenance.export_files import read_place, select_content
from msft_store.maintenance.export_names import Layout
from msft_store.maintenance.original_layout import Assembled
from msft_store.maintenance.reader import read_assembled
from msft_store.objects.catalog import Catalog, refuse_inside_store
from msft_store.objects.manifest import Checkpoint, TensorEntry
from msft_store.objects.safetensors_header import INDEX
from msft_store.pipeline.decode import Source, decode_chunks
from msft_store.storage.backend import (
    LocalBackend,
    make_folder,
    move_folder,
    translate_os_errors,
    write_atomic,
)
from msft_store.storage.quota import QuotaBackend
from msft_store.tensors.bytes import view_bytes
from msft_store.tensors.files import split_files

_LOG = logging.getLogger(__name__)
_SINGLE, _ADAPTER = "model.safetensors", "adapter_model.safetensors"
_METADATA = "__metadata__"
_SURROGATE = re.compile("[\ud800-\udfff]")


def export(
    catalog: Catalog,
    checkpoint: Checkpoint,
    folder: Path,
    *,
    like: Path | None = None,
    layout: Layout | None = None,
    shard_bytes: int = 1 << 30,
) -> list[Path]:
    """Write a checkpoint to a new directory; return its files.

    A safetensors file has at most ``shard_bytes``, unless one tensor is larger; only a few chunks
    of it are in memory at a time. The other files are the recorded ones and those of the base, or
    those of ``like``. Reasons why ``from_pretrained`` may not give the model are logged. Raise
    :class:`InvalidInputError` if the directory is not empty or inside a store, ``like`` has no
    configuration, or safetensors has no such dtype or name.
    """
    refuse_inside_store(folder, "export to", itself=True)
    with translate_os_errors("read", folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InvalidInputError(f"{folder} is not empty; export to a new directory")
    stored = split_files(catalog.tensors(checkpoint))[0]
    content = select_content(catalog, checkpoint, stored, like, layout)
    chosen = content.chosen
    written = [chosen.tensors, *(part.tensors for part in chosen.further.values())]
    for name, entry in (pair for part in written for pair in part.items()):
        if entry.dtype.safetensors is None:
            raise InvalidInputError(
                f"safetensors has no dtype for {entry.dtype.name} (tensor {name!r}); "
                "load the checkpoint and convert it"
            )
        if name == _METADATA or _SURROGATE.search(name):
            raise InvalidInputError(
                f"safetensors has no tensor {name!a}; load the checkpoint and rename it"
            )
    for doubt in content.doubts:
        _LOG.warning("%s: %s", folder, doubt)
    with _temporary_folder(folder.absolute()) as partial:
        backend = LocalBackend(partial)
        # A chunk that a manifest names many times is stored once but exported each time.
        QuotaBackend(backend).require_space(chosen.nbytes)
        source = _Contents(
            source=Source.of(catalog, checkpoint), stored=stored, assembled=chosen.assembled
        )
        if content.is_adapter:
            # An adapter is small, and its readers expect one file.
            _write_file(source, chosen.tensors, backend, _ADAPTER)
        else:
            _write_shards(source, chosen.tensors, backend, shard_bytes)
        for name, part in chosen.further.items():
            _write_file(source, part.tensors, backend, f"{name}/{_ADAPTER}")
        for name, place in content.copied.items():
            write_atomic(backend, name, read_place(place))
        for name, data in content.written.items():
            write_atomic(backend, name, data)
        backend.clear_temporary()
        move_folder(partial, folder)
    if chosen.further:
        _LOG.warning(
            "%s holds the adapter that was active first; PEFT loads the others one by one, with "
            "load_adapter, from its directories %s",
            folder,
            ", ".join(chosen.further),
        )
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary directory beside ``folder`` and remove it afterwards if it still exists.

    Also remove the temporary directories of killed exports to ``folder``.
    """
    prefix = f".{folder.name}-"
    partial = folder.parent / f"{prefix}{uuid.uuid4().hex}"
    with translate_os_errors("create", partial):
        make_folder(folder.parent)
        for path in folder.parent.iterdir():
            if path.name.startswith(prefix) and len(path.name) == len(partial.name):
                with contextlib.suppress(OSError), _locked(path):
                    shutil.rmtree(path, ignore_errors=True)
        os.mkdir(partial)
    try:
        with contextlib.ExitStack() as stack:
            # Some network file systems have no locks; leftovers there cannot be recognised.
            with contextlib.suppress(OSError):
                stack.enter_context(_locked(partial))
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a directory until the process ends; raise ``OSError`` if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """The contents of the tensors of an export."""

    source: Source
    stored: Mapping[str, TensorEntry]
    assembled: Mapping[str, Assembled]

    def read(self, tensors: Mapping[str, TensorEntry]) -> Generator[Bytes, None, None]:
        """Yield the bytes of tensors in order, in chunks, or a tensor of several pieces whole."""
        for whole, group in itertools.groupby(tensors, lambda name: name not in self.assembled):
            if whole:
                part = {name: tensors[name] for name in group}
                with contextlib.closing(decode_chunks(self.source, part)) as chunks:
                    yield from (data for _, _, data in chunks)
            else:
                for name in group:
                    yield view_bytes(read_assembled(self.source, self.stored, self.assembled[name]))


def _write_shards(
    source: _Contents, tensors: Mapping[str, TensorEntry], backend: LocalBackend, shard_bytes: int
) -> None:
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        _write_file(source, tensors, backend, _SINGLE)
        return
    index = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(source, {name: tensors[name] for name in names}, backend, file)
        index.update(dict.fromkeys(names, file))
    total = {"total_size": sum(entry.nbytes for entry in tensors.values())}
    write_atomic(backend, INDEX, canonical_json({"metadata": total, "weight_map": index}))


def _write_file(
    source: _Contents, tensors: Mapping[str, TensorEntry], backend: LocalBackend, file: str
) -> None:
    # Tensors with larger elements come first, so that all are aligned.
    part = {n: tensors[n] for n in sorted(tensors, key=lambda n: (-tensors[n].dtype.size, n))}
    with backend.writer() as writer, contextlib.closing(source.read(part)) as chunks:
        writer.write(_header(part))
        for data in chunks:
            writer.write(data.data)
        writer.finalize(file)


def _header(tensors: dict[str, TensorEntry]) -> bytes:
    """Return the header of a safetensors file: a length, and JSON padded to eight bytes."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name, entry in tensors.items():
        begin, end = end, end + entry.nbytes
        header[name] = {
            "dtype": entry.dtype.safetensors,
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _shards(tensors: Mapping[str, TensorEntry], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, entry in tensors.items():
        if names and size + entry.nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += entry.nbytes
    yield names
