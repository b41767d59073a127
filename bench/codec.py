"""Speed of the store's codec and its distance from entropy bounds, on one core in one run.

With a reference, numbers are of the last snapshot of a trajectory against its first; without one,
of the last snapshot alone, beside zstd-3 and ZipNN. All rivals that have a reference, too, are
measured by ``bench.arena``. There are two kinds of empirical bounds. The first is the entropy of a
weight's change given its chunk and the exponent of the reference, counted over whole changes. The
second is the entropy of our symbols (tokens and low bits, gaps, runs) given their classes, which
shows the loss by coders and tables. Entropies counted over few weights are too low, because they
know every change beforehand.

ZipNN is measured if it is installed (``pip install zipnn``, which compiles it).

Example::

    python -m bench.trajectories && python -m bench.codec
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import safetensors.torch
import torch

from bench.arena import rivals
from bench.trajectories import DATA, ROOT
from msft_store.codec import changes, codecs, compact_codec, exponent_codec
from msft_store.codec.compilation import NUMBA_VARIABLE
from msft_store.codec.kernels import Bytes, encode_lane_changes, view_lanes
from msft_store.format.dtypes import DType, dtype_by_torch
from msft_store.format.layout import CHUNK_BYTES
from msft_store.tensors.bytes import to_bytes

RESULTS = ROOT / "bench" / "results"
REPEATS = 3

Chunk = tuple[Bytes, Bytes, DType]
"""New bytes, reference bytes, dtype."""
Encode = Callable[[Bytes, Bytes, DType], bytes]
Decode = Callable[[bytes, Bytes, DType], Bytes]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One codec on one trajectory."""

    trajectory: str
    codec: str
    percent: float
    """Size, of the full checkpoint."""
    encode: float | None = None
    """GB/s of decoded bytes on one core."""
    decode: float | None = None


def zstd(new: Bytes, old: Bytes, dtype: DType) -> bytes:
    """Return the bytes as they are in a zstd-3 frame."""
    return rivals.zstd(new, 3)


def unzstd(data: bytes, old: Bytes, dtype: DType) -> Bytes:
    """Decompress a frame."""
    return rivals.unzstd(data)


def zipnn(new: Bytes, old: Bytes, dtype: DType) -> bytes:
    """Return the bytes as they are, coded by ZipNN on one thread."""
    return bytes(rivals.zipnn(dtype.name).compress(bytearray(new)))


def unzipnn(data: bytes, old: Bytes, dtype: DType) -> Bytes:
    """Return the bytes that ZipNN coded."""
    return np.frombuffer(rivals.zipnn(dtype.name).decompress(data), np.uint8)


def ours(*, reference: bool = True) -> tuple[Encode, Decode]:
    """Return the store's choice of codec, its number in front."""

    def encode(new: Bytes, old: Bytes, dtype: DType) -> bytes:
        codec, payload = codecs.encode(new, old if reference else None, dtype)
        return bytes([codec.code]) + payload

    def decode(data: bytes, old: Bytes, dtype: DType) -> Bytes:
        found = old.copy()
        codecs.codec_by_code(data[0]).decode_into(data[1:], found, dtype)
        return found

    return encode, decode


def interpreted() -> tuple[Encode, Decode]:
    """Return ours without compiled loops."""
    encode, decode = ours()

    def without(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            with patch.dict(os.environ, {NUMBA_VARIABLE: "0"}):
                return call(*arguments)

        return called

    return without(encode), without(decode)


OURS = "ours"
GIVEN: dict[str, tuple[Encode, Decode]] = {
    OURS: ours(),
    "ours, without Numba": interpreted(),
}
"""What codes a chunk given its reference."""
ALONE: dict[str, tuple[Encode, Decode]] = {
    "zstd-3": (zstd, unzstd),
    "ZipNN": (zipnn, unzipnn),
    OURS: ours(reference=False),
}
"""What codes a chunk alone."""
SLOW = {"ours, without Numba"}
"""Measured once, and only on part of the chunks."""
BOUND = "entropy given the exponent"


def chunks_of(folder: Path) -> Iterator[Chunk]:
    """Yield the chunks of the last snapshot beside those of the first."""
    steps = sorted(folder.glob("step*.safetensors"), key=lambda path: int(path.stem[4:]))
    first, last = (safetensors.torch.load_file(path) for path in (steps[0], steps[-1]))
    for name, tensor in last.items():
        new, old, dtype = to_bytes(tensor), to_bytes(first[name]), dtype_by_torch(tensor.dtype)
        for at in range(0, new.size, CHUNK_BYTES):
            yield new[at : at + CHUNK_BYTES], old[at : at + CHUNK_BYTES], dtype


def entropy_bytes(chunks: list[Chunk]) -> float:
    """Return the empirical entropy of all changes given chunk and exponent of the reference."""
    bits = 0.0
    for new, old, dtype in chunks:
        layout = changes.float_layout(dtype)
        if layout is None:
            bits += 8.0 * new.size
            continue
        change = encode_lane_changes(
            view_lanes(new, dtype.lane), view_lanes(old, dtype.lane), floating=True
        )
        exponent = (view_lanes(old, dtype.lane).astype(np.int64) & layout.mask) >> layout.shift
        bits += conditional_entropy(exponent, change.astype(np.int64))
    return bits / 8


def own_entropy_bytes(chunks: list[Chunk]) -> float:
    """Return the empirical entropy of what we code, given its chunk and its classes."""
    total = 0.0
    for new, old, dtype in chunks:
        layout = changes.float_layout(dtype)
        if layout is None or np.array_equal(new, old):
            continue
        lane_pair = view_lanes(new, dtype.lane), view_lanes(old, dtype.lane)
        found = exponent_codec.find_changes(*lane_pair, layout, codecs.compiled_kernels())
        for symbols, _, bits in compact_codec.list_symbols(found, layout)[0]:
            wide = symbols.astype(np.int64)
            total += conditional_entropy(wide >> 8, wide & 0xFF)
            total += float(bits[wide >> 2 & bits.size - 1].sum(dtype=np.int64))
    return total / 8


def conditional_entropy(given: Any, values: Any) -> float:
    """Return the bits of all values given what stands beside each."""
    if not len(values):
        return 0.0
    _, joint = np.unique(given << 33 | values, return_counts=True)
    _, alone = np.unique(given, return_counts=True)
    return float((alone * np.log2(alone)).sum() - (joint * np.log2(joint)).sum())


def measure(
    name: str, chunks: list[Chunk], codecs_of: dict[str, tuple[Encode, Decode]]
) -> Iterator[Row]:
    """Yield a row a codec; the fastest of a few repeats counts."""
    total = sum(new.size for new, _, _ in chunks)
    rows: dict[str, tuple[int, float, float]] = {}
    for codec, (encode, decode) in codecs_of.items():
        if "ZipNN" in codec and importlib.util.find_spec("zipnn") is None:
            continue
        part = chunks[:: max(len(chunks) // 12, 1)] if codec in SLOW else chunks
        encoding = decoding = float("inf")
        for _ in range(1 if codec in SLOW else REPEATS):
            began = time.perf_counter()
            payloads = [encode(*chunk) for chunk in part]
            middle = time.perf_counter()
            back = [decode(p, old, d) for p, (_, old, d) in zip(payloads, part, strict=True)]
            decoding = min(decoding, time.perf_counter() - middle)
            encoding = min(encoding, middle - began)
        for data, (new, _, _) in zip(back, part, strict=True):
            assert np.array_equal(data, new), f"{codec} is not lossless on {name}"
        size = sum(map(len, payloads)) if part is chunks else rows[OURS][0]
        share = sum(new.size for new, _, _ in part) / 1e9
        rows[codec] = (size, share / encoding, share / decoding)
    for codec, (size, encoding, decoding) in rows.items():
        yield Row(
            trajectory=name,
            codec=codec,
            percent=100 * size / total,
            encode=encoding,
            decode=decoding,
        )
    if codecs_of is ALONE:
        return
    bounds = {
        BOUND: entropy_bytes(chunks),
        "entropy of what we code": own_entropy_bytes(chunks),
    }
    for label, bound in bounds.items():
        yield Row(trajectory=name, codec=label, percent=100 * bound / total)


def markdown(rows: list[Row]) -> str:
    """Return the rows as a table."""
    lines = [
        "| trajectory | codec | % of full | encode GB/s | decode GB/s |",
        "|---|---|--:|--:|--:|",
    ]
    for row in rows:
        speeds = ["-" if speed is None else f"{speed:.2f}" for speed in (row.encode, row.decode)]
        cells = (row.trajectory, row.codec, f"{row.percent:.2f}", *speeds)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, str]:
    """Return what a reader needs to judge the speeds."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - git as found on the path
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    ).stdout.strip()
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {"date": date.today().isoformat(), "cpu": cpu, "commit": commit}


def main() -> None:
    """Measure all trajectories and write ``bench/results/codec.{md,json}``."""
    argparse.ArgumentParser(description="Measure codecs on the trajectories.").parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    alone: list[Row] = []
    for folder in sorted(path for path in DATA.glob("*/*") if path.is_dir()):
        name = f"{folder.parent.name} {folder.name}"
        if not any(folder.glob("step*.safetensors")):
            continue
        found = list(measure(name, list(chunks_of(folder)), GIVEN))
        print(markdown(found), flush=True)
        rows += found
        if folder.name in ("bf16-1e-5", "fp32-2e-5"):
            dtype = folder.name.partition("-")[0]
            found = list(measure(f"{folder.parent.name} {dtype}", list(chunks_of(folder)), ALONE))
            print(markdown(found), flush=True)
            alone += found
    about = machine()
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = (
        f"One core of {about['cpu']}, {about['date']}, commit {about['commit']}. The learning rate "
        "is in each trajectory's name.\n\nAgainst a reference:\n\n"
        f"{markdown(rows)}\nWithout any reference:\n\n{markdown(alone)}"
    )
    (RESULTS / "codec.md").write_text(text, encoding="utf-8")
    document = {**about, "rows": [asdict(row) for row in rows]}
    document["alone"] = [asdict(row) for row in alone]
    (RESULTS / "codec.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
