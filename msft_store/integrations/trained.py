"""Keep what training changes but a module's state dict leaves out.

A state dict may lack parameters that are trained: hooks and overrides drop entries, and PEFT saves
only the tensors of an adapter. An optimizer may also train parameters that are of no module.
Invariant: what is trained is kept exactly, or refused by name.

Example::

    store.save(complete_state(model))
    restore_complete(model, store, checkpoint)
    outside_parameters([optimizer], [model])        # {"0.1.0": …}, of optimizer 0, group 1
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from msft_store.errors import InvalidInputError, MismatchError
from msft_store.objects.manifest import Checkpoint
from msft_store.store import Store
from msft_store.tensors.bytes import check_plain, flatten_entries, memory_key
from msft_store.tensors.names import plain_name, plain_names
from msft_store.tensors.nested import inner_tensors, json_name


class Entries(torch.nn.Module):
    """A module whose state dict is what ``read`` returns: a selection of another module's tensors.

    ``write`` restores the entries that are copies, as ``load_state_dict`` does.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        read: Callable[[], dict[str, Any]],
        write: Callable[[Mapping[str, Any]], Any],
    ) -> None:
        super().__init__()
        self.module = module
        self._read = read
        self._write = write

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the entries."""
        return self._read()

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Restore the entries that are copies."""
        return self._write(state_dict)


class SavedNames:
    """The names of the entries that a checkpoint holds."""

    def __init__(self, store: Store, checkpoint: Checkpoint) -> None:
        self._id = checkpoint.id
        self._names = plain_names(store.tensors(checkpoint)).keys()

    def __contains__(self, name: str) -> bool:
        plain = plain_name(name)
        return plain in self._names or json_name(plain) in self._names

    def warn_of_absent(self, trained: Iterable[str]) -> None:
        """Warn of trained tensors that the checkpoint of an earlier version does not hold."""
        absent = [name for name in trained if name not in self]
        if absent:
            warnings.warn(
                f"checkpoint {self._id[:12]} does not hold {', '.join(absent)}, which is trained: "
                "it was saved without, and these tensors stay as they are",
                stacklevel=2,
            )


def trained_beside(
    module: torch.nn.Module, kept: Mapping[str, Any], also: Iterable[str] = ()
) -> dict[str, torch.Tensor]:
    """Return the parameters that are trained, or named in ``also``, and have no memory in ``kept``.

    Raise :class:`InvalidInputError` if ``kept`` has another tensor of such a name.
    """
    places = memory_of(kept.values())
    further, found = set(also), {}
    for name, parameter in module.named_parameters():
        if not (parameter.requires_grad or name in further):
            continue
        if all(memory_key(inner) in places for inner in inner_tensors(parameter)):
            continue
        if name not in kept:
            found[name] = parameter.detach()
            continue
        # The module's load_state_dict takes back a copy, but not the digits that it lacks.
        saved = kept[name]
        if _is_rounded(saved, parameter):
            raise InvalidInputError(
                f"{name!r} is trained as {parameter.dtype}, but the model's state dict has a copy "
                f"as {saved.dtype}, from which it could not be restored exactly: remove the hook "
                "that converts it"
            )
    return found


def _is_rounded(saved: Any, parameter: torch.Tensor) -> bool:
    if not (isinstance(saved, torch.Tensor) and saved.is_floating_point()):
        return False
    is_wider = saved.element_size() > parameter.element_size()
    return saved.dtype != parameter.dtype and not is_wider


def memory_of(values: Iterable[Any]) -> set[tuple[object, ...]]:
    """Return the keys of the memory that the tensors among values are made of."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return {memory_key(inner) for tensor in tensors for inner in inner_tensors(tensor)}


def complete_state(module: torch.nn.Module) -> dict[str, Any]:
    """Return a module's state dict and the trained parameters that it leaves out."""
    state = module.state_dict()
    return {**state, **trained_beside(module, state)}


def restore_complete(module: torch.nn.Module, store: Store, checkpoint: Checkpoint | str) -> None:
    """Restore in place what :func:`complete_state` returned; ignore other tensors."""
    found = store.get(checkpoint)
    saved = SavedNames(store, found)
    state = module.state_dict()
    saved.warn_of_absent(trained_beside(module, state))
    beside = [n for n, _ in module.named_parameters() if n not in state and n in saved]

    def read() -> dict[str, Any]:
        own = dict(module.named_parameters())
        return {**module.state_dict(), **{name: own[name].detach() for name in beside}}

    target = Entries(module, read, lambda state: module.load_state_dict(state, strict=False))
    store.load_into(target if beside else module, found, partial=True)


def outside_parameters(
    optimizers: Iterable[Any], modules: Iterable[torch.nn.Module]
) -> dict[str, torch.Tensor]:
    """Return the parameters that optimizers train and that are of no module.

    A name is the number of the optimizer, of the group and of the parameter in it.
    """
    places = memory_of(parameter for module in modules for parameter in module.parameters())
    found = {
        f"{number}.{group}.{at}": parameter
        for number, optimizer in enumerate(optimizers)
        for group, settings in enumerate(getattr(optimizer, "param_groups", ()))
        for at, parameter in enumerate(settings["params"])
        if parameter.requires_grad and not memory_of([parameter]) <= places
    }
    check_plain(flatten_entries({f"optimizer.{name}": found[name] for name in found}))
    return found


def outside_state(parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the state of the parameters of :func:`outside_parameters`.

    It has their gradients, because ``model.zero_grad()`` does not reset those.
    """
    return {name: {"value": p.detach(), "gradient": p.grad} for name, p in parameters.items()}


def restore_outside(parameters: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Restore in place what :func:`outside_state` returned.

    Raise :class:`MismatchError` if the parameters are not those that were saved.
    """
    if parameters and not state:
        warnings.warn(
            f"the checkpoint does not hold {describe_outside(parameters)}: it was saved without, "
            "and these tensors stay as they are",
            stacklevel=2,
        )
        return
    saved = {name: entry["value"] for name, entry in state.items()}
    shapes, others = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        for tensors in (parameters, saved)
    )
    if shapes != others:
        wrong = sorted({name for name, _ in shapes.items() ^ others.items()})
        raise MismatchError(
            f"parameter {', '.join(wrong)} of the optimizer (optimizer.group.number), which is of "
            "no model, is not as it was saved: give the optimizer the same parameters in the same "
            "order"
        )
    for name, parameter in parameters.items():
        parameter.detach().copy_(saved[name])
        gradient = state[name]["gradient"]
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def describe_outside(parameters: Mapping[str, torch.Tensor]) -> str:
    """Return words for parameters of :func:`outside_parameters`."""
    named = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in parameters.items())
    return f"parameter {named} of the optimizer, which is not of the model (optimizer.group.number)"
