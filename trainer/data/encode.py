"""Make examples of rows.

A row has one of three forms:

- ``prompt`` and ``completion``, which are strings, or both lists of messages, which are then one
  conversation;
- ``messages``, a conversation that ends with the assistant's turn, with optional ``tools``
  (:mod:`trainer.data.conversations`);
- ``text``, if the row has no column of the other forms. The first token is the prompt, which is BOS
  if the tokenizer adds one.

Prompt and completion are tokenized separately, so that their boundary is the same in training and
in generation.

Example::

    example = encode({"prompt": "1+1=", "completion": "2"}, tokenizer, bos_prefix(tokenizer))
    example.prompt, example.completion, example.reference
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.data.conversations import LossOn, encode_conversation
from trainer.data.examples import Example
from trainer.data.tokens import check_text, eos_token, tokens
from trainer.errors import DataError

_CONVERSATIONS = ("conversations", "conversation", "dialog", "chat")
_PROMPTS = ("instruction", "question", "query", "problem", "input")
_INPUTS = ("input", "context")
_COMPLETIONS = ("output", "response", "answer", "solution")
"""Columns of published data sets, for the advice in a message."""


def encode(
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    prefix: tuple[int, ...] = (),
    *,
    reference: str | None = None,
    loss_on: LossOn = "last",
) -> Example:
    """Tokenize one row, in which a column that is ``None`` counts as missing.

    Args:
        record: The row.
        tokenizer: Its chat template renders conversations.
        prefix: The beginning of a prompt that is text (see :func:`trainer.data.tokens.bos_prefix`).
        reference: The text that a correct generation matches; ``None``: the completion.
        loss_on: The turns of the assistant that have a loss.

    Raises:
        DataError: The row has none of the three forms.
    """
    columns = ("prompt", "completion", "messages", "text")
    given = {key: record[key] for key in columns if record.get(key) is not None}
    if "messages" in given and given.keys() & {"prompt", "completion"}:
        raise DataError("it has both messages and prompt/completion; keep one of the two forms")
    messages = given.get("messages")
    if all(isinstance(given.get(key), list) for key in ("prompt", "completion")):
        messages = given["prompt"] + given["completion"]
    if messages is not None:
        return encode_conversation(messages, tokenizer, tools=record.get("tools"), loss_on=loss_on)
    if given.keys() == {"text"}:
        return _encode_text(given["text"], tokenizer, prefix)
    for key in ("prompt", "completion"):
        if key not in given:
            found = ", ".join(map(str, record)) or "none"
            raise DataError(
                f"{key!r} is missing; a row has prompt and completion, messages, or text; this "
                f"one's columns are: {found}{_advise_fields(record)}"
            )
        check_text(given[key], f"{key!r}")
    prompt = prefix + tokens(given["prompt"], tokenizer)
    if not prompt:
        raise DataError("the prompt is empty, so nothing predicts the completion's first token")
    completion = (*tokens(given["completion"], tokenizer), eos_token(tokenizer))
    return Example(
        prompt=prompt,
        completion=completion,
        reference=given["completion"] if reference is None else reference,
    )


def _encode_text(text: Any, tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...]) -> Example:
    check_text(text, "'text'")
    found = tokens(text, tokenizer)
    if not found:
        raise DataError("'text' is empty")
    found = (*prefix, *found, eos_token(tokenizer))
    return Example(prompt=found[:1], completion=found[1:], reference="", graded=False)


def _advise_fields(record: Mapping[str, Any]) -> str:
    """Return the line of a sub-dataset's configuration that reads such rows, or nothing."""
    turns = next((name for name in _CONVERSATIONS if name in record), None)
    prompt = next((name for name in _PROMPTS if name in record), None)
    completion = next((name for name in _COMPLETIONS if name in record), None)
    if turns is not None:
        line = f"{{messages: {turns}}}"
    elif prompt is not None and completion is not None:
        more = [name for name in _INPUTS if name in record and name != prompt]
        text = "".join(f"{{{name}}}\\n" for name in (prompt, *more))
        line = f'{{prompt: "{text}", completion: "{{{completion}}}"}}'
    else:
        return ""
    return f"; this line in the sub-dataset reads them: fields: {line}"
