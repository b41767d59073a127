"""The files of a model: kept with its checkpoint, no tensors of it, and written by an export."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from msft_store import (
    AsyncSaver,
    Box,
    CorruptedError,
    InvalidInputError,
    KeepLast,
    MismatchError,
    Parts,
    Store,
    Timeline,
)
from msft_store.integrations.remote import clone, push
from msft_store.maintenance.export import export
from msft_store.objects.catalog import Catalog
from msft_store.objects.manifest import CheckpointFacts
from msft_store.storage.backend import LocalBackend
from msft_store.tensors.files import PREFIX
from tests.support.states import State, make_state, same_bits, train_step, write_base

FILES = {
    "config.json": b'{"model_type": "own"}\n',
    "tokenizer_config.json": b"{}",
    "additional_chat_templates/tool.jinja": b"{{ x }}",
    "empty.txt": b"",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    write_base(folder / "model.safetensors", make_state())
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    for name in ("generation_config.json", "special_tokens_map.json", "code.py", "notes.txt"):
        (folder / name).write_text("of the base")
    (folder / "additional_chat_templates" / "base.jinja").write_text("of the base")
    return folder


def names_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_files_are_kept_once_and_are_no_tensors(store: Store, state: State) -> None:
    one = store.save(state, files=FILES)
    moved = train_step(state, 0.1, 1)
    two = store.save(moved, parent=one, files=FILES)
    bare = store.save(moved, parent=one, step=3)

    assert store.files(one) == store.files(two) == FILES
    assert store.files(bare) == {}
    assert two.logical_bytes == bare.logical_bytes + sum(map(len, FILES.values()))
    held = store.stats().stored_bytes
    store.save(moved, parent=two, step=4, files=FILES)
    assert store.stats().stored_bytes == held

    assert same_bits(store.load(one), state)
    assert store.tensors(one).keys() == state.keys() == {s.tensor for s in store.sources(one)}
    assert {name for name, _, _ in store.chunks(one)} == {n for n in state if state[n].numel()}
    assert {d.name for d in store.diff(one, two)} == state.keys()
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    store.load_into(target, one)
    assert same_bits(target, state)
    with pytest.raises(MismatchError):
        store.load(one, [f"{PREFIX}config.json"])
    assert store.check() == []


def test_every_kind_of_save_keeps_files(store: Store, state: State) -> None:
    with AsyncSaver(store) as saver:
        assert store.files(saver.save(state, files=FILES).result()) == FILES
    timeline = Timeline(store, None, retention=KeepLast(2))
    first = timeline.commit(state, files=FILES)
    second = timeline.commit_async(train_step(state, 0.1, 1), files=FILES).result()
    assert same_bits(timeline.rollback(first), state)
    assert store.files(first) == store.files(timeline.commit(state, files=FILES)) == FILES
    assert store.files(second) == FILES

    tensor = torch.arange(4.0)
    part = store.encode([Box(name="w", shape=(4,), offset=(0,), tensor=tensor)])
    joined = store.save(Parts([part]), files=FILES)
    assert (store.files(joined), store.load(joined)["w"].tolist()) == (FILES, tensor.tolist())


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"../config.json": b""}, "relative path"),
        ({"/etc/config.json": b""}, "relative path"),
        ({"a//b": b""}, "relative path"),
        ({"a\\b": b""}, "relative path"),
        ({".hidden/a": b""}, "relative path"),
        ({"tmp/a": b""}, "relative path"),
        ({"a\n": b""}, "relative path"),
        ({"": b""}, "1 to 255 bytes"),
        ({3: b""}, "1 to 255 bytes"),
        ({"model.safetensors": b""}, "weights"),
        ({"model.safetensors.index.json": b""}, "weights"),
        ({"code.py": b""}, "code"),
        ({"a": b"", "a/b": b""}, "folder"),
        ({"a": "text"}, "must be bytes"),
        ([b"a"], "map names to bytes"),
    ],
)
def test_a_file_that_cannot_be_kept_is_refused(store: Store, files: Any, why: str) -> None:
    timeline = Timeline(store, None, retention=KeepLast(1))
    for act in (store.save, timeline.commit, timeline.commit_async, AsyncSaver(store).save):
        with pytest.raises(InvalidInputError, match=why):
            act({"w": torch.ones(1)}, files=files)
    assert store.log() == []


def test_more_than_a_checkpoint_holds_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msft_store.tensors.files._MAX_TOTAL", 7)
    with pytest.raises(InvalidInputError, match="holds at most 7 B"):
        store.save({}, files={"a": b"1234", "b": b"1234"})


def test_no_tensor_has_the_name_of_a_file(store: Store) -> None:
    tensor = torch.ones(1)
    with pytest.raises(InvalidInputError, match="files=…"):
        store.save({f"{PREFIX}config.json": tensor})
    with pytest.raises(InvalidInputError, match="files=…"):
        store.encode([Box(name=f"{PREFIX}x", shape=(1,), offset=(0,), tensor=tensor)])


@pytest.mark.parametrize("name", ["../out", "code.py", "w.bin", "config.json"])
def test_a_strangers_store_writes_no_file_outside(tmp_path: Path, store: Store, name: str) -> None:
    tensor = torch.ones(2, dtype=torch.float32 if name == "config.json" else torch.uint8)
    facts = CheckpointFacts.of()
    with store.session("save"):
        ckpt = store._writer.save(
            {PREFIX + name: tensor},
            facts,
            parent=None,
            references=None,
            compared=None,
        )
    for act in (lambda: store.export(ckpt, tmp_path / "in" / "x"), lambda: store.files(ckpt)):
        with pytest.raises(CorruptedError, match=r"file"):
            act()
    assert names_below(tmp_path / "in") == []


def test_recorded_files_take_the_place_of_the_bases(
    tmp_path: Path, store: Store, model: Path
) -> None:
    base = store.add_base(model)
    state = train_step(make_state(), 0.1, 1)
    store.export(store.save(state, parent=base), tmp_path / "plain")
    assert "additional_chat_templates/base.jinja" in names_below(tmp_path / "plain")

    ckpt = store.save(state, parent=base, files=FILES)
    written = store.export(ckpt, tmp_path / "out")
    # The files of the base that belong to its own configuration and tokenizer stay away.
    assert names_below(tmp_path / "out") == sorted(
        [*FILES, "code.py", "notes.txt", "model.safetensors"]
    )
    assert written == sorted(tmp_path / "out" / name for name in names_below(tmp_path / "out"))
    assert all((tmp_path / "out" / name).read_bytes() == data for name, data in FILES.items())

    store.export(ckpt, tmp_path / "like", like=model)
    assert names_below(tmp_path / "like") == names_below(tmp_path / "plain")


def test_shards_and_copies_of_a_store_have_the_files(
    tmp_path: Path, store: Store, state: State
) -> None:
    ckpt = store.save(state, files=FILES)
    catalog = Catalog(LocalBackend(Path(store.path)))
    export(catalog, ckpt, tmp_path / "shards", shard_bytes=40_000)
    push(store, tmp_path / "remote")
    clone(tmp_path / "remote", tmp_path / "copy")
    Store.open(tmp_path / "copy").export(ckpt.id, tmp_path / "out")
    for folder in (tmp_path / "shards", tmp_path / "out"):
        assert all((folder / name).read_bytes() == data for name, data in FILES.items())
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize(
    "configs",
    [
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        (
            {"torch_dtype": "float16", "text_config": {"dtype": "bfloat16", "size": 3}},
            {"torch_dtype": "float32", "text_config": {"dtype": "float32", "size": 3}},
        ),
        ({"dtype": "bfloat16", "quantization_config": {"bits": 8}}, None),
        ({"hidden_size": 3}, None),
    ],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_configuration_says_the_dtype_of_the_weights(
    tmp_path: Path, store: Store, model: Path, configs: Any, recorded: bool
) -> None:
    config, mended = configs
    text = json.dumps(config)
    (model / "config.json").write_text(text)
    wide = {name: tensor.float() for name, tensor in make_state().items()}
    files = {"config.json": text.encode()} if recorded else None
    ckpt = store.save(wide, parent=store.add_base(model), files=files)
    store.export(ckpt, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == (mended or config)


def doubts_of(store: Store, folder: Path, caplog: pytest.LogCaptureFixture, ckpt: Any) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        store.export(ckpt, folder)
    return caplog.text


def test_an_export_says_what_from_pretrained_may_not_give(
    tmp_path: Path, store: Store, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, state = store.add_base(model), make_state()

    def doubts(name: str, tensors: State, config: Any = None) -> str:
        files = None if config is None else {"config.json": json.dumps(config).encode()}
        ckpt = store.save(tensors, parent=base, files=files, step=len(list(tmp_path.iterdir())))
        return doubts_of(store, tmp_path / name, caplog, ckpt)

    assert doubts("equal", state) == ""
    assert doubts("own", state | {"head": torch.ones(3)}, {"dtype": "float32"}) == ""

    grown = torch.cat([state["model.embed.weight"], torch.ones(2, 64, dtype=torch.bfloat16)])
    resized = state | {"model.embed.weight": grown, "lm_head.weight": grown}
    assert "1 tensor of another shape (model.embed.weight)" in doubts("resized", resized)
    headed = {name: t for name, t in state.items() if name != "model.scale"}
    said = doubts("headed", headed | {"score.weight": grown + 1})
    assert "1 tensor not in the base (score.weight)" in said
    assert "1 tensor in the base alone (model.scale)" in said

    renamed = {f"{name.partition('.')[2]}.own": tensor for name, tensor in state.items()}
    assert doubts("renamed", {n: t for n, t in renamed.items() if n != "weight.own"}) == ""

    mixed = state | {"model.scale": torch.tensor(0.1)}
    assert "rounds 1 tensor (model.scale): load with dtype=float32" in doubts("mixed", mixed)
    assert "rounds 1 tensor " in doubts("mixed-own", mixed, {"dtype": "bfloat16"})
    assert doubts("wide", mixed, {"dtype": "float32"}) == ""

    auto = {"auto_map": {"AutoModel": "code.Own", "AutoConfig": "absent.Own"}}
    assert "code that the base does not have (absent.py)" in doubts("code", state, auto)


def test_an_export_says_that_parts_of_a_quantised_weight_are_no_weight(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    parts = {
        "w.qdata": torch.ones(4, dtype=torch.int8),
        "w.scale": torch.ones(1),
        "w.json": torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8),
    }
    said = doubts_of(store, tmp_path / "out", caplog, store.save(parts))
    assert "1 value in several parts, as of a quantised weight (w.json): from_pretrained" in said
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == parts.keys()
