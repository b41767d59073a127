"""Loss and exact match do not depend on how examples are batched, and match plain generation."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from transformers import GenerationConfig

from msft_store import Store
from tests.support.tiny_runs import make_tokenizer, write_model
from trainer.config.schema import EvalConfig, ModelConfig
from trainer.data.encode import encode
from trainer.model.answers import AnswerRule
from trainer.model.evaluate import Evaluator
from trainer.model.forward import collate, target_losses
from trainer.model.load import load_model

TOKENIZER = make_tokenizer()
TEXTS = [
    ("1+1=", "2"),
    ("say a:", "ok"),
    ("a long prompt, ", "and long é"),
    ("x", ""),
    ("q=", "zz"),
]
EXAMPLES = [encode({"prompt": p, "completion": c}, TOKENIZER) for p, c in TEXTS]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model that has memorised some of the examples, so that verdicts differ."""
    loaded = load_model(
        ModelConfig(path=str(write_model(tmp_path_factory.mktemp("model"))), dtype="float32")
    )
    optimizer = torch.optim.Adam(loaded.model.parameters(), lr=1e-2)
    batch = collate([EXAMPLES[0], EXAMPLES[2], EXAMPLES[3]], pad_token_id=1)
    for _ in range(40):
        optimizer.zero_grad()
        target_losses(loaded.model, batch)[0].mean().backward()
        optimizer.step()
    return loaded


def evaluate(loaded, examples=EXAMPLES, **config):
    evaluator = Evaluator(EvalConfig(**{"max_new_tokens": 12, **config}), loaded, Accelerator())
    return evaluator(loaded.model, {"all": examples})


def test_the_bytes_of_the_base_are_those_of_the_files_that_are_read(tmp_path):
    directory = write_model(tmp_path / "model")
    size = (directory / "model.safetensors").stat().st_size
    for variant in ("model.fp32.safetensors", "consolidated.safetensors"):
        shutil.copy(directory / "model.safetensors", directory / variant)
    store = Store.create(tmp_path / "store")
    assert [size for _, size in store.add_base(directory).files] == [size]
    model = load_model(ModelConfig(path=str(directory))).model
    model.save_pretrained(directory / "shards", max_shard_size="20KB")
    shutil.copy(directory / "model.safetensors", directory / "shards" / "other.safetensors")
    for file in directory.glob("tokenizer*"):
        shutil.copy(file, directory / "shards")
    shards = list((directory / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    found = [size for _, size in store.add_base(directory / "shards").files]
    assert sorted(found) == sorted(file.stat().st_size for file in shards)


def generate(loaded, example, max_new_tokens):
    """Greedy generation of one example, by transformers alone."""
    output = loaded.model.generate(
        torch.tensor([example.prompt]),
        attention_mask=torch.ones(1, len(example.prompt), dtype=torch.long),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=0, pad_token_id=1
        ),
    )
    return TOKENIZER.decode(output[0, len(example.prompt) :].tolist(), skip_special_tokens=True)


def test_the_loss_is_that_of_transformers(loaded):
    example = EXAMPLES[2]
    batch = collate([example], pad_token_id=1)
    expected = loaded.model(input_ids=batch.input_ids, labels=batch.labels).loss
    losses, logits = target_losses(loaded.model, batch)
    assert losses.shape == (len(example.completion),)
    assert logits.shape == (len(example.completion), 259)
    torch.testing.assert_close(losses.mean(), expected)


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_results_do_not_depend_on_batches_and_padding(loaded, metric):
    alone = evaluate(loaded, metric=metric, batch_size=1)
    together = evaluate(loaded, metric=metric, batch_size=5)
    assert together.metrics == pytest.approx(alone.metrics, abs=1e-5)
    assert together.losses == pytest.approx(alone.losses, abs=1e-5)
    assert alone.cost.tokens == together.cost.tokens
    assert together.cost.padded_tokens > alone.cost.padded_tokens == 0


def test_results_do_not_depend_on_earlier_evaluations(loaded):
    first = evaluate(loaded, batch_size=2)
    evaluate(loaded, EXAMPLES[:1])
    again = evaluate(loaded, list(EXAMPLES), batch_size=2)
    assert (again.metrics, again.losses) == (first.metrics, first.losses)


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [(None, "text"), (r"([a-z]+)$", "text"), (r"(\d)", "number"), (None, "folded")],
)
@pytest.mark.parametrize("max_new_tokens", [1, 2, 12])
def test_verdicts_are_those_of_plain_generation(loaded, pattern, kind, max_new_tokens):
    rule = AnswerRule(pattern=re.compile(pattern) if pattern else None, kind=kind)
    verdicts = []
    for example in EXAMPLES:
        text = generate(loaded, example, max_new_tokens)
        expected = rule.is_right(text, example.reference)
        settings = {"answer_pattern": pattern, "answer": kind, "max_new_tokens": max_new_tokens}
        found = evaluate(loaded, [example], **settings)
        assert found.metrics["all"] == float(expected)
        verdicts.append(expected)
    assert any(verdicts)
    assert not all(verdicts)


def test_generation_stops_at_eos_and_is_counted(loaded):
    result = evaluate(loaded, [EXAMPLES[0]], answer_pattern=r"(\w+)", max_new_tokens=12)
    assert result.metrics["all"] == 1.0
    assert result.cost.generated_tokens == 0, "the forward pass has shown the whole generation"
    other = encode({"prompt": "1+1=", "completion": "it is 2"}, TOKENIZER)
    result = evaluate(loaded, [other], answer_pattern=r"(\d)", max_new_tokens=12)
    assert result.metrics["all"] == 1.0
    assert result.cost.generated_tokens == 2, "the digit and EOS"


def test_the_models_own_generation_settings_and_mode_stay_and_do_not_matter(loaded):
    plain = evaluate(loaded, answer_pattern="(.)")
    loaded.model.generation_config.repetition_penalty = 50.0
    loaded.model.train()
    changed = evaluate(loaded, answer_pattern="(.)")
    assert changed.metrics == plain.metrics
    assert loaded.model.training
    assert loaded.model.generation_config.repetition_penalty == 50.0
    loaded.model.generation_config.repetition_penalty = None
    loaded.model.eval()


def test_overall_weights_examples_or_sub_datasets(loaded):
    split = {"a": EXAMPLES[:1], "b": [EXAMPLES[1], EXAMPLES[4]]}
    metrics = {}
    for how in ("examples", "sub_datasets"):
        evaluator = Evaluator(EvalConfig(overall=how, max_new_tokens=8), loaded, Accelerator())
        metrics[how] = evaluator(loaded.model, split).metrics
    assert metrics["examples"] == {"a": 1.0, "b": 0.0, "overall": pytest.approx(1 / 3)}
    assert metrics["sub_datasets"]["overall"] == 0.5
