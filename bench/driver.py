"""The overhead of MsftRun between evaluations, against the time of the Trainer that it drives.

The same Trainer makes the same optimizer steps alone and driven by MsftRun, in one process and in
turns. Only the windows between evaluations are timed: from the begin of the first step after an
evaluation to the end of the step before the next one, with logging. What MsftRun adds there is the
count of tokens, the journal, and the commit of the evaluation before, which goes on in the
background. Evaluations themselves are not in it. The time is that of the processor, because the
machine may do other work: of the thread that trains, and of all threads. The ratios are those of
one round, and differ by more than what is measured. So MsftRun's own calls are timed, too, and what
other threads take, which is the commit.

Example::

    python -m bench.driver                  # minutes; writes results/driver.md and .json
    python -m bench.driver --quick          # one round, nothing written
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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

from bench.codec import RESULTS, machine
from bench.lengths import write
from bench.speed import settings
from bench.trajectories import DATA, EXAMPLE
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.data.examples import Example
from trainer.data.load import load_mixture
from trainer.data.schedule import stage_schedule
from trainer.hf import MsftRun
from trainer.hf.stage import StageCallback
from trainer.hf.token_counter import TokenCounter
from trainer.model.forward import IGNORED
from trainer.model.load import load_model
from trainer.text import Table
from trainer.training.workspace import quiet_libraries

OUTPUT = DATA / "driver"
ROUNDS = 4
EVAL_EVERY = 0.5
COMMON = ("method=sft", "msft.compute_budget=1", "train.batch_size=16", "train.micro_batch_size=16")
OWN = "own calls"
MODES = {"thread": time.thread_time, "process": time.process_time}


@dataclass
class Windows(TrainerCallback):
    """Times the windows between evaluations that are due after the given steps."""

    evaluations: Sequence[int]
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*MODES, OWN), 0.0))
    _began: dict[str, float] = field(default_factory=dict)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin a window with the first step after an evaluation."""
        if state.global_step in (0, *self.evaluations):
            self._began = {mode: clock() for mode, clock in MODES.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End a window with the step before an evaluation."""
        if state.global_step in self.evaluations:
            for mode, clock in MODES.items():
                self.seconds[mode] += clock() - self._began[mode]

    def timed(self, function: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
        """Return a function whose time is added to that of the own calls, or taken from it."""

        def call(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[OWN] += sign * (time.thread_time() - began)

        return call

    @contextmanager
    def own_calls(self) -> Iterator[None]:
        """Time the calls of MsftRun at each step: around the Trainer's own step, and after it."""
        attach = TokenCounter.attach

        def timed_attach(counter: TokenCounter, trainer: Any) -> None:
            trainer.training_step = self.timed(trainer.training_step, -1)
            attach(counter, trainer)
            trainer.training_step = self.timed(trainer.training_step)

        with ExitStack() as stack:
            stack.enter_context(patch.object(TokenCounter, "attach", timed_attach))
            for name in ("on_step_end", "on_log"):
                method = self.timed(getattr(StageCallback, name))
                stack.enter_context(patch.object(StageCallback, name, method))
            yield


@dataclass(frozen=True, kw_only=True)
class Task:
    """What both ways train."""

    config: Config
    training_sets: Mapping[str, Dataset]
    validation_sets: Mapping[str, Dataset]

    @property
    def evaluations(self) -> tuple[int, ...]:
        """The steps after which an evaluation is due."""
        return stage_schedule(
            examples=sum(map(len, self.training_sets.values())),
            batch_size=self.config.train.batch_size,
            eval_every=EVAL_EVERY,
            epochs=self.config.msft.compute_budget,
        ).evaluations

    def make_trainer(self, windows: Windows, model: Any, callbacks: Any, **own: Any) -> Trainer:
        """Return the Trainer; its windows end after the callbacks of the driver."""
        loaded = load_model(self.config.model)
        arguments = {**settings(self.config), "optim": "adamw_torch_fused", **own.pop("args", {})}
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**arguments),
            data_collator=DataCollatorForSeq2Seq(loaded.tokenizer, label_pad_token_id=IGNORED),
            callbacks=[*callbacks, windows],
            **own,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def alone(task: Task) -> Mapping[str, float]:
    """Train with the Trainer alone."""
    windows = Windows(task.evaluations)
    rows = [row for name in sorted(task.training_sets) for row in task.training_sets[name]]
    model = load_model(task.config.model).model
    task.make_trainer(windows, model, [], train_dataset=Dataset.from_list(rows)).train()
    return windows.seconds


def driven(task: Task) -> Mapping[str, float]:
    """Train with the Trainer, driven by MsftRun."""
    directory = OUTPUT / "run"
    shutil.rmtree(directory, ignore_errors=True)
    windows = Windows(task.evaluations)

    def make_trainer(
        model: Any, train_dataset: Any, eval_dataset: Any, callbacks: Any, **overrides: Any
    ) -> Trainer:
        return task.make_trainer(
            windows,
            model,
            callbacks,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            args=overrides,
        )

    names = sorted(task.training_sets)
    run = MsftRun(
        make_trainer,
        load_model(task.config.model).model,
        {name: (task.training_sets[name], task.validation_sets[name]) for name in names},
        output_dir=directory,
        base=task.config.model.path,
        method="sft",
        compute_budget=task.config.msft.compute_budget,
        eval_every=EVAL_EVERY,
    )
    with windows.own_calls():
        run.train()
    return windows.seconds


def measure(task: Task, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Return the seconds of both ways in each round; the first way changes with every round."""
    found: dict[str, list[dict[str, float]]] = {"alone": [], "driven": []}
    ways = {"alone": alone, "driven": driven}
    for number in range(rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            found[name].append(dict(ways[name](task)))
    return found


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Return a Markdown table of the medians, and of the ratios of the rounds."""
    alone_all, driven_all = found["alone"], found["driven"]
    own = [round_["thread"] for round_ in alone_all]
    others = [round_["process"] - round_["thread"] for round_ in driven_all]
    rows = []
    for mode, words in (("thread", "the thread that trains"), ("process", "all threads")):
        more = [d[mode] - a[mode] for a, d in zip(alone_all, driven_all, strict=True)]
        rows.append(_row(f"{words}: driven less alone", own, more))
    rows.append(_row("MsftRun's own calls", own, [round_[OWN] for round_ in driven_all]))
    rows.append(_row("other threads", own, others))
    header = ("processor seconds", "Trainer alone", "more", "share, median", "least", "most")
    return Table(header=header, rows=rows).to_markdown()


def _row(words: str, alone: Sequence[float], more: Sequence[float]) -> tuple[str, ...]:
    shares = [seconds / base for seconds, base in zip(more, alone, strict=True)]
    return (
        words,
        f"{statistics.median(alone):.2f}",
        f"{statistics.median(more):.2f}",
        f"{statistics.median(shares):.2%}",
        f"{min(shares):.2%}",
        f"{max(shares):.2%}",
    )


def make_task(config: Config) -> Task:
    """Return the rows of a configuration as the Trainer takes them."""
    mixture = load_mixture(config.data, load_model(config.model).tokenizer)
    return Task(
        config=config,
        training_sets={name: _rows(sub.train.examples) for name, sub in mixture.items()},
        validation_sets={name: _rows(sub.validation.examples[:8]) for name, sub in mixture.items()},
    )


def _rows(examples: Sequence[Example]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "input_ids": [*example.prompt, *example.completion],
                "attention_mask": [1] * len(example),
                "labels": [IGNORED] * len(example.prompt) + [*example.completion],
            }
            for example in examples
        ]
    )


def configurations(quick: bool) -> dict[str, Config]:
    """Return the measured tasks: description → configuration."""
    common = [*COMMON, f"output_dir={OUTPUT / 'unused'}"]
    demo = EXAMPLE / "demo.yaml"
    chosen = {"the example, 2.5 M parameters": load_config(demo, common)}
    if not quick:
        larger = write(OUTPUT / "lengths", train=16).parent / "base"
        words = "a model of 5.3 M parameters on the example's data"
        chosen[words] = load_config(demo, [*common, f"model.path={larger}"])
    return chosen


def main() -> None:
    """Measure; write ``bench/results/driver.{md,json}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, nothing written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    quiet_libraries()
    about = machine()
    document: dict[str, Any] = {**about}
    sections = []
    for words, config in configurations(quick).items():
        task = make_task(config)
        driven(task)  # The first save of a process compiles or loads the codec's loops.
        found = measure(task, 1 if quick else ROUNDS)
        steps = task.evaluations[-1]
        title = (
            f"{words}: {config.model.dtype}, lr {config.train.lr:g}, {steps} steps, "
            f"an evaluation every {EVAL_EVERY:g} epochs"
        )
        sections.append(f"## {title}\n\n{table(found)}")
        print(sections[-1], flush=True)
        document[title] = found
    if quick:
        return
    head = (
        f"{about['date']}, one of the shared cores of {about['cpu']}, commit {about['commit']}.\n\n"
        f"{__doc__.split('Example::')[0].strip()}"
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "driver.md").write_text("\n\n".join([head, *sections]) + "\n", encoding="utf-8")
    text = json.dumps(document, indent=2) + "\n"
    (RESULTS / "driver.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
