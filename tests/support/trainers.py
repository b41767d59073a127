"""Train a small model with the Hugging Face Trainer and record its weights.

Example::

    trainer = make_trainer(tmp_path / "run", make_model(), [callback, Watch()], max_steps=4)
    trainer.train()
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from msft_store.integrations.hf.peft import KeptModel
from tests.support.states import State


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.1,  # so that random numbers matter
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def examples(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 64, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


EVALS = {"one": examples(4, 1), "two": examples(4, 2)}


def make_trainer(
    folder: Path, model: Any, callbacks: list[TrainerCallback], **arguments: Any
) -> Trainer:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**{**options, **arguments}),
        train_dataset=examples(10, 0),
        eval_dataset=EVALS,
        callbacks=callbacks,
    )


def state_of(model: torch.nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in KeptModel(model).tensors().items()}


class Watch(TrainerCallback):
    """Records the weights of every evaluation; can fail after a step or an evaluation."""

    def __init__(self, fail_after: int | None = None, *, evaluated: int | None = None) -> None:
        self.seen: dict[int, State] = {}
        self._fail_after = fail_after
        self._fail_evaluated = evaluated

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen[state.global_step] = state_of(kwargs["model"])
        if state.global_step == self._fail_evaluated:
            self._fail_evaluated = None
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._fail_after:
            raise KeyboardInterrupt


def losses(trainer: Trainer) -> list[tuple[int, float]]:
    return [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e]
