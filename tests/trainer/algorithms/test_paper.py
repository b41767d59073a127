"""examples/paper.yaml: the paper's settings, and rows as its data sets publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.support.tiny_runs import make_tokenizer
from trainer.config.load import dump, load_config
from trainer.config.schema import Config, SourceConfig
from trainer.data.load import load_mixture
from trainer.model.answers import AnswerRule

PAPER = Path(__file__).parents[3] / "examples" / "paper.yaml"
LABELLED = {"text": ["sand", "milk", "rock", "air"], "label": ["A", "B", "C", "D"]}
NUMBERED = {"text": ["sand", "milk", "rock"], "label": ["1", "2", "3"]}

# Invented rows with the columns, and the types of columns, of each data set's card.
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "aqua_rat": (
        {
            "question": "What is 3 + 4?",
            "options": ["A)6", "B)7", "C)8", "D)9", "E)1"],
            "rationale": "3 + 4 = 7.\nSo B.",
            "correct": "B",
        },
        "Q: What is 3 + 4?\noptions: A. 6, B. 7, C. 8, D. 9, E. 1\nA: 3 + 4 = 7.\nSo B. #### B",
    ),
    "arc_easy": (
        {"id": "x1", "question": "What is wet?", "choices": NUMBERED, "answerKey": "2"},
        "Q: What is wet?\noptions: A. sand, B. milk, C. rock\nA: #### B",
    ),
    "boolq": (
        {"question": "is milk wet", "answer": True, "passage": "Milk is a liquid."},
        "Q: Milk is a liquid. is milk wet?\nA: #### True",
    ),
    "commonsense_qa": (
        {
            "id": "x2",
            "question": "What is wet?",
            "question_concept": "wet",
            "choices": LABELLED,
            "answerKey": "B",
        },
        "Q: What is wet?\noptions: A. sand, B. milk, C. rock, D. air\nA: #### B",
    ),
    "gsm8k": (
        {"question": "Two twos?", "answer": "2 * 2 = <<2*2=4>>4\n#### 4"},
        "Q: Two twos?\nA: 2 * 2 = <<2*2=4>>4\n#### 4",
    ),
    "hellaswag": (
        {
            "ind": 1,
            "activity_label": "Cooking",
            "ctx_a": "A cook stirs.",
            "ctx_b": "she",
            "ctx": "A cook stirs. she",
            "endings": ["tastes.", "flies.", "sings.", "melts."],
            "source_id": "x",
            "split": "train",
            "split_type": "indomain",
            "label": "0",
        },
        "Q: A cook stirs. she\noptions: A. tastes., B. flies., C. sings., D. melts.\nA: #### A",
    ),
    "medmcqa": (
        {
            "id": "x3",
            "question": "Vitamin of oranges?",
            "opa": "A",
            "opb": "B",
            "opc": "C",
            "opd": "D",
            "cop": 2,
            "choice_type": "single",
            "exp": None,
            "subject_name": "Biochemistry",
            "topic_name": None,
        },
        "Q: Vitamin of oranges?\noptions: A. A, B. B, C. C, D. D\nA: #### C",
    ),
    "openbookqa": (
        {"id": "x4", "question_stem": "Cows give", "choices": LABELLED, "answerKey": "B"},
        "Q: Cows give\noptions: A. sand, B. milk, C. rock, D. air\nA: #### B",
    ),
    "sciq": (
        {
            "question": "What do cows give?",
            "distractor3": "sand",
            "distractor1": "air",
            "distractor2": "rock",
            "correct_answer": "milk",
            "support": "",
        },
        "Q: What do cows give?\nA: #### milk",
    ),
    "winogrande": (
        {
            "sentence": "The cup did not fit the box, as the _ was small.",
            "option1": "cup",
            "option2": "box",
            "answer": "2",
        },
        "Q: The cup did not fit the box, as the _ was small.\noptions: A. cup, B. box\nA: #### B",
    ),
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Return the configuration, with a directory of a data set in place of each on the hub."""
    overrides = []
    for name, (row, _) in ROWS.items():
        rows = datasets.Dataset.from_list([row] * 6)
        splits = datasets.DatasetDict(train=rows, test=rows, validation=rows)
        splits.save_to_disk(tmp_path / name)
        for split in ("train", "test"):
            overrides.append(f"data.sub_datasets.{name}.{split}.hub={tmp_path / name}")
    return load_config(PAPER, [*overrides, "data.max_length=400"])


def test_the_papers_settings_are_those_of_the_paper() -> None:
    config = load_config(PAPER)
    train, evaluation, data = config.train, config.evaluation, config.data
    assert (train.optimizer, train.lr, train.schedule) == ("adam", 1e-5, "constant")
    assert (train.warmup_ratio, train.weight_decay, train.batch_size) == (0.0, 0.0, 64)
    assert (config.model.dtype, data.max_length, data.max_examples) == ("bfloat16", 512, 1800)
    assert (evaluation.eval_every, evaluation.metric) == (0.25, "exact_match")
    assert (config.msft.compute_budget, config.msft.optimizer_on_rollback) == (10.0, "reset")
    assert sorted(data.sub_datasets) == sorted(ROWS)
    hubs = {
        sub.train.hub for sub in data.sub_datasets.values() if isinstance(sub.train, SourceConfig)
    }
    assert len(hubs) == 10


def test_the_model_can_be_another_and_the_configuration_is_loaded_again(tmp_path: Path) -> None:
    config = load_config(PAPER, [f"model.path={tmp_path}", "msft.compute_budget=1"])
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


def test_rows_of_every_data_set_become_examples(config: Config) -> None:
    tokenizer = make_tokenizer()
    mixture = load_mixture(config.data, tokenizer)
    for name, (_, text) in ROWS.items():
        sub = mixture[name]
        assert sub.test is not None
        assert (len(sub.train.examples), len(sub.validation.examples)) == (5, 1)
        for example in (*sub.train.examples, *sub.validation.examples, *sub.test.examples):
            assert tokenizer.decode([*example.prompt, *example.completion]) == f"{text}<eos>"
            assert example.completion[0] == tokenizer.encode(" ")[0]
    references = {name: sub.validation.examples for name, sub in mixture.items()}
    AnswerRule.of(config.evaluation).check(references)
