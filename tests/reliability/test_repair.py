"""Repair keeps what can be loaded, moves the rest to quarantine, and may be killed at any time."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
from pathlib import Path

import pytest

from msft_store import StorageError, Store
from msft_store.maintenance.repair.plan import plan_repair
from msft_store.storage.backend import LocalBackend
from msft_store.testing import ALL_OPERATIONS, WRITE_OPERATIONS, FaultyBackend, SimulatedKill
from tests.support.ledger import Ledger
from tests.support.rot import STORES, Kept, changed_at, copy_of, damage
from tests.support.states import same_bits

pytestmark = [
    pytest.mark.usefixtures("without_fsync"),
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
]


@pytest.fixture(scope="module")
def kept_stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    folder = tmp_path_factory.mktemp("kept")
    return {name: copy_of(name, folder) for name in STORES}


def assert_repaired(kept: Kept, before: set[str], story: str) -> None:
    """Assert that a store is sound and has at least the checkpoints that could be loaded before."""
    store = Store.open(kept.root)
    for identity, path in kept.bases.items():
        # The record of a base, with its path, may be lost. The model file still exists, and the
        # check for other damage needs it.
        if identity not in {base.id for base in store.bases()}:
            assert store.add_base(path).id == identity
            store.plan_repair().execute()
    assert store.check() == [], story
    known = {ckpt.id for ckpt in store.log()}
    assert before <= known, story
    for identity in known:
        assert same_bits(store.load(identity), kept.states[identity]), story
    assert set(store.refs().values()) <= known, story
    assert not store.plan_repair().needed, story
    store.plan_gc().execute()
    assert kept.loadable() == known, story


@pytest.mark.parametrize("name", STORES)
def test_a_repair_of_any_damage_keeps_sound_checkpoints(
    *,
    tmp_path: Path,
    kept_stores: dict[str, Kept],
    faults: Ledger,
    soak: bool,
    seed: int,
    name: str,
) -> None:
    whole = kept_stores[name]
    kept = Kept(tmp_path / "store", whole.states, whole.bases)
    for number in range(150 if soak else 15):
        rng = random.Random(f"{name} {seed} {number}")  # noqa: S311
        shutil.copytree(whole.root, kept.root)
        files = [path for path in kept.files() if "locks" not in path.parts and path.name != "lock"]
        story = "; ".join(damage(rng, files) for _ in range(rng.randint(1, 5)))
        with faults.inject("random damage, then a repair"):
            before = kept.loadable()
            content = all_bytes(kept.root)
            plan = plan_repair(LocalBackend(kept.root))
            assert before <= {*plan.sound, *(ckpt.checkpoint for ckpt in plan.waiting)}, story
            assert all_bytes(kept.root) == content, "a plan changes nothing"
            plan.execute()
            assert_repaired(kept, before, f"{number}: {story}")
        shutil.rmtree(kept.root)


def all_bytes(root: Path) -> dict[Path, bytes]:
    """Return the content of all files except locks."""
    return {
        path: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "lock" not in str(path.relative_to(root))
    }


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """A store with damage of every kind that repair treats differently."""
    kept = copy_of("v2/fast", tmp_path_factory.mktemp("broken"))
    packs = sorted((kept.root / "packs").iterdir(), key=lambda path: path.stat().st_size)
    assert len(packs) >= 5
    changed_at(packs[-1], 20)
    changed_at(packs[-2], 2)
    one, two = packs[0].read_bytes(), packs[1].read_bytes()
    packs[0].write_bytes(two)
    packs[1].write_bytes(one)
    changed_at(kept.root / "store.json", 30)
    (base,) = (kept.root / "bases").iterdir()
    changed_at(base, base.stat().st_size - 9)
    manifests = sorted((kept.root / "manifests").iterdir())
    manifests[0].write_bytes(manifests[0].read_bytes()[:-50])
    changed_at(manifests[1], 90)
    (kept.root / "refs" / "torn.json").write_bytes(b'{"checkpoint":"')
    return kept


@pytest.mark.parametrize(
    ("error", "kinds"),
    [(SimulatedKill, WRITE_OPERATIONS), (StorageError, ALL_OPERATIONS)],
    ids=["stop", "error"],
)
def test_a_repair_may_end_at_any_operation(
    *,
    tmp_path: Path,
    broken: Kept,
    faults: Ledger,
    soak: bool,
    error: type[BaseException],
    kinds: frozenset[str],
) -> None:
    kept = Kept(tmp_path / "store", broken.states, broken.bases)
    plan = plan_repair(LocalBackend(broken.root))
    sound = set(plan.sound)
    assert sound
    assert plan.lost
    # Reading comes first, then each change.
    for n in itertools.count(0, 1 if soak else 2 if kinds == WRITE_OPERATIONS else 41):
        shutil.copytree(broken.root, kept.root)
        backend = FaultyBackend(LocalBackend(kept.root), error=error, kinds=kinds)
        backend.arm(n)
        with contextlib.suppress(error):
            plan_repair(backend).execute()
        if not backend.failed:
            break
        with faults.inject(
            "stop in a repair" if kinds == WRITE_OPERATIONS else "error in a repair"
        ):
            again = plan_repair(LocalBackend(kept.root))
            assert set(again.sound) == sound
            again.execute()
            assert_repaired(kept, sound, f"operation {n}")
        shutil.rmtree(kept.root)
    assert n > 20
    assert_repaired(kept, sound, "no failure")
