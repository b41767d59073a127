"""Disk and time of a Trainer's checkpoints: StoreCallback and ``checkpoint-*`` directories.

The example's base model of 2.5 M parameters learns its eight sub-datasets with the Trainer (bf16,
lr 1e-5, fused Adam). Every few steps all of them are evaluated and a checkpoint is saved. To keep
the best checkpoint of every sub-dataset, all ``checkpoint-*`` directories must stay. With
``save_total_limit=2`` only the newest and the best by one metric stay. The store keeps the best of
every sub-dataset, the newest, and the resume point.

Disk is the size of all files of a run, at its largest and at its end, in units of one model as
safetensors. Time is that of the whole training with its evaluations, relative to a training that
saves nothing. It is measured in seconds of the processor, because the machine may do other work,
and by the clock, which includes the waiting for the disk. The ways take turns, and the ratios are
those of one round.

Example::

    python -m bench.huggingface             # minutes; writes results/huggingface.md and .json
    python -m bench.huggingface --quick     # one round, nothing written
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bench.codec import RESULTS, machine
from bench.trajectories import DATA, EXAMPLE
from msft_store.integrations.hf import StoreCallback
from trainer.config.load import load_config
from trainer.data.load import load_mixture
from trainer.model.load import load_model
from trainer.text import Table
from trainer.training.workspace import quiet_libraries

OUTPUT = DATA / "huggingface"
ROUNDS = 3
STEPS, EVERY, VALIDATION = 120, 12, 16
BASE = EXAMPLE / "base"

Callbacks = Callable[[list[str]], list[TrainerCallback]]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to keep checkpoints."""

    words: str
    arguments: dict[str, Any]
    callbacks: Callbacks = lambda names: []


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The disk and the time of one training."""

    processor: float
    """Seconds."""
    clock: float
    """Seconds."""
    largest: int
    """Bytes."""
    left: int
    """Bytes."""


def store_callback(names: list[str], *, background: bool) -> list[TrainerCallback]:
    """Return ours, with the best of every sub-dataset."""
    best = {f"eval_{name}_loss": "min" for name in names}
    store = OUTPUT / "store"
    return [StoreCallback(store, base=BASE, best=best, background=background)]


SAVES = {"save_strategy": "steps", "save_steps": EVERY}
WAYS = (
    Way(words="nothing is saved", arguments={"save_strategy": "no"}),
    Way(words="checkpoint-*, all", arguments=SAVES),
    Way(
        words="checkpoint-*, the newest and the best by one metric",
        arguments={
            **SAVES,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_roman_loss",
        },
    ),
    Way(
        words="StoreCallback, the best of every sub-dataset",
        arguments=SAVES,
        callbacks=lambda names: store_callback(names, background=False),
    ),
    Way(
        words="the same, background=True",
        arguments=SAVES,
        callbacks=lambda names: store_callback(names, background=True),
    ),
)


class Scale(TrainerCallback):
    """Measures the disk before every step, when all pending files have been written."""

    largest = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Measure."""
        self.largest = max(self.largest, weigh())


def weigh() -> int:
    """Return the bytes of all files of a run."""
    return sum(path.stat().st_size for path in OUTPUT.rglob("*") if path.is_file())


def data() -> tuple[Dataset, dict[str, Dataset]]:
    """Return the training examples, and the first validation examples of every sub-dataset."""
    config = load_config(EXAMPLE / "demo.yaml")
    loaded = load_model(config.model)
    mixture = load_mixture(config.data, loaded.tokenizer, max_validation=VALIDATION)

    def dataset(examples: Any) -> Dataset:
        return Dataset.from_list(
            [
                {
                    "input_ids": [*e.prompt, *e.completion],
                    "labels": [*[-100] * len(e.prompt), *e.completion],
                }
                for e in examples
            ]
        )

    train = [example for sub in mixture.values() for example in sub.train.examples]
    return dataset(train), {name: dataset(s.validation.examples) for name, s in mixture.items()}


def train(way: Way, examples: Dataset, evaluation: dict[str, Dataset]) -> Taken:
    """Train from the beginning, and return its disk and time."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    loaded = load_model(load_config(EXAMPLE / "demo.yaml").model)
    arguments = TrainingArguments(
        output_dir=str(OUTPUT / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        eval_strategy="steps",
        eval_steps=EVERY,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **way.arguments,
    )
    scale = Scale()
    trainer = Trainer(
        model=loaded.model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=evaluation,
        data_collator=DataCollatorForSeq2Seq(loaded.tokenizer),
        callbacks=[*way.callbacks(list(evaluation)), scale],
    )
    trainer.remove_callback(PrinterCallback)
    processor, clock = time.process_time(), time.perf_counter()
    trainer.train()
    processor, clock = time.process_time() - processor, time.perf_counter() - clock
    left = weigh()
    return Taken(processor=processor, clock=clock, largest=max(scale.largest, left), left=left)


def measure(rounds: int) -> dict[str, list[Taken]]:
    """Train each way in each round, after one of the first way that does not count."""
    examples, evaluation = data()
    train(WAYS[-1], examples, evaluation)
    taken: dict[str, list[Taken]] = {way.words: [] for way in WAYS}
    for number in range(rounds):
        start = number % len(WAYS)
        for way in WAYS[start:] + WAYS[:start]:
            taken[way.words].append(train(way, examples, evaluation))
    return taken


def table(taken: dict[str, list[Taken]], full: int) -> str:
    """Return a Markdown table."""
    plain = taken[WAYS[0].words]
    rows = []
    for words, runs in taken.items():
        pairs = list(zip(runs, plain, strict=True))
        rows.append(
            (
                words,
                f"{max(run.largest for run in runs) / full:.2f}",
                f"{max(run.left for run in runs) / full:.2f}",
                _spread([a.processor / b.processor for a, b in pairs]),
                _spread([a.clock / b.clock for a, b in pairs]),
            )
        )
    header = ("", "disk at most", "disk at the end", "processor: median", "clock: median")
    return Table(header=header, rows=tuple(rows)).to_markdown()


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Measure; write ``bench/results/huggingface.{md,json}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    logging.disable(logging.WARNING)
    rounds = 1 if options.quick else ROUNDS
    taken = measure(rounds)
    full = sum(file.stat().st_size for file in BASE.glob("*.safetensors"))
    shown = table(taken, full)
    print(shown)
    if options.quick:
        return
    about = machine()
    head = (
        f"{about['date']}, one thread on shared cores of {about['cpu']}, commit {about['commit']}; "
        f"{rounds} rounds in turns of {STEPS} steps, a checkpoint every {EVERY}; one model has "
        f"{full:,} bytes.\n\n{__doc__.split('Example::')[0].strip()}"
    )
    document = {**about, "full": full}
    document["runs"] = {words: [asdict(run) for run in runs] for words, runs in taken.items()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "huggingface.md").write_text(f"{head}\n\n{shown}\n", encoding="utf-8")
    text = json.dumps(document, indent=2) + "\n"
    (RESULTS / "huggingface.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
