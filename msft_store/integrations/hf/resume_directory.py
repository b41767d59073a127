"""The directory that the Trainer resumes from, for the moment in which it reads it.

It holds a resume point's weights and the Trainer's state, and names the process that made it: what
a killed process has left is removed by the next one that resumes.

Example::

    folder = write_folder("run", weights, trainer_state, adapter=None)
    trainer.train(resume_from_checkpoint=folder)
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from msft_store._util import PathLike
from msft_store.storage.lock_files import Process, process_status

_PREFIX = ".resume-"
_OWNER = "owner.json"


def write_folder(
    parent: PathLike,
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    adapter: Mapping[str, Any] | None,
) -> Path:
    """Write a new directory under ``parent`` and return it; those of killed processes go."""
    Path(parent).mkdir(parents=True, exist_ok=True)
    here = Process.this()
    for old in Path(parent).glob(f"{_PREFIX}*"):
        if _is_left(old, here):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    _write_json(folder / _OWNER, dataclasses.asdict(here))
    _write_json(folder / "trainer_state.json", state)
    if adapter:
        _write_json(folder / "adapter_config.json", adapter)
    file = "adapter_model.safetensors" if adapter else "model.safetensors"
    save_file(dict(weights), folder / file)
    return folder


def _is_left(folder: Path, here: Process) -> bool:
    try:
        fields = json.loads((folder / _OWNER).read_text(encoding="utf-8"))
        return process_status(Process(**fields), here) == "dead"
    except (OSError, ValueError, TypeError):
        return False


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
