"""The experiment's record of a finished run, one line of JSON each.

A run is known by mixture, variant, seed and a hash of its settings. ``experiment.jsonl`` has
everything that the tables need, so the experiment continues on another machine without the
directories of the runs. A line is appended by one write; a line that a crash tore is no record.

Example::

    record = condense(case, directory, config)
    append(RECORDS, record)
    {key_of(record): record for record in load(RECORDS)}
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.codec import RESULTS, machine
from bench.experiment.exact import count_right
from trainer.algorithms.peaks import first_best_index
from trainer.config.load import flatten, to_dict
from trainer.config.schema import (
    OVERALL,
    AverageConfig,
    Config,
    DataConfig,
    ModelConfig,
    MsftConfig,
)
from trainer.journal import Record, effective, read, replace_non_finite, run_started, select
from trainer.report.flops import Account
from trainer.report.summary import Summary, summarize
from trainer.training.directory import JOURNAL, MODEL

RECORDS = RESULTS / "experiment.jsonl"
_PLACES = ("output_dir", "model.path", "data.sub_datasets", "data.directory")
"""Settings that name places on a machine."""
_DIGITS = 6

Key = tuple[str, str, int, str]
"""Mixture, variant, seed and hash of the settings."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of the experiment."""

    mixture: str
    variant: str
    seed: int


def key_of(record: Mapping[str, Any]) -> Key:
    """Return the key of a record."""
    return record["mixture"], record["variant"], record["seed"], record["config"]


_USUAL = Config(
    method="msft",
    output_dir="",
    model=ModelConfig(path=""),
    data=DataConfig(),
    msft=MsftConfig(exclusion="hard", smoothing=3, margin=1.0),
    average=AverageConfig(kind="none"),
)


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that differ from the paper's MSFT, without the places of files.

    A key that a later version adds therefore changes nothing as long as it has its default, nor
    does another default of a key that the paper's settings hold.
    """
    config = replace(config, msft=replace(config.msft, exclusion=config.exclusion))
    usual = flatten(to_dict(_USUAL))
    return {
        key: value
        for key, value in sorted(flatten(to_dict(config)).items())
        if not key.startswith(_PLACES) and (key not in usual or usual[key] != value)
    }


def hash_config(config: Config) -> str:
    """Return a hash of the settings and of the contents of the data files, 12 hex digits."""
    digest = hashlib.sha256(json.dumps(settings_of(config), sort_keys=True).encode())
    for name, files in sorted(config.data.sub_datasets.items()):
        digest.update(name.encode())
        for path in (files.train, files.validation, files.test):
            digest.update(Path(str(path)).read_bytes())
    return digest.hexdigest()[:12]


def condense(case: Case, config: Config, directory: Path) -> dict[str, Any]:
    """Return the record of a finished run, from its journal and its resulting model."""
    records = read(directory / JOURNAL)
    record = condense_journal(case, config, records)
    return record | {"right": count_right(config, directory / MODEL)}


def condense_journal(case: Case, config: Config, records: Sequence[Record]) -> dict[str, Any]:
    """Return the record of a finished run, without its right answers."""
    counted, summary = effective(records), summarize(records)
    result, diagnosis = summary.result, summary.diagnosis
    record = {
        **asdict(case),
        "config": hash_config(config),
        "settings": settings_of(config),
        **machine(),
        "budget": config.msft.compute_budget,
        "eval_every": config.evaluation.eval_every,
        "stages": summary.stages,
        "roll_backs": summary.roll_backs,
        "steps": summary.steps,
        "evaluations": summary.evaluations,
        "diverged": summary.diverged,
        "result": None if result is None else {"stage": result.stage, "epoch": result.epoch},
        "scores": {
            name: asdict(score)
            for name, score in {**summary.scores, OVERALL: summary.overall}.items()
        },
        "examples": {
            name: {key: sub[key] for key in ("train", "validation", "test")}
            for name, sub in sorted(run_started(counted)["sub_datasets"].items())
        },
        "flops": _flops(summary, records),
        "first_stage": _curves(counted),
        "excluded": _exclusions(counted),
        "headroom": {n: one.change for n, one in diagnosis.headroom.items()} if diagnosis else {},
        "forgetting": {n: one.change for n, one in summary.forgetting.items()},
        "disk_peak": None if summary.disk is None else summary.disk.peak,
        "seconds": summary.seconds,
    }
    rounded: dict[str, Any] = _round(replace_non_finite(record))
    return rounded


def _flops(summary: Summary, records: Sequence[Record]) -> dict[str, int]:
    account = summary.account
    tests = Account.from_journal(select(records, "run_started", "tested"))
    parts = {name: work["flops"] for name, work in asdict(account).items()}
    whole = {"training": account.trained, "total": account.total, "tests": tests.total}
    return parts | {name: work.flops for name, work in whole.items()}


def _curves(counted: Sequence[Record]) -> dict[str, Any]:
    """Return the metrics of the first stage's evaluations, with their standard errors."""
    curve = [record for record in select(counted, "evaluated") if record["stage"] == 1]
    names = list(curve[0]["metrics"]) if curve else []
    return {
        "epochs": [record["epoch"] for record in curve],
        "values": {name: [record["metrics"][name] for record in curve] for name in names},
        "errors": {
            name: [record["errors"][name] for record in curve]
            for name in names
            if all(name in (record.get("errors") or {}) for record in curve)
        },
    }


def _exclusions(counted: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the exclusions: stage, epoch of the peak in it, and names."""
    at = {
        (record["stage"], record["checkpoint"]): record["epoch"]
        for record in reversed(select(counted, "evaluated"))
    }
    return [
        {
            "stage": decided["stage"],
            "epoch": at.get((decided["stage"], decided["checkpoint"])),
            "names": decided["exclude"],
        }
        for decided in select(counted, "decided")
        if decided["exclude"]
    ]


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _round(item) for key, item in value.items()}
    return [_round(item) for item in value] if isinstance(value, list) else value


def find_peak(curves: Mapping[str, Any], name: str) -> int | None:
    """Return the index of the first best loss of a sub-dataset in the curves of a first stage."""
    return first_best_index((math.nan if v is None else v for v in curves["values"][name]), "min")


def load(path: Path) -> list[dict[str, Any]]:
    """Return all records of a file in its order; none if there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # torn by a crash: that run has no record
    return found


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record durably, by one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = file.read(1) not in (b"", b"\n")
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        file.write(("\n" * torn + text + "\n").encode())
        os.fsync(file.fileno())
