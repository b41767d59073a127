"""Examples and the sub-datasets that they form: tokenized prompts and completions.

The loss is computed on the completion, which ends with EOS, and on spans of the prompt if the
example is a conversation and all turns of the assistant are trained on.

Example::

    example = Example(prompt=(5, 6, 7), completion=(8, 0), reference="8")
    example.targets                                             # 2
    example.cut(4, tokenizer).completion                        # (8,)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenized example."""

    prompt: tuple[int, ...]
    """Token ids that are conditioned on."""
    completion: tuple[int, ...]
    """Token ids with a loss; the last one is EOS, unless the example was cut."""
    reference: str
    """The text that a correct generation matches."""
    graded: bool = True
    """True if the example has a reference; ``text`` has none."""
    earlier: tuple[tuple[int, int], ...] = ()
    """Spans of the prompt that have a loss, too; none begins at its first token."""
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The row of the file, of an example of validation or test data, for metrics of the user."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def targets(self) -> int:
        """The number of tokens with a loss."""
        return len(self.completion) + sum(end - start for start, end in self.earlier)

    @property
    def target_tokens(self) -> tuple[int, ...]:
        """The tokens with a loss, in their order."""
        earlier = (token for start, end in self.earlier for token in self.prompt[start:end])
        return (*earlier, *self.completion)

    def cut(self, length: int, tokenizer: PreTrainedTokenizerBase) -> Example | None:
        """Return the first ``length`` tokens, or ``None`` if none of them has a loss.

        If the completion is cut off, the last span that begins before becomes the completion.
        """
        if len(self) <= length:
            return self
        if len(self.prompt) < length:
            return replace(self, completion=self.completion[: length - len(self.prompt)])
        begun = [span for span in self.earlier if span[0] < length]
        if not begun:
            return None
        start, end = begun[-1]
        turn = self.prompt[start:end]
        return replace(
            self,
            prompt=self.prompt[:start],
            completion=turn[: length - start],
            reference=str(tokenizer.decode(list(turn), skip_special_tokens=True)),
            earlier=tuple(begun[:-1]),
        )


@dataclass(frozen=True, kw_only=True)
class Split:
    """The usable examples of one source."""

    examples: tuple[Example, ...]
    too_long: int = 0
    """Examples that were dropped because they are longer than the maximum."""
    cut: int = 0
    """Examples that were cut to the maximum."""


@dataclass(frozen=True, kw_only=True)
class SubDataset:
    """The splits of one sub-dataset."""

    train: Split
    validation: Split
    test: Split | None
    set_aside: int = 0
    """Validation examples that were taken from the training data."""

    @property
    def too_long(self) -> int:
        """Return how many examples of all splits were dropped."""
        return sum(split.too_long for split in self._splits)

    @property
    def cut(self) -> int:
        """Return how many examples of all splits were cut."""
        return sum(split.cut for split in self._splits)

    @property
    def _splits(self) -> list[Split]:
        return [split for split in (self.train, self.validation, self.test) if split]


Mixture = Mapping[str, SubDataset]
