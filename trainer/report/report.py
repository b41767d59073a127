"""Write the report of a run, and compare runs in a table, from their journals alone.

``write_report`` writes ``report.md``, ``plots/*.png`` and ``result.json`` beside the journal.

Example::

    msft, sft = write_report(run / "msft"), write_report(run / "sft")
    print(compare_table({"SFT": sft, "MSFT": msft}))
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.algorithms.base import measured
from trainer.algorithms.divergence import non_finite_metrics
from trainer.config.schema import OVERALL
from trainer.files import write_atomic, write_json
from trainer.journal import Record, effective, read, run_started, select
from trainer.report.headroom_table import (
    UNKNOWN,
    forgetting_table,
    headroom_notes,
    headroom_table,
)
from trainer.report.plots import draw_curves, draw_disk, draw_loss, to_png
from trainer.report.summary import Disk, Summary, summarize
from trainer.text import (
    Table,
    bytes_text,
    count_text,
    flops_text,
    metric_name_text,
    metric_text,
    metric_title,
)

_MOST_EVALUATION = 0.25
"""Share of the FLOPs above which evaluation gives a warning."""
_OPTIONAL_WORK = ("selection of examples", "repeated after a resume")
"""Kinds of work that are left out of a table if there was none."""
_DRAWINGS = (
    ("curves", "Validation curves", draw_curves),
    ("loss", "Training loss", draw_loss),
    ("disk", "Disk of the rollback points", draw_disk),
)

DIVERGED = (
    "Training diverged, which ended the run: the result is its best checkpoint before that. Begin "
    "again with a smaller train.lr or train.max_grad_norm, or with train.on_divergence=rollback if "
    "that was not set."
)

NEVER_RIGHT = (
    "No answer was right in any evaluation, so exact match says nothing about this run, and its "
    "peaks mean nothing: the result is the checkpoint with the lowest loss. See what was generated "
    "with `msft-train predictions RUN`, then change evaluation.answer_pattern, answer or "
    "max_new_tokens, or use evaluation.metric=loss."
)

NEVER_MEASURED = (
    "No metric gave a finite number in any evaluation, so nothing could be compared: there are no "
    "peaks, and the result was not chosen by its quality. Look at what the metric gets with "
    "`msft-train predictions RUN`, correct it and run again."
)


def write_report(run: str | os.PathLike[str]) -> Summary:
    """Write the report of a run, which need not be finished, and return its summary."""
    run = Path(run)
    records = read(run / "journal.jsonl")
    summary = summarize(records)
    counted = effective(records)
    plots = run / "plots"
    plots.mkdir(exist_ok=True)
    for name, _, draw in _DRAWINGS:
        write_atomic(plots / f"{name}.png", to_png(draw(counted)))
    write_atomic(run / "report.md", report_markdown(summary, counted).encode())
    write_json(run / "result.json", summary.to_dict())
    return summary


def report_markdown(summary: Summary, counted: Sequence[Record]) -> str:
    """Return ``report.md``, which links the plots by their relative paths."""
    label = summary.method.upper()
    parts = [
        f"# {label} run",
        *([NEVER_RIGHT] if summary.never_right else []),
        *([NEVER_MEASURED] if summary.never_measured else []),
        _facts(summary),
        "## Result",
        _result_text(summary),
        _score_table({label: summary}).to_markdown(),
        *filter(None, [summary.untested_text()]),
        "## Data",
        _data_table(counted).to_markdown(),
        "## Decisions",
        _decision_table(counted).to_markdown(),
        *_epoch_0_parts(summary),
        *_divergence_parts(counted),
        "## Headroom and forgetting",
        *_headroom_parts(summary, markdown=True),
        *([UNKNOWN] if summary.diagnosis is None else []),
        "## Disk",
        "Not known before the first commit."
        if summary.disk is None
        else _markdown_lines(f"{disk_text(summary)}\n{_released_text(summary.disk)}"),
        "## Work",
        _work_table({label: summary}).to_markdown(),
        evaluation_text({label: summary}),
        "## Plots",
        *(f"![{title}](plots/{name}.png)" for name, title, _ in _DRAWINGS),
    ]
    return "\n\n".join(parts) + "\n"


def compare_table(summaries: Mapping[str, Summary], *, markdown: bool = False) -> str:
    """Return metrics, disk, work and headroom of runs of one mixture as text, or as Markdown.

    ``summaries`` maps labels to runs. The base's metrics come from the first run. Headroom and
    forgetting are those of MSFT, whose first stage is SFT, or else of the first run that has them.
    """
    first = next(iter(summaries.values()))
    tables = [_score_table(summaries), _work_table(summaries)]
    scores, work = [table.to_markdown() if markdown else table.to_text() for table in tables]
    disks = [
        f"{label} {disk_text(summary)}"
        for label, summary in summaries.items()
        if summary.disk is not None and summary.method != "sft"
    ]
    rules = ", ".join(f"{label}: {summary.rule}" for label, summary in summaries.items())
    metric = metric_name_text(first.metric, first.mode)
    head = f"{metric}, peaks found on validation data; {rules}"
    if text := first.overall_text():
        head += f"\n{text}"
    if markdown:
        disks = [_markdown_lines(text) for text in disks]
    if text := first.untested_text():
        scores += f"\n\n{text}"
    diagnosed = [summary for summary in summaries.values() if summary.diagnosis is not None]
    headroom = next(
        (s for s in diagnosed if s.method == "msft"), diagnosed[0] if diagnosed else None
    )
    notes = [] if headroom is None else _headroom_parts(headroom, markdown=markdown)
    return "\n\n".join([head, scores, *disks, work, evaluation_text(summaries), *notes])


def _headroom_parts(summary: Summary, *, markdown: bool) -> list[str]:
    """Return what is known of a run's headroom and forgetting as a table and sentences."""
    found = summary.diagnosis
    if found is None and not summary.forgetting:
        return []
    table = headroom_table(found) if found else forgetting_table(summary.forgetting)
    text = table.to_markdown() if markdown else table.to_text()
    return [text, "\n".join(headroom_notes(found))] if found else [text]


def evaluation_text(summaries: Mapping[str, Summary]) -> str:
    """Return a sentence on the share of evaluation in the FLOPs, with advice above a quarter."""
    shares = {label: one.account.evaluation_share for label, one in summaries.items()}
    parts = [f"{share:.0%} of the FLOPs of {label}" for label, share in shares.items()]
    text = f"Evaluations and final tests took {', '.join(parts)}."
    if max(shares.values()) <= _MOST_EVALUATION:
        return text
    return (
        f"{text} To lower it, raise evaluation.eval_every or evaluation.excluded_every, set "
        "evaluation.cadence=mixture, or lower evaluation.max_examples."
    )


def disk_text(summary: Summary) -> str:
    """Return three lines on the disk overhead of a run; raises ``ValueError`` without commits."""
    disk = summary.disk
    if disk is None:
        raise ValueError("nothing was committed, so the disk overhead is unknown")
    limit = f"; max_disk {disk.max_disk}" if disk.max_disk else ""
    point = bytes_text(disk.resume_bytes) if disk.resume_bytes else "none (resume_every is not set)"
    what = "rollback points with optimizer" if disk.with_optimizer else "rollback points"
    return (
        f"{what} on disk: peak {disk.peak:.2f}, mean {disk.mean:.2f} of one full "
        f"checkpoint ({bytes_text(disk.peak_bytes)}, {bytes_text(disk.mean_bytes)} of "
        f"{bytes_text(disk.checkpoint_bytes)}; lr {summary.lr:g}, {summary.dtype}{limit})\n"
        f"the paper's disk-managed policy on the same run: peak {disk.paper_peak_copies:.2f}, "
        f"mean {disk.paper_mean_copies:.2f} (a full copy per distinct champion and best overall)\n"
        f"besides: base {bytes_text(disk.base_bytes)}, resume point {point}"
    )


def _released_text(disk: Disk) -> str:
    return (
        f"the policy of the paper's released code on the same run: peak "
        f"{disk.released_peak_copies:.2f}, mean {disk.released_mean_copies:.2f} (these copies, and "
        "one of the root of each stage but the first, which are never deleted)"
    )


def _markdown_lines(text: str) -> str:
    return "\n".join(f"- {line}" for line in text.splitlines())


def _facts(summary: Summary) -> str:
    return (
        f"{summary.rule.capitalize()}; {metric_title(summary.metric)} ({summary.mode}), peaks "
        "found on validation data, test data used once, at the end; "
        f"lr {summary.lr:g}, {summary.dtype}, seed {summary.seed}. "
        f"{summary.stages} stage{'s' * (summary.stages != 1)}, "
        f"{summary.roll_backs} roll-backs, {count_text(summary.steps)} steps, "
        f"{summary.evaluations} evaluations, {summary.seconds:.0f} s. {summary.overall_text()}"
    ).rstrip()


def _result_text(summary: Summary) -> str:
    result = summary.result
    if result is None:
        return "The run is not over."
    text = f"Checkpoint `{result.checkpoint}`, from stage {result.stage}, epoch {result.epoch:.2f}."
    return f"{text} {DIVERGED}" if summary.diverged else text


def _score_table(summaries: Mapping[str, Summary]) -> Table:
    first = next(iter(summaries.values()))
    peaked = {label: s for label, s in summaries.items() if s.method != "sft"} or summaries
    header = ["sub-dataset", *(f"{label} peak" for label in peaked), "base val", "base test"]
    header += [f"{label} {part}" for label in summaries for part in ("val", "test")]
    rows = []
    for name in [*first.scores, OVERALL]:
        scores = [summary.scores_of(name) for summary in summaries.values()]
        peaks = ["" if name == OVERALL else _peak_text(s, name) for s in peaked.values()]
        values = [scores[0].base_validation, scores[0].base_test]
        values += [value for one in scores for value in (one.validation, one.test)]
        rows.append([name, *peaks, *map(metric_text, values)])
    return Table(header=header, rows=rows)


def _peak_text(summary: Summary, name: str) -> str:
    peak = summary.peaks.get(name)
    if peak is None or (summary.method != "sft" and not peak.excluded):
        return "none"
    return f"stage {peak.stage}, epoch {peak.epoch:.2f}"


def _data_table(counted: Sequence[Record]) -> Table:
    """Return the numbers of examples by sub-dataset, also of those dropped or cut."""
    sub_datasets = run_started(counted)["sub_datasets"]
    titles = {"train": "train", "validation": "validation", "test": "test", "too_long": "too long"}
    for part, title in (("cut", "cut"), ("set_aside", "set aside for validation")):
        if any(sizes.get(part) for sizes in sub_datasets.values()):
            titles[part] = title
    rows = [
        [name, *(count_text(sizes.get(part, 0)) for part in titles)]
        for name, sizes in sorted(sub_datasets.items())
    ]
    return Table(header=("sub-dataset", *titles.values()), rows=rows)


def _decision_table(counted: Sequence[Record]) -> Table:
    """Return all decisions except to continue with the same sub-datasets."""
    epochs = {(r["stage"], r["index"]): r["epoch"] for r in select(counted, "evaluated")}
    rows = [
        [
            _decision_text(r),
            str(r["stage"]),
            f"{epochs[r['stage'], r['index']]:.2f}",
            count_text(r["step"]),
            ", ".join([*r["exclude"], *(f"includes {name}" for name in r.get("include") or ())])
            or "-",
            r["reason"],
        ]
        for r in select(counted, "decided")
        if r["decision"] != "continue" or "active" in r
    ]
    return Table(
        header=("decision", "stage", "epoch", "step", "excludes", "reason"),
        rows=rows,
        numeric=False,
    )


def _epoch_0_parts(summary: Summary) -> list[str]:
    """Return a sentence on the sub-datasets that their last stage did not improve, if any."""
    found = [f"{name} (stage {p.stage})" for name, p in summary.peaks.items() if p.epoch == 0]
    if not found:
        return []
    return [
        "Peaked at epoch 0 of the last stage that trained on them, so that its training made them "
        f"no better than they were when it began: {', '.join(found)}."
    ]


def _divergence_parts(counted: Sequence[Record]) -> list[str]:
    """Return a section on numbers that are not finite, if there are any."""
    lines = [
        f"- Stage {r['stage']}, epoch {r['epoch']:.2f}, step {count_text(r['step'])}: the "
        f"{r['what']} was {r['value']}."
        for r in select(counted, "diverged")
    ]
    evaluated = [r for r in select(counted, "evaluated") if not r["reused"]]
    curves = [measured(r["metrics"], r.get("carried") or ()) for r in evaluated]
    non_finite = Counter(name for metrics in curves for name in non_finite_metrics(metrics))
    lines += [
        f"- The metric of {name} was not finite in {count} of {len(evaluated)} evaluations, none "
        "of which counted as a best or a peak."
        for name, count in sorted(non_finite.items())
    ]
    return ["## Not finite", "\n".join(lines)] if lines else []


def _decision_text(record: Record) -> str:
    """Return the name of a decision; without a peak nothing is rolled back."""
    if record["decision"] == "roll_back" and not record["exclude"]:
        return "next stage"
    if record["decision"] == "continue":
        return "other active set"
    return str(record["decision"]).replace("_", " ")


def _work_table(summaries: Mapping[str, Summary]) -> Table:
    rows = []
    for label, summary in summaries.items():
        account = summary.account
        rolls_back = summary.method in ("msft", "online", "single_rollout")
        works = {
            "training, kept": account.kept,
            f"training, {'rolled back' if rolls_back else 'after its result'}": account.rolled_back,
            "selection of examples": account.selection,
            "padding": account.padding,
            "evaluation": account.evaluation,
            "generation": account.generation,
            "repeated after a resume": account.repeated,
        }
        rows += [
            [f"{label} {name}", count_text(work.tokens), flops_text(work.flops)]
            for name, work in works.items()
            if work.tokens or name not in _OPTIONAL_WORK
        ]
    return Table(header=("work", "tokens", "model FLOPs"), rows=rows)
