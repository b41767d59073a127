"""The experiment's tables and plots, from its records alone.

They are written between two comments in ``docs/RESULTS.md``; the prose around the comments is
written by hand.

Example::

    print(render(load(RECORDS), PHASES["final"]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.codec import RESULTS
from bench.experiment.false_exclusions import exclusion_table
from bench.experiment.plots import draw_flops, draw_peaks
from bench.experiment.records import find_peak
from bench.experiment.rows import Record, Row, Runs, build_rows, group
from bench.experiment.variants import CHOSEN, PHASES, REFERENCE, Phase
from bench.trajectories import ROOT
from trainer.comparison.results import Estimate, estimate
from trainer.config.schema import OVERALL
from trainer.files import write_atomic, write_json
from trainer.text import Table

PAGE = ROOT / "docs" / "RESULTS.md"
SUMMARY = RESULTS / "experiment.json"
NOISE = (
    "Simulated: noise of the recorded standard errors on smoothed validation curves of SFT, 1,000 "
    "draws a mixture. Too early: the true peak lies after the checkpoint of the roll-back. "
    "Falsely: it has not even passed at the evaluation that decides. Noise is independent between "
    "evaluations here, which makes the rates upper bounds."
)
_LEAD, _LAG = 2, 1
"""Standard errors by which the candidate must lead to be better, and lag to be worse."""
BEGIN = "<!-- experiment: written by python -m bench.experiment -->"
END = "<!-- end of experiment -->"

NOTE = (
    "Loss: mean token loss of the result, lower is better. ± is the standard error over seeds, and "
    "differences are paired by seed, so theirs is that of the differences. Right: answers that are "
    "right as a whole. Spread: standard deviation across sub-datasets. TFLOPs are model FLOPs of a "
    "run; training includes what is not kept, and the total everything but what a kill repeated. "
    "Evaluation is its share of the total, with the final tests."
)


def render(records: Sequence[Record], phase: Phase) -> str:
    """Return the tables of a phase as Markdown."""
    rows, grouped = build_rows(records, phase), group(records, phase)
    parts = []
    for mixture, variants in grouped.items():
        own = [row for row in rows if row.mixture == mixture]
        parts += [f"#### {mixture}: {phase.split} loss and work", score_table(own).to_markdown()]
        parts += filter(None, [verdict(own)])
        if REFERENCE in variants:
            peaks = peak_table(variants[REFERENCE])
            parts += [f"#### {mixture}: peaks of SFT by seed", peaks.to_markdown()]
        for name in (REFERENCE, CHOSEN):
            table = headroom_table(variants.get(name, {}))
            if table.rows:
                title = f"#### {mixture}: headroom and forgetting of {name}"
                parts += [title, table.to_markdown()]
    return "\n\n".join(parts) + "\n" if parts else "No run has a record.\n"


def verdict(rows: Sequence[Row]) -> str:
    """Return a sentence that compares the chosen candidate with all other rows of a mixture.

    It is empty without a record of the candidate, or with a single seed.
    """
    kinds: dict[str, list[str]] = {"better than": [], "worse than": [], "as good as": []}
    for row in rows:
        found = row.to_chosen
        if found is None or found.error is None:
            continue
        lead, error = found.mean, found.error
        kind = "better than" if lead > _LEAD * error else "as good as"
        kinds["worse than" if lead < -_LAG * error else kind].append(row.label)
    parts = [f"{kind} {'; '.join(labels)}" for kind, labels in kinds.items() if labels]
    if not parts:
        return ""
    return (
        f"By paired differences, {CHOSEN} is {', and '.join(parts)}. Better: by more than {_LEAD} "
        f"standard errors; worse: by more than {_LAG}."
    )


def score_table(rows: Sequence[Row]) -> Table:
    """Return the scores and the work of all variants on one mixture."""
    header = ("", "seeds", "C", "loss", "to SFT", f"to {CHOSEN}", "right, %", "spread")
    work = ("training TFLOPs", "total TFLOPs", "evaluation, %")
    return Table(
        header=(*header, *work),
        rows=[
            (
                row.label,
                str(len(row.seeds)),
                "-" if row.budget is None else f"{row.budget.mean:.3g}",
                _text(row.score),
                _text(row.to_reference, sign="+"),
                _text(row.to_chosen, sign="+"),
                _text(row.right, scale=100, digits=1),
                _text(row.spread),
                _mean(row.training),
                _mean(row.total),
                _mean(row.evaluation, scale=100, digits=0),
            )
            for row in rows
        ],
    )


def peak_table(runs: Runs) -> Table:
    """Return the epochs of the peaks in the first stage; ``>`` marks one at its end."""
    names = sorted(next(iter(runs.values()))["first_stage"]["values"])
    names = [*(name for name in names if name != OVERALL), OVERALL]
    seeds = sorted(runs)
    rows = [[name, *(_peak(runs[seed]["first_stage"], name) for seed in seeds)] for name in names]
    return Table(header=("sub-dataset", *(f"seed {seed}" for seed in seeds)), rows=rows)


def _peak(curves: Record, name: str) -> str:
    index = find_peak(curves, name)
    if index is None:
        return "-"
    epochs = curves["epochs"]
    return f"{'>' if index + 1 == len(epochs) else ''}{epochs[index]:g}"


def headroom_table(runs: Runs) -> Table:
    """Return headroom and forgetting by sub-dataset, each the mean over the runs that have it."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs.values():
        for kind in ("headroom", "forgetting"):
            for name, value in run[kind].items():
                found.setdefault(name, {}).setdefault(kind, []).append(value)
    rows = []
    for name, kinds in sorted(found.items()):
        lost = kinds.get("forgetting", [])
        cells = (_text(estimate(kinds.get("headroom", []))), _text(estimate(lost)), str(len(lost)))
        rows.append((name, *cells))
    return Table(header=("sub-dataset", "headroom", "forgetting", "excluded in"), rows=rows)


def write_results(records: Sequence[Record], page: Path = PAGE, summary: Path = SUMMARY) -> None:
    """Write the tables and plots of all phases, and their rows as JSON."""
    parts, tree = [NOTE], {}
    for name, phase in PHASES.items():
        rows = build_rows(records, phase)
        if not rows:
            continue
        tree[name] = [asdict(row) for row in rows]
        seeds = ", ".join(str(seed) for seed in phase.seeds)
        parts += [f"### Phase {name}, seeds {seeds}", render(records, phase).strip()]
        for kind, svg in (
            ("peaks", draw_peaks(group(records, phase))),
            ("flops", draw_flops(rows)),
        ):
            plot = page.with_name(f"experiment-{name}-{kind}.svg")
            write_atomic(plot, svg)
            parts.append(f"![{kind.capitalize()} of phase {name}]({plot.name})")
    table = exclusion_table(records)
    if table.rows:
        parts += ["### Exclusions of the first stage under noise", NOISE, table.to_markdown()]
    write_section("\n\n".join(parts), page)
    write_json(summary, tree)


def write_section(text: str, path: Path) -> None:
    """Write ``text`` between the two comments, which the file must have."""
    before, found, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"{path} has no place for the tables: {BEGIN} … {END}")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def _text(found: Estimate | None, *, sign: str = "", scale: float = 1, digits: int = 3) -> str:
    if found is None:
        return "-"
    mean = f"{scale * found.mean:{sign}.{digits}f}"
    return mean if found.error is None else f"{mean} ± {scale * found.error:.{digits}f}"


def _mean(found: Estimate | None, *, scale: float = 1, digits: int = 2) -> str:
    return "-" if found is None else f"{scale * found.mean:.{digits}f}"
