"""The files of a base beside a store on a remote, for those who do not have the model.

``base-files/<base id>/files.json`` lists them, and each stands beside it under the digest of its
bytes. The list is written last: files without it are without meaning. The base's tensors are
verified against its id before they are sent and after they came; its other files (configuration,
tokenizer) by their digests.

Example::

    push_base(remote, base, tally)
    path = pull_base(remote, base.id, Path("bases"), tally)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from msft_store.errors import BaseError, CorruptedError, StorageError
from msft_store.format.layout import VERSION, seal, unseal
from msft_store.format.strict_json import check_id, check_natural, check_string
from msft_store.maintenance.export import companions
from msft_store.objects.bases import Base, rebuild_base_record
from msft_store.objects.safetensors_header import INDEX, find_files
from msft_store.pipeline.parallel import in_order
from msft_store.remote.transfer import Tally
from msft_store.remote.transport.base import Remote, small, spans
from msft_store.storage.backend import (
    MAX_SMALL_FILE_BYTES,
    TEMPORARY,
    LocalBackend,
    read_file,
    translate_os_errors,
)
from msft_store.storage.quota import QuotaBackend

FOLDER = "base-files"
_AT_ONCE = 4
_LONGEST = 255


@dataclass(frozen=True, kw_only=True)
class _File:
    name: str
    size: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class _Listed:
    directory: bool
    """Whether the base is a directory of these files, not one file alone."""
    files: tuple[_File, ...]


def push_base(remote: Remote, base: Base, tally: Tally) -> int:
    """Send a base's files, unless they are there; return how many bytes were sent.

    :class:`BaseError` if the base's files are gone or hold something else.
    """
    with contextlib.suppress(CorruptedError):
        listed = _read_list(remote, base.id)
        there = remote.sizes(f"{FOLDER}/{base.id}")
        if listed is not None and all(
            there.get(_place(base.id, file)) == file.size for file in listed.files
        ):
            return 0
    path = Path(base.path)
    with translate_os_errors("read", path):
        if not path.exists():
            raise BaseError(
                f"base {base.id[:12]} is no longer at {path}; "
                f"if it moved: msft-store relocate {base.id[:12]} NEW_PATH"
            )
    tally.begin("read the base", 0)
    if rebuild_base_record(path)[0] != base.id:
        raise BaseError(
            f"{path} changed since it was added as base {base.id[:12]}; put the original back"
        )
    files = find_files(path)
    if path.is_dir():
        with translate_os_errors("read", path):
            files += [file for file in companions(path) if _is_name(file.name)]
        files += [path / INDEX] if (path / INDEX).is_file() else []
    odd = [str(local) for local in files if not _is_name(local.name)]
    if odd:
        raise BaseError(f"{odd[0]!a} cannot be sent under this name: rename it, then relocate")
    sent = 0
    known = [_described(file) for file in files]
    there = remote.sizes(f"{FOLDER}/{base.id}")
    lacking = [
        (file, local)
        for file, local in zip(known, files, strict=True)
        if there.get(_place(base.id, file)) != file.size
    ]
    tally.begin("send the base", sum(file.size for file, _ in lacking))
    for file, local in lacking:
        parts = tally.counted(partial(_parts, local, file.size))
        remote.put(_place(base.id, file), parts, file.size)
        sent += file.size
    content = {
        "format": "msft-base-files",
        "version": VERSION,
        "base": base.id,
        "directory": path.is_dir(),
        "files": [[file.name, file.size, file.digest] for file in known],
    }
    remote.settle(FOLDER)
    data = seal(content)
    remote.put(_list_of(base.id), *small(data))
    return sent + len(data)


def pull_base(remote: Remote, identity: str, folder: Path, tally: Tally) -> tuple[Path, bytes, int]:
    """Fetch a base's files into ``folder/<base id>``, unless they are there.

    Returns the path of the model, the record of it for a store, and how many bytes came.
    :class:`CorruptedError` if what came is not that base, :class:`BaseError` if the remote does
    not have it.
    """
    listed = _read_list(remote, identity)
    if listed is None:
        raise BaseError(
            f"the files of base {identity[:12]} are not at {remote.describe('')}: push them with "
            "--with-base, or clone without and relocate the base to where the model is"
        )
    place = folder / identity
    backend = LocalBackend(place)
    backend.make_root()
    wanted = [file for file in listed.files if not _is_there(place / file.name, file)]
    came = sum(file.size for file in wanted)
    QuotaBackend(backend).require_space(came)
    tally.begin("fetch the base", came)
    for file in wanted:
        _fetch(remote, _place(identity, file), file, backend, tally)
    if (place / TEMPORARY).is_dir():
        backend.clear_temporary()
    path = place if listed.directory else place / listed.files[0].name
    tally.begin("read the base", 0)
    found, record = rebuild_base_record(path)
    if found != identity:
        what = remote.describe(_list_of(identity))
        raise CorruptedError(f"{what} lists the files of another base, {found[:12]}", file=what)
    return path, record, came


def _fetch(remote: Remote, path: str, file: _File, backend: LocalBackend, tally: Tally) -> None:
    what, hasher = remote.describe(path), xxhash.xxh3_128()
    if remote.size(path) != file.size:
        raise CorruptedError(
            f"{what} does not have the {file.size} bytes that are listed", file=what
        )
    read: Callable[[tuple[int, int]], bytes] = lambda span: remote.read(path, *span)  # noqa: E731
    with backend.writer() as writer:
        with contextlib.closing(in_order(read, spans(file.size), _AT_ONCE)) as parts:
            for part in parts:
                hasher.update(part)
                writer.write(part)
                tally.passed(len(part))
        if hasher.hexdigest() != file.digest:
            raise CorruptedError(f"{what} does not match its digest", file=what)
        writer.finalize(file.name)


def _is_there(path: Path, file: _File) -> bool:
    try:
        return path.is_file() and _described(path) == file
    except (OSError, StorageError):
        return False


def _described(path: Path) -> _File:
    with translate_os_errors("read", path):
        size = path.stat().st_size
    hasher = xxhash.xxh3_128()
    for part in _parts(path, size):
        hasher.update(part)
    return _File(name=path.name, size=size, digest=hasher.hexdigest())


def _parts(path: Path, size: int) -> Iterator[bytes]:
    for offset, length in spans(size):
        data = read_file(path, offset, length)
        if len(data) != length:
            raise BaseError(f"{path} became shorter while it was read", file=str(path))
        yield data


def _list_of(identity: str) -> str:
    return f"{FOLDER}/{identity}/files.json"


def _place(identity: str, file: _File) -> str:
    return f"{FOLDER}/{identity}/{file.digest}"


def _read_list(remote: Remote, identity: str) -> _Listed | None:
    path = _list_of(identity)
    found = remote.whole(path, MAX_SMALL_FILE_BYTES)
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
        return _Listed(directory=content["directory"], files=files)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptedError(f"{what} cannot be read: {error}", file=what) from None


def _file(name: object, size: object, digest: object) -> _File:
    # A list may be a stranger's, and a name becomes a file here.
    found = check_string(name)
    if not _is_name(found):
        raise ValueError(f"{found!r:.80} is no name for a file")
    return _File(name=found, size=check_natural(size), digest=check_id(digest))


def _is_name(name: str) -> bool:
    plain = name.isprintable() and "/" not in name and "\\" not in name
    return plain and not name.startswith(".") and name != TEMPORARY and 0 < len(name) <= _LONGEST
