"""A module gets back its whole state dict, also what is not the memory of its parameters."""

from __future__ import annotations

import dataclasses
import enum
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from msft_store import (
    AsyncSaver,
    InvalidInputError,
    KeepLast,
    MismatchError,
    Resident,
    Store,
    Timeline,
    flatten,
    unflatten,
)


class Scaled(torch.nn.Module):
    """A module with extra state of a kind that ``pack`` and ``read`` say."""

    pack: Callable[[float], Any] = staticmethod(lambda value: torch.tensor([value]))
    read: Callable[[Any], float] = staticmethod(float)

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), value))
        self.scale = value

    def get_extra_state(self) -> Any:
        return type(self).pack(self.scale)

    def set_extra_state(self, state: Any) -> None:
        self.scale = type(self).read(state)


class Dictionary(Scaled):
    pack = staticmethod(lambda value: {"scale": value, "history": [torch.full((2,), value)]})
    read = staticmethod(lambda state: float(state["history"][0][0]) * (state["scale"] > 0))


class Stream(Scaled):
    pack = staticmethod(lambda value: io.BytesIO(str(value).encode()))
    read = staticmethod(lambda state: float(state.getvalue()))


class Array(Scaled):
    pack = staticmethod(lambda value: np.full(3, value))
    read = staticmethod(lambda state: float(state[2]))


class Growing(Scaled):
    """Its extra state has another size for each value, and may be empty."""

    pack = staticmethod(lambda value: torch.ones(int(value) - 7))
    read = staticmethod(lambda state: len(state) + 7.0)


class Absent(Scaled):
    pack = staticmethod(lambda value: None if value == 7 else value)


class Packed(torch.nn.Module):
    """It keeps a transposed matrix and saves the plain one, and loads it with its bias."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.full((2,), value))
        self.packed = torch.full((4, 2), value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.packed.t().contiguous()

    def _load_from_state_dict(self, state: Any, prefix: str, *_: Any) -> None:
        with torch.no_grad():
            self.bias.copy_(state[prefix + "bias"])
        self.packed = state[prefix + "weight"].t().contiguous()

    @property
    def scale(self) -> float:
        return float((self.packed.sum() + self.bias.detach().sum()) / 10)


class Live(torch.nn.Module):
    """It saves a tensor of its own that it did not register, and that it does not load."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.own = torch.full((4,), value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "own"] = self.own

    @property
    def scale(self) -> float:
        return float(self.own[0])


KINDS = [Scaled, Dictionary, Stream, Array, Growing, Absent, Packed, Live]


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_that_is_no_parameter_comes_back(store: Store, kind: Any, nested: bool) -> None:
    def make(value: float) -> tuple[Any, torch.nn.Module]:
        part = kind(value)
        whole = torch.nn.Sequential(torch.nn.Linear(2, 2), part) if nested else part
        return part, whole

    (_, saved), (part, target) = make(9.0), make(7.0)
    ckpt = store.save(saved)
    store.load_into(target, ckpt)
    assert part.scale == 9.0
    assert store.save(target).id == ckpt.id


@pytest.mark.parametrize("kind", KINDS)
def test_a_roll_back_and_a_save_in_the_background_restore_it_too(store: Store, kind: Any) -> None:
    module = kind(9.0)
    with Timeline(store, None, retention=KeepLast(9)) as timeline, AsyncSaver(store) as saver:
        timeline.resident = Resident(module)
        ckpt = timeline.commit_async(module, step=1).result()
        again = saver.save(module).result()
        other = kind(7.0)
        timeline.rollback(ckpt, into=other)
        assert other.scale == 9.0
        third = kind(7.0)
        store.load_into(third, again)
        assert third.scale == 9.0


def test_a_copy_that_nothing_loads_is_named(store: Store) -> None:
    class Stated(torch.nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "norm"] = self.weight.norm()[None]

    one, other = Stated(2, 2), Stated(2, 2)
    ckpt = store.save(one)
    # After the weights are restored, the copy equals the stored one, so nothing is lost.
    store.load_into(other, ckpt)
    assert torch.equal(one.weight, other.weight)
    with pytest.raises(MismatchError, match="ignores norm"):
        store.load_into(other, store.save({**one.state_dict(), "norm": torch.ones(1) * 99}))


def test_a_refusal_of_load_state_dict_is_a_mismatch(store: Store) -> None:
    class Wide(Packed):
        def _load_from_state_dict(self, state: Any, *rest: Any) -> None:
            rest[-1].append("weight is too wide")

    with pytest.raises(MismatchError, match=r"refused weight.*too wide"):
        store.load_into(Wide(7.0), store.save(Wide(9.0)))


def test_what_lacks_the_extra_state_changes_nothing(store: Store) -> None:
    target = Scaled(7.0)
    with pytest.raises(MismatchError, match="lacks _extra_state"):
        store.load_into(target, store.save({"weight": torch.ones(4)}))
    assert target.weight[0] == 7.0


def test_a_mapping_has_no_place_for_what_is_no_tensor(store: Store) -> None:
    target = {**Dictionary(7.0).state_dict()}
    with pytest.raises(MismatchError, match="'_extra_state' is a dict"):
        store.load_into(target, store.save(Dictionary(9.0)))
    assert target["weight"][0] == 7.0
    with pytest.raises(InvalidInputError, match="save the module itself"):
        store.save(target)


def test_more_tensors_than_the_target_has_are_ignored_on_request(store: Store) -> None:
    ckpt = store.save({**Scaled(9.0).state_dict(), "more": torch.ones(1)})
    target = Scaled(7.0)
    with pytest.raises(MismatchError, match="lacks more"):
        store.load_into(target, ckpt)
    store.load_into(target, ckpt, partial=True)
    assert (target.scale, float(target.weight[0])) == (9.0, 9.0)


class Rounding(enum.Enum):
    NEAREST = "nearest"


@dataclasses.dataclass(frozen=True)
class Settings:
    dtype: torch.dtype
    rounding: Rounding
    block: tuple[int, ...]


class Scaled8(torch.Tensor):
    """Integers and a scale, as quantised weights and optimizer states are."""

    codes: torch.Tensor
    factor: torch.Tensor
    context: Any

    @staticmethod
    def __new__(cls, codes: torch.Tensor, factor: torch.Tensor, context: Any) -> Scaled8:
        new = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        new.codes, new.factor, new.context = codes, factor, context
        return new

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "factor"], self.context

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, *_: Any) -> Scaled8:
        return cls(inner["codes"], inner["factor"], context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            it = args[0]
            return cls(it.codes.detach(), it.factor.detach(), it.context)
        raise NotImplementedError(func)


def scaled8(seed: int, block: int = 4) -> Scaled8:
    codes = torch.randint(-128, 127, (3, 4), generator=torch.Generator().manual_seed(seed))
    settings = Settings(torch.bfloat16, Rounding.NEAREST, (1, block))
    context = [settings, {"signed": True}, torch.Size([3]), 0.1, None]
    return Scaled8(codes.to(torch.int8), torch.full((1,), seed / 3), context)


def with_weight(weight: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def test_a_tensor_subclass_is_kept_exactly(store: Store) -> None:
    saved, target = scaled8(1), scaled8(2)
    ckpt = store.save(with_weight(saved))
    codes = target.codes
    store.load_into(with_weight(target), ckpt)
    assert torch.equal(codes, saved.codes)
    assert torch.equal(target.factor, saved.factor)
    again = scaled8(3)
    store.load_into({"weight": again}, ckpt)
    assert torch.equal(again.codes, saved.codes)
    assert store.save({"weight": again}).id == ckpt.id


def test_nested_state_gives_back_tensor_subclasses(store: Store) -> None:
    tensors, tree = flatten({"state": {0: {"exp_avg": scaled8(1), "step": torch.tensor(3.0)}}})
    ckpt = store.save(tensors, metadata={"tree": tree})
    found = unflatten(store.load(ckpt), ckpt.metadata["tree"])["state"][0]["exp_avg"]
    assert type(found) is Scaled8
    assert found.context == scaled8(1).context
    assert [type(part) for part in found.context] == [type(p) for p in scaled8(1).context]
    assert torch.equal(found.codes, scaled8(1).codes)


def test_another_context_is_a_mismatch_before_anything_changes(store: Store) -> None:
    target = scaled8(2, block=8)
    with pytest.raises(MismatchError, match=r"weight\.json describes another"):
        store.load_into(with_weight(target), store.save(with_weight(scaled8(1))))
    assert torch.equal(target.codes, scaled8(2).codes)


def test_tensor_subclasses_that_cannot_be_kept_are_named(store: Store) -> None:
    strange = scaled8(1)
    strange.context = object()
    with pytest.raises(InvalidInputError, match=r"'weight' is a tensor subclass.*a object"):
        store.save(with_weight(strange))

    class Opaque(torch.Tensor):
        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            raise NotImplementedError(func)

    opaque = torch.Tensor._make_wrapper_subclass(Opaque, (2,))
    with pytest.raises(InvalidInputError, match="'weight' is a Opaque, a tensor subclass"):
        store.save({"weight": opaque})


def test_stored_names_run_no_code_of_other_classes(store: Store) -> None:
    tensors, tree = flatten({"a": scaled8(1)})
    content = tree["a"]["$subclass"]
    for name, error in [
        ("subprocess:Popen", InvalidInputError),
        ("no_such_module:Thing", MismatchError),
    ]:
        changed = {"a": {"$subclass": {**content, "type": name}}}
        with pytest.raises(error):
            unflatten(tensors, changed)


def test_states_of_low_bit_optimizers_are_exact(store: Store, monkeypatch: Any) -> None:
    optim = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda f=None, **_: f if f is not None else lambda g: g)
    for kind in (optim.AdamW8bit, optim.AdamW4bit, optim.AdamWFp8):
        models = [torch.nn.Linear(128, 128), torch.nn.Linear(128, 128)]
        optimizers = [kind(model.parameters(), lr=1e-3) for model in models]

        def step(at: int) -> None:
            models[at](torch.ones(2, 128)).square().sum().backward()  # noqa: B023
            optimizers[at].step()  # noqa: B023
            optimizers[at].zero_grad()  # noqa: B023

        step(0)
        tensors, tree = flatten(optimizers[0].state_dict(), "optimizer")
        ckpt = store.save({**models[0].state_dict(), **tensors}, metadata={"tree": tree})
        store.load_into(models[1], ckpt, partial=True)
        optimizers[1].load_state_dict(unflatten(store.load(ckpt), ckpt.metadata["tree"]))
        step(0)
        step(1)
        assert torch.equal(models[0].weight, models[1].weight), kind
