"""Count the model FLOPs and tokens of a run, from its journal.

With N parameters, L layers of width d and a sequence of T tokens, a forward pass costs
2 N + 4 L d T a token. Training, with its backward pass, costs three times that: 6 N + 12 L d T.
The second term, summed over the sequences of a batch, is proportional to the sum of their T², which
the journal records as ``attention_tokens``. A generated token costs a forward pass that attends to
all tokens before it (``generated_attention_tokens``). N counts all parameters, tied ones once. The
backward pass computes no gradient for frozen parameters, so F of them make training cheaper by 2 F
a token. Work that gradient checkpointing repeats is not counted.

The kinds of work, which add up to all of it:

- *kept*: training on the path from the base to the result, or without a result to the last step.
  The path leaves a stage at the evaluation from which the next stage on it began.
- *rolled back*: all other training, including that of plain SFT after its best checkpoint.
- *selection*: forward passes of examples that a method leaves out, and steps that it only tries.
- *padding*: padding in training and evaluation, without the attention term.
- *evaluation*: forward passes of evaluations and final tests over prompts and completions.
- *generation*: tokens generated one at a time in evaluations and final tests.
- *repeated*: work that a resume made void, so that it was done twice. No other kind contains it.

Example::

    account = Account.from_journal(read(run / "journal.jsonl"))
    account.kept.flops / account.trained.flops
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields

from trainer.journal import Record, effective, run_started, select


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The sizes of a model in the FLOPs formula."""

    parameters: int
    """N; tied parameters count once."""
    trainable: int | None = None
    """The trained parameters among them; ``None``: all."""
    layers: int
    """L."""
    hidden: int
    """d, the width of the residual stream."""

    def forward(self, tokens: int, attention_tokens: int) -> int:
        """Return the FLOPs of a forward pass; ``attention_tokens`` is the sum of length²."""
        return 2 * self.parameters * tokens + 4 * self.layers * self.hidden * attention_tokens

    def training(self, tokens: int, attention_tokens: int) -> int:
        """Return the FLOPs of forward and backward pass, without gradients of frozen weights."""
        frozen = 0 if self.trainable is None else self.parameters - self.trainable
        return 3 * self.forward(tokens, attention_tokens) - 2 * frozen * tokens


@dataclass(frozen=True, kw_only=True)
class Work:
    """Tokens and the FLOPs that they cost."""

    tokens: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
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

    @property
    def evaluation_share(self) -> float:
        """The share of evaluations and final tests, generation included, in the FLOPs."""
        evaluated = self.evaluation + self.generation
        return evaluated.flops / self.total.flops if self.total.flops else 0.0

    @property
    def total(self) -> Work:
        """All work except the work that a resume repeated."""
        parts = (self.selection, self.padding, self.evaluation, self.generation)
        return sum(parts, start=self.trained)

    @classmethod
    def from_journal(cls, records: Sequence[Record]) -> Account:
        """Sum up the work of all records of a journal, void ones too."""
        counted = effective(records)
        seqs, on_path = {record["seq"] for record in counted}, seqs_on_path(counted)
        model = run_started(records)["model"]
        size = ModelSize(**{field.name: model.get(field.name) for field in fields(ModelSize)})
        totals = {field.name: Work() for field in fields(cls)}
        for record in records:
            for kind, work in _work_by_kind(record, size).items():
                if record["seq"] not in seqs:
                    totals["repeated"] += work
                elif kind == "training":
                    totals["kept" if record["seq"] in on_path else "rolled_back"] += work
                else:
                    totals[kind] += work
        return cls(**totals)


def find_stop(counted: Sequence[Record]) -> Record | None:
    """Return the decision that ended the run, or ``None`` if it has not ended."""
    return next((record for record in counted if record.get("decision") == "stop"), None)


def find_result_evaluation(counted: Sequence[Record]) -> Record | None:
    """Return the first evaluation of the run's result, or ``None`` if the run has not ended.

    It is the first one without carried values, if there is one.
    """
    stop = find_stop(counted)
    if stop is None:
        return None
    evaluated = select(counted, "evaluated", "averaged")
    found = [record for record in evaluated if record["checkpoint"] == stop["checkpoint"]]
    return next((record for record in found if not record.get("carried")), found[0])


def seqs_on_path(counted: Sequence[Record]) -> set[int]:
    """Return the ``seq`` of the ``trained`` records whose steps led to the result.

    Steps that were rolled back, to a peak or after a divergence, are excluded.
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
    """Return the last kept step of each stage on the path to the result."""
    roots: dict[int, str] = {}
    first: dict[str, Record] = {}
    end = -1
    for record in counted:
        match record["event"]:
            case "stage_started":
                roots[record["stage"]], end = record["root"], record["step"]
            case "evaluated":
                first.setdefault(record["checkpoint"], record)
            case "averaged":
                # The steps to the latest of its checkpoints led to an average.
                sources = [first[name] for name in record["weights"] if name in first]
                first[record["checkpoint"]] = max(sources, key=operator.itemgetter("seq"))
            case "trained":
                end = record["step"]
    ends: dict[int, int] = {}
    stop = find_stop(counted)
    target = None if stop is None else stop["checkpoint"]
    if stop is None and roots:
        ends[max(roots)] = end
        target = roots[max(roots)]
    while target in first and first[target]["stage"] not in ends:
        stage = first[target]["stage"]
        ends[stage] = first[target]["step"]
        target = roots[stage]
    return ends


def _work_by_kind(record: Record, size: ModelSize) -> dict[str, Work]:
    """Return the work that a record states; ``training`` is not yet divided by its outcome."""

    def count(key: str) -> int:
        return int(record.get(key) or 0)

    def forward(prefix: str = "") -> Work:
        tokens, attention_tokens = count(f"{prefix}tokens"), count(f"{prefix}attention_tokens")
        return Work(tokens=tokens, flops=size.forward(tokens, attention_tokens))

    def padding(*, trained: int, forward: int) -> Work:
        flops = size.training(trained, 0) + size.forward(forward, 0)
        return Work(tokens=trained + forward, flops=flops)

    tokens, padded = count("tokens"), count("padded_tokens")
    training = Work(tokens=tokens, flops=size.training(tokens, count("attention_tokens")))
    match record["event"]:
        case "trained":
            return {
                "training": training,
                "selection": forward("forward_"),
                "padding": padding(trained=padded, forward=count("forward_padded_tokens")),
            }
        case "looked_ahead":
            return {
                "selection": training + forward(),
                "padding": padding(trained=padded, forward=padded),
            }
        case "evaluated" | "averaged" | "tested":
            return {
                "evaluation": forward(),
                "generation": forward("generated_"),
                "padding": padding(trained=0, forward=padded),
            }
    return {}
