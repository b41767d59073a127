"""The bundled example: its files are what its scripts write, and fit each other."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trainer.config.load import load_config

EXAMPLE = Path(__file__).parent.parent / "examples" / "stdlib_tasks"
DATA = EXAMPLE / "data"
BASE = EXAMPLE / "base"
SPLITS = ("train", "validation", "test")
NAMES = sorted(path.name.split(".")[0] for path in DATA.glob("*.train.jsonl"))


def records(name: str, split: str) -> list[dict[str, str]]:
    lines = (DATA / f"{name}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE)


def test_the_script_writes_the_committed_files_again(tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLE / "make_data.py", tmp_path], check=True, timeout=60)

    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_bytes() for path in DATA.iterdir()}
    assert written == committed


def test_there_are_sub_datasets_of_different_sizes() -> None:
    sizes = {name: len(records(name, "train")) for name in NAMES}

    assert len(sizes) >= 6
    assert max(sizes.values()) >= 3 * min(sizes.values())


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_is_in_two_splits(name: str) -> None:
    prompts = {split: {r["prompt"] for r in records(name, split)} for split in SPLITS}

    for one, other in itertools.combinations(SPLITS, 2):
        assert not prompts[one] & prompts[other]


@pytest.mark.parametrize("name", NAMES)
def test_a_split_has_no_prompt_twice(name: str) -> None:
    for split in SPLITS:
        prompts = [r["prompt"] for r in records(name, split)]
        assert len(set(prompts)) == len(prompts)


def test_the_base_is_a_small_bf16_model() -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto")

    assert sum(parameter.numel() for parameter in model.parameters()) <= 6_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 12_000_000


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_gives_all_text_back(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    for split in SPLITS:
        for record in records(name, split):
            text = record["prompt"] + record["completion"]
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", NAMES)
def test_a_completion_is_tokenized_alike_with_and_without_its_prompt(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    for record in records(name, "train"):
        prompt, completion = record["prompt"], record["completion"]
        apart = tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]
        assert tokenizer(prompt + completion)["input_ids"] == apart


def test_the_tokenizer_has_eos_and_padding_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_every_example_and_every_answer_fits_the_demo(tokenizer: PreTrainedTokenizerBase) -> None:
    config = load_config(EXAMPLE / "demo.yaml")

    assert sorted(config.data.sub_datasets) == NAMES
    for name, split in itertools.product(NAMES, SPLITS):
        for record in records(name, split):
            answer = len(tokenizer(record["completion"])["input_ids"]) + 1  # with EOS
            assert len(tokenizer(record["prompt"])["input_ids"]) + answer <= config.data.max_length
            assert answer <= config.evaluation.max_new_tokens
