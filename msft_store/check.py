"""Is a store sound? A list of findings, empty when it is.

Example::

    for finding in check(catalog, read_data=True):
        print(finding)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from msft_store.catalog import Catalog
from msft_store.dtypes import DType, by_code
from msft_store.errors import StoreError
from msft_store.format import BaseSpan
from msft_store.keytable import Keys, as_keys, key_at
from msft_store.liveness import closure
from msft_store.manifest import Checkpoint, TensorEntry, chunk_sizes


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong."""

    where: str
    """A checkpoint and tensor, a ref, a base, or a file."""
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def check(catalog: Catalog, *, read_data: bool = True) -> list[Finding]:
    """Return what is wrong with a store.

    Without ``read_data``, structure only: every chunk has a representation, every ref a target,
    every base its files. With it, every chunk is decoded and compared with its key, and so are the
    bases.
    """
    catalog.refresh()
    findings = [
        Finding(where=f"checkpoint {identity[:12]}", what=str(error))
        for identity, error in catalog.damaged.items()
    ]
    findings += [
        Finding(where=path, what=str(error)) for path, error in catalog.objects.damaged.items()
    ]
    findings += _check_packs(catalog)
    findings += _check_refs(catalog)
    findings += _check_bases(catalog, read_data=read_data)
    verified: set[tuple[bytes, str | None]] = set()
    for checkpoint in catalog.checkpoints():
        findings += _check_checkpoint(catalog, checkpoint, verified, read_data=read_data)
    return findings


def _check_packs(catalog: Catalog) -> Iterator[Finding]:
    for path, footer in catalog.objects.packs.items():
        try:
            list(footer)
        except StoreError as error:
            yield Finding(where=path, what=str(error))


def _check_refs(catalog: Catalog) -> Iterator[Finding]:
    try:
        refs = catalog.refs()
    except StoreError as error:
        yield Finding(where="refs", what=str(error))
        return
    for ref in refs.values():
        if catalog.get(ref.checkpoint) is None:
            yield Finding(where=f"ref {ref.name}", what="points to a checkpoint that is not there")


def _check_bases(catalog: Catalog, *, read_data: bool) -> Iterator[Finding]:
    for base in catalog.objects.bases().values():
        reader = catalog.objects.base(base.id)
        said: set[str] = set()
        for name, tensor in base.tensors.items():
            elements = tensor.nbytes // tensor.dtype.size
            try:
                if read_data:
                    reader.verify_span(BaseSpan(tensor=name, start=0), elements)
                elif elements:
                    # The last element shows whether the file is still there and long enough.
                    reader.read_span(BaseSpan(tensor=name, start=elements - 1), 1, tensor.dtype)
            except StoreError as error:
                # A file that is gone is one finding, not one for each of its tensors.
                if str(error) not in said:
                    said.add(str(error))
                    yield Finding(where=f"base {base.id[:12]}, tensor {name}", what=str(error))


def _check_checkpoint(
    catalog: Catalog,
    checkpoint: Checkpoint,
    verified: set[tuple[bytes, str | None]],
    *,
    read_data: bool,
) -> Iterator[Finding]:
    label = f"checkpoint {checkpoint.id[:12]}"
    try:
        tensors = catalog.tensors(checkpoint)
    except StoreError as error:
        yield Finding(where=label, what=str(error))
        return
    keys = catalog.keys_by_base([checkpoint])
    if not read_data and _is_whole(catalog, keys, tensors.values()):
        return
    for name, entry in tensors.items():
        for key, size in _chunks(entry):
            if (key, checkpoint.base) in verified:
                continue
            try:
                if read_data:
                    catalog.objects.read(key, size, entry.dtype, checkpoint.base)
                else:
                    _resolve(catalog, key, entry.dtype, checkpoint.base)
                verified.add((key, checkpoint.base))
            except StoreError as error:
                yield Finding(where=f"{label}, tensor {name}", what=str(error))


def _chunks(entry: TensorEntry) -> Iterator[tuple[bytes, int]]:
    for piece in entry.pieces:
        yield from zip(piece.keys, chunk_sizes(piece, entry.dtype), strict=True)


def _is_whole(
    catalog: Catalog, keys: Mapping[str | None, Keys], entries: Iterable[TensorEntry]
) -> bool:
    """Return whether nothing is missing, all keys at once; what is, is found one by one."""
    index = catalog.objects.index
    if len(closure(catalog.objects, index, keys).missing):
        return False
    for entry in entries:
        named = as_keys(b"".join(key for piece in entry.pieces for key in piece.keys))
        for base in keys:
            rows = index.find_all(named, base)
            if (index.dtypes[rows[rows >= 0]] != entry.dtype.code).any():
                return False
    return True


def _resolve(catalog: Catalog, key: bytes, dtype: DType, base: str | None) -> None:
    objects = catalog.objects
    missing = closure(objects, objects.index, {base: as_keys(key)}).missing
    if len(missing):
        raise StoreError(f"chunk {key_at(missing, 0).hex()} is in no pack")
    stored = catalog.objects.find(key, base)
    if stored is not None and by_code(stored.record.dtype) != dtype:
        raise StoreError(f"chunk {key.hex()} in {stored.pack} has another dtype")
