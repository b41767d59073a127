"""Conversations: the turns that have a loss, tools, parts of content, and rows of other shapes."""

from __future__ import annotations

import json

import pytest

from tests.support.tiny_runs import load_split, make_config, make_tokenizer, write_lines
from trainer.config.load import load_config
from trainer.config.schema import DataConfig, FieldsConfig, SubDatasetConfig
from trainer.data.encode import encode
from trainer.data.load import load_mixture
from trainer.errors import ConfigError, DataError
from trainer.model.forward import IGNORED, collate
from trainer.training.run import start

TOKENIZER = make_tokenizer()
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "BC"},
]
TOOLS_TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t | tojson }}{% endfor %}]{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}"
    "{% if m.role == 'assistant' %}END{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def trained_text(example) -> str:
    """Return the tokens with a loss as text, with a bar at each gap."""
    labels = collate([example], pad_token_id=1).labels[0].tolist()
    words, inside = [], False
    for label in labels:
        if label != IGNORED:
            words += ["|"] * (not inside) + [TOKENIZER.decode([label])]
        inside = label != IGNORED
    return "".join(words)


def with_template(template: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_all_turns_of_the_assistant_have_a_loss_on_the_same_tokens():
    last, every = (encode({"messages": CHAT}, TOKENIZER, loss_on=on) for on in ("last", "all"))
    assert (last.prompt, last.completion) == (every.prompt, every.completion)
    assert trained_text(last) == "|BC<eos>"
    assert trained_text(every) == "|A<eos>|BC<eos>"
    assert (last.targets, every.targets) == (3, 5)
    assert every.reference == "BC"


def test_a_turn_that_is_rendered_differently_later_ends_with_its_eos():
    marked = with_template(THINKING_TEMPLATE.replace("END", "{{ eos_token }}"))
    example = encode({"messages": CHAT}, marked, loss_on="all")
    assert trained_text(example) == "|A<eos>|<think></think>BC<eos>"
    with pytest.raises(DataError, match=r"messages\[2\]: .* set data.loss_on: last"):
        encode({"messages": CHAT}, with_template(THINKING_TEMPLATE), loss_on="all")


def test_a_prompt_and_a_completion_of_messages_are_one_conversation():
    row = {"prompt": CHAT[:-1], "completion": CHAT[-1:]}
    assert encode(row, TOKENIZER) == encode({"messages": CHAT}, TOKENIZER)


def test_parts_of_text_are_joined_and_other_parts_are_refused():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    row = {"messages": [CHAT[0], {"role": "user", "content": parts}, *CHAT[2:]]}
    assert encode(row, TOKENIZER) == encode({"messages": CHAT}, TOKENIZER)
    parts[1] = {"type": "image", "image": "a.png"}
    with pytest.raises(DataError, match=r"messages\[1\]\.content\[1\] is 'image': only parts of"):
        encode(row, TOKENIZER)


def test_tools_and_their_calls_are_rendered():
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "tools": json.dumps([{"name": "add", "parameters": None}]),
        "messages": [
            {"role": "user", "content": "sum", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "one"},
        ],
    }
    tokenizer = with_template(TOOLS_TEMPLATE)
    example = encode(row, tokenizer, loss_on="all")
    prompt = tokenizer.decode(list(example.prompt))
    assert prompt.startswith('[{"name": "add"}]<|user|>sum<|assistant|><call>add{"a": 1}<eos>')
    assert trained_text(example) == '|<call>add{"a": 1}<eos>|one<eos>'
    calling = encode({**row, "messages": row["messages"][:2]}, tokenizer)
    assert calling.reference == '<call>add{"a": 1}'
    with pytest.raises(DataError, match="the row has tools, but the tokenizer's chat template"):
        encode(row, TOKENIZER)
    with pytest.raises(DataError, match="the row has tool_calls, but the tokenizer's"):
        encode({"messages": row["messages"]}, TOKENIZER)


def test_a_fields_line_reads_sharegpt(tmp_path):
    roles = {"user": "human", "assistant": "gpt"}
    turns = [{"from": roles.get(m["role"], m["role"]), "value": m["content"]} for m in CHAT]
    path = write_lines(tmp_path / "a.jsonl", [{"id": 1, "conversations": turns}])
    with pytest.raises(DataError) as caught:
        load_split(path, TOKENIZER, max_length=99)
    assert str(caught.value).endswith("reads them: fields: {messages: conversations}")
    fields = FieldsConfig(messages="conversations")
    (example,) = load_split(path, TOKENIZER, max_length=99, fields=fields).examples
    assert example == encode({"messages": CHAT}, TOKENIZER)
    with pytest.raises(DataError, match="line 1: there is no 'turns'; the row has the columns id"):
        load_split(path, TOKENIZER, max_length=99, fields=FieldsConfig(messages="turns"))


def test_sharegpt_calls_of_tools_are_read():
    turns = [
        {"from": "human", "value": "sum"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "one"},
    ]
    example = encode({"messages": turns}, with_template(TOOLS_TEMPLATE), loss_on="all")
    assert trained_text(example) == '|<call>add{"a": 1}<eos>|one<eos>'


def test_the_fields_line_of_an_error_reads_alpaca(tmp_path):
    rows = [{"instruction": "add", "input": "1 1", "output": "2"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_split(path, TOKENIZER, max_length=99)
    line = str(caught.value).rpartition("fields: ")[2]
    (tmp_path / "config.yaml").write_text(
        "output_dir: x\nmodel: {path: a/b}\n"
        f"data: {{sub_datasets: {{a: {{train: a.jsonl, validation: a.jsonl, fields: {line}}}}}}}\n"
    )
    fields = load_config(tmp_path / "config.yaml").data.sub_datasets["a"].fields
    (example,) = load_split(path, TOKENIZER, max_length=99, fields=fields).examples
    assert TOKENIZER.decode(list(example.prompt)) == "add\n1 1\n"
    assert example.reference == "2"


def test_a_column_of_messages_is_a_name_and_stands_alone(tmp_path):
    for fields, message in (
        ({"messages": "{turns}"}, "is the name of a column, without braces"),
        ({"messages": "turns", "text": "{a}"}, "or text or messages alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config(
                tmp_path,
                data={
                    "sub_datasets": {
                        "copy": {
                            "train": "data/copy.train.jsonl",
                            "validation": "data/copy.validation.jsonl",
                            "fields": fields,
                        }
                    }
                },
            )


def load_cut(path, max_length: int, **settings):
    files = SubDatasetConfig(train=str(path), validation=str(path))
    data = DataConfig(
        sub_datasets={"a": files}, max_length=max_length, over_length="truncate", **settings
    )
    return load_mixture(data, TOKENIZER)["a"].train


def test_long_examples_are_cut_and_dropped_without_a_token_to_learn(tmp_path):
    rows = [
        {"prompt": "12", "completion": "345"},
        {"prompt": "1", "completion": "2"},
        {"prompt": "12345", "completion": "6"},
    ]
    split = load_cut(write_lines(tmp_path / "a.jsonl", rows), 4)
    assert (split.cut, split.too_long, len(split.examples)) == (1, 1, 2)
    first = split.examples[0]
    assert TOKENIZER.decode(list(first.prompt + first.completion)) == "1234"
    assert first.reference == "345"


def test_a_conversation_is_cut_to_its_last_turn_that_fits_in_part(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CHAT}])
    whole = encode({"messages": CHAT}, TOKENIZER, loss_on="all")
    start = whole.earlier[0][0]
    (one,) = load_cut(path, start + 1, loss_on="all").examples
    assert (one.prompt, one.completion) == (whole.prompt[:start], whole.prompt[start : start + 1])
    assert (one.reference, one.earlier) == ("A", ())
    with pytest.raises(DataError, match="all 1 examples have more than"):
        load_cut(path, start, loss_on="all")


def test_the_first_damaged_line_is_named_in_any_order(tmp_path):
    rows = [{"prompt": str(i), "completion": "x"} for i in range(30)]
    for damaged in (21, 8, 27):
        rows[damaged] = {"prompt": str(damaged)}
    path = write_lines(tmp_path / "a.jsonl", rows)
    data = DataConfig(sub_datasets={"a": SubDatasetConfig(train=str(path))}, validation_share=0.5)
    for seed in range(3):
        with pytest.raises(DataError, match=r"a\.jsonl, line 9: 'completion' is missing"):
            load_mixture(DataConfig(**{**vars(data), "seed": seed}), TOKENIZER)


def test_a_run_trains_and_evaluates_on_all_turns(tmp_path):
    config = make_config(tmp_path, data__max_length=96, msft__compute_budget=0.5, method="sft")
    for name in ("copy", "same", "sum"):
        for split in ("train", "validation", "test"):
            write_lines(tmp_path / f"data/{name}.{split}.jsonl", [{"messages": CHAT}] * 4)
    counts = {}
    for on in ("last", "all"):
        made = load_config(
            tmp_path / "config.yaml",
            [f"data.loss_on={on}", f"output_dir={tmp_path / on}", "evaluation.metric=exact_match"],
        )
        start(made)
        lines = (tmp_path / on / "journal.jsonl").read_text().splitlines()
        counts[on] = sum(json.loads(line).get("target_tokens", 0) for line in lines)
    assert config.data.loss_on == "last"
    assert counts["all"] * 3 == counts["last"] * 5
