"""Sub-datasets from JSON Lines files, tokenized.

A line is an object with either ``prompt`` and ``completion`` (strings), or ``messages``, a
conversation that ends with the assistant's turn and is rendered with the tokenizer's chat template.
Other keys are ignored, and so are blank lines. The loss is taken on the completion only, which for
``messages`` is the last turn.

Prompt and completion are tokenized apart, so that the boundary between them is the same in training
and in generation. A prompt begins with BOS if the tokenizer adds one by itself; a completion
ends with EOS. An example of more than ``max_length`` tokens is dropped and counted.

Example::

    split = load_split("arith/train.jsonl", tokenizer, max_length=512)
    split.examples[0].prompt, split.examples[0].completion, split.too_long
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.errors import DataError
from trainer.settings import DataConfig

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenized example."""

    prompt: tuple[int, ...]
    """Token ids that are conditioned on."""
    completion: tuple[int, ...]
    """Token ids with a loss; the last one is EOS."""
    reference: str
    """The text that a right generation has to match."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, kw_only=True)
class Split:
    """The usable examples of one file."""

    examples: tuple[Example, ...]
    too_long: int = 0
    """Examples that were dropped because they are longer than the maximum."""


@dataclass(frozen=True, kw_only=True)
class SubDataset:
    """The splits of one sub-dataset."""

    train: Split
    validation: Split
    test: Split | None

    @property
    def too_long(self) -> int:
        """Return how many examples of all splits were dropped."""
        return sum(split.too_long for split in (self.train, self.validation, self.test) if split)


Mixture = Mapping[str, SubDataset]


def load_mixture(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, max_validation: int | None = None
) -> Mixture:
    """Load all sub-datasets, sorted by name; of validation files the first ``max_validation``.

    Raises :class:`DataError` for a file that is missing, damaged or has no usable example.
    """
    limits = {"train": None, "validation": max_validation, "test": None}
    mixture = {}
    for name, files in sorted(config.sub_datasets.items()):
        splits: dict[str, Split | None] = {}
        for split in _SPLITS:
            path = getattr(files, split)
            try:
                splits[split] = (
                    None
                    if path is None
                    else load_split(
                        path, tokenizer, max_length=config.max_length, limit=limits[split]
                    )
                )
            except DataError as error:
                raise DataError(f"sub-dataset {name!r}, {split}: {error}") from None
        train, validation = splits["train"], splits["validation"]
        if train is None or validation is None:
            raise DataError(f"sub-dataset {name!r} needs a train and a validation file")
        mixture[name] = SubDataset(train=train, validation=validation, test=splits["test"])
    return mixture


def load_split(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    limit: int | None = None,
) -> Split:
    """Load the first ``limit`` usable examples of one file (all of them by default)."""
    prefix = bos_prefix(tokenizer)
    examples: list[Example] = []
    too_long = 0
    for number, line in _lines(Path(path)):
        if limit is not None and len(examples) >= limit:
            break
        try:
            example = encode(_parse(line), tokenizer, prefix)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        if len(example) > max_length:
            too_long += 1
        else:
            examples.append(example)
    if not examples:
        why = (
            f"all {too_long} examples have more than max_length={max_length} tokens"
            if too_long
            else "it has no lines"
        )
        raise DataError(f"{path} has no usable example: {why}")
    return Split(examples=tuple(examples), too_long=too_long)


def encode(
    record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...] = ()
) -> Example:
    """Tokenize one line's object; ``prefix`` is what a prompt begins with, see :func:`bos_prefix`.

    Raises :class:`DataError` if the object has not one of the two forms.
    """
    if "messages" in record:
        if "prompt" in record or "completion" in record:
            raise DataError("it has both messages and prompt/completion; keep one of the two forms")
        return _encode_messages(record["messages"], tokenizer)
    for key in ("prompt", "completion"):
        if key not in record:
            raise DataError(f"{key!r} is missing; a line has prompt and completion, or messages")
        _check_text(record[key], f"{key!r}")
    prompt = prefix + _tokens(record["prompt"], tokenizer)
    if not prompt:
        raise DataError("the prompt is empty, so nothing predicts the completion's first token")
    completion = (*_tokens(record["completion"], tokenizer), _eos(tokenizer))
    return Example(prompt=prompt, completion=completion, reference=record["completion"])


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return BOS if the tokenizer puts it before a text by itself (a chat template has its own)."""
    first = list(tokenizer("a")["input_ids"])[:1]
    return tuple(first) if first == [tokenizer.bos_token_id] else ()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank with their numbers, from 1."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
                if text.strip():
                    yield number, text
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"not valid JSON ({error})") from None
    except RecursionError:
        raise DataError("not usable JSON (nested too deeply)") from None
    if not isinstance(record, dict):
        raise DataError(f"a line must be a JSON object, this one is a {type(record).__name__}")
    return record


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
    except Exception as error:  # a template is a program that raises what it likes
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
