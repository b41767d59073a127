"""A store states the version in which it is written; an upgrade and a transfer respect it."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from pathlib import Path

import pytest

from msft_store import Store, VersionError
from msft_store.cli.main import main
from msft_store.errors import InvalidInputError, StorageError
from msft_store.integrations.remote import clone, open_remote, pull, push
from msft_store.storage.backend import LocalBackend
from msft_store.testing import FaultyBackend, SimulatedKill
from tests.support.plain_store import PlainStore
from tests.support.states import make_state, same_bits, train_step

OLD = Path(__file__).parents[2] / "fixtures" / "stores" / "v1" / "dtypes" / "store"

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")


@pytest.fixture
def old(tmp_path: Path) -> Store:
    """Return a store of version 1 with a checkpoint."""
    store = Store.create(tmp_path / "old", version=1)
    store.save(make_state(), step=1)
    return store


def versions(store: Store) -> dict[str, set[int]]:
    """Return the versions that the files of a store state, by the kind of file."""
    root = Path(store.path)
    heads = [path.read_bytes().partition(b"\n")[0] for path in root.glob("manifests/*.json")]
    return {
        "store": {json.loads((root / "store.json").read_bytes())["version"]},
        "manifests": {json.loads(head)["version"] for head in heads},
        "packs": {path.read_bytes()[8] for path in root.glob("packs/*.pack")},
    }


def test_a_new_store_has_the_newest_version(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    store.save(make_state())
    assert store.version == 2
    assert versions(store) == {"store": {2}, "manifests": {2}, "packs": {2}}
    with pytest.raises(InvalidInputError, match="version is one of 1, 2, not 3"):
        Store.create(tmp_path / "other", version=3)
    assert not (tmp_path / "other").exists()


def test_a_store_of_version_1_stays_one_whatever_is_written(old: Store) -> None:
    first, state = old.log()[0], make_state()
    for seed in range(3):
        state = train_step(state, 0.05, seed)
        old.save(state, parent=old.log()[-1])
    old.anchor(old.log()[-1])
    old.forget(first)
    old.plan_gc().execute()
    old.plan_repack().execute()
    assert versions(old) == {"store": {1}, "manifests": {1}, "packs": {1}}
    assert same_bits(Store.open(old.path).load(old.log()[-1]), state)


def test_an_upgrade_changes_what_is_written_later(old: Store) -> None:
    other = Store.open(old.path)
    shown = {path: path.read_bytes() for path in Path(old.path).glob("*s/*")}
    old.upgrade()
    old.upgrade()
    assert {path: path.read_bytes() for path in Path(old.path).glob("*s/*")} == shown
    assert versions(old) == {"store": {2}, "manifests": {1}, "packs": {1}}
    # A store that was opened before the upgrade writes the newest version, too.
    for store in (old, other):
        state = train_step(make_state(), 0.5, len(store.log()))
        saved = store.save(state, parent=store.log()[0])
        assert same_bits(store.load(saved), state)
    assert versions(old) == {"store": {2}, "manifests": {1, 2}, "packs": {1, 2}}
    assert other.version == old.version == 2
    assert old.check() == []


def test_the_command_upgrades(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "store"
    shutil.copytree(OLD, path)
    for options, text in (
        (["--dry-run"], "would upgrade the store at"),
        ([], "from version 1 to 2"),
        ([], "is of version 2 already"),
    ):
        assert main(["upgrade", str(path), *options]) == 0
        assert text in capsys.readouterr().out
    assert main(["--store", str(path), "upgrade", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"store": str(path), "before": 2, "version": 2}
    assert main(["upgrade", str(tmp_path / "none")]) == 1
    assert Store.open(path).check() == []
    assert PlainStore(path).checkpoints().keys() == {ckpt.id for ckpt in Store.open(path).log()}


def test_a_store_of_version_1_gets_no_files_of_version_2(tmp_path: Path, old: Store) -> None:
    new = Store.create(tmp_path / "new")
    new.save(train_step(make_state(), 0.5, 1))
    for transfer in (lambda: push(new, old.path), lambda: pull(old, new.path)):
        with pytest.raises(VersionError, match=r"version 2.*version 1.*msft-store upgrade"):
            transfer()
    assert versions(old) == {"store": {1}, "manifests": {1}, "packs": {1}}
    pull(new, old.path)
    assert versions(new) == {"store": {2}, "manifests": {1, 2}, "packs": {1, 2}}
    clone(old.path, tmp_path / "clone")
    assert Store.open(tmp_path / "clone").version == 1
    old.upgrade()
    push(new, old.path)
    assert len(old.log()) == 2
    assert Store.open(old.path).check() == []


def test_a_remote_is_upgraded_by_its_url(
    tmp_path: Path, old: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    url = (tmp_path / "remote").as_uri()
    push(old, url)
    old.upgrade()
    old.save(train_step(make_state(), 0.5, 1))
    with pytest.raises(VersionError, match="msft-store upgrade "):
        push(old, url)
    assert main(["upgrade", url, "--dry-run"]) == 0
    assert open_remote(url).version == 1
    for text in ("upgraded the store at", "is of version 2 already"):
        assert main(["upgrade", url]) == 0
        assert text in capsys.readouterr().out
    push(old, url)
    assert len(open_remote(url).log()) == 2
    assert open_remote(url).check() == []


@pytest.mark.parametrize("error", [StorageError, SimulatedKill])
def test_an_upgrade_that_fails_leaves_a_whole_store(old: Store, error: type[BaseException]) -> None:
    place, state = LocalBackend(Path(old.path)), make_state()
    config = Path(old.path, "store.json").read_bytes()
    for fail_at in itertools.count():
        faulty = FaultyBackend(place, error=error)
        store = Store(faulty)
        faulty.arm(fail_at)
        with contextlib.suppress(error):
            store.upgrade()
        assert Store.open(old.path).version in (1, 2)
        assert same_bits(Store.open(old.path).load(old.log()[0]), state)
        if not faulty.failed:
            break
        Path(old.path, "store.json").write_bytes(config)
    assert fail_at > 3
    assert Store.open(old.path).version == 2


@pytest.mark.parametrize("version", [1, 2])
def test_a_lost_config_is_written_again_with_the_version_of_the_files(
    tmp_path: Path, version: int
) -> None:
    store = Store.create(tmp_path / "store", version=version)
    ckpt = store.save(make_state())
    (tmp_path / "store" / "store.json").unlink()
    assert main(["--store", store.path, "repair"]) == 0
    again = Store.open(store.path)
    assert again.version == version
    assert same_bits(again.load(ckpt), make_state())
