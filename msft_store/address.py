"""Open a checkpoint by one address: the store's path or URL, ``@``, and the checkpoint.

Example::

    with open_checkpoint("run/store@best") as reader:
        print(reader.metadata()["checkpoint"])
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal

import torch

from msft_store._util import PathLike
from msft_store.errors import InvalidInputError
from msft_store.maintenance.reader import CheckpointReader
from msft_store.remote.transport.url import is_url
from msft_store.store import Store, open_remote


def open_checkpoint(
    address: PathLike,
    *,
    layout: Literal["files", "memory"] = "memory",
    device: str | torch.device = "cpu",
    bases: Iterable[PathLike] = (),
    **options: Any,
) -> CheckpointReader:
    """Return a reader of a checkpoint with the methods of ``safetensors.safe_open``.

    Nothing is downloaded but the chunks that are read, with those that they are differences from.
    Each is verified against its key, and the manifest against the checkpoint's id.

    Args:
        address: ``"run/store@best"`` or ``"s3://bucket/run@best"``: a path or URL of a store, and a
            ref, an id or a unique prefix of an id.
        layout: As for :meth:`Store.open_checkpoint`.
        device: Device of the tensors.
        bases: As for :func:`~msft_store.integrations.remote.open_remote`: paths of models on this
            machine that are bases of the store.
        **options: Of the URL, as for :func:`~msft_store.remote.api.push`.

    Raises:
        InvalidInputError: The address names no checkpoint.
        NotAStoreError: There is no store at the address.
        UnknownCheckpointError: The store has no such checkpoint.
        StorageError: The remote cannot be reached.
    """
    place, name = split_address(address)
    paths = list(bases)
    store = open_remote(place, bases=paths, **options) if is_url(place) or paths else None
    return (store or Store.open(place)).open_checkpoint(name, layout=layout, device=device)


def split_address(address: PathLike) -> tuple[str, str]:
    """Return the place of a store and the name of a checkpoint in it."""
    place, sign, name = os.fspath(address).rpartition("@")
    if not (place and sign and name):
        raise InvalidInputError(
            f"{os.fspath(address)!r} names no checkpoint: write STORE@CHECKPOINT, such as "
            "run/store@best"
        )
    return place, name
