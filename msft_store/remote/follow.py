"""Follow the versions of weights that :meth:`Store.publish` sends to a place.

A poll reads one small ref. If that names a new version, the follower reads its manifest, and of the
packs only what it cannot decode from what it holds. Who holds the version before reads one pack of
changes. Who holds any other version, or nothing, reads what is missing of a bounded chain of packs.

Invariants: each chunk that is written was verified against its key, and so was each that stays. An
update switches only when all chunks are there. A failure leaves the version before, bit for bit:
everything is decoded to a staging area first.

Example::

    follower = Follower("s3://bucket/run", "policy", into=model)
    follower.update()
    for name, tensor in follower.changed():
        engine.load_weights([(name, tensor)])
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from msft_store._util import PathLike, check_path
from msft_store.errors import (
    BaseError,
    CorruptedError,
    InvalidInputError,
    StorageError,
    UnknownCheckpointError,
)
from msft_store.format.key_table import Keys, view_keys
from msft_store.format.layout import chunk_key
from msft_store.format.pack_footer import PACK_HEADER, Rows
from msft_store.objects.bases import base_path, encode_base, scan_base
from msft_store.objects.catalog import Catalog
from msft_store.objects.manifest import (
    Checkpoint,
    TensorEntry,
    manifest_path,
    read_checkpoint,
)
from msft_store.objects.packs import PACKS
from msft_store.objects.reachability import find_reachable
from msft_store.objects.refs import check_ref_name, parse_ref, ref_path
from msft_store.pipeline.parallel import in_order
from msft_store.remote.backend import map_parallel
from msft_store.remote.bases import pull_base
from msft_store.remote.followed import FetchedPack, FollowedFiles, Place, held_pack, list_places
from msft_store.remote.holdings import DirectoryHolding, Holding, Staged, Target, TensorHolding
from msft_store.remote.leases import Leases
from msft_store.remote.transfer import TransferCounter
from msft_store.remote.transport.base import PART_BYTES, Remote
from msft_store.remote.transport.url import connect_remote
from msft_store.remote.versions import (
    LATEST,
    Advice,
    Sizes,
    Version,
    check_version_name,
    parse_version,
    version_ref,
)
from msft_store.storage.backend import MAX_SMALL_FILE_BYTES

_TAIL = 1 << 18
"""Bytes that are read from the end of each pack if nobody knows which are needed."""
_GAP = 1 << 16
"""Bytes between two ranges that are read with them, because a request takes longer."""


class Follower:
    """Holds one version of published weights, and goes from it to any other.

    The version is held in tensors (``into``), in a directory (``cache``), or, with neither, in
    tensors of its own; see :meth:`tensors`. A follower in a directory where it may write leases the
    version that it holds or asks for: until the lease ends, no gc takes it away. It is a context
    manager, which ends its leases at the end.

    Args:
        url: The place, as for :meth:`Store.publish`.
        name: Name of the stream of versions.
        into: Module, or tensors by name, to update in place, on any device. While an update is
            decoded, the chunks that differ are in host memory; nothing that was in the tensors is
            trusted.
        cache: Directory for safetensors files: ``cache/current`` is a link to the directory of the
            version held, with configuration and tokenizer if these were published. An update
            replaces the link. The version before stays until the next update.
        base: Path of the base model on this machine. By default its files are fetched once, to
            ``cache/base`` or a temporary directory.
        lease: Seconds for which a version is leased; every update renews it.
        **options: Passed on to ``obstore.store.from_url`` or to the fsspec file system.

    Raises:
        InvalidInputError: The name is not valid, or both ``into`` and ``cache`` are given.
        MismatchError: ``into`` has entries that cannot be updated in place.
    """

    def __init__(
        self,
        url: Any,
        name: str,
        *,
        into: Target | None = None,
        cache: PathLike | None = None,
        base: PathLike | None = None,
        lease: float = 600.0,
        **options: Any,
    ) -> None:
        self._name = check_version_name(name)
        if into is not None and cache is not None:
            raise InvalidInputError("a follower holds its version in tensors or in a directory")
        self._remote: Remote = connect_remote(url, **options)
        self._cache = None if cache is None else check_path(cache)
        self._holding: Holding = (
            TensorHolding(into) if self._cache is None else DirectoryHolding(self._cache)
        )
        self._base = None if base is None else check_path(base)
        self._files = FollowedFiles(self._remote)
        self._catalog = Catalog(self._files)
        directory = getattr(self._remote, "backend", None)
        self._leases = Leases(directory, name, seconds=lease)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._held: Version | None = None
        self._names: list[str] = []
        self._changed: list[str] = []
        self.fetched_bytes = 0
        """Bytes that the last update read, without those of base models."""

    @property
    def held(self) -> Version | None:
        """The version that is held; ``None`` before the first update."""
        return self._held

    def update(self, to: str | Version | None = None) -> Version:
        """Go to another version, by default the latest.

        Args:
            to: A version, or its name as ``NAME@STEP``; older ones too.

        Returns:
            The version that is held now.

        Raises:
            UnknownCheckpointError: There is no such version. Nothing was changed.
            CorruptedError: A file is damaged. Nothing was changed.
            MismatchError: The tensors do not match the version. Nothing was changed.
            BaseError: The base's files are missing or changed. Nothing was changed.
            StorageError: The place cannot be reached. Nothing was changed.
        """
        self.fetched_bytes = 0
        version, advice = self._find(to)
        self._leases.take(version.checkpoint)
        if self._held is not None and self._held.checkpoint == version.checkpoint:
            self._held, self._changed = version, []
            return version
        checkpoint = self._read_checkpoint(version.checkpoint)
        kept = self._holding.select(checkpoint, self._catalog.tensors(checkpoint))
        try:
            wrong, staged = self._stage(checkpoint, kept, advice)
        except CorruptedError:
            if advice.before is None:
                raise
            # The pack of changes is a second way to the same chunks, so go without it.
            wrong, staged = self._stage(checkpoint, kept, replace(advice, before=None))
        finally:
            self._files.packs = {}
            self._catalog.objects.refresh()
        staged.switch()
        self._names = sorted(self._holding.tied(set(kept)))
        first, self._held = self._held is None, version
        changed = self._holding.tied({place.name for place in wrong})
        self._changed = self._names if first else sorted(changed)
        self._leases.end(besides=version.checkpoint)
        return version

    def _stage(
        self, checkpoint: Checkpoint, kept: Mapping[str, TensorEntry], advice: Advice
    ) -> tuple[list[Place], Staged]:
        """Return what differs from a checkpoint, and the checkpoint beside what is held."""
        places = list(list_places(kept, self._holding.reader))
        wrong = self._gather(checkpoint, places, advice)
        return wrong, self._holding.stage(self._catalog, checkpoint, wrong)

    def changed(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the tensor of all that the last update changed.

        After the first update these are all tensors.
        """
        return self._holding.tensors(self._changed)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the tensor of all that is held."""
        return self._holding.tensors(self._names)

    def close(self) -> None:
        """End the leases. The version that is held stays where it is."""
        self._leases.end()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _find(self, to: str | Version | None) -> tuple[Version, Advice]:
        """Return a version and its packs, from its ref: one request."""
        name, at, step = self._name, "", ""
        if to is not None:
            name, at, step = str(to).partition("@")
        if name != self._name or (at and not step):
            raise InvalidInputError(f"{to!r} is no version of {self._name!r}; say NAME@STEP")
        path = ref_path(check_ref_name(version_ref(self._name, step or LATEST)))
        what = self._remote.describe(path)
        found = self._remote.read_versioned(path, MAX_SMALL_FILE_BYTES)
        if found is None:
            raise UnknownCheckpointError(
                f"no version {to or self._name} at {self._remote.describe('')}: it was never "
                "published there, or a retention policy dropped it"
            )
        self.fetched_bytes += len(found[0])
        return parse_version(parse_ref(found[0], path, what), what)

    def _read_checkpoint(self, identity: str) -> Checkpoint:
        """Fetch a manifest, and the base that it needs if that is new."""
        path = manifest_path(identity)
        found = self._remote.read_versioned(path, MAX_SMALL_FILE_BYTES)
        if found is None:
            raise UnknownCheckpointError(f"{self._remote.describe(path)} was deleted")
        self.fetched_bytes += len(found[0])
        others = {one: data for one, data in self._files.small.items() if "manifests/" not in one}
        self._files.small = {**others, path: found[0]}
        checkpoint = read_checkpoint(self._files, identity)
        if checkpoint.base is not None and base_path(checkpoint.base) not in self._files.small:
            self._files.small[base_path(checkpoint.base)] = self._find_base(checkpoint.base)
        self._catalog.refresh()
        return checkpoint

    def _find_base(self, identity: str) -> bytes:
        """Return the record of a base whose files are on this machine."""
        if self._base is not None:
            base = scan_base(self._base)
            if base.id != identity:
                raise BaseError(
                    f"{self._base} is base {base.id[:12]}, and the versions of {self._name!r} are "
                    f"differences from base {identity[:12]}"
                )
            return encode_base(base)
        if self._cache is None:
            self._temporary = self._temporary or tempfile.TemporaryDirectory(prefix="msft-base-")
            folder = Path(self._temporary.name)
        else:
            folder = self._cache / "base"
        return pull_base(self._remote, identity, folder, TransferCounter())[0]

    def _gather(
        self, checkpoint: Checkpoint, places: Sequence[Place], advice: Advice
    ) -> list[Place]:
        """Fetch all that decoding takes; return the places that hold something else.

        What is held may suffice. Otherwise come the packs of the changes from the version before,
        if that is held, then all packs that the version's ref names, then all that there are.
        """

        def hash_held(place: Place) -> bytes:
            return b"" if place.read is None else chunk_key(place.read().data, place.dtype)

        with contextlib.closing(in_order(hash_held, iter(places))) as hashed:
            keys = list(hashed)
        path, held = held_pack(zip(places, keys, strict=True))
        wrong = [place for place, key in zip(places, keys, strict=True) if place.key != key]
        needed = {checkpoint.base: view_keys(b"".join(place.key for place in places))}
        tries: list[tuple[Callable[[], Sizes], int]] = [
            (dict, 0),
            (lambda: advice.packs, PART_BYTES),
            (self._list_packs, _TAIL),
        ]
        if self._held is not None and self._held.checkpoint == advice.before:
            tries.insert(1, (lambda: advice.changes, PART_BYTES))
        missing = len(places)
        for list_packs, tail in tries:
            self._files.packs = {path: held}
            sizes = list_packs()
            with self._unless_deleted(sizes):
                self._add_packs(sizes, tail)
                missing = self._fetch_needed(needed)
            if not missing:
                return wrong
        damage = "".join(f"; {error}" for error in self._catalog.objects.damaged.values())
        raise CorruptedError(
            f"{missing} chunks of checkpoint {checkpoint.id[:12]} are in no pack of "
            f"{self._remote.describe('')}{damage}"
        )

    @contextlib.contextmanager
    def _unless_deleted(self, sizes: Sizes) -> Iterator[None]:
        """Raise no error of the remote if one of the packs is gone: a gc rewrote it."""
        try:
            yield
        except StorageError:
            if all(self._remote.size(path) is not None for path in sizes):
                raise

    def _list_packs(self) -> Sizes:
        return {p: size for p, size in self._remote.sizes(PACKS).items() if p.endswith(".pack")}

    def _read(self, source: str, offset: int, length: int) -> bytes:
        data = self._remote.read(source, offset, length)
        self.fetched_bytes += len(data)
        return data

    def _add_packs(self, sizes: Sizes, tail: int) -> None:
        """Fetch the last ``tail`` bytes of packs: the footers, and small packs whole."""

        def fetch(path: str) -> tuple[str, FetchedPack]:
            size = sizes[path]
            start = max(size - tail, 0)
            ends = {start: self._read(path, start, size - start)}
            if start:
                ends[0] = self._read(path, 0, PACK_HEADER.size)
            return f"{PACKS}/{path.rpartition('/')[2]}", FetchedPack(path, size, ends)

        self._files.packs |= dict(map_parallel(fetch, sizes, self._remote.workers))

    def _fetch_needed(self, needed: Mapping[str | None, Keys]) -> int:
        """Fetch the payloads of the records that chunks need; return the number of chunks that
        cannot be decoded.
        """
        objects = self._catalog.objects
        objects.refresh()
        found = find_reachable(objects, objects.index, needed)
        if len(found.missing):
            return len(found.missing)
        ranges = [
            (pack, *span)
            for path, rows in objects.index.slices()
            if isinstance(pack := self._files.packs[path], FetchedPack)
            for span in _merge(pack, objects.packs[path].rows[found.live[rows]])
        ]

        def fetch(one: tuple[FetchedPack, int, int]) -> None:
            pack, start, length = one
            pack.parts[start] = self._read(pack.source, start, length)

        map_parallel(fetch, ranges, self._remote.workers)
        return 0


def _merge(pack: FetchedPack, rows: Rows) -> Iterator[tuple[int, int]]:
    """Yield offsets and lengths of the ranges of records that a pack does not have yet."""
    start = end = 0
    for offset, length in sorted(rows[["offset", "length"]].tolist()):
        if pack.read(offset, length) is not None:
            continue
        if offset > end + _GAP or offset + length - start > PART_BYTES:
            if end > start:
                yield start, end - start
            start = offset
        end = offset + length
    if end > start:
        yield start, end - start
