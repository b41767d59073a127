"""The small real training that the examples of this directory share.

A causal language model of 2.5 million parameters learns the sub-datasets of ``stdlib_tasks``. A
batch is a pure function of seed and position, so going back to a position means the same batches
again, and skipping one means never to see it.

Example::

    model = load_model()
    optimizer = make_optimizer(model)
    train_step(model, optimizer, batch(position, seed=0))["loss"]
    evaluate(model, "roman")
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLE = Path(__file__).parent.parent / "stdlib_tasks"
BASE = EXAMPLE / "base"
TASKS = ("entity", "mime", "roman", "status")
IGNORED = -100

Batch = dict[str, torch.Tensor]


def load_model() -> Any:
    """Return the base model in bf16, the same each time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)


def make_optimizer(model: Any, lr: float = 1e-5) -> torch.optim.Optimizer:
    """Return Adam, as the paper's runs have it."""
    return torch.optim.Adam(model.parameters(), lr=lr)


@cache
def examples(task: str, split: str) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of prompts and completions."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lines = (EXAMPLE / "data" / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        (
            tokenizer(row["prompt"])["input_ids"],
            [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id],
        )
        for row in rows
    ]


def collate(rows: list[tuple[list[int], list[int]]]) -> Batch:
    """Return padded tensors, with labels on the completions only."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, labels = [], []
    for prompt, completion in rows:
        padding = [0] * (width - len(prompt) - len(completion))
        ids.append([*prompt, *completion, *padding])
        labels.append([IGNORED] * len(prompt) + completion + [IGNORED] * len(padding))
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def batch(position: int, *, seed: int = 0, tasks: tuple[str, ...] = TASKS, size: int = 16) -> Batch:
    """Return the batch of a position: examples drawn from the tasks' training splits."""
    pool = [row for task in tasks for row in examples(task, "train")]
    return collate(random.Random(f"{seed} {position}").sample(pool, size))  # noqa: S311


def corrupted(position: int) -> Batch:
    """Return the batch of a position; from 13 to 14 the completions are noise."""
    data = batch(position)
    if position in (13, 14):
        noise = torch.randint_like(data["labels"], 500, generator=torch.Generator().manual_seed(1))
        data["labels"] = torch.where(data["labels"] == IGNORED, IGNORED, noise)
    return data


def compute_loss(model: Any, data: Batch) -> torch.Tensor:
    """Return the loss, computed in float32 with the bf16 weights.

    Many processors have no bf16 arithmetic and would take eight times as long in bf16.
    """
    weights = {name: weight.float() for name, weight in model.named_parameters()}
    loss: torch.Tensor = functional_call(model, weights, kwargs=data).loss
    return loss


def train_step(model: Any, optimizer: torch.optim.Optimizer, data: Batch) -> dict[str, float]:
    """Do one step; return its ``loss`` and its ``gradient norm``."""
    model.train()
    loss = compute_loss(model, data)
    loss.backward()
    norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": float(loss.detach()), "gradient norm": float(norm)}


def evaluate(model: Any, task: str, count: int = 32) -> float:
    """Return the loss on the first validation examples of a task."""
    model.eval()
    with torch.no_grad():
        return float(compute_loss(model, collate(examples(task, "validation")[:count])))


def evaluate_all(model: Any, tasks: tuple[str, ...] = TASKS) -> dict[str, float]:
    """Return the loss on each task, and their mean as ``overall``."""
    losses = {task: evaluate(model, task) for task in tasks}
    return {**losses, "overall": sum(losses.values()) / len(losses)}
