"""Trainers of TRL and transformers as stages of a run, with the options that people use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from msft_store import Store
from tests.support.tiny_runs import make_model, make_tokenizer
from trainer.hf import MsftRun
from trainer.hf import run as hf_run
from trainer.journal import effective, read

OWN = {
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "logging_strategy": "no",
}
LETTERS = "abcdefghijkl"
SETTINGS = {"compute_budget": 1.0, "eval_every": 0.5, "max_stages": 2}

GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}<{{ m.content }}>{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    """Drawing the plots of a report would take most of the time here."""
    monkeypatch.setattr(hf_run, "write_report", lambda directory: None)


def sets(make_row):
    """Return a mixture of two sub-datasets of TRL's rows."""
    found = {}
    for name, answer in (("copy", lambda a: a), ("same", lambda a: "ok")):
        rows = [make_row(f"{name} {a}{b}:", answer(a)) for a in LETTERS for b in "xy"]
        found[name] = Dataset.from_list(rows[:16]), Dataset.from_list(rows[16:])
    return found


def completion_row(prompt, answer):
    return {"prompt": prompt, "completion": answer}


def text_row(prompt, answer):
    return {"text": prompt + answer}


def chat_row(prompt, answer):
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
    }


def trl(directory, mixture, *, peft_config=None, template=None, **own):
    tokenizer = make_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    model = make_model()

    def make_trainer(model, train_dataset, eval_dataset, callbacks, **overrides):
        return SFTTrainer(
            model=model,
            args=SFTConfig(**{**OWN, "bf16": False, "max_length": 48, **own, **overrides}),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )

    return MsftRun(make_trainer, model, mixture, output_dir=directory, **SETTINGS)


def check(result, directory):
    """Check that a run of two stages ended with the weights of its result."""
    store = Store.open(directory / "store")
    assert [c.id for c in store.log()] == [result.checkpoint.id]
    stages = {record["stage"] for record in result.decisions}
    assert stages == {1, 2}
    assert store.check(read_data=True) == []
    return [r for r in effective(read(directory / "journal.jsonl")) if r["event"] == "trained"]


@pytest.mark.parametrize(
    ("make_row", "own"),
    [
        (completion_row, {"completion_only_loss": True}),
        (text_row, {"packing": True, "max_length": 32}),
        (chat_row, {"assistant_only_loss": True, "template": GENERATION}),
        (text_row, {"gradient_accumulation_steps": 2}),
    ],
    ids=["completion-only", "packing", "assistant-only", "accumulation"],
)
def test_the_sft_trainer_of_trl_runs_with_its_options(make_row, own, tmp_path):
    records = check(trl(tmp_path, sets(make_row), **own).train(), tmp_path)
    for record in records:
        assert record["tokens"] > 0
        assert 0 < record["target_tokens"] <= record["tokens"]
    if "packing" in own:
        assert sum(record["padded_tokens"] for record in records) == 0


def test_trl_may_make_the_adapter_in_every_stage(tmp_path):
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    run = trl(tmp_path, sets(completion_row), peft_config=adapter)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    result = run.train()
    check(result, tmp_path)
    adapted = Store.open(tmp_path / "store").load(result.checkpoint.id)
    assert all("lora" in name for name in adapted)
    assert any(tensor.count_nonzero() for name, tensor in adapted.items() if "lora_B" in name)
    plain = result.model.unload().state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in before.items())


def test_a_sequence_to_sequence_model_runs(tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
            pad_token_id=1, eos_token_id=0, decoder_start_token_id=1,
        )
    )  # fmt: skip

    def tokens(prompt, answer):
        return {
            "input_ids": tokenizer(prompt)["input_ids"],
            "labels": [*tokenizer(answer)["input_ids"], 0],
        }

    def make_trainer(model, train_dataset, eval_dataset, callbacks, **overrides):
        return Seq2SeqTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(**{**OWN, **overrides}),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            callbacks=callbacks,
        )

    run = MsftRun(make_trainer, model, sets(tokens), output_dir=tmp_path, **SETTINGS)
    records = check(run.train(), tmp_path)
    assert all(record["tokens"] > record["target_tokens"] > 0 for record in records)


def test_a_metric_of_the_users_own_decides(tmp_path):
    tokenizer = make_tokenizer()

    def tokens(prompt, answer):
        ids = tokenizer(prompt + answer)["input_ids"][:10]
        ids += [1] * (10 - len(ids))
        return {"input_ids": ids, "labels": ids}

    def accuracy(prediction):
        guesses = np.argmax(prediction.predictions, -1)[:, :-1]
        return {"accuracy": float((guesses == prediction.label_ids[:, 1:]).mean())}

    def make_trainer(model, train_dataset, eval_dataset, callbacks, **overrides):
        return Trainer(
            model=model,
            args=TrainingArguments(**{**OWN, **overrides}),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=accuracy,
            callbacks=callbacks,
        )

    settings = {**SETTINGS, "metric": "accuracy", "mode": "max"}
    run = MsftRun(make_trainer, make_model(), sets(tokens), output_dir=tmp_path, **settings)
    result = run.train()
    check(result, tmp_path)
    values = [
        record["metrics"]["overall"]
        for record in effective(read(tmp_path / "journal.jsonl"))
        if record["event"] == "evaluated"
    ]
    assert result.checkpoint.metrics["overall"] == max(values)
