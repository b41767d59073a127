"""The journal that a run would write, from a recorded curve and round numbers.

Ten steps between evaluations; each step trains 100 real tokens (attended: 1,000) and 5 of padding;
each computed evaluation reads 50 tokens (attended: 500) and generates 20. A checkpoint costs 1,000
bytes in full; after each commit the store holds 100 bytes for each kept one, 120 more before
eviction.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.recorded import Decided, make_msft, play
from trainer.algorithms import Sft
from trainer.algorithms.base import Continue, RollBack, Stage, Stop
from trainer.config.schema import OVERALL
from trainer.journal import Journal

FULL = 1000


def write_run(path: Path, curve: Mapping[str, Any], *, method: str = "msft") -> None:
    """Write the journal of a whole run to ``path``."""
    names = sorted(set(curve["stages"][0]) - {OVERALL})
    strategy = make_msft(curve) if method == "msft" else None
    plain = Sft(sub_datasets=names, mode=curve["mode"], compute_budget=curve["compute_budget"])
    player = strategy or plain
    played = play(player, curve["stages"])
    with Journal(path) as journal:
        _start(journal, curve, names, method)
        stage, root = player.first_stage(), "s1e0"
        _stage_started(journal, stage, root, step=0)
        committed: set[str] = set()
        for one in played:
            _evaluation(journal, one, committed)
            if isinstance(one.decision, RollBack):
                stage, root = one.decision.stage, one.decision.checkpoint
                _stage_started(journal, stage, root, step=one.evaluation.step)
        _end(journal, played, names)


def _start(journal: Journal, curve: Mapping[str, Any], names: list[str], method: str) -> None:
    journal.append(
        "run_started",
        version="0.1.0",
        method=method,
        config={
            "method": method,
            "output_dir": "run",
            "seed": 7,
            "model": {"path": "m"},
            "data": {
                "sub_datasets": {n: {"train": f"{n}.t", "validation": f"{n}.v"} for n in names}
            },
            "train": {"lr": 1e-5},
            "evaluation": {"metric": "exact_match" if curve["mode"] == "max" else "loss"},
            "msft": {
                "compute_budget": curve["compute_budget"],
                "peak_window": curve.get("peak_window"),
                "max_stages": curve.get("max_stages"),
            },
        },
        model={"path": "m", "parameters": 100, "layers": 2, "hidden": 5, "dtype": "bfloat16"},
        mode=curve["mode"],
        metric="exact_match" if curve["mode"] == "max" else "loss",
        sub_datasets={n: {"train": 9, "validation": 4, "test": 4, "too_long": 2} for n in names},
        full_checkpoint_bytes=FULL,
        base_bytes=FULL,
        base_id="base",
    )


def _stage_started(journal: Journal, stage: Stage, root: str, step: int) -> None:
    journal.append(
        "stage_started",
        step=step,
        stage=stage.number,
        root=root,
        active=list(stage.active),
        epochs=stage.epochs,
        steps=40,
        examples=9 * len(stage.active),
    )


def _evaluation(journal: Journal, one: Decided, committed: set[str]) -> None:
    evaluation, decision = one.evaluation, one.decision
    at = {"step": evaluation.step, "stage": evaluation.stage, "epoch": evaluation.epoch}
    if evaluation.index:
        for ago in (5, 0):
            journal.append(
                "trained",
                **(at | {"step": evaluation.step - ago}),
                loss=2 / (1 + evaluation.epoch + evaluation.stage / 2) + 0.002 * ago,
                lr=1e-5,
                grad_norm=1.0,
                tokens=500,
                attention_tokens=5000,
                target_tokens=100,
                padded_tokens=25,
                seconds=0.5,
            )
    computed = evaluation.checkpoint not in committed
    if computed:
        committed.add(evaluation.checkpoint)
        kept = min(3, len(committed))
        journal.append(
            "committed",
            **at,
            checkpoint=evaluation.checkpoint,
            logical_bytes=FULL,
            stored_bytes=100,
            disk_peak_bytes=100 * kept + 120,
            disk_bytes=100 * kept,
            kept={evaluation.checkpoint: ["newest"]},
            dropped=[],
            seconds=0.25,
        )
    journal.append(
        "evaluated",
        **at,
        index=evaluation.index,
        split="validation",
        checkpoint=evaluation.checkpoint,
        metrics=dict(evaluation.metrics),
        losses=None,
        last=evaluation.last,
        reused=not computed,
        tokens=50 if computed else 0,
        attention_tokens=500 if computed else 0,
        padded_tokens=0,
        generated_tokens=20 if computed else 0,
        generated_attention_tokens=400 if computed else 0,
        seconds=1.0 if computed else 0.0,
    )
    kind = {Continue: "continue", RollBack: "roll_back", Stop: "stop"}[type(decision)]
    journal.append(
        "decided",
        step=evaluation.step,
        stage=evaluation.stage,
        index=evaluation.index,
        decision=kind,
        checkpoint=evaluation.checkpoint if isinstance(decision, Continue) else decision.checkpoint,
        exclude=[] if isinstance(decision, Continue) else list(decision.exclude),
        reason=decision.reason,
    )


def _end(journal: Journal, played: list[Decided], names: list[str]) -> None:
    stop = played[-1].decision
    assert isinstance(stop, Stop)
    journal.append("resume_point", step=played[-1].evaluation.step, stage=1, bytes=3 * FULL)
    for what, checkpoint, value in (("base", "s1e0", 0.125), ("result", stop.checkpoint, 0.5)):
        journal.append(
            "tested",
            checkpoint=checkpoint,
            what=what,
            split="test",
            metrics=dict.fromkeys([*names, OVERALL], value),
            tokens=50,
            attention_tokens=500,
            generated_tokens=20,
            generated_attention_tokens=400,
            padded_tokens=0,
            seconds=1.0,
        )
    journal.append("finished", checkpoint=stop.checkpoint, model_dir="model", seconds=99.0)
