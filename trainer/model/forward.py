"""Run forward passes: make batches, compute the losses of completions, and count tokens.

Batches are padded on the right. In a causal model no real token attends to the padding on its
right. So no attention mask is needed, the fastest attention kernels apply, and the loss of an
example does not depend on its padding.

Example::

    batch = collate(examples, pad_token_id=0, device="cpu")
    losses, logits = target_losses(model, batch)                # one value a target token
    cost = TokenCost.of_batches([[len(example) for example in examples]])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from trainer.data.examples import Example

IGNORED = -100
"""The label of tokens without a loss."""

_Cost = TypeVar("_Cost", bound="TokenCost")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded examples, on one device."""

    input_ids: Tensor
    """(examples, tokens of the longest example), int64."""
    labels: Tensor
    """Same shape: the ids of tokens with a loss; :data:`IGNORED` on the others."""


@dataclass(frozen=True, kw_only=True)
class TokenCost:
    """Tokens of forward passes; :mod:`trainer.journal` defines the fields."""

    tokens: int = 0
    attention_tokens: int = 0
    padded_tokens: int = 0

    def __add__(self: _Cost, other: _Cost) -> _Cost:
        added = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return type(self)(**added)

    @classmethod
    def of_batches(cls: type[_Cost], batches: Iterable[Sequence[int]]) -> _Cost:
        """Return the cost of batches of sequences that are padded to the longest of their batch."""
        total = cls()
        for lengths in batches:
            tokens = sum(lengths)
            total += cls(
                tokens=tokens,
                attention_tokens=sum(length * length for length in lengths),
                padded_tokens=max(lengths) * len(lengths) - tokens,
            )
        return total


def compute_in(dtype: str, model: Any, device: str) -> None:
    """Let every forward pass of a model compute in ``dtype`` (autocast).

    Operations that would lose accuracy, such as sums and norms, stay in the dtype of the weights.
    """
    autocast = torch.autocast(device, dtype=getattr(torch, dtype))
    model.forward = autocast(model.forward)


def collate(examples: Sequence[Example], *, pad_token_id: int, device: Any = "cpu") -> Batch:
    """Pad examples to the length of the longest one."""
    width = max(len(example) for example in examples)
    ids, labels = [], []
    for example in examples:
        padding = width - len(example)
        ids.append([*example.prompt, *example.completion] + [pad_token_id] * padding)
        label = [IGNORED] * len(example.prompt) + [*example.completion] + [IGNORED] * padding
        for start, end in example.earlier:
            label[start:end] = example.prompt[start:end]
        labels.append(label)
    return Batch(
        input_ids=torch.tensor(ids).to(device, non_blocking=True),
        labels=torch.tensor(labels).to(device, non_blocking=True),
    )


def target_losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross entropy (targets,) in float32 and the logits (targets, vocabulary).

    Targets are the tokens with a loss, example after example. Only their logits are computed,
    because the logits of prompts and padding would cost time and, with a large vocabulary, most of
    the memory.
    """
    shifted = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    wanted = shifted != IGNORED
    with _logits_at(model, wanted):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    if logits.dim() == 3:  # the architecture does not call its output layer as a module
        logits = logits[wanted]
    losses = F.cross_entropy(logits.float(), shifted[wanted], reduction="none")
    return losses, logits


def summed_loss(token_losses: Tensor, examples: Sequence[Example], average: str) -> Tensor:
    """Return a micro-batch's summand of the loss of a step, for ``train.loss_average``.

    The sum over the micro-batches divided by :func:`loss_count` is the loss.
    """
    if average == "tokens":
        return token_losses.sum()
    if average == "micro_batches":
        return token_losses.mean()
    parts = torch.split(token_losses, [example.targets for example in examples])
    return torch.stack([part.mean() for part in parts]).sum()


def loss_count(batch: Sequence[Sequence[Example]], average: str) -> int:
    """Return the number of units that the loss of a step is the mean of."""
    if average == "tokens":
        return sum(example.targets for micro in batch for example in micro)
    return len(batch) if average == "micro_batches" else sum(map(len, batch))


def mean_losses(token_losses: Tensor, examples: Sequence[Example]) -> Tensor:
    """Return the mean loss of each example (examples,), float32 on the CPU."""
    parts = torch.split(token_losses.detach(), [example.targets for example in examples])
    return torch.stack([part.mean() for part in parts]).float().cpu()


@contextmanager
def _logits_at(model: Any, wanted: Tensor) -> Iterator[None]:
    """Let the output layer see only the hidden states at ``wanted`` (examples, tokens).

    A hook works for every architecture, while only some have an argument for this.
    """

    def select(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        return (hidden[wanted], *args[1:]) if hidden.shape[:2] == wanted.shape else None

    head = getattr(model, "module", model).get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
