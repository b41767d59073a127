"""Publish versions of weights and follow them: exact, verified, and all or nothing."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore
from safetensors.torch import load_file

from msft_store import (
    Base,
    BaseError,
    ConflictError,
    CorruptedError,
    Follower,
    InvalidInputError,
    KeepLast,
    MismatchError,
    PinnedError,
    StorageError,
    Store,
    Timeline,
    UnknownCheckpointError,
    Version,
)
from msft_store.integrations.remote import clone, pull
from msft_store.objects.refs import read_ref
from msft_store.remote import holdings, leases
from msft_store.remote.transport.url import connect_remote
from msft_store.storage.backend import LocalBackend
from tests.support.remotes import FaultyRemote
from tests.support.s3 import environment, serve_s3
from tests.support.states import State, bits_of, make_state, same_bits, train_step, write_base

VERSIONS = 7
LATEST_REF = "versions/policy/latest"


def make_versions(count: int = VERSIONS, *, share: float = 0.05) -> list[State]:
    states = [make_state()]
    for seed in range(1, count):
        states.append(train_step(states[-1], share, seed))
    return states


def publish_all(store: Store, states: list[State], to: Any, **options: Any) -> list[Version]:
    return [
        store.publish(state, name="policy", step=step, to=to, **options)
        for step, state in enumerate(states)
    ]


def target() -> State:
    """Return tensors of the same form as a version with another content, tied as there."""
    state = make_state(99)
    state["lm_head.weight"] = state["model.embed.weight"]
    return state


def held(follower: Follower) -> State:
    return dict(follower.tensors())


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Return the address of a real S3 server with a bucket."""
    with serve_s3() as address:
        yield address


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[State]]:
    """Return a place in memory with versions, and their states."""
    place, states = connect_remote(MemoryStore()), make_versions()
    publish_all(Store.create(tmp_path_factory.mktemp("p") / "store"), states, place)
    return place, states


@pytest.fixture(params=["directory", "s3"])
def url(
    request: pytest.FixtureRequest, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> str:
    if request.param == "directory":
        return str(tmp_path / "place")
    for name, value in environment(s3).items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}/run"


@pytest.mark.parametrize("way", ["into", "cache", "neither"])
def test_a_follower_holds_each_version_bit_for_bit(
    way: str, store: Store, tmp_path: Path, url: str
) -> None:
    into = target() if way == "into" else None
    cache = tmp_path / "cache" if way == "cache" else None
    follower = Follower(url, "policy", into=into, cache=cache)
    for step, state in enumerate(make_versions(3)):
        version = store.publish(state, name="policy", step=step, to=url)
        assert follower.update() == version == follower.held
        assert same_bits(held(follower), state)
        if into is not None:
            assert same_bits(into, state)
        if cache is not None:
            assert same_bits(load_file(cache / "current" / "model.safetensors"), state)
        assert follower.update() == version
        assert list(follower.changed()) == []
    follower.close()


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=st.lists(st.integers(0, VERSIONS - 1), min_size=1, max_size=4), junk=st.booleans())
def test_any_version_leads_to_any_other(
    published: tuple[Any, list[State]], path: list[int], junk: bool
) -> None:
    place, states = published
    into = target()
    follower = Follower(place, "policy", into=into)
    before: State | None = None
    for step in path:
        if junk and before is not states[step]:
            # What others do to the tensors in between is found, because nothing is trusted.
            into["model.scale"].fill_(7)
        assert follower.update(to=f"policy@{step}").step == step
        assert same_bits(into, states[step])
        changed = {name for name, _ in follower.changed()}
        if before is None:
            assert changed == set(into)
        elif not junk:
            assert changed == {n for n in into if bits_of(into[n]) != bits_of(before[n])}
        before = states[step]


def test_who_holds_the_version_before_reads_only_the_changes(
    store: Store, base: Base, tmp_path: Path
) -> None:
    """Assert that an update takes three requests, and nothing new one."""
    place = FaultyRemote(connect_remote(MemoryStore()))
    states, into = make_versions(), target()
    follower = Follower(place, "policy", into=into, base=tmp_path / "base.safetensors")
    late = []
    for step, state in enumerate(states):
        store.publish(state, name="policy", step=step, to=place, base=base)
        place.count = 0
        follower.update()
        assert same_bits(into, state)
        assert place.count <= 3 or step == 0
        place.count = 0
        follower.update()
        assert place.count == 1
        newcomer = Follower(place, "policy", base=tmp_path / "base.safetensors")
        newcomer.update()
        assert same_bits(held(newcomer), state)
        late.append(newcomer.fetched_bytes)
    whole = sum(tensor.nbytes for tensor in states[0].values())
    assert max(late) < whole, "a late joiner reads a few changes, not the model"


@pytest.mark.parametrize("named", [True, False], ids=["own base", "sent base"])
def test_with_a_base_only_its_changes_are_sent(
    named: bool, store: Store, tmp_path: Path, base: Base
) -> None:
    place = connect_remote(MemoryStore())
    states = make_versions(3)
    path = tmp_path / "base.safetensors"
    for step, state in enumerate(states):
        store.publish(state, name="policy", step=step, to=place, base=path)
    assert all(checkpoint.base == base.id for checkpoint in store.log())
    moved = path.rename(tmp_path / "elsewhere.safetensors")
    with Follower(place, "policy", base=moved if named else None) as follower:
        for step in (2, 0, 1):
            follower.update(f"policy@{step}")
            assert same_bits(held(follower), states[step])
    other = Follower(place, "policy", base=store_file(tmp_path, make_state(5)))
    with pytest.raises(BaseError, match="differences from base"):
        other.update()


def store_file(folder: Path, state: State) -> Path:
    return write_base(folder / "other.safetensors", state)


def test_an_update_that_is_cut_at_any_request_leaves_the_version_before(
    published: tuple[Any, list[State]], tmp_path: Path
) -> None:
    inner, states = published
    cuts = 0
    for start, end in ((2, 3), (3, 4), (1, 6), (6, 0)):
        for cache in (None, tmp_path / f"{start}-{end}"):
            remote = FaultyRemote(inner)
            follower = Follower(remote, "policy", cache=cache)
            follower.update(f"policy@{start}")
            for moment in range(100):
                remote.count, remote.fail_at = 0, moment
                try:
                    follower.update(f"policy@{end}")
                except StorageError:
                    cuts += 1
                    assert same_bits(held(follower), states[start])
                    continue
                break
            assert same_bits(held(follower), states[end])
    assert cuts >= 20


def test_a_publish_that_is_cut_at_any_request_leaves_all_versions_whole(
    tmp_path: Path,
) -> None:
    states = make_versions(3)
    for moment in range(200):
        store = Store.create(tmp_path / f"store-{moment}")
        remote = FaultyRemote(connect_remote(MemoryStore()))
        publish_all(store, states[:2], remote)
        remote.count, remote.fail_at = 0, moment
        try:
            store.publish(states[2], name="policy", step=2, to=remote)
        except StorageError:
            remote.fail_at = None
        else:
            assert moment > 10
            break
        follower = Follower(remote, "policy")
        found = follower.update().step
        assert same_bits(held(follower), states[found])
        store.publish(states[2], name="policy", step=2, to=remote)
        for step in (2, 1, 0):
            follower.update(f"policy@{step}")
            assert same_bits(held(follower), states[step])


@pytest.mark.parametrize("ends", [(3, 4), (0, 6)], ids=["changes", "chain"])
def test_flipped_bits_in_what_is_fetched_are_refused(
    published: tuple[Any, list[State]], ends: tuple[int, int]
) -> None:
    inner, states = published
    refused = 0
    for number in range(8):
        remote = FaultyRemote(inner)
        follower = Follower(remote, "policy")
        follower.update(f"policy@{ends[0]}")
        read, count = remote.read, 0

        def flip(
            path: str, offset: int, length: int, read: Any = read, number: int = number
        ) -> bytes:
            nonlocal count
            data = bytearray(read(path, offset, length))
            count += 1
            at = number * 131 % max(len(data), 1)
            data[at] ^= 1 << number
            return bytes(data)

        remote.read = flip  # type: ignore[method-assign]
        with contextlib.suppress(CorruptedError):
            follower.update(f"policy@{ends[1]}")
            assert same_bits(held(follower), states[ends[1]])
            continue
        refused += 1
        assert count
        assert same_bits(held(follower), states[ends[0]])
    assert refused >= 4


def test_an_error_while_tensors_are_written_puts_the_version_before_back(
    published: tuple[Any, list[State]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, states = published
    into = target()
    follower = Follower(place, "policy", into=into)
    follower.update("policy@1")
    write, calls = holdings._Patch.write, 0

    def interrupt(patch: holdings._Patch) -> None:
        nonlocal calls
        calls += 1
        write(patch)
        if calls == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(holdings._Patch, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        follower.update("policy@5")
    assert same_bits(into, states[1])
    follower.update("policy@5")
    assert same_bits(into, states[5])


def test_a_target_that_does_not_match_is_refused_unchanged(
    published: tuple[Any, list[State]],
) -> None:
    place, _ = published
    into = target()
    del into["model.scale"]
    before = {name: tensor.clone() for name, tensor in into.items()}
    with pytest.raises(MismatchError):
        Follower(place, "policy", into=into).update()
    assert same_bits(into, before)
    with pytest.raises(InvalidInputError, match="in tensors or in a directory"):
        Follower(place, "policy", into=into, cache="elsewhere")


def test_a_module_is_followed_in_place(store: Store, tmp_path: Path) -> None:
    model, other = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    place = tmp_path / "place"
    version = store.publish(model, name="policy", step=40, to=place)
    weight = other.weight
    follower = Follower(place, "policy", into=other)
    assert (str(follower.update()), version.step) == ("policy@40", 40)
    assert other.weight is weight
    assert torch.equal(other.weight, model.weight)
    assert [name for name, _ in follower.changed()] == ["bias", "weight"]
    with torch.no_grad():
        model.bias.add_(1)
    store.publish(model, name="policy", step=41, to=place)
    follower.update()
    assert [name for name, _ in follower.changed()] == ["bias"]


def test_a_saved_checkpoint_is_published_as_it_is(store: Store, tmp_path: Path) -> None:
    saved = store.save(make_state(), step=3)
    version = store.publish(saved, name="policy", step=3, to=tmp_path / "place")
    assert version.checkpoint == saved.id
    with pytest.raises(InvalidInputError, match="has its metrics"):
        store.publish(saved, name="policy", step=3, to=tmp_path / "place", metrics={"loss": 1.0})


def test_a_timeline_publishes_its_commits_and_weights(
    store: Store, base: Base, tmp_path: Path
) -> None:
    place, states = tmp_path / "place", make_versions(4)
    with Timeline(store, base, retention=KeepLast(1)) as timeline:
        for step, state in enumerate(states[:3]):
            commit = timeline.commit_async(state, step=step)
            version = timeline.publish(commit.result(), name="policy", step=step, to=place)
            assert version.checkpoint == commit.result().id
        timeline.publish(states[3], name="policy", step=3, to=place, keep=KeepLast(2))
        assert [one.step for one in timeline.checkpoints()] == [2]
    assert [one.step for one in store.log()] == [2, 3], "versions stay when a timeline ends"
    follower = Follower(place, "policy", base=tmp_path / "base.safetensors")
    for step in (3, 2):
        follower.update(f"policy@{step}")
        assert same_bits(held(follower), states[step])
    with pytest.raises(InvalidInputError, match="closed"):
        timeline.publish(states[0], name="policy", step=4, to=place)


def test_a_second_publisher_is_refused(store: Store, tmp_path: Path) -> None:
    place, states = tmp_path / "place", make_versions(3)
    store.publish(states[0], name="policy", step=0, to=place)
    second = Store.create(tmp_path / "second")
    with pytest.raises(ConflictError, match="another store published 'policy'"):
        second.publish(states[1], name="policy", step=1, to=place)
    assert second.log() == []
    second.publish(states[1], name="reward", step=1, to=place)
    # The stream goes on from a store that has its versions.
    clone(place, tmp_path / "clone")
    Store.open(tmp_path / "clone").publish(states[1], name="policy", step=1, to=place)
    with pytest.raises(ConflictError):
        store.publish(states[2], name="policy", step=2, to=place)
    pull(store, place)
    store.publish(states[2], name="policy", step=2, to=place)
    follower = Follower(place, "policy")
    follower.update()
    assert same_bits(held(follower), states[2])


def test_two_processes_do_not_publish_one_name_from_one_store(store: Store, tmp_path: Path) -> None:
    store.publish(make_state(), name="policy", step=0, to=tmp_path / "place")
    code = (
        "import sys, torch; from msft_store import Store, BusyError\n"
        "try: Store.open(sys.argv[1]).publish({'a': torch.ones(1)}, name='policy', step=1, "
        "to=sys.argv[2])\n"
        "except BusyError: print('refused')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, store.path, tmp_path / "place"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "refused"


def test_a_retention_policy_drops_versions_here_and_in_a_directory(
    store: Store, tmp_path: Path
) -> None:
    place, states = tmp_path / "place", make_versions(5)
    publish_all(store, states, place, keep=KeepLast(2))
    assert [checkpoint.step for checkpoint in store.log()] == [3, 4]
    there = Store.open(place)
    assert [checkpoint.step for checkpoint in there.log()] == [3, 4]
    assert there.check() == []
    assert sorted(there.refs()) == ["versions/policy/3", "versions/policy/4", LATEST_REF]
    follower = Follower(place, "policy")
    for step in (4, 3):
        follower.update(f"policy@{step}")
        assert same_bits(held(follower), states[step])
    with pytest.raises(UnknownCheckpointError, match="no version policy@0"):
        follower.update("policy@0")
    assert same_bits(held(follower), states[3])


def test_a_leased_version_stays_until_its_lease_ends(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, states = tmp_path / "place", make_versions(4)
    publish_all(store, states[:2], place)
    follower = Follower(place, "policy", lease=100)
    first = follower.update("policy@0")
    store.publish(states[2], name="policy", step=2, to=place, keep=KeepLast(1))
    there = Store.open(place)
    assert [checkpoint.step for checkpoint in there.log()] == [0, 2]
    with pytest.raises(PinnedError, match="leases/policy"):
        there.forget(first.checkpoint)
    there.plan_gc(KeepLast(1)).execute()
    Follower(place, "policy").update("policy@0")
    # The follower that crashed never ended its lease; time does.
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 1000 * 10**9)
    store.publish(states[3], name="policy", step=3, to=place, keep=KeepLast(1))
    assert [checkpoint.step for checkpoint in there.log()] == [3]
    assert there.check() == []
    assert not [name for name in there.refs() if first.checkpoint == there.refs()[name]]


def test_a_directory_keeps_the_changes_that_a_follower_needs(store: Store, tmp_path: Path) -> None:
    place, states = tmp_path / "place", make_versions()
    publish_all(store, states[:4], place)
    follower = Follower(place, "policy")
    follower.update()
    for step in (4, 5, 6):
        store.publish(states[step], name="policy", step=step, to=place)
    changes = [changes_of(place, str(step)) for step in range(7)]
    packs = set().union(*changes)
    assert sent_changes(place) == packs & (changes[4] | changes[6]) < packs
    # Without the packs of changes, those of the chain lead to each version.
    for step in (4, 5, 2, 3, 6):
        follower.update(f"policy@{step}")
        assert same_bits(held(follower), states[step])
    follower.close()
    store.publish(states[0], name="policy", step=7, to=place)
    assert sent_changes(place) == changes_of(place, "latest")


def changes_of(place: Path, step: str) -> set[str]:
    """Return the packs of nothing but changes that the ref of a version names."""
    path = f"refs/versions/policy/{step}.json"
    note = read_ref(LocalBackend(place), path).note
    return {pack for pack in note["changes"] if pack.startswith("steps/")}


def sent_changes(place: Path) -> set[str]:
    """Return the packs of nothing but changes that are at a place."""
    return set(LocalBackend(place).list("steps"))


def test_leases_end_with_the_follower_and_move_with_its_version(
    store: Store, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    versions = publish_all(store, make_versions(2), place)
    there = Store.open(place)

    def leased() -> list[str]:
        return [one for name, one in there.refs().items() if name.startswith("leases/")]

    with Follower(place, "policy") as follower:
        for version in versions:
            follower.update(version)
            assert leased() == [version.checkpoint]
        clone(place, tmp_path / "clone")
        assert not [n for n in Store.open(tmp_path / "clone").refs() if n.startswith("leases/")]
    assert leased() == []


def test_a_follower_that_must_not_write_does_without_leases(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    place, states = tmp_path / "place", make_versions(2)
    publish_all(store, states, place)

    def refuse(*_: object, **__: object) -> None:
        raise StorageError("permission denied")

    monkeypatch.setattr(leases, "write_ref", refuse)
    follower = Follower(place, "policy")
    for step in (0, 1):
        follower.update(f"policy@{step}")
        assert same_bits(held(follower), states[step])
    assert caplog.text.count("no version is leased") == 1


def test_a_directory_is_taken_up_again_and_mended(store: Store, tmp_path: Path) -> None:
    place, cache, states = tmp_path / "place", tmp_path / "cache", make_versions(3)
    files = {"config.json": b"{}"}
    publish_all(store, states, place, files=files)
    Follower(place, "policy", cache=cache).update("policy@1")
    again = Follower(place, "policy", cache=cache)
    again.update("policy@1")
    assert again.fetched_bytes < 5000, "what the directory holds is not read again"
    file = cache / "current" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    mending = Follower(place, "policy", cache=cache)
    mending.update("policy@1")
    assert same_bits(load_file(file), states[1])
    mending.update()
    assert same_bits(load_file(file), states[2])
    assert (cache / "current" / "config.json").read_bytes() == b"{}"
    assert len([path for path in cache.iterdir() if path.is_dir()]) <= 3


@pytest.mark.parametrize("name", ["a/b", "", "-a", "a b"])
def test_a_name_that_no_ref_can_have_is_refused(name: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError):
        store.publish(make_state(), name=name, step=0, to=tmp_path / "place")
    with pytest.raises(InvalidInputError):
        Follower(tmp_path / "place", name)


def test_what_was_never_published_is_unknown(store: Store, tmp_path: Path) -> None:
    place = tmp_path / "place"
    store.publish(make_state(), name="policy", step=0, to=place)
    with pytest.raises(UnknownCheckpointError, match="never published"):
        Follower(place, "other").update()
    with pytest.raises(InvalidInputError, match="NAME@STEP"):
        Follower(place, "policy").update("other@0")
    with pytest.raises(InvalidInputError, match="the store itself"):
        store.publish(make_state(), name="policy", step=1, to=store.path)
