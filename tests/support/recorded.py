"""Recorded curves, and a strategy played through them.

A curve file holds for each stage the metrics of each sub-dataset at evaluations 0, 1, 2, …
(``null``: not finite), a quarter of an epoch apart, and the decisions worked out by hand. The
checkpoint of evaluation e of stage s is ``s{s}e{e}``; evaluation 0 of a later stage is the
checkpoint that was rolled back to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.algorithms import Msft
from trainer.algorithms.base import Decision, Evaluation, RollBack, Stop
from trainer.algorithms.method import Method
from trainer.config.schema import OVERALL, MsftConfig

CURVES = Path(__file__).parents[1] / "fixtures" / "curves"
EVAL_EVERY = 0.25
STEPS_BETWEEN_EVALUATIONS = 10

Stages = Sequence[Mapping[str, Sequence[float | None]]]


@dataclass(frozen=True, kw_only=True)
class Decided:
    """An evaluation, and the decision of a strategy on it."""

    evaluation: Evaluation
    decision: Decision


def load_curve(name: str) -> dict[str, Any]:
    path = CURVES / f"{name}.json"
    curve: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return curve


def curve_names() -> list[str]:
    return sorted(path.stem for path in CURVES.glob("*.json"))


def make_msft(curve: Mapping[str, Any], *, max_skips: int = 0) -> Msft:
    return Msft(
        sub_datasets=set(curve["stages"][0]) - {OVERALL},
        mode=curve["mode"],
        compute_budget=curve["compute_budget"],
        settings=MsftConfig(
            peak_window=curve.get("peak_window"), max_stages=curve.get("max_stages")
        ),
        max_skips=max_skips,
    )


def play(strategy: Method, stages: Stages) -> list[Decided]:
    """Play recorded curves to a strategy until it stops; the recording must be long enough."""
    played: list[Decided] = []
    stage, root, step = strategy.first_stage(), "s1e0", 0
    while True:
        curves = stages[stage.number - 1]
        count = round(stage.epochs / EVAL_EVERY)
        for index in range(count + 1):
            step += STEPS_BETWEEN_EVALUATIONS if index else 0
            evaluation = Evaluation(
                stage=stage.number,
                index=index,
                epoch=index * EVAL_EVERY,
                step=step,
                checkpoint=f"s{stage.number}e{index}" if index else root,
                metrics={name: _number(values[index]) for name, values in curves.items()},
                last=index == count,
            )
            decision = strategy.on_evaluation(evaluation)
            played.append(Decided(evaluation=evaluation, decision=decision))
            if isinstance(decision, RollBack):
                stage, root = decision.stage, decision.checkpoint
                break
            if isinstance(decision, Stop):
                return played


def _number(value: float | None) -> float:
    return math.nan if value is None else value
