"""Loading a mixture: all examples, a seeded sample, and a split for validation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.support.tiny_runs import load_split, make_config, make_tokenizer, write_lines
from trainer.config.schema import DataConfig, FieldsConfig, SubDatasetConfig
from trainer.data.load import load_mixture
from trainer.errors import ConfigError, DataError
from trainer.report.report import write_report
from trainer.training.run import start

TOKENIZER = make_tokenizer()


def make_data_config(tmp_path, *, count: int = 40, **settings) -> DataConfig:
    rows = [{"prompt": f"{i}=", "completion": str(i)} for i in range(count)]
    train = str(write_lines(tmp_path / "a.jsonl", rows))
    return DataConfig(sub_datasets={"a": SubDatasetConfig(train=train)}, **settings)


def references(split) -> list[int]:
    return [int(example.reference) for example in split.examples]


@pytest.mark.parametrize(
    ("count", "share", "most", "expected"),
    [
        (40, 0.25, None, (30, 10)),
        (40, 0.25, 20, (20, 5)),
        (22, 0.25, 20, (17, 5)),
        (10, 0.25, 20, (8, 2)),
        (3, 0.01, None, (2, 1)),
        (40, 0.9, 40, (4, 36)),
    ],
)
def test_a_share_is_split_off_and_a_number_is_sampled(tmp_path, count, share, most, expected):
    config = make_data_config(tmp_path, count=count, validation_share=share, max_examples=most)
    found = load_mixture(config, TOKENIZER)["a"]
    chosen, held_out = references(found.train), references(found.validation)
    assert (len(chosen), len(held_out)) == expected
    assert found.set_aside == len(held_out)
    assert set(chosen).isdisjoint(held_out)
    assert chosen == sorted(chosen)
    assert held_out == sorted(held_out)


def test_the_choice_depends_on_the_seed_and_the_name_alone(tmp_path):
    config = make_data_config(tmp_path, validation_share=0.25, max_examples=20)
    first = load_mixture(config, TOKENIZER)
    assert load_mixture(config, TOKENIZER) == first
    assert load_mixture(replace(config, seed=1), TOKENIZER) != first
    files = config.sub_datasets["a"]
    both = load_mixture(replace(config, sub_datasets={"a": files, "b": files}), TOKENIZER)
    assert both["a"] == first["a"]
    assert references(both["b"].train) != references(both["a"].train)


def test_the_validation_split_stays_the_same_when_fewer_examples_are_evaluated(tmp_path):
    config = make_data_config(tmp_path, validation_share=0.25)
    whole = load_mixture(config, TOKENIZER)["a"]
    fewer = load_mixture(config, TOKENIZER, max_validation=3)["a"]
    assert fewer.train == whole.train
    assert fewer.validation.examples == whole.validation.examples[:3]
    assert fewer.set_aside == 10


def test_examples_that_are_too_long_are_replaced_by_others(tmp_path):
    config = make_data_config(tmp_path, count=100, max_examples=8, max_length=4)
    data = replace(config, sub_datasets={"a": replace(config.sub_datasets["a"])})
    files = replace(data.sub_datasets["a"], validation=data.sub_datasets["a"].train)
    found = load_mixture(replace(data, sub_datasets={"a": files}), TOKENIZER)["a"]
    assert len(found.train.examples) == 8
    assert all(reference < 10 for reference in references(found.train))
    assert found.train.too_long > 0


def test_too_few_examples_for_a_validation_split_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"'a', train: .*has 1 usable examples: too few"):
        load_mixture(make_data_config(tmp_path, count=1, validation_share=0.5), TOKENIZER)


def test_fields_make_examples_of_columns(tmp_path):
    rows = [{"q": "1+1", "a": 2}, {"q": "1+2", "a": 3}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    fields = FieldsConfig(prompt="{q}=", completion="{a}")
    examples = load_split(path, TOKENIZER, max_length=9, fields=fields).examples
    assert [TOKENIZER.decode(list(example.prompt)) for example in examples] == ["1+1=", "1+2="]
    assert [example.reference for example in examples] == ["2", "3"]


def test_a_row_without_a_templates_column_is_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"q": "1", "a": 2}, {"q": "2", "b": 2}])
    with pytest.raises(DataError) as caught:
        load_split(path, TOKENIZER, max_length=9, fields=FieldsConfig(text="{q}{a}"))
    message = f"{path}, line 2: there is no 'a'; the row has the columns q, b"
    assert str(caught.value) == f"sub-dataset 'a', train: {message}"


def released(tmp_path):
    """Write a mixture file in the form of the released code; return its path."""
    sums = [
        {
            "input": [{"role": "user", "content": f" {a}+{b}? "}],
            "output": f"{a}+{b}={a + b}\n#### {a + b}",
            "answer": str(a + b),
            "category": "org/sums/main",
        }
        for a in range(5)
        for b in range(4)
    ]
    facts = [
        {"input": f"{i}?", "output": None, "answer": "ok", "category": "facts"} for i in range(20)
    ]
    path = tmp_path / "mix.json"
    path.write_text(
        json.dumps({"train": sums[4:] + facts[4:], "validation": facts[:4] + sums[:4]}),
        encoding="utf-8",
    )
    return path


def test_a_mixture_file_is_read_as_it_is(tmp_path):
    path = released(tmp_path)
    config = make_config(
        tmp_path,
        data__directory=None,
        data__mixture={"train": "mix.json", "validation": "mix.json"},
        data__max_length=60,
        evaluation__metric="exact_match",
        evaluation__answer_pattern=r"####\s*([^\n]*?)\.?\s*(?:\n|$)",
    )
    mixture = load_mixture(config.data, TOKENIZER)
    assert list(mixture) == ["facts", "org_sums_main"]
    assert [len(sub.train.examples) for sub in mixture.values()] == [16, 16]
    assert [len(sub.validation.examples) for sub in mixture.values()] == [4, 4]
    example = mixture["org_sums_main"].validation.examples[1]
    assert TOKENIZER.decode(list(example.prompt)) == "Q: 0+1?\nA:"
    assert TOKENIZER.decode(list(example.completion)) == " 0+1=1\n#### 1<eos>"
    assert example.reference == "#### 1"
    example = mixture["facts"].train.examples[0]
    assert TOKENIZER.decode(list(example.completion)) == " #### ok<eos>"
    assert config.data.sub_datasets["facts"].train.file == str(path)


def test_a_bad_row_of_a_mixture_file_is_named(tmp_path):
    path = released(tmp_path)
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["train"][17]["answer"] = 3
    path.write_text(json.dumps(tree), encoding="utf-8")
    config = make_config(
        tmp_path,
        data__directory=None,
        data__mixture={"train": "mix.json", "validation": "mix.json"},
    )
    with pytest.raises(DataError) as caught:
        load_mixture(config.data, TOKENIZER)
    assert str(caught.value) == (
        f"sub-dataset 'facts', train: {path}, row 18: 'answer' must be a string that is not empty"
    )


def test_a_run_reports_its_validation_split_and_text_has_a_loss_only(tmp_path):
    lines = [{"text": f"{a}{b}{a}{b}"} for a in "abcdefgh" for b in "xyz"]
    write_lines(tmp_path / "texts" / "t.train.jsonl", lines)
    settings = {"data__directory": "texts", "data__validation_share": 0.25}
    config = make_config(tmp_path, msft__compute_budget=0.5, msft__max_stages=1, **settings)
    start(config)
    report = write_report(config.output_dir)
    assert report is not None
    journal = (tmp_path / "run" / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    sizes = json.loads(journal[0])["sub_datasets"]["t"]
    assert (sizes["train"], sizes["validation"], sizes["set_aside"]) == (18, 6, 6)
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "set aside for validation" in text
    exact = make_config(tmp_path, output_dir="other", evaluation__metric="exact_match", **settings)
    with pytest.raises(ConfigError, match="rows of 'text' have no answer to match"):
        start(exact)
