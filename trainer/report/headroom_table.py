"""Show headroom and forgetting of a run as a table and sentences.

Example::

    print(headroom_table(diagnosis).to_text(), *headroom_notes(diagnosis), sep="\n\n")
"""

from __future__ import annotations

from collections.abc import Mapping

from trainer.report.headroom import Diagnosis, Forgetting
from trainer.text import Table, metric_text

UNKNOWN = (
    "Headroom is not known: it takes a roll-out of plain SFT that has ended, which the first stage "
    "of sft, single_rollout or msft is."
)


def headroom_table(diagnosis: Diagnosis) -> Table:
    """Return headroom and forgetting by sub-dataset, and their means."""
    headroom, forgetting = diagnosis.headroom, diagnosis.forgetting
    has_errors = any(one.error is not None for one in headroom.values())
    relative = ["relative"] if diagnosis.is_relative else []
    header = ["sub-dataset", "SFT's best", "own best", "epoch", "headroom", *relative]
    header += ["std error"] if has_errors else []
    header += ["excluded", "forgetting", *relative] if forgetting else []
    rows = []
    for name in sorted({*headroom, *forgetting}):
        row = [name, *_headroom_cells(diagnosis, name)]
        if has_errors:
            row.append(metric_text(headroom[name].error if name in headroom else None))
        rows.append(row + (_forgetting_cells(diagnosis, name) if forgetting else []))
    blank = [""] if diagnosis.is_relative else []
    means = ["mean", "", "", "", *blank, diagnosis.value_text(diagnosis.mean_headroom)]
    means += [""] if has_errors else []
    if forgetting:
        means += ["", *blank, diagnosis.value_text(diagnosis.mean_forgetting)]
    return Table(header=header, rows=[*rows, means])


def forgetting_table(forgetting: Mapping[str, Forgetting]) -> Table:
    """Return the forgetting of a run whose headroom is unknown."""
    header = ["sub-dataset", "excluded", "at exclusion", "at result", "forgetting", "relative"]
    rows = [
        [
            name,
            f"stage {one.stage}",
            *map(metric_text, (one.at_exclusion, one.at_result, one.change)),
            f"{one.relative:.1%}",
        ]
        for name, one in sorted(forgetting.items())
    ]
    return Table(header=header, rows=rows)


def headroom_notes(diagnosis: Diagnosis) -> list[str]:
    """Return the verdict and the sentences that limit it."""
    notes = [
        diagnosis.verdict(),
        f"SFT's best overall checkpoint is at epoch {diagnosis.epoch:.2f} of "
        f"{diagnosis.last_epoch:.2f}; the sub-datasets' own bests are up to "
        f"{diagnosis.spread:.2f} epochs apart.",
    ]
    if diagnosis.noise:
        notes.append(f"Within one standard error, and so noise: {', '.join(diagnosis.noise)}.")
    if diagnosis.unpassed:
        notes.append(
            "Best at the last evaluation of SFT's roll-out, so that their headroom may be larger: "
            f"{', '.join(diagnosis.unpassed)}."
        )
    return notes


def _headroom_cells(diagnosis: Diagnosis, name: str) -> list[str]:
    one = diagnosis.headroom.get(name)
    if one is None:
        return ["-"] * (4 + diagnosis.is_relative)
    epoch = f"{'' if one.has_passed else '>'}{one.epoch:.2f}"
    cells = [metric_text(one.at_best_overall), metric_text(one.own_best), epoch]
    cells.append(metric_text(one.change))
    return [*cells, f"{one.relative:.1%}"] if diagnosis.is_relative else cells


def _forgetting_cells(diagnosis: Diagnosis, name: str) -> list[str]:
    one = diagnosis.forgetting.get(name)
    if one is None:
        return ["-"] * (2 + diagnosis.is_relative)
    cells = [f"stage {one.stage}", metric_text(one.change)]
    return [*cells, f"{one.relative:.1%}"] if diagnosis.is_relative else cells
