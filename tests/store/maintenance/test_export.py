"""A checkpoint as an ordinary model directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from msft_store import BaseError, CorruptedError, InvalidInputError, OutOfSpaceError, Store
from msft_store.maintenance.export import export
from msft_store.objects.catalog import Catalog
from msft_store.storage.backend import LocalBackend
from tests.support.rot import changed_at
from tests.support.states import State, make_state, same_bits, train_step, write_base


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_base(folder / "model.safetensors", make_state())
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin", ".gitattributes"):
        (folder / name).write_text(name)
    return folder


def test_weights_and_companions_make_a_model_directory(
    tmp_path: Path, store: Store, model: Path
) -> None:
    state = train_step(make_state(), 0.1, 1)
    ckpt = store.save(state, parent=store.add_base(model))
    files = store.export(ckpt, tmp_path / "new" / "out")
    assert [path.name for path in files] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert same_bits(safetensors.torch.load_file(files[1]), state)
    # It is a base like any other, and the checkpoint costs nothing against it.
    again = store.save(state, parent=store.add_base(tmp_path / "new" / "out"))
    assert again.stored_bytes == 0


def test_an_adapter_has_the_name_that_peft_looks_for(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    state = {"base_model.model.q.lora_A.weight": torch.randn(4, 64)}
    safetensors.torch.save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    ckpt = store.save(state, parent=store.add_base(folder))
    bare = store.save(state, step=1)

    like = store.export(bare, tmp_path / "like", like=folder)
    for files in (store.export(ckpt, tmp_path / "out"), like):
        assert [p.name for p in files] == ["adapter_config.json", "adapter_model.safetensors"]
        assert same_bits(safetensors.torch.load_file(files[1]), state)


def test_large_models_are_sharded_with_an_index(tmp_path: Path, store: Store) -> None:
    state = make_state()
    ckpt = store.save(state)
    out = tmp_path / "out"
    shards = export(Catalog(LocalBackend(Path(store.path))), ckpt, out, shard_bytes=40_000)
    assert len(shards) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    loaded = {
        name: tensor
        for path in out.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    assert same_bits(loaded, state)
    assert store.save(state, parent=store.add_base(out)).stored_bytes == 0


def test_a_dtype_that_safetensors_lacks_is_refused(tmp_path: Path, store: Store) -> None:
    ckpt = store.save({"w": torch.ones(2, dtype=torch.complex128)})
    with pytest.raises(InvalidInputError, match="complex128"):
        store.export(ckpt, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["__metadata__", "w\ud800"])
def test_a_name_that_safetensors_cannot_write_is_refused(
    tmp_path: Path, store: Store, name: str
) -> None:
    ckpt = store.save({name: torch.ones(2)})
    with pytest.raises(InvalidInputError, match="rename it"):
        store.export(ckpt, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_cannot_fit_is_refused_before_it_is_written(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = store.save(make_state())
    monkeypatch.setattr(LocalBackend, "free_bytes", lambda self: ckpt.logical_bytes - 1)
    monkeypatch.setattr(LocalBackend, "writer", lambda self: pytest.fail("it was written"))
    with pytest.raises(OutOfSpaceError, match="do not fit"):
        store.export(ckpt, tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_companions_come_from_the_bases_own_folder_alone(
    tmp_path: Path, store: Store, model: Path
) -> None:
    (model / "tmp").write_text("a file of that name")
    (model / "folder").mkdir()
    ckpt = store.save(train_step(make_state(), 0.1, 1), parent=store.add_base(model))
    files = store.export(ckpt, tmp_path / "out")
    assert [path.name for path in files] == ["config.json", "model.safetensors", "tokenizer.json"]
    write_base(model / "model.safetensors", make_state(7))
    with pytest.raises(BaseError):
        store.export(ckpt, tmp_path / "other")


@pytest.mark.parametrize("act", [Store.open, Store.create])
def test_no_path_has_a_nul_character(act: Callable[[str], Store]) -> None:
    with pytest.raises(InvalidInputError, match="NUL"):
        act("a\0b")


def test_no_other_path_has_a_nul_character(store: Store) -> None:
    ckpt = store.save({"w": torch.ones(2)})
    for act in (store.add_base, lambda path: store.export(ckpt, path)):
        with pytest.raises(InvalidInputError, match="NUL"):
            act("a\0b")


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, store: Store, model: Path) -> None:
    ckpt = store.save(train_step(make_state(), 0.1, 1), parent=store.add_base(model))
    changed_at(next(Path(store.path).glob("packs/*.pack")), 40)
    with pytest.raises(CorruptedError):
        store.export(ckpt, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "store"]


@pytest.mark.parametrize("said", [3, {"without": 3, "adapter": []}, {"without": ""}])
def test_invalid_export_metadata_is_ignored(
    tmp_path: Path, store: Store, state: State, said: Any
) -> None:
    ckpt = store.save(state, metadata={"export": said})
    store.export(ckpt, tmp_path / "out")
    assert same_bits(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"), state)


@pytest.mark.parametrize(
    ("config", "once"),
    [
        ({"model_type": "x"}, True),
        ({"model_type": "x", "tie_word_embeddings": False}, False),
        ({"model_type": "x", "text_config": {"tie_word_embeddings": False}}, False),
        ({}, False),
    ],
)
def test_tied_tensors_are_written_as_the_base_has_them(
    tmp_path: Path, store: Store, model: Path, config: dict[str, Any], once: bool
) -> None:
    (model / "config.json").write_text(json.dumps(config))
    base, state = store.add_base(model), train_step(make_state(), 0.1, 1)
    chance = state | {
        "head.norm": torch.ones(64, dtype=torch.bfloat16),
        "head.weight": state["model.layers.0.up.weight"] + 1,
    }
    store.export(store.save(chance, parent=base), tmp_path / "one")
    found = safetensors.torch.load_file(tmp_path / "one" / "model.safetensors")
    left = {name: t for name, t in chance.items() if not once or name != "lm_head.weight"}
    assert same_bits(found, left)

    # Tied no more: nothing can be left out.
    apart = state | {"lm_head.weight": state["lm_head.weight"] + 1}
    store.export(store.save(apart, parent=base), tmp_path / "two")
    assert same_bits(safetensors.torch.load_file(tmp_path / "two" / "model.safetensors"), apart)


def test_names_lose_a_prefix_that_all_of_them_have(
    tmp_path: Path, store: Store, model: Path
) -> None:
    base, state = store.add_base(model), train_step(make_state(), 0.1, 1)
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    store.export(store.save(wrapped, parent=base), tmp_path / "one")
    assert same_bits(safetensors.torch.load_file(tmp_path / "one" / "model.safetensors"), state)

    # A head that the base does not have is part of the model.
    headed = wrapped | {"head.weight": torch.ones(2, 2)}
    store.export(store.save(headed, parent=base), tmp_path / "two")
    written = safetensors.torch.load_file(tmp_path / "two" / "model.safetensors")
    assert same_bits(written, state | {"head.weight": headed["head.weight"]})
    store.export(store.save(headed, parent=base), tmp_path / "three", layout="memory")
    assert same_bits(safetensors.torch.load_file(tmp_path / "three" / "model.safetensors"), headed)


def test_an_export_strips_the_prefix_of_the_model(tmp_path: Path, store: Store) -> None:
    state = {"m.a": torch.ones(2), "m.m.b": torch.ones(3), "o.a": torch.ones(4)}
    said = {"within": "m.", "without": "m.m."}
    store.export(store.save(state, metadata={"export": said}), tmp_path / "one")
    found = safetensors.torch.load_file(tmp_path / "one" / "model.safetensors")
    assert same_bits(found, {"a": state["m.a"]})

    said = {"within": "nothing."}
    store.export(store.save(state, metadata={"export": said}), tmp_path / "two")
    assert same_bits(safetensors.torch.load_file(tmp_path / "two" / "model.safetensors"), state)
