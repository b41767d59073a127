"""Write the generations of each evaluation beside their references, and read them.

The file of an evaluation is ``predictions/STAGE-EPOCH.jsonl.zst``. It has at most
``evaluation.predictions`` examples of each sub-dataset whose metric needs generations: those that
are not right first, then others, in the order of the data. Long texts are cut. A resume that
repeats an evaluation replaces its file.

Each line is a JSON object with sub_dataset, prompt, generation, complete (false: the text ends at
the first token that rules the reference out), answer and expected (the answers in generation and
reference), reference, right (null if the metric is a function), and score (of a function that
gives one for each example, else null).

Example::

    write_predictions(work, result, stage=2, epoch=0.5)
    places = find_predictions(run)                       # {(2, "0.5"): path}
    rows = read_predictions(places[2, "0.5"])
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from trainer.data.examples import Example
from trainer.errors import RunError
from trainer.files import make_directory, write_atomic
from trainer.journal import replace_non_finite
from trainer.model.answers import AnswerRule
from trainer.model.evaluate import EvaluationResult, Generation
from trainer.training.directory import PREDICTIONS
from trainer.training.workspace import Workspace

_SUFFIX = ".jsonl.zst"
_LONGEST = 4000
"""Characters of a text that is kept."""

Row = Mapping[str, Any]


def write_predictions(
    work: Workspace, result: EvaluationResult, *, stage: int, epoch: float
) -> None:
    """Write the generations of an evaluation on validation data, in the main process."""
    limit = work.config.evaluation.predictions
    if not (limit and result.generations and work.accelerator.is_main_process):
        return
    rule, lines = AnswerRule.of(work.config.evaluation), []
    validation = work.split("validation")
    for name, generations in result.generations.items():
        pairs = [*zip(validation[name], generations, strict=True)]
        wrong = [pair for pair in pairs if not pair[1].is_right]
        right = [pair for pair in pairs if pair[1].is_right]
        for example, made in (wrong + right)[:limit]:
            row = _make_row(work, rule, example, made)
            lines.append(json.dumps({"sub_dataset": name, **row}, ensure_ascii=False))
    folder = work.directory / PREDICTIONS
    make_directory(folder)
    content = zstandard.compress("".join(f"{line}\n" for line in lines).encode())
    write_atomic(folder / f"{stage}-{epoch_text(epoch)}{_SUFFIX}", content)


def epoch_text(epoch: float) -> str:
    """Return an epoch as the names of files have it."""
    return f"{epoch:.6g}"


def find_predictions(directory: Path) -> dict[tuple[int, str], Path]:
    """Return stages and epochs with the files of their generations, in the order of the run."""
    found = {}
    for path in (directory / PREDICTIONS).glob(f"*-*{_SUFFIX}"):
        stage, _, epoch = path.name.removesuffix(_SUFFIX).partition("-")
        found[int(stage), epoch] = path
    return dict(sorted(found.items(), key=lambda item: (item[0][0], float(item[0][1]))))


def read_predictions(path: Path) -> list[Row]:
    """Return the rows of a file; raises :class:`RunError` if it is damaged."""
    try:
        content = zstandard.ZstdDecompressor().decompress(path.read_bytes())
        return [json.loads(line) for line in content.splitlines()]
    except (zstandard.ZstdError, ValueError):
        raise RunError(f"{path} is damaged; it can be deleted, no command needs it") from None


def worst_first(rows: Sequence[Row], modes: Mapping[str, str]) -> list[Row]:
    """Return the rows that are not right, of each sub-dataset those with the worst scores first.

    ``modes`` are the directions of the sub-datasets' metrics.
    """

    def badness(row: Row) -> tuple[str, float]:
        score = row["score"]
        if score is None:
            return row["sub_dataset"], -math.inf
        return row["sub_dataset"], score if modes[row["sub_dataset"]] == "max" else -score

    return sorted((row for row in rows if not row["right"]), key=badness)


def _make_row(
    work: Workspace, rule: AnswerRule, example: Example, made: Generation
) -> dict[str, Any]:
    """Return the fields of one example but its sub-dataset."""
    graded = made.is_right is not None
    prompt = work.loaded.tokenizer.decode(list(example.prompt), clean_up_tokenization_spaces=False)
    row = {
        "prompt": _cut(str(prompt)),
        "generation": _cut(made.text),
        "complete": made.is_complete,
        "answer": _cut(rule.find(made.text)) if graded else None,
        "reference": _cut(example.reference),
        "expected": _cut(rule.find(example.reference)) if graded else None,
        "right": made.is_right,
        "score": made.score,
    }
    safe: dict[str, Any] = replace_non_finite(row)
    return safe


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
