"""Rows from Parquet files and data sets, read by the packages that wrote them."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from tests.support.tiny_runs import make_tokenizer
from trainer.config.schema import DataConfig, FieldsConfig, SourceConfig, SubDatasetConfig
from trainer.data.encode import encode
from trainer.data.load import load_mixture
from trainer.data.sources import Sources
from trainer.errors import DataError

ROWS = [
    {
        "question": f"q{i}",
        "choices": {"text": ["yes", "no"], "label": ["A", "B"]},
        "key": "AB"[i % 2],
        "note": None if i else "first",
    }
    for i in range(8)
]
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "A"},
]


@pytest.fixture(autouse=True)
def _local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def table() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


@pytest.fixture
def directory(tmp_path: Path, table: datasets.Dataset) -> Path:
    """Return a data set as it lies on the hub."""
    folder = tmp_path / "set"
    folder.mkdir()
    table.to_parquet(folder / "train.parquet")
    table.select([5]).to_parquet(folder / "test.parquet")
    return folder


def test_a_parquet_file_has_its_rows(tmp_path: Path, table: datasets.Dataset) -> None:
    path = tmp_path / "a.PARQUET"
    table.to_parquet(path)
    rows = Sources().open(str(path))
    assert [rows[i] for i in range(len(rows))] == ROWS
    assert rows.place(7) == f"{path}, row 8"


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", ROWS), ("train[:3]", ROWS[:3]), ("train[75%:]", ROWS[6:]), ("test", [ROWS[5]])],
)
def test_a_data_set_is_loaded_by_its_splits_and_slices(
    directory: Path, split: str, expected: list[dict[str, object]]
) -> None:
    rows = Sources().open(SourceConfig(hub=str(directory), split=split))
    assert [rows[i] for i in range(len(rows))] == expected
    assert rows.place(0) == f"{directory} ({split}), row 1"


@pytest.mark.parametrize("whole", [True, False])
def test_datasets_saved_to_disk_are_loaded(
    tmp_path: Path, table: datasets.Dataset, *, whole: bool
) -> None:
    saved = datasets.DatasetDict(train=table, test=table.select([5])) if whole else table
    saved.save_to_disk(tmp_path / "disk")
    rows = Sources().open(SourceConfig(hub=str(tmp_path / "disk")))
    assert [rows[i] for i in range(len(rows))] == ROWS
    if whole:
        assert len(Sources().open(SourceConfig(hub=str(tmp_path / "disk"), split="test"))) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"split": "tst"}, "(tst) cannot be loaded: Unknown split"),
        ({"config": "x"}, "(x, train) cannot be loaded: BuilderConfig 'x' not found"),
        ({"hub": "no/such"}, "no/such (train) cannot be loaded: Couldn't reach 'no/such'"),
    ],
)
def test_a_missing_data_set_is_named(directory: Path, source: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        Sources().open(SourceConfig(**({"hub": str(directory)} | source)))
    assert message in str(caught.value)


def test_a_split_that_was_not_saved_is_named(tmp_path: Path, table: datasets.Dataset) -> None:
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "disk")
    with pytest.raises(DataError, match="it has no split 'dev', only train"):
        Sources().open(SourceConfig(hub=str(tmp_path / "disk"), split="dev"))


@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_a_damaged_parquet_file_is_named(
    tmp_path: Path, table: datasets.Dataset, damage: str
) -> None:
    path = tmp_path / "a.parquet"
    table.to_parquet(path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[:-20], "other": b"{}" * 40}[damage])
    with pytest.raises(DataError) as caught:
        Sources().open(str(path))
    assert str(caught.value).startswith(f"{path} is not a sound Parquet file: ")


@pytest.mark.parametrize(
    ("package", "source", "what"),
    [
        ("pyarrow", SourceConfig(file=__file__ + ".parquet"), "the Parquet file"),
        ("datasets", SourceConfig(hub="a/b"), "the data set a/b (train)"),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: SourceConfig, what: str
) -> None:
    if source.file is not None:
        path = tmp_path / "a.parquet"
        path.touch()
        source = SourceConfig(file=str(path))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError) as caught:
        Sources().open(source)
    assert what in str(caught.value)
    assert str(caught.value).endswith(
        f"needs {package}, which is not installed: pip install 'msft-store[data]'"
    )


def test_a_mixture_of_parquet_and_a_data_set(tmp_path: Path, table: datasets.Dataset) -> None:
    tokenizer = make_tokenizer()
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "disk")
    sub_dataset = SubDatasetConfig(
        train=SourceConfig(hub=str(tmp_path / "disk")),
        validation=str(tmp_path / "a.parquet"),
        fields=FieldsConfig(
            prompt="Q: {question}\noptions: {choices.text|options}\nA:", completion=" {key}"
        ),
    )
    found = load_mixture(DataConfig(sub_datasets={"a": sub_dataset}), tokenizer)["a"]
    assert found.train.examples == found.validation.examples
    example = found.train.examples[1]
    assert tokenizer.decode(list(example.prompt)) == "Q: q1\noptions: A. yes, B. no\nA:"
    assert tokenizer.decode(list(example.completion)) == " B<eos>"


def test_columns_that_a_row_leaves_empty_count_as_missing(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    rows = [
        {"messages": CHAT, "prompt": None, "completion": None, "text": None},
        {"messages": None, "prompt": "a", "completion": "b", "text": None},
        {"messages": None, "prompt": None, "completion": None, "text": "ab"},
    ]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    read = Sources().open(str(path))
    plain = [{"messages": CHAT}, {"prompt": "a", "completion": "b"}, {"text": "ab"}]
    assert [encode(read[i], tokenizer) for i in range(3)] == [encode(r, tokenizer) for r in plain]
