"""Size and speed of codecs on one core, beside peers and the entropy of a simple model, in one run.

All numbers are of the last snapshot of a trajectory against its first. The bound is the empirical
entropy of a weight's change given its tensor and the exponent of the reference weight, which is
what a codec conditioned on the exponent can reach at best.

Example::

    python -m bench.trajectories && python -m bench.codec
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import zstandard
from matplotlib.figure import Figure

from bench.trajectories import DATA, ROOT
from msft_store import codecs
from msft_store.dtypes import DType, by_torch
from msft_store.format import CHUNK_BYTES
from msft_store.kernels import Bytes, difference, lanes, split_planes
from msft_store.tensors import to_bytes

RESULTS = ROOT / "bench" / "results"
MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}
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
    to_tensorx: float
    """Size, of XOR + byte planes + zstd-1."""
    encode: float | None = None
    """GB/s of decoded bytes on one core."""
    decode: float | None = None


def xor(new: Bytes, old: Bytes, dtype: DType) -> Bytes:
    """Return the bitwise difference."""
    return new ^ old


def zstd(level: int) -> tuple[Encode, Decode]:
    """Return zstd on the bytes as they are."""
    return (
        lambda new, old, dtype: zstandard.ZstdCompressor(level=level).compress(new.data),
        lambda data, old, dtype: unzstd(data),
    )


def bitx() -> tuple[Encode, Decode]:
    """Return XOR and zstd-3, as in BitX (NSDI'26)."""
    return (
        lambda new, old, dtype: zstandard.ZstdCompressor(level=3).compress((new ^ old).data),
        lambda data, old, dtype: unzstd(data) ^ old,
    )


def tensorx() -> tuple[Encode, Decode]:
    """Return XOR, byte planes and zstd-1, as in TensorX (SOSP'26)."""

    def encode(new: Bytes, old: Bytes, dtype: DType) -> bytes:
        planes = split_planes(lanes(new ^ old, dtype.lane))
        return zstandard.ZstdCompressor(level=1).compress(planes.data)

    def decode(data: bytes, old: Bytes, dtype: DType) -> Bytes:
        planes = unzstd(data).reshape(dtype.lane, -1)
        return np.ascontiguousarray(planes.T).reshape(-1) ^ old

    return encode, decode


def ours() -> tuple[Encode, Decode]:
    """Return the store's choice of codec, its number in front."""

    def encode(new: Bytes, old: Bytes, dtype: DType) -> bytes:
        codec, payload = codecs.encode(new, old, dtype)
        return bytes([codec.code]) + payload

    def decode(data: bytes, old: Bytes, dtype: DType) -> Bytes:
        return codecs.decode(data[0], data[1:], old.size, old, dtype)

    return encode, decode


def unzstd(data: bytes) -> Bytes:
    """Decompress a frame."""
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.uint8)


PEERS: dict[str, tuple[Encode, Decode]] = {
    "zstd-3": zstd(3),
    "XOR + zstd-3 (BitX)": bitx(),
    "XOR + planes + zstd-1 (TensorX)": tensorx(),
    "ours": ours(),
}
BOUND = "entropy given the exponent"
TENSORX = "XOR + planes + zstd-1 (TensorX)"


def chunks_of(folder: Path) -> Iterator[Chunk]:
    """Yield the chunks of the last snapshot beside those of the first."""
    steps = sorted(folder.glob("step*.safetensors"), key=lambda path: int(path.stem[4:]))
    first, last = (safetensors.torch.load_file(path) for path in (steps[0], steps[-1]))
    for name, tensor in last.items():
        new, old, dtype = to_bytes(tensor), to_bytes(first[name]), by_torch(tensor.dtype)
        for at in range(0, new.size, CHUNK_BYTES):
            yield new[at : at + CHUNK_BYTES], old[at : at + CHUNK_BYTES], dtype


def entropy_bytes(chunks: list[Chunk]) -> float:
    """Return the empirical entropy of all changes given chunk and exponent of the reference."""
    bits = 0.0
    for new, old, dtype in chunks:
        if dtype.name not in MANTISSA_BITS:
            bits += 8.0 * new.size
            continue
        change = difference(lanes(new, dtype.lane), lanes(old, dtype.lane), floating=True)
        exponent = (old.view(f"<u{dtype.lane}") >> MANTISSA_BITS[dtype.name]) & 0xFF
        _, joint = np.unique(exponent.astype(np.uint64) << 32 | change, return_counts=True)
        _, given = np.unique(exponent, return_counts=True)
        bits += (given * np.log2(given)).sum() - (joint * np.log2(joint)).sum()
    return bits / 8


def measure(name: str, chunks: list[Chunk]) -> Iterator[Row]:
    """Yield a row a codec; the fastest of a few repeats counts."""
    total = sum(new.size for new, _, _ in chunks)
    rows: dict[str, tuple[int, float, float]] = {}
    for codec, (encode, decode) in PEERS.items():
        encoding = decoding = float("inf")
        for _ in range(REPEATS):
            began = time.perf_counter()
            payloads = [encode(*chunk) for chunk in chunks]
            middle = time.perf_counter()
            back = [decode(p, old, d) for p, (_, old, d) in zip(payloads, chunks, strict=True)]
            decoding = min(decoding, time.perf_counter() - middle)
            encoding = min(encoding, middle - began)
        for data, (new, _, _) in zip(back, chunks, strict=True):
            assert np.array_equal(data, new), f"{codec} is not lossless on {name}"
        rows[codec] = (sum(map(len, payloads)), encoding, decoding)
    base = rows[TENSORX][0]
    for codec, (size, encoding, decoding) in rows.items():
        yield Row(
            trajectory=name,
            codec=codec,
            percent=100 * size / total,
            to_tensorx=size / base,
            encode=total / encoding / 1e9,
            decode=total / decoding / 1e9,
        )
    bound = entropy_bytes(chunks)
    yield Row(trajectory=name, codec=BOUND, percent=100 * bound / total, to_tensorx=bound / base)


def markdown(rows: list[Row]) -> str:
    """Return the rows as a table."""
    lines = [
        "| trajectory | codec | % of full | ÷ TensorX | encode GB/s | decode GB/s |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        speeds = ["-" if speed is None else f"{speed:.2f}" for speed in (row.encode, row.decode)]
        cells = (row.trajectory, row.codec, f"{row.percent:.2f}", f"{row.to_tensorx:.2f}", *speeds)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Draw size against encoding speed, one panel a trajectory."""
    names = list(dict.fromkeys(row.trajectory for row in rows))
    columns = -(-len(names) // 2)
    figure = Figure(figsize=(4 * columns, 7), layout="tight")
    axes = figure.subplots(2, columns, squeeze=False)
    for name, axis in zip(names, axes.flat, strict=False):
        for row in (row for row in rows if row.trajectory == name):
            if row.encode is None:
                axis.axhline(row.percent, linestyle=":", color="black", label=row.codec)
            else:
                axis.scatter(row.encode, row.percent, label=row.codec)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("encode, GB/s on one core")
        axis.set_ylabel("size, % of full")
        axis.set_ylim(bottom=0)
    axes.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


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
    """Measure all trajectories and write ``bench/results/codec.{md,json,png}``."""
    argparse.ArgumentParser(description="Measure codecs on the trajectories.").parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for folder in sorted(path for path in DATA.glob("*/*") if path.is_dir()):
        found = list(measure(f"{folder.parent.name} {folder.name}", list(chunks_of(folder))))
        print(markdown(found), flush=True)
        rows += found
    about = machine()
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = f"One core of {about['cpu']}, {about['date']}, commit {about['commit']}.\n\n"
    (RESULTS / "codec.md").write_text(text + markdown(rows), encoding="utf-8")
    document = {**about, "rows": [asdict(row) for row in rows]}
    (RESULTS / "codec.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    plot(rows, RESULTS / "codec.png")


if __name__ == "__main__":
    main()
