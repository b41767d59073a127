"""Disk of a whole MSFT run: full copies, as in the paper, and the store's differences.

Real training of the example's base model on ten sub-datasets (``bench/tasks.py``), in two regimes,
with compute budgets of 1, 3 and 10 epochs, under the paper's rule and with a peak window. Disk is
in full checkpoints, in the dtype of the checkpoints: everything under the store, temporary files
included. The paper's policy is counted on the same run. Runs are kept in ``runs/bench-disk``, by
commit. A finished run is not repeated, and an unfinished run is begun again.

Example::

    python -m bench.disk            # three quarters of an hour on one core
    python -m bench.disk --quick    # two stages with a budget of 1, nothing written
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.codec import RESULTS, machine
from bench.masters import train
from bench.tasks import MIXTURE, write
from bench.trajectories import DATA, EXAMPLE, REGIMES, ROOT, Regime
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.journal import Record, effective, read
from trainer.report.summary import summarize
from trainer.text import Table
from trainer.training.directory import JOURNAL
from trainer.training.run import is_finished, start
from trainer.training.workspace import quiet_libraries

RUNS = ROOT / "runs" / "bench-disk"
SIZES = {"train": 64, "validation": 32}
"""Examples of each sub-dataset."""
BATCH = 8
EVAL_EVERY = 0.25
BUDGETS = (1, 3, 10)
WINDOWS = (None, 4, 2)
TARGETS = {"bf16-1e-5": (0.25, 0.10), "masters-2e-5": (1.0, None)}
"""Regime → most that peak and mean may be; with masters only where a peak window is on."""
QUICK = ("msft.max_stages=2",)
ABOUT = """\
One core of {cpu}, {date}, commit {commit}.

Whole MSFT runs of the example's base model (causal LM of 2.5 M parameters, all of them trained,
Adam, constant learning rate) on {sub_datasets} sub-datasets of {train} training and {validation}
validation examples each, in batches of {batch}: {steps} optimizer steps an epoch of the whole
mixture (the paper: 281), evaluated every {eval_every} epochs by token loss, seed 0, at most 20
stages. C: compute budget in epochs. W: peak window in evaluations.

Peak and mean are the disk of all rollback points in full checkpoints: everything under the store,
the peak with temporary files and before eviction, the mean over evaluations. The paper's policy
(a full copy per distinct champion and best overall) is counted on the same run. Alive: checkpoints
in the store after eviction, with the stage's root. A commit: what it added, in full checkpoints.

- bf16-1e-5: weights trained and saved in bf16, through `trainer.training.run.start`.
- masters-2e-5: weights trained in fp32, saved and restored in bf16, in the trainer's loop with a
  timeline that rounds (`bench/masters.py`).
"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training to measure."""

    regime: Regime
    budget: int
    """C, in epochs of the active mixture."""
    window: int | None
    """W, in evaluations."""

    @property
    def name(self) -> str:
        """A name for its directory."""
        return f"{self.regime.name}-C{self.budget}-W{self.window or 'off'}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The measurements of a run; disk in full checkpoints."""

    regime: str
    lr: float
    budget: int
    window: int | None
    stages: int
    excluded: int
    """Sub-datasets that were excluded."""
    steps: int
    evaluations: int
    seconds: float
    checkpoint_bytes: int
    """One full checkpoint."""
    peak: float
    mean: float
    paper_peak: int
    paper_mean: float
    alive_peak: int
    """Checkpoints in the store after eviction, the root and the best overall included, at most."""
    alive_mean: float
    new_mean: float
    """The bytes that a commit added before the eviction."""
    new_peak: float


def runs() -> list[Run]:
    """Return everything that is measured; a window as long as the stage would change nothing."""
    return [
        Run(regime=regime, budget=budget, window=window)
        for budget in BUDGETS
        for regime in REGIMES
        if regime.name in TARGETS
        for window in WINDOWS
        if window is None or window * EVAL_EVERY < budget
    ]


def config_of(run: Run, *, data: Path, output: Path, more: Sequence[str] = ()) -> Config:
    """Return the example's configuration with the changes of a measured run."""
    changes = {
        "output_dir": output,
        "data.directory": data,
        "model.dtype": str(run.regime.weights).removeprefix("torch."),
        "async_save": "false",
        "train.lr": run.regime.lr,
        "train.batch_size": BATCH,
        "train.micro_batch_size": BATCH,
        "evaluation.eval_every": EVAL_EVERY,
        "msft.compute_budget": run.budget,
        "msft.peak_window": "null" if run.window is None else run.window,
    }
    overrides = [*(f"{key}={value}" for key, value in changes.items()), *more]
    return load_config(EXAMPLE / "demo.yaml", overrides=overrides)


def finish(run: Run, config: Config) -> list[Record]:
    """Train, unless the run is finished, and return the journal."""
    directory = Path(config.output_dir)
    if not is_finished(directory):
        shutil.rmtree(directory, ignore_errors=True)
        if run.regime.weights == run.regime.snapshots:
            start(config)
        else:
            train(config, run.regime.snapshots)
    return read(directory / JOURNAL)


def measure(run: Run, records: Sequence[Record]) -> Row:
    """Return the measurements of a finished run, from its journal."""
    summary = summarize(records)
    disk = summary.disk
    assert disk is not None, "a finished run has committed"
    committed = [record for record in effective(records) if record["event"] == "committed"]
    kept = [len(record["kept"]) for record in committed]
    new = [record["stored_bytes"] / disk.checkpoint_bytes for record in committed]
    return Row(
        regime=run.regime.name,
        lr=summary.lr,
        budget=run.budget,
        window=run.window,
        stages=summary.stages,
        excluded=sum(peak.excluded for peak in summary.peaks.values()),
        steps=summary.steps,
        evaluations=summary.evaluations,
        seconds=summary.seconds,
        checkpoint_bytes=disk.checkpoint_bytes,
        peak=disk.peak,
        mean=disk.mean,
        paper_peak=disk.paper_peak_copies,
        paper_mean=disk.paper_mean_copies,
        alive_peak=max(kept),
        alive_mean=mean(kept),
        new_mean=mean(new),
        new_peak=max(new),
    )


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return math.fsum(values) / len(values)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    header = (
        "regime", "lr", "C", "W", "stages", "excluded", "steps", "peak", "mean",
        "paper's peak", "paper's mean", "alive: most, mean", "a commit: most, mean",
    )  # fmt: skip
    cells = [
        (
            row.regime,
            f"{row.lr:g}",
            str(row.budget),
            str(row.window or "off"),
            str(row.stages),
            str(row.excluded),
            f"{row.steps:,}",
            f"{row.peak:.2f}",
            f"{row.mean:.2f}",
            str(row.paper_peak),
            f"{row.paper_mean:.2f}",
            f"{row.alive_peak}, {row.alive_mean:.1f}",
            f"{row.new_peak:.3f}, {row.new_mean:.3f}",
        )
        for row in rows
    ]
    return Table(header=header, rows=cells).to_markdown() + "\n"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Report for each row with a target whether the target is met."""
    lines = []
    for row in rows:
        most_peak, most_mean = TARGETS[row.regime]
        if most_mean is None and row.window is None:
            continue
        parts = [("peak", row.peak, most_peak), ("mean", row.mean, most_mean)]
        said = [
            f"{what} {value:.2f} of {most:.2f} allowed: {'met' if value <= most else 'missed'}"
            for what, value, most in parts
            if most is not None
        ]
        lines.append(f"{row.regime}, C = {row.budget}, W {row.window or 'off'}: {'; '.join(said)}")
    return lines


def report(rows: Sequence[Row], about: dict[str, str]) -> str:
    """Return the whole result as Markdown, one regime after the other."""
    rows = sorted(rows, key=lambda row: list(TARGETS).index(row.regime))
    text = ABOUT.format(
        **about,
        **SIZES,
        sub_datasets=len(MIXTURE),
        batch=BATCH,
        steps=math.ceil(len(MIXTURE) * SIZES["train"] / BATCH),
        eval_every=EVAL_EVERY,
    )
    return "\n".join([text, table(rows), *(f"- {line}" for line in verdicts(rows)), ""])


def main() -> None:
    """Train and measure; write ``bench/results/disk.{md,json}`` after each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute or two, nothing written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    quiet_libraries()
    data = DATA / "mixture"
    write(data, **SIZES)
    about = machine()
    rows: list[Row] = []
    for run in runs():
        if quick and run.budget != BUDGETS[0]:
            continue
        output = RUNS / ("quick" if quick else about["commit"]) / run.name
        if quick:
            shutil.rmtree(output, ignore_errors=True)
        config = config_of(run, data=data, output=output, more=QUICK if quick else ())
        rows.append(measure(run, finish(run, config)))
        print(table(rows[-1:]), flush=True)
        if not quick:
            save(rows, about)
    print(table(rows) if quick else report(rows, about))


def save(rows: Sequence[Row], about: dict[str, str]) -> None:
    """Write the results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "disk.md").write_text(report(rows, about), encoding="utf-8")
    document = {**about, "sizes": SIZES, "batch": BATCH, "rows": [asdict(row) for row in rows]}
    (RESULTS / "disk.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
