"""Write the result of a run as a directory that transformers or PEFT can load.

The files hold the values and the dtype of the result's checkpoint.

Example::

    save_model(loaded, snapshots, "runs/demo/model")
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from msft_store.integrations.model_files import model_files
from trainer.files import enough_space, make_readable, sync
from trainer.model.load import LoadedModel
from trainer.model.lora import adapter_files, write_adapter
from trainer.model.weights import Snapshots


def save_model(
    loaded: LoadedModel,
    snapshots: Snapshots,
    directory: str | Path,
    export: Callable[[Path], object] | None = None,
) -> None:
    """Write a Hugging Face model directory, or a PEFT adapter, with the tokenizer.

    The directory gets its name only when it is complete, and replaces an existing one. ``export``
    writes it if this process does not have all weights.
    """
    directory = Path(directory)
    partial = directory.with_name(f"{directory.name}.partial")
    old = directory.with_name(f"{directory.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with enough_space("the model", directory, needed_bytes=loaded.full_bytes):
        try:
            if export is None:
                _write(loaded, snapshots, partial)
            else:
                export(partial)
            for path in (*partial.rglob("*"), partial):
                make_readable(path)
                sync(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def result_files(loaded: LoadedModel) -> dict[str, bytes]:
    """Return the files of a result besides its weights, to be kept with every checkpoint."""
    return {**model_files(loaded.model, loaded.tokenizer), **adapter_files(loaded)}


def _write(loaded: LoadedModel, snapshots: Snapshots, directory: Path) -> None:
    if loaded.adapter is not None:
        write_adapter(loaded, snapshots.take(), directory)
    else:
        with snapshots.as_stored():
            loaded.model.save_pretrained(directory)
    loaded.tokenizer.save_pretrained(directory)
