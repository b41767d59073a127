"""A whole MSFT run of the real language model: the disk of all its rollback points.

The four kinds of text of :mod:`bench.arena.texts` are the sub-datasets, and ``msft-train`` trains
on them by ``msft.yaml``. Disk is as in :mod:`trainer.report.summary`: everything under the store,
in full checkpoints, and the paper's policy counted on the same run. A run that is finished is not
repeated, and one that was killed is continued from its resume point.

Example::

    python -m bench.arena.msft          # a quarter of an hour on one idle core
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.arena.model import HOME, ensure
from bench.arena.texts import Row, characters, read
from bench.codec import RESULTS, machine
from bench.trajectories import ROOT
from trainer.config.load import load_config
from trainer.report.summary import Summary, summarize
from trainer.training.directory import JOURNAL
from trainer.training.run import is_finished, resume, start
from trainer.training.workspace import quiet_libraries

SUMMARY = "Run MSFT on the real language model and measure its disk."
RECIPE = Path(__file__).parent / "msft.yaml"
OUTPUT = ROOT / "runs" / "arena-msft"
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
