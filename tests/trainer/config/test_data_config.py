"""The data section of a configuration: the sources that it names, and invalid sections."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from trainer.config.load import dump, load_config
from trainer.config.schema import Config, FieldsConfig, SourceConfig
from trainer.errors import ConfigError

ROWS = [
    {"input": "1?", "answer": "1", "category": "org/a"},
    {"input": "2?", "answer": "2", "category": "b & c"},
]
MIXTURE = {"train": "mix.json", "validation": "mix.json"}
FILES = {"train": "a.jsonl", "validation": "b.parquet"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.parquet").touch()
    (tmp_path / "set").mkdir()
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    mixture = {"train": ROWS, "validation": ROWS, "half": ROWS[:1]}
    (tmp_path / "mix.json").write_text(json.dumps(mixture), encoding="utf-8")
    return tmp_path


def load(folder: Path, **data: object) -> Config:
    tree = {
        "output_dir": "out",
        "model": {"path": "org/model"},
        "evaluation": {"metric": "loss"},
        "data": data,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_config(path)


def refusal(folder: Path, **data: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, **data)
    return str(caught.value).removeprefix(f"{folder / 'run.yaml'}: ")


def reload(config: Config, folder: Path) -> Config:
    (folder / "sub").mkdir()
    path = folder / "sub" / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    return load_config(path)


def test_a_source_is_a_path_or_a_mapping(folder: Path) -> None:
    files = {
        "train": {"hub": "org/set", "config": "main", "split": "train[:90%]"},
        "validation": {"hub": "set", "revision": "abc"},
        "test": "b.parquet",
        "fields": {"prompt": "{q}", "completion": "{a|letter}"},
    }
    config = load(folder, sub_datasets={"a": files})
    found = config.data.sub_datasets["a"]
    assert found.train == SourceConfig(hub="org/set", config="main", split="train[:90%]")
    assert found.validation == SourceConfig(hub=str(folder / "set"), revision="abc")
    assert found.test == str(folder / "b.parquet")
    assert found.fields == FieldsConfig(prompt="{q}", completion="{a|letter}")
    assert reload(config, folder) == config


def test_a_mixture_file_is_spelled_out_by_category(folder: Path) -> None:
    test = {"file": "mix.json", "part": "validation"}
    config = load(folder, mixture={"train": "mix.json", "test": test}, validation_share=0.1)
    assert list(config.data.sub_datasets) == ["b_c", "org_a"]
    assert config.data.mixture is None
    found = config.data.sub_datasets["b_c"]
    file = str(folder / "mix.json")
    assert found.train == SourceConfig(file=file, category="b & c", part="train")
    assert found.validation is None
    assert found.test == SourceConfig(file=file, category="b & c", part="validation")
    assert reload(config, folder) == config


def test_a_mixture_file_may_be_one_list_of_rows(folder: Path) -> None:
    config = load(folder, mixture={"train": "rows.json", "validation": "rows.json"})
    assert list(config.data.sub_datasets) == ["b_c", "org_a"]


def test_one_category_alone_is_of_the_part_of_its_split(folder: Path) -> None:
    source = {"file": "mix.json", "category": "org/a"}
    config = load(folder, sub_datasets={"a": {"train": source, "validation": source}})
    found = config.data.sub_datasets["a"]
    assert isinstance(found.train, SourceConfig)
    assert isinstance(found.validation, SourceConfig)
    assert (found.train.part, found.validation.part) == ("train", "validation")


def test_a_validation_share_makes_validation_files_unnecessary(folder: Path) -> None:
    (folder / "x.train.jsonl").touch()
    config = load(folder, directory=".", validation_share=0.2)
    assert config.data.sub_datasets["x"].validation is None


def files_with(**changes: object) -> dict[str, object]:
    return {"sub_datasets": {"a": FILES | changes}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"sub_datasets": {"a": {"train": "a.jsonl"}}},
            "data.sub_datasets.a.validation is missing: peaks are found on validation data; name a "
            "source, or set data.validation_share",
        ),
        (
            {"directory": ".", "mixture": MIXTURE},
            "data.directory and data.mixture exclude each other",
        ),
        (files_with(train={}), "data.sub_datasets.a.train must have either 'file' or 'hub'"),
        (
            files_with(train={"file": "a.jsonl", "hub": "a/b"}),
            "data.sub_datasets.a.train must have either 'file' or 'hub'",
        ),
        (
            files_with(test={"file": "a.jsonl", "split": "test"}),
            "data.sub_datasets.a.test: config, split and revision go with 'hub'",
        ),
        (
            files_with(test={"file": "a.jsonl", "part": "x"}),
            "data.sub_datasets.a.test: 'part' goes with 'category'",
        ),
        (
            files_with(test={"hub": "a/b", "category": "x"}),
            "data.sub_datasets.a.test: category and part go with 'file'",
        ),
        (
            files_with(test={"hub": "a/b/c"}),
            "data.sub_datasets.a.test.hub: 'a/b/c' is neither a directory nor an id",
        ),
        (files_with(test={"fil": "a"}), "unknown key 'data.sub_datasets.a.test.fil'; did you mean"),
        (files_with(test={"file": "no.jsonl"}), "data.sub_datasets.a.test: there is no file "),
        (files_with(test=3), "data.sub_datasets.a.test must be a string, got 3"),
        (
            files_with(fields={"prompt": "{a}"}),
            "data.sub_datasets.a.fields must have prompt and completion, or text or messages alone",
        ),
        (
            files_with(fields={"text": "{a}", "prompt": "a", "completion": "b"}),
            "data.sub_datasets.a.fields must have prompt and completion, or text or messages alone",
        ),
        (
            files_with(fields={"text": "{a|letters}"}),
            "data.sub_datasets.a.fields.text: {a|letters}: there is no filter 'letters'",
        ),
        (
            {"mixture": {"train": "mix.json", "validation": {"hub": "a/b"}}},
            "data.mixture.validation must be a mixture file",
        ),
        ({"mixture": {"train": "no.json"}}, "data.mixture.train: "),
        ({"mixture": {"train": "a.jsonl"}}, "data.mixture.train: "),
        (
            {"mixture": {"train": {"file": "mix.json", "part": "dev"}}},
            "data.mixture.train: ",
        ),
        (
            {"mixture": MIXTURE | {"validation": {"file": "mix.json", "part": "half"}}},
            "data.mixture.validation: ",
        ),
        (
            {"directory": ".", "sampling": "temperature"},
            "data.temperature belongs to data.sampling=temperature: give both or neither",
        ),
        (
            {"directory": ".", "temperature": 2},
            "data.temperature belongs to data.sampling=temperature: give both or neither",
        ),
        (
            {"directory": ".", "sampling": "temperature", "temperature": 0},
            "data.temperature must be above 0, or null, got 0.0",
        ),
        (
            {"directory": ".", "sampling": "euqal"},
            "data.sampling must be one of proportional, equal, temperature, got 'euqal'; did you "
            "mean 'equal'?",
        ),
        (
            {"directory": ".", "validation_share": 1},
            "data.validation_share must be above 0 and below 1, or null for none, got 1.0",
        ),
        ({"directory": ".", "max_examples": 0}, "data.max_examples must be at least 1, or null"),
        ({"directory": ".", "seed": -1}, "data.seed must be from 0 to 2**32 - 1, got -1"),
    ],
)
def test_an_invalid_data_section_is_refused_with_this_message(
    folder: Path, data: dict[str, object], message: str
) -> None:
    (folder / "x.train.jsonl").touch()
    (folder / "x.validation.jsonl").touch()
    assert refusal(folder, **data).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "mix.json is not valid JSON"),
        ('{"train": 3}', "'train' must be a list of rows, not a int"),
        ('{"test": []}', "mix.json has no part 'train', only test"),
        ("[3]", "mix.json, row 1 of 'train': it must be an object with a 'category'"),
        (
            '[{"category": "a"}, {"category": 1}]',
            "mix.json, row 2 of 'train': it must be an object",
        ),
        ('[{"category": "a/b"}, {"category": "a b"}]', "would both be named 'a_b'; rename one"),
        ('[{"category": "/"}]', "the category '/' has no letter or digit"),
        ("[]", "data.mixture.train has no rows"),
    ],
)
def test_a_bad_mixture_file_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "mix.json").write_text(text, encoding="utf-8")
    assert message in refusal(folder, mixture={"train": "mix.json"}, validation_share=0.1)


def test_a_category_without_validation_rows_is_named(folder: Path) -> None:
    half = {"file": "mix.json", "part": "half"}
    assert refusal(folder, mixture={"train": "mix.json", "validation": half}) == (
        f"data.mixture.validation: {folder / 'mix.json'} has no row of category 'b & c', which the "
        "training data has"
    )


def test_exact_match_on_a_mixture_file_needs_its_pattern(folder: Path) -> None:
    path = folder / "run.yaml"
    load(folder, mixture=MIXTURE)
    with pytest.raises(ConfigError, match=r"follow '####': set evaluation\.answer_pattern"):
        load_config(path, ["evaluation.metric=exact_match"])
    pattern = r"evaluation.answer_pattern='####\s*(.*)'"
    assert load_config(path, ["evaluation.metric=exact_match", pattern])
