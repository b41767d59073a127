"""Ways to keep a checkpoint, peers and ours, behind one interface; and states to keep.

Example::

    way = WAYS["torch.save"](folder, base_file)
    way.prepare()
    way.save(state)
    way.load_into(state)
"""

from __future__ import annotations

import abc
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bench.trajectories import DATA
from msft_store import Store

State = dict[str, torch.Tensor]
MODEL = DATA / "encoder-22.7M"
STACKED = 8
"""Rotated copies in one tensor."""
OURS = "ours"
SAFETENSORS = "safetensors"

# One process needs no process group.
warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")


class Way(abc.ABC):
    """A way to save a state durably and to load it; peers and ours."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.base = base

    def prepare(self) -> None:  # noqa: B027 - most need nothing
        """Prepare a run, once."""

    @abc.abstractmethod
    def save(self, state: State) -> None:
        """Save durably."""

    @abc.abstractmethod
    def load_into(self, state: State) -> None:
        """Restore the last saved state."""


class Safetensors(Way):
    """``save_file`` and fsync; ``load_file`` and ``copy_``."""

    def save(self, state: State) -> None:
        safetensors.torch.save_file(state, self.folder / "model.safetensors")
        sync(self.folder / "model.safetensors", self.folder)

    def load_into(self, state: State) -> None:
        copy_into(safetensors.torch.load_file(self.folder / "model.safetensors"), state)


class Torch(Way):
    """``torch.save`` and fsync; ``torch.load`` and ``copy_``."""

    def save(self, state: State) -> None:
        torch.save(state, self.folder / "model.pt")
        sync(self.folder / "model.pt", self.folder)

    def load_into(self, state: State) -> None:
        copy_into(torch.load(self.folder / "model.pt", weights_only=True), state)


class Distributed(Way):
    """``torch.distributed.checkpoint`` of one process, which syncs its files itself."""

    def save(self, state: State) -> None:
        save(state, storage_writer=FileSystemWriter(self.folder, overwrite=True), no_dist=True)

    def load_into(self, state: State) -> None:
        load(state, storage_reader=FileSystemReader(self.folder), no_dist=True)


class Ours(Way):
    """:class:`msft_store.Store`."""

    def prepare(self) -> None:
        self._store = Store.create(self.folder / "store")
        self._base = self._store.add_base(self.base)

    def save(self, state: State) -> None:
        self._ckpt = self._store.save(state, parent=self._base)

    def load_into(self, state: State) -> None:
        self._store.load_into(state, self._ckpt)


WAYS: dict[str, type[Way]] = {
    SAFETENSORS: Safetensors,
    "torch.save": Torch,
    "distributed.checkpoint": Distributed,
    OURS: Ours,
}


def sync(*paths: Path) -> None:
    """Wait until files and directories are durable."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def copy_into(loaded: Mapping[str, torch.Tensor], state: State) -> None:
    """Copy tensors into others."""
    for name, tensor in loaded.items():
        state[name].copy_(tensor)


def states(regime: str, gigabytes: float) -> tuple[State, State]:
    """Return the state before and after training, enlarged to a given size."""
    files = sorted((MODEL / regime).glob("step*.safetensors"), key=lambda path: int(path.stem[4:]))
    first, last = safetensors.torch.load_file(files[0]), safetensors.torch.load_file(files[-1])
    size = STACKED * sum(tensor.nbytes for tensor in first.values())
    copies = max(1, round(gigabytes * 1e9 / size))

    def larger(state: State) -> State:
        return {
            f"{copy:02}.{name}": torch.cat(
                [torch.roll(tensor, 7 * (copy * STACKED + at), 0) for at in range(STACKED)]
            )
            for copy in range(copies)
            for name, tensor in state.items()
            if tensor.dim() > 0
        }

    return larger(first), larger(last)
