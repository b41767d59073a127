"""Compute metrics on every sub-dataset: mean token loss, and exact match of greedy generation.

The answer of a text is the last match of ``answer_pattern``, or the whole text if nothing matches.
The loss is recorded for both metrics. If it is not finite, the exact match is NaN.

Most examples are decided without generation. A forward pass over prompt and reference gives the
token that greedy decoding would take after each prefix of the reference, and so the generated text
up to its first token that differs from the reference. The example is decided if this text is
complete, or if there is no pattern and the text can no longer become the reference. Only the other
examples are generated, in batches with a key-value cache. The verdicts are the same as those of
generation alone.

Batches are made by sorting, so the result depends on weights and examples alone. With several
processes each evaluates its share of the same batches, and the numbers are those of one process.

Example::

    evaluator = Evaluator(config.evaluation, loaded, accelerator)
    result = evaluator(model, {"arith": examples})
    result.metrics["arith"], result.metrics["overall"], result.losses["arith"]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig

from trainer.algorithms.overall import mean_metric
from trainer.config.schema import OVERALL, EvalConfig
from trainer.data.examples import Example
from trainer.distributed import split_among_processes
from trainer.model.answers import AnswerRule
from trainer.model.forward import TokenCost, collate, target_losses
from trainer.model.load import LoadedModel
from trainer.model.sharding import is_sharded

_WRONG, _RIGHT, _OPEN = 0, 1, 2
"""Verdicts on an example: wrong, right, or undecided until its text is generated."""


@dataclass(frozen=True, kw_only=True)
class EvaluationCost(TokenCost):
    """Tokens of an evaluation over all processes; :mod:`trainer.journal` defines the fields."""

    generated_tokens: int = 0
    generated_attention_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The metrics of all sub-datasets, and the cost of computing them."""

    metrics: dict[str, float]
    """Sub-dataset → metric, and the overall one."""
    losses: dict[str, float]
    errors: dict[str, float]
    """Sub-dataset → standard error of its metric; NaN for a single example."""
    cost: EvaluationCost
    seconds: float

    def cost_fields(self) -> dict[str, float]:
        """Return the fields of a journal record that state the cost."""
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
        """Create it; ``check`` is called before each batch and may raise to end the evaluation."""
        self._config = config
        self._tokenizer = loaded.tokenizer
        self._pad = loaded.pad_token_id
        self._accelerator = accelerator
        self._check = check
        self._rule = AnswerRule.of(config)

    def __call__(
        self, model: Any, sub_datasets: Mapping[str, Sequence[Example]]
    ) -> EvaluationResult:
        """Evaluate a model, and restore its training mode afterwards."""
        began = time.monotonic()
        model = self._accelerator.unwrap_model(model)
        examples = [example for name in sub_datasets for example in sub_datasets[name]]
        with _evaluation_mode(model):
            losses, verdicts, cost = self._forward(model, examples)
            if self._config.metric == "exact_match":
                cost += self._decide_open(model, examples, verdicts)
        return self._summarize(sub_datasets, losses, verdicts, cost, time.monotonic() - began)

    def generate(self, model: Any, example: Example) -> str:
        """Return the greedy generation for one example."""
        model = self._accelerator.unwrap_model(model)
        with _evaluation_mode(model):
            (tokens,) = self._greedy(model, [example], [0])
        return self._decode(tokens)

    def _summarize(
        self,
        sub_datasets: Mapping[str, Sequence[Example]],
        losses: Sequence[float],
        verdicts: Sequence[int],
        cost: EvaluationCost,
        seconds: float,
    ) -> EvaluationResult:
        metrics, mean_losses, errors, start = {}, {}, {}, 0
        for name, examples in sub_datasets.items():
            own = slice(start, start + len(examples))
            targets = [example.targets for example in examples]
            mean_losses[name] = sum(losses[own]) / sum(targets)
            if self._config.metric == "loss":
                metrics[name] = mean_losses[name]
                errors[name] = ratio_error(losses[own], targets)
            else:
                # If the loss is not finite, NaN chose the tokens, which match only by chance.
                is_finite = math.isfinite(mean_losses[name])
                metrics[name] = sum(verdicts[own]) / len(examples) if is_finite else math.nan
                errors[name] = ratio_error(verdicts[own], [1] * len(examples))
            start += len(examples)
        sizes = {name: len(examples) for name, examples in sub_datasets.items()}
        metrics[OVERALL] = mean_metric(metrics, sizes, self._config.overall)
        return EvaluationResult(
            metrics=metrics, losses=mean_losses, errors=errors, cost=cost, seconds=seconds
        )

    def _forward(
        self, model: Any, examples: Sequence[Example]
    ) -> tuple[list[float], list[int], EvaluationCost]:
        """Return each example's summed loss, its verdict as far as it is known, and the cost."""
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
        batches = self._batches(order)
        losses, verdicts = [0.0] * len(examples), [0] * len(examples)
        for batch, is_own in self._own_batches(model, batches):
            rows = [examples[i] for i in batch]
            tensors = collate(rows, pad_token_id=self._pad, device=self._accelerator.device)
            token_losses, logits = target_losses(model, tensors)
            sizes = [row.targets for row in rows]
            sums = torch.stack([part.sum() for part in torch.split(token_losses, sizes)]).tolist()
            choices = [part.tolist() for part in torch.split(logits.argmax(dim=-1), sizes)]
            results = zip(batch, rows, sums, choices, strict=True)
            for i, row, row_loss, row_choices in results if is_own else ():
                losses[i] = row_loss
                verdicts[i] = self._verdict(row, row_choices[-len(row.completion) :])
        cost = EvaluationCost.of_batches([[len(examples[i]) for i in batch] for batch in batches])
        return self._all_reduce(losses), [int(v) for v in self._all_reduce(verdicts)], cost

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
            return int(self._rule.is_right(text, example.reference))
        if self._rule.is_exact and not _can_become(text, example.reference):
            return _WRONG
        return _OPEN

    def _decide_open(
        self, model: Any, examples: Sequence[Example], verdicts: list[int]
    ) -> EvaluationCost:
        """Replace the open verdicts by those of generation, and return the cost."""
        still_open = [i for i, verdict in enumerate(verdicts) if verdict == _OPEN]
        batches = self._batches(sorted(still_open, key=lambda i: -len(examples[i].prompt)))
        found, lengths = [0.0] * len(examples), [0.0] * len(examples)
        for batch, is_own in self._own_batches(model, batches):
            generated = zip(batch, self._greedy(model, examples, batch), strict=True)
            for i, tokens in generated if is_own else ():
                found[i] = self._rule.is_right(self._decode(tokens), examples[i].reference)
                lengths[i] = len(tokens)
        found, lengths = self._all_reduce(found), self._all_reduce(lengths)
        prompts = [[len(examples[i].prompt) for i in batch] for batch in batches]
        cost = EvaluationCost.of_batches(prompts)
        for batch, prompt_lengths in zip(batches, prompts, strict=True):
            cost += _generation_cost(prompt_lengths, [int(lengths[i]) for i in batch])
        for i in still_open:
            verdicts[i] = int(found[i])
        return cost

    def _greedy(
        self, model: Any, examples: Sequence[Example], batch: Sequence[int]
    ) -> list[list[int]]:
        """Return the generated tokens of each example, up to EOS and with it."""
        prompts = [examples[i].prompt for i in batch]
        width = max(map(len, prompts))
        ids = [[self._pad] * (width - len(prompt)) + [*prompt] for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
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

    def _batches(self, order: Sequence[int]) -> list[Sequence[int]]:
        size = self._config.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _own_batches(
        self, model: Any, batches: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], bool]]:
        """Yield own batches with True, and with False one that FSDP computes in addition."""
        is_equal = is_sharded(model)
        for batch in split_among_processes(batches, self._accelerator, equal_counts=is_equal):
            if self._check is not None:
                self._check()
            yield batch

    def _all_reduce(self, values: Sequence[float]) -> list[float]:
        """Add the values of all processes; at most one of them is not 0, so the sum is exact."""
        if self._accelerator.num_processes == 1:
            return list(values)
        mine = torch.tensor(values, dtype=torch.float32, device=self._accelerator.device)
        total: list[float] = self._accelerator.reduce(mine, reduction="sum").tolist()
        return total


def ratio_error(parts: Sequence[float], counts: Sequence[int]) -> float:
    """Return the standard error of sum(parts) / sum(counts) over examples; NaN for one example.

    This is the usual error of a ratio estimate. If all counts are 1, it is that of a mean.
    """
    n, total = len(parts), sum(counts)
    if n < 2:
        return math.nan
    ratio = sum(parts) / total
    squares = math.fsum((a - ratio * b) ** 2 for a, b in zip(parts, counts, strict=True))
    return math.sqrt(n / (n - 1) * squares) / total


def _can_become(text: str, reference: str) -> bool:
    """Return whether further tokens could turn ``text`` into the reference.

    Whitespace, which may be stripped, and an incomplete character at the end are ignored.
    """
    return "".join(reference.split()).startswith("".join(text.rstrip("\ufffd").split()))


def _generation_cost(prompts: Sequence[int], generated: Sequence[int]) -> EvaluationCost:
    """Return the cost of a batch from its numbers of tokens; it runs until its last row ends."""
    total = sum(generated)
    rows = zip(prompts, generated, strict=True)
    return EvaluationCost(
        generated_tokens=total,
        generated_attention_tokens=sum(n * prompt + n * (n + 1) // 2 for prompt, n in rows),
        padded_tokens=max(generated) * len(generated) - total,
    )


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """Set evaluation mode without gradients, and replace the model's own generation settings."""
    training, settings = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        # FSDP cannot train with tensors that were made in inference mode.
        with torch.no_grad() if is_sharded(model) else torch.inference_mode():
            yield
    finally:
        model.generation_config = settings
        model.train(training)
