"""Count the tokens that a Trainer trains on and evaluates, for the FLOPs of a report.

The counts are taken from the batches that the Trainer gives to its own steps, so that they hold for
every collator, packing and model. A batch without token ids, as of images, counts nothing.

Invariant: the counter changes neither batches nor results.

Example::

    counter = TokenCounter()
    counter.attach(trainer)
    trainer.train()
    counter.take_training(), counter.take_evaluation()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

IGNORED = -100
"""The label of a token without a loss."""

_COUNTS = ("tokens", "attention_tokens", "padded_tokens", "target_tokens")


def count_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return tokens, attention tokens, padded tokens and target tokens of a batch, int64 (4,).

    Attention tokens are the sum of length² over the sequences. Sequences that are packed into one
    row are told apart by their position ids.
    """
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, torch.Tensor):
        return torch.zeros(len(_COUNTS), dtype=torch.int64)
    lengths, size = _lengths(ids, batch), ids.numel()
    targets = ids.new_zeros(())
    if isinstance(labels, torch.Tensor):
        targets = (labels != IGNORED).sum()
        if labels.shape != ids.shape:
            # The labels of an encoder-decoder are the tokens of its decoder.
            lengths = torch.cat([lengths, (labels != IGNORED).sum(-1).reshape(-1)])
            size += labels.numel()
    tokens = lengths.sum()
    return torch.stack([tokens, (lengths * lengths).sum(), size - tokens, targets]).long()


def _lengths(ids: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the numbers of real tokens of the sequences in a batch."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        return mask.long().sum(-1).reshape(-1)
    if isinstance(positions, torch.Tensor) and positions.shape == ids.shape:
        starts = (positions.reshape(-1) == 0).nonzero().reshape(-1)
        return torch.diff(starts, append=starts.new_tensor([ids.numel()]))
    rows = ids.numel() // ids.shape[-1]
    return torch.full((rows,), ids.shape[-1], device=ids.device)


class TokenCounter:
    """The tokens and the loss of one Trainer's steps since they were taken last."""

    def __init__(self) -> None:
        """Start at zero."""
        self._trained = self._evaluated = torch.zeros(len(_COUNTS), dtype=torch.int64)
        self._loss = torch.zeros(())
        self._reduce: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts

    def attach(self, trainer: Any) -> None:
        """Count the batches of a Trainer's ``training_step`` and ``prediction_step``."""
        train, predict = trainer.training_step, trainer.prediction_step

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            counts = count_tokens(inputs)
            loss = train(model, inputs, *args, **kwargs)
            self._trained = self._trained.to(counts.device) + counts
            self._loss = self._loss.to(loss.device) + loss.detach().float()
            return loss

        def prediction_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            counts = count_tokens(inputs)
            self._evaluated = self._evaluated.to(counts.device) + counts
            return predict(model, inputs, *args, **kwargs)

        trainer.training_step, trainer.prediction_step = training_step, prediction_step
        if trainer.accelerator.num_processes > 1:
            accelerator = trainer.accelerator
            self._reduce = lambda counts: accelerator.reduce(counts.to(accelerator.device))

    def take_training(self, steps: int) -> dict[str, float]:
        """Return the counts of training and the mean loss of ``steps`` steps; start again.

        With several processes all must call this, and get the sums over all of them.
        """
        counts, loss = self._reduce(self._trained), self._reduce(self._loss)
        processes = round(float(self._reduce(torch.ones(()))))
        self._trained, self._loss = torch.zeros_like(self._trained), torch.zeros(())
        found = dict(zip(_COUNTS, counts.tolist(), strict=True))
        return {"loss": float(loss) / max(steps * processes, 1), **found}

    def take_evaluation(self) -> dict[str, float]:
        """Return the counts of evaluation and start again; all processes must call this."""
        counts = self._reduce(self._evaluated)
        self._evaluated = torch.zeros_like(self._evaluated)
        found = dict(zip(_COUNTS, counts.tolist(), strict=True))
        return {name: found[name] for name in _COUNTS if name != "target_tokens"}
