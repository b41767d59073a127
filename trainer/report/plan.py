"""The upper limits of a run before it begins: steps, evaluations, tokens, FLOPs and disk.

Two courses of an MSFT run are worked out. *At most*: nobody ever peaks, so the whole mixture is
trained on in every one of ``max_stages`` stages. *One peak a stage*: each stage excludes a
sub-dataset at its end, the smallest first, so that the mixture shrinks as slowly as it can. A plain
SFT run has one course. The final tests come on top. What a store holds depends on how much of the
weights changes, which is unknown beforehand; so disk is bounded by full copies, as if no checkpoint
resembled another.

Example::

    print(plan(config, counts, size, full_checkpoint_bytes).to_text())
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.config.checks import to_bytes
from trainer.config.schema import Config
from trainer.data.sampling import shares
from trainer.data.schedule import stage_schedule
from trainer.report.flops import ModelSize
from trainer.text import Table, bytes_text, count_text, flops_text, too_long_text


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The examples and tokens of one sub-dataset, as the model sees them."""

    train: int
    """Training examples."""
    train_tokens: int
    train_attention_tokens: int
    """Sum of the training examples' lengths squared."""
    validation: int
    """Validation examples that are evaluated."""
    validation_tokens: int
    """Prompts where the metric is generated, whole examples where it is the loss."""
    validation_attention_tokens: int
    too_long: int = 0
    """Examples of all splits that are dropped."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One course of a run, in whole numbers."""

    stages: int
    steps: int
    evaluations: int
    trained_tokens: int
    """Real tokens in training."""
    trained_flops: int
    evaluated_tokens: int
    """Real tokens in evaluations on validation data, the longest possible generations included."""
    evaluated_flops: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The upper limits of a run."""

    method: str
    rule: str
    """When a roll-out ends."""
    at_most: Bound
    one_peak_a_stage: Bound | None
    """``None`` for a method that excludes nothing."""
    checkpoints: int
    """Rollback points alive at once, the newest one before eviction included, the base left out."""
    checkpoint_bytes: int
    """One full checkpoint in the dtype of the run."""
    rollback_point_bytes: int
    """One rollback point as a full copy: the weights, or weights and two optimizer moments."""
    resume_bytes: int
    """The resume point: weights and two optimizer moments; 0 without one."""
    too_long: Mapping[str, int]
    """Sub-dataset → examples longer than ``max_length``, which are dropped; none with 0."""
    max_length: int
    max_disk: int | None = None
    """Bytes that the store may take; ``None``: as many as the disk has."""

    @property
    def rollback_bytes(self) -> int:
        """Upper bound of the rollback points, were each a full copy."""
        return self.checkpoints * self.rollback_point_bytes

    def to_text(self) -> str:
        """Return the plan for the terminal."""
        courses = [("at most", self.at_most)]
        if self.one_peak_a_stage is not None:
            courses.append(("one peak a stage", self.one_peak_a_stage))
        rows: list[Sequence[str]] = [
            ("stages", *(count_text(bound.stages) for _, bound in courses)),
            ("optimizer steps", *(count_text(bound.steps) for _, bound in courses)),
            ("evaluations", *(count_text(bound.evaluations) for _, bound in courses)),
            ("training tokens", *(count_text(bound.trained_tokens) for _, bound in courses)),
            ("training FLOPs", *(flops_text(bound.trained_flops) for _, bound in courses)),
            ("evaluation tokens", *(count_text(bound.evaluated_tokens) for _, bound in courses)),
            ("evaluation FLOPs", *(flops_text(bound.evaluated_flops) for _, bound in courses)),
        ]
        table = Table(header=(f"{self.method}, {self.rule}", *(n for n, _ in courses)), rows=rows)
        full = bytes_text(self.checkpoint_bytes)
        lines = [
            table.to_text(),
            "",
            f"rollback points: at most {self.checkpoints} at once, so at most "
            f"{bytes_text(self.rollback_bytes)} if each were a full copy "
            f"({bytes_text(self.rollback_point_bytes)}).",
            "The store keeps differences; how small they are depends on how many weights change, "
            "which is unknown before the run.",
            *([_held_text(self.max_disk)] if self.max_disk is not None else []),
            f"besides: the result, {full}"
            + (f"; one resume point, {bytes_text(self.resume_bytes)}" if self.resume_bytes else "")
            + "; the base stays where it is.",
            *(too_long_text(name, n, self.max_length) for name, n in self.too_long.items()),
        ]
        return "\n".join(lines)


def plan(
    config: Config,
    counts: Mapping[str, Counts],
    size: ModelSize,
    checkpoint_bytes: int,
    *,
    trained_bytes: int | None = None,
) -> Plan:
    """Work out what a run of ``config`` takes at most; ``counts`` are by sub-dataset.

    ``trained_bytes`` are those of the weights in training, where checkpoints are rounded.
    """
    trained = checkpoint_bytes if trained_bytes is None else trained_bytes
    names = sorted(counts, key=lambda name: (counts[name].train_tokens, name))
    stages, one_peak = [names], None
    if config.method == "continual":
        stages = [[name] for name in names]
    elif config.method == "single_rollout":
        stages = [names, names]
    elif config.method == "msft":
        stages = [names] * (config.msft.max_stages or 2 * len(names))
        shrinking = [names[i:] for i in range(min(len(names), len(stages)))]
        one_peak = _bound(config, counts, size, shrinking)
    return Plan(
        method=config.method,
        rule=rule_text(config.method, config.msft.peak_window),
        at_most=_bound(config, counts, size, stages),
        one_peak_a_stage=one_peak,
        checkpoints=_alive(config, len(counts)),
        checkpoint_bytes=checkpoint_bytes,
        rollback_point_bytes=checkpoint_bytes + (2 * trained if config.restores_optimizer else 0),
        resume_bytes=0 if config.resume_every is None else 3 * trained,
        too_long={name: part.too_long for name, part in counts.items() if part.too_long},
        max_length=config.data.max_length,
        max_disk=None if config.max_disk is None else to_bytes(config.max_disk, checkpoint_bytes),
    )


def _held_text(max_disk: int) -> str:
    return f"It takes {bytes_text(max_disk)} at most (max_disk); a run that needs more pauses."


_STAGES = {
    "sft": "one stage",
    "ies": "one stage",
    "dynamix": "one stage",
    "continual": "a stage for each sub-dataset",
    "single_rollout": "a roll-out and a second run",
}


def rule_text(method: str, peak_window: int | None) -> str:
    """Say what stages a method has, or when a roll-out ends."""
    if method in _STAGES:
        return _STAGES[method]
    if peak_window is None:
        return "the paper's rule"
    return f"peak window {peak_window}"


def _bound(
    config: Config,
    counts: Mapping[str, Counts],
    size: ModelSize,
    stages: Sequence[Sequence[str]],
) -> Bound:
    budget = config.msft.compute_budget
    sizes = {name: part.train for name, part in counts.items()}
    sampled = shares(sizes, config.data.sampling, config.data.temperature)
    schedules = [
        stage_schedule(
            examples=sum(max(1, round(sizes[name] * sampled[name])) for name in active),
            batch_size=config.train.batch_size,
            eval_every=config.evaluation.eval_every,
            epochs=budget,
        )
        for active in stages
    ]
    evaluations = 1 + sum(len(schedule.evaluations) for schedule in schedules)
    trained = attended = 0.0
    for active, schedule in zip(stages, schedules, strict=True):
        epochs = schedule.steps / schedule.steps_per_epoch
        trained += epochs * sum(sampled[name] * counts[name].train_tokens for name in active)
        attended += epochs * sum(
            sampled[name] * counts[name].train_attention_tokens for name in active
        )
    tokens, attention_tokens = _evaluation(config, counts)
    return Bound(
        stages=len(stages),
        steps=sum(schedule.steps for schedule in schedules),
        evaluations=evaluations,
        trained_tokens=math.ceil(trained),
        trained_flops=size.training(math.ceil(trained), math.ceil(attended)),
        evaluated_tokens=evaluations * tokens,
        evaluated_flops=evaluations * size.forward(tokens, attention_tokens),
    )


def _evaluation(config: Config, counts: Mapping[str, Counts]) -> tuple[int, int]:
    """Return tokens and attended tokens of one evaluation, generations at their longest."""
    tokens = sum(part.validation_tokens for part in counts.values())
    attention_tokens = sum(part.validation_attention_tokens for part in counts.values())
    if config.evaluation.metric == "loss":
        return tokens, attention_tokens
    new = config.evaluation.max_new_tokens
    examples = sum(part.validation for part in counts.values())
    looked_back = new * tokens + examples * new * (new + 1) // 2
    return tokens + examples * new, attention_tokens + looked_back


def _alive(config: Config, sub_datasets: int) -> int:
    """Return how many rollback points are alive at most.

    The newest and the best overall; for MSFT also the champions and the root. Within a peak window
    W all champions are among the last W evaluations. Where a divergence is rolled back, the newest
    one before the newest, too.
    """
    newest = 2 if config.train.on_divergence == "rollback" else 1
    if config.method != "msft":
        return newest + 1 + (config.method == "single_rollout")  # which goes back to the base
    window = config.msft.peak_window
    champions = sub_datasets if window is None else min(sub_datasets, window)
    return champions + newest + 2
