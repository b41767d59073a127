"""The level of encoding: the default of a store, and its use by saves, anchors and readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msft_store import Base, InvalidInputError, Store, VersionError
from msft_store.codec import codecs
from msft_store.codec.codecs import Level
from msft_store.format.layout import seal
from tests.support.states import State, make_state, same_bits, train_step, write_base


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the levels with which chunks are encoded."""
    seen: list[str] = []
    encode = codecs.encode

    def encode_and_record(*arguments: Any, level: Level = "fast", **options: Any) -> Any:
        seen.append(level)
        return encode(*arguments, level=level, **options)

    monkeypatch.setattr(codecs, "encode", encode_and_record)
    return seen


def rewrite_config(store: Store, **changes: Any) -> None:
    config = Path(store.path, "store.json")
    content = json.loads(config.read_bytes()) | changes
    config.write_bytes(seal({k: v for k, v in content.items() if k != "digest" and v is not None}))


@pytest.mark.parametrize("level", codecs.LEVELS)
def test_a_store_keeps_its_level(tmp_path: Path, levels: list[str], level: Level) -> None:
    store, state = Store.create(tmp_path / "store", level=level), make_state()
    base = store.add_base(write_base(tmp_path / "base.safetensors", state))
    changed = train_step(state, 0.05, 1)
    ckpt = Store.open(store.path).save(changed, parent=base)
    assert set(levels) == {level}
    assert same_bits(store.load(ckpt), changed)


def test_a_save_may_have_another_level(
    store: Store, base: Base, state: State, levels: list[str]
) -> None:
    assert store.level == "fast"
    changed = train_step(state, 0.05, 1)
    small = store.save(changed, parent=base, level="small")
    assert set(levels) == {"small"}
    assert same_bits(store.load(small), changed)
    # The level is not part of the content.
    assert store.save(changed, parent=base).id == small.id


def test_an_anchor_has_the_level_of_the_store(tmp_path: Path, levels: list[str]) -> None:
    store, state = Store.create(tmp_path / "store", level="small"), make_state()
    base = store.add_base(write_base(tmp_path / "base.safetensors", state))
    first = store.save(train_step(state, 0.5, 1), parent=base, level="fast")
    second = store.save(train_step(store.load(first), 0.01, 2), parent=first, level="fast")
    levels.clear()
    store.anchor(second)
    assert set(levels) == {"small"}


def test_a_store_without_a_level_is_fast(store: Store) -> None:
    rewrite_config(store, level=None)
    assert Store.open(store.path).level == "fast"


def test_an_unknown_level_is_refused(tmp_path: Path, store: Store, state: State) -> None:
    with pytest.raises(InvalidInputError, match="level is one of fast, small, not 'best'"):
        Store.create(tmp_path / "other", level="best")  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()
    with pytest.raises(InvalidInputError, match="not ''"):
        store.save(state, level="")  # type: ignore[arg-type]
    rewrite_config(store, level="best")
    with pytest.raises(VersionError, match=r"store\.json.*'best'.*newer msft-store"):
        Store.open(store.path)
