"""Configurations: valid ones load, and invalid ones are refused with a clear message."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from trainer.config.checks import to_bytes
from trainer.config.load import dump, list_keys, load_config, to_dict
from trainer.config.other_names import ABSENT, OTHER_NAMES, find_other_name
from trainer.config.schema import Config
from trainer.errors import ConfigError

MINIMAL = """\
output_dir: runs/a
model: {path: org/model}
data:
  sub_datasets:
    arith: {train: arith.train.jsonl, validation: arith.validation.jsonl}
    dates:
      train: dates.train.jsonl
      validation: dates.validation.jsonl
      test: dates.test.jsonl
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("arith", "dates"):
        for part in ("train", "validation", "test"):
            (tmp_path / f"{name}.{part}.jsonl").touch()
    return tmp_path


def load(folder: Path, text: str = MINIMAL, *overrides: str) -> Config:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(folder: Path, text: str = MINIMAL, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'run.yaml'}: ")
    return message.removeprefix(f"{folder / 'run.yaml'}: ")


def test_a_minimal_file_gives_the_papers_settings_and_absolute_paths(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load(folder)
    assert (config.train.lr, config.train.batch_size, config.model.dtype) == (1e-5, 64, "bfloat16")
    assert config.data.sub_datasets["arith"].train == str(folder / "arith.train.jsonl")
    assert config.data.sub_datasets["arith"].test is None
    assert config.data.sub_datasets["dates"].test == str(folder / "dates.test.jsonl")
    assert config.output_dir == str(elsewhere / "runs" / "a")
    assert config.model.path == "org/model"


def test_a_model_directory_beside_the_file_becomes_an_absolute_path(folder: Path) -> None:
    (folder / "base").mkdir()
    assert load(folder, MINIMAL, "model.path=base").model.path == str(folder / "base")


def test_a_model_path_that_is_no_directory_and_no_hub_id_is_refused(folder: Path) -> None:
    message = refusal(folder, MINIMAL, "model.path=./missing")
    assert message.startswith(f"model.path: there is no directory {folder / 'missing'}; relative")


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("train.lr=1e-5", 1e-5),
        ("train.lr=3E-4", 3e-4),
        ("train.lr=.5e-3", 5e-4),
        ("train.lr=1", 1.0),
    ],
)
def test_overrides_read_numbers_as_people_write_them(
    folder: Path, assignment: str, expected: float
) -> None:
    lr = load(folder, MINIMAL, assignment).train.lr
    assert lr == expected
    assert type(lr) is float


def test_overrides_reach_every_kind_of_value(folder: Path) -> None:
    config = load(
        folder,
        MINIMAL,
        "method=sft",
        "train.betas=[0.8, 0.99]",
        "train.max_grad_norm=null",
        "model.gradient_checkpointing=true",
        r"evaluation.answer_pattern='= (\d+)'",
        "msft.peak_window=2",
        "data.sub_datasets.arith.train=dates.train.jsonl",
    )
    assert config.method == "sft"
    assert config.train.betas == (0.8, 0.99)
    assert config.model.gradient_checkpointing is True
    assert config.evaluation.answer_pattern == r"= (\d+)"
    assert config.msft.peak_window == 2
    assert config.data.sub_datasets["arith"].train == str(folder / "dates.train.jsonl")


def test_the_last_of_two_overrides_counts(folder: Path) -> None:
    assert load(folder, MINIMAL, "seed=1", "seed=2").seed == 2


def test_dump_loads_to_the_same_configuration_from_anywhere(folder: Path) -> None:
    config = load(folder, MINIMAL, "train.lr=1e-5", "evaluation.answer_pattern='(1e-5)'")
    other = folder / "run" / "config.yaml"
    other.parent.mkdir()
    other.write_text(dump(config), encoding="utf-8")
    assert load_config(other) == config


def test_a_string_that_looks_like_a_number_survives_a_dump(folder: Path) -> None:
    config = load(folder, MINIMAL, "output_dir='1e-5'")
    tree = to_dict(config) | {"output_dir": "1e-5"}
    path = folder / "again.yaml"
    path.write_text(dump(dataclasses.replace(config, output_dir="1e-5")), encoding="utf-8")
    assert load_config(path).output_dir.endswith("1e-5")
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["output_dir"] == tree["output_dir"]


def test_replace_makes_the_configuration_of_the_method_compared_with(folder: Path) -> None:
    config = load(folder)
    other = dataclasses.replace(config, method="sft", output_dir="elsewhere")
    assert (other.method, other.train) == ("sft", config.train)


def test_a_directory_stands_for_all_sub_datasets_in_it(folder: Path) -> None:
    (folder / "dates.test.jsonl").unlink()
    text = "output_dir: a\nmodel: {path: m}\ndata: {directory: .}\n"
    config = load(folder, text)
    assert sorted(config.data.sub_datasets) == ["arith", "dates"]
    assert config.data.directory is None
    assert config.data.sub_datasets["arith"].test == str(folder / "arith.test.jsonl")
    assert config.data.sub_datasets["dates"].test is None


def test_a_directory_without_validation_data_is_refused(folder: Path) -> None:
    (folder / "dates.validation.jsonl").unlink()
    message = refusal(folder, "output_dir: a\nmodel: {path: m}\ndata: {directory: .}\n")
    assert message.startswith("data.sub_datasets.dates.validation: there is no file ")


def test_a_directory_without_sub_datasets_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    message = refusal(folder, "output_dir: a\nmodel: {path: m}\ndata: {directory: empty}\n")
    assert "no file in" in message
    assert "NAME.train.jsonl" in message


def test_a_directory_that_is_missing_is_refused(folder: Path) -> None:
    message = refusal(folder, "output_dir: a\nmodel: {path: m}\ndata: {directory: nope}\n")
    place = "relative paths are taken from the folder of the configuration file"
    assert message == f"data.directory: there is no directory {folder / 'nope'}; {place}"
    for source in ("mixture: {train: nope.json}", "sub_datasets: {a: {train: nope}}"):
        data = f"data: {{{source}, validation_share: 0.1}}"
        assert refusal(folder, f"output_dir: a\nmodel: {{path: m}}\n{data}\n").endswith(place)


def test_directory_and_sub_datasets_exclude_each_other(folder: Path) -> None:
    assert "exclude each other" in refusal(folder, MINIMAL, "data.directory=.")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.lrr=1", "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        ("train.learning_rate=1", "unknown key 'train.learning_rate'; did you mean 'train.lr'?"),
        ("learning_rate=1", "unknown key 'learning_rate'; did you mean 'train.lr'?"),
        (
            "train.epochs=3",
            "unknown key 'train.epochs'; did you mean 'msft.compute_budget' (the epochs of one "
            "roll-out, 1 being the active mixture once)?",
        ),
        ("sede=1", "unknown key 'sede'; did you mean 'seed'?"),
        ("eval_every=1", "unknown key 'eval_every'; did you mean 'evaluation.eval_every'?"),
        (
            "data.sub_datasets.arith.tran=x",
            "unknown key 'data.sub_datasets.arith.tran'; "
            "did you mean 'data.sub_datasets.arith.train'?",
        ),
        (
            "method=msff",
            "method must be one of msft, online, sft, continual, single_rollout, ies, dynamix, got "
            "'msff'; did you mean 'msft'?",
        ),
        ("max_disk=500", "max_disk must be a string, got 500; put it into quotes"),
        ("max_disk=0x", "max_disk must be such as 500MB, 2GB or 1.5x, or null, got '0x'"),
        ("max_disk=5MiB", "max_disk must be such as 500MB, 2GB or 1.5x, or null, got '5MiB'"),
        ("seed=1.5", "seed must be an integer, got 1.5"),
        ("seed=true", "seed must be an integer, got True"),
        ("seed=null", "seed must be an integer, got nothing"),
        ("train.lr='1e-5'", "train.lr must be a finite number, got '1e-5'"),
        ("train.lr=.nan", "train.lr must be a finite number, got nan"),
        ("output_dir=7", "output_dir must be a string, got 7; put it into quotes"),
        ("train.betas=[0.9]", "train.betas must be a list of 2 values, got [0.9]"),
        ("train.betas=[0.9, x]", "train.betas[1] must be a finite number, got 'x'"),
        ("train=3", "train must be a mapping of keys, got 3"),
        ("train.lr=0", "train.lr must be above 0, got 0.0"),
        ("evaluation.eval_every=0", "evaluation.eval_every must be above 0, got 0.0"),
        ("evaluation.excluded_every=0", "evaluation.excluded_every must be at least 1, got 0"),
        (
            "evaluation.cadence=steps",
            "evaluation.eval_every must be a whole number of steps with evaluation.cadence steps, "
            "got 0.25",
        ),
        ("msft.compute_budget=0", "msft.compute_budget must be above 0, got 0.0"),
        (
            "msft.peak_window=0",
            "msft.peak_window must be at least 1, or null for the paper's rule, got 0",
        ),
        (
            "msft.compute_budget=0.1",
            "msft.compute_budget (0.1 epochs) must hold at least one evaluation: raise it, "
            "or lower evaluation.eval_every (0.25 epochs)",
        ),
        (
            "msft.compute_budget=1e300",
            "msft.compute_budget (1e+300 epochs) would be more than 1,000,000 evaluations a "
            "roll-out: lower it, or raise evaluation.eval_every (0.25 epochs)",
        ),
        (
            "train.batch_size=20",
            "train.batch_size (20) must be a multiple of train.micro_batch_size (16), "
            "or not larger",
        ),
        (
            "evaluation.answer_pattern='a+'",
            "evaluation.answer_pattern 'a+' has no group: put the answer into parentheses",
        ),
        (
            "evaluation.answer_pattern='(a'",
            "evaluation.answer_pattern '(a' is not a regular expression: "
            "missing ), unterminated subpattern at position 0",
        ),
        ("msft.compute_budget=.inf", "msft.compute_budget must be a finite number, got inf"),
        (
            "msft.max_stages=0",
            "msft.max_stages must be at least 1, or null for twice the sub-datasets, got 0",
        ),
        ("msft.drop_count=0", "msft.drop_count must be at least 1, got 0"),
        ("msft.floor=0", "msft.floor must be above 0 and below 1, got 0.0"),
        ("msft.floor=1", "msft.floor must be above 0 and below 1, got 1.0"),
        ("msft.smoothing=0", "msft.smoothing must be at least 1, got 0"),
        ("msft.margin=-1", "msft.margin must be 0 or above, got -1.0"),
        ("msft.patience=0", "msft.patience must be at least 1, got 0"),
        (
            "msft.peaks=last_best",
            "msft.peaks must be one of first_best, robust, got 'last_best'; "
            "did you mean 'first_best'?",
        ),
        ("ies.delta=0", "ies.delta must be above 0, got 0.0"),
        ("ies.delta=.nan", "ies.delta must be a finite number, got nan"),
        ("ies.average=0", "ies.average must be at least 1, got 0"),
        ("dynamix.gamma=-0.1", "dynamix.gamma must be from 0 to 1, got -0.1"),
        ("dynamix.gamma=1.1", "dynamix.gamma must be from 0 to 1, got 1.1"),
        ("dynamix.alpha=1", "dynamix.alpha must be from 0 to below 1, got 1.0"),
        ("dynamix.beta=-1", "dynamix.beta must be 0 or above, got -1.0"),
        ("dynamix.every=0", "dynamix.every must be at least 1, got 0"),
        (
            "dynamix.examples=0",
            "dynamix.examples must be at least 1, or null for train.micro_batch_size, got 0",
        ),
        ("seed", "override 'seed' is not of the form key=value, as in train.lr=1e-5"),
        ("seed.a=1", "override 'seed.a=1': seed is a value, it has no keys"),
    ],
)
def test_an_invalid_setting_is_refused_with_this_message(
    folder: Path, assignment: str, message: str
) -> None:
    assert refusal(folder, MINIMAL.replace("output_dir", "seed: 0\noutput_dir", 1), assignment) == (
        message
    )


def test_a_batch_smaller_than_a_micro_batch_is_allowed(folder: Path) -> None:
    assert load(folder, MINIMAL, "train.batch_size=4").train.batch_size == 4


def test_a_missing_required_key_is_named(folder: Path) -> None:
    assert refusal(folder, "output_dir: a\ndata: {directory: .}\n") == (
        "model is missing, it has no default"
    )


def test_a_sub_dataset_given_twice_is_refused_with_both_lines(folder: Path) -> None:
    text = MINIMAL + "    arith: {train: a, validation: b}\n"
    assert refusal(folder, text) == "line 10: 'arith' is given twice, first in line 5"


@pytest.mark.parametrize(
    ("size", "expected"),
    [("1.5x", 3000), ("2 kB", 2000), ("0.5GB", 500_000_000), ("0.0001x", 1), ("2", None)],
)
def test_sizes_are_bytes_or_full_checkpoints(size: str, expected: int | None) -> None:
    assert to_bytes(size, 2000) == expected


@pytest.mark.parametrize("name", ["a b", "a/b", ".hidden", "-x", "x" * 65, "naïve"])
def test_names_that_cannot_be_refs_or_file_names_are_refused(folder: Path, name: str) -> None:
    assert "rename it" in refusal(folder, MINIMAL.replace("arith:", f"{name!r}:"))


def test_the_name_of_the_whole_mixture_is_refused(folder: Path) -> None:
    assert "names the metric of the whole mixture" in refusal(
        folder, MINIMAL.replace("arith:", "overall:")
    )


def test_a_missing_data_file_is_named_with_its_key(folder: Path) -> None:
    (folder / "dates.test.jsonl").unlink()
    assert refusal(folder).startswith(
        f"data.sub_datasets.dates.test: there is no file {folder / 'dates.test.jsonl'}; relative"
    )


def test_an_empty_mixture_is_refused(folder: Path) -> None:
    message = refusal(folder, "output_dir: a\nmodel: {path: m}\ndata: {sub_datasets: {}}\n")
    assert message.startswith("data.sub_datasets is empty")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("a: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(folder: Path, text: str, words: str) -> None:
    assert words in refusal(folder, text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(tmp_path / "nope.yaml")


def test_an_override_changes_only_the_one_of_two_mappings_that_share_an_anchor(
    folder: Path,
) -> None:
    text = """\
output_dir: a
model: {path: m}
data:
  sub_datasets:
    arith: &files {train: arith.train.jsonl, validation: arith.validation.jsonl}
    dates: *files
"""
    config = load(folder, text, "data.sub_datasets.dates.train=dates.train.jsonl")
    assert config.data.sub_datasets["dates"].train == str(folder / "dates.train.jsonl")
    assert config.data.sub_datasets["arith"].train == str(folder / "arith.train.jsonl")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("per_device_train_batch_size=8", "did you mean 'train.micro_batch_size' (examples per"),
        ("train.gradient-accumulation-steps=8", "did you mean 'train.batch_size' (examples per"),
        ("sequence_len=8", "did you mean 'data.max_length' (in tokens)?"),
        ("lora.lora_rank=8", "unknown key 'lora.lora_rank'; did you mean 'lora.r'?"),
        ("model_name_or_path=x", "did you mean 'model.path'?"),
        ("packing=true", "unknown key 'packing'; it needs none: a batch has examples of similar"),
        ("train.deepspeed=x", "it is not a key: start the run with `accelerate launch -m trainer"),
    ],
)
def test_a_name_of_another_trainer_is_answered(folder: Path, assignment: str, message: str) -> None:
    assert message in refusal(folder, MINIMAL, assignment)


def test_names_of_other_trainers_stand_for_keys_that_exist_and_are_no_keys_themselves() -> None:
    keys = set(list_keys(Config))
    names = [name for _, others in OTHER_NAMES.values() for name in others]
    names += [name for others in ABSENT.values() for name in others]
    assert set(OTHER_NAMES) <= keys
    assert sorted(names) == sorted(set(names))
    assert not {key.rpartition(".")[2] for key in keys} & set(names)
    for name in ("learning_rate", "num_train_epochs", "optim", "cutoff_len", "base_model"):
        assert find_other_name(name)
