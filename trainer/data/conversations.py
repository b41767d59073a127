"""Conversations: messages, rendered by the tokenizer's chat template, as an example.

A message has ``role`` and ``content``, or ``from`` and ``value`` as in ShareGPT. Content is text or
a list of parts of text. A turn of the assistant may call tools (``tool_calls``), and ``tools``
describes them to the template. The last turn of the assistant is the completion. With
``loss_on="all"`` the earlier ones have a loss, too; the tokens are the same.

Example::

    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    encode_conversation(messages, tokenizer, loss_on="all").earlier
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from trainer.data.examples import Example
from trainer.data.tokens import check_text, eos_token, tokens
from trainer.errors import DataError

LossOn = Literal["last", "all"]
Message = dict[str, Any]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""ShareGPT's names of roles; the others are the usual ones."""


def encode_conversation(
    messages: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Any = None,
    loss_on: LossOn = "last",
) -> Example:
    """Tokenize a conversation; raises :class:`DataError` if it cannot be trained on."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError("'messages' must be a list of at least two messages")
    turns = [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if turns[-1]["role"] != "assistant":
        raise DataError("the last message must be the assistant's: it is what is trained on")
    template = _Template(tokenizer, _read_tools(tools), turns)
    prompt = template.render(turns[:-1], opens_turn=True)
    whole = template.render(turns)
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template renders the conversation's beginning in another way once the last "
            "turn follows; write prompt and completion instead"
        )
    eos = eos_token(tokenizer)
    completion = tokens(whole[len(prompt) :], tokenizer)
    if eos in completion:
        completion = completion[: completion.index(eos)]
    prompt_ids = tokens(prompt, tokenizer)
    if not prompt_ids:
        raise DataError("the chat template renders an empty prompt")
    reference = turns[-1]["content"]
    if turns[-1].get("tool_calls"):
        reference = str(tokenizer.decode(list(completion), skip_special_tokens=True))
    return Example(
        prompt=prompt_ids,
        completion=(*completion, eos),
        reference=reference,
        earlier=() if loss_on == "last" else _find_earlier(template, turns, prompt, prompt_ids),
    )


@dataclass(frozen=True)
class _Template:
    """The chat template of a tokenizer, with the tools of one conversation."""

    tokenizer: PreTrainedTokenizerBase
    tools: list[Any] | None
    messages: Sequence[Message]

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template; write prompt and completion")
        text = self.tokenizer.get_chat_template(tools=self.tools)
        calls = any("tool_calls" in message for message in self.messages)
        for key, given in (("tools", self.tools), ("tool_calls", calls)):
            if given and key not in text:
                raise DataError(
                    f"the row has {key}, but the tokenizer's chat template does not render them: "
                    "use a template that does, or write prompt and completion"
                )

    def render(self, messages: Sequence[Message], *, opens_turn: bool = False) -> str:
        """Return the text of messages; ``opens_turn`` adds the beginning of an assistant's turn."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=self.tools, tokenize=False, add_generation_prompt=opens_turn
            )
        except Exception as error:  # a template is a program, which may raise any error
            raise DataError(f"the chat template refuses the conversation: {error}") from None
        return str(text)


def _find_earlier(
    template: _Template, turns: Sequence[Message], prompt: str, prompt_ids: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Return the spans of tokens in the prompt that are earlier turns of the assistant.

    A turn begins where generation would, and ends with its EOS. Where the template renders a turn
    differently once others follow, such as without its reasoning, EOS alone shows its end.
    """
    tokenizer = template.tokenizer
    if not tokenizer.is_fast:
        raise DataError("data.loss_on: all needs a fast tokenizer (tokenizer.json); use last")
    eos = eos_token(tokenizer)
    offsets = tokenizer(
        prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    starts = [start for start, _ in offsets]
    spans = []
    for i, turn in enumerate(turns[:-1]):
        if turn["role"] != "assistant":
            continue
        before, after = template.render(turns[:i], opens_turn=True), template.render(turns[: i + 1])
        ends_known = prompt.startswith(after)
        limit = len(after) if ends_known else len(prompt)
        inside = [at for at, start in enumerate(starts) if len(before) <= start < limit]
        end = next((at + 1 for at in inside if prompt_ids[at] == eos), None)
        if not prompt.startswith(before) or (end is None and not ends_known):
            raise DataError(
                f"messages[{i}]: the chat template renders this turn in another way once others "
                "follow, so its tokens cannot be told apart: set data.loss_on: last"
            )
        # Nothing predicts the first token of all.
        inside = [at for at in inside if 0 < at < (end or len(prompt_ids))]
        if inside:
            spans.append((inside[0], inside[-1] + 1))
    return tuple(spans)


def _read_message(message: Any, at: str) -> Message:
    """Return a message with role, content as one text, and other keys that are not ``None``."""
    if not isinstance(message, dict):
        raise DataError(f"{at} must be an object with role and content")
    found = {key: _drop_none(value) for key, value in message.items() if value is not None}
    if "from" in found and "role" not in found:
        check_text(found["from"], f"{at}.from")
        role = found.pop("from")
        found = {"role": _ROLES.get(role, role), "content": found.pop("value", None), **found}
        if role == "function_call":
            call = _parse(found["content"], f"{at}.value")
            found |= {"content": "", "tool_calls": [{"type": "function", "function": call}]}
    check_text(found.get("role"), f"{at}.role")
    content = found.get("content", "" if found.get("tool_calls") else None)
    if isinstance(content, list):
        content = "".join(_read_part(part, f"{at}.content[{i}]") for i, part in enumerate(content))
    check_text(content, f"{at}.content")
    found["content"] = content
    if not found.get("tool_calls"):
        found.pop("tool_calls", None)
    elif isinstance(found["tool_calls"], list):
        found["tool_calls"] = [
            _read_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(found["tool_calls"])
        ]
    return found


def _read_part(part: Any, at: str) -> str:
    """Return the text of a part of a content."""
    if isinstance(part, dict) and part.get("type", "text") == "text":
        check_text(part.get("text"), f"{at}.text")
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise DataError(f"{at} is {kind!r}: only parts of type 'text' can be trained on")


def _read_call(call: Any, at: str) -> Any:
    """Return a tool call whose arguments are an object, as templates want them, not JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments = _parse(function["arguments"], f"{at}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _read_tools(tools: Any) -> list[Any] | None:
    """Return the descriptions of tools, which may be JSON text; none as ``None``."""
    if isinstance(tools, str):
        tools = _parse(tools, "'tools'") if tools.strip() else None
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise DataError(f"'tools' must be a list of tools, it is a {type(tools).__name__}")
    return [_drop_none(tool) for tool in tools] or None


def _parse(text: Any, what: str) -> Any:
    check_text(text, what)
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{what} is not valid JSON ({error})") from None


def _drop_none(value: Any) -> Any:
    """Return a value without the keys that tables fill with ``None``."""
    if isinstance(value, Mapping):
        return {key: _drop_none(item) for key, item in value.items() if item is not None}
    return [_drop_none(item) for item in value] if isinstance(value, list) else value
