"""Stores with one decompression bomb or one special file.

Each function damages a sound store, given its folder; ``BOMBS`` and ``STRANGE`` map names to them.

Example::

    BOMBS["hundred thousand dimensions"](path)
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from msft_store import Store
from msft_store.format.dtypes import dtype_by_name
from msft_store.format.layout import BaseSpan, ChunkSpan, chunk_key
from tests.support.forge import chunk, entry, forge_checkpoint, forge_pack
from tests.support.hostile import Manifest, Pack, sealed
from tests.support.plain_store import unsealed

Spoil = Callable[[Path], None]
BF16 = dtype_by_name("bfloat16")
HUGE = 1 << 40


def first(path: Path, folder: str) -> Path:
    return min((path / folder).iterdir())


def with_table(change: Callable[[dict[str, Any]], Any], **content: Any) -> Spoil:
    """Change the tensor table of a manifest."""

    def spoil(path: Path) -> None:
        manifest = Manifest.read(first(path, "manifests"))
        manifest.head["content"].update(content)
        change(manifest.table)
        manifest.write(path / "manifests")

    return spoil


def with_entry(**fields: Any) -> Spoil:
    """Change one entry of a tensor table."""
    return with_table(lambda table: table["scale"].update(fields))


def many_pieces(table: dict[str, Any]) -> None:
    piece = {"offset": [0], "shape": [0], "chunks": ""}
    pieces = [{**piece, "offset": [at % 2]} for at in range(10_000)]
    table["w"] = {"dtype": "bool", "shape": [1], "pieces": pieces}


def nested_beyond(path: Path) -> None:
    """Nest metadata deeper than the encoder of the store allows."""
    manifest = first(path, "manifests")
    manifest.write_bytes(manifest.read_bytes().replace(b"{}", b"[" * 100_000, 1))


def with_frames(data: bytes, *frames: tuple[int, int]) -> Spoil:
    """Put data behind the first line of a manifest, and the lengths of frames into it."""

    def spoil(path: Path) -> None:
        manifest = first(path, "manifests")
        head = {**Manifest.read(manifest).head, "frames": frames}
        manifest.write_bytes(sealed(head) + b"\n" + data)

    return spoil


def with_nested(levels: int) -> Spoil:
    """Nest metadata, sealed where Python's own encoder can."""

    def spoil(path: Path) -> None:
        manifest = Manifest.read(first(path, "manifests"))
        nested: dict[str, Any] = {}
        for _ in range(levels):
            nested = {"a": nested}
        manifest.head["content"]["metadata"] = nested
        manifest.write(path / "manifests")

    return spoil


def with_footer(head: bytes, **claims: int) -> Spoil:
    """Write a pack whose footer has another object, and whose trailer makes other claims."""
    return lambda path: void(Pack.read(first(path, "packs")).write(path / "packs", head, **claims))


def void(_: object) -> None:
    """Return nothing."""


def with_payload(code: int, payload: bytes, size: int = 4 << 20, **fields: Any) -> Spoil:
    """Add a checkpoint of a chunk with a payload of its own."""

    def spoil(path: Path) -> None:
        store = Store.open(path)
        plain = bytes(size)
        records = [(chunk(plain, BF16), plain)] if fields.get("depth") else []
        if records:
            fields["ref_key"] = chunk_key(plain, BF16)
        record = chunk(b"\1" * size, BF16, codec=code, **fields)
        key = forge_pack(store, [*records, (record, payload)])[-1]
        forge_checkpoint(store, {"bomb": entry(BF16, (size // 2,), key)})

    return spoil


def frame(size: int, *, states: bool = True, level: int = 1) -> bytes:
    """Return a zstd frame of zeros."""
    return zstandard.ZstdCompressor(level=level, write_content_size=states).compress(bytes(size))


def claiming(size: int) -> bytes:
    """Return a zstd frame that states a length that it does not have."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + frame(100)[6:]


def with_base(**fields: Any) -> Spoil:
    """Change fields of the record of a base."""

    def spoil(path: Path) -> None:
        record = first(path, "bases")
        content = unsealed(record.read_bytes(), "msft-base")
        record.write_bytes(sealed({**content, **fields}))

    return spoil


def with_base_file(file: str, offset: int = 0, size: int = 2**62) -> Spoil:
    """Let a base be in another file."""

    def spoil(path: Path) -> None:
        content = unsealed(first(path, "bases").read_bytes(), "msft-base")
        places = {name: [0, offset] for name in content["places"]}
        with_base(files=[[file.replace("HERE", str(path)), size]], places=places)(path)

    return spoil


def circle(path: Path) -> None:
    """Make two chunks references of each other, and one a reference of itself."""
    store = Store.open(path)
    one, other = b"\1" * 64, b"\2" * 64
    keys = [chunk_key(data, BF16) for data in (one, other)]
    records = [
        chunk(data, BF16, codec=3, depth=depth, ref_key=key)
        for data, depth, key in (
            *((one, 1, keys[1]), (one, 2, keys[1]), (other, 1, keys[0]), (other, 2, keys[0])),
            *((one, 1, keys[0]), (other, 2, keys[1])),
        )
    ]
    forge_pack(store, [(record, b"") for record in records])
    forge_checkpoint(store, {str(key): entry(BF16, (32,), key) for key in keys})


def many_parts(path: Path) -> None:
    """Put a chunk together from thousands of parts, each of one byte in a chunk of 4 MiB."""
    store = Store.open(path)
    whole = bytes(4 << 20)
    (key,) = forge_pack(store, [(chunk(whole, BF16, codec=1), frame(4 << 20))])
    spans = tuple(ChunkSpan(key=key, start=0, length=1) for _ in range(1 << 10))
    record = chunk(bytes(1 << 10), BF16, codec=3, depth=1, ref_key=key, reference=spans)
    (made,) = forge_pack(store, [(record, b"")])
    forge_checkpoint(store, {"w": entry(BF16, (1 << 9,), made)})


def deep_parts(path: Path) -> None:
    """Let each chunk consist of parts of the one before it, sixteen times over."""
    store, dtype = Store.open(path), BF16
    (key,) = forge_pack(store, [(chunk(bytes(64), dtype), bytes(64))])
    for depth in range(1, 17):
        spans = tuple(ChunkSpan(key=key, start=4 * at, length=4) for at in range(16))
        data = bytes([depth]) * 64
        record = chunk(data, dtype, codec=4, depth=depth, ref_key=key, reference=spans)
        (key,) = forge_pack(store, [(record, b"")])
    forge_checkpoint(store, {"w": entry(dtype, (32,), key)})


def with_box(*box: tuple[int, ...], start: int = 0) -> Spoil:
    """Refer to a box of the base."""

    def spoil(path: Path) -> None:
        store = Store.open(path)
        base = store.bases()[0].id
        span = BaseSpan(tensor="embed.weight", start=start, box=(box[0], box[1]))
        record = chunk(b"\1" * 64, BF16, codec=3, depth=1, base=base, reference=span)
        (made,) = forge_pack(store, [(record, b"")])
        forge_checkpoint(store, {"w": entry(BF16, (32,), made)}, base)

    return spoil


def alike_keys(path: Path) -> None:
    """Name three thousand keys that are alike in most of their bytes."""
    keys = b"".join(struct.pack("<QQ", at, 7) for at in range(3000))
    shape = [3000 << 22]
    piece = {"offset": [0], "shape": shape, "chunks": keys.hex()}
    size = {"logical_bytes": shape[0]}
    with_table(lambda t: (t.clear(), t.update(w=_whole("bool", shape, piece))), **size)(path)


def same_key(path: Path) -> None:
    """Name one chunk many times, for far more bytes than the file has."""
    whole = bytes(4 << 20)
    (key,) = forge_pack(Store.open(path), [(chunk(whole, BF16, codec=1), frame(4 << 20))])
    shape = [40 << 21]
    piece = {"offset": [0], "shape": shape, "chunks": key.hex() * 40}
    size = {"logical_bytes": 2 * shape[0]}
    with_table(lambda t: (t.clear(), t.update(w=_whole("bfloat16", shape, piece))), **size)(path)


def _whole(dtype: str, shape: list[int], piece: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "pieces": [piece]}


def grown(folder: str) -> Spoil:
    """Make a sparse file of a terabyte."""

    def spoil(path: Path) -> None:
        os.truncate(first(path, folder), HUGE)

    return spoil


def long_pack(path: Path) -> None:
    """Claim a footer of four GB in a file that is as long."""
    pack = first(path, "packs")
    data = pack.read_bytes()
    trailer = list(struct.unpack("<QIII4s16s8s", data[-48:]))
    trailer[1:4] = [2**32 - 1, 2**29, 2**27]
    with pack.open("r+b") as file:
        file.seek(trailer[0] + trailer[1])
        file.write(struct.pack("<QIII4s16s8s", *trailer))


def twice(path: Path) -> None:
    """Give a ref two targets."""
    ref = {"checkpoint": "0" * 32, "format": "msft-ref", "name": "x", "note": {}, "version": 1}
    line = sealed(ref).decode()
    (path / "refs" / "x.json").write_text(line.replace("{", '{"checkpoint":"1",', 1), "ascii")


def ref_with(name: str, **fields: Any) -> Spoil:
    """Write a ref."""

    def spoil(path: Path) -> None:
        target = first(path, "manifests").stem
        ref = {"checkpoint": target, "format": "msft-ref", "note": {}, "version": 1}
        file = path / "refs" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(sealed({**ref, "name": name, **fields}))

    return spoil


def raw_file(name: str, data: bytes) -> Spoil:
    """Write a file."""
    return lambda path: void((path / name).write_bytes(data))


BOMBS: dict[str, Spoil] = {
    "shape beyond all memory": with_entry(shape=[HUGE, HUGE]),
    "empty shape with huge sides": with_entry(shape=[0, 2**62, 2**62], pieces=[]),
    "hundred thousand dimensions": with_entry(shape=[2**62] * 100_000),
    "seventy dimensions": with_entry(shape=[1] * 70),
    "ten thousand pieces": with_table(many_pieces),
    "name of ten million letters": with_table(lambda t: t.update({"x" * 10_000_000: t["scale"]})),
    "names that lead elsewhere": with_table(
        lambda t: [t.update({name: t["empty"]}) for name in ("../../x", "/etc/x", "\0", "\ud800")]
    ),
    "numbers of four thousand digits": with_entry(shape=[10**4000]),
    "metadata of 60 levels": with_nested(60),
    "metadata of 500 levels": with_nested(500),
    "manifest of 100,000 levels": nested_beyond,
    "manifest of a terabyte": grown("manifests"),
    "tensor table of 200 MB of nothing": with_frames(
        frame(200 << 20), (0, 0), (len(frame(200 << 20)), 200 << 20)
    ),
    "mapping of 200 MB of nothing": with_frames(
        frame(200 << 20) + frame(100), (len(frame(200 << 20)), 200 << 20), (len(frame(100)), 100)
    ),
    "tensor table of another length": with_frames(
        frame(200 << 20), (0, 0), (len(frame(200 << 20)), 100)
    ),
    "manifest with one frame": with_frames(b"x", (1, 1)),
    "manifest with frames beyond its end": with_frames(b"", (2**62, 1), (2**62, 1)),
    "manifest with frames of two terabytes": with_frames(b"xx", (1, HUGE), (1, HUGE)),
    "ref of a terabyte": raw_file("refs/x.json", b""),
    "record of a base of a terabyte": grown("bases"),
    "pack of a terabyte": grown("packs"),
    "pack with a footer of four GB": long_pack,
    "pack with more records than fit": with_footer(b"{}", count=2**32 - 1),
    "pack with a footer that is longer": with_footer(b"{}", size=2**32 - 1),
    "pack with a footer that is shorter": with_footer(b"{}", size=100),
    "footer of 100 MB of references": with_footer(
        b'{"bases":[],"references":[%s{}]}' % (b"{}," * (1 << 25))
    ),
    "footer of 100,000 levels": with_footer(b'{"bases":[],"references":' + b"[" * 100_000),
    "footer with keys that stand twice": with_footer(b'{"bases":[],"bases":[],"references":[]}'),
    "chunks that are changes of each other": circle,
    "chunk of many parts": many_parts,
    "chunks of many parts, one on top of the other": deep_parts,
    "box with huge sides": with_box((0, 0), (2**62, 2**62)),
    "box that begins beyond": with_box((2**62, 0), (1, 64)),
    "box of no side": with_box((0, 0), (0, 64)),
    "box of other dimensions": with_box((0,), (4,)),
    "box and a start beyond it": with_box((0, 0), (2, 64), start=2**62),
    "keys that are alike": alike_keys,
    "one chunk again and again": same_key,
    **{f"bomb in codec {code}": with_payload(code, frame(400 << 20)) for code in (1, 2, 8)},
    "bomb without a length": with_payload(1, frame(400 << 20, states=False)),
    "claim of a terabyte": with_payload(1, claiming(HUGE)),
    "bomb in a change": with_payload(4, frame(400 << 20), depth=1),
    "bomb in a sparse change": with_payload(5, struct.pack("<I", 9) + frame(400 << 20), depth=1),
    "sparse change of all there is": with_payload(5, struct.pack("<I", 2**32 - 1), depth=1),
    "bomb in tables": with_payload(
        6,
        struct.pack("<5IBBH", 1, 0, 0, len(frame(400 << 20)), 0, 0, 0, 1) + frame(400 << 20),
        depth=1,
    ),
    **{
        f"counts beyond all bounds in codec {code}": with_payload(
            code, struct.pack("<5IBBH", *[2**32 - 1] * 5, 0, 0, 0), depth=1
        )
        for code in (6, 7)
    },
    "change of nothing": with_payload(3, b""),
    "base beyond the last offset": with_base_file("/dev/null", offset=2**63 - 1),
    "base with places of other kinds": with_base(places={"scale": [True, -1]}),
    "base with a path that is a list": with_base(path=["/"], files=[]),
    "ref with two targets": twice,
    "ref with a name of its own": ref_with("a\x1b[2J b"),
    "ref with reasons that are none": ref_with("x", note={"reasons": 3, "since": "y"}),
    "ref with a note of 500 levels": ref_with("x", note=json.loads("[" * 500 + "]" * 500)),
    "timeline with a note of other kinds": ref_with(
        "timelines/run/root", note={"branch": [], "since": {}, "given": 1}
    ),
    "checkpoint of another place": lambda path: void(
        (path / "manifests" / "x.json").write_bytes(first(path, "manifests").read_bytes())
    ),
    "store file of a terabyte": lambda path: os.truncate(path / "store.json", HUGE),
    "store file with other chunks": raw_file(
        "store.json", sealed({"chunk_bytes": 1, "format": "msft-store", "version": 1})
    ),
    "store file of a true version": raw_file(
        "store.json", sealed({"chunk_bytes": 4194304, "format": "msft-store", "version": True})
    ),
}


def linked(name: str, to: str) -> Spoil:
    """Put a symbolic link into a store."""

    def spoil(path: Path) -> None:
        place = path / name.replace("FIRST", next(path.glob("manifests/*")).name)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir() and not place.is_symlink():
            place.rename(path.with_name("moved"))
        else:
            place.unlink(missing_ok=True)
        place.symlink_to(to.replace("OUTSIDE", str(path.with_name("outside"))))

    return spoil


def pipe(name: str) -> Spoil:
    """Put a pipe without a writer into a store."""

    def spoil(path: Path) -> None:
        place = path / name.replace("FIRST", next(path.glob("manifests/*")).name)
        place.unlink(missing_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(place)

    return spoil


FOLDERS = ("packs", "manifests", "refs", "bases", "tmp")
_ID = "0" * 32
STRANGE: dict[str, Spoil] = {
    **{f"{folder} that is a link": linked(folder, "OUTSIDE") for folder in FOLDERS},
    **{
        f"pipe in {folder}": pipe(f"{folder}/{_ID}.{'pack' if folder == 'packs' else 'json'}")
        for folder in FOLDERS
    },
    **{
        f"link in {folder}": linked(
            f"{folder}/{_ID}.{'pack' if folder == 'packs' else 'json'}", "OUTSIDE/kept.json"
        )
        for folder in FOLDERS
    },
    **{f"link in {folder} to a folder": linked(f"{folder}/x", "OUTSIDE") for folder in FOLDERS},
    "manifest that is a pipe": pipe("manifests/FIRST"),
    "manifest that is a device": linked("manifests/FIRST", "/dev/zero"),
    "store file that is a pipe": pipe("store.json"),
    "store file that is a device": linked("store.json", "/dev/zero"),
    "folder of locks that is a link": linked("locks", "OUTSIDE"),
    "folder in the place of a ref": lambda path: os.makedirs(path / "refs" / "x.json"),
    "folder in the place of a pack": lambda path: os.makedirs(path / "packs" / f"{_ID}.pack"),
    "base that is a pipe": lambda path: (
        os.mkfifo(path / "pipe"),
        with_base_file("HERE/pipe")(path),
    )[1],
    "base that is a device": with_base_file("/dev/zero"),
    "base that is a secret": with_base_file("/etc/passwd"),
    "base that is a folder": with_base_file("/etc"),
    "base that is no path": with_base_file("/a\0b"),
    "base that is not absolute": with_base_file("a"),
    "base in a folder of secrets": lambda path: with_base(
        path=str(path.with_name("outside")), files=[], content={}, places={}
    )(path),
}
