"""Compute the metric of every sub-dataset, and its mean token loss.

The answer of a text is the last match of ``answer_pattern``, or the whole text if nothing matches.
The loss is recorded with every metric. If it is not finite, any other metric is NaN.

Most examples are decided without generation. A forward pass over prompt and reference gives the
token that greedy decoding would take after each prefix of the reference, and so the generated text
up to its first token that differs from the reference. The example is decided if this text is
complete, or if there is no pattern and the text can no longer become the reference. Only the other
examples are generated, in batches with a key-value cache. The verdicts are the same as those of
generation alone. A function of the user gets whole generations.

Batches are made by sorting, so the result depends on weights and examples alone. With several
processes each evaluates its share of the same batches, and the numbers are those of one process.

Example::

    evaluator = Evaluator(config.evaluation, loaded, accelerator, load_metrics(config, mixture))
    result = evaluator(model, {"arith": examples})
    result.metrics["arith"], result.metrics["overall"], result.losses["arith"]
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import GenerationConfig

from trainer.config.schema import OVERALL, EvalConfig
from trainer.data.examples import Example
from trainer.distributed import share, split_among_processes
from trainer.model.answers import AnswerRule
from trainer.model.forward import TokenCost, collate, target_losses
from trainer.model.load import LoadedModel
from trainer.model.metrics import Metric, RunMetrics
from trainer.model.sharding import is_sharded

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class EvaluationCost(TokenCost):
    """Tokens of an evaluation over all processes; :mod:`trainer.journal` defines the fields."""

    generated_tokens: int = 0
    generated_attention_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A greedy generation."""

    text: str
    is_complete: bool = True
    """False if the text ends at the first token that rules the reference out."""
    is_right: bool | None = None
    """Whether the answer is that of the reference; ``None`` if the metric is not exact match."""
    score: float | None = None
    """The value of a function of the user that returns one for each example."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The metrics of all sub-datasets, and the cost of computing them."""

    metrics: dict[str, float]
    """Sub-dataset → metric, and the overall one."""
    losses: dict[str, float]
    errors: dict[str, float]
    """Sub-dataset → standard error of its metric; NaN for one example, or if it is unknown."""
    cost: EvaluationCost
    """Without the tokens of functions that take the model."""
    seconds: float
    generations: Mapping[str, Sequence[Generation]] = field(default_factory=dict)
    """Sub-dataset whose metric needs generations → those of its examples."""

    def cost_fields(self) -> dict[str, float]:
        """Return the fields of a journal record that state the cost."""
        return {**vars(self.cost), "seconds": self.seconds}


@dataclass(frozen=True, kw_only=True)
class _Findings:
    """Facts on each example, in the order of the examples."""

    examples: Sequence[Example]
    losses: list[float]
    hits: list[float]
    """Tokens of the completion that are the most probable ones."""
    generations: list[Generation | None]
    """``None``: not wanted, or not known."""
    cost: EvaluationCost

    def split(
        self, sub_datasets: Mapping[str, Sequence[Example]]
    ) -> Iterator[tuple[str, _Findings]]:
        """Yield the facts of each sub-dataset; their examples are these, in the same order."""
        start = 0
        for name, examples in sub_datasets.items():
            own = slice(start, start + len(examples))
            start = own.stop
            part = replace(
                self,
                examples=examples,
                losses=self.losses[own],
                hits=self.hits[own],
                generations=self.generations[own],
            )
            yield name, part


class _Value(NamedTuple):
    """The mean loss of a sub-dataset, its metric, and the standard error of that."""

    loss: float
    metric: float
    error: float
    generations: tuple[Generation, ...] = ()


class Evaluator:
    """Evaluates a model on sub-datasets."""

    def __init__(
        self,
        config: EvalConfig,
        loaded: LoadedModel,
        accelerator: Accelerator,
        metrics: RunMetrics | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Create it.

        Args:
            config: The settings.
            loaded: The model's tokenizer.
            accelerator: The processes and the device.
            metrics: The metrics of the sub-datasets; ``None``: ``config.metric`` for all.
            check: Called before each batch; it may raise to end the evaluation.
        """
        self._config = config
        self._metrics = metrics
        self._tokenizer = loaded.tokenizer
        self._pad = loaded.pad_token_id
        self._accelerator = accelerator
        self._check = check
        self._rule = AnswerRule.of(config)

    def __call__(
        self,
        model: Any,
        sub_datasets: Mapping[str, Sequence[Example]],
        base: Mapping[str, float] | None = None,
    ) -> EvaluationResult:
        """Evaluate a model, and restore its training mode afterwards.

        Args:
            model: The model.
            sub_datasets: Sub-dataset → examples.
            base: The metrics of the base on them; ``None``: the model is the base.
        """
        began = time.monotonic()
        model = self._accelerator.unwrap_model(model)
        examples = [example for name in sub_datasets for example in sub_datasets[name]]
        every = self._metrics or RunMetrics.load(
            self._config, dict.fromkeys(sub_datasets, self._config.metric)
        )
        metrics = [every.metrics[name] for name, rows in sub_datasets.items() for _ in rows]
        with _evaluation_mode(model):
            found = self._forward(model, examples, metrics)
            cost = found.cost + self._generate_open(model, examples, metrics, found)
            values = {
                name: self._measure(model, every.metrics[name], part)
                for name, part in found.split(sub_datasets)
            }
        own = {name: value.metric for name, value in values.items()}
        sizes = {name: len(rows) for name, rows in sub_datasets.items()}
        return EvaluationResult(
            metrics={**own, OVERALL: every.mixture.compute_overall(own, sizes, base)},
            losses={name: value.loss for name, value in values.items()},
            errors={name: value.error for name, value in values.items()},
            generations={n: value.generations for n, value in values.items() if value.generations},
            cost=cost,
            seconds=time.monotonic() - began,
        )

    def generate(self, model: Any, example: Example) -> str:
        """Return the greedy generation for one example."""
        model = self._accelerator.unwrap_model(model)
        with _evaluation_mode(model):
            (tokens,) = self._greedy(model, [example], [0])
        return self._decode(tokens)

    def _measure(self, model: Any, metric: Metric, found: _Findings) -> _Value:
        """Return the metric of one sub-dataset."""
        targets = [example.targets for example in found.examples]
        loss, generations = sum(found.losses) / sum(targets), found.generations
        if metric.name == "loss":
            return _Value(loss, loss, ratio_error(found.losses, targets))
        made = tuple(one for one in generations if one is not None)
        if not math.isfinite(loss):
            # NaN chose the tokens, which match only by chance.
            return _Value(loss, math.nan, math.nan, made)
        if metric.name == "token_accuracy":
            accuracy = sum(found.hits) / sum(targets)
            return _Value(loss, accuracy, ratio_error(found.hits, targets))
        if metric.name == "exact_match":
            verdicts = [float(one.is_right or False) for one in made]
            return _Value(loss, sum(verdicts) / len(verdicts), _error(verdicts), made)
        mean, scores = self._call(metric, model, found.examples, made)
        if scores is not None and made:
            pairs = zip(made, scores, strict=True)
            made = tuple(replace(one, score=score) for one, score in pairs)
        return _Value(loss, mean, _error(scores or ()), made)

    def _call(
        self,
        metric: Metric,
        model: Any,
        examples: Sequence[Example],
        generations: Sequence[Generation],
    ) -> tuple[float, tuple[float, ...] | None]:
        """Return what the main process's call of a function gives.

        All processes call a function of the model, because a sharded one needs them all.
        """
        rows = [dict(example.row) for example in examples]
        answer = None
        if metric.takes_model:
            model.eval()
            answer = metric.call(len(examples), model=model, tokenizer=self._tokenizer, rows=rows)
        elif self._accelerator.is_main_process:
            answer = metric.call(
                len(examples),
                generations=[made.text for made in generations],
                references=[example.reference for example in examples],
                rows=rows,
            )
        shared: tuple[float, tuple[float, ...] | None] = share(answer)
        return shared

    def _forward(
        self, model: Any, examples: Sequence[Example], metrics: Sequence[Metric]
    ) -> _Findings:
        """Return what one forward pass says of each example, and its cost."""
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
        batches = self._batches(order)
        losses, hits = [0.0] * len(examples), [0.0] * len(examples)
        generations: dict[int, Generation] = {}
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
                hits[i] = sum(map(operator.eq, row_choices, row.target_tokens))
                if metrics[i].generates:
                    made = self._follow(row, row_choices[-len(row.completion) :], metrics[i])
                    generations |= {} if made is None else {i: made}
        cost = EvaluationCost.of_batches([[len(examples[i]) for i in batch] for batch in batches])
        every = _gather(generations)
        return _Findings(
            examples=examples,
            losses=self._all_reduce(losses),
            hits=self._all_reduce(hits),
            generations=[every.get(i) for i in range(len(examples))],
            cost=cost,
        )

    def _follow(
        self, example: Example, choices: Sequence[int], metric: Metric
    ) -> Generation | None:
        """Return the generation by the token that greedy decoding takes after each prefix.

        ``None``: the text must be generated.
        """
        pairs = zip(choices, example.completion, strict=True)
        same = next((i for i, (choice, token) in enumerate(pairs) if choice != token), len(choices))
        taken = [*choices[: same + 1]]
        ended = taken[-1] == self._tokenizer.eos_token_id
        if len(taken) - ended > self._config.max_new_tokens:
            return None
        text = self._decode(taken)
        if ended:
            return self._grade(text, example, metric)
        is_exact = metric.name == "exact_match" and self._rule.is_exact
        if is_exact and not _can_become(text, example.reference):
            return Generation(text=text, is_complete=False, is_right=False)
        return None

    def _grade(self, text: str, example: Example, metric: Metric) -> Generation:
        """Return a whole generation, and whether it is right if the metric is exact match."""
        if metric.name != "exact_match":
            return Generation(text=text)
        return Generation(text=text, is_right=self._rule.is_right(text, example.reference))

    def _generate_open(
        self,
        model: Any,
        examples: Sequence[Example],
        metrics: Sequence[Metric],
        found: _Findings,
    ) -> EvaluationCost:
        """Add the generations that the forward pass has not given, and return the cost."""
        still_open = [
            i for i, made in enumerate(found.generations) if made is None and metrics[i].generates
        ]
        batches = self._batches(sorted(still_open, key=lambda i: -len(examples[i].prompt)))
        own: dict[int, tuple[Generation, int]] = {}
        for batch, is_own in self._own_batches(model, batches):
            generated = zip(batch, self._greedy(model, examples, batch), strict=True)
            for i, tokens in generated if is_own else ():
                made = self._grade(self._decode(tokens), examples[i], metrics[i])
                own[i] = (made, len(tokens))
        every = _gather(own)
        prompts = [[len(examples[i].prompt) for i in batch] for batch in batches]
        cost = EvaluationCost.of_batches(prompts)
        for batch, prompt_lengths in zip(batches, prompts, strict=True):
            cost += _generation_cost(prompt_lengths, [every[i][1] for i in batch])
        for i in still_open:
            found.generations[i] = every[i][0]
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


def _error(scores: Sequence[float]) -> float:
    """Return the standard error of a mean; NaN if there are fewer than two scores."""
    return ratio_error(scores, [1] * len(scores))


def _gather(own: Mapping[int, _T]) -> dict[int, _T]:
    """Return the items of all processes, in every process."""
    return {i: item for items in gather_object([own]) for i, item in items.items()}


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
