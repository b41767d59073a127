"""The outcome of a training run, to compare a disturbed run with an undisturbed one."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msft_store import Store
from trainer.journal import effective, read

_COUNTED = (
    "stage_started",
    "committed",
    "evaluated",
    "averaged",
    "decided",
    "trained",
    "looked_ahead",
    "adjusted",
    "diverged",
    "tested",
    "finished",
)
# A repeated commit does not evict again the checkpoints that were evicted before the kill, and the
# size of the store includes the files that the kill left.
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
    """Return the journal of a finished run without times and paths, and its weights.

    The ids of checkpoints are hashes of weights and metrics, so these are compared, too.
    """
    story = [
        {key: value for key, value in record.items() if key not in _OWN}
        for record in effective(read(directory / "journal.jsonl"))
        if record["event"] in _COUNTED
    ]
    (weights,) = (directory / "model").glob("*.safetensors")
    return story, weights.read_bytes()


def left_by_run(directory: str) -> object:
    """Return what a finished run leaves, as short text: its outcome, damage and names of files."""
    story, weights = outcome(Path(directory))
    return _digest(repr(story).encode()), _digest(weights), *_left_in(Path(directory))


def left_by_trainer(directory: str) -> object:
    """Return what :mod:`tests.support.stopped_training` leaves in the same way."""
    place = Path(directory)
    log = Store.open(place / "store").log()
    kept = [c.id for c in log if c.metadata["timeline"]["name"] == "main"]
    return kept, _digest((place / "model" / "model.safetensors").read_bytes()), *_left_in(place)


def _left_in(place: Path) -> tuple[object, ...]:
    # A kill between a save and its announcement leaves no file "saved-STEP".
    names = sorted(name for name in os.listdir(place) if not name.startswith("saved-"))
    return Store.open(place / "store").check(read_data=True), names


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def kill(
    action: Callable[[], object],
    owner: object,
    name: str,
    *,
    call: int,
    like: Mapping[str, Any] | None = None,
) -> None:
    """Run ``action`` in a process that is killed after call number ``call`` of a method.

    With ``commit_async`` it dies while the commit is under way.
    Only calls whose result has the items of ``like`` count.
    """
    child = os.fork()
    if child == 0:
        try:
            die_after(owner, name, call=call, like=like)
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def die_after(
    owner: object, name: str, *, call: int, like: Mapping[str, Any] | None = None
) -> None:
    """Kill this process after call number ``call`` of a method, see :func:`kill`."""
    _act_after(lambda: os._exit(9), owner, name, call=call, like=like or {})


def signal_after(owner: object, name: str, *, call: int) -> None:
    """Send this process SIGTERM after call number ``call`` of a method."""
    _act_after(lambda: signal.raise_signal(signal.SIGTERM), owner, name, call=call, like={})


def _act_after(
    act: Callable[[], None], owner: object, name: str, *, call: int, like: Mapping[str, Any]
) -> None:
    original = getattr(owner, name)
    calls = []

    def acting(*arguments, **keywords):
        result = original(*arguments, **keywords)
        if all(result.get(key) == like[key] for key in like):
            calls.append(result)
            if len(calls) == call:
                act()
        return result

    setattr(owner, name, acting)
