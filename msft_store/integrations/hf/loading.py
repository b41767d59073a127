"""Load a model of transformers from a checkpoint, without files of its weights.

transformers builds the model from the checkpoint's configuration and asks for one tensor after the
other, as it does with safetensors files: it renames, fuses, rounds, ties and places them.
Invariant: each chunk is verified before a weight has its value.

Example::

    model = from_pretrained("run/store@best")
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from msft_store._util import PathLike
from msft_store.address import open_checkpoint
from msft_store.errors import InvalidInputError
from msft_store.maintenance.export_files import (
    CONFIG,
    GENERATION_CONFIG,
    is_kept_in_parts,
    read_place,
)
from msft_store.maintenance.reader import CheckpointReader

_log = logging.getLogger(__name__)
_OF_MODEL = ("dtype", "torch_dtype", "quantization_config", "generation_config", "config")
"""Arguments that a configuration would take for itself."""


def from_pretrained(
    address: PathLike,
    cls: Any = AutoModelForCausalLM,
    *,
    bases: Iterable[PathLike] = (),
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Return a model with the weights and the configuration of a checkpoint.

    It is the model that ``cls.from_pretrained`` gives for an export of the checkpoint. Weights that
    the class has and the checkpoint lacks begin at random; transformers warns of them.

    Args:
        address: ``"run/store@best"`` or ``"s3://bucket/run@best"``, as for
            :func:`~msft_store.open_checkpoint`.
        cls: An ``AutoModel…`` class, or the class of a model.
        bases: Paths of models on this machine that are bases of the store, if they are not where
            the store expects them.
        options: Of the URL: credentials, region, endpoint.
        **kwargs: Of ``cls.from_pretrained``, such as ``dtype`` or ``device_map``.

    Raises:
        InvalidInputError: The checkpoint has no configuration, is an adapter, is quantised in
            parts, or needs code of its own; the message says how to load it.
        CorruptedError: Stored data is damaged.
        StoreError: As for :func:`~msft_store.open_checkpoint`.
    """
    if kwargs.get("trust_remote_code"):
        raise InvalidInputError(
            "code of a model is taken from a directory alone: export the checkpoint and load that"
        )
    reader = open_checkpoint(address, layout="files", bases=bases, **(options or {}))
    with tempfile.TemporaryDirectory() as folder:
        _write_configurations(reader, Path(folder))
        own = {name: kwargs.pop(name) for name in _OF_MODEL if name in kwargs}
        if own.get("config") is None:
            own["config"], kwargs = AutoConfig.from_pretrained(
                folder, return_unused_kwargs=True, **kwargs
            )
        if own.get("generation_config") is None and (Path(folder) / GENERATION_CONFIG).exists():
            own["generation_config"] = GenerationConfig.from_pretrained(folder)
    own.setdefault("dtype", own.pop("torch_dtype", None) or "auto")
    if not issubclass(cls, PreTrainedModel):
        # A model without memory tells the class that is meant, and its part of the configuration.
        with torch.device("meta"):
            meant = cls.from_config(own["config"])
        cls, own["config"] = type(meant), meant.config
    names = reader.keys()
    slices = {name: reader.get_slice(name) for name in names}
    return cls.from_pretrained(None, state_dict=slices, **own, **kwargs)


def _write_configurations(reader: CheckpointReader, folder: Path) -> None:
    """Write the configurations of a model; refuse a checkpoint that they alone do not describe."""
    content, how = reader.content, f"export checkpoint {reader.checkpoint.id[:12]}"
    if content is None or content.is_adapter:
        raise InvalidInputError(
            f"the checkpoint is an adapter: {how} and load the directory with PEFT, such as "
            "AutoPeftModelForCausalLM.from_pretrained"
        )
    for name in (CONFIG, GENERATION_CONFIG):
        data = content.written.get(name) or read_place(content.copied.get(name))
        if data:
            (folder / name).write_bytes(data)
        elif name == CONFIG:
            raise InvalidInputError(
                f"neither the checkpoint nor its base has a {CONFIG}: save with "
                f"files=model_files(model), or {how} with like=, a directory of such a model"
            )
    tensors = content.chosen.tensors
    if any(is_kept_in_parts(name, tensors) for name in tensors):
        raise InvalidInputError(
            "the weights are quantised and kept in several parts: build a model that is quantised "
            "in the same way and restore it with Store.load_into"
        )
    for doubt in content.doubts:
        _log.warning("checkpoint %s: %s", reader.checkpoint.id[:12], doubt)
