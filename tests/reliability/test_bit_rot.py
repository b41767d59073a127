"""A change of any byte of any file gives an error that names the file, never wrong numbers."""

from __future__ import annotations

import itertools
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from msft_store import Store, StoreError
from msft_store.maintenance.check import Finding
from tests.support.ledger import Ledger
from tests.support.rot import STORES, WAYS, Kept, copy_of
from tests.support.states import same_bits

pytestmark = [
    pytest.mark.usefixtures("without_fsync"),
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
]

FEW = 3
"""How many places of a file the short form changes at random."""
WHAT = {
    "packs": "damage to a pack",
    "manifests": "damage to a manifest",
    "refs": "damage to a ref",
    "bases": "damage to the record of a base",
    "store.json": "damage to store.json",
}


@pytest.fixture(scope="module", params=STORES)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return copy_of(request.param, tmp_path_factory.mktemp("rot"))


def kind_of(kept: Kept, path: Path) -> str:
    return path.relative_to(kept.root).parts[0]


def files_of(kept: Kept) -> list[Path]:
    return [path for path in kept.files() if kind_of(kept, path) in WHAT]


def changes(data: bytes, rng: random.Random, count: int | None) -> Iterator[bytes]:
    """Yield copies of a file: each with one changed byte, then one for each other damage."""
    size = len(data)
    # These are the offsets of a pack's header and trailer fields; other files use the same offsets.
    edges = {0, 8, 12, *(size - back for back in (1, 9, 25, 29, 33, 37, 41, 49, 60))}
    inside = sorted(at for at in edges if 0 <= at < size)
    places = list(range(size))
    if count is not None:
        places = rng.sample(inside, min(count, len(inside))) + rng.sample(places, min(count, size))
    for at in places:
        yield data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]
    ways = list(WAYS.values())
    for way in ways if count != FEW else rng.sample(ways, 2):
        yield way(rng, data)


def loads(store: Store, kept: Kept) -> dict[str, str | None]:
    """Return the error of each checkpoint that cannot be loaded; what is loaded must be right."""
    errors: dict[str, str | None] = {}
    for identity, state in kept.states.items():
        try:
            loaded = store.load(identity)
        except StoreError as error:
            errors[identity] = str(error)
        else:
            errors[identity] = None
            assert same_bits(loaded, state), "other numbers"
    return errors


def assert_noticed(kept: Kept, path: Path, opened: Store) -> bool:
    """Assert that each checkpoint that cannot be loaded is reported; return whether one was."""
    try:
        store = Store.open(kept.root)
    except StoreError as error:
        return path.name in str(error)
    report = store.examine(read_data=True)
    errors = loads(store, kept)
    broken = {identity for identity, error in errors.items() if error is not None}
    assert broken == set(report.damaged)
    assert set(report.sound) == kept.states.keys() - broken
    for finding in report.findings:
        assert_named(finding, path)
    for identity in broken:
        assert path.name in errors[identity] or "is in no pack" in errors[identity]
    # An open store may still use bytes that it read before the damage, but no wrong bytes.
    assert {i for i, error in loads(opened, kept).items() if error is not None} <= broken
    if kind_of(kept, path) == "refs" and report.findings:
        name = path.relative_to(kept.root / "refs").with_suffix("").as_posix()
        with pytest.raises(StoreError, match=re.escape(path.name)):
            store.load(name)
    return bool(report.findings)


def assert_named(finding: Finding, path: Path) -> None:
    """Assert that a finding leads to the file, and to the tensor if it is about a chunk."""
    lost = "is in no pack" in finding.what or "does not exist" in finding.what
    assert lost or path.name in f"{finding.file} {finding.what}", finding
    assert finding.kind != "chunk" or (finding.checkpoint and finding.tensor)


def test_every_change_of_a_file_is_found(kept: Kept, faults: Ledger, soak: bool, seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311
    # Every byte of the smallest store is changed.
    count = FEW if not soak else None if kept.root.parent.name == "pieces" else 60
    for path in files_of(kept):
        whole, kind = path.read_bytes(), kind_of(kept, path)
        for data in changes(whole, rng, count):
            if data == whole:
                continue
            opened = Store.open(kept.root)
            opened.stats()
            path.write_bytes(data)
            with faults.inject(WHAT[kind]):
                noticed = assert_noticed(kept, path, opened)
                # Bits of a payload that its decoder does not use, or that no checkpoint needs, and
                # white space behind JSON, change nothing.
                assert noticed or kind == "packs" or data.rstrip() == whole.rstrip(), path
            path.write_bytes(whole)
    assert Store.open(kept.root).check() == []


def test_damage_to_a_base_is_found_or_has_no_effect(
    tmp_path: Path, faults: Ledger, soak: bool, seed: int
) -> None:
    rng = random.Random(seed)  # noqa: S311
    for name in ("v2/fast", "v2/small"):
        kept = copy_of(name, tmp_path)
        for path in {file for place in kept.bases.values() for file in tensors_in(place)}:
            whole = path.read_bytes()
            begin = 8 + int.from_bytes(whole[:8], "little")
            for data in changes(whole, rng, 100 if soak else FEW):
                path.write_bytes(data)
                store = Store.open(kept.root)
                with faults.inject("damage to a base"):
                    report = store.examine(read_data=True)
                    errors = loads(store, kept)
                    broken = {identity for identity, error in errors.items() if error}
                    assert broken == set(report.damaged)
                    assert all(str(path) in str(errors[identity]) for identity in broken)
                    assert all(str(path) == finding.file for finding in report.findings)
                    # The header was read when the base was added, and is not needed again.
                    same = data[begin:][: len(whole) - begin] == whole[begin:]
                    assert bool(report.findings) != same
                    assert not store.plan_repair().needed
                path.write_bytes(whole)
            assert Store.open(kept.root).check() == []


def tensors_in(place: Path) -> list[Path]:
    return sorted(place.glob("*.safetensors")) if place.is_dir() else [place]


@pytest.mark.parametrize("numba", ["1", "0"], ids=["compiled", "plain"])
def test_no_damaged_payload_ends_the_interpreter(
    faults: Ledger, soak: bool, seed: int, numba: str
) -> None:
    count = (2000 if soak else 100) if numba == "1" else (200 if soak else 20)
    command = [sys.executable, "-m", "tests.support.endure", str(seed), str(count)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "MSFT_STORE_NUMBA": numba},
        preexec_fn=bounded,
    )
    with faults.inject("damaged payloads in a process of their own"):
        assert done.stdout.split() == ["compiled" if numba == "1" else "plain", "alive"], (
            done.stderr
        )


def bounded() -> None:
    # This limits the address space; PyTorch alone maps several gigabytes.
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))


def test_files_that_changed_places_are_found(kept: Kept, faults: Ledger) -> None:
    for folder in ("packs", "manifests", "refs", "bases"):
        files = [path for path in files_of(kept) if kind_of(kept, path) == folder]
        for one, other in itertools.pairwise(files):
            contents = one.read_bytes(), other.read_bytes()
            one.write_bytes(contents[1])
            other.write_bytes(contents[0])
            with faults.inject("two files swapped"):
                store = Store.open(kept.root)
                report = store.examine(read_data=True)
                found = {Path(str(finding.file)).name for finding in report.findings}
                assert found >= {one.name, other.name}
                broken = {identity for identity, error in loads(store, kept).items() if error}
                assert broken == set(report.damaged)
                # The chunks of a pack are found under any file name.
                assert not broken or folder != "packs"
            one.write_bytes(contents[0])
            other.write_bytes(contents[1])
    assert Store.open(kept.root).check() == []
