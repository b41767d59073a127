"""Small models as state dicts, training steps on them, and comparison by bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

State = dict[str, torch.Tensor]

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LAYERS = 3
WIDTH = 64


def make_state(seed: int = 0, *, dtype: torch.dtype = torch.bfloat16, big: bool = False) -> State:
    """Return a model of a few layers with tied names, a 0-d and an empty tensor.

    ``big``: the embedding takes more than one chunk of 4 MiB in bf16.
    """
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).to(dtype)

    embedding = weight(34_000 if big else 100, WIDTH)
    state = {"model.embed.weight": embedding, "lm_head.weight": embedding}
    for layer in range(LAYERS):
        state[f"model.layers.{layer}.up.weight"] = weight(2 * WIDTH, WIDTH)
        state[f"model.layers.{layer}.down.weight"] = weight(WIDTH, 2 * WIDTH)
        state[f"model.layers.{layer}.norm.weight"] = torch.ones(WIDTH, dtype=dtype)
    state["model.scale"] = torch.tensor(0.5, dtype=dtype)
    state["model.empty"] = torch.empty((0, 4), dtype=dtype)
    return state


def train_step(state: Mapping[str, torch.Tensor], share: float, seed: int) -> State:
    """Return the state with a share of its weights a few representable values away."""
    generator = torch.Generator().manual_seed(seed)
    moved: dict[int, torch.Tensor] = {}
    result = {}
    for name, tensor in state.items():
        if id(tensor) not in moved:
            bits = tensor.contiguous().view(_INTEGERS[tensor.element_size()])
            hit = torch.rand(tensor.shape, generator=generator) < share
            far = torch.randint(1, 4, tensor.shape, generator=generator)
            up = 2 * torch.randint(0, 2, tensor.shape, generator=generator) - 1
            moved[id(tensor)] = (bits + (hit * far * up).to(bits.dtype)).view(tensor.dtype)
        result[name] = moved[id(tensor)]
    return result


def same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Return whether two state dicts are equal to the last bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and bits_of(one[name]) == bits_of(other[name])
        for name in one
    )


def bits_of(tensor: torch.Tensor) -> bytes:
    """Return the row-major bytes of a tensor."""
    plain = tensor.detach().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def write_base(path: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """Write a model as a safetensors file, each tied tensor once; return its path."""
    seen: set[int] = set()
    once = {n: t for n, t in state.items() if not (id(t) in seen or seen.add(id(t)))}
    safetensors.torch.save_file(once, path)
    return path


def logical_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in state.values())
