"""What a training run came to, for comparing one that was disturbed with one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.journal import effective, read

_COUNTED = (
    "stage_started",
    "committed",
    "evaluated",
    "decided",
    "trained",
    "tested",
    "finished",
)
# What was dropped before a kill is not dropped again when its commit is repeated, and sizes of the
# whole store count what a kill left there.
_OWN = (
    "seq",
    "time",
    "seconds",
    "model_dir",
    "disk_peak_bytes",
    "disk_bytes",
    "stored_bytes",
    "dropped",
)


def outcome(directory: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Return everything that a finished run came to, but for times and places, and its weights.

    The ids of checkpoints are hashes of weights and metrics, so these are compared, too.
    """
    story = [
        {key: value for key, value in record.items() if key not in _OWN}
        for record in effective(read(directory / "journal.jsonl"))
        if record["event"] in _COUNTED
    ]
    return story, (directory / "model" / "model.safetensors").read_bytes()
