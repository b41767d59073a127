"""Examples: rows as tokenized prompt and completion.

A row has one of three forms:

- ``prompt`` and ``completion``, which are strings;
- ``messages``, a conversation that ends with the assistant's turn. The tokenizer's chat template
  renders it, and the last turn is the completion;
- ``text``, if the row has no column of the other forms. The first token is the prompt, which is BOS
  if the tokenizer adds one.

The loss is computed on the completion only, which ends with EOS. Prompt and completion are
tokenized separately, so that their boundary is the same in training and in generation.

Example::

    example = encode({"prompt": "1+1=", "completion": "2"}, tokenizer, bos_prefix(tokenizer))
    example.prompt, example.completion, example.reference
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenized example."""

    prompt: tuple[int, ...]
    """Token ids that are conditioned on."""
    completion: tuple[int, ...]
    """Token ids with a loss; the last one is EOS."""
    reference: str
    """The text that a correct generation matches."""
    graded: bool = True
    """True if the example has a reference; ``text`` has none."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, kw_only=True)
class Split:
    """The usable examples of one source."""

    examples: tuple[Example, ...]
    too_long: int = 0
    """Examples that were dropped because they are longer than the maximum."""


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
        return sum(split.too_long for split in (self.train, self.validation, self.test) if split)


Mixture = Mapping[str, SubDataset]


def encode(
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    prefix: tuple[int, ...] = (),
    *,
    reference: str | None = None,
) -> Example:
    """Tokenize one row, in which a column that is ``None`` counts as missing.

    A prompt begins with ``prefix`` (see :func:`bos_prefix`). ``reference`` is the text that a
    correct generation matches, by default the completion. Raises :class:`DataError` if the row has
    none of the three forms.
    """
    columns = ("prompt", "completion", "messages", "text")
    given = {key for key in columns if record.get(key) is not None}
    if "messages" in given:
        if given & {"prompt", "completion"}:
            raise DataError("it has both messages and prompt/completion; keep one of the two forms")
        return _encode_messages(record["messages"], tokenizer)
    if given == {"text"}:
        return _encode_text(record["text"], tokenizer, prefix)
    for key in ("prompt", "completion"):
        if key not in given:
            found = ", ".join(map(str, record)) or "none"
            raise DataError(
                f"{key!r} is missing; a row has prompt and completion, messages, or text; this "
                f"one's columns are: {found}"
            )
        _check_text(record[key], f"{key!r}")
    prompt = prefix + _tokens(record["prompt"], tokenizer)
    if not prompt:
        raise DataError("the prompt is empty, so nothing predicts the completion's first token")
    completion = (*_tokens(record["completion"], tokenizer), _eos(tokenizer))
    if reference is None:
        reference = record["completion"]
    return Example(prompt=prompt, completion=completion, reference=reference)


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return BOS if the tokenizer adds it to a text (a chat template has its own)."""
    first = list(tokenizer("a")["input_ids"])[:1]
    return tuple(first) if first == [tokenizer.bos_token_id] else ()


def _encode_text(text: Any, tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...]) -> Example:
    _check_text(text, "'text'")
    tokens = _tokens(text, tokenizer)
    if not tokens:
        raise DataError("'text' is empty")
    tokens = (*prefix, *tokens, _eos(tokenizer))
    return Example(prompt=tokens[:1], completion=tokens[1:], reference="", graded=False)


def _encode_messages(messages: Any, tokenizer: PreTrainedTokenizerBase) -> Example:
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError("'messages' must be a list of at least two messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"messages[{i}] must be an object with role and content")
        for key in ("role", "content"):
            _check_text(message.get(key), f"messages[{i}].{key}")
    if messages[-1]["role"] != "assistant":
        raise DataError("the last message must be the assistant's: it is what is trained on")
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; write prompt and completion instead")
    prompt = _render(messages[:-1], tokenizer, add_generation_prompt=True)
    whole = _render(messages, tokenizer, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template renders the conversation's beginning in another way once the last "
            "turn follows; write prompt and completion instead"
        )
    eos = _eos(tokenizer)
    completion = _tokens(whole[len(prompt) :], tokenizer)
    if eos in completion:
        completion = completion[: completion.index(eos)]
    prompt_ids = _tokens(prompt, tokenizer)
    if not prompt_ids:
        raise DataError("the chat template renders an empty prompt")
    return Example(
        prompt=prompt_ids, completion=(*completion, eos), reference=messages[-1]["content"]
    )


def _render(
    messages: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program, which may raise any error
        raise DataError(f"the chat template refuses the conversation: {error}") from None
    return str(text)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    token_id = tokenizer.eos_token_id
    if not isinstance(token_id, int):
        raise DataError("the tokenizer has no EOS token, so no completion could ever end")
    return token_id


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is a {type(value).__name__}"
        raise DataError(f"{what} must be a string, it {found}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} has a lone surrogate, which is no character") from None
