"""Store the files of a base model on a remote, for users who do not have the model.

``base-files/<base id>/files.json`` lists the files, and each file is named by the digest of its
bytes. The list is written last; files without a list are ignored. The base's tensors are verified
against its id before they are sent and after they were fetched, and its other files (configuration,
tokenizer) by their digests. See FORMAT.md, section 9.

Example::

    push_base(remote, base, counter)
    record, size = pull_base(remote, base.id, Path("bases"), counter)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from msft_store.errors import BaseError, CorruptedError, StorageError
from msft_store.format.layout import VERSION, seal, unseal
from msft_store.format.strict_json import check_id, check_natural, check_string
from msft_store.maintenance.export_files import companions
from msft_store.objects.bases import Base, encode_base, scan_base
from msft_store.objects.safetensors_header import INDEX, find_files
from msft_store.pipeline.parallel import in_order
from msft_store.remote.transfer import TransferCounter
from msft_store.remote.transport.base import Remote, as_parts, split_ranges
from msft_store.storage.backend import (
    MAX_SMALL_FILE_BYTES,
    TEMPORARY,
    LocalBackend,
    read_file,
    translate_os_errors,
)
from msft_store.storage.quota import QuotaBackend

FOLDER = "base-files"
_PARALLEL_READS = 4
_MAX_NAME = 255


@dataclass(frozen=True, kw_only=True)
class _File:
    name: str
    size: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class _FileList:
    directory: bool
    """True if the base is a directory of these files, False if it is a single file."""
    files: tuple[_File, ...]


def push_base(remote: Remote, base: Base, counter: TransferCounter) -> int:
    """Send a base's files unless the remote has them; return the number of bytes that were sent.

    Raises :class:`BaseError` if the base's files are missing or changed.
    """
    with contextlib.suppress(CorruptedError):
        listed = _read_list(remote, base.id)
        if listed is not None and not _find_missing(remote, base.id, listed.files):
            return 0
    path = Path(base.path)
    with translate_os_errors("read", path):
        if not path.exists():
            raise BaseError(
                f"base {base.id[:12]} is no longer at {path}; "
                f"if it moved: msft-store relocate {base.id[:12]} NEW_PATH"
            )
    counter.start_step("read the base", 0)
    if scan_base(path).id != base.id:
        raise BaseError(
            f"{path} changed since it was added as base {base.id[:12]}; put the original back"
        )
    files = find_files(path)
    if path.is_dir():
        with translate_os_errors("read", path):
            files += [file for file in companions(path) if _is_name(file.name)]
        files += [path / INDEX] if (path / INDEX).is_file() else []
    for local in files:
        if not _is_name(local.name):
            raise BaseError(
                f"{str(local)!a} cannot be sent under this name: rename it, then relocate"
            )
    paths = {_hash_file(local): local for local in files}
    missing = _find_missing(remote, base.id, paths)
    sent = sum(file.size for file in missing)
    counter.start_step("send the base", sent)
    for file in missing:
        parts = counter.count_parts(partial(_parts, paths[file], file.size))
        remote.put(_file_path(base.id, file), parts, file.size)
    content = {
        "format": "msft-base-files",
        "version": VERSION,
        "base": base.id,
        "directory": path.is_dir(),
        "files": [[file.name, file.size, file.digest] for file in paths],
    }
    remote.sync(FOLDER)
    data = seal(content)
    remote.put(_list_path(base.id), *as_parts(data))
    return sent + len(data)


def has_base(remote: Remote, identity: str) -> bool:
    """Return True if a remote has the files of a base."""
    return _list_path(identity) in remote.sizes(f"{FOLDER}/{identity}")


def _find_missing(remote: Remote, identity: str, files: Iterable[_File]) -> list[_File]:
    sizes = remote.sizes(f"{FOLDER}/{identity}")
    return [file for file in files if sizes.get(_file_path(identity, file)) != file.size]


def pull_base(
    remote: Remote, identity: str, folder: Path, counter: TransferCounter
) -> tuple[bytes, int]:
    """Fetch a base's missing files into ``folder/<base id>``.

    Returns the base's record for a store and the number of bytes that were fetched. Raises
    :class:`CorruptedError` if the files are not those of the base, and :class:`BaseError` if the
    remote does not have them.
    """
    listed = _read_list(remote, identity)
    if listed is None:
        raise BaseError(
            f"the files of base {identity[:12]} are not at {remote.describe('')}: push them with "
            "--with-base, or clone without --with-base and relocate the base to your model"
        )
    place = folder / identity
    backend = LocalBackend(place)
    backend.make_root()
    missing = [file for file in listed.files if not _is_downloaded(place / file.name, file)]
    size = sum(file.size for file in missing)
    QuotaBackend(backend).require_space(size)
    counter.start_step("fetch the base", size)
    for file in missing:
        _fetch(remote, _file_path(identity, file), file, backend, counter)
    if (place / TEMPORARY).is_dir():
        backend.clear_temporary()
    path = place if listed.directory else place / listed.files[0].name
    counter.start_step("read the base", 0)
    found = scan_base(path)
    if found.id != identity:
        what = remote.describe(_list_path(identity))
        raise CorruptedError(f"{what} lists the files of another base, {found.id[:12]}", file=what)
    return encode_base(found), size


def _fetch(
    remote: Remote, path: str, file: _File, backend: LocalBackend, counter: TransferCounter
) -> None:
    what, hasher = remote.describe(path), xxhash.xxh3_128()
    if remote.size(path) != file.size:
        raise CorruptedError(
            f"{what} does not have the {file.size} bytes that are listed", file=what
        )
    read: Callable[[tuple[int, int]], bytes] = lambda span: remote.read(path, *span)  # noqa: E731
    with backend.writer() as writer:
        with contextlib.closing(in_order(read, split_ranges(file.size), _PARALLEL_READS)) as parts:
            for part in parts:
                hasher.update(part)
                writer.write(part)
                counter.advance(len(part))
        if hasher.hexdigest() != file.digest:
            raise CorruptedError(f"{what} does not match its digest", file=what)
        writer.finalize(file.name)


def _is_downloaded(path: Path, file: _File) -> bool:
    try:
        return path.is_file() and _hash_file(path) == file
    except (OSError, StorageError):
        return False


def _hash_file(path: Path) -> _File:
    with translate_os_errors("read", path):
        size = path.stat().st_size
    hasher = xxhash.xxh3_128()
    for part in _parts(path, size):
        hasher.update(part)
    return _File(name=path.name, size=size, digest=hasher.hexdigest())


def _parts(path: Path, size: int) -> Iterator[bytes]:
    for offset, length in split_ranges(size):
        data = read_file(path, offset, length)
        if len(data) != length:
            raise BaseError(f"{path} became shorter while it was read", file=str(path))
        yield data


def _list_path(identity: str) -> str:
    return f"{FOLDER}/{identity}/files.json"


def _file_path(identity: str, file: _File) -> str:
    return f"{FOLDER}/{identity}/{file.digest}"


def _read_list(remote: Remote, identity: str) -> _FileList | None:
    path = _list_path(identity)
    found = remote.read_versioned(path, MAX_SMALL_FILE_BYTES)
    if found is None:
        return None
    what = remote.describe(path)
    content = unseal(found[0], what, "msft-base-files")
    try:
        files = tuple(_file(*entry) for entry in content["files"])
        if content["base"] != identity or type(content["directory"]) is not bool or not files:
            raise ValueError("it lists no files of this base")
        if len({file.name for file in files}) != len(files):
            raise ValueError("it lists a file twice")
        return _FileList(directory=content["directory"], files=files)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptedError(f"{what} cannot be read: {error}", file=what) from None


def _file(name: object, size: object, digest: object) -> _File:
    # Names come from an untrusted list and become files on this machine, so check each of them.
    found = check_string(name)
    if not _is_name(found):
        raise ValueError(f"{found!r:.80} is not a valid file name")
    return _File(name=found, size=check_natural(size), digest=check_id(digest))


def _is_name(name: str) -> bool:
    plain = name.isprintable() and "/" not in name and "\\" not in name
    return plain and not name.startswith(".") and name != TEMPORARY and 0 < len(name) <= _MAX_NAME
