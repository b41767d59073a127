"""Trained tokens per second, compared with TRL's SFTTrainer and the Hugging Face Trainer.

All trainers train the same model on the same tokenized examples, for one epoch from the same
weights, with the same optimizer (fused Adam, constant learning rate), dtype, effective batch,
micro-batch and threads, in one process and in turns. The loss is that of the completions. Only the
loop is timed, without loading, saving and evaluation, in seconds of the processor, because the
machine may do other work. Tokens are those of the examples, so padding does not count. A peer is
measured with its defaults and with its own options for speed. The ratios are those of one round.

Example::

    python -m bench.speed                   # both mixtures, minutes; writes results/speed.md, .json
    python -m bench.speed --quick           # one round, nothing written
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from bench.codec import RESULTS, machine
from bench.lengths import write
from bench.trajectories import DATA, EXAMPLE
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.data.examples import Example
from trainer.data.load import load_mixture
from trainer.model.forward import IGNORED
from trainer.model.load import LoadedModel, load_model
from trainer.text import Table
from trainer.training.run import start
from trainer.training.steps import StageSteps
from trainer.training.workspace import quiet_libraries

OUTPUT = DATA / "speed"
ROUNDS = 3
TASKS = ("roman", "weekday")
"""The sub-datasets of the example that are trained on."""
OURS = "ours"
GROUPED = {"train_sampling_strategy": "group_by_length"}

Way = Callable[[Config], float]
"""Trains one epoch and returns its processor seconds."""


class Clock(TrainerCallback):
    """Times a peer's loop."""

    seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin."""
        self._began = time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """End."""
        self.seconds = time.process_time() - self._began


def ours(config: Config) -> float:
    """Train with this trainer, as its command does: from the first step's begin to the last's end.

    What goes on beside the steps, the journal and the commit of the root, is in it.
    """
    shutil.rmtree(config.output_dir, ignore_errors=True)
    times: list[float] = []
    train = StageSteps.train

    def timed(self: StageSteps, step: int) -> Any:
        times.append(time.process_time())
        found = train(self, step)
        times.append(time.process_time())
        return found

    with patch.object(StageSteps, "train", timed):
        start(config)
    return times[-1] - times[0]


def hugging_face(config: Config, **options: Any) -> float:
    """Train with transformers' own trainer."""
    loaded, data = load_model(config.model), rows(config)
    collator = DataCollatorForSeq2Seq(loaded.tokenizer, label_pad_token_id=IGNORED)
    arguments = TrainingArguments(**settings(config), **options)
    clock = Clock()
    trainer = Trainer(
        model=loaded.model,
        args=arguments,
        train_dataset=data,
        data_collator=collator,
        optimizers=(adam(config, loaded), None),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds


def trl(config: Config, **options: Any) -> float:
    """Train with TRL's SFTTrainer."""
    loaded, data = load_model(config.model), rows(config)
    prepared = {"skip_prepare_dataset": True}
    arguments = SFTConfig(
        **settings(config),
        max_length=config.data.max_length,
        dataset_kwargs=prepared,
        **options,
    )
    clock = Clock()
    trainer = SFTTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=data,
        processing_class=loaded.tokenizer,
        optimizers=(adam(config, loaded), None),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds


WAYS: Mapping[str, Way] = {
    OURS: ours,
    "Trainer": hugging_face,
    "Trainer, grouped by length": lambda config: hugging_face(config, **GROUPED),
    "SFTTrainer": trl,
    "SFTTrainer, grouped by length, chunked loss": lambda config: trl(
        config, loss_type="chunked_nll", **GROUPED
    ),
}


def settings(config: Config) -> dict[str, Any]:
    """Return the training arguments of both peers."""
    train = config.train
    return {
        "output_dir": str(OUTPUT / "peer"),
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // train.micro_batch_size,
        "learning_rate": train.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": config.msft.compute_budget,
        "logging_steps": config.log_every,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": config.seed,
    }


def adam(config: Config, loaded: LoadedModel) -> torch.optim.Optimizer:
    """Return the optimizer that ours makes."""
    return torch.optim.Adam(loaded.model.parameters(), lr=config.train.lr, fused=True)


def examples(config: Config) -> list[Example]:
    """Return all training examples."""
    tokenizer = load_model(config.model).tokenizer
    mixture = load_mixture(config.data, tokenizer)
    return [example for sub in mixture.values() for example in sub.train.examples]


def rows(config: Config) -> Dataset:
    """Return them as both peers want them."""
    return Dataset.from_list(
        [
            {
                "input_ids": [*example.prompt, *example.completion],
                "attention_mask": [1] * len(example),
                "labels": [IGNORED] * len(example.prompt) + [*example.completion],
            }
            for example in examples(config)
        ]
    )


def measure(config: Config, rounds: int) -> dict[str, list[float]]:
    """Return each way's seconds in each round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        # Each round begins elsewhere, so that none always follows the same other one.
        names = list(WAYS)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            took = WAYS[name](config)
            if number:
                seconds[name].append(took)
    return seconds


def table(seconds: Mapping[str, Sequence[float]], tokens: int) -> str:
    """Return a Markdown table of speeds and of ratios within the rounds."""
    lines = []
    for name, took in seconds.items():
        ratios = sorted(b / a for a, b in zip(seconds[OURS], took, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        speed = f"{tokens / statistics.median(took):,.0f}"
        lines.append((name, speed, "" if name == OURS else spread))
    header = ("", "tokens a second", "ours is faster by: median (least to most)")
    return Table(header=header, rows=tuple(lines)).to_markdown()


def configurations(threads: int) -> dict[str, Config]:
    """Return the measured runs: description → configuration."""
    example = load_config(EXAMPLE / "demo.yaml", ["method=sft", "msft.compute_budget=1"])
    chosen_tasks = {name: example.data.sub_datasets[name] for name in TASKS}
    example = replace(example, data=replace(example.data, sub_datasets=chosen_tasks))
    lengths = load_config(write(OUTPUT / "lengths", train=48), ["method=sft"])
    chosen = {
        f"the example's model of 2.5 M parameters on {' and '.join(TASKS)}": example,
        "a model of 5.3 M parameters on 48 examples of very different lengths": lengths,
    }
    return {
        words: replace(
            config,
            threads=threads,
            output_dir=str(OUTPUT / "ours"),
            evaluation=replace(config.evaluation, eval_every=1.0, max_examples=8),
        )
        for words, config in chosen.items()
    }


def main() -> None:
    """Measure; write ``bench/results/speed.{md,json}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, nothing written")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_libraries()
    logging.disable(logging.WARNING)
    about = machine()
    peers = {name: version(name) for name in ("torch", "transformers", "trl")}
    document: dict[str, Any] = {**about, "versions": peers, "threads": options.threads}
    parts = []
    for words, config in configurations(options.threads).items():
        seconds = measure(config, 1 if options.quick else options.rounds)
        tokens = sum(map(len, examples(config)))
        parts.append(f"## {words}\n\n{table(seconds, tokens)}")
        print(parts[-1], flush=True)
        document[words] = {"tokens": tokens, "seconds": seconds}
    if options.quick:
        return
    head = (
        f"{about['date']}, {options.threads} thread(s) on shared cores of {about['cpu']}, commit "
        f"{about['commit']}, {', '.join(f'{a} {b}' for a, b in peers.items())}; "
        f"{options.rounds} rounds in turns.\n\n{__doc__.split('Example::')[0].strip()}"
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "speed.md").write_text("\n\n".join([head, *parts]) + "\n", encoding="utf-8")
    text = json.dumps(document, indent=2) + "\n"
    (RESULTS / "speed.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
