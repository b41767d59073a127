"""Get and restore the weights that training changes: all of them, or those of a PEFT adapter.

Invariant: weights are restored in place and bit for bit. PEFT is imported only for a model that has
an adapter. A model of the Hugging Face hub can be a base: :func:`find_local_model` finds its files
in the hub's cache.

Example::

    store.add_base(find_local_model("Qwen/Qwen3-0.6B"))     # after from_pretrained has fetched it
    store.save(select_weights(model), metadata={"export": {"adapter": adapter_config(model)}})
    restore_weights(model, store, checkpoint)
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
from msft_store.tensors.bytes import check_tensors, memory_key
from msft_store.tensors.nested import inner_tensors

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_local_model(path: PathLike) -> Path:
    """Return a path unchanged; for a hub's id that is not a path, return the directory in the
    cache.

    Nothing is downloaded. Raises :class:`BaseError` if the model is not in the cache.
    """
    found = check_path(path)
    if found.exists() or not (isinstance(path, str) and _HUB_ID.fullmatch(path)):
        return found
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise BaseError(
            f"{path} is not a directory and not in the cache of the Hugging Face hub: load the "
            "model first, or give the path of its directory"
        ) from None


def select_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that training changes. They share memory with the model.

    For a model with a PEFT adapter these are the active adapter's, under the names of PEFT's files
    (learned prompts are copies); for other models it is the whole state dict.
    """
    if not hasattr(model, "peft_config"):
        return check_tensors(model)
    from peft import get_peft_model_state_dict  # noqa: PLC0415

    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=_active(model))
    return check_tensors(found)


def restore_weights(model: torch.nn.Module, store: Store, checkpoint: Checkpoint | str) -> None:
    """Restore a model's weights from a checkpoint, in place and bit for bit; skip other tensors."""
    if not hasattr(model, "peft_config"):
        store.load_into(model, checkpoint, partial=True)
        return
    weights = select_weights(model)
    own = {
        memory_key(inner)
        for tensor in (*model.parameters(), *model.buffers())
        for inner in inner_tensors(tensor)
    }
    if all(memory_key(tensor) in own for tensor in weights.values()):
        store.load_boxes(checkpoint, [whole_box(name, tensor) for name, tensor in weights.items()])
        return
    from peft import set_peft_model_state_dict  # noqa: PLC0415

    tensors = store.load(checkpoint, weights)
    set_peft_model_state_dict(model, tensors, adapter_name=_active(model))


def adapter_config(model: Any) -> dict[str, Any] | None:
    """Return the configuration of a model's active adapter as PEFT saves it, or ``None``.

    Values that JSON cannot hold are left out. It names the adapter's base model and, if the adapter
    has no task, that model's class.
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
    # active_adapters is a property in PEFT's models and a method in those of transformers.
    active = model.active_adapters
    return str((active() if callable(active) else active)[0])


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
