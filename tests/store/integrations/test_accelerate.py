"""Save states of Accelerate in a store, by its hooks and with save_state and load_state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from msft_store import InvalidInputError, KeepLast, NotAStoreError, Store, Timeline, flatten
from msft_store.integrations.accelerate import load_state, register, save_state
from tests.support.states import same_bits


class Counter:
    """An object with a state of its own."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Run:
    """A small training with dropout, a schedule and an object of its own."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(
            model, optimizer, schedule
        )
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    def train(self, steps: int = 3) -> None:
        for _ in range(steps):
            self.model(torch.randn(4, 8)).square().mean().backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.counter.count += 1

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        parts = [self.model, self.optimizer, self.schedule, self.counter]
        tensors, rest = flatten([part.state_dict() for part in parts])
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}, rest


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def timeline(store: Store) -> Timeline:
    return Timeline(store, None, retention=KeepLast(3))


def equal(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return same_bits(one[0], other[0]) and one[1] == other[1]


def test_training_continues_bit_for_bit_after_load_state(store: Store, timeline: Timeline) -> None:
    run = Run()
    run.train()
    saved = save_state(run.accelerator, timeline, step=3, metrics={"loss": 1.0})
    before = run.state()
    run.train()
    after = run.state()

    other = Run(seed=7)
    load_state(other.accelerator, Store.open(store.path), saved)

    assert equal(other.state(), before)
    other.train()
    assert equal(other.state(), after)
    assert store.get(saved).step == 3


def test_save_state_of_accelerate_leaves_the_weights_to_the_store(
    tmp_path: Path, store: Store, timeline: Timeline
) -> None:
    run = Run()
    register(run.accelerator, timeline, store)
    run.train()
    run.accelerator.save_state(str(tmp_path / "state"))
    before = run.state()
    run.train()

    run.accelerator.load_state(str(tmp_path / "state"))

    assert equal(run.state(), before)
    names = {path.name for path in (tmp_path / "state").iterdir()}
    assert "msft_store.json" in names
    assert not {name for name in names if name.endswith(".safetensors")}
    (saved,) = timeline.checkpoints()
    assert same_bits(store.load(saved), run.model.state_dict())


def test_a_folder_without_a_checkpoint_is_refused(
    tmp_path: Path, store: Store, timeline: Timeline
) -> None:
    run = Run()
    run.accelerator.save_state(str(tmp_path / "state"))
    register(run.accelerator, timeline, store)

    with pytest.raises(NotAStoreError, match="saved without a store"):
        run.accelerator.load_state(str(tmp_path / "state"))


def test_a_state_of_other_objects_is_refused(store: Store, timeline: Timeline) -> None:
    run = Run()
    saved = save_state(run.accelerator, timeline)
    run.accelerator.register_for_checkpointing(Counter())
    run.train()
    before = run.state()

    with pytest.raises(InvalidInputError, match="object0"):
        load_state(run.accelerator, store, saved)
    assert equal(run.state(), before)


def test_the_main_process_needs_a_timeline(tmp_path: Path, store: Store) -> None:
    # Without a timeline, the weights would not be saved.
    run = Run()
    with pytest.raises(InvalidInputError, match="timeline"):
        register(run.accelerator, None, store)
    with pytest.raises(InvalidInputError, match="timeline"):
        save_state(run.accelerator, None)


def test_an_export_of_a_state_is_the_weights(
    tmp_path: Path, store: Store, timeline: Timeline
) -> None:
    run = Run()
    saved = save_state(run.accelerator, timeline, metadata={"epoch": 1})
    store.export(store.get(saved), tmp_path / "model")
    assert same_bits(load_file(tmp_path / "model" / "model.safetensors"), run.model.state_dict())
    assert store.get(saved).metadata["epoch"] == 1


def test_parts_of_a_model_may_have_the_names_of_the_stores_state(
    tmp_path: Path, store: Store, timeline: Timeline
) -> None:
    class Top(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.accelerator = torch.nn.Linear(2, 2)
            self.accelerator_ = torch.compile(torch.nn.Linear(2, 2), backend="eager")

    models = []
    for _ in range(2):
        accelerator = Accelerator(cpu=True)
        models.append((accelerator, accelerator.prepare(Top())))
    saved = save_state(models[0][0], timeline, metadata={"export": {"within": ""}, "position": 3})
    assert store.get(saved).metadata["position"] == 3
    load_state(models[1][0], store, saved)
    assert same_bits(models[0][1].state_dict(), models[1][1].state_dict())
    files = store.export(saved, tmp_path / "out")
    names = [
        f"{part}.{name}" for part in ("accelerator", "accelerator_") for name in ("bias", "weight")
    ]
    assert sorted(load_file(files[0])) == names


class Scaled(torch.nn.Module):
    """A module with extra state that is no tensor, and weights that it saves as copies."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), value))
        self.scale = value

    def get_extra_state(self) -> dict[str, float]:
        return {"scale": self.scale}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.scale = state["scale"]


@pytest.mark.parametrize("count", [1, 2])
def test_extra_state_of_modules_comes_back(
    tmp_path: Path, store: Store, timeline: Timeline, count: int
) -> None:
    accelerator = Accelerator(cpu=True)
    models: list[Any] = [accelerator.prepare(Scaled(float(at))) for at in range(count)]
    register(accelerator, timeline, store)
    ckpt = save_state(accelerator, timeline, step=1)
    accelerator.save_state(str(tmp_path / "state"))
    for load in (
        lambda: load_state(accelerator, store, ckpt),
        lambda: accelerator.load_state(str(tmp_path / "state")),
    ):
        for model in models:
            model.scale = 7.0
        load()
        assert [model.scale for model in models] == [float(at) for at in range(count)]


def test_an_offloaded_model_is_refused_at_the_start(store: Store, timeline: Timeline) -> None:
    accelerator = Accelerator(cpu=True)
    model = cpu_offload(torch.nn.Linear(2, 2), execution_device=torch.device("cpu"))
    accelerator.prepare_model(model, device_placement=False)
    with pytest.raises(InvalidInputError, match=r"'weight' has no plain memory.*offloaded"):
        register(accelerator, timeline, store)


class Forgetful(torch.nn.Module):
    """A model whose state dict drops a parameter that is trained."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), value))
        self.gain = torch.nn.Parameter(torch.full((2,), value))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}gain"]


@pytest.mark.parametrize("by_folder", [False, True])
def test_trained_parameters_that_no_state_dict_has_come_back(
    tmp_path: Path, store: Store, timeline: Timeline, by_folder: bool
) -> None:
    def prepare(value: float) -> tuple[Accelerator, torch.nn.Module, torch.Tensor]:
        accelerator = Accelerator(cpu=True)
        model, outside = Forgetful(value), torch.nn.Parameter(torch.full((3,), value))
        optimizer = torch.optim.SGD([*model.parameters(), outside], lr=0.1)
        accelerator.prepare(model, optimizer)
        if by_folder:
            register(accelerator, timeline, store)
        return accelerator, model, outside

    first, _, _ = prepare(1.0)
    second, model, outside = prepare(2.0)
    if by_folder:
        first.save_state(str(tmp_path / "state"))
        second.load_state(str(tmp_path / "state"))
        (saved,) = timeline.checkpoints()
    else:
        saved = store.get(save_state(first, timeline))
        load_state(second, store, saved)
    assert all((tensor == 1).all() for tensor in (*model.parameters(), outside))
    (file,) = store.export(saved, tmp_path / "out")
    assert load_file(file).keys() == {"gain", "weight"}
