"""A whole MSFT run of the real language model: the disk of all its rollback points.

The four kinds of text of :mod:`bench.arena.texts` are the sub-datasets, and ``msft-train`` trains
on them by ``msft.yaml``. Disk is as in :mod:`trainer.report.summary`: everything under the store,
in full checkpoints, and the paper's policy counted on the same run. A run with the present settings
that is finished is not repeated, and one that was killed is continued from its resume point. On a
processor that is slow at bf16, products are computed in fp32 (:mod:`bench.arena.precision`).

Example::

    python -m bench.arena.msft          # a quarter of an hour on one idle core
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.arena.model import HOME, ensure
from bench.arena.precision import describe, fast_products
from bench.arena.texts import characters, read
from bench.codec import RESULTS, machine
from bench.disk import mean
from bench.trajectories import ROOT
from trainer.config.load import load_config, to_dict
from trainer.journal import effective
from trainer.journal import read as read_journal
from trainer.report.summary import summarize
from trainer.text import Table
from trainer.training.directory import CONFIG, JOURNAL
from trainer.training.run import is_finished, resume, start
from trainer.training.workspace import quiet_libraries

SUMMARY = "Run MSFT on the real language model and measure its disk."
RECIPE = Path(__file__).parent / "msft.yaml"
OUTPUT = ROOT / "runs" / "arena-msft"
ABOUT = ROOT / "runs" / "arena-msft.json"
"""Date, processor, commit and settings at the beginning of the run."""
SIZES = {"train": 48, "validation": 16, "test": 16}
"""Examples of each sub-dataset."""
LONGEST = 240
"""Characters of an example, few enough for the ``max_length`` of the recipe."""


def write(directory: Path) -> None:
    """Write ``KIND.{train,validation,test}.jsonl``; no text is in two of them."""
    directory.mkdir(parents=True, exist_ok=True)
    for kind, rows in read().items():
        short = iter(row for row in rows if len(characters(row)) <= LONGEST)
        for split, size in SIZES.items():
            lines = [json.dumps(next(short)) + "\n" for _ in range(size)]
            (directory / f"{kind}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The measurements of the run; disk in full checkpoints."""

    parameters: int
    sub_datasets: int
    stages: int
    steps: int
    evaluations: int
    minutes: float
    checkpoint_bytes: int
    """One full checkpoint."""
    peak: float
    mean: float
    paper_peak: int
    paper_mean: float
    alive_peak: int
    """Checkpoints in the store after eviction, at most."""
    new_mean: float
    """The bytes that a commit added, on average."""
    new_peak: float
    loss_base: float
    """Loss of the base on the test splits."""
    loss: float
    """Loss of the result on the test splits."""


def measure(directory: Path) -> Run:
    """Return the measurements of a finished run, from its journal and its result."""
    records = read_journal(directory / JOURNAL)
    summary = summarize(records)
    disk, overall = summary.disk, summary.overall
    assert disk is not None, "a finished run has committed"
    assert overall.base_test is not None, "a finished run has tested the base"
    assert overall.test is not None, "a finished run has tested its result"
    committed = [record for record in effective(records) if record["event"] == "committed"]
    new = [record["stored_bytes"] / disk.checkpoint_bytes for record in committed]
    return Run(
        parameters=disk.checkpoint_bytes // torch.bfloat16.itemsize,
        sub_datasets=len(summary.peaks),
        stages=summary.stages,
        steps=summary.steps,
        evaluations=summary.evaluations,
        minutes=summary.seconds / 60,
        checkpoint_bytes=disk.checkpoint_bytes,
        peak=disk.peak,
        mean=disk.mean,
        paper_peak=disk.paper_peak_copies,
        paper_mean=disk.paper_mean_copies,
        alive_peak=max(len(record["kept"]) for record in committed),
        new_mean=mean(new),
        new_peak=max(new),
        loss_base=overall.base_test,
        loss=overall.test,
    )


def report(run: Run, about: dict[str, str]) -> str:
    """Return the result as Markdown."""
    rows = [
        ("all rollback points: peak", f"{run.peak:.3f}", str(run.paper_peak)),
        ("all rollback points: mean", f"{run.mean:.3f}", f"{run.paper_mean:.2f}"),
    ]
    header = ("in full checkpoints", "ours", "the paper's policy")
    return "\n".join(
        [
            f"One shared core of {about['cpu']}, {about['date']}, commit {about['commit']}.",
            "",
            f"One MSFT run of SmolLM2-135M ({run.parameters:,} weights, all trained, bf16, Adam, "
            f"constant lr 1e-5, C = 1, no peak window) on {run.sub_datasets} sub-datasets of real "
            f"text with {SIZES['train']} training, {SIZES['validation']} validation and "
            f"{SIZES['test']} test examples each: {run.stages} stages, {run.steps} steps, "
            f"{run.evaluations} evaluations, {run.minutes:.0f} minutes beside other work. The base "
            "was dequantised from Q4_1, so its weights are large and change rarely. Products were "
            f"computed {about['products']}.",
            "",
            Table(header=header, rows=rows).to_markdown(),
            "",
            "Disk is everything under the store: the peak with temporary files and before "
            "eviction, the mean over evaluations. The paper's policy, a full copy per distinct "
            "champion and best overall, is counted on the same run. At most "
            f"{run.alive_peak} checkpoints were kept at once; a commit added {run.new_mean:.4f} "
            f"full checkpoints on average and {run.new_peak:.4f} at most. The loss on the test "
            f"splits went from {run.loss_base:.3f} to {run.loss:.3f}.",
            "",
        ]
    )


def save(run: Run, about: dict[str, str]) -> None:
    """Write ``bench/results/arena_msft.{json,md}``."""
    document = {**about, "sizes": SIZES, "run": asdict(run)}
    text = json.dumps(document, indent=2) + "\n"
    (RESULTS / "arena_msft.json").write_text(text, encoding="utf-8")
    (RESULTS / "arena_msft.md").write_text(report(run, about), encoding="utf-8")


def is_begun(settings: dict[str, Any]) -> bool:
    """Return True if there is a run with these settings, finished or not."""
    if not ((OUTPUT / CONFIG).is_file() and ABOUT.is_file()):
        return False
    found = json.loads(ABOUT.read_text(encoding="utf-8")).get("settings")
    return bool(found == settings)


def main() -> None:
    """Complete the run, measure it and write the result."""
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("--data", type=Path, default=HOME, help="default: %(default)s")
    home = parser.parse_args().data.absolute()
    torch.set_num_threads(1)
    quiet_libraries()
    mixture = home / "mixture"
    write(mixture)
    overrides = [
        f"output_dir={OUTPUT}",
        f"model.path={ensure(home)}",
        f"data.directory={mixture}",
    ]
    config = load_config(RECIPE, overrides=overrides)
    settings = {"config": to_dict(config), "sizes": SIZES, "longest": LONGEST}
    with fast_products():
        if not is_begun(settings):
            shutil.rmtree(OUTPUT, ignore_errors=True)
            about = {**machine(), "products": describe(), "settings": settings}
            ABOUT.parent.mkdir(exist_ok=True)
            ABOUT.write_text(json.dumps(about), encoding="utf-8")
            start(config)
        elif not is_finished(OUTPUT):
            resume(OUTPUT)
    run, about = measure(OUTPUT), json.loads(ABOUT.read_text(encoding="utf-8"))
    del about["settings"]
    save(run, about)
    print(report(run, about))


if __name__ == "__main__":
    main()
