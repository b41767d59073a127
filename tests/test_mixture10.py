"""The experiment on ten sub-datasets: its data is what its script writes, its recipe loads."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from bench.mixture10.make_data import DATA, write
from bench.mixture10.tasks import HELD_OUT, MIXTURE, split
from trainer.config.load import load_config

SPLITS = ("train", "validation", "test")


def records(name: str, part: str) -> list[dict[str, str]]:
    lines = (DATA / f"{name}.{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_script_writes_the_committed_files_again(tmp_path: Path) -> None:
    write(tmp_path)

    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_bytes() for path in DATA.iterdir()}
    assert written == committed


def test_no_prompt_is_asked_twice() -> None:
    prompts = [
        record["prompt"] for name in MIXTURE for part in SPLITS for record in records(name, part)
    ]
    assert len(set(prompts)) == len(prompts)


def test_ten_sub_datasets_of_different_sizes_hold_out_enough() -> None:
    sizes = {name: len(records(name, "train")) for name in MIXTURE}

    assert len(sizes) == 10
    assert max(sizes.values()) >= 2 * min(sizes.values())
    assert sizes == {name: sub.train for name, sub in MIXTURE.items()}
    for name, part in itertools.product(MIXTURE, ("validation", "test")):
        assert len(records(name, part)) == HELD_OUT >= 128


@pytest.mark.parametrize("name", MIXTURE)
def test_held_out_facts_are_others_but_where_they_are_shared(name: str) -> None:
    parts = split(MIXTURE[name])
    trained = {example.fact for example in parts["train"]}
    asked = {example.fact for example in parts["validation"] + parts["test"]}

    assert bool(trained & asked) == MIXTURE[name].shares_facts
    assert len(trained) == MIXTURE[name].facts or MIXTURE[name].facts is None


@pytest.mark.parametrize("name", MIXTURE)
def test_the_long_form_has_as_many_of_each_and_holds_out_the_same(name: str) -> None:
    short, long = split(MIXTURE[name]), split(MIXTURE[name], train=1800)

    assert len({example.prompt for example in long["train"]}) == 1800
    assert [long[part] for part in SPLITS[1:]] == [short[part] for part in SPLITS[1:]]


def test_the_recipe_is_of_the_paper_where_it_says_so() -> None:
    config = load_config(DATA.parent / "mixture10.yaml")

    assert sorted(config.data.sub_datasets) == sorted(MIXTURE)
    assert all(files.test for files in config.data.sub_datasets.values())
    assert (config.train.optimizer, config.train.schedule) == ("adam", "constant")
    assert (config.model.dtype, config.evaluation.eval_every) == ("bfloat16", 0.25)
    assert Path(config.model.path, "model.safetensors").is_file()
