"""Check a store: list its faults, and the checkpoints that can be restored in spite of them.

Invariant: a check changes nothing and goes on after a fault.

Example::

    report = examine(catalog, read_data=True)
    print(report)                      # "11 of 12 checkpoints are sound"
    for finding in report.findings:
        print(finding.checkpoint, finding.tensor, finding.file)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from msft_store.errors import CorruptedError, StoreError, strip_frames
from msft_store.format.dtypes import DType, dtype_by_code
from msft_store.format.key_table import Keys, key_at, view_keys
from msft_store.format.layout import BaseSpan
from msft_store.objects.bases import base_path, files_touched
from msft_store.objects.catalog import Catalog
from msft_store.objects.manifest import (
    Checkpoint,
    TensorEntry,
    list_manifests,
    manifest_path,
)
from msft_store.objects.packs import is_misnamed
from msft_store.objects.reachability import find_reachable
from msft_store.objects.refs import RefReader, ref_path

Kind = Literal["manifest", "ref", "pack", "base", "chunk"]
Known = dict[tuple[bytes, int, DType, str | None], StoreError | None]
"""The error of each checked chunk, by key, size, dtype and base; ``None`` for a sound chunk."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Describe one fault of a store.

    Attributes:
        where: A checkpoint and tensor, a ref, a base, or a file, for people to read.
        what: The error message.
        kind: The kind of object that has the fault.
        checkpoint: Id of the checkpoint that this fault makes unusable; ``None`` if the fault does
            not name one.
        tensor: Name of the tensor, if the fault is in one.
        base: Id of the base whose files or record have the fault.
        file: Path of the file with the fault, if it is known.
    """

    where: str
    what: str
    kind: Kind
    checkpoint: str | None = None
    tensor: str | None = None
    base: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """List the faults of a store, its sound checkpoints and its damaged checkpoints.

    Attributes:
        findings: The faults.
        sound: Ids of the checkpoints without a fault. If the data was not read, their chunks exist
            but may be damaged.
        damaged: Ids of the checkpoints that cannot be restored now.
    """

    findings: tuple[Finding, ...]
    sound: tuple[str, ...]
    damaged: tuple[str, ...]

    def __str__(self) -> str:
        count = len(self.sound) + len(self.damaged)
        text = f"{len(self.sound)} of {count} checkpoints are sound"
        if self.damaged:
            text += f"{_ids(': ', self.sound)}{_ids('; damaged: ', self.damaged)}"
        return text


def examine(catalog: Catalog, *, read_data: bool = True) -> Report:
    """Check a store and return a report.

    Without ``read_data``, only the structure is checked: every chunk must have a representation,
    every ref a target, every base its files. With it, every chunk and every base is also decoded
    and compared with its keys. Files of a base that changed since they were recorded are always
    read, and so are the chunks of the checkpoints whose base turns out to have a fault.
    """
    catalog.refresh()
    findings = list(_check_files(catalog))
    findings += _check_packs(catalog)
    findings += _check_refs(catalog)
    bases = list(_check_bases(catalog, read_data=read_data))
    findings += bases
    # A checkpoint may do without the part of its base that has a fault.
    faulty = {finding.base for finding in bases}
    known: Known = {}
    sound: list[str] = []
    damaged = list(catalog.damaged)
    for checkpoint in catalog.checkpoints():
        deep = read_data or checkpoint.base in faulty
        found = list(_check_checkpoint(catalog, checkpoint, known, read_data=deep))
        findings += found
        (damaged if found else sound).append(checkpoint.id)
    return Report(findings=tuple(findings), sound=tuple(sound), damaged=tuple(damaged))


def _ids(before: str, identities: tuple[str, ...]) -> str:
    return before * bool(identities) + ", ".join(identity[:12] for identity in identities)


def _check_files(catalog: Catalog) -> Iterator[Finding]:
    describe = catalog.backend.describe
    for identity, error in catalog.damaged.items():
        yield Finding(
            where=f"checkpoint {identity[:12]}",
            what=str(error),
            kind="manifest",
            checkpoint=identity,
            file=describe(manifest_path(identity)),
        )
    for path, error in catalog.objects.damaged.items():
        kind: Kind = "pack" if path.endswith(".pack") else "base"
        yield Finding(where=path, what=str(error), kind=kind, file=describe(path))


def _check_packs(catalog: Catalog) -> Iterator[Finding]:
    for path, footer in catalog.objects.packs.items():
        what = catalog.backend.describe(path)
        try:
            list(footer)
            if is_misnamed(path, footer):
                raise CorruptedError(f"it holds pack {footer.check.hex()}; msft-store repair")
        except StoreError as error:
            yield Finding(where=path, what=str(error), kind="pack", file=what)


def _check_refs(catalog: Catalog) -> Iterator[Finding]:
    refs, damaged = RefReader(catalog.backend).scan()
    for path, error in damaged.items():
        file = catalog.backend.describe(path)
        yield Finding(where=path, what=str(error), kind="ref", file=file)
    # A checkpoint may have been saved since the refresh, but its manifest precedes its refs.
    saved = set(list_manifests(catalog.backend)) - catalog.damaged.keys()
    for ref in refs.values():
        if catalog.get(ref.checkpoint) is None and ref.checkpoint not in saved:
            yield Finding(
                where=f"ref {ref.name}",
                what="points to a checkpoint that does not exist or cannot be read",
                kind="ref",
                file=catalog.backend.describe(ref_path(ref.name)),
            )


def _check_bases(catalog: Catalog, *, read_data: bool) -> Iterator[Finding]:
    for base in catalog.objects.bases().values():
        reader = catalog.objects.base(base.id)
        reported: set[str] = set()
        touched = files_touched(base)
        for name, tensor in base.tensors.items():
            elements = tensor.nbytes // tensor.dtype.size
            try:
                if read_data or touched[tensor.file]:
                    reader.verify_span(BaseSpan(tensor=name, start=0), elements)
                elif elements:
                    # Reading the last element shows that the file exists and is long enough.
                    reader.read_span(BaseSpan(tensor=name, start=elements - 1), 1, tensor.dtype)
            except StoreError as error:
                # A missing file has the same error for each of its tensors and is one finding.
                if str(error) not in reported:
                    reported.add(str(error))
                    yield Finding(
                        where=f"base {base.id[:12]}, tensor {name}",
                        what=str(error),
                        kind="base",
                        tensor=name,
                        base=base.id,
                        file=error.file,
                    )


def _check_checkpoint(
    catalog: Catalog,
    checkpoint: Checkpoint,
    known: Known,
    *,
    read_data: bool,
) -> Iterator[Finding]:
    label, base = f"checkpoint {checkpoint.id[:12]}", checkpoint.base
    finding = partial(Finding, checkpoint=checkpoint.id)
    try:
        if base is not None:
            catalog.objects.base(base)
    except StoreError as error:
        file = catalog.backend.describe(base_path(base or ""))
        yield finding(where=label, what=str(error), kind="base", base=base, file=file)
        return
    try:
        tensors = catalog.tensors(checkpoint)
    except StoreError as error:
        file = catalog.backend.describe(manifest_path(checkpoint.id))
        yield finding(where=label, what=str(error), kind="manifest", file=file)
        return
    keys = catalog.keys_by_base([checkpoint])
    if not read_data and _is_whole(catalog, keys, tensors.values()):
        return
    find = partial(_find_problem, catalog, read_data=read_data)
    for name, problem in list_problems(tensors, base, known, find):
        where = f"{label}, tensor {name}"
        yield finding(where=where, what=str(problem), kind="chunk", tensor=name, file=problem.file)


def list_problems(
    tensors: Mapping[str, TensorEntry],
    base: str | None,
    known: Known,
    find: Callable[[bytes, int, DType, str | None], StoreError | None],
) -> Iterator[tuple[str, StoreError]]:
    """Yield the tensor and the error of each damaged chunk; ``find`` checks those not yet known."""
    for name, entry in tensors.items():
        for key, size in entry.chunks():
            place = (key, size, entry.dtype, base)
            if place not in known:
                known[place] = find(*place)
            problem = known[place]
            if problem is not None:
                yield name, problem


def _find_problem(
    catalog: Catalog, key: bytes, size: int, dtype: DType, base: str | None, *, read_data: bool
) -> StoreError | None:
    try:
        if read_data:
            catalog.objects.read(key, size, dtype, base)
        else:
            _check_exists(catalog, key, dtype, base)
    except StoreError as error:
        return strip_frames(error)
    return None


def _is_whole(
    catalog: Catalog, keys: Mapping[str | None, Keys], entries: Iterable[TensorEntry]
) -> bool:
    """Return True if all chunks exist with the right dtype; look up all keys at once."""
    index = catalog.objects.index
    if len(find_reachable(catalog.objects, index, keys).missing):
        return False
    for entry in entries:
        named = view_keys(b"".join(key for key, _ in entry.chunks()))
        for base in keys:
            rows = index.find_all(named, base)
            if (index.dtypes[rows[rows >= 0]] != entry.dtype.code).any():
                return False
    return True


def _check_exists(catalog: Catalog, key: bytes, dtype: DType, base: str | None) -> None:
    objects = catalog.objects
    missing = find_reachable(objects, objects.index, {base: view_keys(key)}).missing
    if len(missing):
        raise StoreError(f"chunk {key_at(missing, 0).hex()} is in no pack")
    stored = catalog.objects.find(key, base)
    if stored is not None and dtype_by_code(stored.record.dtype) != dtype:
        raise StoreError(f"chunk {key.hex()} in {stored.pack} has another dtype")
