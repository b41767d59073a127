"""Tiny models, and all changes of a model between two checkpoints.

Example::

    state = changed(small_state(0), "retied", share=0.1, seed=7)
"""

from __future__ import annotations

import torch

from tests.support.states import State, train_step

KINDS = (
    "trained",
    "equal",
    "new tensor",
    "dropped",
    "renamed",
    "swapped",
    "retied",
    "untied",
    "dtype",
    "shape",
    "layout",
    "not a number",
)


def small_state(seed: int) -> State:
    """Return a model with tied, scalar, empty and integer tensors."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).bfloat16()

    tied = weight(8, 9)
    return {
        "a": weight(20, 30),
        "b": weight(40),
        "count": torch.arange(5),
        "empty": weight(0, 3),
        "scalar": weight()[None][0],
        "tied 1": tied,
        "tied 2": tied,
    }


def in_float32(state: State) -> State:
    """Return the model as a base of another dtype."""
    once = {id(t): t.float() if t.is_floating_point() else t for t in state.values()}
    return {name: once[id(tensor)] for name, tensor in state.items()}


def changed(state: State, kind: str, share: float, seed: int) -> State:
    """Return the model after training and one change of another kind."""
    state = dict(state) if kind == "equal" else train_step(state, share, seed)
    names = sorted(state)
    name, other = names[seed % len(names)], names[seed // 7 % len(names)]
    if kind == "new tensor":
        state[f"new {seed % 3}"] = torch.full((seed % 50,), float(seed))
    elif kind == "dropped" and len(names) > 2:
        del state[name]
    elif kind == "renamed":
        state[f"{name}'" if len(name) < 12 else name[:-1]] = state.pop(name)
    elif kind == "swapped":
        state[name], state[other] = state[other], state[name]
    elif kind == "retied":
        state[name] = state[other]
    elif kind == "untied":
        state[name] = state[name].clone()
    elif kind == "dtype" and state[name].is_floating_point():
        state[name] = state[name].to((torch.float32, torch.bfloat16, torch.float16)[seed % 3])
    elif kind == "shape":
        state[name] = state[name].reshape(-1)[: seed % 30].clone()
    elif kind == "layout" and state[name].dim() == 2:
        state[name] = state[name].t()
    elif kind == "not a number" and state[name].is_floating_point():
        state[name] = torch.full_like(state[name], float("nan"))
    return state
