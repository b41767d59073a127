"""Lose each request to a real S3 server once, or all requests after it."""

from __future__ import annotations

import contextlib
import datetime
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from msft_store import NotAStoreError, StorageError, Store
from msft_store.integrations.remote import clone, open_remote, pull, push
from msft_store.remote.transport.object_store import ObjectRemote, object_remote
from tests.support.cutting import CuttingProxy
from tests.support.s3 import KEYS, serve_s3
from tests.support.states import State, same_bits, train_step, write_base


@pytest.fixture(scope="module")
def proxy() -> Iterator[CuttingProxy]:
    """Return a proxy in front of a real S3 server with a bucket."""
    with serve_s3() as address:
        parts = urlsplit(address)
        proxy = CuttingProxy((str(parts.hostname), parts.port or 0))
        yield proxy
        proxy.close()


@pytest.fixture
def states(tmp_path: Path, state: State) -> dict[str, State]:
    """Fill a small store; return the states of its checkpoints by ref."""
    name = "model.layers.0.up.weight"
    small = {name: state[name]}
    store = Store.create(tmp_path / "store")
    base = store.add_base(write_base(tmp_path / "base.safetensors", small))
    found = {"best": train_step(small, 0.5, 1)}
    store.pin(store.save(found["best"], parent=base), "best")
    return found


def fresh() -> str:
    return f"s3://bucket/{uuid.uuid4().hex}"


def at(proxy: CuttingProxy, url: str, *, retries: int = 3) -> ObjectRemote:
    """Return the remote at a URL with only the retries of obstore, and short waits."""
    patience = {
        "max_retries": retries,
        "retry_timeout": datetime.timedelta(seconds=10),
        "backoff": {
            "base": 2,
            "init_backoff": datetime.timedelta(milliseconds=1),
            "max_backoff": datetime.timedelta(milliseconds=5),
        },
    }
    return object_remote(url, endpoint=proxy.address, retry_config=patience, **KEYS)


def requests_of(proxy: CuttingProxy) -> int:
    proxy.cut = lambda number: None
    done = len(proxy.requests)
    proxy.requests.clear()
    return done


def assert_holds(store: Store, states: dict[str, State]) -> None:
    assert store.check() == []
    assert set(store.refs()) == set(states)
    for name, state in states.items():
        assert same_bits(store.load(name), state)


def assert_readable(proxy: CuttingProxy, url: str, states: dict[str, State]) -> None:
    """Assert that every visible checkpoint and ref is complete."""
    with contextlib.suppress(NotAStoreError):
        there = open_remote(at(proxy, url))
        assert there.check() == []
        for name in there.refs():
            assert same_bits(there.load(name), states[name])


def test_a_push_outlives_the_loss_of_any_one_reply(
    proxy: CuttingProxy, tmp_path: Path, states: dict[str, State]
) -> None:
    """Lose also the replies to conditional writes that succeeded."""
    requests_of(proxy)
    push(tmp_path / "store", at(proxy, fresh()), with_base=True)
    count = requests_of(proxy)
    assert count > 12
    for moment in range(count):
        url = fresh()
        proxy.cut = lambda number, moment=moment: "reply" if number == moment else None
        (move,) = push(tmp_path / "store", at(proxy, url), with_base=True).refs
        assert move.name == "best"
        assert requests_of(proxy) > count
        assert_holds(open_remote(at(proxy, url)), states)


def test_a_push_that_ends_at_any_request_leaves_a_complete_store_and_can_be_resumed(
    proxy: CuttingProxy, tmp_path: Path, states: dict[str, State]
) -> None:
    requests_of(proxy)
    push(tmp_path / "store", at(proxy, fresh()), with_base=True)
    for moment in range(requests_of(proxy)):
        url = fresh()
        # The request succeeds, but its reply is lost.
        proxy.cut = lambda number, moment=moment: "reply" if number >= moment else None
        with pytest.raises(StorageError):
            push(tmp_path / "store", at(proxy, url, retries=0), with_base=True)
        requests_of(proxy)
        assert_readable(proxy, url, states)
        push(tmp_path / "store", at(proxy, url), with_base=True)
        assert_holds(open_remote(at(proxy, url)), states)
        requests_of(proxy)


def test_a_clone_that_ends_at_any_request_can_be_resumed(
    proxy: CuttingProxy, tmp_path: Path, states: dict[str, State]
) -> None:
    url = fresh()
    push(tmp_path / "store", at(proxy, url), with_base=True)
    (tmp_path / "base.safetensors").unlink()
    requests_of(proxy)
    clone(at(proxy, url), tmp_path / "whole", with_base=True)
    count, cut = requests_of(proxy), 0
    for moment in range(count):
        target = tmp_path / f"clone-{moment}"
        proxy.cut = lambda number, moment=moment: "reply" if number >= moment else None
        with pytest.raises(StorageError):
            clone(at(proxy, url, retries=0), target, with_base=True)
        requests_of(proxy)
        if (target / "store.json").exists():
            cut += 1
            assert Store.open(target).check() == []
        clone(at(proxy, url), target, with_base=True)
        assert_holds(Store.open(target), states)
        assert pull(target, at(proxy, url), with_base=True).bytes == 0
        assert Store.open(target).plan_gc().leftovers == ()
        requests_of(proxy)
    assert cut > 5
