"""A reader of whole stores, written from ``docs/FORMAT.md`` alone.

It knows nothing of the store's own code, and does all that the page asks of a reader: it checks
every digest on its way, and it takes the representation of a chunk that section 6 names.

Example::

    tensors = PlainStore(path).restore("best")
    dtype, shape, data = tensors["lm_head.weight"]       # data: row-major bytes
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tests.support.plain_codecs import CODES, SIZES, decode, inflate

CHUNK = 4194304
VERSIONS = (1, 2)
NONE = 0xFFFFFFFF
Tensor = tuple[str, list[int], bytes]
"""dtype, shape, row-major bytes."""


def digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def key_of(data: bytes, dtype: str) -> bytes:
    return xxhash.xxh3_128_digest(dtype.encode() + b"\0" + data)


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def unsealed(line: bytes, kind: str) -> dict[str, Any]:
    """Return the object of a line of sealed JSON."""
    content = json.loads(line)
    stated = content.pop("digest")
    assert digest(canonical(content)) == stated
    assert content["format"] == kind
    assert content["version"] in (VERSIONS if kind in ("msft-store", "msft-manifest") else (1,))
    return content


def keys_in(text: str) -> list[bytes]:
    data = bytes.fromhex(text)
    return [data[at : at + 16] for at in range(0, len(data), 16)]


def read_manifest(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the first line and the tensor table of a manifest."""
    first, _, rest = path.read_bytes().partition(b"\n")
    head = unsealed(first, "msft-manifest")
    if head["version"] == 1:
        assert rest[-1:] == b"\n"
        return head, rest[:-1]
    (length, size), (_, whole) = head["frames"]
    assert len(rest) == sum(length for length, _ in head["frames"])
    base, mapping = head["content"]["base"], None
    tensors = {}
    if base is not None:
        record = path.parents[1] / "bases" / f"{base}.json"
        tensors = unsealed(record.read_bytes(), "msft-base")["content"]
        mapping = (
            json.loads(inflate(rest[:length], size, prediction(tensors, None))) if size else None
        )
    known = prediction(tensors, mapping) if base is not None else b""
    return head, inflate(rest[length:], whole, known)


def prediction(tensors: dict[str, Any], mapping: dict[str, Any] | None) -> bytes:
    """Return the table of a checkpoint that equals its base."""
    names = names_of(tensors, mapping) if mapping else {}
    table = {}
    for name, of in ({n: n for n in tensors if n not in names.values()} | names).items():
        shape = tensors[of]["shape"]
        piece = {"chunks": tensors[of]["chunks"], "offset": [0] * len(shape), "shape": shape}
        table[name] = {"dtype": tensors[of]["dtype"], "pieces": [piece], "shape": shape}
    return canonical(table)


def names_of(tensors: dict[str, Any], mapping: dict[str, Any]) -> dict[str, str]:
    """Return the names in the base, by the names in the checkpoint that a mapping renames."""
    names: dict[str, str] = {}
    for name in sorted(tensors):
        rules = [(new, old) for new, old in mapping["prefixes"] if name.startswith(old)]
        if rules:
            new, old = max(rules, key=lambda rule: len(rule[1]))
            names[new + name[len(old) :]] = name
    return {new: old for new, old in (names | mapping["names"]).items() if old is not None}


class PlainStore:
    """A store directory without concurrent writers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        config = unsealed((root / "store.json").read_bytes(), "msft-store")
        assert config["chunk_bytes"] == CHUNK
        self.bases = {path.stem: PlainBase(path) for path in root.glob("bases/*.json")}
        self.packs = {path.stem: PlainPack(path) for path in root.glob("packs/*.pack")}

    def checkpoints(self) -> dict[str, dict[str, Any]]:
        """Return the content of each checkpoint by id."""
        return {path.stem: self._manifest(path)[0] for path in self.root.glob("manifests/*.json")}

    def refs(self) -> dict[str, str]:
        """Return the checkpoint of each ref."""
        found = {}
        for path in self.root.glob("refs/**/*.json"):
            ref = unsealed(path.read_bytes(), "msft-ref")
            assert ref["name"] == path.relative_to(self.root / "refs").as_posix()[:-5]
            found[ref["name"]] = ref["checkpoint"]
        return found

    def restore(self, name: str) -> dict[str, Tensor]:
        """Return all tensors of a checkpoint, by its id or a ref."""
        identity = self.refs().get(name, name)
        content, table = self._manifest(self.root / "manifests" / f"{identity}.json")
        tensors = {name: self._tensor(entry, content["base"]) for name, entry in table.items()}
        assert sum(len(data) for _, _, data in tensors.values()) == content["logical_bytes"]
        return tensors

    def _manifest(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        head, table = read_manifest(path)
        assert head["id"] == path.stem == digest(canonical(head["content"]))
        assert head["content"]["tensors"] == digest(table)
        return head["content"], json.loads(table)

    def _tensor(self, entry: dict[str, Any], base: str | None) -> Tensor:
        dtype, shape, element = entry["dtype"], entry["shape"], f"V{SIZES[entry['dtype']]}"
        whole = np.zeros(shape, element)
        for piece in entry["pieces"]:
            size = math.prod(piece["shape"]) * SIZES[dtype]
            data = b"".join(self.chunk(key, base) for key in keys_in(piece["chunks"]))
            assert len(data) == size
            box = tuple(
                slice(o, o + n) for o, n in zip(piece["offset"], piece["shape"], strict=True)
            )
            whole[box] = np.frombuffer(data, element).reshape(piece["shape"])
        return dtype, shape, whole.tobytes()

    def chunk(self, key: bytes, base: str | None) -> bytes:
        """Return the chunk of a key, which is looked up with a base."""
        if base is not None and key in self.bases[base].chunks:
            dtype, data = self.bases[base].chunk(key)
        else:
            dtype, data = self._decoded(key, base)
        assert key_of(data, dtype) == key
        return data

    def _decoded(self, key: bytes, base: str | None) -> tuple[str, bytes]:
        found = [
            (*record.preference, name, number)
            for name, pack in self.packs.items()
            for number, record in enumerate(pack.records)
            if record.key == key and record.base in (None, base)
        ]
        *_, name, number = min(found)
        pack, record = self.packs[name], self.packs[name].records[number]
        reference = self._reference(record)
        if reference is not None:
            assert key_of(reference, record.dtype) == record.ref_key
        payload = pack.data[record.offset : record.offset + record.length]
        return record.dtype, decode(record.codec, payload, record.size, reference, record.dtype)

    def _reference(self, record: Record) -> bytes | None:
        reference = record.reference
        if reference is None:
            return self.chunk(record.ref_key, record.base) if any(record.ref_key) else None
        if "chunks" in reference:
            return b"".join(
                self.chunk(bytes.fromhex(key), record.base)[start : start + length]
                for key, start, length in reference["chunks"]
            )
        base = self.bases[record.base]
        if "view" in reference:
            return base.of_view(reference, record.size, record.dtype)
        return base.span(reference, record.size, record.dtype)


@dataclass
class Record:
    """Sixty-four bytes of a footer."""

    key: bytes
    ref_key: bytes
    offset: int
    length: int
    size: int
    codec: int
    dtype: str
    depth: int
    generation: int
    reference: dict[str, Any] | None
    base: str | None

    @property
    def preference(self) -> tuple[int, ...]:
        on_chunks = "chunks" in self.reference if self.reference else any(self.ref_key)
        return self.depth, on_chunks, -self.generation, self.length


class PlainPack:
    """Encoded chunks."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        magic, version, zero = struct.unpack("<8sII", self.data[:16])
        assert (magic, zero) == (b"msftpack", 0)
        max_depth = {1: 2, 2: 16}[version]
        start, length, size, count, zero, check, magic = struct.unpack(
            "<QIII4s16s8s", self.data[-48:]
        )
        footer = self.data[start : start + length]
        assert (start + length, zero, magic) == (len(self.data) - 48, bytes(4), b"msftpack")
        assert xxhash.xxh3_128_digest(footer) == check == bytes.fromhex(path.stem)
        assert size <= 2**28 + 64 * count
        assert count <= (length + 64) // 16
        footer = inflate(footer, size)
        (length,) = struct.unpack_from("<I", footer)
        head = json.loads(footer[4 : 4 + length])
        assert 4 + length + 64 * count == size
        rows = struct.iter_unpack("<16s16sQIIBBBBIII", footer[4 + length :])
        self.records = [self._record(head, *row) for row in rows]
        assert all(record.depth <= max_depth for record in self.records)

    @staticmethod
    def _record(head: dict[str, Any], *row: Any) -> Record:
        *numbers, codec, dtype, depth, generation, reference, base, zero = row
        assert zero == 0
        return Record(
            *numbers,
            codec=codec,
            dtype=CODES[dtype],
            depth=depth,
            generation=generation,
            reference=None if reference == NONE else with_view(head, head["references"][reference]),
            base=None if base == NONE else head["bases"][base],
        )


def with_view(head: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Return a reference with its view in the place of the number of the view."""
    return (
        reference | {"view": head["views"][reference["view"]]} if "view" in reference else reference
    )


class PlainBase:
    """Safetensors files somewhere else."""

    def __init__(self, path: Path) -> None:
        base = unsealed(path.read_bytes(), "msft-base")
        assert base["id"] == path.stem == digest(canonical(base["content"]))
        self._files = [file for file, _ in base["files"]]
        self._places, self._tensors = base["places"], base["content"]
        self.chunks = {
            key: (name, number * CHUNK)
            for name, tensor in self._tensors.items()
            for number, key in enumerate(keys_in(tensor["chunks"]))
        }

    def chunk(self, key: bytes) -> tuple[str, bytes]:
        """Return the dtype and the bytes of a chunk."""
        name, start = self.chunks[key]
        return self._tensors[name]["dtype"], self._tensor(name)[start : start + CHUNK]

    def span(self, reference: dict[str, Any], size: int, dtype: str) -> bytes:
        """Return the elements of a reference, in the dtype of the chunk that refers to them."""
        tensor = self._tensors[reference["tensor"]]
        of, start = tensor["dtype"], reference["start"]
        elements = np.frombuffer(self._tensor(reference["tensor"]), f"V{SIZES[of]}")
        if "box" in reference:
            box = tuple(slice(o, o + n) for o, n in zip(*reference["box"], strict=True))
            elements = elements.reshape(tensor["shape"])[box].reshape(-1)
        return converted(elements[start : start + size // SIZES[dtype]].tobytes(), of, dtype)

    def of_view(self, reference: dict[str, Any], size: int, dtype: str) -> bytes:
        """Return the elements of a reference into a view, in the dtype of the chunk."""
        view, element = reference["view"], f"V{SIZES[dtype]}"
        whole = np.zeros(view["shape"], element)
        for part in view["parts"]:
            tensor, shape = self._tensors[part["tensor"]], part["shape"]
            start = part.get("start", [0] * len(shape))
            axes = part.get("axes", range(len(start)))
            lengths = ([1] * len(start) + shape)[len(shape) :]
            sides = [lengths[list(axes).index(axis)] for axis in range(len(start))]
            elements = np.frombuffer(self._tensor(part["tensor"]), f"V{SIZES[tensor['dtype']]}")
            elements = elements.reshape(part.get("view", tensor["shape"]))
            box = elements[tuple(slice(s, s + n) for s, n in zip(start, sides, strict=True))]
            data = converted(box.tobytes(), tensor["dtype"], dtype)
            found = np.frombuffer(data, element).reshape(sides).transpose(axes).reshape(shape)
            at = zip(part.get("offset", [0] * len(shape)), shape, strict=True)
            whole[tuple(slice(o, o + n) for o, n in at)] = found
        if "box" in reference:
            whole = whole[tuple(slice(o, o + n) for o, n in zip(*reference["box"], strict=True))]
        first = reference["start"]
        return whole.reshape(-1)[first : first + size // SIZES[dtype]].tobytes()

    def _tensor(self, name: str) -> bytes:
        file, offset = self._places[name]
        length = math.prod(self._tensors[name]["shape"]) * SIZES[self._tensors[name]["dtype"]]
        with open(self._files[file], "rb") as stream:
            stream.seek(offset)
            return stream.read(length)


def converted(data: bytes, of: str, to: str) -> bytes:
    """Return floats in another dtype, rounded to nearest, ties to even; a NaN becomes 0."""
    if of == to:
        return data
    if of == "bfloat16":
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(data, {"float16": "<f2", "float32": "<f4", "float64": "<f8"}[of])
    values = np.where(np.isnan(values), values.dtype.type(0), values)
    with np.errstate(over="ignore"):
        if to == "float64":
            return values.astype("<f8").tobytes()
        singles = values.astype("<f4")
        if to == "float16":
            return singles.astype("<f2").tobytes()
    bits = singles.view("<u4")
    if to == "bfloat16":
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    return bits.tobytes()
