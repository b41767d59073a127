"""Keep and restore the weights that training changes: all of them, or those beside a base.

Of a model with PEFT adapters, the checkpoints hold the active adapters, under the names of PEFT's
files, and under the model's own names everything else that training changes: parameters with
``requires_grad`` that PEFT's files leave out, buffers, and extra state.

Invariant: weights are restored in place and bit for bit. PEFT is imported only for a model that has
an adapter. A model of the Hugging Face hub can be a base: :func:`find_local_model` finds its files
in the hub's cache.

Example::

    store.add_base(find_local_model("Qwen/Qwen3-0.6B"))     # after from_pretrained has fetched it
    kept = KeptModel(model)
    store.save(kept.tensors(), metadata={"export": kept.export_settings()})
    kept.restore(store, checkpoint)
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedConfig

from msft_store._util import PathLike, check_path
from msft_store.errors import BaseError, InvalidInputError, MismatchError
from msft_store.integrations.trained import (
    Entries,
    SavedNames,
    complete_state,
    memory_of,
    restore_complete,
    trained_beside,
)
from msft_store.maintenance.export_names import PROMPTS, export_settings
from msft_store.objects.manifest import Checkpoint
from msft_store.store import Store
from msft_store.tensors.bytes import check_plain, flatten_entries
from msft_store.tensors.module_state import split_entries
from msft_store.tensors.names import plain_names

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_EXTRA = "_extra_state"
"""End of the names that torch gives to the extra state of modules."""


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


class KeptModel:
    """A model as its checkpoints hold it.

    Make it when training begins: buffers beside an adapter are kept if they have changed since.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model: Any = model
        self._has_adapter = bool(getattr(model, "peft_config", None))
        self._buffers = _versions(model)
        self._names: set[str] = set()
        """Names of tensors beside an adapter that were kept or restored once."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the weights that training changes. They share memory with the model.

        Other active adapters than the first have ``NAME/`` before the names. Learned prompts are
        copies; the parameters that they are computed from are kept, too.
        """
        if self._has_adapter:
            adapters = self._adapters(self._active())
            state = adapters | self._beside(adapters)
        else:
            state = complete_state(self.model)
        return check_plain(flatten_entries(plain_names(state)))

    def restore(self, store: Store, checkpoint: Checkpoint | str) -> None:
        """Restore the weights from a checkpoint, in place and bit for bit; skip other tensors.

        Raise :class:`MismatchError` if the checkpoint has an adapter that is not active here.
        """
        if not self._has_adapter:
            restore_complete(self.model, store, checkpoint)
            return
        found = store.get(checkpoint)
        saved = SavedNames(store, found)
        active = self._order(found)
        adapters = self._adapters(active)
        trained = self._beside(adapters)
        further = [name for name in adapters if name not in self._required(active[0])]
        saved.warn_of_absent([*trained, *further])
        chosen = adapters.keys() - {name for name in further if name not in saved}
        # The prompt encoder of a model that only infers holds its results, not its parameters.
        chosen |= {
            name
            for name in self._own()
            if name in saved and (name in trained or not name.startswith(PROMPTS))
        }
        self._names |= chosen - adapters.keys()

        def read() -> dict[str, Any]:
            entries = {**self._own(), **self._adapters(active)}
            return {name: entries[name] for name in entries if name in chosen}

        target = Entries(self.model, read, lambda state: self._load_copies(state, active))
        tuner = getattr(getattr(self.model, "base_model", None), "prefix", None) or PROMPTS
        if any(tuner in name for name in trained if name in saved):
            # The parameters that copies are computed from are restored themselves.
            chosen -= split_entries(target)[1].keys() & adapters.keys()
        store.load_into(target, found, partial=True)
        self._buffers = _versions(self.model)

    def export_settings(self) -> dict[str, Any]:
        """Return the settings of an export, with the configurations of the active adapters."""
        if not self._has_adapter:
            return {}
        first, *others = self._active()
        found: dict[str, Any] = {"adapter": adapter_config(self.model, first)}
        if others:
            found["adapters"] = {name: adapter_config(self.model, name) for name in others}
        return found

    def _active(self) -> list[str]:
        """Return the active adapters, and others that are trained."""
        # active_adapters is a property in PEFT's models and a method in those of transformers.
        active = self.model.active_adapters
        names = [str(name) for name in (active() if callable(active) else active)]
        trained = [f"{name}." for name, p in self.model.named_parameters() if p.requires_grad]
        others = (name for name in self.model.peft_config if name not in names)
        return names + [n for n in others if any(f".{n}." in parameter for parameter in trained)]

    def _order(self, checkpoint: Checkpoint) -> list[str]:
        """Return the active adapters in the order of a checkpoint."""
        known = export_settings(checkpoint).get("adapters")
        others = list(known) if isinstance(known, Mapping) else []
        lacking = [name for name in others if name not in self.model.peft_config]
        active = self._active()
        known_here = dict.fromkeys([*active, *self.model.peft_config])
        first = [name for name in known_here if name not in others]
        if lacking or not first:
            raise MismatchError(
                f"checkpoint {checkpoint.id[:12]} has {1 + len(others)} adapters, {others} besides "
                f"the first, and this model has {list(self.model.peft_config)}: add adapters of "
                "these names to the model"
            )
        return [first[0], *others, *(name for name in first[1:] if name in active)]

    def _adapters(self, active: list[str]) -> dict[str, Any]:
        """Return the entries of adapters under the names of PEFT's files."""
        first, *others = active
        found = self._entries(first, _may_have_new_rows(self.model, first) or "auto")
        for name in others:
            entries = self._entries(name, rows=False)
            found |= {f"{name}/{key}": value for key, value in entries.items()}
        return found

    def _required(self, adapter: str) -> set[str]:
        """Return the names that every checkpoint of an adapter has."""
        return set(
            self._entries(adapter, False if _may_have_new_rows(self.model, adapter) else "auto")
        )

    def _entries(self, adapter: str, rows: bool | Literal["auto"]) -> dict[str, Any]:
        """Return the entries of an adapter; ``rows`` says if the embeddings are among them."""
        from peft import get_peft_model_state_dict  # noqa: PLC0415

        found: dict[str, Any] = get_peft_model_state_dict(
            self.model, adapter_name=adapter, save_embedding_layers=rows
        )
        return found

    def _beside(self, adapters: Mapping[str, Any]) -> dict[str, Any]:
        """Return what training changes besides adapters, under the model's own names."""
        found: dict[str, Any] = trained_beside(self.model, adapters, self._names)
        places = memory_of(adapters.values())
        changed = self._changed_buffers() | (self._names - found.keys())
        for name, value in self.model.state_dict().items():
            is_changed = name in changed and not memory_of([value]) <= places
            if is_changed or (name.endswith(_EXTRA) and name not in adapters):
                found[name] = value
        for name in found.keys() & adapters.keys():
            raise InvalidInputError(
                f"{name!r} is the name of a tensor of the adapter and of another tensor that is "
                "trained: give the adapter another name"
            )
        self._names |= found.keys()
        return found

    def _changed_buffers(self) -> set[str]:
        """Return the buffers of modules that have changed a buffer since this object was made.

        Batch norm does not count the changes of its running mean, but those of its counter.
        """
        now = _versions(self.model)
        changed = set()
        for name, (buffer, version) in now.items():
            old, before = self._buffers.get(name, (buffer, -1))
            is_moved = (old.device, old.dtype) != (buffer.device, buffer.dtype)
            if not is_moved and (old is not buffer or version != before):
                changed.add(name.rpartition(".")[0])
        return {name for name in now if name.rpartition(".")[0] in changed}

    def _own(self) -> dict[str, Any]:
        parameters = {name: value.detach() for name, value in self.model.named_parameters()}
        return {**parameters, **self.model.state_dict()}

    def _load_copies(self, state: Mapping[str, Any], active: list[str]) -> Any:
        from peft import set_peft_model_state_dict  # noqa: PLC0415

        first, *others = active
        rest = dict(state)
        for name in others:
            part = {key: rest.pop(key) for key in state if key.startswith(f"{name}/")}
            part = {key.removeprefix(f"{name}/"): value for key, value in part.items()}
            set_peft_model_state_dict(self.model, part, adapter_name=name)
        names = self._adapters([first]).keys() & rest.keys()
        set_peft_model_state_dict(
            self.model, {key: rest.pop(key) for key in names}, adapter_name=first
        )
        return self.model.load_state_dict(rest, strict=False)


def adapter_config(model: Any, adapter: str) -> dict[str, Any]:
    """Return the configuration of a model's adapter as PEFT saves it.

    Values that JSON cannot hold are left out. It names the adapter's base model and, if the adapter
    has no task, that model's class.
    """
    config = model.peft_config[adapter]
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


def _may_have_new_rows(model: Any, adapter: str) -> bool:
    """Return True unless the base's configuration shows that the vocabulary has its size.

    PEFT looks only at a directory and the network, and takes an unknown size for an equal one.
    """
    config, settings = getattr(model, "config", None), model.peft_config[adapter]
    base = getattr(settings, "base_model_name_or_path", None)
    if not (base and isinstance(config, PreTrainedConfig)):
        return False
    size = getattr(config.get_text_config(), "vocab_size", None)
    file: Any = Path(base) / "config.json"
    if not file.is_file():
        try:
            revision = getattr(settings, "revision", None)
            file = try_to_load_from_cache(base, "config.json", revision=revision)
        except HFValidationError:
            file = None
    if size is None or not isinstance(file, str | Path):
        if size is not None:
            warnings.warn(
                f"the configuration of {base} is neither there nor in the cache of the hub, so "
                "rows of the embeddings may be new: the embeddings are kept with the adapter",
                stacklevel=2,
            )
        return size is not None
    known = type(config).from_json_file(file).get_text_config()
    return bool(getattr(known, "vocab_size", None) != size)


def _versions(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, int]]:
    """Return the buffers of a model, each with torch's count of its changes in place."""
    return {n: (b, 0 if b.is_inference() else b._version) for n, b in model.named_buffers()}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
