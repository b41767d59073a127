"""Metrics of a model on every sub-dataset: mean token loss, and exact match of greedy generation.

``loss`` is the mean over a sub-dataset's completion tokens. ``exact_match`` is the share of
examples whose greedy generation has the reference's answer: the last match of ``answer_pattern``
where there is one, otherwise the whole text, without the space around it. The loss is recorded with
either.

Most verdicts need no generation. One forward pass over prompt and reference tells which token
greedy decoding would take after each of the reference's tokens, so it tells the generated text up
to and including the first token that is not the reference's. Where that text is complete, or, with
no pattern, cannot become the reference any more, the example is decided; only the others are
generated (batched, with a key-value cache). The verdicts are those that generation gives. A
sub-dataset whose loss is not finite has no exact match (NaN).

Batches are made by sorting, so that a result depends on the weights and the examples alone. With
several processes each evaluates its share of the same batches, and the numbers are those of one.

Example::

    evaluator = Evaluator(config.evaluation, loaded, accelerator)
    result = evaluator(model, {"arith": examples})
    result.metrics["arith"], result.metrics["overall"], result.losses["arith"]
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig

from trainer.algorithms.peaks import overall
from trainer.config.schema import OVERALL, EvalConfig
from trainer.data.examples import Example
from trainer.distributed import split_among_processes
from trainer.errors import ConfigError
from trainer.model.forward import collate, target_losses
from trainer.model.load import LoadedModel
from trainer.model.sharding import is_sharded

_WRONG, _RIGHT, _OPEN = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The work of an evaluation, over all processes (:mod:`trainer.journal` has the words)."""

    tokens: int = 0
    attention_tokens: int = 0
    padded_tokens: int = 0
    generated_tokens: int = 0
    generated_attention_tokens: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Return the sum."""
        return Cost(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Result:
    """An evaluation of all sub-datasets."""

    metrics: dict[str, float]
    """Sub-dataset → metric, and the overall one."""
    losses: dict[str, float]
    """Sub-dataset → mean token loss."""
    errors: dict[str, float]
    """Sub-dataset → standard error of its metric; NaN for a single example."""
    cost: Cost
    seconds: float

    def costs(self) -> dict[str, float]:
        """Return what a journal record says of the cost."""
        return {**vars(self.cost), "seconds": self.seconds}


class Evaluator:
    """Evaluates a model on sub-datasets."""

    def __init__(
        self,
        config: EvalConfig,
        loaded: LoadedModel,
        accelerator: Accelerator,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Prepare; ``check`` is called between batches and may raise to end an evaluation early."""
        self._config = config
        self._tokenizer = loaded.tokenizer
        self._pad = loaded.pad_token_id
        self._accelerator = accelerator
        self._check = check
        self._pattern = re.compile(config.answer_pattern) if config.answer_pattern else None

    def __call__(self, model: Any, sub_datasets: Mapping[str, Sequence[Example]]) -> Result:
        """Evaluate ``model``, which is left in the mode that it was in."""
        began = time.monotonic()
        model = self._accelerator.unwrap_model(model)
        examples = [example for name in sub_datasets for example in sub_datasets[name]]
        with _evaluating(model):
            losses, verdicts, cost = self._forward(model, examples)
            if self._config.metric == "exact_match":
                still_open = [i for i, verdict in enumerate(verdicts) if verdict == _OPEN]
                generated, generation_cost = self._generate(model, examples, still_open)
                for i in still_open:
                    verdicts[i] = generated[i]
                cost += generation_cost
        return self._summarize(sub_datasets, losses, verdicts, cost, time.monotonic() - began)

    def _summarize(
        self,
        sub_datasets: Mapping[str, Sequence[Example]],
        losses: Sequence[float],
        verdicts: Sequence[int],
        cost: Cost,
        seconds: float,
    ) -> Result:
        mean_losses, matches, errors, start = {}, {}, {}, 0
        for name, examples in sub_datasets.items():
            end = start + len(examples)
            targets = sum(len(example.completion) for example in examples)
            mean_losses[name] = sum(losses[start:end]) / targets
            # Tokens chosen by numbers that are none match by chance at best.
            sound = math.isfinite(mean_losses[name])
            matches[name] = sum(verdicts[start:end]) / len(examples) if sound else math.nan
            counts = [len(example.completion) for example in examples]
            errors[name] = (
                ratio_error(losses[start:end], counts)
                if self._config.metric == "loss"
                else ratio_error(verdicts[start:end], [1] * len(examples))
            )
            start = end
        metrics = dict(matches if self._config.metric == "exact_match" else mean_losses)
        sizes = {name: len(examples) for name, examples in sub_datasets.items()}
        metrics[OVERALL] = overall(metrics, sizes, self._config.overall)
        return Result(
            metrics=metrics, losses=mean_losses, errors=errors, cost=cost, seconds=seconds
        )

    def _forward(
        self, model: Any, examples: Sequence[Example]
    ) -> tuple[list[float], list[int], Cost]:
        """Return each example's summed loss, its verdict as far as it is known, and the cost."""
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
        batches = self._batches(order)
        losses, verdicts = [0.0] * len(examples), [0] * len(examples)
        for batch, mine in self._mine(model, batches):
            rows = [examples[i] for i in batch]
            tensors = collate(rows, pad_token_id=self._pad, device=self._accelerator.device)
            token_losses, logits = target_losses(model, tensors)
            sizes = [len(row.completion) for row in rows]
            sums = torch.stack([part.sum() for part in torch.split(token_losses, sizes)]).tolist()
            choices = [part.tolist() for part in torch.split(logits.argmax(dim=-1), sizes)]
            results = zip(batch, rows, sums, choices, strict=True)
            for i, row, row_loss, row_choices in results if mine else ():
                losses[i] = row_loss
                verdicts[i] = self._verdict(row, row_choices)
        cost = Cost()
        for batch in batches:
            lengths = [len(examples[i]) for i in batch]
            cost += _forward_cost(lengths)
        return self._sum(losses), [int(v) for v in self._sum(verdicts)], cost

    def _verdict(self, example: Example, choices: Sequence[int]) -> int:
        """Judge by the token that greedy decoding takes after each prefix of the reference."""
        if self._config.metric != "exact_match":
            return _WRONG
        pairs = zip(choices, example.completion, strict=True)
        same = next((i for i, (choice, token) in enumerate(pairs) if choice != token), len(choices))
        taken = [*choices[: same + 1]]
        ended = taken[-1] == self._tokenizer.eos_token_id
        if len(taken) - ended > self._config.max_new_tokens:
            return _OPEN
        text = self._decode(taken)
        if ended:
            return int(self._is_right(text, example.reference))
        if self._pattern is None and not _can_become(text, example.reference):
            return _WRONG
        return _OPEN

    def _generate(
        self, model: Any, examples: Sequence[Example], indices: Sequence[int]
    ) -> tuple[list[int], Cost]:
        """Generate for the examples at ``indices``; return verdicts for all, and the cost."""
        order = sorted(indices, key=lambda i: -len(examples[i].prompt))
        batches = self._batches(order)
        verdicts = [0] * len(examples)
        lengths = [0] * len(examples)
        for batch, mine in self._mine(model, batches):
            taken = zip(batch, self._greedy(model, examples, batch), strict=True)
            for i, tokens in taken if mine else ():
                verdicts[i] = int(self._is_right(self._decode(tokens), examples[i].reference))
                lengths[i] = len(tokens)
        lengths = [int(length) for length in self._sum(lengths)]
        cost = Cost()
        for batch in batches:
            cost += _forward_cost([len(examples[i].prompt) for i in batch])
            cost += _generation_cost([(len(examples[i].prompt), lengths[i]) for i in batch])
        return [int(v) for v in self._sum(verdicts)], cost

    def _greedy(
        self, model: Any, examples: Sequence[Example], batch: Sequence[int]
    ) -> list[list[int]]:
        """Return the generated tokens of each example, up to EOS and with it."""
        width = max(len(examples[i].prompt) for i in batch)
        ids, mask = [], []
        for i in batch:
            prompt = examples[i].prompt
            padding = width - len(prompt)
            ids.append([self._pad] * padding + [*prompt])
            mask.append([0] * padding + [1] * len(prompt))
        eos = self._tokenizer.eos_token_id
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            max_new_tokens=self._config.max_new_tokens,
            eos_token_id=eos,
            pad_token_id=self._pad,
            use_cache=True,
        )
        device = self._accelerator.device
        output = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
        )
        rows = output[:, width:].tolist()
        return [row[: row.index(eos) + 1] if eos in row else row for row in rows]

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _is_right(self, text: str, reference: str) -> bool:
        return answer(text, self._pattern) == answer(reference, self._pattern)

    def _batches(self, order: Sequence[int]) -> list[Sequence[int]]:
        size = self._config.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _mine(
        self, model: Any, batches: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], bool]]:
        """Yield this process's share, and what it only helps another one with."""
        for turn in split_among_processes(
            batches, self._accelerator, equal_counts=is_sharded(model)
        ):
            if self._check is not None:
                self._check()
            yield turn

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Add up over processes; each value is not 0 on one of them at most, so this is exact."""
        if self._accelerator.num_processes == 1:
            return list(values)
        mine = torch.tensor(values, dtype=torch.float32, device=self._accelerator.device)
        total: list[float] = self._accelerator.reduce(mine, reduction="sum").tolist()
        return total


def ratio_error(parts: Sequence[float], counts: Sequence[int]) -> float:
    """Return the standard error of sum(parts) / sum(counts) over examples, NaN for one of them.

    The usual one of a ratio estimate; where all counts are 1, that of a mean.
    """
    n, total = len(parts), sum(counts)
    if n < 2:
        return math.nan
    ratio = sum(parts) / total
    squares = math.fsum((a - ratio * b) ** 2 for a, b in zip(parts, counts, strict=True))
    return math.sqrt(n / (n - 1) * squares) / total


def answer(text: str, pattern: re.Pattern[str] | None) -> str:
    """Return the first group of the last match of ``pattern``, otherwise the text; stripped."""
    matches = list(pattern.finditer(text)) if pattern else []
    if not matches:
        return text.strip()
    found = matches[-1].group(1 if matches[-1].re.groups else 0)
    return (found or "").strip()


def check_answers(
    sub_datasets: Mapping[str, Sequence[Example]], answer_pattern: str | None
) -> None:
    """Raise :class:`ConfigError` where the pattern matches none of a sub-dataset's references."""
    if answer_pattern is None:
        return
    pattern = re.compile(answer_pattern)
    for name, examples in sub_datasets.items():
        if not any(pattern.search(example.reference) for example in examples):
            raise ConfigError(
                f"evaluation.answer_pattern {answer_pattern!r} matches none of the references of "
                f"sub-dataset {name!r}, so its exact match cannot be computed; the first reference "
                f"is {examples[0].reference[:80]!r}"
            )


def _can_become(text: str, reference: str) -> bool:
    """Say whether more tokens could still make ``text`` the reference.

    Space is left out, because it may be stripped, and so is an incomplete character at the end.
    """
    return "".join(reference.split()).startswith("".join(text.rstrip("\ufffd").split()))


def _forward_cost(lengths: Sequence[int]) -> Cost:
    tokens = sum(lengths)
    return Cost(
        tokens=tokens,
        attention_tokens=sum(length * length for length in lengths),
        padded_tokens=max(lengths) * len(lengths) - tokens,
    )


def _generation_cost(rows: Sequence[tuple[int, int]]) -> Cost:
    """Return the cost of rows (prompt tokens, generated tokens), which all run to the last end."""
    generated = sum(count for _, count in rows)
    looked_back = sum(prompt * count + count * (count + 1) // 2 for prompt, count in rows)
    return Cost(
        generated_tokens=generated,
        generated_attention_tokens=looked_back,
        padded_tokens=max(count for _, count in rows) * len(rows) - generated,
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Set evaluation mode, no gradients, and plain decoding whatever the model's own settings."""
    training, settings = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        # What inference mode makes, FSDP cannot train on with.
        with torch.no_grad() if is_sharded(model) else torch.inference_mode():
            yield
    finally:
        model.generation_config = settings
        model.train(training)
