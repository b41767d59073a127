"""Write the directory that the Trainer resumes from. It exists only while the Trainer reads it.

The directory holds a resume point's weights and the Trainer's state. Its name contains the process
that wrote it, because a name exists completely or not at all. A directory that a killed process
left behind is deleted by the next process that resumes.

Example::

    folder = write_resume_directory("run", weights, trainer_state, adapter=None)
    trainer.train(resume_from_checkpoint=folder)
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from msft_store._util import PathLike
from msft_store.maintenance.export_names import PROMPTS
from msft_store.storage.lock_files import Process, process_status

_PREFIX = ".resume-"


def write_resume_directory(
    parent: PathLike,
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    adapter: Mapping[str, Any] | None,
) -> Path:
    """Write a new directory under ``parent`` and return it; delete those of killed processes."""
    Path(parent).mkdir(parents=True, exist_ok=True)
    here = Process.this()
    for old in Path(parent).glob(f"{_PREFIX}*"):
        if _is_abandoned(old, here):
            shutil.rmtree(old, ignore_errors=True)
    owner = f"{here.pid}-{here.start}-{here.boot}-{here.namespace}-{here.machine}-"
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX + owner, dir=parent))
    _write_json(folder / "trainer_state.json", state)
    if adapter:
        _write_json(folder / "adapter_config.json", adapter)
    file = "adapter_model.safetensors" if adapter else "model.safetensors"
    save_file(_for_peft(weights) if adapter else dict(weights), folder / file)
    return folder


def _for_peft(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of the first adapter as PEFT restores them into a model that trains.

    PEFT puts the learned prompts into the embedding, from which a prompt encoder computes them.
    """
    found = {n: t for n, t in weights.items() if "/" not in n and not n.startswith(PROMPTS)}
    for name, tensor in weights.items():
        if name.startswith(PROMPTS) and name.endswith(".embedding.weight"):
            found["prompt_embeddings"] = tensor
    return found


def _is_abandoned(folder: Path, here: Process) -> bool:
    try:
        pid, start, *others, _ = folder.name.removeprefix(_PREFIX).split("-")
        boot, namespace, machine = others
        owner = Process(
            pid=int(pid), start=int(start), boot=boot, namespace=namespace, machine=machine
        )
    except ValueError:
        return False
    return process_status(owner, here) == "dead"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
