"""The share of weights that training changes, by learning rate, precision and steps.

A weight has changed if any of its bits has. Each snapshot of :mod:`bench.arena.trajectories` is
compared with the base and with the snapshot before. The embeddings, which are the output layer,
too, are counted apart from all other weights.

Example::

    python -m bench.arena.changes       # bench/results/changes.json, docs/BENCHMARKS.md, the plot
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from safetensors import safe_open

from bench.arena.model import HOME
from bench.arena.trajectories import REGIMES
from bench.codec import RESULTS, machine
from bench.headline import PAGE
from bench.trajectories import ROOT
from trainer.text import Table

SUMMARY = "Count the weights that training changes."
BEGIN, END = "<!-- changes: python -m bench.arena.changes -->", "<!-- end of changes -->"
PLOT = ROOT / "docs" / "changes.svg"
EMBEDDINGS = "model.embed_tokens.weight"
LANES = {2: torch.int16, 4: torch.int32}
"""Bytes of an element → integers of its size, whose equality is that of the bits."""
SHOWN = (1, 2, 4, 8, 16, 32, 64, 100, 200)
"""Steps in the table."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Changed weights in percent of all, of the embeddings, and of all others."""

    all: float
    embeddings: float | None
    """``None`` for an adapter, which has no embeddings."""
    others: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """The changes of one snapshot."""

    regime: str
    lr: float
    step: int
    before: int
    """Step of the snapshot before."""
    loss: float
    """Mean loss of the steps since the snapshot before."""
    base: Share
    """Changed against the base."""
    previous: Share
    """Changed against the snapshot before."""


def compare(new: Path, old: Path) -> Share:
    """Return the share of weights that differ between two snapshots."""
    counts = {True: [0, 0], False: [0, 0]}
    with safe_open(new, "pt") as left, safe_open(old, "pt") as right:
        for name in left.keys():  # noqa: SIM118 - the file is no mapping
            one, other = left.get_tensor(name), right.get_tensor(name)
            lane = LANES[one.element_size()]
            counted = counts[name == EMBEDDINGS]
            counted[0] += int(torch.count_nonzero(one.view(lane) ^ other.view(lane)))
            counted[1] += one.numel()
    (changed, embeddings), (others_changed, others) = counts[True], counts[False]
    return Share(
        all=100 * (changed + others_changed) / (embeddings + others),
        embeddings=100 * changed / embeddings if embeddings else None,
        others=100 * others_changed / others,
    )


def measure(home: Path, regime: str) -> list[Row]:
    """Return the changes of all snapshots of a regime."""
    files = {int(file.stem[4:]): file for file in (home / regime).glob("step*.safetensors")}
    steps = sorted(files)
    rows = []
    for before, step in pairwise(steps):
        with safe_open(files[step], "pt") as file:
            loss = float(file.metadata()["loss"])
        base = compare(files[step], files[0])
        rows.append(
            Row(
                regime=regime,
                lr=REGIMES[regime].lr,
                step=step,
                before=before,
                loss=loss,
                base=base,
                previous=base if before == 0 else compare(files[step], files[before]),
            )
        )
    return rows


def products_of(folder: Path) -> set[str]:
    """Return in words how the snapshots of a regime were computed."""
    found = set()
    for path in folder.glob("step*.safetensors"):
        with safe_open(path, "pt") as file:
            found.add(file.metadata()["products"])
    return found


def percent(value: float | None) -> str:
    """Return a share with three significant digits."""
    return "-" if value is None else f"{value:.3g}"


def late_loss(rows: Sequence[Row]) -> float:
    """Return the mean loss of the second half of a regime's steps."""
    late = [row for row in rows if row.before >= rows[-1].step // 2]
    return sum((row.step - row.before) * row.loss for row in late) / sum(
        row.step - row.before for row in late
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown: one line a regime, one column a number of steps."""
    found = {(row.regime, row.step): row for row in rows}
    steps = [step for step in SHOWN if any((name, step) in found for name in REGIMES)]
    lines = []
    for name in REGIMES:
        of_regime = [row for row in rows if row.regime == name]
        if not of_regime:
            continue
        last = of_regime[-1]
        cells = [
            percent(found[name, step].base.all) if (name, step) in found else "-" for step in steps
        ]
        split = f"{percent(last.base.embeddings)}, {percent(last.base.others)}"
        one_step = percent(last.previous.all) if last.before == last.step - 1 else "-"
        lines.append((name, *cells, split, one_step, f"{late_loss(of_regime):.2f}"))
    header = ("regime", *map(str, steps), "embeddings, others", "last step alone", "loss")
    return Table(header=header, rows=lines).to_markdown()


def plot(rows: Iterable[Row], path: Path) -> None:
    """Draw the share against the steps, one line a regime, on a transparent ground."""
    grey = "#808080"
    colours = {"axes.edgecolor": grey, "axes.labelcolor": grey, "text.color": grey}
    ticks = {
        "xtick.color": grey,
        "ytick.color": grey,
        "svg.hashsalt": "changes",
        "svg.fonttype": "none",
    }
    found = list(rows)
    with rc_context({**colours, **ticks}):
        figure = Figure(figsize=(7, 4), layout="tight")
        axis = figure.subplots()
        for name in REGIMES:
            own = [row for row in found if row.regime == name]
            if own:
                shares = [row.base.all for row in own]
                axis.plot([row.step for row in own], shares, marker="o", markersize=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel="steps", ylabel="changed weights, %")
        axis.grid(alpha=0.3)
        axis.legend(framealpha=0, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path, transparent=True, metadata={"Date": None})


def page(document: dict[str, Any]) -> str:
    """Return the section of the page: the table, its explanation and the plot."""
    rows = [
        Row(**{**row, "base": Share(**row["base"]), "previous": Share(**row["previous"])})
        for row in document["rows"]
    ]
    about = (
        "SmolLM2-135M-Instruct, dequantised from Q4_1 and rounded to bf16, so its weights are "
        "large (median 0.108) and change rarely. 256 tokens a step, 64 each of prose, code, "
        "conversations and mathematics; AdamW, constant learning rate, no weight decay. `masters`: "
        "bf16 snapshots of fp32 masters; `lora`: an adapter of rank 16 in fp32 at 1e-4, whose "
        "share is of its own weights. Changed weights in % of all, against the base after so many "
        "steps; at the last step of the embeddings and of all others, and against the step before "
        "it; mean loss of the second half of the steps. "
        f"Products were computed {' or '.join(document['products'])}. "
        f"{document['date']}, one shared core of {document['cpu']}, commit {document['commit']}."
    )
    return f"{about}\n\n{table(rows)}\n\n![Changed weights by step and regime]({PLOT.name})"


def write(home: Path) -> None:
    """Measure all regimes that are there; renew the results, the section and the plot."""
    rows = [row for regime in REGIMES for row in measure(home, regime)]
    products = sorted({name for regime in REGIMES for name in products_of(home / regime)})
    document = {**machine(), "products": products, "rows": [asdict(row) for row in rows]}
    (RESULTS / "changes.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plot(rows, PLOT)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page(document)}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("--data", type=Path, default=HOME, help="default: %(default)s")
    torch.set_num_threads(1)
    write(parser.parse_args().data)


if __name__ == "__main__":
    main()
