"""Models with code of their own, encoder-decoders, revisions, and frozen weights in few bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration, dynamic_module_utils

from tests.support.tiny_runs import make_config, make_tokenizer, write_model
from trainer.config.schema import ModelConfig
from trainer.errors import ConfigError
from trainer.journal import effective, read
from trainer.model import load
from trainer.model.evaluate import Evaluator
from trainer.model.load import load_model
from trainer.training.run import start
from trainer.training.workspace import open_workspace

CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM

class OwnConfig(Qwen2Config):
    model_type = "own"

class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_on_request_and_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = write_model(tmp_path / "model")
    (directory / "own.py").write_text(CODE)
    settings = json.loads((directory / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    settings["auto_map"]["AutoModelForCausalLM"] = "own.OwnModel"
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"set model.trust_remote_code: true if you trust it"):
        load_model(ModelConfig(path=str(directory)))
    assert caplog.text == ""
    loaded = load_model(ModelConfig(path=str(directory), trust_remote_code=True))
    assert type(loaded.model).__name__ == "OwnModel"
    assert f"Python code in {directory} may run" in caplog.text


def test_an_encoder_decoder_is_refused_with_the_page_that_helps(tmp_path):
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=259, **sizes)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_model(ModelConfig(path=str(tmp_path)))
    assert "is an encoder-decoder (t5), and msft-train trains causal" in str(caught.value)
    page = next(word for word in str(caught.value).split() if word.endswith(".md"))
    assert (Path(__file__).parents[3] / page).is_file()


def test_the_revision_is_the_one_that_is_downloaded(tmp_path, monkeypatch):
    directory, asked = write_model(tmp_path / "model"), {}

    def download(path, **options):
        asked.update(options)
        return str(directory)

    monkeypatch.setattr(load, "snapshot_download", download)
    load_model(ModelConfig(path="org/model", revision="v1.0"))
    assert asked["revision"] == "v1.0"
    assert "*.py" not in asked["allow_patterns"]
    with pytest.raises(ConfigError, match=r"model.revision goes with an id on the hub, but"):
        make_config(tmp_path, model={"path": "model", "revision": "v1.0"})


def test_few_bits_without_an_adapter_or_the_package_are_refused(tmp_path, monkeypatch):
    model = {"path": "base", "dtype": "float32", "quantization": "nf4"}
    with pytest.raises(
        ConfigError, match=r"model.quantization nf4 is for frozen weights: set lora"
    ):
        make_config(tmp_path, model=model)
    monkeypatch.setattr("trainer.config.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs bitsandbytes, which is not installed"):
        make_config(tmp_path, model=model, lora={"r": 2})


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_an_adapter_trains_on_frozen_weights_in_few_bits(tmp_path, kind, package):
    pytest.importorskip(package)
    model = {"path": "base", "dtype": "float32", "quantization": kind}
    config = make_config(
        tmp_path, model=model, lora={"r": 2}, train__lr=0.02, msft__compute_budget=0.5
    )
    start(config)
    with open_workspace(config) as work:
        layers = [type(p).__name__ for p in work.loaded.model.parameters() if not p.requires_grad]
        assert {"int8": "Int8Tensor", "nf4": "Params4bit"}[kind] in layers
        evaluator = Evaluator(config.evaluation, work.loaded, work.accelerator)
        metrics = evaluator(work.loaded.model, work.split("test")).metrics
        # Nothing that was evaluated, trained or saved meanwhile changes the frozen weights.
        work.loaded.model.state_dict()
        assert evaluator(work.loaded.model, work.split("test")).metrics == metrics
    events = effective(read(Path(config.output_dir) / "journal.jsonl"))
    tested = {r["what"]: r["metrics"] for r in events if r["event"] == "tested"}
    assert tested["base"] == metrics
    assert tested["result"]["overall"] < tested["base"]["overall"]
    assert torch.get_default_dtype() is torch.float32
