"""Hostile files with correct digests: sealed again after the change of a field.

Example::

    document = Manifest.read(path)
    document.table = spoiled(document.table, rng)
    document.write(folder)
"""

from __future__ import annotations

import copy
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from tests.support.plain_codecs import inflate
from tests.support.plain_store import canonical, digest, read_manifest

FIELDS = [
    *[("key", 0, 16), ("ref_key", 16, 16), ("offset", 32, 8), ("length", 40, 4), ("size", 44, 4)],
    *[("codec", 48, 1), ("dtype", 49, 1), ("depth", 50, 1), ("generation", 51, 1)],
    *[("reference", 52, 4), ("base", 56, 4), ("zero", 60, 4)],
]
"""Name, offset and length of each field of a record."""
NUMBERS = [0, 1, 2, 3, 7, 127, 128, 255, 4095, 4096, 2**16, 2**22, 2**22 + 1, 2**31, 2**32 - 1]
VALUES: list[Any] = [
    *[None, True, False, -1, 0, 1, 2, 16, 2**31, 2**63 - 1, 2**63, 2**64, 10**400],
    *[-0.0, 0.5, 1e308, "NaN", "", "\0", ".", "..", "/", "../../etc/passwd", "/etc/shadow"],
    *["x" * 5000, "\ud800", "\x1b[2J", "0" * 32, "f" * 31, "bfloat16", "float7", "tensor"],
    *[[], {}, [[]], [{}], {"": {}}, [0], [1, 2], [2**62] * 5, [0] * 70, ["a"], {"tensor": 1}],
    *[{"chunks": []}, {"chunks": [["0" * 32, 0, 0]]}, {"chunks": [["00", 0, 1]]}],
]
"""Invalid values for any field."""


def spoiled(document: Any, rng: np.random.Generator) -> Any:
    """Return JSON with one or two places changed."""
    document = copy.deepcopy(document)
    for _ in range(rng.integers(1, 3)):
        document = _spoil(document, rng)
    return document


def _spoil(value: Any, rng: np.random.Generator) -> Any:
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return VALUES[rng.integers(len(VALUES))]
    at = keys[rng.integers(len(keys))]
    if isinstance(value[at], dict | list) and rng.random() < 0.8:
        value[at] = _spoil(value[at], rng)
        return value
    kind = rng.integers(6)
    if kind == 0:
        del value[at]
    elif kind == 1 and isinstance(value, dict):
        value[str(VALUES[rng.integers(len(VALUES))])] = value.pop(at)
    elif kind == 2 and isinstance(value, list):
        value.append(copy.deepcopy(value[at]))
    elif kind == 3 and isinstance(value[at], int):
        value[at] += int(rng.integers(-2, 3)) * int(rng.choice([1, 2**20, 2**40]))
    elif kind == 4:
        value[at] = copy.deepcopy(value[keys[rng.integers(len(keys))]])
    else:
        value[at] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    return value


def sealed(content: dict[str, Any]) -> bytes:
    """Return a line of sealed JSON."""
    return canonical({**content, "digest": digest(canonical(content))})


@dataclass
class Manifest:
    """The first line and the tensor table of a manifest."""

    head: dict[str, Any]
    table: Any
    frames: Any

    @classmethod
    def read(cls, path: Path) -> Manifest:
        head, table = read_manifest(path)
        return cls(head, json.loads(table), head.get("frames"))

    def write(self, folder: Path) -> Path:
        """Write it under the id that it has now."""
        head, table = dict(self.head), canonical(self.table)
        if isinstance(head.get("content"), dict):
            head["content"] = {**head["content"], "tensors": digest(table)}
        head["id"] = digest(canonical(head.get("content")))
        path, rest = folder / f"{head['id']}.json", table + b"\n"
        if head.get("version") == 2:
            # A frame that copies nothing from its dictionary can be read with any.
            rest = zstandard.ZstdCompressor().compress(table)
            if head.get("frames") == self.frames:
                head["frames"] = [[0, 0], [len(rest), len(table)]]
        path.write_bytes(sealed(head) + b"\n" + rest)
        return path


@dataclass
class Pack:
    """A pack taken apart."""

    payloads: bytes
    head: Any
    rows: bytearray

    @classmethod
    def read(cls, path: Path) -> Pack:
        data = path.read_bytes()
        start, length, size = struct.unpack_from("<QII", data, len(data) - 48)
        footer = inflate(data[start : start + length], size)
        (length,) = struct.unpack_from("<I", footer)
        head, rows = json.loads(footer[4 : 4 + length]), bytearray(footer[4 + length :])
        return cls(data[:start], head, rows)

    def get(self, row: int, field: str) -> int:
        """Return a field of a record, as a number."""
        at, length = next((at, n) for name, at, n in FIELDS if name == field)
        return int.from_bytes(self.rows[64 * row + at : 64 * row + at + length], "little")

    def set(self, row: int, field: str, value: int) -> None:
        """Set a field of a record."""
        at, length = next((at, n) for name, at, n in FIELDS if name == field)
        data = (value % 2 ** (8 * length)).to_bytes(length, "little")
        self.rows[64 * row + at : 64 * row + at + length] = data

    def write(self, folder: Path, head: bytes | None = None, **claims: int) -> Path:
        """Write it under the id that it has now; ``claims`` stand in the trailer instead."""
        text = canonical(self.head) if head is None else head
        raw = struct.pack("<I", len(text)) + text + self.rows
        footer = zstandard.ZstdCompressor().compress(raw)
        fields = {
            "offset": len(self.payloads),
            "length": len(footer),
            "size": len(raw),
            "count": len(self.rows) // 64,
            **claims,
        }
        check = xxhash.xxh3_128_digest(footer)
        trailer = struct.pack("<QIII4x16s8s", *fields.values(), check, b"msftpack")
        path = folder / f"{check.hex()}.pack"
        path.write_bytes(self.payloads + footer + trailer)
        return path
