"""Model FLOPs and tokens of a run, from its journal.

The usual count: with N parameters, L layers of width d and a sequence of T tokens, a forward pass
costs 2 N + 4 L d T a token and training, with its backward pass, three times that: 6 N + 12 L d T.
Over the sequences of a batch the second term is proportional to the sum of their T², which the
journal records as ``attention_tokens``. A token that is generated one at a time costs a forward
pass in which it looks back on all tokens before it (``generated_attention_tokens``). N counts
all parameters, tied ones once. For frozen ones the backward pass computes no gradient: F of them
make training cheaper by 2 F a token. Work that gradient checkpointing repeats is not counted.

Where the work went, in rows that add up to all of it:

- *kept*: training on the path from the base to the result. The path enters a stage at its root and
  leaves it at the evaluation that the next stage on the path began from, in its last stage at the
  evaluation whose checkpoint is the result. While there is no result, it ends at the last step.
- *rolled back*: all other training, so also what plain SFT trains after its best checkpoint.
- *selection*: what a method computes to choose what it trains on: forward passes of examples that
  it leaves out, steps that it only tries.
- *padding*: the padding of all of it, training and evaluation; its weights' term only.
- *evaluation*: forward passes of evaluations and final tests over prompts and completions.
- *generation*: tokens generated one at a time in these.
- *repeated*: whatever was void after a resume, and so was done twice; no row above holds it.

Example::

    account = Account.from_journal(read(run / "journal.jsonl"))
    account.kept.flops / account.trained.flops
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.journal import Record, effective


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The sizes of a model that the FLOPs formula takes."""

    parameters: int
    """N, tied ones counted once."""
    trainable: int | None = None
    """Of them, those that are trained; ``None``: all."""
    layers: int
    """L."""
    hidden: int
    """d, the width of the residual stream."""

    def forward(self, tokens: int, attention_tokens: int) -> int:
        """Return the FLOPs of a forward pass; ``attention_tokens`` sums lengths squared."""
        return 2 * self.parameters * tokens + 4 * self.layers * self.hidden * attention_tokens

    def training(self, tokens: int, attention_tokens: int) -> int:
        """Return the FLOPs of a forward and a backward pass.

        Frozen weights take no gradient, which is a third of what a trained one costs.
        """
        frozen = 0 if self.trainable is None else self.parameters - self.trainable
        return 3 * self.forward(tokens, attention_tokens) - 2 * frozen * tokens


@dataclass(frozen=True, kw_only=True)
class Work:
    """Tokens and the FLOPs that they cost."""

    tokens: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        """Add tokens and FLOPs."""
        return Work(tokens=self.tokens + other.tokens, flops=self.flops + other.flops)


@dataclass(frozen=True, kw_only=True)
class Account:
    """The work of a run by kind."""

    kept: Work
    rolled_back: Work
    selection: Work
    padding: Work
    evaluation: Work
    generation: Work
    repeated: Work

    @property
    def trained(self) -> Work:
        """All training that counts."""
        return self.kept + self.rolled_back

    @classmethod
    def from_journal(cls, records: Sequence[Record]) -> Account:
        """Account for all records of a journal, void ones too."""
        counted = effective(records)
        seqs = {record["seq"] for record in counted}
        size = model_size(records)
        on_path = seqs_on_path(counted)
        kept, rolled_back = Work(), Work()
        for record in counted:
            if record["event"] != "trained":
                continue
            if record["seq"] in on_path:
                kept += _training(record, size)
            else:
                rolled_back += _training(record, size)
        return cls(
            kept=kept,
            rolled_back=rolled_back,
            selection=_sum(_selection(record, size) for record in counted),
            padding=_sum(_padding(record, size) for record in counted),
            evaluation=_sum(_forward(record, size) for record in counted),
            generation=_sum(_generation(record, size) for record in counted),
            repeated=_sum(_all(record, size) for record in records if record["seq"] not in seqs),
        )


def model_size(records: Iterable[Record]) -> ModelSize:
    """Return the size of the model that a journal is about."""
    model = next(record["model"] for record in records if record["event"] == "run_started")
    return ModelSize(
        parameters=model["parameters"],
        trainable=model.get("trainable"),
        layers=model["layers"],
        hidden=model["hidden"],
    )


def seqs_on_path(counted: Sequence[Record]) -> set[int]:
    """Return the ``seq`` of the ``trained`` records whose steps led to the result.

    Those that a roll-back has undone are not among them, be it to a peak or after a divergence.
    """
    ends = path_ends(counted)
    found: dict[int, int] = {}
    for record in counted:
        if record["event"] == "trained" and record["step"] <= ends.get(record["stage"], -1):
            found[record["seq"]] = record["step"]
        elif record.get("decision") == "skip":
            good = next(r for r in counted if r.get("checkpoint") == record["checkpoint"])["step"]
            found = {seq: step for seq, step in found.items() if step <= good}
    return set(found)


def path_ends(counted: Sequence[Record]) -> dict[int, int]:
    """Return for each stage on the path to the result the last step of it that was kept.

    A stage that the path does not touch is absent. ``counted`` are effective records.
    """
    roots: dict[int, str] = {}
    first: dict[str, Record] = {}
    end = -1
    for record in counted:
        match record["event"]:
            case "stage_started":
                roots[record["stage"]], end = record["root"], record["step"]
            case "evaluated":
                first.setdefault(record["checkpoint"], record)
            case "trained":
                end = record["step"]
    ends: dict[int, int] = {}
    target = _result(counted)
    if target is None and roots:
        ends[max(roots)] = end
        target = roots[max(roots)]
    while target in first and first[target]["stage"] not in ends:
        stage = first[target]["stage"]
        ends[stage] = first[target]["step"]
        target = roots[stage]
    return ends


def _result(counted: Sequence[Record]) -> str | None:
    for record in reversed(counted):
        if record["event"] == "finished" or record.get("decision") == "stop":
            checkpoint: str = record["checkpoint"]
            return checkpoint
    return None


def _count(record: Mapping[str, Any], key: str) -> int:
    return int(record.get(key) or 0)


def _training(record: Record, size: ModelSize) -> Work:
    tokens = _count(record, "tokens")
    flops = size.training(tokens, _count(record, "attention_tokens"))
    return Work(tokens=tokens, flops=flops)


def _forward(record: Record, size: ModelSize) -> Work:
    if record["event"] not in ("evaluated", "tested"):
        return Work()
    tokens = _count(record, "tokens")
    return Work(tokens=tokens, flops=size.forward(tokens, _count(record, "attention_tokens")))


def _generation(record: Record, size: ModelSize) -> Work:
    tokens = _count(record, "generated_tokens")
    attention_tokens = _count(record, "generated_attention_tokens")
    return Work(tokens=tokens, flops=size.forward(tokens, attention_tokens))


def _selection(record: Record, size: ModelSize) -> Work:
    if record["event"] == "trained":
        tokens = _count(record, "forward_tokens")
        flops = size.forward(tokens, _count(record, "forward_attention_tokens"))
        return Work(tokens=tokens, flops=flops)
    if record["event"] == "looked_ahead":
        tokens, attention_tokens = _count(record, "tokens"), _count(record, "attention_tokens")
        flops = size.training(tokens, attention_tokens) + size.forward(tokens, attention_tokens)
        return Work(tokens=2 * tokens, flops=flops)
    return Work()


def _padding(record: Record, size: ModelSize) -> Work:
    both, forward = _count(record, "padded_tokens"), _count(record, "forward_padded_tokens")
    if record["event"] == "looked_ahead":
        forward = both
    elif record["event"] != "trained":
        both, forward = 0, both
    flops = size.training(both, 0) + size.forward(forward, 0)
    return Work(tokens=both + forward, flops=flops)


def _all(record: Record, size: ModelSize) -> Work:
    trained = _training(record, size) if record["event"] == "trained" else Work()
    forward = _forward(record, size) + _generation(record, size)
    return trained + forward + _selection(record, size) + _padding(record, size)


def _sum(works: Iterable[Work]) -> Work:
    return sum(works, start=Work())
