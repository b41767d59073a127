"""Untrusted files in a store or a base raise a :class:`StoreError` and do no harm."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from msft_store import KeepLast, Store, StoreError, Timeline
from tests.fixtures.stores.write import write_fast, write_pieces, write_small
from tests.support.exercise import use
from tests.support.hostile import FIELDS, NUMBERS, Manifest, Pack, sealed, spoiled
from tests.support.hostile_payloads import attack
from tests.support.ledger import Ledger
from tests.support.plain_store import canonical, digest, unsealed

pytestmark = pytest.mark.usefixtures("without_fsync")
WRITERS = {"fast": write_fast, "small": write_small, "pieces": write_pieces}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of which each test has copies."""
    folder = tmp_path_factory.mktemp("written")
    for name, write in WRITERS.items():
        (folder / name).mkdir()
        write(folder / name)
    return folder


@pytest.fixture(params=WRITERS)
def victim(request: pytest.FixtureRequest, written: Path, tmp_path: Path) -> Path:
    """The folder of a sound store, whose base is in another folder."""
    return shutil.copytree(written / request.param / "store", tmp_path / "store")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[None]:
    """Remove a file, and restore it afterwards."""
    data = path.read_bytes()
    path.unlink()
    yield
    path.write_bytes(data)


def rounds(seed: int, count: int) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, number]) for number in range(count)]


def some(rng: np.random.Generator, files: Iterator[Path]) -> Path:
    found = sorted(files)
    return found[rng.integers(len(found))]


def test_manifests(victim: Path, tmp_path: Path, faults: Ledger, seed: int, soak: bool) -> None:
    folder = victim / "manifests"
    for rng in rounds(seed, 600 if soak else 25):
        path = some(rng, folder.iterdir())
        document = Manifest.read(path)
        if rng.random() < 0.5:
            document.head = spoiled(document.head, rng)
        else:
            document.table = spoiled(document.table, rng)
        with replaced(path), faults.inject("hostile manifest"):
            forged = document.write(folder)
            use(victim, tmp_path / "out")
            forged.unlink()


def test_packs(victim: Path, tmp_path: Path, faults: Ledger, seed: int, soak: bool) -> None:
    folder = victim / "packs"
    for rng in rounds(seed, 600 if soak else 25):
        path = some(rng, folder.iterdir())
        pack = Pack.read(path)
        count = len(pack.rows) // 64
        for _ in range(rng.integers(0, 4)):
            name, _, length = FIELDS[rng.integers(len(FIELDS))]
            row, other = rng.integers(count), rng.integers(count)
            value = pack.get(other, name) if rng.random() < 0.3 else int(rng.choice(NUMBERS))
            pack.set(row, name, value if length < 16 else pack.get(other, "key"))
        if rng.random() < 0.4:
            pack.head = spoiled(pack.head, rng)
        if rng.random() < 0.3:
            data = bytearray(pack.payloads)
            for at in rng.integers(16, len(data), 8):
                data[at] = rng.choice([0, 1, 255, data[at] ^ 16])
            pack.payloads = bytes(data)
        with replaced(path), faults.inject("hostile pack"):
            forged = pack.write(folder)
            use(victim, tmp_path / "out")
            forged.unlink()


def test_refs_and_the_store_file(
    victim: Path, tmp_path: Path, faults: Ledger, seed: int, soak: bool
) -> None:
    store = Store.open(victim)
    store.pin(store.log()[-1], "one", note={"reasons": ["because"], "since": 3})
    for rng in rounds(seed, 300 if soak else 8):
        path = some(rng, (p for p in victim.rglob("*.json") if p.parent.name not in _OTHERS))
        before = path.read_bytes()
        document = spoiled(unsealed(before, _KINDS.get(path.name, "msft-ref")), rng)
        path.write_bytes(sealed(document))
        with faults.inject("hostile ref"):
            use(victim, tmp_path / "out")
            with contextlib.suppress(StoreError):
                opened = Store.open(victim)
                Timeline(opened, opened.log()[-1], name="run", retention=KeepLast(1)).close()
        path.write_bytes(before)


_OTHERS = {"manifests", "bases"}
_KINDS = {"store.json": "msft-store"}


def test_records_of_bases(
    victim: Path, tmp_path: Path, faults: Ledger, seed: int, soak: bool
) -> None:
    (path,) = (victim / "bases").iterdir()
    whole = unsealed(path.read_bytes(), "msft-base")
    for rng in rounds(seed, 300 if soak else 8):
        record = spoiled(whole, rng)
        forged = path
        if rng.random() < 0.7 and isinstance(record.get("content"), dict):
            record["id"] = digest(canonical(record["content"]))
            forged = path.with_name(f"{record['id']}.json")
        with replaced(path), faults.inject("hostile base record"):
            forged.write_bytes(sealed(record))
            use(victim, tmp_path / "out")
            forged.unlink()


def test_headers_of_safetensors_files(
    tmp_path: Path, faults: Ledger, seed: int, soak: bool
) -> None:
    store, file = Store.create(tmp_path / "store"), tmp_path / "base.safetensors"
    sound = {
        name: {"dtype": "F16", "shape": [2, 8], "data_offsets": [at, at + 32]}
        for name, at in (("a", 0), ("b", 32))
    }
    odd = [
        *(b"", b"{", b"[" * 100_000, b'{"a":1,"a":2}', b"\xff\xfe{}", b'"' + b"x" * 10**7 + b'"'),
        *(b"1e999", b'{"__metadata__":{},"__metadata__":{}}', b"{" + b'"a":{' * 100_000),
    ]
    texts = [canonical(spoiled(sound, rng)) for rng in rounds(seed, 4000 if soak else 300)]
    for text in [*texts, *odd]:
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
        with faults.inject("hostile safetensors header"), contextlib.suppress(StoreError):
            base = store.add_base(file)
            assert sum(tensor.nbytes for tensor in base.tensors.values()) <= 64


def test_payloads(faults: Ledger, seed: int, soak: bool, tmp_path: Path) -> None:
    for rng in rounds(seed, 20_000 if soak else 2000):
        with faults.inject("hostile payload"):
            attack(rng)
    if soak:
        # The kernels are compiled again, with checks of bounds.
        checked = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
        program = [sys.executable, "-m", "tests.support.hostile_payloads", "50000", str(seed)]
        subprocess.run(program, check=True, env=checked)
