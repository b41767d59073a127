"""Collect the files of a Hugging Face model besides its weights, to be saved with a checkpoint.

They are those that ``save_pretrained`` writes: the configuration with the dtype of the weights, the
generation configuration, and the tokenizer or processor with its chat templates. An export of the
checkpoint then describes the model and not the base. No library is imported.

Example::

    ckpt = store.save(model, parent=base, files=model_files(model, tokenizer))
    store.export(ckpt, "my-model")                       # for from_pretrained
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from msft_store.tensors.files import name_problem

_UNSAVED = ("transformers_weights", "compile_config")
"""Fields that ``save_pretrained`` leaves out."""


def model_files(model: Any, processing_class: Any = None) -> dict[str, bytes]:
    """Return the files of a model by name, for ``files=`` of a save or a commit.

    Weights and code are left out.

    Args:
        model: A model of transformers. A model with a PEFT adapter has no files of its own, because
            its export is the directory of an adapter. ``None`` and other modules have none, either.
        processing_class: A tokenizer or processor, or another object with ``save_pretrained``.
    """
    return {**_configurations(model), **_saved(processing_class)}


def _configurations(model: Any) -> dict[str, bytes]:
    model = getattr(model, "_orig_mod", model)
    config = _to_json(getattr(model, "config", None))
    if config is None or getattr(model, "peft_config", None):
        return {}
    config["architectures"] = [type(model).__name__.removeprefix("FSDP")]
    dtype = getattr(model, "dtype", None)
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    found = {"config.json": config}
    can_generate = getattr(model, "can_generate", None)
    generation = _to_json(getattr(model, "generation_config", None))
    if generation is not None and callable(can_generate) and can_generate():
        found["generation_config.json"] = generation
    return {
        name: f"{json.dumps(value, indent=2, sort_keys=True)}\n".encode()
        for name, value in found.items()
    }


def _to_json(config: Any) -> dict[str, Any] | None:
    """Return a configuration as it is saved, but unchecked: a training must not end for it."""
    if not callable(getattr(config, "to_json_string", None)):
        return None
    found: dict[str, Any] = json.loads(config.to_json_string())
    return {key: value for key, value in found.items() if key not in _UNSAVED}


def _saved(processing_class: Any) -> dict[str, bytes]:
    if not callable(getattr(processing_class, "save_pretrained", None)):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        processing_class.save_pretrained(folder)
        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        named = {path.relative_to(folder).as_posix(): path for path in files}
        return {n: path.read_bytes() for n, path in named.items() if name_problem(n) is None}
