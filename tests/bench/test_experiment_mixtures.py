"""The mixtures of the experiment: no prompt in two splits, enough held out, one answer format."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from bench.experiment.make_data import write
from bench.experiment.mixtures import END, HELD_OUT, MIXTURES, split
from bench.experiment.runs import RECIPE
from trainer.config.load import load_config

SUB_DATASETS = [(mixture, name) for mixture, subs in MIXTURES.items() for name in subs]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_no_prompt_is_asked_twice(mixture: str) -> None:
    prompts = [
        example.prompt
        for name in MIXTURES[mixture]
        for part in split(mixture, name).values()
        for example in part
    ]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize(("mixture", "name"), SUB_DATASETS)
def test_a_sub_dataset_has_its_sizes_and_the_one_format(mixture: str, name: str) -> None:
    sub, parts = MIXTURES[mixture][name], split(mixture, name)

    assert len(parts["train"]) == sub.train
    assert len(parts["validation"]) == len(parts["test"]) == HELD_OUT >= 500
    for example in itertools.chain(*parts.values()):
        assert example.prompt.endswith(END)
        assert example.completion.startswith(" ")


@pytest.mark.parametrize(("mixture", "name"), SUB_DATASETS)
def test_held_out_facts_are_others_but_where_they_are_shared(mixture: str, name: str) -> None:
    sub, parts = MIXTURES[mixture][name], split(mixture, name)
    trained = {example.fact for example in parts["train"]}
    asked = {example.fact for example in parts["validation"] + parts["test"]}

    assert bool(trained & asked) == sub.shares_facts
    assert sub.facts is None or 0.9 * sub.facts <= len(trained) <= sub.facts


def test_the_second_heterogeneous_mixture_has_no_sub_dataset_of_the_first() -> None:
    first, second = MIXTURES["heterogeneous"], MIXTURES["heterogeneous2"]

    shared = first.keys() & second.keys()
    assert all(first[name] != second[name] for name in shared)
    assert len(shared) <= 1


def test_the_files_are_the_same_each_time_and_the_recipe_reads_them(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder, "heterogeneous")
    config = load_config(RECIPE, [f"data.directory={tmp_path / 'one'}"])

    assert sorted(config.data.sub_datasets) == sorted(MIXTURES["heterogeneous"])
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
        assert first.keys() == {"prompt", "completion"}
