"""Export a checkpoint to an ordinary directory of safetensors files.

If the base is a model directory, its other files (configuration, tokenizer) are copied, so that
``from_pretrained`` loads the result; for other checkpoints, ``like`` names a directory with such
files. The metadata of a checkpoint controls its export under the key ``export``: tensors of the
training state are left out (:mod:`msft_store.maintenance.export_names`), and the settings of an
``adapter`` give a PEFT directory. If a configuration is copied, a tied tensor is written once,
under its name in the files of the base, and ``from_pretrained`` ties it again.

Invariant: the directory appears complete or not at all. A killed export leaves a hidden directory
beside it, which the next export to the same path removes.

Example::

    export(catalog, checkpoint, Path("my-model"))
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from msft_store.errors import InvalidInputError, StoreError
from msft_store.format.layout import BaseSpan, canonical_json
from msft_store.maintenance.export_names import exported
from msft_store.objects.base_reader import BaseReader
from msft_store.objects.catalog import Catalog
from msft_store.objects.manifest import Checkpoint, TensorEntry
from msft_store.objects.safetensors_header import INDEX
from msft_store.pipeline.decode import Source, decode_chunks
from msft_store.storage.backend import (
    TEMPORARY,
    LocalBackend,
    make_folder,
    move_folder,
    read_file,
    translate_os_errors,
    write_atomic,
)
from msft_store.storage.quota import QuotaBackend

_LOG = logging.getLogger(__name__)

_SINGLE = "model.safetensors"
_ADAPTER, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_CONFIGS = ("config.json", _SETTINGS)
"""Configuration files of a model and of a LoRA adapter, whose weights are in one other file."""
_TIED = "tie_word_embeddings"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".msgpack", ".h5", ".gguf")
_LARGEST_COPIED_FILE = 1 << 30
_METADATA = "__metadata__"
_SURROGATE = re.compile("[\ud800-\udfff]")


def export(
    catalog: Catalog,
    checkpoint: Checkpoint,
    folder: Path,
    *,
    like: Path | None = None,
    shard_bytes: int = 1 << 30,
) -> list[Path]:
    """Write a checkpoint to a new directory; return its files.

    A safetensors file has at most ``shard_bytes``, unless one tensor is larger; only a few chunks
    of it are in memory at a time. The other files are copied from ``like`` or else from the base.
    Raise :class:`InvalidInputError` if the directory is not empty or inside the store, ``like`` has
    no configuration, or safetensors has no such dtype or name.
    """
    _refuse_inside(catalog.backend.describe(""), folder)
    with translate_os_errors("read", folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InvalidInputError(f"{folder} is not empty; export to a new directory")
    base = None if checkpoint.base is None else catalog.objects.base(checkpoint.base).base
    copied = _files_to_copy(catalog, checkpoint, like)
    chosen = exported(checkpoint, catalog.tensors(checkpoint), base, ties=_ties(copied))
    tensors, settings = chosen.tensors, chosen.adapter
    written = [tensors, *(part.tensors for part in chosen.further.values())]
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
    with _temporary_folder(folder.absolute()) as partial:
        backend = LocalBackend(partial)
        # A chunk that a manifest names many times is stored once but exported each time.
        QuotaBackend(backend).require_space(chosen.nbytes)
        source = Source.of(catalog, checkpoint)
        if settings is not None or _is_adapter(copied):
            # An adapter is small, and its readers expect one file.
            _write_file(source, tensors, backend, _ADAPTER)
        else:
            _write_shards(source, tensors, backend, shard_bytes)
        for file, size in copied.items():
            write_atomic(backend, file.name, read_file(file, 0, size))
        if settings is not None:
            _write_settings(backend, _SETTINGS, settings)
        for name, part in chosen.further.items():
            _write_file(source, part.tensors, backend, f"{name}/{_ADAPTER}")
            _write_settings(backend, f"{name}/{_SETTINGS}", part.adapter or {})
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


def _write_settings(backend: LocalBackend, file: str, settings: Mapping[str, Any]) -> None:
    write_atomic(backend, file, json.dumps(settings, indent=2, sort_keys=True).encode())


def _refuse_inside(store: str, folder: Path) -> None:
    """Raise :class:`InvalidInputError` if a folder would be in a store, also through links."""
    if os.path.isdir(store):
        real = Path(os.path.realpath(folder))
        with translate_os_errors("read", folder):
            if any(p.exists() and p.samefile(store) for p in (real, *real.parents)):
                raise InvalidInputError(
                    f"{folder} is inside the store {store}; export to a directory outside of it"
                )


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


def _write_shards(
    source: Source, tensors: Mapping[str, TensorEntry], backend: LocalBackend, shard_bytes: int
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
    source: Source, tensors: Mapping[str, TensorEntry], backend: LocalBackend, file: str
) -> None:
    # Tensors with larger elements come first, so that all are aligned.
    part = {n: tensors[n] for n in sorted(tensors, key=lambda n: (-tensors[n].dtype.size, n))}
    with backend.writer() as writer, contextlib.closing(decode_chunks(source, part)) as chunks:
        writer.write(_header(part))
        for _, _, data in chunks:
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


def _files_to_copy(catalog: Catalog, checkpoint: Checkpoint, like: Path | None) -> dict[Path, int]:
    """Return the files to copy, and their sizes in bytes."""
    folder = like
    if folder is None and checkpoint.base is not None:
        reader = catalog.objects.base(checkpoint.base)
        path = Path(reader.base.path)
        folder = path if path.is_dir() and _contains_base(reader, path) else None
    if folder is None:
        return {}
    with translate_os_errors("read", folder):
        found = {file: file.stat().st_size for file in companions(folder)}
    if like is not None and not is_configured(found):
        raise InvalidInputError(f"{like} has no {' or '.join(_CONFIGS)} to copy")
    return found


def is_configured(files: Iterable[Path]) -> bool:
    """Return True if a configuration for ``from_pretrained`` is among files."""
    return any(file.name in _CONFIGS for file in files)


def _ties(files: Mapping[Path, int]) -> bool:
    """Return True if a loader that reads the configuration among files ties tensors."""
    for file, size in files.items():
        if file.name == _CONFIGS[0]:
            try:
                config = json.loads(read_file(file, 0, size))
            except ValueError:
                return False
            return isinstance(config, dict) and "model_type" in config and not _is_untied(config)
    return False


def _is_untied(config: Mapping[str, Any]) -> bool:
    # A model that contains other models has a configuration for each of them.
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return any(part.get(_TIED) is False for part in parts)


def _is_adapter(files: Iterable[Path]) -> bool:
    names = {file.name for file in files}
    return _CONFIGS[1] in names and _CONFIGS[0] not in names


def companions(folder: Path) -> list[Path]:
    """Return the files of a model directory that are not weights; may raise ``OSError``."""
    files = sorted(file for file in folder.iterdir() if _is_companion(file))
    return [file for file in files if file.stat().st_size <= _LARGEST_COPIED_FILE]


def _is_companion(file: Path) -> bool:
    # The backend creates its folder of temporary files while it writes an export.
    other = file.name.endswith(_WEIGHTS) or file.name.startswith(".") or file.name == TEMPORARY
    return not other and file.is_file()


def _contains_base(reader: BaseReader, folder: Path) -> bool:
    """Return True if a folder contains the weights of the base, by a sample of each file.

    The store of a stranger may name any folder, and its files must not leak into an export.
    """
    smallest: dict[int, tuple[int, str]] = {}
    for name, tensor in reader.base.tensors.items():
        if tensor.nbytes and Path(reader.base.files[tensor.file][0]).parent == folder:
            candidate = tensor.nbytes, name
            smallest[tensor.file] = min(candidate, smallest.get(tensor.file, candidate))
    try:
        for _, name in smallest.values():
            reader.verify_span(BaseSpan(tensor=name, start=0), 1)
    except StoreError:
        return False
    return bool(smallest)
