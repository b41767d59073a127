"""What training changes of a model: all of it, or its PEFT adapter; out of it and back into it.

PEFT is optional, and there whenever a model has an adapter.

Example::

    store.save(weights_of(model), metadata={"export": {"adapter": adapter_of(model)}})
    put_weights(model, store, checkpoint)

A model of the Hugging Face hub as a base: where its files are in the hub's cache.

Example::

    store.add_base(local_model("Qwen/Qwen3-0.6B"))          # which from_pretrained has fetched
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from msft_store._util import PathLike, check_path
from msft_store.errors import BaseError
from msft_store.objects.manifest import Checkpoint
from msft_store.store import Store
from msft_store.tensors.boxes import whole_box
from msft_store.tensors.bytes import memory_key

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local_model(path: PathLike) -> Path:
    """Return a path as it is; of a hub's id that is no path, the directory in the cache.

    Nothing is fetched: :class:`BaseError` if the model is not there.
    """
    found = check_path(path)
    if found.exists() or not (isinstance(path, str) and _HUB_ID.fullmatch(path)):
        return found
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise BaseError(
            f"{path} is no directory here and not in the cache of the Hugging Face hub: load the "
            "model first, or give the directory that it is in"
        ) from None


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that training changes; they share their memory with the model.

    Of a model with an adapter of PEFT that is the active adapter, under the names of its files
    (learned prompts are copies); of any other the whole state dict.
    """
    if not hasattr(model, "peft_config"):
        return dict(model.state_dict())
    from peft import get_peft_model_state_dict  # noqa: PLC0415

    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=_active(model))
    return found


def put_weights(model: torch.nn.Module, store: Store, checkpoint: Checkpoint | str) -> None:
    """Give a model the weights of a checkpoint, in place and bit-exact; other tensors stay out."""
    weights = weights_of(model)
    own = {memory_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    if all(memory_key(tensor) in own for tensor in weights.values()):
        store.load_boxes(checkpoint, [whole_box(name, tensor) for name, tensor in weights.items()])
        return
    from peft import set_peft_model_state_dict  # noqa: PLC0415

    tensors = store.load(checkpoint, weights)
    set_peft_model_state_dict(model, tensors, adapter_name=_active(model))


def adapter_of(model: Any) -> dict[str, Any] | None:
    """Return the settings of a model's active adapter, as PEFT saves them: those that JSON holds.

    They name the model that it is for, and where the adapter has no task, that model's class.
    """
    if not getattr(model, "peft_config", None):
        return None
    config = model.peft_config[_active(model)]
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = {**config.to_dict(), "inference_mode": True}
    if not settings.get("base_model_name_or_path"):
        settings["base_model_name_or_path"] = getattr(own, "name_or_path", None) or None
    if settings.get("task_type") is None:
        settings["auto_mapping"] = {
            "base_model_class": type(own).__name__,
            "parent_library": type(own).__module__,
        }
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in settings.items()}
    return {key: value for key, value in plain.items() if _is_json(value)}


def _active(model: Any) -> str:
    # PEFT's own models have a property, those of transformers a method.
    active = model.active_adapters
    return str((active() if callable(active) else active)[0])


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
