"""Compute the upper bounds of a run before it begins: steps, evaluations, tokens, FLOPs and disk.

An MSFT run has two bounds. *At most*: no sub-dataset ever peaks, so each of ``max_stages`` stages
trains on the whole mixture. *One peak a stage*: each stage excludes a sub-dataset at its end, the
smallest first, so that the mixture shrinks as slowly as possible. Other methods have the first
bound alone. The final tests are not included. The size of a store depends on how many weights
change, which is unknown before the run. So the bound of the disk assumes full copies.

Example::

    print(plan(config, counts, size, full_checkpoint_bytes).to_text())
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.config.checks import to_bytes
from trainer.config.schema import Config
from trainer.data.schedule import Schedule, evaluation_interval, shares, stage_schedule
from trainer.report.flops import ModelSize
from trainer.text import Table, bytes_text, count_text, flops_text, too_long_text


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The numbers of examples and tokens of one sub-dataset."""

    train: int
    train_tokens: int
    train_attention_tokens: int
    """Sum of the squared lengths of the training examples."""
    validation: int
    validation_tokens: int
    """Tokens in the forward passes of an evaluation: examples, and prompts of generations."""
    validation_attention_tokens: int
    generates: bool = False
    """True if the metric needs generations."""
    too_long: int = 0
    """Examples of all splits that are dropped for their length."""
    cut: int = 0
    """Examples of all splits that are cut to the maximum."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The work of a run under one assumption about its stages."""

    stages: int
    steps: int
    evaluations: int
    trained_tokens: int
    trained_flops: int
    evaluated_tokens: int
    """Real tokens in evaluations, with the longest possible generations."""
    evaluated_flops: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The upper bounds of a run."""

    method: str
    rule: str
    """The stages of the method, or the rule that ends a roll-out."""
    at_most: Bound
    one_peak_a_stage: Bound | None
    checkpoints: int
    """Most rollback points at once, before eviction and without the base."""
    checkpoint_bytes: int
    rollback_point_bytes: int
    """One rollback point as a full copy: the weights, or the weights and two optimizer moments."""
    resume_bytes: int
    """The resume point: weights and two optimizer moments; 0 without one."""
    too_long: Mapping[str, int]
    """Sub-dataset → number of examples dropped for their length, if there are any."""
    cut: Mapping[str, int]
    """Sub-dataset → number of examples cut to ``max_length``, if there are any."""
    max_length: int
    max_disk: int | None = None

    @property
    def rollback_bytes(self) -> int:
        """Most bytes of the rollback points if each were a full copy."""
        return self.checkpoints * self.rollback_point_bytes

    def to_text(self) -> str:
        """Return the plan for the terminal."""
        bounds = {"at most": self.at_most}
        if self.one_peak_a_stage is not None:
            bounds["one peak a stage"] = self.one_peak_a_stage
        rows: list[Sequence[str]] = [
            ("stages", *(count_text(bound.stages) for bound in bounds.values())),
            ("optimizer steps", *(count_text(bound.steps) for bound in bounds.values())),
            ("evaluations", *(count_text(bound.evaluations) for bound in bounds.values())),
            ("training tokens", *(count_text(bound.trained_tokens) for bound in bounds.values())),
            ("training FLOPs", *(flops_text(bound.trained_flops) for bound in bounds.values())),
            ("evaluation tokens", *(count_text(b.evaluated_tokens) for b in bounds.values())),
            ("evaluation FLOPs", *(flops_text(b.evaluated_flops) for b in bounds.values())),
        ]
        table = Table(header=(f"{self.method}, {self.rule}", *bounds), rows=rows)
        limit, point = self.max_disk, self.resume_bytes
        lines = [
            table.to_text(),
            "",
            f"rollback points: at most {self.checkpoints} at once, so at most "
            f"{bytes_text(self.rollback_bytes)} if each were a full copy "
            f"({bytes_text(self.rollback_point_bytes)}).",
            "The store keeps differences; how small they are depends on how many weights change, "
            "which is unknown before the run.",
        ]
        if limit is not None:
            lines.append(
                f"It takes {bytes_text(limit)} at most (max_disk); the run pauses if it needs more."
            )
        lines += [
            f"besides: the result, {bytes_text(self.checkpoint_bytes)}"
            + (f"; one resume point, {bytes_text(point)}" if point else "")
            + "; the base stays where it is.",
            *(too_long_text(name, n, self.max_length) for name, n in self.too_long.items()),
            *(too_long_text(name, n, self.max_length, "cut") for name, n in self.cut.items()),
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
    """Compute the upper bounds of a run.

    ``trained_bytes`` are those of the weights in training, if checkpoints are rounded.
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
        checkpoints=_max_rollback_points(config, len(counts)),
        checkpoint_bytes=checkpoint_bytes,
        rollback_point_bytes=checkpoint_bytes + (2 * trained if config.restores_optimizer else 0),
        resume_bytes=0 if config.resume_every is None else 3 * trained,
        too_long={name: part.too_long for name, part in counts.items() if part.too_long},
        cut={name: part.cut for name, part in counts.items() if part.cut},
        max_length=config.data.max_length,
        max_disk=None if config.max_disk is None else to_bytes(config.max_disk, checkpoint_bytes),
    )


_STAGES = {
    "sft": "one stage",
    "ies": "one stage",
    "dynamix": "one stage",
    "continual": "a stage for each sub-dataset",
    "single_rollout": "a roll-out and a second run",
    "online": "one pass",
}


def rule_text(method: str, peak_window: int | None) -> str:
    """Return the stages of a method, or the rule that ends its roll-outs."""
    rule = "the paper's rule" if peak_window is None else f"peak window {peak_window}"
    return _STAGES.get(method, rule)


def _bound(
    config: Config,
    counts: Mapping[str, Counts],
    size: ModelSize,
    stages: Sequence[Sequence[str]],
) -> Bound:
    """Return the work of a run from the active sub-datasets of each stage."""
    sizes = {name: part.train for name, part in counts.items()}
    sampled = shares(sizes, config.data.sampling, config.data.temperature)
    examples = {name: max(1, round(sizes[name] * sampled[name])) for name in counts}
    interval = evaluation_interval(
        config.evaluation, mixture_steps=-(-sum(examples.values()) // config.train.batch_size)
    )
    schedules = [
        stage_schedule(
            examples=sum(examples[name] for name in active),
            batch_size=config.train.batch_size,
            eval_every=config.evaluation.eval_every,
            epochs=config.msft.compute_budget,
        ).evaluated_every(interval)
        for active in stages
    ]
    tokens = attention = 0.0
    for active, schedule in zip(stages, schedules, strict=True):
        epochs = schedule.steps / schedule.steps_per_epoch
        tokens += epochs * sum(sampled[n] * counts[n].train_tokens for n in active)
        attention += epochs * sum(sampled[n] * counts[n].train_attention_tokens for n in active)
    evaluated = _evaluations(config, [*counts], stages, schedules)
    evaluated_tokens = evaluated_attention = 0
    for names, count in evaluated.items():
        real, squared = _evaluation_tokens(config, [counts[name] for name in names])
        evaluated_tokens += count * real
        evaluated_attention += count * squared
    return Bound(
        stages=len(stages),
        steps=sum(schedule.steps for schedule in schedules),
        evaluations=evaluated.total(),
        trained_tokens=math.ceil(tokens),
        trained_flops=size.training(math.ceil(tokens), math.ceil(attention)),
        evaluated_tokens=evaluated_tokens,
        evaluated_flops=size.forward(evaluated_tokens, evaluated_attention),
    )


def _evaluations(
    config: Config,
    names: Sequence[str],
    stages: Sequence[Sequence[str]],
    schedules: Sequence[Schedule],
) -> Counter[tuple[str, ...]]:
    """Return the most evaluations of a run, by the sub-datasets that they measure.

    A later stage's root is measured again if its evaluation may have carried values.
    """
    evaluated = Counter([tuple(names)])
    for number, (active, schedule) in enumerate(zip(stages, schedules, strict=True)):
        count, every = len(schedule.evaluations), config.evaluation.excluded_every
        full = [index % every == 0 or index == count for index in range(1, count + 1)]
        if number + 1 < len(stages) and len(active) < len(names) and not all(full):
            evaluated[tuple(names)] += 1
        evaluated.update(tuple(names if is_full else active) for is_full in full)
    return evaluated


def _evaluation_tokens(config: Config, counts: Sequence[Counts]) -> tuple[int, int]:
    """Return tokens and attention tokens of one evaluation with the longest generations."""
    tokens = sum(part.validation_tokens for part in counts)
    attention_tokens = sum(part.validation_attention_tokens for part in counts)
    generated = [part for part in counts if part.generates]
    new = config.evaluation.max_new_tokens
    examples = sum(part.validation for part in generated)
    contexts = sum(part.validation_tokens for part in generated)
    attention_tokens += new * contexts + examples * new * (new + 1) // 2
    return tokens + examples * new, attention_tokens


def _max_rollback_points(config: Config, sub_datasets: int) -> int:
    """Return the largest number of rollback points that exist at once.

    These are the newest checkpoint and the best overall, and for MSFT also the champions and the
    root. With a peak window W all champions are among the last W evaluations. If a divergence is
    rolled back, the second newest checkpoint is kept, too. The sources of averages come on top.
    """
    newest = 2 if config.train.on_divergence == "rollback" else 1
    newest += _max_sources(config, sub_datasets)
    if config.method == "online" and config.msft.rollback_margin is not None:
        return newest + 1 + sub_datasets
    if config.method != "msft":
        return newest + 1 + (config.method == "single_rollout")  # which keeps its root
    window, around = config.msft.peak_window, config.msft.rollback_average
    champions = sub_datasets if window is None else min(sub_datasets, window)
    return champions * around + newest + 2 + (around if around > 1 else 0)


def _max_sources(config: Config, sub_datasets: int) -> int:
    """Return the largest number of checkpoints that are kept for averages alone."""
    count = config.average.count
    others = {"best": count, "greedy": count, "champions": sub_datasets, "none": -count}
    return count + others.get(config.average.kind, 0)
