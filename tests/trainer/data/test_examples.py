"""Examples are tokenized with a clear boundary, and bad files are named to the line."""

from __future__ import annotations

import pytest

from tests.support.tiny_runs import load_split, make_tokenizer, write_lines
from trainer.config.schema import DataConfig, SubDatasetConfig
from trainer.data.encode import encode
from trainer.data.load import load_mixture
from trainer.data.tokens import bos_prefix
from trainer.errors import DataError
from trainer.model.forward import IGNORED, collate

TOKENIZER = make_tokenizer()
GOOD = {"prompt": "1+1=", "completion": "2"}


def test_prompt_and_completion_meet_at_the_boundary_and_end_with_eos():
    example = encode(GOOD, TOKENIZER)
    assert TOKENIZER.decode(list(example.prompt)) == "1+1="
    assert TOKENIZER.decode(list(example.completion)) == "2<eos>"
    assert example.reference == "2"


def test_bos_is_added_only_where_the_tokenizer_adds_it():
    with_bos = make_tokenizer(bos=True)
    example = encode(GOOD, with_bos, bos_prefix(with_bos))
    assert example.prompt[0] == with_bos.bos_token_id
    assert with_bos.bos_token_id not in example.prompt[1:] + example.completion
    assert bos_prefix(TOKENIZER) == ()


def test_messages_are_rendered_and_only_the_last_turn_is_the_completion():
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "B"},
    ]
    example = encode({"messages": messages}, TOKENIZER)
    assert TOKENIZER.decode(list(example.prompt)) == (
        "<|user|>hi<|assistant|>A<eos>\n<|user|>more<|assistant|>"
    )
    assert TOKENIZER.decode(list(example.completion)) == "B<eos>"
    assert example.reference == "B"


def test_labels_cover_the_completion_only():
    short, long = (
        encode(GOOD, TOKENIZER),
        encode({"prompt": "a", "completion": "bcdefgh"}, TOKENIZER),
    )
    batch = collate([short, long], pad_token_id=1)
    assert batch.input_ids.shape == batch.labels.shape == (2, len(long))
    assert batch.labels[0].tolist() == [IGNORED] * 4 + [*short.completion] + [IGNORED] * 3
    assert batch.input_ids[0].tolist() == [*short.prompt, *short.completion, 1, 1, 1]
    assert batch.labels[1].tolist() == [IGNORED, *long.completion]


def test_a_long_example_is_dropped_and_counted(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [GOOD, {"prompt": "x" * 9, "completion": "y"}, GOOD])
    split = load_split(path, TOKENIZER, max_length=10)
    assert (len(split.examples), split.too_long) == (2, 1)
    assert len(load_split(path, TOKENIZER, max_length=11).examples) == 3


def test_a_limit_takes_the_first_usable_examples(tmp_path):
    records = [{"prompt": str(i), "completion": str(i)} for i in range(5)]
    path = write_lines(tmp_path / "a.jsonl", ["", *records])
    split = load_split(path, TOKENIZER, max_length=10, limit=2)
    assert [example.reference for example in split.examples] == ["0", "1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: a line must be a JSON object, this one is a list"),
        ('{"prompt": "a"}', "line 2: 'completion' is missing"),
        ('{"prompt": "a", "completion": 2}', "line 2: 'completion' must be a string, it is a int"),
        ('{"prompt": "", "completion": "b"}', "line 2: the prompt is empty"),
        ('{"prompt": "a", "completion": "\\ud800"}', "line 2: 'completion' has a lone surrogate"),
        ('{"messages": []}', "line 2: 'messages' must be a list of at least two"),
        ('{"messages": [1, 2]}', "line 2: messages[0] must be an object"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
            "line 2: the last message must be the assistant's",
        ),
        (
            '{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}',
            "line 2: messages[0].content must be a string, it is missing",
        ),
        ('{"messages": [], "prompt": "a"}', "line 2: it has both"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "bad.jsonl", [GOOD, line])
    with pytest.raises(DataError) as caught:
        load_split(path, TOKENIZER, max_length=50)
    assert f"{path}, {message}" in str(caught.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        load_split(path, TOKENIZER, max_length=50)


@pytest.mark.parametrize(
    ("lines", "max_length", "message"),
    [([], 9, "no usable example: it has no rows"), ([GOOD], 3, "all 1 examples have more than")],
)
def test_a_file_without_a_usable_example_is_an_error(tmp_path, lines, max_length, message):
    path = write_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(DataError, match=message):
        load_split(path, TOKENIZER, max_length=max_length)


def test_a_mixture_is_sorted_and_names_the_sub_dataset_in_errors(tmp_path):
    good = str(write_lines(tmp_path / "good.jsonl", [GOOD, GOOD]))
    files = SubDatasetConfig(train=good, validation=good)
    mixture = load_mixture(
        DataConfig(sub_datasets={"b": files, "a": files}), TOKENIZER, max_validation=1
    )
    assert list(mixture) == ["a", "b"]
    assert len(mixture["a"].train.examples) == 2
    assert len(mixture["a"].validation.examples) == 1
    assert mixture["a"].test is None
    broken = SubDatasetConfig(train=good, validation=str(tmp_path / "gone.jsonl"))
    with pytest.raises(
        DataError, match=r"sub-dataset 'c', validation: .*gone\.jsonl does not exist"
    ):
        load_mixture(DataConfig(sub_datasets={"c": broken}), TOKENIZER)
