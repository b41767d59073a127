"""Ways to write a checkpoint down as what changed since another one: peers, and ours.

A rival writes one state, given another that its reader has, and reads it back. The transforms of
published systems are measured by their payloads alone, without names, shapes and digests, so they
look smaller than a file would be. Products are measured by all bytes of the files that they write.

Example::

    rival = RIVALS["XOR + zstd-1 (slime)"](folder)
    rival.prepare(old, old_file)                # not measured: the reader has the old state
    size = rival.encode(new)
    assert rival.decode().keys() == new.keys()
"""

from __future__ import annotations

import abc
import functools
import importlib
import importlib.metadata
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numba
import numpy as np
import safetensors.torch
import torch
import xxhash
import zstandard

from msft_store import Store
from msft_store.codec import codecs
from msft_store.codec.kernels import Bytes, split_planes
from msft_store.format.dtypes import DType, dtype_by_torch
from msft_store.format.layout import CHUNK_BYTES
from msft_store.tensors.bytes import to_bytes

State = dict[str, torch.Tensor]


class Rival(abc.ABC):
    """One way to write a state, given an older one."""

    package: ClassVar[str | None] = None
    """The distribution whose version decides the result; ``None`` is this repository."""
    parts: Mapping[str, int]
    """The bytes of a product's files by kind, if it writes several; they add up to its size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts = {}

    @classmethod
    def version(cls) -> str:
        """Return the version of the package, or the last commit that changed ours.

        :class:`ImportError` if the package is not installed.
        """
        if cls.package is not None:
            return importlib.metadata.version(cls.package)
        git = ["git", "log", "-1", "--format=%h", "--", "msft_store"]
        root = Path(__file__).parents[2]
        return subprocess.run(
            git, capture_output=True, text=True, check=True, cwd=root
        ).stdout.strip()

    def prepare(self, old: State, file: Path) -> None:
        """Take the state that the reader has, which also is a file of safetensors."""
        self.old = old

    @abc.abstractmethod
    def encode(self, new: State) -> int:
        """Write a state; return its bytes."""

    @abc.abstractmethod
    def decode(self) -> State:
        """Return what was written."""


class Transform(Rival):
    """A codec of bytes, given those of the same elements; one payload a tensor or piece."""

    piece: ClassVar[int | None] = None
    """The most bytes that are coded together; ``None`` is a whole tensor."""

    def encode(self, new: State) -> int:
        self.payloads = [
            self.pack(data, old, dtype) for data, old, dtype in self._pieces(new, self.old)
        ]
        return sum(map(len, self.payloads))

    def decode(self) -> State:
        found = {name: torch.empty_like(tensor) for name, tensor in self.old.items()}
        pieces = self._pieces(found, self.old)
        for payload, (out, old, dtype) in zip(self.payloads, pieces, strict=True):
            out[:] = self.unpack(payload, old, dtype)
        return found

    def _pieces(self, state: State, old: State) -> Iterator[tuple[Bytes, Bytes, DType]]:
        for name, tensor in state.items():
            data, reference = to_bytes(tensor), to_bytes(old[name])
            size = self.piece or max(data.size, 1)
            for at in range(0, data.size, size):
                part = slice(at, at + size)
                yield data[part], reference[part], dtype_by_torch(tensor.dtype)

    @abc.abstractmethod
    def pack(self, data: Bytes, old: Bytes, dtype: DType) -> bytes:
        """Return the payload of a piece."""

    @abc.abstractmethod
    def unpack(self, payload: bytes, old: Bytes, dtype: DType) -> Bytes:
        """Return the piece of a payload."""


class Xor(Transform):
    """The bitwise difference and zstd-1, as slime sends it."""

    package = "zstandard"
    level: ClassVar[int] = 1

    def pack(self, data: Bytes, old: Bytes, dtype: DType) -> bytes:
        return zstd(data ^ old, self.level)

    def unpack(self, payload: bytes, old: Bytes, dtype: DType) -> Bytes:
        return unzstd(payload) ^ old


class BitX(Xor):
    """The same with zstd-3, as in BitX (NSDI'26)."""

    level = 3


class TensorX(Transform):
    """Byte planes of the bitwise difference and zstd-1, 2 MB a piece, as in TensorX (SOSP'26)."""

    package = "zstandard"
    piece = 2 << 20

    def pack(self, data: Bytes, old: Bytes, dtype: DType) -> bytes:
        return zstd(split_planes((data ^ old).view(f"<u{dtype.lane}")), 1)

    def unpack(self, payload: bytes, old: Bytes, dtype: DType) -> Bytes:
        planes = unzstd(payload).reshape(dtype.lane, -1)
        return np.ascontiguousarray(planes.T).reshape(-1) ^ old


class Gaps(Transform):
    """The gaps between changes in the narrowest type, and new values, and zstd-1, as in PULSE."""

    package = "zstandard"

    def pack(self, data: Bytes, old: Bytes, dtype: DType) -> bytes:
        new, before = (found.view(f"<u{dtype.lane}") for found in (data, old))
        changed = np.flatnonzero(new != before)
        gaps = np.diff(changed, prepend=0)
        width = next(w for w in (1, 2, 4) if gaps.max(initial=0) < 1 << 8 * w)
        streams = [gaps.astype(f"<u{width}").view(np.uint8), new[changed].view(np.uint8)]
        return bytes([width]) + zstd(np.concatenate(streams), 1)

    def unpack(self, payload: bytes, old: Bytes, dtype: DType) -> Bytes:
        width, streams = payload[0], unzstd(payload[1:])
        count = streams.size // (width + dtype.lane)
        gaps = streams[: count * width].view(f"<u{width}").astype(np.int64)
        found = old.copy()
        found.view(f"<u{dtype.lane}")[np.cumsum(gaps)] = streams[count * width :].view(
            f"<u{dtype.lane}"
        )
        return found


class ZipNN(Transform):
    """The bitwise difference, coded by ZipNN on one thread."""

    package = "zipnn"

    def pack(self, data: Bytes, old: Bytes, dtype: DType) -> bytes:
        return bytes(zipnn(dtype.name).compress(bytearray(data ^ old)))

    def unpack(self, payload: bytes, old: Bytes, dtype: DType) -> Bytes:
        return np.frombuffer(zipnn(dtype.name).decompress(payload), np.uint8) ^ old


class OurCodec(Transform):
    """The codec of the store alone: payloads, and one byte that names the codec of each."""

    piece = CHUNK_BYTES

    def pack(self, data: Bytes, old: Bytes, dtype: DType) -> bytes:
        codec, payload = codecs.encode(data, old, dtype)
        return bytes([codec.code]) + payload

    def unpack(self, payload: bytes, old: Bytes, dtype: DType) -> Bytes:
        found = old.copy()
        codecs.codec_by_code(payload[0]).decode_into(payload[1:], found, dtype)
        return found


class Blocks(Rival):
    """Blocks of 64 KiB that the old state does not have, as a content-addressed store sends them.

    The list of the blocks is not counted.
    """

    package = "xxhash"

    def cut(self, data: Bytes) -> Iterator[Bytes]:
        """Yield the blocks of a tensor."""
        for at in range(0, data.size, BLOCK):
            yield data[at : at + BLOCK]

    def encode(self, new: State) -> int:
        known = {key: None for key, _ in self._blocks(self.old)}
        self.added: dict[bytes, Bytes] = {}
        self.keys: dict[str, list[bytes]] = {}
        for name, tensor in new.items():
            self.keys[name] = []
            for key, block in self._blocks({name: tensor}):
                self.keys[name].append(key)
                if key not in known:
                    self.added.setdefault(key, block.copy())
        return sum(block.size for block in self.added.values())

    def decode(self) -> State:
        blocks = dict(self._blocks(self.old)) | self.added
        found = {name: torch.empty_like(tensor) for name, tensor in self.old.items()}
        for name, keys in self.keys.items():
            to_bytes(found[name])[:] = np.concatenate([blocks[key] for key in keys])
        return found

    def _blocks(self, state: State) -> Iterator[tuple[bytes, Bytes]]:
        for tensor in state.values():
            for block in self.cut(to_bytes(tensor)):
                yield xxhash.xxh3_128_digest(block.data), block


class CutByContent(Blocks):
    """Blocks of 64 KiB on average that end where a rolling hash says, as Xet cuts files."""

    package = "numba"

    def cut(self, data: Bytes) -> Iterator[Bytes]:
        at = 0
        while at < data.size:
            end = at + block_end(data[at : at + 2 * BLOCK], GEAR)
            yield data[at:end]
            at = end


class Safetensors(Rival):
    """The whole state as a file."""

    package = "safetensors"

    def encode(self, new: State) -> int:
        self.data = safetensors.torch.save(new)
        return len(self.data)

    def decode(self) -> State:
        return safetensors.torch.load(self.data)


class SparseSafetensors(Safetensors):
    """A file with the indices and the values of what changed, as TRL and prime-rl write it."""

    def encode(self, new: State) -> int:
        sparse = {}
        for name, tensor in new.items():
            bits, before = (lanes(found).view(-1) for found in (tensor, self.old[name]))
            changed = (bits != before).nonzero().view(-1)
            sparse[f"{name}.indices"] = changed.to(torch.int32)
            sparse[f"{name}.values"] = tensor.view(-1)[changed]
        return super().encode(sparse)

    def decode(self) -> State:
        found = {name: tensor.clone() for name, tensor in self.old.items()}
        sparse = super().decode()
        for name, tensor in found.items():
            tensor.view(-1)[sparse[f"{name}.indices"].long()] = sparse[f"{name}.values"]
        return found


class Arc(Rival):
    """The file of Fireworks' ARC v3, whose payload is a pickle.

    It tries several encodings in threads and keeps the smallest of those that are done in one and a
    half times as long as the first, so its size depends on the machine.
    """

    package = "fireworks-delta-compression"
    patience: ClassVar[float] = 1.5

    def prepare(self, old: State, file: Path) -> None:
        super().prepare(old, file)
        self._api = importlib.import_module("fireworks_delta_compression")
        backend = importlib.import_module("fireworks_delta_compression.backends.arc3")
        backend._CANDIDATE_WAIT_MULTIPLIER = self.patience
        self._file = self.folder / "arc.safetensors"

    def encode(self, new: State) -> int:
        self._api.delta_compress_dicts_to_file(
            src=self.old, dst=new, diff_file=str(self._file), compression_format="arc_v3"
        )
        return self._file.stat().st_size

    def decode(self) -> State:
        found: State = self._api.delta_decompress_dict_from_file(
            src=dict(self.old), diff_file=str(self._file), compression_format="arc_v3"
        )
        return found


class PatientArc(Arc):
    """The same when it waits for all of its encodings: the smallest that it can do."""

    patience = 1e6


class Moonclip(Rival):
    """What a checkpoint adds to a directory of moonclip whose first one is the old state."""

    package = "moonclip"

    def prepare(self, old: State, file: Path) -> None:
        super().prepare(old, file)
        make = importlib.import_module("moonclip").MoonclipManager
        self._manager = make(str(self.folder / "moonclip"), async_save=False)
        self._manager.save_tensors(0, old)

    def encode(self, new: State) -> int:
        before = files_of(self.folder)
        self._id = self._manager.save_tensors(1, new)
        return sum(files_of(self.folder).values()) - sum(before.values())

    def decode(self) -> State:
        return {
            name: torch.frombuffer(data, dtype=self.old[name].dtype).view(self.old[name].shape)
            for name, data in self._manager.load(self._id).items()
        }


class OurStore(Rival):
    """All files that a checkpoint and a ref to it add to a store whose base is the old state."""

    def prepare(self, old: State, file: Path) -> None:
        super().prepare(old, file)
        self._store = Store.create(self.folder / "store")
        self._base = self._store.add_base(file)

    def encode(self, new: State) -> int:
        before = files_of(self.folder / "store")
        self._checkpoint = self._store.save(new, parent=self._base)
        self._store.pin(self._checkpoint, "latest")
        after = files_of(self.folder / "store")
        added = {path: size - before.get(path, 0) for path, size in after.items()}
        self.parts = {"payloads": self._checkpoint.stored_bytes}
        self.parts |= {
            name: sum(size for path, size in added.items() if path.parts[0] == folder)
            for name, folder in (("footer", "packs"), ("manifest", "manifests"), ("ref", "refs"))
        }
        self.parts["footer"] -= self.parts["payloads"]
        size = sum(added.values())
        assert size == sum(self.parts.values()), "the store wrote other files, too"
        return size

    def decode(self) -> State:
        return self._store.load(self._checkpoint)


STORE, CODEC, ARC = "ours, all files of the store", "ours, codec alone", "ARC v3 (Fireworks)"
RIVALS: dict[str, type[Rival]] = {
    STORE: OurStore,
    CODEC: OurCodec,
    ARC: Arc,
    "ARC v3, patient": PatientArc,
    "gaps + values + zstd-1 (PULSE)": Gaps,
    "XOR + zstd-1 (slime)": Xor,
    "XOR + zstd-3 (BitX)": BitX,
    "XOR + planes + zstd-1 (TensorX)": TensorX,
    "XOR + ZipNN": ZipNN,
    "moonclip": Moonclip,
    "sparse safetensors (TRL)": SparseSafetensors,
    "blocks of 64 KiB": Blocks,
    "blocks cut by content (Xet)": CutByContent,
    "safetensors": Safetensors,
}
"""Every rival by its name, ours first."""

BLOCK = 1 << 16
GEAR = np.random.default_rng(0).integers(0, 1 << 64, 256, np.uint64)


@numba.njit(cache=True)
def block_end(data: Bytes, gear: Any) -> int:
    """Return where the first block ends: at a hash with 16 zero bits, not before 8 KiB."""
    state = np.uint64(0)
    for at in range(data.size):
        state = (state << np.uint64(1)) + gear[data[at]]
        if at >= BLOCK // 8 and state >> np.uint64(48) == 0:
            return at + 1
    return int(data.size)


def zstd(data: Bytes, level: int) -> bytes:
    """Compress bytes into a frame."""
    return zstandard.ZstdCompressor(level=level).compress(data.data)


def unzstd(payload: bytes) -> Bytes:
    """Decompress a frame."""
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(payload), np.uint8)


@functools.cache
def zipnn(dtype: str) -> Any:
    """Return ZipNN's coder for elements of a dtype."""
    make = importlib.import_module("zipnn").ZipNN
    return make(bytearray_dtype=dtype, input_format="byte", threads=1)


def lanes(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor's bits as integers, so that no two NaNs or zeros look alike."""
    width = tensor.element_size()
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width])


def files_of(folder: Path) -> dict[Path, int]:
    """Return the sizes of all files below a folder, by their paths in it."""
    found = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder): path.stat().st_size for path in found}
