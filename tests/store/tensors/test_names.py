"""The tensors of compiled modules are those of the modules that were compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from msft_store import Box, KeepLast, MismatchError, Parts, Resident, Store, Timeline
from msft_store.tensors.boxes import whole_box
from msft_store.tensors.names import plain_name
from tests.support.states import same_bits


def make_model(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    inner = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    return torch.nn.Sequential(inner, torch.nn.Linear(4, 3))


def compile_part(model: torch.nn.Sequential) -> torch.nn.Module:
    model[0][1] = torch.compile(model[0][1], backend="eager")
    return model


def compile_twice(model: torch.nn.Sequential) -> torch.nn.Module:
    return torch.compile(compile_part(model), backend="eager")


def compile_whole(model: torch.nn.Sequential) -> torch.nn.Module:
    return torch.compile(model, backend="eager")


COMPILE = [compile_whole, compile_part, compile_twice]


@pytest.mark.parametrize("compile_it", COMPILE)
def test_a_compiled_module_has_the_checkpoints_of_the_original(
    tmp_path: Path, store: Store, compile_it: type[torch.nn.Module]
) -> None:
    plain, compiled = make_model(0), compile_it(make_model(0))
    assert compiled.state_dict().keys() != plain.state_dict().keys()
    saved = store.save(plain, step=1)
    assert store.save(compiled, step=1) == saved
    assert store.save(dict(compiled.state_dict()), step=1) == saved
    for target in (make_model(1), compile_it(make_model(1))):
        store.load_into(target, saved)
        assert same_bits(store.load(saved, target.state_dict()), target.state_dict())
        timeline = Timeline(store, None, retention=KeepLast(1), name="line")
        timeline.resident = Resident(target)
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.add_(1)
        moved = timeline.commit_async(target, step=2).result()
        assert moved == store.save(target.state_dict(), step=2, metadata=moved.metadata)
        timeline.rollback(saved, into=target)
        assert [t.tolist() for t in target.parameters()] == [p.tolist() for p in plain.parameters()]
        timeline.close()
        assert store.save(target, step=1) == saved


@pytest.mark.parametrize("compile_it", COMPILE)
def test_checkpoints_with_the_names_of_a_compiled_module_are_restored(
    tmp_path: Path,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    compile_it: type[torch.nn.Module],
) -> None:
    compiled = compile_it(make_model(0))
    boxes = [whole_box(name, tensor) for name, tensor in compiled.state_dict().items()]
    assert store.save(Parts([store.encode(boxes)])) == store.save(make_model(0))
    with monkeypatch.context() as earlier:
        earlier.setattr("msft_store.store.plain_names", dict)
        old = store.save(Parts([store.encode(boxes)]))
    assert same_bits(store.load(old), compiled.state_dict())
    for target in (make_model(1), compile_it(make_model(1))):
        store.load_into(target, old)
        assert store.save(target) == store.save(make_model(0))
        store.load_boxes(old, [Box(name=plain_name(b.name), **_place(b)) for b in boxes])
    (file,) = store.export(old, tmp_path / "out")
    assert same_bits(safetensors.torch.load_file(file), make_model(0).state_dict())


def _place(box: Box) -> dict[str, object]:
    return {"shape": box.shape, "offset": box.offset, "tensor": torch.empty(box.shape)}


def test_only_a_whole_part_of_a_name_is_the_wrappers() -> None:
    names = ["_orig_mod.w", "a._orig_mod._orig_mod.w", "a_orig_mod.w", "w._orig_mod"]
    assert [plain_name(name) for name in names] == ["w", "a.w", "a_orig_mod.w", "w._orig_mod"]


def test_names_stay_apart_that_would_be_equal_without_the_wrapper(store: Store) -> None:
    state = {"a.w": torch.zeros(2), "a._orig_mod.w": torch.ones(2)}
    ckpt = store.save(state)
    assert same_bits(store.load(ckpt), state)
    target = {name: torch.full((2,), 7.0) for name in state}
    store.load_into(target, ckpt)
    assert same_bits(target, state)
    with pytest.raises(MismatchError, match="has no b"):
        store.load(ckpt, ["b.w", "a.w"])
