"""Is a store sound? A list of findings, empty when it is.

Example::

    for finding in check(catalog, read_data=True):
        print(finding)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msft_store.catalog import Catalog
from msft_store.dtypes import DType, by_code
from msft_store.errors import StoreError
from msft_store.format import BaseSpan
from msft_store.manifest import Checkpoint, TensorEntry, chunk_sizes
from msft_store.objects import closure


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
    findings += _check_refs(catalog)
    findings += _check_bases(catalog, read_data=read_data)
    verified: set[tuple[bytes, str | None]] = set()
    for checkpoint in catalog.checkpoints():
        findings += _check_checkpoint(catalog, checkpoint, verified, read_data=read_data)
    return findings


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


def _resolve(catalog: Catalog, key: bytes, dtype: DType, base: str | None) -> None:
    missing = closure(catalog.objects, [key], base)[1]
    if missing:
        raise StoreError(f"chunk {next(iter(missing)).hex()} is in no pack")
    stored = catalog.objects.find(key, base)
    if stored is not None and by_code(stored.record.dtype) != dtype:
        raise StoreError(f"chunk {key.hex()} in {stored.pack} has another dtype")
