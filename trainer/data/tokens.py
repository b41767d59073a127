"""Token ids of text, without the tokens that a tokenizer adds by itself.

Example::

    tokens("1+1=", tokenizer), eos_token(tokenizer), bos_prefix(tokenizer)
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.errors import DataError


def tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the token ids of a text alone."""
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def eos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of EOS; raises :class:`DataError` if the tokenizer has none."""
    token_id = tokenizer.eos_token_id
    if not isinstance(token_id, int):
        raise DataError("the tokenizer has no EOS token, so no completion could ever end")
    return token_id


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return BOS if the tokenizer adds it to a text (a chat template has its own)."""
    first = list(tokenizer("a")["input_ids"])[:1]
    return tuple(first) if first == [tokenizer.bos_token_id] else ()


def check_text(value: Any, what: str) -> None:
    """Raise :class:`DataError` if a value is not a string of characters; ``what`` names it."""
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is a {type(value).__name__}"
        raise DataError(f"{what} must be a string, it {found}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} has a lone surrogate, which is no character") from None
