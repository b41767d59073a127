"""Batches of tensors, and the loss of a model on their completions.

Batches are padded on the right. A causal model's real tokens cannot see what stands to their right,
so no attention mask is needed, the fastest attention kernels apply, and the loss of an
example does not depend on its padding.

Example::

    batch = collate(examples, pad_token_id=0, device="cpu")
    losses, logits = target_losses(model, batch)                # one value a target token
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody knows it by
from torch import Tensor

from trainer.data.examples import Example

IGNORED = -100
"""The label of tokens without a loss."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded examples."""

    input_ids: Tensor
    """(examples, tokens of the longest one), int64."""
    labels: Tensor
    """Same shape: the completion's token ids, :data:`IGNORED` on prompt and padding."""


def compute_in(dtype: str, model: Any, device: str) -> None:
    """Let every forward pass of a model compute in ``dtype`` what loses nothing by it (autocast).

    What does, as sums and norms, stays in the dtype of the weights.
    """
    autocast = torch.autocast(device, dtype=getattr(torch, dtype))
    model.forward = autocast(model.forward)


def collate(examples: Sequence[Example], *, pad_token_id: int, device: Any = "cpu") -> Batch:
    """Pad examples to the longest one of them."""
    width = max(len(example) for example in examples)
    ids, labels = [], []
    for example in examples:
        padding = width - len(example)
        ids.append([*example.prompt, *example.completion] + [pad_token_id] * padding)
        labels.append([IGNORED] * len(example.prompt) + [*example.completion] + [IGNORED] * padding)
    return Batch(
        input_ids=torch.tensor(ids).to(device, non_blocking=True),
        labels=torch.tensor(labels).to(device, non_blocking=True),
    )


def target_losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross entropy (targets,) in float32 and the logits (targets, vocabulary).

    Targets are the completions' tokens, example after example. Logits are computed for them alone,
    because those of prompts and padding would cost time and, with a large vocabulary, most memory.
    """
    shifted = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    wanted = shifted != IGNORED
    with _logits_at(model, wanted):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    if logits.dim() == 3:  # an architecture that does not call its output layer as a module
        logits = logits[wanted]
    losses = F.cross_entropy(logits.float(), shifted[wanted], reduction="none")
    return losses, logits


@contextmanager
def _logits_at(model: Any, wanted: Tensor) -> Iterator[None]:
    """Let the output layer see the hidden states at ``wanted`` (examples, tokens) only.

    A hook does this for every architecture; not all of them have an argument for it.
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
