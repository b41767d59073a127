"""Push, pull and clone with a real S3 server, memory, directories and fsspec file systems."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from msft_store import (
    Base,
    ConflictError,
    CorruptedError,
    InvalidInputError,
    KeepLast,
    NotAStoreError,
    StorageError,
    Store,
    StoreError,
    Timeline,
)
from msft_store.integrations.remote import clone, open_remote, pull, push
from msft_store.remote.transport.base import RetryingRemote, as_parts
from msft_store.remote.transport.url import connect_remote
from tests.support.remotes import FaultyRemote
from tests.support.rot import changed_at
from tests.support.s3 import environment, serve_s3
from tests.support.states import State, make_state, same_bits, train_step, write_base

KINDS = ("s3", "memory", "directory", "fsspec", "files")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Return the address of a real S3 server with a bucket."""
    with serve_s3() as address:
        yield address


def place(kind: str, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return an empty remote of the given kind."""
    if kind == "memory":
        return MemoryStore()
    if kind == "directory":
        return f"file://{tmp_path / 'remote'}"
    if kind == "files":
        # The same directory through fsspec, which has no locks.
        return f"local://{tmp_path / 'files'}"
    if kind == "fsspec":
        return f"memory://{uuid.uuid4().hex}/run"
    for name, value in environment(s3).items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}/run"


@pytest.fixture(params=KINDS)
def url(
    request: pytest.FixtureRequest, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> Any:
    return place(request.param, tmp_path, s3, monkeypatch)


@pytest.fixture
def states(store: Store, base: Base, state: State) -> dict[str, State]:
    """Return the states of three checkpoints by the names of their refs; one has no base."""
    found: dict[str, State] = {}
    parent: Any = base
    for step, name in enumerate(("first", "good/second"), 1):
        found[name] = train_step(state, 0.05, step)
        parent = store.save(found[name], parent=parent, step=step, metrics={"loss": 1 / step})
        store.pin(parent, name, note={"why": name})
    found["alone"] = make_state(9)
    store.pin(store.save(found["alone"], step=3), "alone")
    return found


def paths(url: Any) -> list[str]:
    return sorted(connect_remote(url).sizes(""))


def assert_holds(store: Store, states: dict[str, State]) -> None:
    for name, state in states.items():
        assert same_bits(store.load(name), state)
    assert store.check() == []


def test_push_clone_load_is_exact(
    store: Store, states: dict[str, State], url: Any, tmp_path: Path
) -> None:
    sent = push(store, url)
    assert len(sent.checkpoints) == len(states)
    assert sent.unverified == 0
    come = clone(url, tmp_path / "clone")
    copy = Store.open(tmp_path / "clone")
    assert_holds(copy, states)
    assert come.checkpoints == tuple(checkpoint.id for checkpoint in store.log())
    assert copy.log() == store.log()
    assert (copy.refs(), copy.notes()) == (store.refs(), store.notes())
    assert copy.locks() == []
    assert copy.plan_gc().leftovers == ()


def test_existing_files_are_not_sent_again(
    store: Store, states: dict[str, State], url: Any, tmp_path: Path
) -> None:
    push(store, url)
    before = paths(url)
    again = push(store, url)
    assert (again.bytes, again.packs, again.checkpoints, again.refs) == (0, 0, (), ())
    assert str(again) == "nothing to do"
    clone(url, tmp_path / "clone")
    again = pull(tmp_path / "clone", url)
    assert (again.bytes, again.packs, again.checkpoints, again.refs) == (0, 0, (), ())
    assert push(tmp_path / "clone", url).bytes == 0
    assert paths(url) == before


def test_only_new_files_are_sent(
    store: Store, base: Base, states: dict[str, State], url: Any, tmp_path: Path
) -> None:
    push(store, url)
    clone(url, tmp_path / "clone")
    states["third"] = train_step(states["good/second"], 0.02, 7)
    checkpoint = store.save(states["third"], parent="good/second", step=9)
    store.pin(checkpoint, "third")
    sent = push(store, url)
    assert (sent.packs, sent.checkpoints) == (1, (checkpoint.id,))
    assert [move.name for move in sent.refs] == ["third"]
    come = pull(tmp_path / "clone", url)
    assert (come.packs, come.checkpoints) == (1, (checkpoint.id,))
    assert_holds(Store.open(tmp_path / "clone"), states)


def test_a_store_is_read_in_place(
    store: Store, states: dict[str, State], url: Any, tmp_path: Path
) -> None:
    push(store, url)
    there = open_remote(url)
    assert there.log() == store.log()
    assert there.refs() == store.refs()
    assert_holds(there, states)
    parts = list(there.chunks("first", ["model.layers.0.up.weight"]))
    assert sum(part.numel() for _, _, part in parts) == 2 * 64 * 64
    files = there.export("alone", tmp_path / "model")
    assert [file.name for file in files] == ["model.safetensors"]
    assert there.stats().checkpoints == len(states)
    assert there.locks() == []


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.save(make_state(3)),
        lambda store: store.pin("first", "mine"),
        lambda store: store.unpin("first"),
        lambda store: store.forget("first"),
        lambda store: store.anchor("first"),
        lambda store: store.plan_gc(KeepLast(1)).execute(),
        lambda store: store.unlock(force=True) or store.evict([]),
    ],
)
def test_a_store_in_place_refuses_every_write(
    store: Store, states: dict[str, State], write: Any
) -> None:
    url = MemoryStore()
    push(store, url)
    before = {path: connect_remote(url).read_versioned(path, 1 << 30) for path in paths(url)}
    with pytest.raises(StorageError, match="only read in place"):
        write(open_remote(url))
    assert {
        path: connect_remote(url).read_versioned(path, 1 << 30) for path in paths(url)
    } == before


def test_a_store_in_place_takes_the_base_from_where_it_is_now(
    store: Store, states: dict[str, State], tmp_path: Path
) -> None:
    url = MemoryStore()
    push(store, url)
    (tmp_path / "base.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(StoreError, match="no longer at"):
        open_remote(url).load("first")
    assert_holds(open_remote(url, bases=[tmp_path / "moved.safetensors"]), states)
    other = write_base(tmp_path / "other.safetensors", make_state(4))
    with pytest.raises(StoreError, match="none of"):
        open_remote(url, bases=[other])


def test_a_base_is_sent_on_request(url: Any, tmp_path: Path) -> None:
    state = make_state(big=True)
    (tmp_path / "model").mkdir()
    write_base(tmp_path / "model" / "model.safetensors", state)
    (tmp_path / "model" / "config.json").write_text('{"a": 1}')
    (tmp_path / "model" / ".hidden").write_text("stays")
    (tmp_path / "model" / "odd\nname.txt").write_text("stays: nobody could fetch it")
    store = Store.create(tmp_path / "store")
    base = store.add_base(tmp_path / "model")
    trained = train_step(state, 0.01, 1)
    store.pin(store.save(trained, parent=base), "best")
    assert push(store, url, with_base=True).base_bytes > 4_000_000
    assert push(store, url, with_base=True).base_bytes == 0
    (tmp_path / "model").rename(tmp_path / "gone")
    without = clone(url, tmp_path / "without")
    assert without.unverified > 0
    assert "relocate" in str(without)
    assert Store.open(tmp_path / "without").check() != []
    moved = Store.open(tmp_path / "without")
    moved.relocate(base, tmp_path / "gone")
    assert_holds(moved, {"best": trained})
    come = clone(url, tmp_path / "with", with_base=True)
    assert come.unverified == 0
    copy = Store.open(tmp_path / "with")
    assert_holds(copy, {"best": trained})
    where = Path(copy.bases()[0].path)
    assert where == tmp_path / "with-bases" / base.id
    assert sorted(file.name for file in where.iterdir()) == ["config.json", "model.safetensors"]
    assert pull(copy, url, with_base=True).base_bytes == 0
    elsewhere = clone(url, tmp_path / "third", with_base=True, base_directory=tmp_path / "b")
    assert elsewhere.base_bytes == come.base_bytes
    assert (tmp_path / "b" / base.id / "config.json").read_text() == '{"a": 1}'


def test_a_base_that_changed_is_not_sent(
    store: Store, states: dict[str, State], tmp_path: Path
) -> None:
    write_base(tmp_path / "base.safetensors", make_state(5))
    with pytest.raises(StoreError, match=r"base\.safetensors changed since"):
        push(store, MemoryStore(), with_base=True)


def test_damaged_files_of_a_base_are_refused(
    store: Store, base: Base, states: dict[str, State], tmp_path: Path
) -> None:
    push(store, tmp_path / "remote", with_base=True)
    folder = tmp_path / "remote" / "base-files" / base.id
    (file,) = [file for file in folder.iterdir() if file.name != "files.json"]
    changed_at(file, file.stat().st_size - 3)
    Path(base.path).unlink()
    with pytest.raises(CorruptedError, match=file.name):
        clone(tmp_path / "remote", tmp_path / "clone", with_base=True)
    changed_at(file, file.stat().st_size - 3)
    clone(tmp_path / "remote", tmp_path / "clone", with_base=True)
    assert_holds(Store.open(tmp_path / "clone"), states)


def test_damage_is_refused_and_the_file_is_named(
    store: Store, states: dict[str, State], tmp_path: Path
) -> None:
    """Change each file at several places: the change is refused or has no effect."""
    push(store, tmp_path / "remote")
    whole = clone(tmp_path / "remote", tmp_path / "whole")
    assert len(whole.checkpoints) == len(states)
    refused = 0
    for number, path in enumerate(sorted((tmp_path / "remote").rglob("*.*"))):
        name = path.relative_to(tmp_path / "remote").as_posix()
        for share in (0.1, 0.5, 0.98):
            at = int(path.stat().st_size * share)
            target = tmp_path / f"clone-{number}-{share}"
            changed_at(path, at)
            try:
                clone(tmp_path / "remote", target)
            except StoreError as error:
                refused += 1
                if path.name not in str(error):
                    raise AssertionError(f"{name} is not named") from error
                if (target / "store.json").exists():
                    copy = Store.open(target)
                    assert (copy.log(), copy.refs(), copy.check()) == ([], {}, [])
            else:
                assert_holds(Store.open(target), states)
            changed_at(path, at)
    assert refused > 20
    # If the file is undamaged again, the same clone is completed.
    for target in tmp_path.glob("clone-*"):
        if (target / "tmp" / "cloning").exists():
            clone(tmp_path / "remote", target)
            assert_holds(Store.open(target), states)


def test_a_damaged_store_is_not_pushed(
    store: Store, states: dict[str, State], tmp_path: Path
) -> None:
    pack = min((Path(store.path) / "packs").iterdir(), key=lambda path: path.stat().st_size)
    changed_at(pack, 40)
    url = MemoryStore()
    with pytest.raises(CorruptedError, match=pack.name):
        push(store, url)
    assert not [path for path in paths(url) if path.startswith(("packs", "manifests", "refs"))]


def test_a_push_restores_missing_and_truncated_files(
    store: Store, states: dict[str, State], tmp_path: Path
) -> None:
    remote = tmp_path / "remote"
    push(store, remote)
    packs, manifests = (
        sorted((remote / "packs").iterdir()),
        sorted((remote / "manifests").iterdir()),
    )
    packs[0].unlink()
    packs[1].write_bytes(packs[1].read_bytes()[:-5])
    manifests[0].write_bytes(manifests[0].read_bytes()[:-5])
    sent = push(store, remote)
    assert (sent.packs, sent.checkpoints) == (2, (manifests[0].stem,))
    assert_holds(Store.open(remote), states)


def test_a_pull_restores_missing_and_truncated_files(
    store: Store, states: dict[str, State]
) -> None:
    url = MemoryStore()
    push(store, url)
    root = Path(store.path)
    packs, manifests = sorted((root / "packs").iterdir()), sorted((root / "manifests").iterdir())
    packs[0].unlink()
    manifests[0].write_bytes(manifests[0].read_bytes()[:5])
    pull(store.path, url)
    assert_holds(Store.open(root), states)


def test_two_stores_push_to_one_remote(url: Any, tmp_path: Path, state: State) -> None:
    model = write_base(tmp_path / "base.safetensors", state)
    one, two = Store.create(tmp_path / "one"), Store.create(tmp_path / "two")
    states = {}
    for seed, store in enumerate((one, two), 1):
        name = f"from-{seed}"
        states[name] = train_step(state, 0.03, seed)
        store.pin(store.save(states[name], parent=store.add_base(model), step=seed), name)
        push(store, url)
    for store in (one, two):
        pull(store, url)
        assert_holds(store, states)
    assert push(one, url).bytes == 0
    assert_holds(open_remote(url), states)


def test_a_ref_that_another_writer_moved_is_not_moved(
    store: Store, states: dict[str, State], url: Any, tmp_path: Path
) -> None:
    push(store, url)
    clone(url, tmp_path / "clone")
    other = Store.open(tmp_path / "clone")
    theirs = other.save(make_state(21), step=77)
    other.pin(theirs, "first")
    push(other, url)
    mine = store.save(make_state(22), step=78)
    store.pin(mine, "first")
    before = paths(url)
    with pytest.raises(ConflictError, match=f"'first' points to {theirs.id[:12]}"):
        push(store, url)
    assert paths(url) == before
    with pytest.raises(ConflictError, match=f"'first' points to {mine.id[:12]}"):
        pull(store, url)
    assert store.refs()["first"] == mine.id
    moved = push(store, url, force=True).refs
    assert [(move.name, move.before, move.after) for move in moved] == [
        ("first", theirs.id, mine.id)
    ]
    # The checkpoint to which the ref pointed still exists there.
    assert theirs.id in {checkpoint.id for checkpoint in open_remote(url).log()}
    # The clone does not have the checkpoint to which the ref points now.
    with pytest.raises(ConflictError):
        push(other, url)
    pull(other, url)
    assert other.refs()["first"] == mine.id


def test_a_ref_moves_if_the_source_has_its_checkpoint(
    store: Store, states: dict[str, State], url: Any
) -> None:
    push(store, url)
    before = store.refs()["first"]
    store.pin("alone", "first")
    (move,) = push(store, url).refs
    assert (move.name, move.before, move.after) == ("first", before, store.refs()["alone"])
    assert open_remote(url).refs() == store.refs()


def test_a_ref_that_is_named_like_the_id_of_another_object_is_not_pulled(
    tmp_path: Path, store: Store, states: dict[str, State], caplog: pytest.LogCaptureFixture
) -> None:
    name = store.get("first").id[:8]
    store.pin("first", name)
    store.pin("alone", name)
    url = f"file://{tmp_path / 'remote'}"
    push(store, url)
    clone(url, tmp_path / "clone")
    copy = Store.open(tmp_path / "clone")
    assert_holds(copy, states)
    assert copy.refs().keys() == states.keys()
    assert f"refs/{name}.json is left out: the id {store.get('first').id[:12]}" in caplog.text


@pytest.mark.parametrize("kind", ["s3", "memory", "directory"])
@pytest.mark.parametrize("new", [True, False])
def test_of_two_pushers_at_the_same_moment_one_fails(  # noqa: PLR0917
    kind: str,
    new: bool,
    store: Store,
    states: dict[str, State],
    tmp_path: Path,
    s3: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Let another push write a ref between the comparison and the write of this push."""
    url, name = place(kind, tmp_path, s3, monkeypatch), "latest" if new else "first"
    push(store, url)
    clone(url, tmp_path / "clone")
    other = Store.open(tmp_path / "clone")
    theirs = other.save(make_state(21))
    other.pin(theirs, name)
    store.pin(store.save(make_state(22)), name)
    remote, pushed = FaultyRemote(connect_remote(url)), []

    def before(kind: str, path: str) -> None:
        if kind in ("create", "replace") and path == f"refs/{name}.json" and not pushed:
            pushed.append(path)
            push(other, url)

    remote.before = before
    with pytest.raises(ConflictError, match=f"'{name}' points to {theirs.id[:12]}"):
        push(store, remote)
    assert pushed
    assert open_remote(url).refs()[name] == theirs.id
    assert open_remote(url).check() == []


def test_refs_of_timelines_are_sent_only_on_request(
    tmp_path: Path, store: Store, base: Base, state: State
) -> None:
    timeline = Timeline(store, base, retention=KeepLast(2), name="run")
    for step in range(1, 4):
        timeline.commit(train_step(state, 0.02, step), step)
    kept, url = [c.id for c in timeline.checkpoints()], MemoryStore()
    assert "1 timeline not moved: use --timelines" in str(push(store, url))
    assert open_remote(url).refs() == {}
    assert [c.id for c in open_remote(url).log()] == kept
    assert "not moved" not in str(push(store, url, timelines=True))
    clone(url, tmp_path / "clone", timelines=True)
    there = Timeline(Store.open(tmp_path / "clone"), base, retention=KeepLast(2), name="run")
    assert [c.id for c in there.checkpoints()] == kept


def test_a_run_may_evict_while_its_store_is_pushed(store: Store, base: Base, state: State) -> None:
    timeline = Timeline(store, base, retention=KeepLast(1))
    timeline.commit(train_step(state, 0.3, 1), 1)
    url, steps = MemoryStore(), iter(range(2, 4))
    remote = FaultyRemote(connect_remote(url))

    def before(kind: str, path: str) -> None:
        step = next(steps, None) if kind == "put" and path.startswith("packs/") else None
        if step is not None:
            timeline.commit(train_step(state, 0.3, step), step)

    remote.before = before
    push(store, remote)
    there = open_remote(url)
    assert there.check() == []
    assert [c.step for c in there.log()][-1] == 3
    assert same_bits(there.load(there.log()[-1]), train_step(state, 0.3, 3))


def test_unreferenced_records_of_a_pack_are_not_sent(tmp_path: Path) -> None:
    """A record whose reference was deleted must not be preferred to a sound one."""
    goal, near, other = make_state(1), {}, {}
    near, other = train_step(goal, 0.02, 2), train_step(goal, 0.2, 3)
    big = {"other.big": make_state(5, big=True)["model.embed.weight"]}
    target = Store.create(tmp_path / "target")
    parent = target.save(near, step=0)
    both = target.save({**goal, **big}, parent=parent, step=1)
    keep = target.save(big, step=2)
    for gone in (both, parent):
        target.forget(gone)
    target.plan_gc().execute()
    assert len(target.sources(keep)) == 1
    source = Store.create(tmp_path / "source")
    old = source.save(other, step=0)
    source.pin(source.save(goal, parent=old, step=5), "goal")
    for url in (MemoryStore(), tmp_path / "directory"):
        push(target, url)
        push(source, url)
        there = open_remote(url)
        assert same_bits(there.load("goal"), goal)
        assert there.check() == []
    pull(target, url)
    assert_holds(target, {"goal": goal})
    assert same_bits(target.load(keep), big)
    push(source, target.path)
    assert_holds(Store.open(target.path), {"goal": goal})


def test_a_push_runs_gc_in_a_directory_with_unreferenced_records(tmp_path: Path) -> None:
    goal = make_state(1)
    near, other = train_step(goal, 0.02, 2), train_step(goal, 0.2, 3)
    big = {"other.big": make_state(5, big=True)["model.embed.weight"]}
    target = Store.create(tmp_path / "target")
    parent = target.save(near, step=0)
    both = target.save({**goal, **big}, parent=parent, step=1)
    target.pin(target.save(big, step=2), "big")
    for gone in (both, parent):
        target.forget(gone)
    target.plan_gc().execute()
    source = Store.create(tmp_path / "source")
    source.pin(source.save(goal, parent=source.save(other, step=0), step=5), "goal")
    push(source, target.path)
    assert_holds(Store.open(target.path), {"goal": goal, "big": big})


def test_a_clone_needs_an_empty_place_and_a_store(
    store: Store, states: dict[str, State], tmp_path: Path
) -> None:
    url = MemoryStore()
    with pytest.raises(NotAStoreError, match="no store at"):
        clone(url, tmp_path / "clone")
    with pytest.raises(NotAStoreError, match="no store at"):
        open_remote(url)
    with pytest.raises(NotAStoreError, match="no store at"):
        pull(store, url)
    push(store, url)
    with pytest.raises(NotAStoreError, match="already"):
        clone(url, store.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(NotAStoreError, match="not empty"):
        clone(url, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_a_push_needs_an_empty_place_or_a_store(store: Store, url: Any) -> None:
    connect_remote(url).put("notes.txt", *as_parts(b"mine"))
    with pytest.raises(NotAStoreError, match=r"not empty and no store \(notes\.txt\)"):
        push(store, url)
    assert paths(url) == ["notes.txt"]


def test_a_remote_of_another_version_is_refused(store: Store, states: dict[str, State]) -> None:
    url = MemoryStore()
    connect_remote(url).put("store.json", *as_parts(b'{"format":"msft-store","version":2}'))
    with pytest.raises(StoreError, match=r"store\.json"):
        push(store, url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense://somewhere", "cannot hold a store"),
        ("s3://", "cannot hold a store"),
        ("file://host/path", "has no path"),
        ("http://[::1/x", "not a valid URL"),
    ],
)
def test_an_invalid_address_is_reported(store: Store, url: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        push(store, url)


def test_passwords_are_not_shown() -> None:
    assert "secret" not in connect_remote("https://me:secret@127.0.0.1:9/x?sig=secret").describe(
        "a"
    )


@pytest.mark.parametrize("folder", ["manifests", "bases", "packs", "refs"])
def test_names_that_lead_to_other_folders_are_refused(
    store: Store, states: dict[str, State], tmp_path: Path, folder: str
) -> None:
    """Assert that names of an untrusted listing are checked."""
    inner = connect_remote(MemoryStore())
    push(store, inner, with_base=True)
    (path, *_) = inner.sizes(folder)
    suffix = path.rpartition(".")[2]

    class Hostile(FaultyRemote):
        def sizes(self, folder: str) -> dict[str, int]:
            return {self.renamed(name): size for name, size in inner.sizes(folder).items()}

        def renamed(self, name: str) -> str:
            return f"{folder}/../../../../evil.{suffix}" if name == path else name

        def read(self, name: str, offset: int, length: int) -> bytes:
            return inner.read(path if "evil" in name else name, offset, length)

        def read_versioned(self, name: str, most: int) -> Any:
            return inner.read_versioned(path if "evil" in name else name, most)

        def size(self, name: str) -> int | None:
            return inner.size(path if "evil" in name else name)

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CorruptedError, match="evil"):
        clone(Hostile(inner), tmp_path / "a" / "b" / "clone", with_base=True)
    inside = tmp_path / "a"
    assert sorted(p for p in tmp_path.rglob("*") if not p.is_relative_to(inside)) == before
    assert not list(inside.rglob("evil*"))


def test_a_missing_bucket_is_reported(
    store: Store, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place("s3", tmp_path, s3, monkeypatch)
    with pytest.raises(StorageError, match=r"s3://nobody/run.*bucket does not exist"):
        push(store, "s3://nobody/run")


def test_an_address_that_does_not_answer_is_reported_in_seconds(
    store: Store, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = place("s3", tmp_path, s3, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    begun = time.monotonic()
    for endpoint, message in (
        (f"http://127.0.0.1:{port}", f"refused by http://127.0.0.1:{port}; check .* AWS_ENDPOINT"),
        (s3.replace("http:", "https:"), "does not support TLS"),
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StorageError, match=message) as raised:
            push(store, url)
        assert "\n" not in str(raised.value)
    assert time.monotonic() - begun < 20


def test_profiles_are_read_and_their_absence_is_reported(
    store: Store, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = place("s3", tmp_path, s3, monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with pytest.raises(StorageError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        push(store, url)
    (tmp_path / "credentials").write_text(
        "[mine]\naws_access_key_id = a\naws_secret_access_key = b\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "mine")
    push(store, url)
    assert open_remote(url).log() == store.log()
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(InvalidInputError, match="other"):
        push(store, url)


def test_a_pin_during_a_pull_is_not_lost(
    store: Store, states: dict[str, State], tmp_path: Path
) -> None:
    inner = connect_remote(MemoryStore())
    push(store, inner)
    clone(inner, tmp_path / "clone")
    copy, ids = Store.open(tmp_path / "clone"), store.refs()
    store.pin(store.save(make_state(31), parent="first"), "first")
    push(store, inner)
    remote, mine = FaultyRemote(inner), []

    def before(kind: str, path: str) -> None:
        if kind == "read" and path.startswith("packs/") and not mine:
            mine.append(copy.save(make_state(32)))
            copy.pin(mine[0], "first")

    remote.before = before
    with pytest.raises(ConflictError, match=f"'first' points to {mine[0].id[:12] if mine else ''}"):
        pull(copy, remote)
    assert copy.refs()["first"] == mine[0].id != ids["first"]
    assert copy.check() == []


def test_few_requests_list_many_checkpoints(store: Store) -> None:
    inner = connect_remote(MemoryStore())
    parent: Any = None
    for step in range(6):
        parent = store.save({"x": make_state(step)["model.embed.weight"]}, parent=parent)
        store.pin(parent, f"step-{step}")
    push(store, inner)
    remote, made = FaultyRemote(inner), []
    remote.before = lambda kind, path: made.append(f"{kind} {path}")
    there = open_remote(remote)
    assert len(there.log()) == 6
    assert there.refs() == store.refs()
    assert (
        len(made)
        == len(set(made)) + made.count("sizes manifests") - 1 + made.count("size store.json") - 1
    )
    assert len(made) <= 2 * 6 + 8
    made.clear()
    assert push(store, remote).bytes == 0
    assert sum(one.startswith("read_versioned refs") for one in made) == 6


def test_large_files_are_sent_in_parts(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = place("s3", tmp_path, s3, monkeypatch)
    data = bytes(range(256)) * 100_000
    remote = connect_remote(url)
    assert isinstance(remote, RetryingRemote)
    remote.put("a/b", lambda: (data[at : at + 1_000_000] for at in range(0, len(data), 10**6)), 0)
    remote.put(
        "a/c", lambda: (data[at : at + 10**6] for at in range(0, len(data), 10**6)), len(data)
    )
    assert remote.sizes("a") == {"a/b": len(data), "a/c": len(data)}
    assert remote.read("a/c", 12_345_678, 99) == data[12_345_678:12_345_777]
