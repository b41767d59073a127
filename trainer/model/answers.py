"""Find the answer in a text, and compare answers: pure functions.

Example::

    rule = AnswerRule.of(config.evaluation)
    rule.is_right("The sum is 1,200.0 dollars.", "#### 1200")
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

from trainer.config.schema import EvalConfig
from trainer.data.examples import Example
from trainer.errors import ConfigError

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class AnswerRule:
    """How an answer is found and compared."""

    pattern: re.Pattern[str] | None = None
    """The first group of a match is the answer; ``None``: the whole text."""
    match: Literal["first", "last"] = "last"
    """The match that counts."""
    kind: Literal["text", "number", "folded"] = "text"
    """Answers are compared as texts, as numbers, or as texts without regard to case."""

    @classmethod
    def of(cls, config: EvalConfig) -> AnswerRule:
        """Return the rule of a configuration."""
        pattern = re.compile(config.answer_pattern) if config.answer_pattern else None
        return cls(pattern=pattern, match=config.answer_match, kind=config.answer)

    @property
    def is_exact(self) -> bool:
        """True if an answer is a whole text, compared as it is."""
        return self.pattern is None and self.kind == "text"

    def find(self, text: str) -> str:
        """Return the answer of a text, stripped; the whole text if nothing matches."""
        matches = list(self.pattern.finditer(text)) if self.pattern else []
        if not matches:
            return text.strip()
        found = matches[-1 if self.match == "last" else 0]
        return (found.group(1 if found.re.groups else 0) or "").strip()

    def is_right(self, text: str, reference: str) -> bool:
        """Return True if a text has the answer of the reference.

        With ``number`` the first number of each answer counts. An answer without a number is
        compared as a text.
        """
        found, wanted = self.find(text), self.find(reference)
        if self.kind == "number" and (number := _number(wanted)) is not None:
            return _number(found) == number
        if self.kind == "folded":
            return found.casefold() == wanted.casefold()
        return found == wanted

    def check(self, sub_datasets: Mapping[str, Sequence[Example]]) -> None:
        """Raise :class:`ConfigError` if the pattern matches no reference of some sub-dataset."""
        if self.pattern is None:
            return
        for name, examples in sub_datasets.items():
            if not any(self.pattern.search(example.reference) for example in examples):
                raise ConfigError(
                    f"evaluation.answer_pattern {self.pattern.pattern!r} matches none of the "
                    f"references of sub-dataset {name!r}, so its exact match cannot be computed; "
                    f"the first reference is {examples[0].reference[:80]!r}"
                )


def _number(text: str) -> Decimal | None:
    """Return the first number of a text, exactly; commas between digits are left out."""
    found = _NUMBER.search(text)
    if found is None:
        return None
    try:
        return Decimal(found[0].replace(",", ""))
    except InvalidOperation:
        return None
