"""Train with ``StoreCallback`` as the page on the Trainer says, stop once, resume and export.

The command may be killed at any moment and repeated. Each save that was announced to the other
callbacks leaves a file ``saved-STEP``.

Example::

    python -m tests.support.stopped_training DIRECTORY BASE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from msft_store.integrations.hf import StoreCallback
from tests.support.trainers import Watch, make_trainer

STOP = 3
OPTIONS = {"max_steps": 6, "eval_steps": 2, "save_steps": 2}


class Announce(TrainerCallback):
    """Write a file for each save."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Path(args.output_dir, f"saved-{state.global_step}").touch()


def train(out: Path, base: Path) -> None:
    """Train to the end from where an earlier call was stopped; export the best checkpoint."""
    torch.set_num_threads(1)
    for stop in (STOP, None):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        best = {"eval_one_loss": "min", "eval_two_loss": "max"}
        callback = StoreCallback(out / "store", base=base, best=best)
        folder = callback.resume(out)
        state = json.loads(Path(folder, "trainer_state.json").read_text()) if folder else {}
        print("resumes from step", state.get("global_step", 0))
        trainer = make_trainer(out, model, [callback, Announce(), Watch(stop)], **OPTIONS)
        try:
            trainer.train(resume_from_checkpoint=folder)
        except KeyboardInterrupt:
            continue
        break
    if not (out / "model").exists():
        callback.store.export(callback.best("eval_one_loss"), out / "model")


if __name__ == "__main__":
    train(*map(Path, sys.argv[1:]))
